"""Writes docs/results/one-shot.md from the rows that ``one_shot.py`` recorded."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy import stats

SEEDS = 3

HEAD = """# One-shot pruning without fine-tuning

`python benchmarks/one_shot.py --data-dir FOLDER` trains the dense networks of `recipes/dense-*.toml` and prunes each
of them once by every method to 50, 70, 80, 90 and 95 % zeros; it can be stopped and goes on where it was. No weight
is trained afterwards; the statistics of BatchNorm are taken anew for every method alike. Scores and layer inputs come
from {examples} training examples. Figures are means over the seeds {seeds} (each trains its own network, draws its
own sample and its own random scores), ± half of Student's 95 % interval over the seeds. Single weights are ranked
over the whole network at once, where the name does not say otherwise. Solvers keep in each layer as many weights as
global magnitude does, so that they differ from it in nothing but which weights these are and where the others move.
`obs` gives the weights of `exact_obs` (tests hold that) and is not run again.
"""


NOTES = """What the tables say, and what not:

- `sparsegpt` goes through the columns once, from the first to the last, and takes the same share of every block of 128
  columns. On ResNet-20 that is worse than magnitude from 90 % zeros on, and more columns in a block do not mend it
  (`-s solver.block=10000`). `alps`, which chooses without such an order at the same counts, is better there.
- On LeNet-5 at 80 % the accuracy of magnitude is still that of the dense network: there is nothing to win.
- At 95 % the language models are past use whatever the method, and differences there say little.
- `snip`, `grasp`, `synflow` and `earlycrop` are made for untrained networks, `movement` for fine-tuning. Here they
  stand on trained ones, to say what happens if one takes them for it; `grasp` and `movement` keep signs, and end at
  chance.
- `bert_tiny` fits its 5,600 training letters nearly perfectly. Gradients are then almost nothing on the examples, and
  criteria made of them (`obd`, `fisher_diagonal`, `snip`, `taylor`, `snr`) rank worse than magnitude.
- Whole units: one tensor at a time loses its rows; what reads them is not rewired, and residual partners are not
  pruned together. `sosp_i` takes two passes for every unit and sees the first 8 examples only of the language models
  and `bert_tiny`.
- `exact_obs` and `chita` are dear; where not all seeds were run, the cell says so.
"""


def write_page(rows_file: Path, page: Path, networks: Sequence[str]) -> None:
    """The page, from whatever rows there are."""
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    counts = "512 (LeNet-5, bert_tiny), 256 (ResNet-20) or 64 (the language models)"
    seeds = ", ".join(map(str, sorted({row["seed"] for row in rows})))
    parts = [HEAD.format(examples=counts, seeds=seeds), _beaten(rows, networks)]
    for network in networks:
        mine = [row for row in rows if row["network"] == network]
        if mine:
            parts.append(_network(network, mine))
    page.write_text("\n".join(parts).rstrip() + "\n")


def _network(network: str, rows: list[dict[str, Any]]) -> str:
    text = any("perplexity" in row for row in rows)
    figure = "perplexity" if text else "accuracy"
    dense = [row for row in rows if row["kind"] == "dense"]
    lines = [f"## {network}", ""]
    what = "Perplexity a character, lower is better" if text else "Accuracy in %"
    lines.append(f"{what}, on {dense[0]['examples']:,} test examples. Dense: {_cell(dense, figure)}.")
    for kind, title in (("weights", "Single weights"), ("units", "Whole units")):
        mine = [row for row in rows if row["kind"] == kind]
        if mine:
            lines += ["", f"### {title}", "", *_table(mine, figure)]
    return "\n".join([*lines, *_refused(rows), ""])


def _table(rows: list[dict[str, Any]], figure: str) -> list[str]:
    sparsities = sorted({row["sparsity"] for row in rows})
    lines = [f"| method | {' | '.join(f'{s:.0%} zeros' for s in sparsities)} |", f"|---|{'---|' * len(sparsities)}"]
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        cells = [_cell([row for row in mine if row["sparsity"] == s], figure) for s in sparsities]
        name = f"{method} (solver)" if mine[0].get("solver") else method
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _cell(rows: list[dict[str, Any]], figure: str) -> str:
    values = [row[figure] for row in rows if figure in row]
    if not rows:
        return ""
    if len(values) < len(rows):
        return "refused"
    middle = sum(values) / len(values)
    digits = 2 if figure == "perplexity" and middle < 100 else 1
    if middle >= 1e4:
        return f"{middle:.0e}"
    if len(values) < SEEDS:
        return f"{middle:.{digits}f} ({len(values)} of {SEEDS} seeds)"
    return f"{middle:.{digits}f} ± {_half(values):.{digits}f}"


def _half(values: Sequence[float]) -> float:
    middle = sum(values) / len(values)
    spread = math.sqrt(sum((v - middle) ** 2 for v in values) / (len(values) - 1))
    return float(stats.t.ppf(0.975, len(values) - 1)) * spread / math.sqrt(len(values))


def _refused(rows: list[dict[str, Any]]) -> list[str]:
    reasons = dict.fromkeys((row["method"], row["kind"], row["error"]) for row in rows if "error" in row)
    lines = [f"- {method} ({kind}): {error}" for method, kind, error in reasons]
    return ["", "Refused:", "", *lines] if lines else []


def _beaten(rows: list[dict[str, Any]], networks: Sequence[str]) -> str:
    """Each solver less magnitude, seed by seed, from 80 % on: the mean of the differences and its interval."""
    lines = [
        "## Solvers against magnitude", "",
        "Loss of the solver less loss of magnitude at the same counts, paired by seed, from 80 % zeros on; negative",
        "is better. Bold where the solver is not shown to be better: the interval reaches zero or lies above it.", "",
        "| network | solver | 80% zeros | 90% zeros | 95% zeros |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for network in networks:
        mine = [row for row in rows if row["network"] == network and row["kind"] == "weights" and "loss" in row]
        for solver in dict.fromkeys(row["method"] for row in mine if row.get("solver")):
            cells = [_difference(mine, solver, s) for s in (0.8, 0.9, 0.95)]
            lines.append(f"| {network} | {solver} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", NOTES])


def _difference(rows: list[dict[str, Any]], solver: str, sparsity: float) -> str:
    loss = {(row["method"], row["seed"]): row["loss"] for row in rows if row["sparsity"] == sparsity}
    seeds = [seed for method, seed in loss if method == solver and ("magnitude", seed) in loss]
    values = [loss[solver, seed] - loss["magnitude", seed] for seed in seeds]
    if not values:
        return ""
    middle = sum(values) / len(values)
    if len(values) < SEEDS:
        return f"{middle:+.3f} ({len(values)} of {SEEDS} seeds)"
    half = _half(values)
    told = f"{middle:+.3f} ± {half:.3f}"
    return told if middle + half < 0 else f"**{told}**"
