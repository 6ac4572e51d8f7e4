"""Changed answers: which labels are taken for which other class, and examples to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.report.damage import NAME, DamageRecord, Samples, whole
from secateur.report.exhibits import Answer, Gallery, Item
from secateur.report.numbers import count_cell, percent, percent_cell, shorten
from secateur.report.png import data_uri, encode
from secateur.report.sections import Cell, Column, Section, Table
from secateur.report.source import as_table, names

ITEMS, SIDE, BYTES = 60, 96, 240_000
"""Examples in a gallery; longest side of a picture in pixels; bytes that all its pictures may take."""
_CAPTION = "The most frequent of the answers that were right and now are wrong."


def section(found: DamageRecord, name: str) -> Section | str:
    """The most frequent confusions that pruning made, and a gallery of changed answers, for one pruned network."""
    table = as_table(as_table(as_table(found.table.get("changes")).get(name)).get("flips"))
    listed = table.get("pairs")
    pairs = [row for row in map(as_table, listed if isinstance(listed, list) else []) if row]
    gallery = _gallery(found, name)
    if not pairs and gallery is None:
        return ""
    lost = whole(table.get("right_wrong"))
    grid = _table(pairs, lost) if pairs else None
    return Section(
        found.title("Changed answers", name), _says(table, pairs), grid, source=names([found.step]), gallery=gallery
    )


def _says(table: Mapping[str, Any], pairs: Sequence[Mapping[str, Any]]) -> str:
    changed = whole(table.get("count")) - whole(table.get("agree"))
    begin = f"{changed:,} answer{' differs' if changed == 1 else 's differ'} from the dense network's"
    if not pairs:
        return f"{begin}."
    first = pairs[0]
    label, answer = (shorten(str(first.get(key)), NAME) for key in ("label_name", "answer_name"))
    return f"{begin}; most often {label} is now taken for {answer} ({whole(first.get('count')):,} times)."


def _table(pairs: Sequence[Mapping[str, Any]], lost: int) -> Table:
    columns = (Column("Label"), Column("Answer now"), Column("Examples", True), Column("Share of the lost", True))
    rows = []
    for row in pairs:
        label, answer = (str(row.get(key)) for key in ("label_name", "answer_name"))
        share = 100 * whole(row.get("count")) / lost if lost else None
        rows.append(
            (Cell(label, label), Cell(answer, answer), count_cell(whole(row.get("count"))), percent_cell(share))
        )
    return Table(_CAPTION, columns, tuple(rows))


def _gallery(found: DamageRecord, name: str) -> Gallery | None:
    samples = found.samples
    if samples is None:
        return None
    after = found.networks.index(name)
    answers, labels = samples.arrays["predictions"], samples.arrays["targets"]
    every = np.flatnonzero(answers[after, : samples.clean] != answers[0, : samples.clean])
    rows, pictures = _pictures(samples, _order(samples, every, after)[:ITEMS])
    if not len(rows):
        return None
    size = samples.size or (0, 0, 0)
    items = tuple(
        Item(
            place_of(found, samples, int(row)), found.class_name(int(labels[row])),
            tuple(_answer(found, samples, v, int(row)) for v in (0, after)), picture, size[1], size[0],
            text_of(found, samples, int(row)),
        )
        for row, picture in zip(rows, pictures, strict=True)
    )  # fmt: skip
    caption = (
        f"{len(rows)} of the {len(every):,} changed answers in the sample: first those that were right, then those "
        "that are right now, then the others, each beginning with those of which the pruned network is surest."
    )
    return Gallery(caption, items)


def _order(samples: Samples, rows: NDArray[np.int64], after: int) -> NDArray[np.int64]:
    answers, labels = samples.arrays["predictions"], samples.arrays["targets"]
    sure = samples.arrays.get("confidence")
    kind = np.where(answers[0, rows] == labels[rows], 0, np.where(answers[after, rows] == labels[rows], 1, 2))
    doubt = np.zeros(len(rows)) if sure is None else -np.nan_to_num(sure[after, rows].astype(np.float64))
    return rows[np.lexsort((rows, doubt, kind))]


def _pictures(samples: Samples, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], list[str]]:
    """Pictures of the rows, as many as there is room for; without pictures all rows stay."""
    if samples.size is None or not len(rows):
        return rows, [""] * len(rows)
    made, room = [], BYTES
    for picture in samples.pictures(rows, SIDE):
        png = encode(picture)
        room -= len(png)
        if room < 0 and made:
            break
        made.append(data_uri(png))
    return rows[: len(made)], made


def _answer(found: DamageRecord, samples: Samples, v: int, row: int) -> Answer:
    answer = int(samples.arrays["predictions"][v, row])
    sure = samples.arrays.get("confidence")
    value = float(sure[v, row]) if sure is not None and np.isfinite(sure[v, row]) else None
    text = percent(100 * value) if value is not None else "confidence unknown"
    right = answer == int(samples.arrays["targets"][row])
    return Answer(found.networks[v], found.class_name(answer), right, value, text)


def place_of(found: DamageRecord, samples: Samples, row: int) -> str:
    """Which example of the test part it is, and which token of it."""
    index = int(samples.arrays["index"][row])
    if not found.tokens or "position" not in samples.arrays:
        return f"test example {index}"
    return f"test sequence {index}, token {int(samples.arrays['position'][row])}"


def text_of(found: DamageRecord, samples: Samples, row: int) -> str:
    """What a text says up to the place that was asked for; empty for other data."""
    if "context" not in samples.arrays:
        return ""
    tokens = [found.class_name(int(token)) for token in samples.arrays["context"][row] if token >= 0]
    between = "" if all(len(token) == 1 for token in tokens) else " "
    return between.join(tokens).replace("\n", "↵ ")
