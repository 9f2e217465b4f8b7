"""Data parallelism: one stage on several devices of a machine, or on several machines.

This is the one module of `training` that asks a backend by name: how devices work together is what Keras
leaves to them. Everything is imported late, and only what the chosen backend needs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras

from training.errors import TrainingError


@contextmanager
def spread(wanted: str) -> Iterator[None]:
    """Build and train what the block builds and trains on several devices, each minibatch shared out.

    TensorFlow mirrors the weights (MirroredStrategy), on several machines where TF_CONFIG names them
    (MultiWorkerMirroredStrategy); JAX shards the minibatch (keras.distribution). Where there is no GPU, a
    number above one splits the CPU into as many virtual devices: no faster, but the same code path.

    Args:
        wanted: "1"; a number of devices; or "all" GPUs.

    Raises:
        TrainingError: more devices than there are, or a backend that cannot.
    """
    backend = str(keras.backend.backend())
    several = wanted != "1" or "TF_CONFIG" in os.environ
    if not several:
        yield
    elif backend == "tensorflow":
        with _tensorflow(wanted).scope():
            yield
    elif backend == "jax":
        _jax(wanted)
        try:
            yield
        finally:
            keras.distribution.set_distribution(None)
    else:
        raise TrainingError(f"--devices {wanted} takes KERAS_BACKEND=tensorflow or jax. Received: {backend}")


def replicas() -> int:
    """Return how many replicas the code at hand is run in: its gradients will be summed over them."""
    if str(keras.backend.backend()) != "tensorflow":
        return 1
    import tensorflow

    return int(tensorflow.distribute.get_strategy().num_replicas_in_sync)


def first() -> bool:
    """Tell whether this process is the one, of several on several machines, that writes."""
    if str(keras.backend.backend()) != "tensorflow" or "TF_CONFIG" not in os.environ:
        return True
    import tensorflow

    resolver = tensorflow.distribute.get_strategy().cluster_resolver
    return resolver is None or (resolver.task_type, resolver.task_id) in (("chief", 0), ("worker", 0))


def _tensorflow(wanted: str) -> Any:
    import tensorflow

    if "TF_CONFIG" in os.environ:
        return tensorflow.distribute.MultiWorkerMirroredStrategy()
    gpus = tensorflow.config.list_physical_devices("GPU")
    if gpus:
        count = _count(wanted, len(gpus))
        return tensorflow.distribute.MirroredStrategy([f"GPU:{index}" for index in range(count)])
    count = 1 if wanted == "all" else int(wanted)
    (cpu,) = tensorflow.config.list_physical_devices("CPU")
    virtual = [tensorflow.config.LogicalDeviceConfiguration() for _ in range(count)]
    tensorflow.config.set_logical_device_configuration(cpu, virtual)
    return tensorflow.distribute.MirroredStrategy([f"CPU:{index}" for index in range(count)])


def _jax(wanted: str) -> None:
    import jax

    if jax.default_backend() == "cpu" and wanted != "all":
        jax.config.update("jax_num_cpu_devices", int(wanted))
    here = jax.devices()
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=here[: _count(wanted, len(here))]))


def _count(wanted: str, there: int) -> int:
    count = there if wanted == "all" else int(wanted)
    if count > there:
        raise TrainingError(f"--devices takes at most the {there} there are. Received: {wanted}")
    return count
