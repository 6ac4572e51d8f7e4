"""The verdict in words: one sentence for those in a hurry, then one for each figure that could mislead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from secateur.report.numbers import percent
from secateur.report.sections import EMPTY, Number
from secateur.report.views.rows import ACCURACY, FAST, FILE, PACKED, TIME, Pair, Row


def headline(rows: Sequence[Row], density: Number | None, left: Number | None = None) -> str:
    """The verdict in one sentence.

    Args:
        rows: the lines of the verdict.
        density: kept weights in per cent of the prunable ones; None when unknown.
        left: parameters in per cent of those of the dense network, where units were removed.
    """
    by = {row.label: row for row in rows}
    time = _compiled_clause(by.get(FAST)) or _time_clause(by.get(TIME))
    clauses = [*_accuracy_clause(by.get(ACCURACY)), *time, *_size_clause(by.get(PACKED))]
    begin = "Measured"
    if density is not None:
        begin = "Nothing is pruned" if density == 100 else f"{percent(100 - density)} of the prunable weights are zero"
    if left is not None:
        zeros = f"; of the others {begin}" if density is not None and density < 100 else ""
        begin = f"{percent(100 - left)} of the parameters are gone{zeros}"
    return f"{begin}: {', '.join(clauses)}." if clauses else f"{begin}."


def sentences(pair: Pair, rows: Sequence[Row]) -> list[str]:
    """What the differences mean, and what they do not."""
    by = {row.label: row for row in rows}
    said = (
        _on_accuracy(by.get(ACCURACY)), _on_compiled(pair, by.get(FAST)), _on_time(pair, by.get(TIME)), _on_size(by)
    )  # fmt: skip
    return [text for text in said if text]


def _accuracy_clause(row: Row | None) -> list[str]:
    if row is None or row.change is EMPTY:
        return []
    words = {
        "worse": "accuracy is lower",
        "better": "accuracy is higher",
        "no clear change": "no clear change of accuracy",
    }
    return [f"{words.get(row.tone, 'accuracy')} ({row.change.text})"]


def _time_clause(row: Row | None) -> list[str]:
    if row is None or not row.tone:
        return []
    return ["no measurable change of speed" if row.tone == "no clear change" else row.change.text]


def _compiled_clause(row: Row | None) -> list[str]:
    if row is None or not row.tone:
        return []
    words = "no measurable change of speed" if row.tone == "no clear change" else row.change.text
    return [f"compiled it is {words}" if row.tone != "no clear change" else f"{words} when compiled"]


def _size_clause(row: Row | None) -> list[str]:
    if row is None or row.tone != "smaller":
        return []
    return [f"{row.pruned.text} instead of {row.dense.text} when compressed"]


def _on_accuracy(row: Row | None) -> str:
    if row is None or not row.change.span:
        return ""
    begin = f"Accuracy went from {row.dense.text} to {row.pruned.text}: {row.change.text}"
    if row.tone == "worse":
        end = "Chance alone does not explain the loss: the whole interval lies below 0."
    elif row.tone == "better":
        end = "Chance alone does not explain the gain: the whole interval lies above 0."
    else:
        end = "The interval contains 0, so chance could explain the difference; more test examples would narrow it."
    return f"{begin} (95 % interval {row.change.span}). {end}"


def _on_compiled(pair: Pair, row: Row | None) -> str:
    found = pair.pruned.get("compiled")
    if found is None:
        return ""
    if row is None:
        return f"The compiled form has no time: {found.note}."
    figures = f"{row.dense.text} dense in torch, {row.pruned.text} compiled; {row.change.text}"
    span = f", 95 % interval {row.change.span}" if row.change.span else ""
    threads = found.parts.get("threads")
    with_threads = f" with {int(threads)} thread{'s' if threads > 1 else ''} each" if threads else ""
    return f"Compiled, taken in turn{with_threads} ({found.note}): {figures}{span}."


def _on_time(pair: Pair, row: Row | None) -> str:
    if row is None or not row.change.span:
        return ""
    figures = f"{row.dense.text} dense, {row.pruned.text} pruned; {row.change.text}, 95 % interval {row.change.span}"
    one, two = pair.part("cost", "macs_dense")
    same = one is not None and one == two
    if row.tone != "no clear change":
        caution = "Both run the same dense kernels on the same shapes, so take a small difference with caution."
        return f"Time changed ({figures}). {caution}" if same else f"Time changed ({figures})."
    if one is not None and two is not None and two < one:
        return (
            f"Time did not change measurably ({figures}), although the network needs fewer MACs: for one example the "
            "calls of its operators can take longer than their arithmetic. Larger batches or the compiled form show it."
        )
    why = ": ordinary dense kernels multiply by the zeros as well" if same else ""
    return (
        f"Time did not change measurably ({figures}){why}. To gain time the zeros must form a pattern that the "
        "hardware skips, or the network must run on kernels made for sparse weights, as its compiled form does."
    )


def _on_size(by: Mapping[str, Row]) -> str:
    plain, packed = by.get(FILE), by.get(PACKED)
    if plain is None or packed is None or packed.tone != "smaller" or plain.tone == "smaller":
        return ""
    return (
        "The file itself is as large as before because the zeros are stored too; compressed (zip) it takes "
        f"{packed.pruned.text} instead of {packed.dense.text}."
    )
