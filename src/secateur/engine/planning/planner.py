"""Planning a network: what its layers cost, what pruning them does to the loss, and what a choice really gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property, partial

import torch

from secateur.core.budget import keep_for
from secateur.core.errors import ModelError, SecateurError
from secateur.core.masks import Masks
from secateur.core.names import Named, unwrap
from secateur.core.patterns import parse_pattern
from secateur.core.prunable import check_finite, coverage
from secateur.core.task import Task, to
from secateur.engine.compensating import plan_layers
from secateur.engine.planning.carrying import Kept, masks_of, scored, solve_choice
from secateur.engine.planning.checking import remember
from secateur.engine.planning.choosing import NANO, Choice, Market, Seller, ladder
from secateur.engine.planning.costs import NetworkCost, network_cost
from secateur.engine.planning.options import Planning
from secateur.engine.planning.plans import Figure, LayerPlan
from secateur.engine.planning.reaching import reach
from secateur.engine.planning.rises import Rises, loss_rises
from secateur.engine.planning.sealing import sealed
from secateur.engine.planning.targets import RESOURCES, Aim, Quantity, parse_aim
from secateur.engine.planning.telling import told
from secateur.engine.planning.trying import Trial, accuracy, batch_of, captured_of, judged, refuse_pruned
from secateur.probes.cost import weight_costs
from secateur.runtime.capture import Captured

__all__ = ["Planner", "Planning", "plan_network"]


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
    planner = Planner(task, aim, how)
    return sealed(planner.plan(), planner)


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
        self.example = to(how.example if how.example is not None else batch_of(task, how.batch), torch.device("cpu"))
        self.macs = weight_costs(task)
        self.notes: list[str] = []
        self._last: tuple[Kept, Masks] = {}, Masks({})
        self.sizes: list[tuple[Choice, int]] = []
        self.clocked: list[tuple[float, float]] = []  # milliseconds as forecast and as measured
        self.cost = self._cost()
        self.judge = self._judge()
        self.loss = self.judge.mean_loss()
        if not math.isfinite(self.loss):
            raise ModelError(
                f"the loss of the network is {self.loss} before anything is pruned, so there is nothing to plan by; "
                "look for batches without a target that counts, and at the network with `secateur doctor`."
            )

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
            examples=self.how.examples, seed=self.how.seed, costs=self.macs,
        )  # fmt: skip

    @cached_property
    def market(self) -> Market:
        """All tensors with their offers."""
        return Market(tuple(self.seller(name, self.how.patterns, self.cost) for name in self.prunable))

    @cached_property
    def scores(self) -> Named:
        """Of all prunable tensors."""
        return scored(self.task, self.prunable, self.how.criterion)

    def plan(self) -> LayerPlan:
        """The whole way."""
        with self.trying() as trial:
            self.trial = trial
            self._keep_pace()
            try:
                choice, measured = reach(self)
            finally:
                if self.cost is not None:
                    remember(self.cost, self.clocked)
            return told(self, choice, measured)

    def _keep_pace(self) -> None:
        """Bring the forecast to the pace of the moment: a share of the time now is asked for, and told beside it."""
        if self.aim.quantity == "ms" and self.aim.relative and self.how.measure and self.cost is not None:
            self.cost = self.cost.times(self.ms_now / self.cost.now) if self.cost.now > 0 else self.cost

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
        return found if self.aim.quantity != "accuracy" else {**found, "accuracy": Figure(self.accuracy, None)}

    def _figure_now(self, quantity: Quantity) -> float:
        if quantity == "ms":
            return self.ms_now if self.aim.quantity == "ms" or self.cost is None else self.cost.now
        return float(self.bytes_now if quantity == "bytes" else self.market.now(quantity))

    def _barred(self) -> dict[str, str]:
        """Tensors that a solver cannot work on, and why."""
        if self.how.solver is None:
            return {}
        made = plan_layers(self.task, self.how.solver, "sparsity 0", only=self.how.only, skip=self.how.skip)
        return {n: made.left_alone.get(n, "the solver leaves it") for n in self.prunable if n not in made.masks}

    def _cost(self) -> NetworkCost | None:
        """Milliseconds of the layers; None, with a note, where they cannot be forecast and nothing asks for them."""
        if self.how.cost is None and not self.how.timed and self.quantity != "ms":
            return None
        try:
            cost = self.how.cost if self.how.cost is not None else self.priced(self.how.patterns)
        except SecateurError as error:
            if self.quantity == "ms":
                raise
            self.notes.append(f"milliseconds are not forecast: {error}")
            return None
        self.notes += cost.notes
        return cost

    def priced(self, patterns: Sequence[str]) -> NetworkCost:
        """Milliseconds of the layers under some patterns."""
        return network_cost(
            unwrap(self.task.model), self.example, threads=self.how.threads, patterns=tuple(patterns),
            measure=self.how.measure, captured=self.captured,
        )  # fmt: skip

    def seller(self, name: str, words: Sequence[str], cost: NetworkCost | None, free: bool = False) -> Seller:
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
        macs, time = self.macs.get(name, 0), partial(_ms, cost, name)
        rungs, item = ladder(math.prod(shape)), _item(self.prunable[name])
        return Seller(name, shape, macs, {} if why else fits, rise, time, rungs, why, item)

    def offset(self, quantity: Quantity) -> float:
        """What the network costs beside the prunable tensors."""
        if quantity == "ms" and self.cost is not None:
            return self.cost.now - self.market.now("ms") / NANO
        return float(self.bytes_now - self.market.now("bytes")) if quantity == "bytes" else 0.0

    @property
    def files(self) -> bool:
        """Whether plan files are written on the way."""
        return self.aim.quantity == "bytes" or (self.how.measure and self.cost is not None)

    @cached_property
    def bytes_now(self) -> int:
        """Bytes of the network as it is: of its file, where files are written; else of its numbers."""
        if self.files:
            return self.trial.bytes()
        model = unwrap(self.task.model)
        return sum(_item(t) * t.numel() for t in (*model.parameters(), *model.buffers()) if t.is_floating_point())

    @cached_property
    def ms_now(self) -> float:
        """Milliseconds of the network as it is, of which a target may be a share."""
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

    def units(self, figure: float) -> int:
        """What a figure of the whole network leaves for the tensors, in whole units."""
        rest = figure - self.offset(self.quantity)
        return math.floor(rest * NANO if self.quantity == "ms" else rest)

    def read(self, choice: Choice, again: bool = False) -> float:
        """What a choice gives, measured on a copy, in the quantity of the target; again: apart from all before."""
        quantity = self.aim.quantity
        if quantity in ("ms", "bytes"):
            masks = self.masks(choice)
            if quantity == "bytes":
                return float(self.trial.bytes(masks))
            got = self.trial.share(masks, again) * self.ms_now if self.aim.relative else self.trial.ms(masks)
            self.sizes.append((choice, self.trial.size))
            self.clocked.append((self.figure(choice), got))
            return got
        self.carry(choice)
        return self.trial.loss() - self.loss if quantity == "loss" else self.accuracy - self.trial.accuracy()

    def masks(self, choice: Choice) -> Masks:
        """The masks of a choice; those of tensors that keep as many as last time are not made anew."""
        kept, (before, there) = _kept(choice), self._last
        fresh = {name: offer for name, offer in kept.items() if before.get(name) != offer}
        if fresh:
            made = masks_of(self.scores, fresh)
            self._last = kept, Masks({name: made[name] if name in fresh else there[name] for name in kept})
        return self._last[1]

    @cached_property
    def accuracy(self) -> float:
        """Of the network as it is, in per cent."""
        return accuracy(self.task)

    def carry(self, choice: Choice) -> None:
        """Prune the copy, with the solver where there is one."""
        kept, masks = _kept(choice), self.masks(choice)
        if self.how.solver is None:
            return self.trial.prune(masks)
        self.trial.prune(Masks({name: torch.ones_like(mask) for name, mask in masks.items()}))
        solve_choice(self.trial.task, masks, kept, self.how.solver, self.how.inputs, forecast=False)
        return None

    def figure(self, choice: Choice) -> float:
        """The forecast of a choice in the quantity of choices."""
        cost = choice.cost(self.quantity)
        return self.offset(self.quantity) + (cost / NANO if self.quantity == "ms" else cost)


def _item(tensor: torch.Tensor) -> int:
    """Bytes of one number of a tensor in a plan file, which keeps halves as they are and doubles as floats."""
    return min(4, tensor.element_size())


def _kept(choice: Choice) -> Kept:
    """Pattern and weights kept, by tensor."""
    return {name: (offer.pattern, offer.kept) for name, offer in choice.offers.items()}


def _ms(cost: NetworkCost | None, name: str, word: str, density: float) -> float | None:
    """Milliseconds of a layer; of one without a curve those that it takes as it is."""
    if cost is None or (name not in cost.dense and name not in cost.layers):
        return None
    if not word or word not in cost.layers.get(name, {}):
        return cost.dense.get(name)
    return cost.layers[name][word].at(density)
