"""The paper and nothing else: networks, the balance, the losses, the priors, latent normalisation."""

from training.backend import set_defaults

set_defaults()
