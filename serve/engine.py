"""The engine: a bundle on a device. It takes noise and gives uint8 images, and knows nothing of files or wires.

Batches run in a few fixed sizes (`serve.buckets`), and what is short is padded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from serve import devices, openvino
from serve.buckets import BATCH, Buckets, reference, sizes
from serve.bundle import Bundle
from serve.card import Card
from serve.devices import Device
from serve.encoding import pictures
from serve.errors import EngineError
from serve.model import EXACT, Decode, Images, as_noise, check_sampling
from serve.noise import Noise, draw
from serve.text import quoted

if TYPE_CHECKING:
    from PIL.Image import Image

ARITHMETICS = ("exact", "fast")
COMPARED = 16  # samples that fast arithmetic is compared with exact in
MOST_DIFFERENCE = 1.0  # grey levels on average, of these; as many as export-onnx allows int8

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Difference:
    """How far samples are from those of exact arithmetic, in grey levels.

    Attributes:
        mean: Over all values.
        worst: Of all values.
        samples: That were compared.
    """

    mean: float
    worst: int
    samples: int

    def __str__(self) -> str:
        return f"{self.mean:.2f} grey levels from exact on average, {self.worst} at most, in {self.samples} samples"


class Engine:
    """A bundle ready to run: a `serve.model.GenerativeModel` in this process.

    Args:
        bundle: The model.
        device: As `serve.devices.parse` takes it, or "auto": CUDA if it is there, else the CPU, by OpenVINO where that
            is faster: in fast arithmetic, unless the bundle is in int8.
        threads: CPU threads; 0 for all cores.
        batch: The most samples at a time; 0 for the device's default. It changes speed, never samples.
        arithmetic: "exact", or "fast" for the fastest that the device has; where that is exact, a warning says so.
        cuda_graphs: Replay each bucket's kernels as one; needs a CUDA device.
        cache: Where TensorRT keeps what it compiled; None for the user's cache.

    Attributes:
        card: What the bundle says of itself.
        digest: SHA-256 of the bundle.
        device: Where it runs, such as "cpu" or "cuda:0".
        arithmetic: What it computes in: "exact", or "bfloat16" or "float16".
        difference: Of its samples from those of exact arithmetic, as measured at the start; None where it is exact.
        batch: The most samples that one `compute` takes.

    Raises:
        EngineError: no ONNX Runtime, no such device, too little memory, a graph that the runtime refuses or that
            gives other images than the card says, or fast arithmetic that is too far from exact.

    >>> engine = Engine(load())
    >>> engine.sample(seed=7, start=100, count=5).shape
    (5, 64, 64, 3)
    """

    def __init__(
        self,
        bundle: Bundle,
        device: str = "auto",
        threads: int = 0,
        batch: int = 0,
        *,
        arithmetic: Literal["exact", "fast"] = "exact",
        cuda_graphs: bool = False,
        cache: Path | None = None,
    ) -> None:
        self.card: Card = bundle.card
        self.digest = bundle.digest
        if arithmetic not in ARITHMETICS:
            raise EngineError(f"arithmetic must be exact or fast. Received: {arithmetic!r}")
        if batch < 0 or threads < 0:
            raise EngineError(
                f"batch and threads must be 0, for the device's own, or more. Received: {batch}, {threads}"
            )
        chosen = devices.candidates(device, arithmetic, self.card.precision)
        if cuda_graphs:
            chosen = [each for each in chosen if each.kind == "cuda"]
            if not chosen:
                raise EngineError(f"CUDA graphs need a cuda device. Received: {device!r}")
        for each in chosen:
            numbers = devices.fastest(each) if arithmetic == "fast" else EXACT
            tried = sizes(each, batch)
            decisive = reference(each)
            try:
                runs = _open(bundle, each, numbers, sorted({*tried, decisive}), threads, cuda_graphs, cache)
            except EngineError as error:
                if each == chosen[-1]:
                    raise
                log.warning("passing over %s: %s", each, error)
                continue
            if runs:
                break
        else:
            raise EngineError(
                f"there is no {each.kind} device here: it needs {devices.NEEDS[each.kind]}; or pass --device cpu"
            )
        self._device, self._runs = each, runs
        # The runtime keeps a GPU's handles and CUDA graphs by thread: those of the warm-up are to be those in use.
        self._thread = ThreadPoolExecutor(1, "engine") if each.gpu else None
        self.device, self.arithmetic = str(each), numbers
        self.batch = batch or BATCH[each.kind]
        name = f"{self.name} on {self.device}"
        least = 2 if each.gpu else 1  # the first run records the CUDA graph that the others replay
        self._buckets = Buckets(tried, decisive, self._run_bucket, self.card.noise_size, name, least)
        self.difference: Difference | None = None
        if numbers != EXACT:
            exact = _open(bundle, each, EXACT, [COMPARED], threads, False, cache)[COMPARED]
            self.difference = self._compare(exact)
            log.info("%s on %s in %s: %s", self.name, each, numbers, self.difference)
        elif arithmetic == "fast":
            log.warning("%s", _why_exact(each))

    @property
    def name(self) -> str:
        """The model's name."""
        return self.card.name

    @property
    def buckets(self) -> list[int]:
        """The batch sizes in use, ascending. All have run then; otherwise each is compared before its first use."""
        return self._buckets.usable()

    def compute(self, noise: Noise) -> Images:
        """Return the images of noise float32 [n, noise_size], 1 <= n <= batch: uint8 [n, height, width, channels].

        One run of one bucket, as a rule; only noise that is short of a bucket is copied. The images are the caller's:
        no later run writes to them. Threads may call this together; a GPU takes one call at a time.

        Raises:
            ValueError: noise of another type or shape.
            EngineError: the device failed, or has too little memory.
        """
        rows = len(noise)
        if noise.dtype != np.float32 or noise.shape[1:] != (self.card.noise_size,) or not 1 <= rows <= self.batch:
            raise ValueError(
                f"noise must be float32 [1 to {self.batch}, {self.card.noise_size}]. "
                f"Received: {noise.dtype} {list(noise.shape)}"
            )
        try:
            bucket = self._buckets.least(rows)
        except MemoryError as error:  # comparing a bucket takes images of its size
            raise devices.refused(error, self._device, f"the {self._device} device cannot compare batches") from None
        if bucket is None:
            most = self._buckets.most()
            return np.concatenate([self.compute(noise[at : at + most]) for at in range(0, rows, most)])
        return self._run_bucket(noise, bucket)[:rows]

    def decode(self, noise: npt.ArrayLike) -> Images:
        """As `GenerativeModel.decode`."""
        return self._decode(as_noise(noise, self.card.noise_size))

    def sample(self, seed: int, start: int, count: int, temperature: float = 1.0) -> Images:
        """As `GenerativeModel.sample`."""
        seed, start, count = check_sampling(seed, start, count, temperature)
        return self._decode(draw(seed, start, count, self.card.noise_size) * np.float32(temperature))

    def pictures(self, seed: int, start: int, count: int, temperature: float = 1.0) -> list[Image]:
        """As `GenerativeModel.pictures`."""
        return pictures(self.sample(seed, start, count, temperature))

    def stream(self, seed: int, start: int, count: int, temperature: float = 1.0) -> Iterator[tuple[int, Images]]:
        """As `GenerativeModel.stream`."""
        seed, start, count = check_sampling(seed, start, count, temperature)
        for at in range(start, start + count, self.batch):
            yield at, self.sample(seed, at, min(self.batch, start + count - at), temperature)

    def _decode(self, noise: Noise) -> Images:
        if 1 <= len(noise) <= self.batch:
            return self.compute(noise)
        images = np.empty((len(noise), *self.card.image_shape), np.uint8)
        for at in range(0, len(noise), self.batch):
            images[at : at + self.batch] = self.compute(noise[at : at + self.batch])
        return images

    def _run_bucket(self, noise: Noise, bucket: int) -> Images:
        if len(noise) < bucket:
            noise = np.concatenate([noise, np.zeros((bucket - len(noise), noise.shape[1]), np.float32)])
        run = self._runs[bucket]
        try:
            images = self._thread.submit(run, noise).result() if self._thread else run(noise)
        except Exception as error:  # the runtime's own exceptions share no base
            raise devices.refused(
                error, self._device, f"the {self._device} device failed in a batch of {bucket}"
            ) from None
        # What a file says of its output is no proof, and the runtime only warns.
        wanted = (bucket, *self.card.image_shape)
        if images.dtype != np.uint8 or images.shape != wanted:
            raise EngineError(
                f"the model {self.name} should give uint8 {list(wanted)}, as its card says. "
                f"Received: {images.dtype} {quoted(list(images.shape))}; export it again"
            )
        return images

    def _compare(self, exact: Decode) -> Difference:
        """Return how far samples are from what another run of the model makes of their noise.

        Raises:
            EngineError: too far.
        """
        noise = draw(0, 0, COMPARED, self.card.noise_size)
        wanted = self._thread.submit(exact, noise).result() if self._thread else exact(noise)
        apart = np.abs(self._decode(noise).astype(np.int16) - wanted)
        found = Difference(float(apart.mean()), int(apart.max()), COMPARED)
        if found.mean > MOST_DIFFERENCE:
            raise EngineError(
                f"{self.name} in {self.arithmetic} is {found}, where an average of {MOST_DIFFERENCE} is allowed; use "
                "exact arithmetic"
            )
        return found


class Binding:
    """A session whose noise and images each have one place, for batches of one size. One thread at a time.

    Args:
        session: The InferenceSession.
        noise: An OrtValue, float32 [size, noise_size], where the session reads.
        images: An OrtValue, uint8 [size, height, width, channels], where it writes.
        graph: The number of its CUDA graph, or -1 for none.
    """

    def __init__(self, session: Any, noise: Any, images: Any, graph: int = -1) -> None:
        self._session, self._noise, self._images = session, noise, images
        self._places = session.io_binding()
        self._places.bind_ortvalue_input("noise", noise)
        self._places.bind_ortvalue_output("images", images)
        self._options = devices.runtime().RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(graph))

    def __call__(self, noise: Noise) -> Images:
        """Return the images of as much noise as there is place for; they are the caller's."""
        self._noise.update_inplace(noise)
        self._session.run_with_iobinding(self._places, self._options)
        images: Images = self._images.numpy()
        # From a device it is a copy already; in host memory it is the place itself, which the next run overwrites.
        return images if images.flags.owndata else images.copy()


def _why_exact(device: Device) -> str:
    if not openvino.installed():
        return "fast arithmetic on a processor takes pip install '.[openvino]' in the checkout; here it is exact"
    if not openvino.has_bfloat16():
        return "this processor has no bfloat16, so fast arithmetic is exact here"
    return f"fast arithmetic on a processor takes --device openvino; on {device} it is exact"


def _open(
    bundle: Bundle,
    device: Device,
    arithmetic: str,
    buckets: list[int],
    threads: int,
    cuda_graphs: bool,
    cache: Path | None,
) -> dict[int, Decode]:
    """Return what runs each bucket; nothing where the device is not there."""
    if device.kind == "openvino":
        try:
            run = openvino.open_model(bundle.data, threads, arithmetic)
        except RuntimeError as error:
            raise devices.refused(error, device, f"the {device} device cannot run this model") from None
        return dict.fromkeys(buckets, run) if run else {}
    # TensorRT tells engines apart by the graph's structure, not by its weights: each model has a folder of its own.
    folder = (cache or devices.cache_folder()) / f"{bundle.digest[:16]}-{devices.runtime().__version__}"
    if arithmetic != EXACT:
        folder = folder.with_name(f"{folder.name}-{arithmetic}")
    table = devices.providers(device, buckets, bundle.card.noise_size, folder, cuda_graphs, arithmetic)
    graph = devices.graph(bundle.data, device, arithmetic)
    session = None
    runs: dict[int, Decode] = {}
    for bucket in reversed(buckets):
        # The CUDA provider's convolutions keep the plan of their last shape only: one session, and every change of
        # bucket would plan them all again. TensorRT's engine holds the plans of all.
        if session is None or device.kind == "cuda":
            session = devices.open_session(graph, device, table, threads)
        if session is None:
            return {}
        runs[bucket] = _bind(session, device, bucket, bundle.card, cuda_graphs) if device.gpu else _plain(session)
    return runs


def _plain(session: Any) -> Decode:
    return lambda noise: session.run(["images"], {"noise": noise})[0]


def _bind(session: Any, device: Device, bucket: int, card: Card, cuda_graphs: bool) -> Binding:
    """Bind a session to memory of a GPU, and its images to page-locked memory where there is some.

    A CUDA graph ends on the GPU: what copies from there is not in it.
    """
    place = devices.runtime().OrtValue.ortvalue_from_shape_and_type
    locked = None if cuda_graphs else devices.page_locked(device)
    shape = [bucket, *card.image_shape]
    try:
        noise = place([bucket, card.noise_size], np.float32, "cuda", device.index)
        if locked is None:
            images = place(shape, np.uint8, "cuda", device.index)
        else:
            images = place(shape, np.uint8, memory_info=locked)
        return Binding(session, noise, images, bucket if cuda_graphs else -1)
    except Exception as error:  # the runtime's own exceptions share no base
        raise devices.refused(error, device, f"the {device} device has no room for a batch of {bucket}") from None
