"""How a training is run on this machine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Execution:
    """How a stage is run on this machine: what it makes depends on none of it, but for rounding on several devices.

    Attributes:
        save_every: Seconds of work that a power cut may cost.
        steps_per_execution: Minibatches a call of the compiled function; more keep a GPU busier.
        devices: How many share a minibatch (`devices.strategy_scope`).
    """

    save_every: float = 60.0
    steps_per_execution: int = 1
    devices: str = "1"
