"""Training that survives: two stages, in pieces that can be stopped and resumed, on one device or several."""

from training.backend import set_defaults

set_defaults()
