"""What is kept of a run and shown of it: the run directory, progress, figures, TensorBoard."""

from training.backend import set_defaults

set_defaults()
