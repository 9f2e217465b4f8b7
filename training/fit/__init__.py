"""Training of both stages, which can be stopped and resumed at any minibatch, on one device or several."""

from training.backend import set_defaults

set_defaults()
