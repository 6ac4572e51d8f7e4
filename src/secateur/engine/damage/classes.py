"""Which classes suffer from pruning, and which answers flip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from secateur.core.reading import Reading
from secateur.core.streams import stream
from secateur.engine.damage.outputs import Outputs, alike
from secateur.probes._statistics import bootstrap, paired_difference, ratio_of_sums, wilson

MOST = 200
"""Classes of tokens that get an interval: each takes 1,000 resamples of its sequences."""
PAIRS = 10
"""Pairs of answers listed: the most frequent ones among the answers that were right and are wrong."""


def accuracy(found: Outputs) -> Reading:
    """Per cent right, with Wilson's 95 % interval; for tokens a bootstrap over sequences, as the accuracy probe."""
    right, n = int(found.right.sum()), len(found.labels)
    if not found.tokens:
        low, high = wilson(right, n)
        return Reading(100 * right / n, "%", None, 100 * low, 100 * high, n, {"right": float(right)})
    names, index = found.example.unique(return_inverse=True)
    hits = torch.bincount(index, weights=found.right.double(), minlength=len(names))
    estimate = ratio_of_sums(hits, torch.bincount(index, minlength=len(names)))
    spread = bootstrap(estimate, right / n, len(names), stream(0, "accuracy", "bootstrap"))
    errors = [100 * x for x in spread] if spread else [None, None, None]
    note = f"{n:,} tokens of {len(names):,} sequences; interval by bootstrap over sequences"
    return Reading(100 * right / n, "%", *errors, n=len(names), parts={"right": float(right)}, note=note)


def change(before: Outputs, after: Outputs) -> Reading:
    """Accuracy after less accuracy before, in points, with the 95 % interval of :func:`classes`' method."""
    alike(before, after)
    return paired_difference(after.right, before.right, before.example if before.tokens else None)


def classes(before: Outputs, after: Outputs, names: Sequence[str]) -> list[dict[str, Any]]:
    """One row a class, in order: how many there are, how many were and are right, and the change.

    The change is accuracy after less accuracy before on the same decisions of the class, in percentage points. Its
    95 % interval is Bonett and Price's (2012) for a paired difference of proportions: with n decisions of which a
    are right only after and b only before, ``p = (a + 1) / (n + 2)`` and ``q = (b + 1) / (n + 2)``, it is ``p - q ±
    1.96 sqrt((p + q - (p - q)²) / (n + 2))``, within ±100 and widened to hold the change. For tokens, which are not
    independent, it is a bootstrap over sequences, for the 200 most frequent classes. Each interval is of one class
    alone: of twenty, one misses by chance.

    Args:
        before: answers of the dense network.
        after: answers of the pruned one on the same data.
        names: names of the classes; a class beyond them is called by its number.

    Returns:
        Rows with ``class`` (its number), ``name``, ``count``, ``right_before``, ``right_after``, ``only_before``,
        ``only_after`` (right in one network alone) - exact integers - and ``change``, a reading, None for a class
        that has no test example.

    Raises:
        DataError: when the two were asked different labels.
    """
    alike(before, after)
    total = max(len(names), before.classes, after.classes)
    count = torch.bincount(before.labels, minlength=total)
    often = set(count.argsort(descending=True, stable=True)[:MOST].tolist())
    order = before.labels.argsort(stable=True)
    rows = []
    for number, mine in enumerate(order.split(count.tolist())):
        measured = not before.tokens or number in often
        rows.append({"class": number, "name": name_of(names, number), **_row(before, after, mine, measured)})
    return rows


def name_of(names: Sequence[str], number: int) -> str:
    """The name of a class, or its number where it has none."""
    return names[number] if number < len(names) else str(number)


def _row(before: Outputs, after: Outputs, mine: Tensor, measured: bool) -> dict[str, Any]:
    one, two = before.right[mine], after.right[mine]
    found: Reading | None = None
    if len(mine):
        groups = before.example[mine] if before.tokens and measured else None
        found = paired_difference(two, one, groups)
        if not measured:
            note = f"no interval: of more than {MOST} classes of tokens, only the most frequent have one"
            found = Reading(found.value, found.unit, n=len(mine), note=note)
    return {
        "count": len(mine), "right_before": int(one.sum()), "right_after": int(two.sum()),
        "only_before": int((one & ~two).sum()), "only_after": int((two & ~one).sum()), "change": found,
    }  # fmt: skip


def most_hurt(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The class whose interval of the change has the lowest upper end, and a sentence where that is below 0.

    It is the class that surely lost most, rather than the one with the largest loss of a few examples.

    Args:
        rows: of :func:`classes`.

    Returns:
        ``class``, ``name`` and ``sentence``, empty where the interval holds 0; None when no class has an interval.
    """
    judged = [row for row in rows if row["change"] is not None and row["change"].high is not None]
    if not judged:
        return None
    row = min(judged, key=lambda row: row["change"].high)
    found, sentence = row["change"], ""
    if found.high < 0:
        sentence = (
            f"Class {row['name']} is hurt most: of {row['count']:,} the dense network has {row['right_before']:,} "
            f"right, the pruned one {row['right_after']:,}: {found.value:+.1f} points "
            f"(95 % interval of this class alone {found.low:+.1f} to {found.high:+.1f})."
        )
    return {"class": row["class"], "name": row["name"], "sentence": sentence}


def flips(before: Outputs, after: Outputs, names: Sequence[str]) -> dict[str, Any]:
    """How many answers changed, as exact integers.

    Args:
        before: answers of the dense network.
        after: answers of the pruned one on the same data.
        names: names of the classes.

    Returns:
        ``count``; its parts ``both_right``, ``right_wrong``, ``wrong_right``, ``wrong_other`` (another wrong class)
        and ``same_wrong``; ``agree`` (the same answer) and ``agreement``, its share, with Wilson's 95 % interval for
        whole examples; ``pairs``: the most frequent ``(label, after)`` among ``right_wrong``, with their counts.

    Raises:
        DataError: when the two were asked different labels.
    """
    alike(before, after)
    same, one, two = before.answers == after.answers, before.right, after.right
    n, agree = len(same), int(same.sum())
    low, high = wilson(agree, n) if not before.tokens else (None, None)
    lost = one & ~two
    return {
        "count": n, "both_right": int((one & two).sum()), "right_wrong": int(lost.sum()),
        "wrong_right": int((~one & two).sum()), "wrong_other": int((~one & ~two & ~same).sum()),
        "same_wrong": int((~one & same).sum()), "agree": agree,
        "agreement": Reading(agree / n, low=low, high=high, n=n),
        "pairs": _pairs(before.labels[lost], after.answers[lost], names),
    }  # fmt: skip


def _pairs(labels: Tensor, answers: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    if not len(labels):
        return []
    pairs, counts = torch.stack([labels, answers], 1).unique(dim=0, return_counts=True)
    first = counts.argsort(descending=True, stable=True)[:PAIRS]
    return [
        {
            "label": label, "answer": answer, "label_name": name_of(names, label),
            "answer_name": name_of(names, answer), "count": int(counts[i]),
        }
        for i, (label, answer) in zip(first.tolist(), pairs[first].tolist(), strict=True)
    ]  # fmt: skip
