"""What a request may be: from messages to the batcher's requests, or a refusal that says what to change."""

from __future__ import annotations

import math
import time
from typing import Any

from serve.model import check_noise, check_sampling
from serve.noise import Noise
from serve.server.models import Model
from serve.server.refusal import invalid
from serve.server.work import Request
from serve.stubs.sampling.v1 import sampling_pb2 as wire

RAW = (wire.ENCODING_UNSPECIFIED, wire.ENCODING_RAW)
PRIORITIES = {wire.PRIORITY_INTERACTIVE: "interactive", wire.PRIORITY_BULK: "bulk"}


def range_request(model: Model, wanted: wire.Range, until: float, one_message: bool) -> Request:
    """Return the request for a range.

    Raises:
        Refusal: INVALID_ARGUMENT, a range that no model gives, or more than one message holds.
    """
    temperature, limits = temperature_of(wanted), model.limits
    if not wanted.count:
        raise invalid("count must be 1 or more. Received: 0")
    try:
        check_sampling(wanted.seed, wanted.start, wanted.count, temperature)
    except ValueError as error:
        raise invalid(str(error)) from None
    most = most_in_a_message(model, wanted.encoding)
    if one_message and wanted.count > most:
        text = f"count must be {most} or less in one message. Received: {wanted.count}"
        raise invalid(f"{text}; ask for less at a time, or use SampleStream")
    chunk, ahead = (wanted.count, 1) if one_message else (limits.chunk, limits.ahead)
    default = "interactive" if one_message else "bulk"
    noise = model.noise(wanted.seed, wanted.start, temperature)
    return Request(noise, wanted.count, chunk, ahead, priority(wanted.priority, default), until)


def noise_request(model: Model, noise: Noise, until: float, priority: str, encoding: int = 0) -> Request:
    """Return the request for the pictures of noise [n, noise_size].

    Raises:
        Refusal: INVALID_ARGUMENT, too little or too much of it, or values that are no noise.
    """
    most = most_in_a_message(model, encoding)
    if not 1 <= len(noise) <= most:
        raise invalid(f"noise must be for 1 to {most} samples. Received: {len(noise)}")
    try:
        check_noise(noise)
    except ValueError as error:
        raise invalid(str(error)) from None
    count = len(noise)
    return Request(lambda at, n: noise[at : at + n], count, count, 1, priority, until)


def priority(value: int, default: str) -> str:
    """Return a priority's class.

    Raises:
        Refusal: INVALID_ARGUMENT, no priority has this number.
    """
    if value and value not in PRIORITIES:
        raise invalid(f"priority must be one of {', '.join(wire.Priority.keys())}. Received: {value}")
    return PRIORITIES.get(value, default)  # type: ignore[call-overload, no-any-return]  # enums are ints here


def most_in_a_message(model: Model, encoding: int) -> int:
    """Return how many samples one message may hold in an encoding.

    Raises:
        Refusal: INVALID_ARGUMENT, no encoding has this number.
    """
    if encoding not in wire.Encoding.values():
        raise invalid(f"encoding must be one of {', '.join(wire.Encoding.keys())}. Received: {encoding}")
    return model.limits.count if encoding in RAW else model.limits.files


def deadline(context: Any) -> float:
    """Return a call's deadline in time.monotonic()'s seconds; infinity where it has none."""
    left = context.time_remaining()
    return math.inf if left is None else time.monotonic() + left


def temperature_of(wanted: wire.Range) -> float:
    """Return a range's temperature, which is 1 where none is named."""
    return wanted.temperature if wanted.HasField("temperature") else 1.0
