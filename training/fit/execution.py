"""How a run is executed on this machine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Execution:
    """How a stage is executed. None of it changes the result, except that several devices round differently.

    Attributes:
        save_every: Seconds between two saved states: a power cut costs no more than that.
        steps_per_execution: Minibatches in one call of the compiled step; 10 or more keep a fast GPU busy.
        devices: How many share each minibatch of stage 1: a number, or "all".
    """

    save_every: float = 60.0
    steps_per_execution: int = 1
    devices: str = "1"
