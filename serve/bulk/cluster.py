"""A job on a cluster: Ray hands out the shards, and one row of its data is one shard.

An actor has an engine of its own; it makes a shard, puts it, and returns a receipt. Pictures never enter Ray's object
store. A shard that is made twice, since a node was lost or the driver came back, is the same bytes under the same name,
so nothing has to be told to anybody.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import warnings
from contextlib import redirect_stdout
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np

from serve import devices
from serve.bulk.job import Job
from serve.bulk.run import Done, Kept, Receipt, shard
from serve.bulk.store import URL, open_store
from serve.bundle import Bundle, parse
from serve.card import Card
from serve.errors import JobError
from serve.model import EXACT

TRIES = 3  # of a shard, where its node is lost; Ray's own number for a pool's actors is endless
LOCAL = "local"
PATIENCE = 5.0  # seconds until a connection
BLOCKS = 10_000  # that Ray plans at most; beyond, a block has several shards


class Cluster:
    """A model on a Ray cluster.

    Args:
        address: Ray's, or LOCAL for this machine alone.
        bundle: The model; its bytes travel once.
        device: Of each worker: on a GPU it takes one for itself, else one processor.
        arithmetic: As `Engine` takes it.
        workers: The most there are; 0 for as many as the cluster has room for.

    Attributes:
        card: As `GenerativeModel.card`; `name`, `digest` and `arithmetic` likewise.
    """

    def __init__(
        self,
        address: str,
        bundle: Bundle,
        device: str = "auto",
        arithmetic: Literal["exact", "fast"] = "exact",
        workers: int = 0,
    ) -> None:
        self._address, self._bundle, self._device, self._workers = address, bundle, device, workers
        self._asked: Literal["exact", "fast"] = arithmetic
        self.card: Card = bundle.card
        self.name, self.digest = bundle.card.name, bundle.digest
        self.arithmetic = EXACT if arithmetic == EXACT else devices.fastest(devices.candidates(device)[0])

    def complete(self, job: Job, place: str, done: Done) -> Kept:
        """Make what is missing of a job, in the store at a path or URL that all nodes have and this process holds.

        Args:
            job: As `held` gives it.
            place: The store.
            done: As `run.complete` takes it.

        Raises:
            JobError: Ray is not installed, does not answer, or cannot complete the job.
        """
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what its core logs is for its log files
        try:
            ray, data = import_module("ray"), import_module("ray.data")
        except ImportError:
            raise JobError("--ray takes pip install '.[ray]' in the checkout") from None
        logging.getLogger("ray").setLevel(logging.ERROR)
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        with redirect_stdout(sys.stderr):  # whatever Ray prints is not what this command says
            try:
                _check_listens(self._address)
                where = {"include_dashboard": False} if self._address == LOCAL else {"address": self._address}
                ray.init(log_to_driver=False, logging_level=logging.ERROR, **where)
            except Exception as error:  # its exceptions share no base
                raise JobError(
                    f"no Ray cluster answers at {self._address}: {error}; start one with ray start --head"
                ) from None
            try:
                kept = Kept()
                for row in self._rows(ray, data, job, place).iter_rows():
                    values = {key: value.item() if hasattr(value, "item") else value for key, value in row.items()}
                    receipt = Receipt(**values)
                    kept.add(receipt)
                    done(receipt.count, receipt.bytes)
            except ray.exceptions.RayError as error:
                reason = str(error).strip().splitlines()[-1]
                raise JobError(f"the cluster cannot complete {place}: {reason}; the same command goes on") from None
            finally:
                ray.shutdown()
        kept.receipts.sort(key=lambda receipt: receipt.name)
        return kept

    def _rows(self, ray: Any, data: Any, job: Job, place: str) -> Any:
        """Return Ray's dataset of receipts, which are still to come."""
        data.DataContext.get_current().enable_progress_bars = False
        gpu = self._device.startswith(("cuda", "tensorrt"))
        room = int(ray.cluster_resources().get("GPU" if gpu else "CPU", 0))
        store = place if URL.match(place) else str(Path(place).absolute())
        asked = (ray.put(self._bundle.data), asdict(job), store, self._device, self._asked, 0 if gpu else 1)
        # The rows come from here: tasks that read them would wait for processors that the workers have.
        rows = data.from_items(
            [{"id": number} for number in range(job.files)], override_num_blocks=min(job.files, BLOCKS)
        )
        with warnings.catch_warnings():
            # The only way to bound the retries, which are endless otherwise, is one that Ray is about to change.
            warnings.simplefilter("ignore")
            return rows.map_batches(
                ShardWriter,
                fn_constructor_args=asked,
                batch_size=1,
                compute=data.ActorPoolStrategy(min_size=1, max_size=max(1, min(job.files, self._workers or room))),
                max_restarts=TRIES,
                max_task_retries=TRIES,
                **({"num_gpus": 1} if gpu else {"num_cpus": 1}),
            )


class ShardWriter:
    """An actor: makes the shards whose numbers it is given.

    Args:
        model: Ray's reference to the model file's bytes.
        job: What is wanted, as a dictionary.
        place: The store's path or URL.
        device: As `Engine` takes it.
        arithmetic: As `Engine` takes it.
        threads: As `Engine` takes it.

    Raises:
        JobError: this node computes something else than the job wants.
    """

    def __init__(
        self,
        model: Any,
        job: dict[str, Any],
        place: str,
        device: str,
        arithmetic: Literal["exact", "fast"],
        threads: int,
    ) -> None:
        from serve.engine import Engine

        self._job, self._store = Job(**job), open_store(place)
        self._engine = Engine(parse(import_module("ray").get(model)), device, threads, arithmetic=arithmetic)
        for what, wanted, received in (
            ("model", self._job.digest, self._engine.digest),
            ("arithmetic", self._job.arithmetic, self._engine.arithmetic),
        ):
            if wanted != received:
                raise JobError(f"a worker should make samples in the {what} {wanted}. Received: {received}")

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        """Return the receipts of the shards with the numbers rows["id"], a column for each of their values."""
        made = [asdict(shard(self._job, self._job.file(int(each)), self._engine, self._store)) for each in rows["id"]]
        return {key: np.array([each[key] for each in made]) for key in made[0]}


def _check_listens(address: str) -> None:
    """Raise OSError where nobody listens at HOST:PORT: Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    if port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()
