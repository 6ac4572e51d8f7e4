"""A layer whose hash of the input picks the one expert that answers: data-dependent sparsity by routing.

Baykal, Dikkala, Panigrahy, Rashtchian, Wang, A Theoretical View on Sparsely Activated Networks, NeurIPS 2022,
arXiv:2208.04461. ``K`` fixed random hashes of an input are the name of its bucket; every bucket that a sample of
inputs fell into owns an expert, a constant or an affine map, and what an example costs does not grow with their number.
When a target is Lipschitz with constant L and a bucket has diameter δ, every constant within the target's range on
the bucket errs by at most Lδ there, the middle of the range by at most Lδ/2.

Where this differs: no code of the authors was found and the constants of their theorems are not checked; the table has
the occupied buckets alone (no table of fixed size with collisions); of several buckets that differ from a new one in
equally few hashes, the one whose hash numbers are nearest answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from secateur.blocks.hashes import Hashes, Packing, check_bits, nearest
from secateur.core.errors import DataError, ModelError, UsageError
from secateur.linalg.memory import check

Expert = Literal["constant", "linear"]
Unseen = Literal["nearest", "mean"]
Keys = Literal["packed", "tuple"]

_SMALL = 1e-10  # eigenvalues below this share of the largest count as zero in a least-squares fit
_WORK = 1 << 22  # numbers added at once


@dataclass(frozen=True)
class Occupancy:
    """How a sample lies in the buckets.

    Args:
        buckets: that hold an example.
        singles: of them, those that hold just one: they can only remember it.
        largest: examples in the fullest one.
        examples: in all.
    """

    buckets: int
    singles: int
    largest: int
    examples: int


@dataclass(frozen=True)
class Active:
    """What one example costs, routing included.

    Args:
        parameters: numbers that are read: hashes and one expert.
        macs: multiply-adds, where the bucket is known; finding the nearest one for an unseen bucket compares the
            hashes with those of all buckets.
        total: numbers that the layer holds, names of buckets included.
    """

    parameters: int
    macs: int
    total: int


class LshLayer(nn.Module):
    """One expert a bucket: ``y = c_i + A_i x`` with ``i`` the bucket of ``x``; ``A`` is absent with constants.

    The layer begins without buckets; :meth:`fit_` or :meth:`occupy` opens those of a sample, so that none is empty.
    Call them before an optimizer is made, since the parameters then get their shapes. Weight decay and momentum would
    move experts that no example of the batch selected: make the optimizer leave them with :func:`hold_unselected`.

    Args:
        hashes: the routing.
        outputs: numbers in an output.
        expert: ``"constant"`` or ``"linear"``.
        unseen: who answers in a bucket without an expert: the ``"nearest"`` bucket, the one that differs in the fewest
            hashes (then in their numbers, then of the lower index), or the ``"mean"`` of the experts over the
            sample's examples, through which no gradient flows.
        keys: how a bucket's hashes are looked up: ``"packed"`` into one number of at most 63 bits, or as a
            ``"tuple"``, which is slower and has no limit.

    Raises:
        UsageError: for an unknown option, fewer than one output, or more than 63 hyperplanes with packed keys.
    """

    constant: nn.Parameter
    linear: nn.Parameter | None
    codes: Tensor
    counts: Tensor
    selected: Tensor

    def __init__(
        self,
        hashes: Hashes,
        outputs: int,
        expert: Expert = "constant",
        unseen: Unseen = "nearest",
        keys: Keys = "packed",
    ) -> None:
        super().__init__()
        if outputs < 1:
            raise UsageError(f"the layer has {outputs} outputs; it needs at least 1.")
        self.hashes, self.outputs, self.expert, self.unseen, self.keys = hashes, outputs, expert, unseen, keys
        if hashes.width is None and keys == "packed":
            check_bits(2**hashes.count, hashes.count)
        self.constant = nn.Parameter(torch.zeros(0, outputs))
        shape = (0, outputs, hashes.inputs)
        self.register_parameter("linear", nn.Parameter(torch.zeros(shape)) if expert == "linear" else None)
        self.register_buffer("codes", torch.zeros(0, hashes.count, dtype=torch.int64))
        self.register_buffer("counts", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("selected", torch.zeros(0, dtype=torch.bool), persistent=False)
        self._packing: Packing | None = None

    @property
    def buckets(self) -> int:
        """Buckets with an expert."""
        return len(self.codes)

    @torch.no_grad()
    def occupy(self, x: Tensor) -> Occupancy:
        """Open the buckets of a sample ``(N, inputs)`` anew; every expert is zero.

        Raises:
            DataError: for inputs of another shape, without an example, or not finite.
            UsageError: when packed keys would have more than 63 bits, or the table does not fit into memory.
        """
        codes, counts = torch.unique(self.hashes(x), dim=0, return_counts=True)
        if not len(codes):
            raise DataError("the sample holds no input, so no bucket would be open; give at least one.")
        if self.keys == "packed":
            Packing.of(codes)
        each = self.outputs * (1 + (self.hashes.inputs if self.linear is not None else 0))
        size = len(codes) * each * self.constant.element_size()
        check(size, f"the experts of {len(codes)} buckets", "use wider or fewer hashes", self.constant.device)
        self._resize(len(codes))
        self.codes, self.counts = codes.to(self.constant.device), counts.to(self.constant.device)
        return self.occupancy()

    @torch.no_grad()
    def fit_(self, x: Tensor, y: Tensor, by: Literal["mean", "middle"] = "mean") -> Occupancy:
        """Open the buckets of a sample and set their experts in closed form.

        Constants become the mean of the targets in the bucket, which is what training by squared error converges to,
        or the middle of their range. Linear experts become the least-squares affine map of the bucket; along
        directions in which its examples do not differ the map is flat. Sums are in float64.

        Args:
            x: inputs ``(N, inputs)``.
            y: targets ``(N, outputs)``.
            by: what a constant is; linear experts know the mean alone.

        Raises:
            DataError: for other shapes, no example, or numbers that are not finite.
            UsageError: for the middle with linear experts; or as :meth:`occupy`.

        Cost: one pass; for linear experts memory of a matrix (inputs, inputs) and its eigenvalues for each bucket.
        """
        if y.shape != (len(x), self.outputs) or not y.is_floating_point() or not bool(y.isfinite().all()):
            raise DataError(
                f"targets are {y.dtype} {tuple(y.shape)} for {len(x)} inputs; give finite floating ones of shape "
                f"({len(x)}, {self.outputs})."
            )
        if by == "middle" and self.linear is not None:
            raise UsageError("linear experts are fitted by least squares; write by='mean', or use constants.")
        found = self.occupy(x)
        where, x, y = self.route(x), x.double(), y.double()
        mean = _means(where, y, self.counts)
        if by == "middle":
            index = where[:, None].expand_as(y)
            edges = [mean.scatter_reduce(0, index, y, how) for how in ("amin", "amax")]
            mean = (edges[0] + edges[1]) / 2
        if self.linear is not None:
            centre = _means(where, x, self.counts)
            slopes = _slopes(where, x - centre[where], y - mean[where], self.buckets)
            self.linear.copy_(slopes)
            mean = mean - (slopes @ centre[:, :, None])[..., 0]
        self.constant.copy_(mean)
        return found

    @torch.no_grad()
    def route(self, x: Tensor) -> Tensor:
        """The number of the expert that answers each input, ``(N,)``; -1 for the mean of all.

        Raises:
            ModelError: when no bucket is open.
            DataError: for inputs of another shape, or not finite.
        """
        if not self.buckets:
            raise ModelError("the layer has no bucket; call `fit_(x, y)` or `occupy(x)` with a sample first.")
        codes = self.hashes(x)
        where = self._found(codes)
        new = where < 0
        if self.unseen == "nearest" and bool(new.any()):
            where[new] = nearest(codes[new], self.codes)
        return where

    def forward(self, x: Tensor) -> Tensor:
        """Outputs ``(N, outputs)`` for inputs ``(N, inputs)``.

        Raises:
            ModelError: when no bucket is open.
            DataError: for inputs of another shape, or not finite.

        Cost: ``N (K inputs + outputs inputs)`` MACs with linear experts, ``N K inputs`` with constants, and the search
        for the nearest bucket of unseen ones.
        """
        where = self.route(x)
        known = where >= 0
        at = where.clamp(min=0)
        if self.training and torch.is_grad_enabled():
            self.selected[at[known]] = True
        out = self._answer(x, self.constant[at], None if self.linear is None else self.linear[at])
        if self.unseen == "nearest" or bool(known.all()):
            return out
        share = (self.counts.double() / self.counts.sum()).to(self.constant.dtype)
        constant = torch.einsum("m,mo->o", share, self.constant.detach())[None]
        linear = None if self.linear is None else torch.einsum("m,moi->oi", share, self.linear.detach())[None]
        return torch.where(known[:, None], out, self._answer(x, constant, linear))

    def occupancy(self) -> Occupancy:
        """How the sample that opened the buckets lies in them."""
        if not self.buckets:
            return Occupancy(0, 0, 0, 0)
        singles, largest, total = int((self.counts == 1).sum()), int(self.counts.max()), int(self.counts.sum())
        return Occupancy(self.buckets, singles, largest, total)

    def active(self) -> Active:
        """What one example costs, routing included."""
        routing = sum(buffer.numel() for buffer in self.hashes.buffers())
        linear = self.outputs * self.hashes.inputs if self.linear is not None else 0
        held = sum(p.numel() for p in self.parameters()) + self.codes.numel()
        macs = self.hashes.count * self.hashes.inputs + linear
        return Active(routing + self.outputs + linear, macs, routing + held)

    def tables(self) -> Iterator[nn.Parameter]:
        """The parameters, each with one row a bucket."""
        yield self.constant
        if self.linear is not None:
            yield self.linear

    def _answer(self, x: Tensor, constant: Tensor, linear: Tensor | None) -> Tensor:
        if linear is None:
            return constant.expand(len(x), -1)
        return constant + (linear * x[:, None, :].to(linear.dtype)).sum(-1)

    def _found(self, codes: Tensor) -> Tensor:
        """Number of each bucket among the open ones, -1 where it is not open."""
        if self.keys == "tuple":
            every, at = torch.unique(torch.cat([self.codes, codes]), dim=0, return_inverse=True)
            number = at.new_full((len(every),), -1)
            number[at[: self.buckets]] = torch.arange(self.buckets, device=at.device)
            return number[at[self.buckets :]]
        if self._packing is None:
            self._packing = Packing.of(self.codes)
        return self._packing(codes)

    def _resize(self, buckets: int) -> None:
        for table in self.tables():
            table.data = table.data.new_zeros(buckets, *table.shape[1:])
            table.grad = None
        self.selected = torch.zeros(buckets, dtype=torch.bool, device=self.constant.device)
        self._packing = None

    def _apply(self, fn: Any, recurse: bool = True) -> LshLayer:
        self._packing = None  # it lies on the old device
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A state has its own number of buckets."""
        saved = state_dict.get(f"{prefix}codes")
        if isinstance(saved, Tensor) and saved.dim() == 2:
            self._resize(len(saved))
            self.codes = self.codes.new_zeros(len(saved), self.hashes.count)
            self.counts = self.counts.new_zeros(len(saved))
        super()._load_from_state_dict(state_dict, prefix, *args)


def hold_unselected(layer: LshLayer, optimizer: Optimizer) -> tuple[RemovableHandle, RemovableHandle]:
    """Make every step of an optimizer leave the experts that no example selected since the last one.

    Their weights and the optimizer's state of them (momentum, second moments) stay to the bit what they were; only
    numbers that the optimizer keeps for a whole tensor, such as Adam's count of steps, go on.

    Args:
        layer: in training mode its forward passes note what they select.
        optimizer: any that does not call the network itself.

    Returns:
        Two handles, whose ``remove()`` ends it.

    Raises:
        UsageError: at a step with a closure, which would select experts within the step.

    Cost: a copy of the unselected rows and of their state at every step.
    """
    kept: list[tuple[Tensor, str, Tensor]] = []
    rows = layer.selected

    def before(_: Optimizer, args: Any, kwargs: Any) -> None:
        nonlocal rows
        if any(each is not None for each in (*args[1:], *kwargs.values())):
            raise UsageError("experts cannot be held in a step with a closure; call `backward()`, then `step()`.")
        rows = (~layer.selected).nonzero().flatten()
        kept.clear()
        for table in layer.tables():
            kept.append((table, "", table.detach()[rows]))
            kept.extend((table, key, value[rows]) for key, value in _of_rows(optimizer, table))

    @torch.no_grad()
    def after(_: Optimizer, args: Any, kwargs: Any) -> None:
        known = {(id(table), key) for table, key, _ in kept}
        for table, key, value in kept:
            (table if not key else optimizer.state[table][key])[rows] = value
        for table in layer.tables():
            for key, value in _of_rows(optimizer, table):
                if (id(table), key) not in known:  # made in this step
                    value[rows] = 0
        layer.selected.zero_()

    return optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)


def _of_rows(optimizer: Optimizer, table: nn.Parameter) -> list[tuple[str, Tensor]]:
    """What an optimizer remembers of each number of a table."""
    state = optimizer.state.get(table, {})
    return [(key, v) for key, v in state.items() if isinstance(v, Tensor) and v.shape == table.shape]


def _means(where: Tensor, values: Tensor, counts: Tensor) -> Tensor:
    return values.new_zeros(len(counts), values.shape[1]).index_add_(0, where, values) / counts[:, None]


def _slopes(where: Tensor, x: Tensor, y: Tensor, buckets: int) -> Tensor:
    """Least-squares slopes (buckets, outputs, inputs) of centred values, flat where the inputs do not differ."""
    wide = x.shape[1]
    size = 8 * buckets * wide * wide
    check(3 * size, f"the second moments of {buckets} buckets", "use constants, or wider hashes", x.device)
    gram, pull = x.new_zeros(buckets, wide, wide), x.new_zeros(buckets, y.shape[1], wide)
    step = max(1, _WORK // (wide * max(wide, y.shape[1])))
    for place, a, b in zip(where.split(step), x.split(step), y.split(step), strict=True):
        gram.index_add_(0, place, a[:, :, None] * a[:, None, :])
        pull.index_add_(0, place, b[:, :, None] * a[:, None, :])
    return pull @ torch.linalg.pinv(gram, hermitian=True, rtol=_SMALL)
