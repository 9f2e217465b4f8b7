"""Messages with many pixels, serialised with one copy of them.

Protobuf copies a field of bytes when it is set and again when the message is serialised, which for a megabyte costs a
hundred times what one copy does. Fields may come in any order on the wire, so the pixels are put behind the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from google.protobuf.message import Message

from serve.model import Images

LENGTH_DELIMITED = 2  # the wire type of bytes and of messages


def with_pixels(message: Message, field: int, images: Sequence[Images], inside: int = 0) -> bytes:
    """Return a message with one more field, which holds images' values one after the other.

    Args:
        message: The rest of it.
        field: The number of the field of bytes.
        images: Arrays in C order.
        inside: The number of the field of an outer message that this is, or 0.
    """
    values = [each.data for each in images]
    size = sum(each.nbytes for each in images)
    head = [message.SerializeToString(), _tag(field), _varint(size)]
    if inside:
        head = [_tag(inside), _varint(sum(map(len, head)) + size), *head]
    return b"".join([*head, *values])


def _tag(field: int) -> bytes:
    return _varint(field << 3 | LENGTH_DELIMITED)


def _varint(value: int) -> bytes:
    return bytes(_sevens(value))


def _sevens(value: int) -> Iterable[int]:
    while value > 0x7F:
        yield value & 0x7F | 0x80
        value >>= 7
    yield value
