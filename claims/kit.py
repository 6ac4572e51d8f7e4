"""What all claims share: seeds run one after the other, can be stopped and go on, and inequalities that hold or fail.

A claim's file defines ``CLAIM`` and ends with ``run(CLAIM)`` under ``if __name__ == "__main__"``.
``python -m claims.NAME`` prints the figures of each seed, their mean with a 95 % interval, and whether each inequality
holds; ``--write`` records them in ``claims/results/NAME.json``, from which ``scripts/claims_page.py`` makes
``docs/claims.md``.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy import stats

from secateur.core.errors import SecateurError
from secateur.core.files import write_json

RESULTS = Path(__file__).parent / "results"
Figures = dict[str, Any]
"""What one seed gives: numbers by name (and lists of numbers, which are recorded but not averaged)."""


@dataclass(frozen=True)
class Check:
    """One inequality over the figures of all seeds.

    Args:
        says: the inequality in words, with its numbers.
        holds: whether the figures of all seeds, a dictionary each, fulfil it.
    """

    says: str
    holds: Callable[[Sequence[Figures]], bool]


@dataclass(frozen=True)
class Claim:
    """A paper's claim at a size that two processor cores can check.

    Args:
        name: name of its file.
        title: a line that says what is claimed.
        paper: authors, title, year, number.
        states: what the paper reports, in its numbers; what is unverified is called so.
        one: the figures of one seed, given the seed and the data folder (None: from ``SECATEUR_DATA``).
        checks: the inequalities; decided before the figures were seen.
        seeds: which seeds are run.
        minutes: about how long all seeds take on one core.
        data: data sets that are needed.
        analysis: why an inequality fails, and what else is worth knowing; written after the figures were seen.
    """

    name: str
    title: str
    paper: str
    states: str
    one: Callable[[int, str | None], Figures]
    checks: tuple[Check, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    minutes: float = 1.0
    data: tuple[str, ...] = ()
    analysis: str = ""


def mean(rows: Sequence[Figures], name: str) -> float:
    """The mean of one figure over the seeds."""
    return sum(float(row[name]) for row in rows) / len(rows)


def interval(values: Sequence[float]) -> float:
    """Half the width of Student's 95 % interval of the mean; NaN for a single value."""
    if len(values) < 2:
        return math.nan
    middle = sum(values) / len(values)
    spread = math.sqrt(sum((v - middle) ** 2 for v in values) / (len(values) - 1))
    return float(stats.t.ppf(0.975, len(values) - 1)) * spread / math.sqrt(len(values))


def verdicts(claim: Claim, rows: Sequence[Figures]) -> list[dict[str, Any]]:
    """Every inequality and whether it holds."""
    return [{"says": check.says, "held": bool(check.holds(rows))} for check in claim.checks]


def run(claim: Claim, words: Sequence[str] | None = None) -> int:
    """The command of a claim. Ends the process: 0 when all holds, 3 when an inequality fails, 2 for bad input."""
    parser = argparse.ArgumentParser(f"python -m claims.{claim.name}", description=claim.title)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(claim.seeds), help="seeds to run")
    parser.add_argument("--data-dir", default=None, help="where data sets lie (default: $SECATEUR_DATA)")
    parser.add_argument("--write", action="store_true", help=f"record the figures in claims/results/{claim.name}.json")
    parser.add_argument("--work", type=Path, default=Path("runs/claims"), help="finished seeds are kept here")
    parser.add_argument("--again", action="store_true", help="make the figures of finished seeds anew")
    asked = parser.parse_args(words)
    try:
        rows, seconds = _rows(claim, asked.seeds, asked.data_dir, asked.work, asked.again)
    except SecateurError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return sys.exit(2)
    held = verdicts(claim, rows)
    print(_told(claim, asked.seeds, rows, held))
    if asked.write:
        minutes = round(seconds / 60, 2)
        about = {"name": claim.name, "seeds": asked.seeds, "minutes": minutes, "torch": torch.__version__}
        write_json(RESULTS / f"{claim.name}.json", {**about, "figures": rows, "checks": held})
    return sys.exit(0 if all(check["held"] for check in held) else 3)


def _rows(
    claim: Claim, seeds: Sequence[int], data: str | None, work: Path, again: bool = False
) -> tuple[list[Figures], float]:
    """The figures of every seed; those that the same file has given before are read, not made again."""
    source = _digest(claim)
    rows, total = [], 0.0
    for seed in seeds:
        file = work / f"{claim.name}-{seed}-{source}.json"
        if file.is_file() and not again:
            known = json.loads(file.read_text())
        else:
            began = time.process_time()  # other jobs may run beside it
            figures = claim.one(seed, data)
            known = {"figures": figures, "seconds": time.process_time() - began}
            work.mkdir(parents=True, exist_ok=True)
            write_json(file, known)
        print(f"seed {seed}: {_line(known['figures'])}", file=sys.stderr)
        rows.append(known["figures"])
        total += known["seconds"]
    return rows, total


def _digest(claim: Claim) -> str:
    """Of the code that makes the figures: the file without its words about them, and files beside it that it uses."""
    code, waiting, done = "", [Path(inspect.getfile(claim.one))], set()
    while waiting:
        file = waiting.pop()
        done.add(file)
        for node in _code(file):
            code += ast.unparse(node)
            waiting += [place for name in _beside(node) if (place := file.with_name(f"{name}.py")) not in done]
    return hashlib.sha256(code.encode()).hexdigest()[:12]


def _beside(node: ast.stmt) -> list[str]:
    """The claims' own files that an import names, all but this one."""
    if not isinstance(node, ast.ImportFrom) or (node.module or "").partition(".")[0] != "claims":
        return []
    inner = (node.module or "").partition(".")[2]
    names = [inner] if inner else [alias.name for alias in node.names]
    return [name for name in names if name != "kit"]


def _code(file: Path) -> list[ast.stmt]:
    tree = ast.parse(file.read_text())
    return [n for n in tree.body[1:] if not (isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "CLAIM")]


def _line(figures: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items() if isinstance(value, int | float))


def _told(claim: Claim, seeds: Sequence[int], rows: Sequence[Figures], held: Sequence[Mapping[str, Any]]) -> str:
    names = [name for name, value in rows[0].items() if isinstance(value, int | float)]
    width = max(map(len, names), default=0)
    lines = [claim.title, f"paper: {claim.states}", f"{len(rows)} seeds: {', '.join(map(str, seeds))}", ""]
    for name in names:
        values = [float(row[name]) for row in rows]
        lines.append(f"  {name:<{width}}  {sum(values) / len(values):10.4g} ± {interval(values):.2g}")
    lines += ["", *(f"{'held  ' if check['held'] else 'FAILED'}  {check['says']}" for check in held)]
    return "\n".join(lines)
