"""Text that others wrote, made fit for a message: one bounded line of printable characters."""

from __future__ import annotations

import reprlib

MOST_LINE = 1000  # characters of a message
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 80, 80


def quoted(value: object, most: int = 80) -> str:
    """Return a foreign value for a message, as Python writes it: at most `most` characters, all printable."""
    text = _SHORT.repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def one_line(text: str, most: int = MOST_LINE) -> str:
    """Return a text with whatever is not printable escaped, its middle left out where it is over `most` characters."""
    if not text.isprintable():
        text = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[5 - most // 2 :]}"
