"""Features: where the last features of both networks lie, as figures and as points to explore."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.report.damage import METRICS, NAME, VIEWS, DamageRecord, Samples, whole
from secateur.report.exhibits import Explorer, Packed, Sheet, View
from secateur.report.numbers import count_cell, number_cell, percent, shorten
from secateur.report.png import data_uri, encode, sheet
from secateur.report.sections import EMPTY, Cell, Column, Section, Table
from secateur.report.source import as_finite, as_table, names

SIDE, BYTES, PIXELS, TRIAL = 64, 1_000_000, 24_000_000, 200
"""Longest side of a picture in the sheet; bytes and pixels that the sheet may have; pictures of the trial."""
NONE, TOP = 65535, 65534
_CAPTION = (
    "Of the input X of the last layer, over all test examples. Angle: to the direction of the right class, in radians. "
    "Length: |X|. Margin: signed distance to the nearest boundary of the right class, negative for wrong answers."
)
_TITLES = {
    "pca": ("PCA of the dense network", "Both panels have the first two principal axes of the dense network."),
    "pca_own": ("PCA of each network", "Each panel has axes of its own."),
    "tsne": ("t-SNE of each network", "Each panel has axes of its own; distances between far groups mean nothing."),
}


def section(found: DamageRecord) -> Section | str:
    """Angle, length and margin of every network, and the points to explore."""
    shapes = as_table(found.table.get("geometry"))
    tables = {name: as_table(shapes.get(name)) for name in found.networks if as_table(shapes.get(name))}
    explorer = _explorer(found)
    if not tables and explorer is None:
        return ""  # the record says why
    more = tuple(text for name in found.networks[1:] if (text := _margins(name, as_table(shapes.get(name)))))
    table = _table(tables) if tables else None
    return Section("Features", _says(tables), table, source=names([found.step]), more=more, explorer=explorer)


def _table(tables: Mapping[str, Mapping[str, Any]]) -> Table:
    heads = ("Mean", "Deviation", "Lower quartile", "Median", "Upper quartile", "Undefined")
    columns = [Column("Metric"), Column("Network")]
    columns += [Column(head, True, head.endswith("quartile") or head == "Undefined") for head in heads]
    rows = []
    for metric in METRICS:
        for name, table in tables.items():
            found = as_table(table.get(metric))
            cells = [number_cell(as_finite(found.get(key))) for key in ("mean", "std")]
            cells += [*map(number_cell, _quartiles(found)), count_cell(whole(found.get("undefined")))]
            rows.append((Cell(metric, metric), Cell(name, name), *cells))
    return Table(_CAPTION, tuple(columns), tuple(rows))


def _quartiles(table: Mapping[str, Any]) -> list[float | int | None]:
    found = table.get("quartiles")
    return [as_finite(value) for value in found] if isinstance(found, list) and len(found) == 3 else [None] * 3


def _says(tables: Mapping[str, Mapping[str, Any]]) -> str:
    told = []
    for name, table in tables.items():
        cell = number_cell(_quartiles(as_table(table.get("margin")))[1])
        if cell is not EMPTY:
            told.append(f"{shorten(name, NAME)} {cell.text}")
    return f"Median margin: {', '.join(told)}." if told else "The input of the last layer, sample by sample."


def _margins(name: str, table: Mapping[str, Any]) -> str:
    """What the dense network's margin tells of the answers that flip."""
    before = as_table(table.get("margin_before"))
    flipped, stable = (as_table(before.get(key)) for key in ("flipped", "stable"))
    pair = [number_cell(_quartiles(part)[1]) for part in (flipped, stable)]
    if EMPTY in pair:
        return ""
    return (
        f"The {whole(flipped.get('count')):,} answers that {shorten(name, NAME)} gives otherwise had a median margin "
        f"of {pair[0].text} in the dense network, the {whole(stable.get('count')):,} others {pair[1].text}."
    )


def _explorer(found: DamageRecord) -> Explorer | None:
    samples = found.samples
    if samples is None:
        return None
    views = [name for name in VIEWS if name in samples.arrays and bool(np.isfinite(samples.arrays[name]).any())]
    if not views:
        return None
    metrics = {name: unit for name, unit in METRICS.items() if name in samples.arrays}
    pictures, rows = _sheet(samples)
    place = np.full(samples.count, -1)
    place[rows] = np.arange(len(rows))
    whole_numbers = ("index", "targets", "predictions", *(("kind",) if samples.kinds else ()))
    arrays = [_packed(name, samples.arrays[name], "int32") for name in whole_numbers]
    arrays.append(_packed("place", place, "int32"))
    exact = [name for name in ("confidence", *metrics) if name in samples.arrays]
    arrays += [_packed(name, samples.arrays[name], "float32") for name in exact]
    arrays += [_quantised(name, samples.arrays[name]) for name in views]
    return Explorer(
        found.networks, found.classes, samples.count, tuple(_view(found, name) for name in views), tuple(arrays),
        tuple(metrics.items()), _sentence(found, samples), pictures, _more(found, samples, pictures, len(rows)),
        samples.kinds,
    )  # fmt: skip


def _sentence(found: DamageRecord, samples: Samples) -> str:
    answers = samples.arrays["predictions"][:, : samples.clean]
    flipped = int((answers != answers[0]).any(0).sum())
    said = f"{samples.clean:,} test examples as points, one panel a network; {flipped:,} of them changed their answer"
    if samples.clean < whole(as_table(found.table.get("data")).get("decisions")):
        return f"{said}. The sample prefers those: their share of all test examples is smaller."
    return f"{said}."


def _more(found: DamageRecord, samples: Samples, pictures: Sheet | None, shown: int) -> tuple[str, ...]:
    said = []
    if samples.kinds:
        said.append(
            f"Under Inputs there are corrupted copies of some samples besides: {samples.count - samples.clean:,} of "
            f"{len(samples.kinds) - 1} kinds. t-SNE places no copies."
        )
    elif as_table(found.table.get("corruptions")):
        said.append("Corrupted images cannot be chosen here: only their accuracies were kept.")
    if pictures is None:
        said.append("The samples are no pictures; a point shows its number in the test data.")
    elif shown < samples.count:
        of = "samples and copies" if samples.kinds else "samples"
        said.append(f"To keep the page small it holds pictures of {shown:,} of the {of}, changed answers first.")
    if pictures is not None and samples.size is not None and max(samples.size[:2]) > SIDE:
        said.append(f"Pictures are smaller here: {pictures.width} by {pictures.height} pixels.")
    return tuple(said)


def _view(found: DamageRecord, name: str) -> View:
    title, says = _TITLES[name]
    plane = as_table(found.table.get("plane"))
    if name == "tsne" and as_finite(plane.get("perplexity")) is not None:
        says += f" Perplexity {number_cell(as_finite(plane.get('perplexity')), 3).text}."
    shares = as_table(plane.get("explained")).get(found.networks[0])
    known = [as_finite(share) for share in shares] if isinstance(shares, list) else []
    if name == "pca" and len(known) == 2 and None not in known:
        says += f" They hold {percent(100 * sum(share for share in known if share is not None))} of its variance."
    return View(name, title, says, name == "pca")


def _packed(name: str, array: NDArray[Any], kind: str) -> Packed:
    flat = np.ascontiguousarray(array, np.dtype(kind).newbyteorder("<"))
    return Packed(name, kind, tuple(map(int, array.shape)), base64.b64encode(flat.tobytes()).decode())


def _quantised(name: str, array: NDArray[np.float32]) -> Packed:
    """Places ``(v, n, 2)`` in 65,535 steps over the range of each network and axis: finer than any screen."""
    steps, ranges = np.full(array.shape, NONE, np.uint16), []
    for v in range(array.shape[0]):
        for axis in range(array.shape[2]):
            values = array[v, :, axis].astype(np.float64)
            good = np.isfinite(values)
            low, high = (float(values[good].min()), float(values[good].max())) if good.any() else (0.0, 0.0)
            span = high - low or 1.0
            steps[v, good, axis] = np.rint((values[good] - low) / span * TOP)
            ranges.append((low, high))
    packed = _packed(name, steps, "uint16")
    return Packed(packed.name, packed.type, packed.shape, packed.data, tuple(ranges))


def _sheet(samples: Samples) -> tuple[Sheet | None, NDArray[np.int64]]:
    """The pictures on one sheet, and the samples they are of: changed answers first, until the sheet is full."""
    none = np.empty(0, np.int64)
    if samples.size is None:
        return None, none
    answers = samples.arrays["predictions"]
    copied = np.arange(samples.count) >= samples.clean
    order = np.argsort(np.where(copied, 2, ~(answers != answers[0]).any(0)), kind="stable")
    # A few pictures tell how to write all, and how many there is room for.
    pictures = samples.pictures(order[:: -(-len(order) // TRIAL)], SIDE)
    trials = [len(encode(_grid(pictures), way)) for way in (False, True)]
    most = min(PIXELS // pictures[0].size, int(0.95 * BYTES / min(trials) * len(pictures)))
    rows = order[: max(1, most)]
    pictures = samples.pictures(rows, SIDE)
    png = encode(_grid(pictures), trials[1] < trials[0])
    if len(png) > BYTES:
        rows = rows[: max(1, int(0.9 * BYTES / len(png) * len(rows)))]
        png = encode(_grid(pictures[: len(rows)]), trials[1] < trials[0])
    height, width = int(pictures.shape[1]), int(pictures.shape[2])
    return Sheet(data_uri(png), _across(len(rows), width), width, height, len(rows)), rows


def _grid(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return sheet(pictures, _across(len(pictures), pictures.shape[2]))


def _across(count: int, width: int) -> int:
    """Pictures in a row of the sheet, so that it is about as wide as high; no browser draws sheets of any width."""
    return max(1, min(4096 // width, int(count**0.5) + 1))
