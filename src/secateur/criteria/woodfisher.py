"""WoodFisher: the rise of the loss when a weight goes and the others of its block make up for it."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.core.errors import UsageError
from secateur.core.masks import Masks
from secateur.core.names import Named
from secateur.core.prunable import check_finite
from secateur.core.reading import Paper
from secateur.core.sockets import Criterion
from secateur.core.task import Task
from secateur.linalg.flat import Flat
from secateur.linalg.inverses import MFac, fisher_inverse
from secateur.linalg.memory import check, estimate
from secateur.linalg.products import per_example_gradients


@dataclass(frozen=True)
class WoodFisher(Criterion):
    """``w² / (2 [F⁻¹]_qq)`` with the empirical Fisher ``F = λI + mean g gᵀ`` over single examples.

    This is the least rise of a quadratic loss of curvature ``F`` once weight ``q`` is zero and the other weights of
    its block have moved to make up for it. The score alone does not move them. Scores have the shape of each weight,
    float32 or wider, in units of the loss squared; pruned weights score 0, and so do weights that no example's loss
    depends on. Evaluation mode: running statistics of BatchNorm.

    All examples of the data count; some hundreds to a thousand are usual. The mean of ``N`` outer products has rank
    ``N`` at most, so in a block of many more weights it is the damping that tells the rest apart, by magnitude.

    Args:
        block: kept weights of a tensor, in a row, that make up for each other; None for all weights of all tensors
            together. Results do not depend on the order of channels where a tensor is one block.
        damping: ``λ`` as a share of the mean diagonal of the Fisher over all kept weights, above 0.

    Raises:
        UsageError: for a block below 1 or a damping not above 0, or when the gradients do not fit into memory.
        ModelError: when a weight is NaN or infinite.
        DataError: when the data is empty or spent, or the loss or a gradient is not finite.
        MaskError: when ``masks`` belong to another network.

    Cost: one gradient for every example, all held in memory at once, and for ``N`` examples and ``d`` weights
    ``2 N d · min(N, block)`` multiplications in float64.
    """

    block: int | None = 2000
    damping: float = 0.01

    paper = Paper(
        "WoodFisher: Efficient Second-Order Approximation for Neural Network Compression",
        "Singh, Alistarh",
        2020,
        "arXiv:2004.14340",
        differs="scores only, the other weights are moved by a solver; gradients of single examples, where the paper "
        "averages them over mini-batches; damping is relative, so that a factor on the loss changes nothing, where "
        "the paper adds 1e-5; weights without any gradient score 0, not λw²/2; blocks of more weights than there "
        "are examples are solved from the side of the examples, as M-FAC does (Frantar, Kurtic, Alistarh, 2021)",
    )
    needs = frozenset({"gradients"})

    def __post_init__(self) -> None:
        if self.block is not None and self.block < 1:
            raise UsageError(f"block must be at least 1, not {self.block}; 2000 is usual, None takes all weights.")
        if not 0 < self.damping < float("inf"):
            raise UsageError(f"damping must be above 0, not {self.damping:g}; 0.01 is usual.")

    @torch.no_grad()
    def __call__(self, task: Task, masks: Masks) -> Named:
        """Scores for every tensor of ``masks``; higher = keep."""
        weights = masks.match(task.model)
        check_finite(dict(weights))
        flat = Flat(task, masks)
        rows = _gradients(task, masks, flat)
        mean = sum(float(row.double().square().sum()) for row in rows) / rows.numel()
        losses = torch.zeros(flat.size, dtype=flat.dtype, device=flat.device)
        if mean > 0:
            for start, stop in self._blocks(flat):
                part = rows[:, start:stop]
                diagonal = _inverse_diagonal(part, self.damping * mean)
                losses[start:stop] = torch.where(part.any(0), 0.5 / diagonal, 0.0)
        return flat.unflatten(losses * flat.flatten({n: w.detach() for n, w in weights.items()}).square())

    def _blocks(self, flat: Flat) -> Iterator[tuple[int, int]]:
        """Where each block begins and ends."""
        start = 0
        for count in [flat.size] if self.block is None else flat.counts:
            for first in range(start, start + count, self.block or count):
                yield first, min(first + (self.block or count), start + count)
            start += count


def _gradients(task: Task, masks: Masks, flat: Flat) -> Tensor:
    """The gradient of every example at the kept weights, a row each."""
    examples = sum(n for _, _, n in task.batches())
    what = f"the gradients of {examples:,} examples at {flat.size:,} weights"
    check(estimate((examples, flat.size), flat.dtype), what, "pass fewer examples, or score `only` some tensors",
          flat.device)  # fmt: skip
    rows, start = torch.empty(examples, flat.size, dtype=flat.dtype, device=flat.device), 0
    for some in per_example_gradients(task, masks):
        rows[start : start + len(some)] = some
        start += len(some)
    return rows


def _inverse_diagonal(gradients: Tensor, damping: float) -> Tensor:
    """The diagonal of the inverse Fisher, from whichever side is smaller."""
    if len(gradients) < gradients.shape[1]:
        return MFac(gradients, damping).diagonal()
    return fisher_inverse(gradients, damping).diagonal()
