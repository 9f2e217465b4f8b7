"""Train autoencoders whose reconstruction/KL balance is computed, and their competitors: images -> a run directory.

The stations, in the order data meets them:

pictures    `dataset` (checked, split, mapped into memory), from `sources` and `arrays` by `images`, kept in `cache`
numbers     `recipe` (all of a run's), `recipes` (the named ones)
the model   `networks`, `balance`, `autoencoder`, with derivatives by `tangent`
training    `epoch` and `stage` (one stage, that survives being stopped, by `stop`), on several `devices`
the method  `twostage` (stage 1, posteriors, `priors`), latent normalisation in `normalise`
what stays  `run` (what is written; `files` says how), `figures` and `plots`, `board`, `progress`
measuring   `evaluation`

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
