"""What a report shows beside tables and charts: single examples, and points to explore."""

from __future__ import annotations

from dataclasses import dataclass

Number = float | int


@dataclass(frozen=True)
class Answer:
    """What one network makes of an example.

    Args:
        network: its name.
        answer: the class it answers, by name.
        right: whether that is the label.
        confidence: its highest probability; None when unknown.
        text: the confidence as people read it.
    """

    network: str
    answer: str
    right: bool
    confidence: Number | None
    text: str


@dataclass(frozen=True)
class Item:
    """One example.

    Args:
        name: which one it is.
        label: the right class, by name.
        answers: one a network.
        picture: a PNG as a data URI; empty when the example is no picture.
        width: of the picture in pixels.
        height: of the picture in pixels.
        text: of a text, what comes before the answer.
    """

    name: str
    label: str
    answers: tuple[Answer, ...]
    picture: str = ""
    width: int = 0
    height: int = 0
    text: str = ""


@dataclass(frozen=True)
class Gallery:
    """Examples side by side; ``caption`` tells which they are and how they were chosen."""

    caption: str
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Packed:
    """Numbers as base64 of little-endian bytes, row-major.

    Args:
        name: what they are.
        type: ``"float32"``, ``"int32"``, ``"uint16"`` or ``"uint8"``.
        shape: their shape.
        data: the bytes.
        ranges: of quantised numbers ``(low, high)`` for each pair of the first and the last index, in order: 0 stands
            for low, 65534 for high and 65535 for none.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    data: str
    ranges: tuple[tuple[Number, Number], ...] = ()


@dataclass(frozen=True)
class View:
    """One arrangement of the points in the plane: the array that holds it, its title, and what to know of it.

    ``shared`` tells that all networks have the same axes, so that places can be compared between them.
    """

    name: str
    title: str
    says: str
    shared: bool = False


@dataclass(frozen=True)
class Sheet:
    """Pictures of one size on a grid, as one PNG.

    Args:
        data: the PNG as a data URI.
        across: pictures in a row of the grid.
        width: of a picture in pixels.
        height: of a picture in pixels.
        count: how many there are.
    """

    data: str
    across: int
    width: int
    height: int
    count: int


@dataclass(frozen=True)
class Explorer:
    """Samples as points, for two networks side by side.

    Args:
        networks: their names, the dense one first.
        classes: names of the classes.
        count: number of samples n.
        views: arrangements in the plane, the first to be shown first.
        arrays: ``index``, ``targets`` ``(n,)``; ``predictions`` ``(v, n)``; metrics ``(v, n)``; of each view
            ``(v, n, 2)``; ``place`` ``(n,)``: number of the sample's picture in the sheet, -1 for none; with kinds,
            ``kind`` ``(n,)``.
        metrics: names of the arrays that are metrics, with their units.
        says: the same in one sentence, for those who cannot see it.
        sheet: the pictures.
        more: further sentences, such as what is not there.
        kinds: what was done to the samples, by ``kind``; the first is nothing. Empty where they are all of one kind.
    """

    networks: tuple[str, ...]
    classes: tuple[str, ...]
    count: int
    views: tuple[View, ...]
    arrays: tuple[Packed, ...]
    metrics: tuple[tuple[str, str], ...]
    says: str
    sheet: Sheet | None = None
    more: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
