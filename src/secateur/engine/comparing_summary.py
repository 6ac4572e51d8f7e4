"""Means and intervals of a comparison, by method and sparsity; of one seed there is neither."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

CONFIDENCE = 0.95


def summarise(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each method and sparsity, in the order of the runs.

    Args:
        table: of :func:`secateur.engine.comparing_jobs.gather`.

    Returns:
        Rows with ``accuracy`` and ``change`` (from the dense network of the same seed, in points) as statistics, and
        means of ratios; rows without a single result have only ``errors``.
    """
    runs, reference = list(table["runs"]), table["reference"]
    dense = {run["seed"]: run for run in runs if run["method"] == "dense" and "error" not in run}
    budget = 3 * reference["macs"] * reference["examples"][0] * table["asked"]["compare"]["epochs"]
    rows = []
    for method, sparsity in dict.fromkeys((run["method"], run["sparsity"]) for run in runs):
        mine = [run for run in runs if (run["method"], run["sparsity"]) == (method, sparsity)]
        done = [run for run in mine if "error" not in run]
        row: dict[str, Any] = {"method": method, "sparsity": sparsity, "seeds": [run["seed"] for run in done]}
        row["errors"] = list(dict.fromkeys(run["error"] for run in mine if "error" in run))
        if done:
            row |= _figures(done, dense, reference, budget)
        rows.append(row)
    return rows


def _figures(
    done: list[Mapping[str, Any]], dense: Mapping[int, Any], reference: Mapping[str, Any], budget: int
) -> dict[str, Any]:
    pairs = [run["accuracy"] - dense[run["seed"]]["accuracy"] for run in done if run["seed"] in dense]
    return {
        "accuracy": statistics([run["accuracy"] for run in done]),
        "change": statistics(pairs) if pairs else None,
        "sparsity_reached": _mean([_zeros(run, reference) for run in done]),
        "params_kept": _mean([run["params_kept"] for run in done]),
        "compression": _mean([reference["params"] / run["params_kept"] for run in done]),
        "speedup": _mean([reference["macs"] / run["macs"] for run in done if run["macs"]] or [math.nan]),
        "train_macs": _mean([run["train_macs"] for run in done]),
        "train_share": _mean([run["train_macs"] / budget for run in done]),
        "epochs": done[0]["epochs"],
        "steps": _mean([run["steps"] for run in done]),
        "seconds": _mean([run["seconds"] for run in done]),
    }


def _zeros(run: Mapping[str, Any], reference: Mapping[str, Any]) -> float:
    """Share of zeros among all prunable weights, those that a method may not prune included; units gone are none."""
    if run["params"] != reference["params"]:
        return 1 - run["kept"] / run["total"]
    return (run["total"] - run["kept"]) / reference["prunable"]


def statistics(values: Sequence[float | int]) -> dict[str, Any]:
    """Mean, sample standard deviation (n - 1), and half of Student's interval of the mean; None of both for one value.

    >>> {key: value and round(value, 3) for key, value in statistics([1.0, 2.0, 3.0]).items()}
    {'n': 3, 'mean': 2.0, 'std': 1.0, 'half': 2.484}
    """
    n, middle = len(values), _mean(values)
    if n < 2:
        return {"n": n, "mean": middle, "std": None, "half": None}
    spread = math.sqrt(sum((value - middle) ** 2 for value in values) / (n - 1))
    return {"n": n, "mean": middle, "std": spread, "half": student(n - 1) * spread / math.sqrt(n)}


def student(freedom: int, confidence: float = CONFIDENCE) -> float:
    """Student's t that so many of all draws stay below, on both sides, for a whole number of degrees of freedom.

    >>> [round(student(n), 3) for n in (1, 2, 9)]
    [12.706, 4.303, 2.262]

    Source: the finite series for whole degrees of freedom, Abramowitz and Stegun 26.7.3 and 26.7.4, inverted by
    bisection of the angle ``atan(t / sqrt(n))``.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _inside(middle, freedom) < confidence else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _inside(angle: float, freedom: int) -> float:
    """Share of draws between ``-t`` and ``t`` with ``t = sqrt(n) tan(angle)``."""
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0 if freedom == 1 else term
    for k in range(2 + odd, freedom, 2):
        term *= math.cos(angle) ** 2 * (k - 1) / k
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def _mean(values: Sequence[float | int]) -> float:
    return math.fsum(values) / len(values)
