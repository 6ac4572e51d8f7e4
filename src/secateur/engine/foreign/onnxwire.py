"""The bytes of ONNX: fields of protocol buffers, read within their bounds and put together again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from secateur.engine.foreign.guard import refusal

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


class Field(NamedTuple):
    """One field: its number, how it is written, its value, and all of its bytes."""

    number: int
    wire: int
    value: int | memoryview
    whole: memoryview

    def bytes(self) -> memoryview:
        """The value of a message, text or packed row.

        Raises:
            ValueError: when it is a number.
        """
        if not isinstance(self.value, memoryview):
            raise ValueError(f"field {self.number} is a number where a message should be")
        return self.value

    def number_of(self) -> int:
        """The value of a number, as a signed one of 64 bits.

        Raises:
            ValueError: when it is a message.
        """
        if isinstance(self.value, memoryview):
            raise ValueError(f"field {self.number} is a message where a number should be")
        return signed(self.value)


def signed(number: int) -> int:
    """A varint as a signed number of 64 bits."""
    return number - (1 << 64) if number >> 63 else number


def varint(view: memoryview, here: int) -> tuple[int, int]:
    """The number that begins at a place, and where it ends.

    Raises:
        ValueError: when it does not end within ten bytes, or within the message.
    """
    number = shift = 0
    for place in range(here, min(here + 10, len(view))):
        byte = view[place]
        number |= (byte & 127) << shift
        if byte < 128:
            return number & ((1 << 64) - 1), place + 1
        shift += 7
    raise ValueError("a number in it does not end")


def fields(view: memoryview) -> Iterator[Field]:
    """The fields of a message in order.

    Raises:
        ValueError: when one reaches beyond the message or is of a kind that ONNX does not have.
    """
    here = 0
    while here < len(view):
        start = here
        tag, here = varint(view, here)
        number, wire = tag >> 3, tag & 7
        if wire == VARINT:
            value, here = varint(view, here)
            yield Field(number, wire, value, view[start:here])
            continue
        if wire == BYTES:
            length, here = varint(view, here)
        elif wire in (FIXED64, FIXED32):
            length = 8 if wire == FIXED64 else 4
        else:
            raise ValueError(f"a field of kind {wire}, which ONNX does not have")
        if not number or length > len(view) - here:
            raise ValueError(f"field {number} of {length:,} bytes reaches beyond its message")
        yield Field(number, wire, view[here : here + length], view[start : here + length])
        here += length


def text(path: Path, field: Field) -> str:
    """A text.

    Raises:
        FileError: when it is not UTF-8.
    """
    try:
        return bytes(field.bytes()).decode("utf-8")
    except UnicodeDecodeError as error:
        raise refusal(path, "a name in it is not UTF-8 text") from error


def varints(field: Field) -> list[int]:
    """The numbers of a repeated field, packed into one or alone."""
    if not isinstance(field.value, memoryview):
        return [signed(field.value)]
    found, here = [], 0
    while here < len(field.value):
        number, here = varint(field.value, here)
        found.append(signed(number))
    return found


def _number(value: int) -> bytes:
    made = bytearray()
    while value > 127:
        made.append(value & 127 | 128)
        value >>= 7
    made.append(value)
    return bytes(made)


def number(field: int, value: int) -> bytes:
    """A field that is a number from 0 on."""
    return _number(field << 3 | VARINT) + _number(value)


def message(field: int, content: bytes) -> bytes:
    """A field that is a message, a text or bytes."""
    return _number(field << 3 | BYTES) + _number(len(content)) + content


def replaced(view: memoryview, change: Callable[[Field], bytes | None]) -> bytes:
    """A message with some of its fields changed; those for which ``change`` gives None stay as they are."""
    parts = []
    for field in fields(view):
        new = change(field)
        parts.append(bytes(field.whole) if new is None else new)
    return b"".join(parts)
