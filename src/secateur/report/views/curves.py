"""Training curves over all training steps in a row, with the prunings marked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from secateur.report.numbers import count, many, number, percent
from secateur.report.sections import Lines, Number, Section, Series
from secateur.report.source import RunRecord, StepRecord, as_finite, names

LIMIT = 240

Points = list[tuple[Number, Number]]


@dataclass(frozen=True)
class Stretch:
    """One training step with the number of optimizer steps before it."""

    step: StepRecord
    offset: Number
    length: Number

    def points(self, key: str) -> Points:
        """Finite figures of one name against the optimizer step, counted over the whole run."""
        found = []
        for row in self.step.metrics:
            x, y = as_finite(row.get("step")), as_finite(row.get(key))
            if x is not None and y is not None:
                found.append((self.offset + x, y))
        return found


@dataclass(frozen=True)
class Chain:
    """All training steps in a row, and where between them a pruning step stands."""

    stretches: tuple[Stretch, ...]
    cuts: tuple[tuple[Number, StepRecord], ...]

    @property
    def length(self) -> Number:
        """Optimizer steps in all."""
        return self.stretches[-1].offset + self.stretches[-1].length if self.stretches else 0

    @property
    def marks(self) -> tuple[tuple[Number, str], ...]:
        """Pruning steps for the charts."""
        return tuple(
            (
                x,
                f"step {s.number}: pruned to {percent(s.density)}"
                if s.density is not None
                else f"step {s.number}: pruned",
            )
            for x, s in self.cuts
        )


def section(run: RunRecord) -> Section | str:
    """Loss, accuracy and sparsity against optimizer steps."""
    chain = _chain(run)
    if not any(stretch.step.metrics for stretch in chain.stretches):
        return (
            "No curves: no training step has written figures yet."
            if run.of("train")
            else "No curves: the run has no training step."
        )
    charts = [c for c in (_group(chain, "loss", ""), _group(chain, "accuracy", "%"), _sparsity(chain)) if c is not None]
    if not charts:
        return "No curves: the metrics hold no loss, accuracy or sparsity."
    trains = [stretch.step for stretch in chain.stretches]
    return Section("Training", _says(chain), chart=tuple(charts), source=names(trains))


def _chain(run: RunRecord) -> Chain:
    offset, stretches, cuts = 0.0, [], []
    for step in run.of("train", "prune"):
        if step.do == "prune":
            cuts.append((offset, step))
            continue
        seen = [x for row in step.metrics if (x := as_finite(row.get("step"))) is not None]
        length = max([*seen, as_finite(step.card.get("steps")) or 0])
        stretches.append(Stretch(step, offset, length))
        offset += length
    return Chain(tuple(stretches), tuple(cuts))


def _keys(chain: Chain, kind: str) -> list[str]:
    """Names of figures such as ``test/loss``, in the order in which they first appear."""
    rows: list[Mapping[str, Any]] = [row for stretch in chain.stretches for row in stretch.step.metrics]
    return list(dict.fromkeys(key for row in rows for key in row if key == kind or key.endswith(f"/{kind}")))


def _group(chain: Chain, kind: str, unit: str) -> Lines | None:
    series, thinned = [], 1
    for key in _keys(chain, kind):
        found: Points = []
        for stretch in chain.stretches:
            points, every = thin(stretch.points(key), LIMIT // max(1, len(chain.stretches)))
            found, thinned = found + points, max(thinned, every)
        if found:
            series.append(Series(key.replace("/", " "), tuple(found), dots=len(found) <= 60))
    if not series:
        return None
    write = percent if unit == "%" else number
    says = "; ".join(f"{s.name} from {write(s.points[0][1])} to {write(s.points[-1][1])}" for s in series) + "."
    if thinned > 1:
        says += f" Where there are many, a point is the mean of up to {thinned} logged steps."
    label = f"{kind} ({unit})" if unit else kind
    return Lines(kind.capitalize(), "optimizer step", label, tuple(series), says[0].upper() + says[1:], chain.marks)


def thin(points: Points, limit: int) -> tuple[Points, int]:
    """At most ``limit`` points, each the mean of equally many neighbours, and how many that is.

    >>> thin([(0, 1.0), (1, 3.0), (2, 5.0)], 2)
    ([(0.5, 2.0), (2.0, 5.0)], 2)
    """
    every = -(-len(points) // max(2, limit))
    if every <= 1:
        return points, 1
    groups = [points[i : i + every] for i in range(0, len(points), every)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups], every


def corners(points: Points, limit: int) -> Points:
    """The points of a step curve at which it changes, first and last included; at most about ``limit`` of them.

    >>> corners([(0, 0.0), (1, 0.0), (2, 5.0), (3, 5.0)], 10)
    [(0, 0.0), (2, 5.0), (3, 5.0)]
    """
    # The same share may have been computed in two ways that differ in the last bit.
    kept = [p for i, p in enumerate(points) if i == 0 or not math.isclose(p[1], points[i - 1][1], rel_tol=1e-12)]
    every = -(-len(kept) // max(2, limit))
    kept = kept[::every] + ([kept[-1]] if every > 1 and (len(kept) - 1) % every else [])
    return kept + ([points[-1]] if points and kept[-1] != points[-1] else [])


def _sparsity(chain: Chain) -> Lines | None:
    points: Points = []
    for stretch in chain.stretches:
        points += _jumps(chain, stretch.offset)
        points += [(x, 100 * y) for x, y in stretch.points("sparsity")]
    last = chain.length
    if not any(stretch.offset == last for stretch in chain.stretches):
        points += _jumps(chain, last)
    if not points:
        return None
    drawn = corners(points, LIMIT)
    pairs = zip(drawn, drawn[1:], strict=False)
    changes = [p for before, p in pairs if not math.isclose(p[1], before[1], rel_tol=1e-12)]
    series = [Series("sparsity", tuple(drawn), stepped=True)]
    if changes and len(changes) <= LIMIT // 2:
        series.append(Series("pruning", tuple(changes), dots=True))
    says = f"Sparsity from {percent(points[0][1])} to {percent(points[-1][1])} in {many(len(changes), 'change')}."
    return Lines("Sparsity", "optimizer step", "weights pruned (%)", tuple(series), says, chain.marks, 0.0, 100.0)


def _jumps(chain: Chain, at: Number) -> Points:
    return [(x, 100 - step.density) for x, step in chain.cuts if x == at and step.density is not None]


def _says(chain: Chain) -> str:
    trains = len(chain.stretches)
    begin = f"{count(chain.length)} optimizer steps" + (
        f" in {trains} training steps of the recipe" if trains > 1 else ""
    )
    accuracy = [p for stretch in chain.stretches for p in stretch.points("test/accuracy")]
    if not accuracy:
        return f"{begin}."
    best = max(accuracy, key=lambda p: p[1])
    end = f"test accuracy ended at {percent(accuracy[-1][1])}"
    if best[1] > accuracy[-1][1]:
        end += f"; it was highest, {percent(best[1])}, at step {count(best[0])}"
    return f"{begin}; {end}."
