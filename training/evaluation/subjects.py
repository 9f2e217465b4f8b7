"""What can be measured: a run, in every respect, or a bundle, of which there are only samples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from serve.bundle import load
from serve.engine import Engine
from training.errors import RunError
from training.evaluation.evaluator import Evaluator, Plan
from training.evaluation.latents import Tally
from training.evaluation.reference import pictures_of
from training.evaluation.sampling import FirstStage, LatentSampler
from training.evaluation.snapshots import found
from training.model.normalise import MODES
from training.record.models import load_model
from training.record.run import Run
from training.types import Record

SETS = {"normal": "GEN-1", "second-stage": "GEN-2", "gaussian": "Gaussian", "gmm": "GMM"}


def _made_by(recipe: Record) -> dict[str, str]:
    """Return what distinguishes the records of a sharpened decoder from those of stage 1's own."""
    return {"decoder": "sharpened"} if recipe.get("epochs3") else {}


class RunSubject:
    """A finished run. The constructor checks that it has all that the plan asks for, before any long work.

    Attributes:
        name: The name of its folder.
        pictures: The recipe to read pictures with.
        recipe: The same recipe as JSON-ready values.
        trained_on: The digest of the pictures that it was trained on.

    Raises:
        RunError: the run is not finished, lacks a prior or the snapshots asked for, holds measurements that cannot be
            read; or an option of the plan would change nothing.
    """

    def __init__(self, run: Run, plan: Plan) -> None:
        self.run, self.plan = run, plan
        self.name = run.path.resolve().name
        self.pictures = run.recipe
        self.recipe: dict[str, Any] = run.recipe.to_dict()
        self.trained_on: str = run.config["data"]["digest"]
        if plan.plain and not self.pictures.epochs3:
            raise RunError(f"--plain is for runs that are sharpened, and {run.path} is not to be; leave it out")
        self.first = FirstStage(run.load_networks(1), run.decoder(plan.plain))
        self.made_by = {} if plan.plain else _made_by(self.recipe)
        names = self._priors()
        if plan.modes and names == ("normal",):
            raise RunError("--normalise is for fitted priors, and only the normal one is measured; leave it out")
        if plan.latent_noise and "second-stage" not in names:
            raise RunError("--latent-noise is the second stage's, which is not measured; leave it out")
        self.sampled = [(LatentSampler(run, name, plan.latent_noise), self._modes(name)) for name in names]
        self.snapshots = found(run) if plan.snapshots else []
        _ = run.metrics  # raises now if it cannot be read, as records will be added to it

    def _priors(self) -> tuple[str, ...]:
        here = self.run.priors
        for name in self.plan.priors:
            if name not in here:
                raise RunError(f"{self.run.path} has no prior {name!r}; it has {', '.join(here)}")
        if self.plan.priors:
            return tuple(dict.fromkeys(self.plan.priors))
        if missing := [name for name in self.pictures.priors if name not in here]:
            raise RunError(
                f"{self.run.path} is not finished: it has no prior {missing[0]!r} yet; run train-vae to its end, or "
                "measure what there is by --prior normal"
            )
        return here

    def _modes(self, prior: str) -> tuple[str, ...]:
        """Return the latent normalisations of a prior.

        A fitted density has the variance of the latents already, so it is only normalised on request; the standard
        normal never is.
        """
        if prior == "normal":
            return ("none",)
        return self.plan.modes or (MODES if prior == "second-stage" else ("none",))

    def records(self, evaluator: Evaluator) -> Iterator[Record]:
        """Yield REC and the latents, then every prior under every normalisation, then the snapshots."""
        tally = Tally()
        yield self._reconstructions(evaluator, self.first, tally, **self.made_by)
        reference = evaluator.reference
        yield {
            "metric": "latents",
            **tally.summary(),
            "count": len(reference),
            "reference": reference.card,
            **self.made_by,
        }
        for sampler, modes in self.sampled:
            for mode in modes:
                yield self._samples(evaluator, self.first, sampler, mode, **self.made_by)
        for epoch, path in self.snapshots:
            first = FirstStage(load_model(path))
            yield self._reconstructions(evaluator, first, Tally(), epoch=epoch)
            yield self._samples(evaluator, first, LatentSampler(self.run, "normal"), "none", epoch=epoch)

    def _reconstructions(
        self, evaluator: Evaluator, first: FirstStage, tally: Tally, **protocol: str | float
    ) -> Record:
        pictures = first.reconstruct(evaluator.reference.batches(self.plan.batch), tally)
        return evaluator(pictures, len(evaluator.reference), "REC", **protocol)

    def _samples(
        self, evaluator: Evaluator, first: FirstStage, sampler: LatentSampler, mode: str, **protocol: str | float
    ) -> Record:
        plan, name = self.plan, sampler.name
        if sampler.gamma:
            protocol["latent_noise"] = sampler.gamma
        latents = sampler.latents(plan.seed, plan.count, plan.batch, sampler.normalisation(mode))
        return evaluator(first.decode(latents), plan.count, SETS[name], prior=name, normalisation=mode, **protocol)


class BundleSubject:
    """A bundle on the engine that serves it. It has no encoder, so there are neither reconstructions nor latents.

    Attributes:
        name: The name of its file, as a run may have the model's own.
        pictures: A recipe that reads and splits pictures as the bundle's own did.
        recipe: The recipe on the bundle's card.
        trained_on: The digest of the pictures that it was trained on.

    Raises:
        BundleError: the file is not a bundle.
        EngineError: it cannot be run here.
    """

    def __init__(self, path: Path, plan: Plan) -> None:
        bundle = load(path)
        self.plan, self.card = plan, bundle.card
        self.name, self.recipe = path.name, bundle.card.recipe
        self.pictures = pictures_of(bundle.card, split=True)
        self.trained_on = str(bundle.card.dataset.get("digest", ""))
        self.engine = Engine(bundle, batch=plan.batch)

    def records(self, evaluator: Evaluator) -> Iterator[Record]:
        """Yield the record of the bundle's samples."""
        plan, prior = self.plan, self.card.prior
        pictures = (images for _, images in self.engine.stream(plan.seed, 0, plan.count))
        mode = self.card.normalisation["mode"]
        made_by = _made_by(self.recipe)
        yield evaluator(pictures, plan.count, SETS.get(prior, prior), prior=prior, normalisation=mode, **made_by)
