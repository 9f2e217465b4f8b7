"""The paper and nothing else: networks, the balance, the losses, the priors, latent normalisation."""
