"""SOSP-I: whole output units, taken away one after the other, each step by what it adds to those gone before."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.core.masks import Masks
from secateur.core.names import Named
from secateur.core.prunable import check_finite
from secateur.core.reading import Paper
from secateur.core.sockets import Criterion
from secateur.core.task import Task, call, frozen
from secateur.linalg.factors import example_signs
from secateur.linalg.flat import Flat
from secateur.linalg.pairs import outer, unit_pairs
from secateur.linalg.products import per_example_gradients


@dataclass(frozen=True)
class SospI(Criterion):
    """What each output unit adds to the loss when the units are taken away in the best order, cheapest first.

    With ``Q_ss = |w_s · g| + |w_s · G w_s| / 2`` and ``Q_st = |w_s · G w_t| / 2``, a set of units costs the sum of
    its part of ``Q``. Units are taken one by one, always the one that adds least; a unit scores what it added,
    which never falls from step to step, so that the lowest scores are exactly the greedy set of any size. ``w_s``
    are the kept weights of a row or filter (pattern ``unit``), ``g`` is the gradient of the mean loss and ``G`` its
    Gauss-Newton matrix over the tensors in ``masks``. Biases and the scales of norms stay out.

    The value of a unit is shared out among its weights in proportion to the squared change of the outputs that each
    causes alone, so that sums over units are exact (where there are more outputs than units, these shares are
    estimated from random signs at the outputs). Scores have the shape of each weight, float32 or wider, in
    units of the loss, at least 0; pruned weights score 0. Evaluation mode: running statistics of BatchNorm.

    Raises:
        ModelError: when a weight is NaN or infinite, or the output is not one tensor with a row for each example.
        DataError: when the data is empty or spent, or the loss or a gradient is not finite.
        MaskError: when ``masks`` belong to another network.

    Cost: a pass for each output of an example, or two for each unit where these are fewer, and, for ``S`` units in
    all, ``S`` steps over a row of ``S`` numbers; memory of ``S²`` numbers, and of outputs times ``S`` for each
    example, or 256 MB.
    """

    paper = Paper(
        "SOSP: Efficiently Capturing Global Correlations by Second-Order Structured Pruning",
        "Nonnenmacher, Pfeil, Steinwart, Reeb",
        2022,
        "arXiv:2110.11395",
        differs="units that a shortcut couples are scored one by one; biases and the scales of norms do not count; "
        "where the absolute values stand is not checked against the paper's text, and there is no code to compare with",
    )
    needs = frozenset({"gradients", "hessian"})

    @torch.no_grad()
    def __call__(self, task: Task, masks: Masks) -> Named:
        """Scores for every tensor of ``masks``; higher = keep. Meant for whole output units."""
        weights = masks.match(task.model)
        check_finite(dict(weights))
        flat = Flat(task, masks)
        ids, first = {}, 0
        for name, w in weights.items():
            rows = torch.arange(first, first + len(w), device=w.device, dtype=torch.float64)
            ids[name] = rows.reshape(-1, *[1] * (w.dim() - 1)).expand(w.shape)
            first += len(w)
        unit = flat.rows([ids[name][None] for name in masks], torch.float64)[0].long()
        here = flat.flatten({name: w.detach() for name, w in weights.items()})
        cost, share = _costs(task, masks, here, unit, first)
        slopes = task.gradients()
        cost.diagonal().add_(_per_unit(here * flat.flatten({n: slopes[n] for n in masks}), unit, first).abs())
        added = _greedy(cost)
        whole = _per_unit(share, unit, first)
        return flat.unflatten(share * torch.where(whole > 0, added / whole, 0.0)[unit])


def _costs(task: Task, masks: Masks, here: Tensor, unit: Tensor, units: int) -> tuple[Tensor, Tensor]:
    """``|w_s · G w_t| / 2`` for all pairs of units, and for each weight the squared change of the outputs."""
    inputs, target, n = next(task.batches())
    free, _ = outer(task, _outputs(task, inputs), target, n)
    if free[0].numel() > units:
        return unit_pairs(task, masks).abs_().div_(2), _estimated_share(task, masks, here)
    cost, share, count = here.new_zeros(units, units), torch.zeros_like(here), 0
    for inputs, target, n in task.batches():
        bend = _bend(*outer(task, _outputs(task, inputs), target, n), n)
        moved = here.new_zeros(n, bend.shape[1], units)  # J w_s of every example
        for j in range(bend.shape[1]):
            start = 0
            for rows in per_example_gradients(Task(task.model, _output(j), [(inputs, target)]), masks, here.dtype):
                rows = rows * here
                share += rows.square().sum(0)
                moved[start : start + len(rows), j].index_add_(1, unit, rows)
                start += len(rows)
        cost += (bend.to(here.dtype) @ moved).flatten(0, 1).T @ moved.flatten(0, 1)
        count += n
    return cost.div_(count).abs_().div_(2), share


def _estimated_share(task: Task, masks: Masks, here: Tensor) -> Tensor:
    """The squared changes of all outputs together, from random signs at the outputs of every example."""
    share = torch.zeros_like(here)
    for inputs, _, _ in task.batches():
        coins = example_signs(inputs, _outputs(task, inputs), 0)
        for rows in per_example_gradients(Task(task.model, _inner, [(inputs, coins)]), masks, here.dtype):
            share += (rows * here).square().sum(0)
    return share


def _inner(output: Tensor, coins: Tensor) -> Tensor:
    return (output * coins).sum()


def _output(j: int) -> Callable[[Any, Any], Tensor]:
    """The ``j``-th output of one example, in the place of a loss."""
    return lambda output, target: output.reshape(-1)[j]


def _outputs(task: Task, inputs: Any) -> Any:
    with torch.no_grad(), frozen(task.model):  # some layers round otherwise when their weights are frozen
        return call(task.model, inputs, {name: p.detach() for name, p in task.params().items()})


@torch.enable_grad()
def _bend(free: Tensor, slope: Tensor, n: int) -> Tensor:
    """The Hessian of each example's loss in its outputs, shape ``(n, outputs, outputs)``."""
    if not slope.requires_grad:
        return free.new_zeros(n, free[0].numel(), free[0].numel())
    rows = [
        torch.autograd.grad(column.sum(), free, retain_graph=True, materialize_grads=True)[0].reshape(n, -1)
        for column in slope.reshape(n, -1).unbind(1)
    ]
    return n * torch.stack(rows, 1)  # the loss is a mean over the batch


def _greedy(cost: Tensor) -> Tensor:
    """What each unit adds when the cheapest goes first, given the costs of units and of pairs."""
    adds, added = cost.diagonal().clone(), torch.zeros(len(cost), dtype=cost.dtype, device=cost.device)
    for _ in range(len(cost)):
        cheapest = adds.argmin().reshape(1)  # a tensor, so that nothing waits for the device
        added.index_copy_(0, cheapest, adds.index_select(0, cheapest))
        adds = (adds + 2 * cost.index_select(0, cheapest)[0]).index_fill_(0, cheapest, torch.inf)
    return added


def _per_unit(values: Tensor, unit: Tensor, units: int) -> Tensor:
    return values.new_zeros(units).index_add_(0, unit, values)
