"""What Keras' backend is told by the environment, which it reads once: when it is imported."""

from __future__ import annotations

import os


def set_defaults() -> None:
    """Set the environment variables that Keras and TensorFlow read, where the user has not.

    Every room that uses Keras calls this as it is imported, before anything in it imports Keras.
    """
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # TensorFlow leaves oneDNN off on processors without AVX-512, where it trains three times faster too.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    # A resumed run is the run that was not stopped, bit by bit.
    os.environ.setdefault("TF_DETERMINISTIC_OPS", "1")
