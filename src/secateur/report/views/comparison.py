"""A comparison of methods: the trade-off curve with intervals over seeds, and the table of all figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from secateur.engine.comparing_methods import TICKETS
from secateur.engine.comparing_summary import statistics
from secateur.report.numbers import count, fixed, many, number, percent, scaled
from secateur.report.sections import EMPTY, Cell, Column, Number, Ranged, Report, Section, Table, Tradeoff

CONTROLS = ("magnitude", "random", "small-dense")
DENSE = "dense"
TOGETHER = 4
"""So many methods share a chart with the controls: beyond that nobody can tell the curves apart."""

SPREAD = 8
"""How many times as many mistakes the worst curve makes as the best one, from where on the axis is made finer."""

Row = Mapping[str, Any]

_COLUMNS = (
    Column("Method"), Column("Zeros", True), Column("Accuracy", True), Column("Change", True),
    Column("Compression", True), Column("Fewer MACs", True, True), Column("Training", True),
    Column("Seconds", True, True), Column("Seeds", True, True),
)  # fmt: skip


def report(table: Mapping[str, Any], folder: str) -> Report:
    """The page of ``compare.json``; no network is loaded."""
    rows = list(table["rows"])
    asked = table["asked"]
    title = f"{_network(asked)} on {asked['data']['use']}: {many(len(_methods(rows)), 'method')} compared"
    notes = [*_refused(rows), *([f"Not done yet: {', '.join(table['missing'])}."] if table["missing"] else [])]
    sections = [_curve(rows, table["runs"]), _table(rows), _how(table)]
    return Report(title, folder, tuple(s for s in sections if s is not None), tuple(notes))


def markdown(table: Mapping[str, Any]) -> str:
    """The same figures as text, for a repository or a paper."""
    page = report(table, "")
    parts = [f"# {page.title}", ""]
    for section in page.sections:
        parts += [f"## {section.title}", "", section.says, ""]
        if section.table is not None:
            parts += [*_lines(section.table), ""]
        parts += [f"- {line}" for line in section.more] + ([""] if section.more else [])
    if page.notes:
        parts += ["## What is missing", "", *(f"- {note}" for note in page.notes), ""]
    return "\n".join(parts).rstrip() + "\n"


def _lines(table: Table) -> list[str]:
    heads = [column.name for column in table.columns]
    rule = "|".join("---:" if column.numeric else "---" for column in table.columns)
    rows = [[_both(cell).replace("|", "\\|") for cell in row] for row in table.rows]
    return [f"| {' | '.join(heads)} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in rows)]


def _both(cell: Cell) -> str:
    return f"{cell.text} ({cell.span})" if cell.span else cell.text


def _network(asked: Mapping[str, Any]) -> str:
    return str(asked["model"].get("use") or asked["model"].get("load", "a network"))


def _methods(rows: Sequence[Row]) -> list[str]:
    return [name for name in dict.fromkeys(row["method"] for row in rows) if name != DENSE]


def _done(rows: Sequence[Row], method: str) -> list[Row]:
    found = [row for row in rows if row["method"] == method and row.get("accuracy")]
    return sorted(found, key=lambda row: row["compression"])


def _curve(rows: Sequence[Row], runs: Sequence[Row]) -> Section | None:
    curves = [series for name in _methods(rows) if (series := _series(name, _done(rows, name))) is not None]
    if not curves:
        return None
    band = _band(_done(rows, DENSE))
    low, high, fine = limits(curves, band)
    controls = [curve for curve in curves if curve.control]
    others = [curve for curve in curves if not curve.control]
    charts = []
    for begin in range(0, max(1, len(others)), TOGETHER):
        shown = others[begin : begin + TOGETHER]
        title = "Accuracy and compression" if len(others) <= TOGETHER else _listed([curve.name for curve in shown])
        says = _spoken(shown or controls)
        ways = (*controls, *shown)
        charts.append(
            Tradeoff(
                title, "compression ratio", "test accuracy (%)", ways, says, low, high, fine, "dense network", band
            )
        )
    more = [
        "Intervals are Student's 95 % intervals of the mean over seeds; a point without one has a single seed.",
        "Two methods are told apart when the same interval of their difference, seed by seed, leaves out 0; among many "
        "methods some are so by chance.",
    ]
    more.append("Compression is all parameters of the dense network / parameters kept, so 90 % zeros are at most 10×.")
    return Section("Trade-off", _best(rows, runs), chart=tuple(charts), more=tuple(more))


def limits(curves: Sequence[Ranged], band: tuple[Number, Number, Number] | None) -> tuple[Number, Number, bool]:
    """Ends of the axis of accuracies; finer towards 100 where a few failures would press all the rest together."""
    ends = [end for curve in curves for point in curve.points for end in point[1:] if end is not None]
    ends = [min(100.0, max(0.0, end)) for end in (*ends, *(band or ()))]
    low, high = min(ends), max(ends)
    if 100 - low > SPREAD * max(100 - high, 0.1):
        middles = [point[1] for curve in curves for point in curve.points]
        least = max(0.6 * (100 - max(middles)), 0.02)  # an interval may reach 100, which such an axis has no place for
        return max(0.0, 100 - 1.15 * (100 - low)), 100 - least, True
    room = 0.05 * (high - low or 1.0)
    return max(0.0, low - room), min(100.0, high + room), False


def _series(name: str, rows: Sequence[Row]) -> Ranged | None:
    points = tuple((row["compression"], row["accuracy"]["mean"], *_ends(row["accuracy"])) for row in rows)
    return Ranged(name, points, name in CONTROLS) if points else None


def _ends(figure: Mapping[str, Any]) -> tuple[Number | None, Number | None]:
    if figure["half"] is None:
        return None, None
    return figure["mean"] - figure["half"], figure["mean"] + figure["half"]


def _band(rows: Sequence[Row]) -> tuple[Number, Number, Number] | None:
    if not rows:
        return None
    figure = rows[0]["accuracy"]
    low, high = _ends(figure)
    middle = figure["mean"]
    return (middle, middle if low is None else low, middle if high is None else high)


def _spoken(curves: Sequence[Ranged]) -> str:
    told = [f"{c.name} from {percent(c.points[0][1])} to {percent(c.points[-1][1])}" for c in curves]
    return "; ".join(told) + "."


def _best(rows: Sequence[Row], runs: Sequence[Row]) -> str:
    """For each sparsity the highest mean, and which others it is not told apart from, seed by seed."""
    right = {(run["method"], run["sparsity"], run["seed"]): run["accuracy"] for run in runs if "error" not in run}
    said = []
    for sparsity in dict.fromkeys(row["sparsity"] for row in rows if row["sparsity"]):
        mine = [row for row in rows if row["sparsity"] == sparsity and row.get("accuracy")]
        if not mine:
            continue
        best = max(mine, key=lambda row: row["accuracy"]["mean"])
        text = f"At {_zeros(sparsity)} zeros {best['method']} has the highest mean, {percent(best['accuracy']['mean'])}"
        near = []
        for row in mine:
            seeds = [seed for seed in row["seeds"] if seed in best["seeds"]]
            gaps = [right[best["method"], sparsity, seed] - right[row["method"], sparsity, seed] for seed in seeds]
            low = _ends(statistics(gaps))[0] if len(gaps) > 1 else None
            if row is not best and low is not None and low <= 0:
                near.append(row["method"])
        said.append(f"{text}, not told apart from {_listed(near)} by these seeds." if near else f"{text}.")
    return " ".join(said) or "No method has finished yet."


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _zeros(sparsity: Number | None) -> str:
    return "own" if sparsity is None else f"{100 * sparsity:.10g} %"


def _table(rows: Sequence[Row]) -> Section:
    cells = tuple(_cells(row) for row in sorted(rows, key=lambda row: (row["sparsity"] or 0, row["sparsity"] is None)))
    says = (
        "Means over seeds with their 95 % intervals; accuracy is on test data, changes are from the dense network of "
        "the same seed, in points; training is the share of the dense network's multiply-adds."
    )
    more = (
        "Fewer MACs are arithmetic: multiply-adds of the dense network / those without pruned weights (1 MAC is 2 "
        "FLOPs). Nothing was timed, and dense kernels do not skip single zeros.",
        "Training MACs: each step costs twice the forward pass without the zeros it computes with and once that "
        "without weights that cannot change; the share is of the dense network's for the whole budget. Passes for "
        "scores and for choosing units are not in it.",
    )
    return Section("Figures", says, Table("", _COLUMNS, cells, sortable=True), more=more)


def _cells(row: Row) -> tuple[Cell, ...]:
    head = Cell(row["method"], row["method"])
    if not row.get("accuracy"):
        return (head, _zeros_cell(row), Cell(None, "refused"), *[EMPTY] * 5, Cell(0, "0"))
    accuracy, change = row["accuracy"], row.get("change")
    speed = row["speedup"]
    return (
        head, _zeros_cell(row), _figure(accuracy, percent(accuracy["mean"]), False),
        EMPTY if change is None or row["method"] == DENSE else _figure(change, fixed(change["mean"], sign=True), True),
        Cell(row["compression"], f"{fixed(row['compression'])}×"),
        EMPTY if speed is None else Cell(speed, f"{fixed(speed)}×"),
        Cell(row["train_share"], f"{100 * row['train_share']:.1f} %"),
        Cell(row["seconds"], number(row["seconds"], 3)), Cell(accuracy["n"], str(accuracy["n"])),
    )  # fmt: skip


def _zeros_cell(row: Row) -> Cell:
    """What was asked for; where units were removed or a method decides itself, what came of it."""
    reached = row.get("sparsity_reached")
    if row["method"] == "small-dense":
        return Cell(row["sparsity"], f"as {_zeros(row['sparsity'])}")
    if row["sparsity"] is None and reached is not None:
        return Cell(reached, f"own, {100 * reached:.1f} %")
    off = ""
    if reached is not None and row["sparsity"] and abs(reached - row["sparsity"]) > 5e-4:
        off = f", {100 * reached:.1f} % reached"
    return Cell(row["sparsity"], _zeros(row["sparsity"]) + off)


def _figure(figure: Mapping[str, Any], text: str, sign: bool) -> Cell:
    low, high = _ends(figure)
    if low is None or high is None:
        return Cell(figure["mean"], text)
    return Cell(figure["mean"], text, low, high, f"{fixed(low, sign=sign)} to {fixed(high, sign=sign)}")


def _how(table: Mapping[str, Any]) -> Section:
    asked, reference = table["asked"], table["reference"]
    spec = asked["compare"]
    says = (
        f"{many(len(spec['seeds']), 'seed')} ({', '.join(map(str, spec['seeds']))}), {spec['epochs']} epochs each: "
        "the same network, order of data and options of training for all methods of a seed, but for what is named here."
    )
    train, test = reference["examples"]
    held = asked["data"].get("validation", 0)
    choice = (
        f"The epoch was chosen on {count(held)} held-out training examples, never on test data."
        if held
        else "Figures are those of the last epoch: test data choose nothing."
    )
    more = (
        *table["cautions"], choice,
        f"The dense network has {count(reference['params'])} parameters, {count(reference['prunable'])} of them "
        f"prunable, and {scaled(reference['macs'])} MACs an example (architecture {reference['architecture']}).",
        f"{count(train)} training and {count(test)} test examples (data {reference['data'][:12]}).",
        "Criteria that score a trained network train half of the epochs before pruning and half after it; those that "
        "score an untrained one, rules and small-dense train all of them in a row.",
        *_tickets(asked),
        "small-dense has as many parameters as the pruned networks keep: units removed at random, the same share of "
        "each group, before training.",
    )  # fmt: skip
    options = ", ".join(f"{key} {value}" for key, value in asked["train"].items())
    return Section("How", says, more=(*more, *([f"Training: {options}."] if options else [])))


def _tickets(asked: Mapping[str, Any]) -> tuple[str, ...]:
    if not any(name in TICKETS for name in asked["compare"]["methods"]):
        return ()
    return (
        "Tickets (lth) train half of the epochs, are pruned as magnitude is, are set back to their initial weights and "
        "train the other half; lth-reinit draws fresh weights for the same masks, lth-shuffled keeps the initial "
        "weights and as many of each tensor elsewhere.",
    )


def _refused(rows: Sequence[Row]) -> list[str]:
    return [f"{row['method']} at {_zeros(row['sparsity'])} zeros: {why}" for row in rows for why in row["errors"]]
