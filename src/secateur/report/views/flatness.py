"""Curvature and flatness: the loss around the weights, before and after pruning."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from secateur.core.reading import Reading
from secateur.report.numbers import count, number
from secateur.report.sections import EMPTY, Cell, Column, Number, Ranged, Section, Table, Tradeoff
from secateur.report.source import RunRecord, as_finite, as_table, interval, names
from secateur.report.views.cells import readings

TITLE = "Curvature and flatness"
SIDES = ("dense", "pruned")
_LARGE = 1e100  # beyond it differences and axes would overflow
_NOISE = "noise "
_EQUAL = 0.01
_NAMES = {
    "top_eigenvalue": "Largest eigenvalue of the Hessian",
    "trace": "Trace of the Hessian",
    "sharpness": "Sharpness",
}
_WINNER = {"dense": "before", "pruned": "after", "neither": "no clear difference"}
_SPOKEN = {"top_eigenvalue": "the largest eigenvalue", "trace": "the trace", "sharpness": "sharpness"}
_CAUTION = (
    "the eigenvalue, the trace and sharpness are not scale-invariant: rescaling layers changes them although the "
    "network computes the same"
)


@dataclass(frozen=True)
class Pair:
    """A figure of both networks; None where it was not measured."""

    key: str
    dense: Reading | None
    pruned: Reading | None

    @property
    def size(self) -> Number | None:
        """Size of the noise; None for another figure."""
        found = [_part(reading, "size") for reading in (self.dense, self.pruned)]
        size = next((size for size in found if size is not None), None) if self.key.startswith(_NOISE) else None
        return size if size is not None and 0 < size < _LARGE and 100 * size > 1e-6 else None

    @property
    def flatter(self) -> str:
        """``"dense"``, ``"pruned"``, ``"neither"`` where the errors leave it open; empty where it cannot be told."""
        one, two = _known(self.dense), _known(self.pruned)
        if one is None or two is None:
            return ""
        halves = _half(self.dense), _half(self.pruned)
        error = sum(halves) if self.key == "top_eigenvalue" else math.hypot(*halves)
        if self.key == "sharpness":
            error = _EQUAL * max(abs(one), abs(two))
        if abs(one - two) <= error:
            return "neither"
        return "dense" if one < two else "pruned"


def section(run: RunRecord) -> Section | str:
    """Figures of both networks side by side, and the rise of the loss by the size of the noise."""
    step = run.measured()
    table = as_table(step.verdict.get("flatness")) if step is not None else {}
    dense, pruned = (readings(table.get(side)) for side in SIDES)
    pairs = [Pair(key, dense.get(key), pruned.get(key)) for key in _keys(dense, pruned)]
    if step is None or not pairs:
        return ""
    loss = Pair("loss", dense.get("loss"), pruned.get("loss"))
    return Section(
        TITLE, _says(pairs), _table(loss, pairs), tuple(_charts(pairs)), names([step]), tuple(_more(loss, pairs))
    )


def _keys(dense: Mapping[str, Reading], pruned: Mapping[str, Reading]) -> list[str]:
    noises = [key for key in {**dense, **pruned} if key.startswith(_NOISE)]
    pairs = {key: Pair(key, dense.get(key), pruned.get(key)).size for key in noises}
    sizes = sorted((size, key) for key, size in pairs.items() if size is not None)
    return [*(key for key in _NAMES if key in dense or key in pruned), *(key for _, key in sizes)]


def _known(reading: Reading | None) -> float | None:
    value = None if reading is None else as_finite(reading.value)
    return float(value) if value is not None and abs(value) < _LARGE else None


def _part(reading: Reading | None, name: str) -> Number | None:
    return None if reading is None else as_finite(reading.parts.get(name))


def _ends(reading: Reading | None) -> tuple[Number, Number] | None:
    """The interval, where both ends can be drawn and the value lies inside."""
    ends, value = None if reading is None else interval(reading), _known(reading)
    if ends is None or value is None or max(map(abs, ends)) >= _LARGE or not ends[0] <= value <= ends[1]:
        return None
    return ends


def _half(reading: Reading | None) -> float:
    ends = _ends(reading)
    return 0.0 if ends is None else float(ends[1] - ends[0]) / 2


def _table(loss: Pair, pairs: Sequence[Pair]) -> Table:
    columns = [Column("Measure"), *(Column(name, True) for name in ("Before", "After", "Ratio")), Column("Flatter")]
    about = [pair for pair in (loss, *pairs) if pair.dense is not None or pair.pruned is not None]
    rows = [_row(pair) for pair in about]
    trace = next((pair for pair in pairs if pair.key == "trace"), None)
    means = [None if trace is None else _part(reading, "per weight") for reading in (_of(trace, s) for s in SIDES)]
    if any(mean is not None for mean in means):
        at = 1 + next(i for i, pair in enumerate(about) if pair.key == "trace")
        cells = [EMPTY if mean is None else Cell(mean, number(mean)) for mean in means]
        rows.insert(at, (Cell("Trace / free weights", "Trace / free weights"), *cells, _plain_ratio(*means), EMPTY))
    caption = (
        "Before is the dense network, after the pruned one; small is flat. Figures in small print are 95 % intervals "
        "over random draws, not over examples; of the eigenvalue the value less and plus its residual, and an "
        "eigenvalue lies between. Intervals of ratios take the draws of both networks for independent."
    )
    return Table(caption, tuple(columns), tuple(rows))


def _of(pair: Pair | None, side: str) -> Reading | None:
    return None if pair is None else pair.dense if side == "dense" else pair.pruned


def _row(pair: Pair) -> tuple[Cell, ...]:
    words = "" if pair.key == "loss" else pair.flatter
    winner = Cell(words, _WINNER[words]) if words else EMPTY
    return (Cell(pair.key, _label(pair)), _cell(pair.dense), _cell(pair.pruned), _ratio(pair), winner)


def _label(pair: Pair) -> str:
    if pair.key == "loss":
        return "Loss on the sample"
    if pair.size is not None:
        return f"Rise under noise of {_percent(pair.size)}"
    rho = next((r for side in SIDES if (r := _part(_of(pair, side), "rho")) is not None), None)
    return _NAMES[pair.key] + (f", rho {number(rho, 2)}" if pair.key == "sharpness" and rho is not None else "")


def _percent(size: Number) -> str:
    return f"{100 * size:.4g} %"


def _cell(reading: Reading | None) -> Cell:
    if reading is None:
        return EMPTY
    ends = _ends(reading)
    if ends is None:
        return Cell(reading.value, number(reading.value))
    return Cell(reading.value, number(reading.value), *ends, " to ".join(map(number, ends)))


def _plain_ratio(before: Number | None, after: Number | None) -> Cell:
    if before is None or after is None or not 1 / _LARGE < before < _LARGE or not 1 / _LARGE < after < _LARGE:
        return EMPTY
    ratio = as_finite(after / before)
    return EMPTY if ratio is None else Cell(ratio, f"{number(ratio, 3)}×")


def _ratio(pair: Pair) -> Cell:
    """After by before where both are above 0; with an interval by errors of logarithms where theirs are above 0 too."""
    before, after = _known(pair.dense), _known(pair.pruned)
    cell = _plain_ratio(before, after)
    if cell is EMPTY or before is None or after is None or pair.key in ("loss", "sharpness"):
        return cell
    shares = _half(pair.dense) / before, _half(pair.pruned) / after
    if max(shares) >= 1 or _ends(pair.dense) is None or _ends(pair.pruned) is None:
        return cell
    if pair.key == "top_eigenvalue":  # bounds, not errors of chance
        factors = (1 - shares[1]) / (1 + shares[0]), (1 + shares[1]) / (1 - shares[0])
    else:
        factors = math.exp(-math.hypot(*shares)), math.exp(math.hypot(*shares))
    low, high = (after / before * factor for factor in factors)
    if not math.isfinite(high):
        return cell
    return Cell(cell.value, cell.text, low, high, f"{number(low, 3)} to {number(high, 3)}")


def _charts(pairs: Sequence[Pair]) -> Iterator[Tradeoff]:
    """The rise with its intervals against the size of the noise, which is logarithmic."""
    series = []
    for side in SIDES:
        points = []
        for pair in pairs:
            value, ends = _known(_of(pair, side)), _ends(_of(pair, side)) or (None, None)
            if pair.size is not None and value is not None:
                points.append((100 * pair.size, value, *ends))
        if points:
            series.append(Ranged(side, tuple(points)))
    heights = [y for one in series for _, *ys in one.points for y in ys if y is not None]
    if heights:
        low, high = min(0.0, *heights), max(0.0, *heights)
        room = 0.05 * (high - low) or 1.0
        says = "; ".join(
            f"{one.name} {number(one.points[0][1])} at {one.points[0][0]:.4g} % and {number(one.points[-1][1])} at "
            f"{one.points[-1][0]:.4g} %"
            for one in series
        )
        yield Tradeoff(
            "Rise of the loss under noise", "size of the noise (% of each filter)", "rise of the loss", tuple(series),
            f"Mean rise over random directions: {says}.", low - room * (low < 0), high + room, amounts=True,
        )  # fmt: skip


def _says(pairs: Sequence[Pair]) -> str:
    """Which network is flatter by which measure."""
    by: dict[str, list[str]] = {"pruned": [], "dense": [], "neither": [], "": []}
    for pair in pairs:
        if pair.size is None:
            by[pair.flatter].append(_SPOKEN[pair.key])
    noises = [pair for pair in pairs if pair.size is not None]
    for word, listed in by.items():
        sizes = [_percent(pair.size) for pair in noises if pair.size is not None and pair.flatter == word]
        if sizes:
            every = len(sizes) == len(noises) and len(sizes) > 1
            listed.append("noise of every size" if every else f"noise of {_and(sizes)}")
    clauses = [f"the {word} network is flatter by {_and(by[word])}" for word in ("pruned", "dense") if by[word]]
    clauses += [f"neither is clearly flatter by {_and(by['neither'])}"] if by["neither"] else []
    clauses += [f"{_and(by[''])} cannot be compared"] if by[""] else []
    told = "; ".join((*clauses, _CAUTION))
    return f"{told[0].upper()}{told[1:]}."


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _more(loss: Pair, pairs: Sequence[Pair]) -> Iterator[str]:
    sample = next((r.n for r in (loss.dense, loss.pruned) if r is not None), None)
    if sample is not None:
        yield (
            f"Measured on {count(sample)} training examples, the same for both networks, with the mean loss and in "
            "evaluation mode."
        )
    one, two = (_part(reading, "weights") for reading in (loss.dense, loss.pruned))
    counted = f" ({count(one)} before, {count(two)} after)" if one is not None and two is not None else ""
    yield (
        f"Only weights that are kept may move{counted}: the Hessian of the pruned network is that of its kept weights, "
        "biases and scales, and neither gradient nor noise touches pruned ones. With fewer directions the trace and "
        "the largest eigenvalue can fall without the loss being flatter along any of those that are left."
    )
    if any(pair.key == "sharpness" for pair in pairs):
        yield (
            "Sharpness is the rise of the loss after a step of length rho along the gradient; it has no interval, and "
            "a difference of 1 % or less counts as none."
        )
    if any(pair.size is not None for pair in pairs):
        yield (
            "Noise is Gaussian, and each filter's share is as long as the stated per cent of the filter; the loss is "
            "taken on both sides of the weights. Such a rise does not change when layers are rescaled."
        )
    notes: dict[str, None] = {}
    for pair in (loss, *pairs):
        for side in SIDES:
            reading = _of(pair, side)
            if reading is not None and reading.note:
                notes[f"{_label(pair)}, {side} network: {reading.note.rstrip('.')}."] = None
    yield from notes


__all__ = ["SIDES", "TITLE", "Pair", "section"]
