"""Train two-stage VAEs whose reconstruction/KL balance is computed: images -> a run directory.

The stations, in the order data meets them: `images` and `dataset` (pictures to arrays), `recipes`
(every number of a run), `networks`, `balance` and `vae` (the model), `epoch` and `stage` (train one
VAE, survive being stopped), `twostage` (stage 1, posteriors, stage 2), `run` (what is written, and how).

Networks and training use `keras` and `keras.ops` only, so KERAS_BACKEND=jax or torch trains as well.
"""
