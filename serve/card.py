"""The card: what a bundle says of itself. Each value is typed and bounded, here and nowhere else.

Whoever holds a `Card` holds a valid one: making it checks it, wherever its values come from. So names are fit for
paths, metrics and logs, text is fit for a terminal, and one picture, one sample's noise and the card itself are
fit for a gRPC message.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field
from typing import Any

from serve.errors import BundleError
from serve.text import quoted

MOST_CARD = 2**16  # characters of JSON; ours have 2,000 to 3,000
MOST_PICTURE = 3 * 2**20  # bytes: 1024x1024 in colour; with a file's extra it is within a gRPC message of 4 MiB
MOST_SIZE = 2**16  # values of noise, or latents
MOST_DEPTH = 6  # of lists and objects in each other
MOST_NAME = 64  # characters
NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MOST_NAME - 1}}}")
NAME_RULE = f"letters, digits, '.', '_' and '-', at most {MOST_NAME}, beginning with a letter or digit"
# What moves a terminal's cursor, splits a log's line, turns text round, or is no character (a lone surrogate).
UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def name_from(text: str, room: int = 0) -> str:
    """Return a text as a name that the rule allows, with room for so many more characters; "model" if none is left."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[: MOST_NAME - room] or "model"


@dataclass(frozen=True)
class Rule:
    """What a value must be, in words and as a test."""

    expected: str
    holds: Callable[[Any], bool]
    optional: bool = False  # of a record's


def _whole(least: int, most: int) -> Rule:
    return Rule(f"a whole number from {least} to {most}", lambda value: type(value) is int and least <= value <= most)


def _line(most: int) -> Rule:
    def holds(value: Any) -> bool:
        return isinstance(value, str) and len(value) <= most and _fit(value)

    return Rule(f"one line of at most {most} characters, none of them a control character", holds)


def _choice(*words: str) -> Rule:
    return Rule(f"one of {', '.join(words)}", lambda value: isinstance(value, str) and value in words)


def _list(rule: Rule) -> Rule:
    return Rule(
        f"a list, each item {rule.expected}", lambda value: isinstance(value, list) and all(map(rule.holds, value))
    )


def _map(rule: Rule, keys: str = ".*", least: int = 0) -> Rule:
    """Return the rule of an object with so many keys like these, or more, and one kind of value."""

    def holds(value: Any) -> bool:
        if not isinstance(value, dict) or not _plain(value) or len(value) < least:
            return False
        return all(re.fullmatch(keys, key) and rule.holds(each) for key, each in value.items())

    return Rule(f"an object, each value {rule.expected}", holds)


def _record(**rules: Rule) -> Rule:
    """Return the rule of an object with these keys, and maybe others whose values are plain."""
    required = [key for key, rule in rules.items() if not rule.optional]

    def holds(value: Any) -> bool:
        known = isinstance(value, dict) and _plain(value) and all(key in value for key in required)
        return known and all(rule.holds(value[key]) for key, rule in rules.items() if key in value)

    return Rule(f"an object with {', '.join(required)}, as export-onnx writes it", holds)


def _or_empty(rule: Rule) -> Rule:
    return Rule(rule.expected, lambda value: value == {} or rule.holds(value))


def _optional(rule: Rule) -> Rule:
    return dataclasses.replace(rule, optional=True)


def _fit(text: str) -> bool:
    return UNFIT.search(text) is None


def _plain(value: Any, depth: int = MOST_DEPTH) -> bool:
    """Tell whether a value is JSON of finite numbers and fit text, and not too deep."""
    if isinstance(value, dict):
        fit = all(isinstance(key, str) and _fit(key) for key in value)
        return fit and depth > 0 and all(_plain(each, depth - 1) for each in value.values())
    if isinstance(value, list):
        return depth > 0 and all(_plain(each, depth - 1) for each in value)
    if isinstance(value, str):
        return _fit(value)
    return value is None or isinstance(value, bool) or _number(value)


def _number(value: Any) -> bool:
    return (type(value) is int and abs(value) <= 2**64) or (isinstance(value, float) and math.isfinite(value))


def _shape(value: Any) -> bool:
    if not isinstance(value, tuple) or len(value) != 3 or not all(type(side) is int and side > 0 for side in value):
        return False
    return value[2] in (1, 3) and math.prod(value) <= MOST_PICTURE


def _notes(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 10_000 and _fit(value.replace("\n", ""))


COUNT, NUMBER = _whole(0, 2**53), Rule("a finite number", _number)
OBJECT = Rule("an object of finite numbers and text", lambda value: isinstance(value, dict) and _plain(value))
RULES = {
    "name": Rule(NAME_RULE, lambda value: isinstance(value, str) and NAME.fullmatch(value) is not None),
    "image_shape": Rule(f"height, width and 1 or 3 channels, {MOST_PICTURE} values at most", _shape),
    "noise_size": _whole(1, MOST_SIZE),
    "latent_size": _whole(1, MOST_SIZE),
    "prior": _line(64),
    "normalisation": _record(mode=_line(64)),
    "precision": _choice("fp32", "fp16", "int8"),
    "recipe": OBJECT,
    "dataset": OBJECT,
    "licence": _line(1000),
    "notes": Rule("text of at most 10000 characters, with no control characters but newlines", _notes),
    "metrics": _list(OBJECT),
    "producers": _map(_line(64)),
    "store": _choice("float32", "float16"),
    "difference": _or_empty(
        _record(
            samples=COUNT,
            mean=NUMBER,
            worst=COUNT,
            distance=_optional(NUMBER),
            shift=_optional(NUMBER),
            float_layers=_optional(_list(_line(1000))),
        )
    ),
    "verification": _or_empty(
        _record(
            checker=_line(64),
            opset=COUNT,
            operators=_map(COUNT),
            against=_line(64),
            agreement=_map(_record(max=COUNT, mean=NUMBER), keys="[0-9]{1,9}", least=1),
            fast=_optional(_map(_record(max=COUNT, mean=NUMBER))),
            same_bytes_in_batches=_list(COUNT),
            finite_to_sigma=NUMBER,
        )
    ),
}


@dataclass(frozen=True)
class Card:
    """What a bundle is and where it comes from.

    Attributes:
        name: What the model is served as: letters, digits, '-', '_' and '.'.
        image_shape: Height, width, channels.
        noise_size: Values of noise a sample.
        latent_size: Values of the first stage's latent.
        prior: What maps noise to latents: "second-stage", or "normal" where the noise is the latent.
        normalisation: Mode of the latent normalisation and how it was fitted.
        precision: What the graph computes in: "fp32"; "fp16", pictures in float16; "int8", layers in 8 bits.
        recipe: The training recipe as run.
        dataset: What it was trained on: count, digest, and its name and licence where they were given.
        licence: Under what terms the weights may be used.
        notes: Anything a user should know, in prose.
        metrics: Measurements, each with its protocol.
        store: What float weights are stored in: "float32" or "float16".
        difference: Of a precision's samples from fp32's: grey levels, distances, and over how many samples.
        verification: What was checked of the file before it was written, and what came out.
        producers: Versions of what made the file.

    Raises:
        BundleError: a value is not what `RULES` says, or all together are beyond MOST_CARD.
    """

    name: str
    image_shape: tuple[int, int, int]
    noise_size: int
    latent_size: int
    prior: str
    normalisation: dict[str, Any]
    precision: str
    recipe: dict[str, Any]
    dataset: dict[str, Any] = field(default_factory=dict)
    licence: str = ""
    notes: str = ""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    producers: dict[str, str] = field(default_factory=dict)
    store: str = "float32"
    difference: dict[str, Any] = field(default_factory=dict)
    verification: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, rule in RULES.items():
            value = getattr(self, name)
            if not rule.holds(value):
                raise BundleError(f"a card's {name} must be {rule.expected}. Received: {quoted(value)}")
        _check_length(self.to_json())

    def to_json(self) -> str:
        """Return the card as JSON, in ASCII."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Card:
        """Return the card that `to_json` wrote; fields added by later versions are dropped.

        Raises:
            BundleError: the text is not a card, lacks a field, or has one that breaks its rule.
        """
        _check_length(text)
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):  # the second, of brackets in brackets
            raise BundleError("its card cannot be read: it is not JSON; export it again") from None
        if not isinstance(values, dict):
            raise BundleError("its card cannot be read: it is no JSON object; export it again")
        fields = dataclasses.fields(cls)
        lacking = [each.name for each in fields if each.name not in values and _required(each)]
        if lacking:
            raise BundleError(f"its card cannot be read: it lacks {', '.join(lacking)}; export it again")
        if isinstance(values["image_shape"], list):
            values["image_shape"] = tuple(values["image_shape"])
        return cls(**{each.name: values[each.name] for each in fields if each.name in values})


def _check_length(text: str) -> None:
    if len(text) > MOST_CARD:
        raise BundleError(f"a card must be {MOST_CARD:,} characters of JSON at most. Received: {len(text):,}")


def _required(each: dataclasses.Field[Any]) -> bool:
    return each.default is MISSING and each.default_factory is MISSING
