"""What is kept of a run, and what is seen of it: the run directory, progress, figures, TensorBoard."""
