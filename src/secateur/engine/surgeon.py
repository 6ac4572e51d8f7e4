"""Pruning a whole network as one vector: every weight that stays may move to make up for those that go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from secateur.core.errors import BudgetError, DataError, ModelError, UsageError
from secateur.core.masks import Masks
from secateur.core.patterns import Unstructured
from secateur.core.sockets import Solver, blame
from secateur.core.task import Task
from secateur.linalg.memory import check, estimate
from secateur.linalg.products import Kind, Operator

__all__ = ["Curvature", "Round", "operate"]

Curvature = Literal["layers", "hessian", "ggn", "fisher"]
"""What a solver minimises: the error of each layer's outputs, or a quadratic model of the loss over all weights."""

_COPIES = 5


@dataclass(frozen=True)
class Round:
    """One round of taking weights away.

    Args:
        kept: weights kept after it.
        slope: first-order change of the mean loss.
        bend: second-order change.
        rise: the measured change.
    """

    kept: int
    slope: float
    bend: float
    rise: float

    @property
    def forecast(self) -> float:
        """The expected change of the mean loss."""
        return self.slope + self.bend

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "forecast": self.forecast}


def operate(
    task: Task,
    masks: Masks,
    keep: int,
    solver: Solver,
    kind: Kind = "ggn",
    rounds: int = 1,
    heard: Callable[[Round], None] = lambda _: None,
) -> tuple[Masks, list[Round]]:
    """Prune the task's network in place, all tensors of ``masks`` together, by the curvature of the mean loss.

    With :class:`secateur.solvers.obs.Obs` this is Optimal Brain Surgeon as published: the curvature of the loss in all
    weights, biases too if ``masks`` name them. Weights that ``masks`` have pruned stay zero.

    Args:
        task: network, loss (mean over examples) and data.
        masks: the weights that may go or move; all others stay as they are.
        keep: how many of them stay, at least one.
        solver: chooses and compensates.
        kind: the curvature: ``"ggn"`` (Gauss-Newton), ``"fisher"`` (empirical) or ``"hessian"``; only the first two are
            never negative.
        rounds: the curvature is taken anew so many times; every round takes away the same share.
        heard: called after each round.

    Returns:
        The masks that the solver chose, and a record of each round.

    Raises:
        BudgetError: when ``keep`` is not between 1 and the number of weights kept so far.
        UsageError: for fewer than one round, or a matrix that does not fit into memory.
        SecateurError: as the solver, for example for an indefinite Hessian; the network is then as it was.

    Cost: for each round the matrix (one product of :class:`Operator` for each weight; for ``"fisher"`` the gradients of
    the examples and their products), the solver with one row, and three passes over the data; memory of about five
    float64 matrices of the weights kept.
    """
    total = masks.kept
    if not 1 <= keep <= total:
        raise BudgetError(f"cannot keep {keep:,} of {total:,} weights; ask for 1 to {total:,}.")
    if rounds < 1:
        raise UsageError(f"rounds is {rounds}; it must be at least 1.")
    weights = masks.match(task.model)
    backup = {name: p.detach().clone() for name, p in weights.items()}
    records: list[Round] = []
    try:
        for number in range(1, rounds + 1):
            aim = keep if number == rounds else round(total * (keep / total) ** (number / rounds))
            masks, record = _round(task, masks, min(aim, masks.kept), solver, kind)
            records.append(record)
            heard(record)
    except BaseException:
        with torch.no_grad():
            for name, p in weights.items():
                p.copy_(backup[name])
        raise
    return masks, records


def _round(task: Task, masks: Masks, keep: int, solver: Solver, kind: Kind) -> tuple[Masks, Round]:
    op = Operator(task, masks, kind)
    check(
        _COPIES * estimate((op.size, op.size), torch.float64),
        f"the {kind} of {op.size:,} weights and its inverse",
        'prune layer by layer (`curvature = "layers"`), or fewer tensors (`only`)',
        op.device,
    )
    old = op.flatten(task.params())
    matrix = op.dense()
    try:
        with blame(solver):
            new, kept = solver(old[None], matrix, Unstructured(), keep)
    except DataError as error:
        told = kind != "hessian" or "smallest eigenvalue" in str(error)
        least = 0.0 if told else float(torch.linalg.eigvalsh(matrix.double())[0])
        if least >= 0:
            raise
        raise ModelError(
            f"the hessian of {op.size:,} weights is indefinite: its smallest eigenvalue is {least:.3g}, its mean "
            f"diagonal {float(matrix.diagonal().mean()):.3g}, and the damping of {solver} does not make up for it. "
            'Train nearer to a minimum, or take `curvature = "ggn"` or "fisher", which are never negative.'
        ) from error
    new, kept = new[0], kept[0]
    if int(kept.sum()) != keep or bool((new[~kept] != 0).any()):
        raise UsageError(
            f"{solver} kept {int(kept.sum()):,} weights where {keep:,} were asked for, or left pruned ones that are "
            "not zero. Mend the solver."
        )
    before, slope = task.mean_loss(), op.flatten(task.gradients())
    change = new - old
    first, second = float(slope @ change), float(change @ (matrix @ change)) / 2
    del matrix
    left = _apply(task, op, new, kept)
    return left, Round(keep, first, second, task.mean_loss() - before)


@torch.no_grad()
def _apply(task: Task, op: Operator, new: Tensor, kept: Tensor) -> Masks:
    stay = op.unflatten(kept.to(new.dtype))
    weights = task.params()
    for name, value in op.unflatten(new).items():
        weights[name].copy_(value)
    return Masks({name: value != 0 for name, value in stay.items()})
