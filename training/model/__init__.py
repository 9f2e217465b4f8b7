"""The paper: networks, the balance, the losses, the priors, latent normalisation. Sharpening is ours."""

from training.backend import set_defaults

set_defaults()
