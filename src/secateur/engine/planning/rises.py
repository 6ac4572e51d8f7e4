"""The forecast of the rise of the loss: a share for every option of every layer, and from their sum the true rise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from secateur.core.choose import scores_of
from secateur.core.errors import UsageError, nearest
from secateur.core.masks import Masks
from secateur.core.names import Named
from secateur.core.patterns import Pattern, parse_pattern
from secateur.core.reading import Reading
from secateur.core.sockets import Criterion, Solver
from secateur.core.streams import stream
from secateur.core.task import Task
from secateur.criteria.magnitude import Magnitude
from secateur.engine.planning.changes import Solved, Zeros, mask_of, zeros
from secateur.engine.planning.pieces import PIECE, few
from secateur.engine.planning.probing import Law, Losses, Probe, fit, frontier
from secateur.engine.planning.roots import CLASSES
from secateur.engine.planning.shares import shares
from secateur.engine.planning.solved import solved
from secateur.probes.cost import weight_costs

__all__ = ["DENSITIES", "Law", "Probe", "Rises", "loss_rises", "masks_for"]

DENSITIES = (0.85, 0.7, 0.55, 0.42, 0.32, 0.24, 0.17, 0.12, 0.08, 0.05, 0.03, 0.015)
"""The rungs: denser where networks lose little."""

AIMS = (0.1, 0.4, 0.03, 0.2, 0.01, 0.06, 0.7, 0.004)
"""Rises of the loss that measured choices are aimed at, in turn."""

WORK = (8e10, 2e11)
"""Multiply-adds that shares may take, counted as forward passes and backward passes alike, and all measured choices
together (but for 8 examples each)."""

POWER = 3.0
"""Of the pruned part, above the first rung: the squares of the smallest of evenly spread weights add up to its cube."""


@dataclass(frozen=True)
class Rises:
    """Forecasts of the rise of the loss.

    Args:
        densities: the rungs, falling.
        layers: for each tensor and pattern (as it prints) the rise of the loss at each rung when nothing else is
            pruned; never falling from rung to rung. A pattern that prescribes its density (N:M) has the same at all.
        law: from a sum of these to the true rise.
        probes: the whole choices that were measured for it.
        examples: examples behind the shares, and behind the measured choices.
        apart: the choices were measured on other examples than the shares.
        fixed: densities of patterns that prescribe them.
    """

    densities: tuple[float, ...]
    layers: Mapping[str, Mapping[str, tuple[float, ...]]]
    law: Law = field(default_factory=lambda: fit(()))
    probes: tuple[Probe, ...] = ()
    examples: tuple[int, int] = (0, 0)
    apart: bool = False
    fixed: Mapping[str, float] = field(default_factory=dict)

    def at(self, name: str, pattern: str, density: float) -> float:
        """Share of one layer: between rungs along a power of the density, above the first along one of what goes.

        Below the last rung the power between the last two goes on; what is told there is extrapolated.

        Raises:
            UsageError: for a tensor or a pattern without a forecast, or a density that is not above 0 and at most 1.
        """
        every = self.layers.get(name)
        if every is None:
            raise UsageError(f"there is no forecast of the loss for `{name}`. {nearest(name, self.layers)}")
        if pattern not in every:
            raise UsageError(
                f"`{name}` has no forecast of the loss for the pattern {pattern!r}. {nearest(pattern, every)}"
            )
        if not 0 < density <= 1:
            raise UsageError(f"the density {density!r} of `{name}` must be above 0 and at most 1.")
        if density == 1:
            return 0.0
        shares = every[pattern]
        return shares[0] if pattern in self.fixed else _between(self.densities, shares, density)

    def share(self, chosen: Mapping[str, tuple[str, float]]) -> float:
        """Sum of the shares of a choice: pattern and density by tensor. Tensors that it does not name stay dense."""
        return math.fsum(self.at(name, *choice) for name, choice in chosen.items())

    def total(self, chosen: Mapping[str, tuple[str, float]]) -> Reading:
        """The rise of the mean loss under a choice, with its 95 % interval.

        Raises:
            UsageError: as :meth:`at`.
        """
        value, low, high = self.law.at(self.share(chosen))
        parts = {name: self.at(name, *choice) for name, choice in chosen.items()}
        return Reading(value, low=low, high=high, n=self.examples[0], parts=parts)

    def limit(self, rise: float) -> float:
        """The sum of shares at which a rise is forecast: the limit of a choice that is to rise no more."""
        return self.law.inverse(rise)

    def to_json(self) -> dict[str, Any]:
        """Plain values, shares left out."""
        return {
            "factor": self.law.factor, "power": self.law.power, "bend": self.law.bend, "spread": self.law.spread,
            "probes": [probe.to_json() for probe in self.probes],
            "examples": list(self.examples), "apart": self.apart,
        }  # fmt: skip


def _between(densities: Sequence[float], shares: Sequence[float], density: float) -> float:
    if density >= densities[0]:
        return shares[0] * ((1 - density) / (1 - densities[0])) ** POWER
    for left, right, low, high in zip(densities, densities[1:], shares, shares[1:], strict=False):
        if density >= right:
            if not low:
                return high * math.log(left / density) / math.log(left / right)
            return low * (high / low) ** (math.log(left / density) / math.log(left / right))
    if len(shares) < 2 or not shares[-2]:
        return shares[-1]
    further = math.log(densities[-1] / density) / math.log(densities[-2] / densities[-1])
    return shares[-1] * (shares[-1] / shares[-2]) ** further


def loss_rises(
    task: Task,
    tensors: Iterable[str],
    patterns: Sequence[Pattern | str],
    *,
    criterion: Criterion | None = None,
    solver: Solver | None = None,
    densities: Sequence[float] = DENSITIES,
    examples: int = 256,
    seed: int = 0,
    probes: int = 8,
    costs: Mapping[str, int] | None = None,
) -> Rises:
    """Forecast what pruning does to the loss, for every layer, pattern and density; nothing is changed.

    A share is the rise of the loss when one layer alone is pruned, as if the layers behind it were linear. From the
    sum of the shares of a whole choice the rise is forecast by a law that a few choices tell, measured on examples that
    the shares did not see where there are any.

    Args:
        task: network, loss (mean over examples) and data.
        tensors: names of the tensors.
        patterns: which shapes zeros may take; tensors that cannot take one have no forecast for it.
        criterion: which weights matter; magnitude by default.
        solver: chooses and compensates in its place, for every density.
        densities: the rungs, below 1.
        examples: that shares are taken from, at most; fewer of a network whose forward pass is long.
        seed: of everything random.
        probes: whole choices to measure.
        costs: multiply-adds of a weight for one example, by tensor (`secateur.probes.cost.weight_costs`), where known.

    Raises:
        UsageError: for no tensor, an unknown one, or densities that are none.
        SecateurError: as the parts: the criterion, the solver, data that is spent.

    Cost: the criterion; one forward and a few backward passes over the examples; for each probe a forward pass over
    up to twice as many. With a solver, its own cost for every layer, pattern and density.
    """
    rungs = tuple(sorted({float(d) for d in densities}, reverse=True))
    if not rungs or not 0 < rungs[-1] <= rungs[0] < 1 or len(rungs) > 250:
        raise UsageError(f"the densities {tuple(densities)} must be some numbers above 0 and below 1.")
    found = [parse_pattern(p) if isinstance(p, str) else p for p in patterns]
    weights = _chosen(task, tensors)
    if examples < 1 or probes < 0:
        raise UsageError(
            f"examples is {examples} and probes {probes}; at least one example and no fewer than 0 probes."
        )
    each = weight_costs(task) if costs is None else costs
    count, draws, seen = _effort(task, each, weights, len(found) * len(rungs), examples, probes)
    part, rest = few(task, count), few(task, seen, count)
    apart = any(True for _ in rest.data)
    fitting = {n: [p for p in found if not p.why_not(tuple(w.shape))] for n, w in weights.items()}
    fitting = {n: every for n, every in fitting.items() if every}
    options = _options(task, part, weights, fitting, rungs, criterion, solver)
    taken = shares(part, options, count, draws, seed)
    table = {name: _table(options[name].rungs, taken.rises[name], len(rungs)) for name in options}
    fixed = {str(p): d for every in fitting.values() for p in every if (d := _density(p, weights)) is not None}
    made = Rises(rungs, table, examples=(taken.examples, 0), apart=apart, fixed=fixed)
    return _probed(made, rest if apart else part, options, weights, probes, seed)


def masks_for(
    task: Task,
    chosen: Mapping[str, tuple[str, float]],
    criterion: Criterion | None = None,
    patterns: Sequence[Pattern | str] = (),
) -> Masks:
    """The masks that a choice means: each tensor under its own pattern, with exactly the units its density rounds to.

    Args:
        task: network, loss and data, for the scores.
        chosen: pattern and density by tensor; a density of 1 keeps everything.
        criterion: which weights matter; magnitude by default.
        patterns: those that the words of the choice mean, where they are no ordinary ones.

    Raises:
        UsageError: for an unknown tensor or pattern, a pattern that does not fit, a density out of range.
    """
    known = {str(p): p for p in patterns if not isinstance(p, str)}
    weights = _chosen(task, chosen)
    scores = _scores(task, weights, criterion)
    return Masks({n: mask_of(scores[n], known.get(word) or parse_pattern(word), d) for n, (word, d) in chosen.items()})


def _chosen(task: Task, tensors: Iterable[str]) -> Named:
    own = task.params()
    names = list(tensors)
    for name in names:
        if name not in own:
            raise UsageError(f"the network has no parameter `{name}`. {nearest(name, own)}")
    if not names:
        raise UsageError("no tensor is named; give at least one that can be pruned.")
    return {name: own[name].detach() for name in names}


def _scores(task: Task, weights: Named, criterion: Criterion | None) -> Named:
    dense = Masks({name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()})
    return scores_of(criterion or Magnitude(), task, dense)


def _effort(
    task: Task, costs: Mapping[str, int], weights: Named, options: int, examples: int, probes: int
) -> tuple[int, int, int]:
    """Examples, backward passes for each, and examples to measure on: a short forward pass gives more of them."""
    own = task.params()
    macs = max(1, sum(cost * own[name].numel() for name, cost in costs.items()))
    passes = WORK[0] / (macs + options * sum(w.numel() for w in weights.values()))
    draws = CLASSES if passes >= 32 * CLASSES else max(1, min(4, int(passes // 32)))
    count = min(examples, max(8, int(passes // draws)))
    count = count // PIECE * PIECE or count
    seen = min(2 * examples, max(8, int(WORK[1] // (macs * (probes + 1)))))
    return count, draws, seen


def _options(
    task: Task,
    few_examples: Task,
    weights: Named,
    fitting: Mapping[str, Sequence[Pattern]],
    rungs: Sequence[float],
    criterion: Criterion | None,
    solver: Solver | None,
) -> dict[str, Zeros | Solved]:
    scores = _scores(task, {name: weights[name] for name in fitting}, criterion)
    made: dict[str, Zeros | Solved] = {
        name: zeros(weights[name], scores[name], every, rungs) for name, every in fitting.items()
    }
    if solver is not None:
        made |= solved(few_examples, scores, fitting, rungs, solver)
    return made


def _density(pattern: Pattern, weights: Named) -> float | None:
    """Of a pattern that prescribes it."""
    for weight in weights.values():
        shape = tuple(weight.shape)
        fixed = None if pattern.why_not(shape) else pattern.fixed(shape)
        if fixed is not None:
            return fixed * pattern.unit_size(shape) / weight.numel()
    return None


def _table(rungs: Mapping[str, int], rises: Tensor, count: int) -> dict[str, tuple[float, ...]]:
    """Shares by pattern: never falling, and the same at every rung where there is one only."""
    found = {}
    for name, part in zip(rungs, rises.split(list(rungs.values())), strict=True):
        rising = torch.cummax(part.clamp(min=0), 0).values.tolist()
        found[name] = tuple(rising if len(rising) > 1 else rising * count)
    return found


def _probed(
    made: Rises, task: Task, options: Mapping[str, Zeros | Solved], weights: Named, probes: int, seed: int
) -> Rises:
    """The forecast with its law: each choice is aimed at a rise by the law that those before it tell."""
    shares_of = {n: {p: made.layers[n][p][:k] for p, k in option.rungs.items()} for n, option in options.items()}
    kept = {n: {p: _kept(made, p, k) for p, k in option.rungs.items()} for n, option in options.items()}
    every = sum(weights[name].numel() for name in options)
    random, measured, found = stream(seed, "planning", "probes"), Losses(task), list[Probe]()
    for i in range(probes):
        level = fit(found).inverse(AIMS[i % len(AIMS)])
        sizes = {n: weights[n].numel() / every if i % 4 < 2 else 1 / len(options) for n in options}
        favour = {
            n: {p: math.exp(2.0 * float(torch.randn((), generator=random))) if i % 2 else 1.0 for p in option.rungs}
            for n, option in options.items()
        }
        choice = frontier(shares_of, kept, level, favour, sizes)
        if choice:
            share = math.fsum(shares_of[n][p][i] for n, (p, i) in choice.items())
            found.append(measured.probe(share, _replaced(choice, options, weights)))
    return replace(made, law=fit(found), probes=tuple(found), examples=(made.examples[0], measured.examples))


def _kept(made: Rises, pattern: str, rungs: int) -> tuple[float, ...]:
    """Densities of a pattern's rungs."""
    return (made.fixed.get(pattern, 0.5),) if rungs == 1 and len(made.densities) > 1 else made.densities[:rungs]


def _replaced(choice: Mapping[str, tuple[str, int]], options: Mapping[str, Zeros | Solved], weights: Named) -> Named:
    return {name: weights[name] + options[name].change(*picked) for name, picked in choice.items()}
