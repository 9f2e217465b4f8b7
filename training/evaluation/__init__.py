"""Measure what a run or a bundle makes: the command `evaluate-vae`.

In the order pictures meet them: `reference` (the pictures measured against, and what is cached of them),
`sampling` (reconstructions, samples of every prior), `extractors` and `inception` (pictures to features),
`statistics` (features to means and covariances), `distances` (Frechet, KID, precision and recall), `evaluator` (one
set of pictures, one record), `latents` (what the posteriors look like), `subjects` (a run or a bundle), `measure` (all
of it), `snapshots` (figure 2), `report` and `compare` (tables).

Unlike the rest of `training` it may import `serve`: what ships is what is measured.
"""

from training.backend import set_defaults

set_defaults()
