"""Planning a network: what its layers cost, what pruning them does to the loss, and the best choice for a target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial

import torch

from secateur.core.budget import keep_for
from secateur.core.errors import BudgetError, SecateurError, UsageError
from secateur.core.masks import Masks
from secateur.core.names import Named, unwrap
from secateur.core.patterns import parse_pattern
from secateur.core.prunable import check_finite, coverage
from secateur.core.task import Task, to
from secateur.engine.compensating import plan_layers
from secateur.engine.planning.carrying import Kept, digest_of, masks_of, scored, solve_choice
from secateur.engine.planning.choosing import NANO, Choice, Market, Offer, Seller, ladder
from secateur.engine.planning.costs import NetworkCost, network_cost
from secateur.engine.planning.options import Planning
from secateur.engine.planning.plans import Figure, LayerChoice, LayerPlan, Other
from secateur.engine.planning.rises import Rises, loss_rises
from secateur.engine.planning.searching import largest, lasting, next_limit, patience, scaled_limit
from secateur.engine.planning.targets import RESOURCES, Aim, Quantity, parse_aim
from secateur.engine.planning.trying import Trial, captured_of, judged, refuse_pruned
from secateur.engine.removing import few
from secateur.probes.cost import weight_costs
from secateur.runtime.capture import Captured

__all__ = ["Planner", "Planning", "plan_network"]

USUAL = ("unstructured", "4x1", "2:4")
"""Patterns that are told of when a target cannot be met."""
_ROUNDS = {"ms": 6, "bytes": 6, "loss": 6, "accuracy": 9}
_SLACK = {"ms": 0.03, "bytes": 0.002, "loss": 0.05, "accuracy": 0.05}


def plan_network(task: Task, to: str | Aim, how: Planning | None = None) -> LayerPlan:
    """Decide what to prune layer by layer, without changing anything.

    Args:
        task: network, loss (mean over examples) and data.
        to: the target, such as ``"ms 3.5"`` or ``"loss +0.05"``.
        how: everything else.

    Raises:
        UsageError: for targets and patterns that are not understood, and a network that is pruned already.
        BudgetError: when the target cannot be met; the message has the best that can, and which pattern does better.
        SecateurError: as the parts: data that is spent, weights that are not finite, a network without a plan file.

    Cost: what is not known about the milliseconds of its layers is measured once for each machine; else some passes
    over the examples, and a compilation for each round of measuring.
    """
    aim = parse_aim(to) if isinstance(to, str) else to
    how = how or Planning()
    if how.units:
        from secateur.engine.planning.removals import plan_with_units

        return plan_with_units(task, aim, how)
    return Planner(task, aim, how).plan()


class Planner:
    """One target for one network."""

    def __init__(self, task: Task, aim: Aim, how: Planning) -> None:
        self.task, self.aim, self.how = task, aim, how
        found = coverage(task.model, how.only, how.skip)
        check_finite(found.prunable)
        refuse_pruned(found.prunable)
        self.left = dict(found.left_alone)
        self.prunable: Named = found.prunable
        self.barred = self._barred()
        self.example = to(how.example if how.example is not None else few(task, how.batch), torch.device("cpu"))
        self.macs = weight_costs(task)
        self.notes: list[str] = []
        self._last: tuple[Kept, Masks] = {}, Masks({})
        self._sizes: list[tuple[Choice, int]] = []
        self.cost = self._cost()
        self.judge = self._judge()
        self.loss = self.judge.mean_loss()

    @property
    def quantity(self) -> Quantity:
        """What choices cost: that of the target, or what is to be least."""
        return self.aim.quantity if self.aim.resource else self.how.least

    @cached_property
    def rises(self) -> Rises:
        """The forecast of the loss."""
        if self.how.rises is not None:
            return self.how.rises
        names = [name for name in self.prunable if name not in self.barred]
        return loss_rises(
            self.task, names, self.how.patterns, criterion=self.how.criterion, solver=self.how.solver,
            examples=self.how.examples, seed=self.how.seed,
        )  # fmt: skip

    @cached_property
    def market(self) -> Market:
        """All tensors with their offers."""
        return Market(tuple(self._seller(name, self.how.patterns, self.cost) for name in self.prunable))

    @cached_property
    def scores(self) -> Named:
        """Of all prunable tensors."""
        return scored(self.task, self.prunable, self.how.criterion)

    def plan(self) -> LayerPlan:
        """The whole way."""
        with self.trying() as trial:
            self.trial = trial
            self._keep_pace()
            choice, measured = self._resource() if self.aim.resource else self._quality()
            return self._told(choice, measured)

    def _keep_pace(self) -> None:
        """Bring the forecast to the pace of the moment: a share of the time now is asked for, and told beside it."""
        if self.aim.quantity == "ms" and self.aim.relative and self.how.measure and self.cost is not None:
            self.cost = self.cost.times(self._priced_now / self.cost.now)

    def trying(self) -> Trial:
        """A copy to prune; its loss is that of the examples that count."""
        return Trial(self.judge, self.example, self.how.threads, lambda: self.captured)

    @cached_property
    def captured(self) -> Captured:
        """The network as the compiled core runs it: captured once for everything."""
        return captured_of(self.task.model, self.example)

    def _judge(self) -> Task:
        """The task with the examples that losses are measured on: all, where the target is a matter of them."""
        if not self.aim.resource:
            return self.task
        own = self.task.params()
        macs = sum(cost * own[name].numel() for name, cost in self.macs.items())
        task, note = judged(self.task, macs, self.how.tested)
        self.notes += [note] if note else []
        return task

    def figures_now(self) -> dict[str, Figure]:
        """Figures of the network as it is; needs the trial."""
        found = {"loss": Figure(self.loss, None)}
        for quantity in RESOURCES:
            if quantity == "ms" and self.cost is None:
                continue
            found[quantity] = Figure(self._figure_now(quantity), None)
        return found if self.aim.quantity != "accuracy" else {**found, "accuracy": Figure(self._accuracy, None)}

    def _figure_now(self, quantity: Quantity) -> float:
        if quantity == "ms":
            return self._priced_now if self.aim.quantity == "ms" or self.cost is None else self.cost.now
        return float(self._bytes_now if quantity == "bytes" else self.market.now(quantity))

    def _barred(self) -> dict[str, str]:
        """Tensors that a solver cannot work on, and why."""
        if self.how.solver is None:
            return {}
        made = plan_layers(self.task, self.how.solver, "sparsity 0", only=self.how.only, skip=self.how.skip)
        return {n: made.left_alone.get(n, "the solver leaves it") for n in self.prunable if n not in made.masks}

    def _cost(self) -> NetworkCost | None:
        """Milliseconds of the layers; None, with a note, where they cannot be forecast and nothing asks for them."""
        if self.how.cost is not None:
            return self.how.cost
        if not self.how.timed and self.quantity != "ms":
            return None
        try:
            return self._priced(self.how.patterns)
        except SecateurError as error:
            if self.quantity == "ms":
                raise
            self.notes.append(f"milliseconds are not forecast: {error}")
            return None

    def _priced(self, patterns: Sequence[str]) -> NetworkCost:
        return network_cost(
            unwrap(self.task.model), self.example, threads=self.how.threads, patterns=tuple(patterns),
            measure=self.how.measure, captured=self.captured,
        )  # fmt: skip

    def _seller(self, name: str, words: Sequence[str], cost: NetworkCost | None, free: bool = False) -> Seller:
        """A tensor with its offers; ``free`` ones do nothing to the loss: to see what can be reached at all."""
        shape, curves = tuple(self.prunable[name].shape), {} if cost is None else cost.layers.get(name, {})
        fits = {word: pattern for word in words if not (pattern := parse_pattern(word)).why_not(shape)}
        why = self.barred.get(name, "")
        if not why and self.quantity == "ms" and not curves and cost is not None:
            why = f"its milliseconds are not known: {cost.left.get(name, 'it has no curve')}"
        if not free:
            fits = {word: fits[word] for word in fits if word in self.rises.layers.get(name, {})}
        if self.quantity == "ms":
            fits = {word: fits[word] for word in fits if word in curves}
        rise = (lambda word, density: 0.0) if free else partial(self.rises.at, name)
        rungs = ladder() if free else tuple(d for d in ladder() if d >= min(self.rises.densities) * 0.999)
        macs, time = self.macs.get(name, 0), partial(_ms, cost, name)
        return Seller(name, shape, macs, {} if why else fits, rise, time, rungs, why)

    # --- reaching the target

    def _offset(self, quantity: Quantity) -> float:
        """What the network costs beside the prunable tensors."""
        if quantity == "ms" and self.cost is not None:
            return self.cost.now - self.market.now("ms") / NANO
        return float(self._bytes_now - self.market.now("bytes")) if quantity == "bytes" else 0.0

    @property
    def _files(self) -> bool:
        """Whether plan files are written on the way."""
        return self.how.measure and (self.cost is not None or self.aim.quantity == "bytes")

    @cached_property
    def _bytes_now(self) -> int:
        if self._files:
            return self.trial.bytes()
        model = unwrap(self.task.model)
        return sum(4 * t.numel() for t in (*model.parameters(), *model.buffers()) if t.is_floating_point())

    @cached_property
    def _priced_now(self) -> float:
        if self.aim.relative and self.how.measure:
            return self.trial.ms()
        return self.cost.now if self.cost is not None else math.nan

    @cached_property
    def goal(self) -> float:
        """The most that may be measured, in the unit of the target."""
        if self.aim.quantity == "params" and self.aim.relative:
            return float(keep_for(1 - self.aim.value, round(self._figure_now(self.aim.quantity))))
        goal = self.aim.limit(self._figure_now(self.aim.quantity))
        return float(math.floor(goal)) if self.aim.quantity in ("bytes", "macs", "params") else goal

    def _units(self, figure: float) -> int:
        """What a figure of the whole network leaves for the tensors, in whole units."""
        rest = figure - self._offset(self.quantity)
        return math.floor(rest * NANO if self.quantity == "ms" else rest)

    def _resource(self) -> tuple[Choice, float | None]:
        """The least loss of all choices that take no more than the target."""
        quantity, goal = self.quantity, self.goal

        def make(limit: float) -> Choice | None:
            return self.market.best(quantity, self._units(limit))

        if quantity in ("macs", "params") or not self.how.measure:
            made = make(goal)
            if made is None:
                raise self._unreachable(self._figure(self.market.least(quantity)))
            return made, None
        start, long = goal, 0.0
        if quantity == "ms" and self.cost is not None:
            long = lasting(sum(p.numel() for p in self.prunable.values()), self.cost.now)
            start = self.aim.limit(self.cost.now) * (1 - long * min(self.cost.error, 0.08) / 2)
        met, missed = largest(
            start, make, self._read, goal, lambda tried: next_limit(tried, goal, quantity, 0.99 - 0.02 * long),
            rounds=_ROUNDS[quantity], slack=_SLACK[quantity], patience=lambda tries: patience(tries, long),
        )  # fmt: skip
        if met is not None:
            return met.made, met.got
        best = missed.got if missed is not None else math.inf
        for words in (self.how.patterns, *((word,) for word in self.how.patterns)):  # a forecast may be wrong of one
            last = self.market.only(words).least(quantity)
            got = self._read(last)
            if got <= goal:
                return last, got
            best = min(best, got)
        raise self._unreachable(best, measured=True)

    def _quality(self) -> tuple[Choice, float | None]:
        """The least cost of all choices that make the network no worse than the target."""
        goal, quantity = self.aim.value, self.quantity

        def make(limit: float) -> Choice | None:
            return self.market.cheapest(quantity, limit)

        start = self.rises.limit(goal if self.aim.quantity == "loss" else 0.02 * goal)
        if not self.how.measure:
            if self.aim.quantity == "accuracy":
                raise UsageError("accuracy is only known by measuring; leave `measure` on, or ask for `loss +0.05`.")
            made = make(start)
            return (made if made is not None else self.market.cheapest(quantity, 0.0)) or self._untouched(), None
        rounds, slack = _ROUNDS[self.aim.quantity], _SLACK[self.aim.quantity]
        met, _ = largest(
            start, make, self._read, goal, lambda tried: scaled_limit(tried, goal), rounds=rounds, slack=slack, log=True
        )
        if met is None:
            return self._untouched(), 0.0
        return met.made, met.got

    def _untouched(self) -> Choice:
        self.notes.append(f"nothing can be pruned within {self.aim}: every choice that was tried does more harm")
        return Choice({s.name: s.dense for s in self.market.sellers}, totals=self.market.totals)

    def _read(self, choice: Choice) -> float:
        """What a choice gives, measured on a copy, in the quantity of the target."""
        quantity = self.aim.quantity
        if quantity in ("ms", "bytes"):
            masks = self._masks(choice)
            if quantity == "bytes":
                return float(self.trial.bytes(masks))
            got = self.trial.share(masks) * self._priced_now if self.aim.relative else self.trial.ms(masks)
            self._sizes.append((choice, self.trial.size))
            return got
        self._carry(choice)
        return self.trial.loss() - self.loss if quantity == "loss" else self._accuracy - self.trial.accuracy()

    def _masks(self, choice: Choice) -> Masks:
        """The masks of a choice; those of tensors that keep as many as last time are not made anew."""
        kept, (before, there) = kept_of(choice), self._last
        fresh = {name: offer for name, offer in kept.items() if before.get(name) != offer}
        if fresh:
            made = masks_of(self.scores, fresh)
            self._last = kept, Masks({name: made[name] if name in fresh else there[name] for name in kept})
        return self._last[1]

    @cached_property
    def _accuracy(self) -> float:
        from secateur.engine.planning.trying import accuracy

        return accuracy(self.task)

    def _carry(self, choice: Choice) -> None:
        """Prune the copy, with the solver where there is one."""
        kept, masks = kept_of(choice), self._masks(choice)
        if self.how.solver is None:
            return self.trial.prune(masks)
        self.trial.prune(Masks({name: torch.ones_like(mask) for name, mask in masks.items()}))
        solve_choice(self.trial.task, masks, kept, self.how.solver, self.how.inputs, forecast=False)
        return None

    def _figure(self, choice: Choice) -> float:
        """The forecast of a choice in the quantity of choices."""
        cost = choice.cost(self.quantity)
        return self._offset(self.quantity) + (cost / NANO if self.quantity == "ms" else cost)

    def _unreachable(self, best: float, measured: bool = False) -> BudgetError:
        unit = {"ms": "ms", "bytes": "bytes", "macs": "MACs", "params": "weights"}[self.quantity]
        shown = f"{best:.4g}" if self.quantity == "ms" else f"{math.ceil(best):,}"
        text = (
            f"{self.aim} cannot be met with {', '.join(self.how.patterns)}: the best reachable is {shown} {unit} "
            f"({'measured' if measured else 'forecast'})"
        )
        offset = self._offset(self.quantity)
        if offset > 0:
            rest = f"{offset:.4g}" if self.quantity == "ms" else f"{round(offset):,}"
            text += f", of which {rest} {unit} lie outside of the tensors that can be pruned"
        return BudgetError(f"{text}. {self._better(unit)}")

    def _better(self, unit: str) -> str:
        """Which other pattern would do better, and what to do."""
        found: list[tuple[float, str]] = []
        own = self._figure(self.market.least(self.quantity))  # forecast beside forecast
        for word in (word for word in USUAL if word not in self.how.patterns):
            try:
                cost = self.cost if self.how.cost is not None or self.quantity != "ms" else self._priced((word,))
                sellers = tuple(self._seller(name, (word,), cost, free=True) for name in self.prunable)
            except SecateurError:
                continue
            found.append((self._figure(Market(sellers).least(self.quantity)), word))
        better = [f"{word} reaches {figure:.4g} {unit} by forecast" for figure, word in sorted(found) if figure < own]
        told = f"Other patterns: {'; '.join(better)}. " if better else "No other pattern does better. "
        return f"{told}Ask for more, or remove units first (`secateur shrink`)."

    # --- what is told

    def _told(self, choice: Choice, measured: float | None) -> LayerPlan:
        total = self.rises.total(choice.chosen)
        scale = total.value / choice.loss if choice.loss > 0 else 0.0
        layers = tuple(self._layer(seller, choice, scale) for seller in self.market.sellers)
        loss = Figure(self.loss, self.loss + total.value, _plus(self.loss, total.low), _plus(self.loss, total.high))
        figures = {**self._figures(choice), "loss": loss}
        if self.how.measure:
            figures = self._measured(choice, figures, measured)
        cost = self.cost
        machine = {} if cost is None else {n: getattr(cost, n) for n in ("engine", "isa", "threads", "batch")}
        others = tuple(self._others(choice)) if self.how.compare else ()
        return LayerPlan(
            str(self.aim), tuple(self.how.patterns), layers, self.left, figures, others, digest_of(self.task.model),
            self.how.criterion, self.how.solver, self.how.inputs, None, choice.exact, machine, tuple(self.notes),
        )  # fmt: skip

    def _figures(self, choice: Choice) -> dict[str, Figure]:
        found: dict[str, Figure] = {}
        if self.cost is not None:
            ms, error = self._offset("ms") + choice.cost("ms") / NANO, self.cost.error
            now = self._priced_now if self.aim.quantity == "ms" else self.cost.now
            found["ms"] = Figure(now, ms, ms * (1 - min(error, 1.0)), ms * (1 + error))
        spared = self.market.now("bytes") - choice.cost("bytes")
        found["bytes"] = Figure(float(self._bytes_now), float(self._bytes_now - spared))
        for quantity in ("macs", "params"):
            found[quantity] = Figure(float(self.market.now(quantity)), float(choice.cost(quantity)))
        return found

    def _measured(self, choice: Choice, figures: dict[str, Figure], measured: float | None) -> dict[str, Figure]:
        """The figures with what was measured on the copy."""
        self._carry(choice)
        found = {**figures, "loss": replace(figures["loss"], measured=self.trial.loss())}
        if self.aim.quantity in ("ms", "bytes") and measured is not None:
            found[self.aim.quantity] = replace(found[self.aim.quantity], measured=measured)
        if self._files and self.aim.quantity != "bytes":
            size = next((size for tried, size in self._sizes if tried is choice), None)
            size = size if size is not None else self.trial.bytes(self._masks(choice))
            found["bytes"] = replace(found["bytes"], measured=float(size))
        if self.aim.quantity == "accuracy":
            found["accuracy"] = Figure(self._accuracy, None, measured=self.trial.accuracy())
        return found

    def _layer(self, seller: Seller, choice: Choice, scale: float) -> LayerChoice:
        offer = choice.offers[seller.name]
        usual = "what it would save costs less loss elsewhere" if choice.chosen else "the target is met without it"
        why = "" if offer.pattern else seller.never(self.quantity) or usual
        before, after = _costs(seller.dense), _costs(offer)
        return LayerChoice(seller.name, seller.shape, offer.pattern, offer.kept, offer.loss * scale, before, after, why)

    def _others(self, choice: Choice) -> list[Other]:
        """What each pattern alone gives, chosen layer by layer and with the same density everywhere."""
        quantity, found = self.quantity, []
        limit = choice.cost(quantity) if self.aim.resource else 0
        for word in self.how.patterns:
            alone = self.market.only((word,))
            if len(self.how.patterns) > 1:
                made = alone.best(quantity, limit) if self.aim.resource else alone.cheapest(quantity, choice.loss)
                found.append(self._other(f"{word} alone", made, alone))
            if self.aim.resource:
                even = alone.uniform(word, quantity, limit)
                found.append(self._other(f"{word} at the same density everywhere", even, alone))
        return found

    def _other(self, what: str, made: Choice | None, market: Market) -> Other:
        if made is None:
            return Other(what, False, self.quantity, self._figure(market.least(self.quantity)))
        total = self.rises.total(made.chosen)
        return Other(what, True, self.quantity, self._figure(made), total.value, total.low, total.high)


def kept_of(choice: Choice) -> Kept:
    """Pattern and weights kept, by tensor."""
    return {name: (offer.pattern, offer.kept) for name, offer in choice.offers.items()}


def _costs(offer: Offer) -> dict[str, float | int]:
    found: dict[str, float | int] = {"bytes": offer.bytes, "macs": offer.macs}
    return found if offer.ms is None else {"ms": offer.ms, **found}


def _plus(base: float, rise: float | None) -> float | None:
    return None if rise is None else base + rise


def _ms(cost: NetworkCost | None, name: str, word: str, density: float) -> float | None:
    """Milliseconds of a layer; of one without a curve those that it takes as it is."""
    if cost is None or (name not in cost.dense and name not in cost.layers):
        return None
    if not word or word not in cost.layers.get(name, {}):
        return cost.dense.get(name)
    return cost.layers[name][word].at(density)
