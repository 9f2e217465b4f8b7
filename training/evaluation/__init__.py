"""Measure the pictures of a run or a bundle: the command `evaluate-vae`.

In the order that pictures pass them: `reference` (the real pictures, and their cached statistics), `sampling`
(reconstructions, samples of every prior), `extractors` and `inception` (pictures to features), `statistics`
(features to means and covariances), `distances` (Frechet, KID, precision and recall), `evaluator` (a set of pictures
to a record), `latents` (facts about the posteriors), `subjects` (a run or a bundle), `measure` (all of it),
`snapshots` (figure 2), `report` and `compare` (tables).

Unlike the rest of `training` it may import `serve`, so that it measures bundles with the engine that serves them.
"""

from training.backend import set_defaults

set_defaults()
