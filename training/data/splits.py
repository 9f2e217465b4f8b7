"""The splits, and the report of what was read into them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

SPLITS = ("train", "validation", "test")
NAMED = 3  # files that a report names, of those that were ignored for one reason

Advance = Callable[[int, int], None]  # (done, of so many)


@dataclass
class Report:
    """What was read, and what was not.

    Attributes:
        read: Pictures read.
        ignored: (name, reason) of files that are not pictures to train on.
        broken: (path, reason) of pictures that could not be read.
        kind: The format of the source: "pictures", "CelebA", "CIFAR-10", "IDX", ".npy" or ".npz".
        counts: Pictures read, by split; splits without pictures are left out.
    """

    read: int = 0
    ignored: list[tuple[str, str]] = field(default_factory=list)
    broken: list[tuple[str, str]] = field(default_factory=list)
    kind: str = "pictures"
    counts: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        counts = ", ".join(f"{count:,} {split}" for split, count in self.counts.items()) or "no pictures"
        names: dict[str, list[str]] = {}
        for name, reason in self.ignored:
            names.setdefault(reason, []).append(name)
        kinds = "; ".join(f"{reason}: {_few(which)}" for reason, which in names.items())
        ignored = f"{len(self.ignored):,} ignored" + (f" ({kinds})" if kinds else "")
        return f"{counts}; {len(self.broken):,} broken, {ignored}"


def _few(names: list[str]) -> str:
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
