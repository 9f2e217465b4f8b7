"""Data parallelism: the devices of a machine, or several machines, share each minibatch of a stage.

This module and `model.replicas` are the only ones that distinguish backends, as Keras leaves to its backends how
devices work together. Backends are imported late, and only the chosen one.

Batch norm, noise and the balance policy see the whole minibatch, so that the number of devices changes a result by
rounding alone. On JAX sharding works that way; on TensorFlow `model.replicas` and synchronised batch norm make it so.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import keras
from keras import ops

from training.errors import TrainingError
from training.model.replicas import replicas


@contextmanager
def strategy_scope(wanted: str, size: int) -> Iterator[None]:
    """Have the models that the block builds and trains share each minibatch among several devices.

    TensorFlow mirrors the weights (MirroredStrategy), on several machines where TF_CONFIG names them
    (MultiWorkerMirroredStrategy); JAX shards the minibatch (keras.distribution). Where there is no GPU, a
    number above one splits the CPU into as many virtual devices: no faster, but the same code path.

    Args:
        wanted: A number of devices, or "all" GPUs; of each machine, where there are several.
        size: Items a minibatch.

    Raises:
        TrainingError: there are fewer devices, they cannot share a minibatch evenly, the backend cannot share at
            all, or another machine was lost.
    """
    backend = str(keras.backend.backend())
    if wanted == "1" and workers() == 1:
        yield
    elif backend == "tensorflow":
        with _tensorflow(wanted, size):
            yield
    elif backend == "jax" and workers() == 1:
        here = _jax(wanted)
        _check_even(size, len(here))
        with keras.distribution.DataParallel(devices=here).scope():
            yield
    else:
        able = "tensorflow or jax" if workers() == 1 else "tensorflow"
        raise TrainingError(f"several devices take KERAS_BACKEND={able}. Received: {backend}")


def workers() -> int:
    """Return how many machines TF_CONFIG lets train together; 1 where it is not set."""
    cluster = _config().get("cluster", {})
    return max(1, len(cluster.get("chief", [])) + len(cluster.get("worker", [])))


def is_chief() -> bool:
    """Tell whether this process is the chief: of all machines, the one whose run directory is kept."""
    config = _config()
    task = config.get("task", {})
    leader = "chief" if "chief" in config.get("cluster", {}) else "worker"
    return workers() == 1 or (task.get("type"), int(task.get("index", 0))) == (leader, 0)


@contextmanager
def run_directory(out: Path) -> Iterator[Path]:
    """Yield the folder to work in: on the chief `out`; on other machines a scratch copy of what resuming needs.

    All machines do the same and write the same, so that none waits for work that only another does.
    """
    if is_chief():
        yield out
        return
    with TemporaryDirectory(prefix="train-vae-") as scratch:
        for name in ("config.json", "stage1.keras", "state/stage1.npz"):
            if (out / name).exists():
                copy = Path(scratch, "run", name)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(out / name, copy)
        yield Path(scratch, "run")


def adapt(model: keras.Model) -> None:
    """Prepare a built, compiled model to be fitted on several devices; on one device this does nothing.

    On several machines Keras 3.15's `fit` raises a ValueError twice: it builds the model from a minibatch that it
    reduces outside of any replica, though ours is built; and it takes the mean of logs along an axis that scalars do
    not have. The last lines avoid both, and can go once Keras does not raise.
    """
    if replicas() == 1:
        return
    for layer in (*model.encoder.layers, *model.decoder.layers):
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.synchronized = True
    if workers() > 1:
        step = model.train_step
        model.train_step = lambda data: {name: ops.reshape(value, (1,)) for name, value in step(data).items()}
        model._maybe_symbolic_build = lambda *arguments, **options: None


@contextmanager
def _tensorflow(wanted: str, size: int) -> Iterator[None]:
    import tensorflow

    lost = tensorflow.errors.AbortedError, tensorflow.errors.DeadlineExceededError, tensorflow.errors.UnavailableError
    try:
        strategy = _strategy(wanted, tensorflow)
        _check_even(size, strategy.num_replicas_in_sync)
        with strategy.scope():
            yield
    except lost as error:
        if workers() == 1:
            raise
        raise TrainingError(
            f"a machine of TF_CONFIG was lost ({type(error).__name__}); start all again to go on from what was saved"
        ) from error


def _strategy(wanted: str, tensorflow: Any) -> Any:
    gpus = tensorflow.config.list_physical_devices("GPU")
    if workers() > 1:
        tensorflow.config.set_visible_devices(gpus[: _count(wanted, max(1, len(gpus)))], "GPU")
        return tensorflow.distribute.MultiWorkerMirroredStrategy()
    if gpus:
        return tensorflow.distribute.MirroredStrategy([f"GPU:{index}" for index in range(_count(wanted, len(gpus)))])
    count = 1 if wanted == "all" else int(wanted)
    (cpu,) = tensorflow.config.list_physical_devices("CPU")
    virtual = [tensorflow.config.LogicalDeviceConfiguration() for _ in range(count)]
    try:
        if count > 1:
            tensorflow.config.set_logical_device_configuration(cpu, virtual)
    except RuntimeError:
        raise TrainingError(
            f"a CPU can be split only before it is used, as it is to time this machine; name a --recipe to train on "
            f"{count} parts of it. Received: --devices {wanted}"
        ) from None
    return tensorflow.distribute.MirroredStrategy([f"CPU:{index}" for index in range(count)])


def _jax(wanted: str) -> list[Any]:
    import jax

    if wanted != "all":
        config: Any = jax.config
        with suppress(RuntimeError):  # once it is in use, as to time this machine, what there is stays
            config.update("jax_num_cpu_devices", int(wanted))  # says nothing where there are GPUs
    here = jax.devices()
    return list(here[: _count(wanted, len(here))])


def _count(wanted: str, there: int) -> int:
    count = there if wanted == "all" else int(wanted)
    if count > there:
        raise TrainingError(f"--devices takes at most the {there} there are. Received: {wanted}")
    return count


def _check_even(size: int, count: int) -> None:
    if size % count:
        raise TrainingError(f"{count} devices take minibatches of a multiple of {count}. Received: {size}; set batch")


def _config() -> dict[str, Any]:
    try:
        config = json.loads(os.environ.get("TF_CONFIG") or "{}")
    except ValueError as error:
        raise TrainingError(f"TF_CONFIG takes JSON. Received: {error}") from None
    if not isinstance(config, dict):
        raise TrainingError(f"TF_CONFIG takes a JSON object. Received: {config}")
    return config
