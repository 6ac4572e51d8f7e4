"""The verdict: the pruned network beside the dense one, and what the difference means."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.report.numbers import fixed, percent
from secateur.report.sections import EMPTY, Cell, Column, Number, Section, Table, Tile
from secateur.report.source import RunRecord, StepRecord, names
from secateur.report.views.cells import accuracy_cell, in_percent
from secateur.report.views.rows import ACCURACY, FAST, FILE, KEPT, PACKED, TIME, Pair, Row, cut, kept, sized, smaller
from secateur.report.views.wording import headline, sentences

_CAPTION = (
    "Figures in small print are 95 % intervals. Each time was measured in turn with the one beside it; the dense one "
    "beside the compiled network is dense torch, timed once more. "
    "Weights are those that pruning may remove, parameters all there are. "
    "MACs: multiply-adds for one example; the effective ones leave zero weights out."
)
_UNMEASURED = (
    "No step has measured the result against the dense network, so milliseconds and intervals are unknown: "
    'add a [[step]] with do = "measure".'
)
_SAME = "Dense and pruned are the same network here: nothing was pruned, or the dense network was not found."


def section(run: RunRecord) -> Section | str:
    """Accuracy, milliseconds, bytes, parameters and MACs, dense against pruned."""
    step, net = run.measured(), run.last_net()
    if step is None:
        return _so_far(run)
    pair = Pair.of(step.verdict)
    rows = [*pair.rows(), *kept(net), *pair.costs(), *cut(run)]
    if not rows:
        return f"No verdict: {step.folder.name}/verdict.json holds no figures."
    more = sentences(pair, rows)
    if step.card.get("dense") is not None and step.card.get("dense") == step.card.get("pruned"):
        more.insert(0, _SAME)
    if len([other for other in run.of("measure") if other.verdict]) > 1:
        more.append(f"The run was measured more than once; this is the last time, {step.name}.")
    says = headline(rows, net.density if net else None, _left(net))
    return Section("Verdict", says, _table(rows), source=names([step]), more=tuple(more), tiles=_tiles(rows))


def _so_far(run: RunRecord) -> Section | str:
    """What the cards alone tell when nothing was measured."""
    last = run.last_net()
    if last is None:
        return "No verdict: no step is finished yet. Run the same command again to go on."
    dense = next((step for step in run.of("train", "prune") if step.density == 100 and not step.shrunk), None)
    size = _size(last)
    rows = _accuracies(dense, last)
    if size is not None:
        rows.append(sized(FILE, _size(dense) if dense else None, size, "B"))
    rows += [*kept(last), *smaller(last), *cut(run)]
    if not rows:
        return f"No verdict: {last.folder.name}/card.json holds no figures."
    known = []
    left = _left(last)
    if left is not None:
        known.append(f"{percent(left)} of the parameters left")
    if last.density is not None and (left is None or last.density < 100):
        known.append("no weight pruned" if last.density == 100 else f"{percent(last.density)} of the weights kept")
    if last.accuracy is not None:
        known.append(f"accuracy {accuracy_cell(last.accuracy).text}")
    says = f"After {last.name}: {', '.join(known)}." if known else f"After {last.name}."
    return Section("Verdict", says, _table(rows), source=names([last]), more=(_UNMEASURED,), tiles=_tiles(rows))


def _left(net: StepRecord | None) -> Number | None:
    """Parameters in per cent of the dense network's, where units were removed."""
    pair = net.shrunk.get("params") if net is not None else None
    return 100 * pair[1] / pair[0] if pair is not None else None


def _accuracies(dense: StepRecord | None, last: StepRecord) -> list[Row]:
    one, two = dense.accuracy if dense else None, last.accuracy
    if one is None and two is None:
        return []
    change = EMPTY
    if one is not None and two is not None and dense is not last:
        gap = two.value * in_percent(two) - one.value * in_percent(one)
        change = Cell(gap, f"{fixed(gap, sign=True)} points")
    return [Row(ACCURACY, accuracy_cell(one), accuracy_cell(two), change)]


def _size(step: StepRecord) -> Number | None:
    path = step.folder / "weights.safetensors"
    return float(path.stat().st_size) if path.is_file() else None


def _table(rows: Sequence[Row]) -> Table:
    """The lines as a table; the forecast has a column only when there is one."""
    columns = [Column(""), Column("Dense", True), Column("Pruned", True), Column("Change", True), Column("Meaning")]
    lines = [[Cell(r.label, r.label), r.dense, r.pruned, r.change, _word(r.tone)] for r in rows]
    if any(row.forecast is not EMPTY for row in rows):
        columns.insert(4, Column("Forecast", True, wide=True))
        for row, line in zip(rows, lines, strict=True):
            line.insert(4, row.forecast)
    return Table(_CAPTION, tuple(columns), tuple(map(tuple, lines)))


def _word(tone: str) -> Cell:
    return Cell(tone, tone) if tone else EMPTY


def _tiles(rows: Sequence[Row]) -> tuple[Tile, ...]:
    """The figures to be seen first."""
    by = {row.label: row for row in rows}
    wanted = [by[label] for label in (ACCURACY, FAST if FAST in by else TIME, PACKED) if label in by]
    found = [_tile(row) for row in wanted if row.pruned is not EMPTY]
    weights = by.get(KEPT) or by.get("Parameters kept")
    if weights and isinstance(weights.pruned.value, Number) and isinstance(weights.dense.value, Number):
        share = percent(100 * weights.pruned.value / weights.dense.value)
        found.append(Tile(weights.label, share, f"{weights.pruned.text} of {weights.dense.text}", weights.tone))
    return tuple(found)


def _tile(row: Row) -> Tile:
    beside = [row.change.text] if row.change is not EMPTY else []
    beside += [f"dense {row.dense.text}"] if row.dense is not EMPTY else []
    return Tile(row.label, row.pruned.text, " · ".join(beside), row.tone)
