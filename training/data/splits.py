"""The splits, and the report of what was read into them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

SPLITS = ("train", "validation", "test")

Advance = Callable[[int, int], None]  # (done, of so many)


@dataclass
class Report:
    """What was read, and what was not.

    Attributes:
        read: Pictures read.
        ignored: Files whose names are not those of pictures.
        broken: (path, reason) of pictures that could not be read.
        kind: The format of the source: "pictures", "CelebA", "CIFAR-10", "IDX", ".npy" or ".npz".
        counts: Pictures read, by split; splits without pictures are left out.
    """

    read: int = 0
    ignored: int = 0
    broken: list[tuple[str, str]] = field(default_factory=list)
    kind: str = "pictures"
    counts: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        counts = ", ".join(f"{count:,} {split}" for split, count in self.counts.items())
        return f"{counts}; {len(self.broken):,} broken, {self.ignored:,} ignored"
