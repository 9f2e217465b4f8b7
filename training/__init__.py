"""Train two-stage VAEs whose reconstruction/KL balance is computed: images -> a run directory.

The stations, in the order data meets them: `images` and `dataset` (pictures to arrays), `recipes`
(every number of a run), `networks`, `balance` and `vae` (the model), `epoch` and `stage` (train one
VAE, survive being stopped), `twostage` (stage 1, posteriors, stage 2), `run` (what is written, and how).

Networks and training use `keras` and `keras.ops` only, so KERAS_BACKEND=jax or torch trains as well.
"""

import os

# Read when the backend is imported, so they are set here, before anything of ours imports it.
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# TensorFlow leaves oneDNN off on processors without AVX-512, where it trains three times faster too.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
# A resumed run is the run that was not stopped, bit by bit.
os.environ.setdefault("TF_DETERMINISTIC_OPS", "1")
