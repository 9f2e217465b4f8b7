"""The page that lies beside a dataset: what it is, for people and for the libraries that read its first lines."""

from __future__ import annotations

from serve.bulk.job import PARQUET, Job
from serve.card import Card

README = "README.md"


def readme(job: Job, card: Card) -> str:
    """Return the page of a job's shards, as Hugging Face has dataset cards: YAML, then Markdown."""
    height, width, channels = card.image_shape
    licence = card.licence or "not said"
    last = job.start + job.count - 1
    how = (
        f'load_dataset("parquet", data_files="*{job.ending}")  # of the library datasets'
        if job.format == PARQUET
        else f'webdataset.WebDataset("FIRST-LAST{job.ending}").decode("pil")'
    )
    return f"""---
pretty_name: {job.count:,} samples of {job.model}
license: other
license_name: as-the-model
size_categories: [{_size(job.count)}]
tags: [synthetic, image, vae, {job.format}]
configs:
- config_name: default
  data_files: "*{job.ending}"
---

# {job.count:,} samples of {job.model}

Pictures that a model made: {height}x{width}, {"grey" if channels == 1 else "colour"}, {job.encoding}. Nothing here was
photographed. Sample *i* of a seed is the same picture whoever makes it, in exact arithmetic to one grey level.

| | |
|---|---|
| model | {job.model} |
| SHA-256 of its file | {job.digest} |
| arithmetic | {job.arithmetic} |
| seed | {job.seed} |
| samples | {job.start} to {last} |
| temperature | {job.temperature:g} |
| licence of the model | {licence} |

    {how}

Made by balanced-vae. `sample-cli --verify FOLDER` makes some of them again and compares; manifest.json lists the files.
"""


def _size(count: int) -> str:
    """Return the range of sizes that a count is in, as Hugging Face names these."""
    steps = ["n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "n>1B"]
    return steps[min(max(len(str(max(count - 1, 0))) - 3, 0), len(steps) - 1)]
