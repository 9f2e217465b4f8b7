"""Noise and means over a whole minibatch where several replicas share it.

On JAX the replicas are one program over a sharded minibatch, and nothing has to be done. On TensorFlow every replica
sees its own rows only, so noise and means have to take the others into account.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops


def replicas() -> int:
    """Return how many replicas share the minibatch at this point of the program; gradients are summed over them."""
    if str(keras.backend.backend()) != "tensorflow":
        return 1
    import tensorflow

    return int(tensorflow.distribute.get_strategy().num_replicas_in_sync)


def normal_like(x: Any, seed: keras.random.SeedGenerator) -> Any:
    """Return standard normal noise of x's shape [n, ...]: this replica's rows of the whole minibatch's noise.

    All replicas have the same seed, so each would draw the same noise if it drew only its own rows.
    """
    shape = ops.shape(x)
    if replicas() == 1:
        return keras.random.normal(shape, seed=seed)
    import tensorflow

    at = tensorflow.distribute.get_replica_context().replica_id_in_sync_group
    whole = keras.random.normal((shape[0] * replicas(), *shape[1:]), seed=seed)
    return whole[at * shape[0] : (at + 1) * shape[0]]


def all_reduce_mean(value: Any) -> Any:
    """Return the mean of a value over all replicas. No gradient flows through it."""
    value = ops.stop_gradient(value)
    if replicas() == 1:
        return value
    import tensorflow

    context = tensorflow.distribute.get_replica_context()
    return context.all_reduce(tensorflow.distribute.ReduceOp.MEAN, value)
