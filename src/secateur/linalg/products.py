"""Curvature of the mean loss times vectors, and gradients example by example; no matrix is ever formed.

Three curvatures: the ``hessian``; the ``ggn`` (generalised Gauss-Newton) ``mean JᵀRJ`` with the Jacobian ``J`` of the
outputs and the Hessian ``R`` of the loss in them, which is never negative for a convex loss; and the empirical
``fisher``, the mean over examples of ``g gᵀ`` with the gradient ``g`` of each example's own loss.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from secateur.core.errors import DataError, ModelError, UsageError
from secateur.core.masks import Masks
from secateur.core.names import Named
from secateur.core.task import Batch, Task, call, check_loss, check_twice, frozen, recurrent
from secateur.linalg.flat import Flat
from secateur.linalg.memory import check, estimate

Kind = Literal["hessian", "ggn", "fisher"]

_ROWS = 1 << 28  # bytes of the gradients of examples that are held at once

_INFINITE = (
    "the {} of the loss times a vector is not finite: a weight, a derivative or the vector is NaN or infinite. "
    "Run `secateur doctor` on the network; half types overflow sooner than float32."
)

_Product = Callable[[Sequence[Tensor]], Sequence[Tensor]]


class Operator(Flat):
    """The curvature of the mean loss over all data, restricted to the kept entries of the tensors in ``masks``.

    The network is in evaluation mode with running statistics, and fused attention is off, since it has no second
    derivative. Sums are float32 or wider whatever the weights are. Every example weighs the same.

    Args:
        task: network, loss and data; for ``ggn`` the output must be one tensor.
        masks: which entries the operator works on; its rows stand in the order of :meth:`flatten`.
        kind: ``"hessian"``, ``"ggn"`` or ``"fisher"`` (empirical).

    Raises:
        UsageError: for another kind, or when nothing is kept.
        MaskError: when ``masks`` belong to another network.

    Cost: a product with ``k`` columns is, for each batch, one forward pass and ``1 + k`` backward passes (``hessian``),
    ``1 + 2k`` (``ggn``), or the gradients of its examples (``fisher``); memory of ``2k + 3`` gradients.
    """

    def __init__(self, task: Task, masks: Masks, kind: Kind = "hessian") -> None:
        if kind not in get_args(Kind):
            raise UsageError(f"kind must be 'hessian', 'ggn' or 'fisher', not {kind!r}.")
        super().__init__(task, masks)
        self.task, self.kind = task, kind

    def __matmul__(self, v: Tensor) -> Tensor:
        """The curvature times ``v`` of shape ``(size,)`` or ``(size, k)``; same shape.

        Raises:
            UsageError: for another shape.
            ModelError: when the network cannot be differentiated twice, or the product is not finite.
            DataError: when the data is empty or spent, or the loss is not finite.
        """
        if v.dim() not in (1, 2) or v.shape[0] != self.size:
            raise UsageError(f"shape ({self.size},) or ({self.size}, k) is needed here, not {tuple(v.shape)}.")
        columns = v.detach().reshape(self.size, -1).to(self.device, self.dtype)
        total = self._outer(columns) if self.kind == "fisher" else self._curved(columns)
        if not torch.isfinite(total).all():
            raise ModelError(_INFINITE.format(self.kind))
        return total.reshape(v.shape)

    def with_gradient(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of the mean loss and the Hessian times ``v``, both ``(size,)``, from the same passes.

        Raises:
            UsageError: for another shape, or another curvature than ``"hessian"``.
            ModelError: as for a product, and when the gradient is not finite.
            DataError: when the data is empty or spent, or the loss is not finite.

        Cost: that of the product alone; the gradient is a step of it.
        """
        if self.kind != "hessian" or v.shape != (self.size,):
            raise UsageError(
                f"the gradient comes with the 'hessian' times a vector of shape ({self.size},), not with the "
                f"{self.kind!r} times {tuple(v.shape)}."
            )
        total = torch.zeros(self.size, 2, dtype=self.dtype, device=self.device)
        parts = self.unflatten(v.detach().to(self.device, self.dtype))
        points = {name: p.detach().requires_grad_() for name, p in self.masks.match(self.task.model).items()}
        direction, count = [parts[name].to(p.dtype) for name, p in points.items()], 0
        for inputs, target, n in self.task.batches():
            count += n
            with _plain(self.task), torch.enable_grad():
                slopes = _first(self.task, points, (inputs, target))
                product = _second(slopes, list(points.values()))
                done = (slopes, product(direction)) if product else (slopes,)
            for j, found in enumerate(done):
                total[:, j].add_(self.rows([d.detach()[None] for d in found])[0], alpha=n)
        if not torch.isfinite(total).all():
            raise ModelError(_INFINITE.format("gradient or the hessian"))
        return total[:, 0] / count, total[:, 1] / count

    def dense(self) -> Tensor:
        """The matrix itself, ``(size, size)``, made symmetric; for small sizes.

        Raises:
            UsageError: when it does not fit into memory.

        Cost: one product with ``size`` columns; for ``fisher`` the gradients of the examples and their products.
        """
        check(
            3 * estimate((self.size, self.size), self.dtype),
            f"the {self.kind} of {self.size:,} weights as a matrix",
            "work with products (`op @ v`), or on one tensor at a time",
            self.device,
        )
        if self.kind == "fisher":
            return self._sum_of_outer_products()
        matrix = self @ torch.eye(self.size, dtype=self.dtype, device=self.device)
        return (matrix + matrix.T) / 2

    def _sum_of_outer_products(self) -> Tensor:
        total, count = torch.zeros(self.size, self.size, dtype=self.dtype, device=self.device), 0
        for rows in per_example_gradients(self.task, self.masks, self.dtype):
            total.addmm_(rows.T, rows)
            count += len(rows)
        return total.div_(count)

    def _outer(self, columns: Tensor) -> Tensor:
        total, count = torch.zeros_like(columns), 0
        for rows in per_example_gradients(self.task, self.masks, self.dtype):
            total += rows.T @ (rows @ columns)
            count += len(rows)
        return total / count

    def _curved(self, columns: Tensor) -> Tensor:
        points = {name: p.detach().requires_grad_() for name, p in self.masks.match(self.task.model).items()}
        start = _hessian if self.kind == "hessian" else _ggn
        total, count = torch.zeros_like(columns), 0
        for inputs, target, n in self.task.batches():
            count += n
            with _plain(self.task), torch.enable_grad():
                product = start(self.task, points, (inputs, target))
                if product is None:
                    continue
                for j in range(columns.shape[1]):
                    parts = self.unflatten(columns[:, j])
                    done = product([parts[name].to(p.dtype) for name, p in points.items()])
                    total[:, j].add_(self.rows([d[None] for d in done])[0], alpha=n)
        return total / count


def hvp(task: Task, vector: Named, kind: Kind = "hessian") -> Named:
    """The curvature of the mean loss times a vector over whole tensors.

    Args:
        task: network, loss and data.
        vector: a tensor for some of the parameters; the curvature is that of these parameters alone.
        kind: ``"hessian"``, ``"ggn"`` or ``"fisher"``, as for :class:`Operator`.

    Returns:
        A tensor for every tensor of ``vector``, float32 or wider.

    Raises:
        MaskError: when ``vector`` does not fit the network.
        ModelError: when the network cannot be differentiated twice.

    Cost: one product of an :class:`Operator`.
    """
    op = Operator(task, Masks({name: torch.ones_like(v, dtype=torch.bool) for name, v in vector.items()}), kind)
    return op.unflatten(op @ op.flatten(vector))


def per_example_gradients(task: Task, masks: Masks, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
    """Gradients of each example's own loss at the kept entries: rows ``(examples, size)``, in the order of the data.

    An example's own loss is that of a batch of it alone: of every tensor in inputs and target whose first dimension
    is the number of examples it gets its row, all others are passed whole. The network is in evaluation mode.

    Args:
        task: network, loss and data.
        masks: True = kept; the columns stand in the order of :meth:`Operator.flatten`.
        dtype: type of the rows; by default that of the weights, float32 or wider.

    Yields:
        The rows of a batch, in several pieces when it would take more than 256 MB.

    Raises:
        DataError: when a gradient is not finite, or the data is empty or spent.
        ModelError: when the loss is not one number.
        MaskError: when ``masks`` belong to another network.

    Cost: one forward and backward pass over the data where ``torch.func.vmap`` knows every operator of the network;
    otherwise one of each example by itself, with the same result. Memory of as many gradients as one piece has rows.
    """
    flat = Flat(task, masks)
    points = {name: p.detach() for name, p in masks.match(task.model).items()}
    bytes_each = sum(p.numel() * (p.element_size() + (dtype or flat.dtype).itemsize) for p in points.values())
    together, seen = True, 0
    for inputs, target, n in task.batches():
        for piece in _pieces((inputs, target), n, max(1, _ROWS // max(1, bytes_each))):
            rows = None
            with _plain(task):
                if together:
                    rows = _together(task, points, piece)
                    together = rows is not None
                if rows is None:
                    rows = _one_by_one(task, points, piece)
            rows = flat.rows(rows, dtype).detach()  # parameters outside the masks would hold the graph
            if not torch.isfinite(rows).all():
                raise DataError(
                    f"the gradient of example {seen + int((~rows.isfinite()).any(1).nonzero()[0])} is not finite: its "
                    "inputs, its target or the weights hold NaN or infinity, or a half type overflows. "
                    "Run `secateur doctor` on the network, and look at that example."
                )
            seen += len(rows)
            yield rows


class _Piece:
    """Some examples of a batch: the tensors that have a row for each, and how to put a row back in its place."""

    def __init__(self, batch: Batch, n: int, start: int, stop: int) -> None:
        self.batch, self.n, self.count = batch, n, stop - start
        self.tensors = [t[start:stop] for t in _leaves(batch, n)]

    def whole(self) -> Batch:
        """The batch of these examples."""
        return _replaced(self.batch, self.n, iter(self.tensors))

    def alone(self, rows: Sequence[Tensor]) -> Batch:
        """The batch of one example, given its row of every tensor."""
        return _replaced(self.batch, self.n, iter([row[None] for row in rows]))


def _pieces(batch: Batch, n: int, most: int) -> Iterator[_Piece]:
    for start in range(0, n, most):
        yield _Piece(batch, n, start, min(n, start + most))


def _leaves(thing: Any, n: int) -> list[Tensor]:
    if isinstance(thing, Tensor):
        return [thing] if thing.dim() and thing.shape[0] == n else []
    parts = thing.values() if isinstance(thing, Mapping) else thing if isinstance(thing, tuple | list) else ()
    return [leaf for part in parts for leaf in _leaves(part, n)]


def _replaced(thing: Any, n: int, rows: Iterator[Tensor]) -> Any:
    if isinstance(thing, Tensor):
        return next(rows) if thing.dim() and thing.shape[0] == n else thing
    if isinstance(thing, Mapping):
        return {key: _replaced(part, n, rows) for key, part in thing.items()}
    if isinstance(thing, tuple) and hasattr(thing, "_fields"):
        return type(thing)(*(_replaced(part, n, rows) for part in thing))
    if isinstance(thing, tuple | list):
        return type(thing)(_replaced(part, n, rows) for part in thing)
    return thing


def _own_loss(task: Task, piece: _Piece, points: Named, rows: Sequence[Tensor]) -> Tensor:
    value = task.loss_at(piece.alone(rows), points)
    if value.dim():
        raise ModelError(f"the loss has shape {tuple(value.shape)}; it must be one number, the mean over the batch.")
    return value


def _together(task: Task, points: Named, piece: _Piece) -> list[Tensor] | None:
    """All gradients of a piece at once, or None where vmap does not know the network."""
    if not piece.tensors:
        return None

    def own(at: Named, *rows: Tensor) -> Tensor:
        return _own_loss(task, piece, at, rows)

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")  # still faster than one by one
            return list(vmap(grad(own), (None, *[0] * len(piece.tensors)))(points, *piece.tensors).values())
    except (ModelError, DataError, torch.OutOfMemoryError):
        raise
    except Exception:  # a true error comes again, by itself, when the examples go one by one
        return None


@torch.enable_grad()
def _one_by_one(task: Task, points: Named, piece: _Piece) -> list[Tensor]:
    own = {name: p.clone().requires_grad_() for name, p in points.items()}
    found = []
    for i in range(piece.count):
        value = _own_loss(task, piece, own, [t[i] for t in piece.tensors])
        found.append(_slopes([value], list(own.values())))
    return [torch.stack(rows) for rows in zip(*found, strict=True)]


@contextlib.contextmanager
def _plain(task: Task) -> Iterator[None]:
    """Evaluation mode, and only kernels that can be differentiated twice."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(frozen(task.model))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(recurrent(task.model))
        yield


def _slopes(of: Sequence[Tensor], at: Sequence[Tensor], along: Sequence[Tensor] | None = None, more: bool = False):
    """Gradients with zeros where there is no way to a point; ``more``: they will be differentiated again."""
    ways = [i for i, value in enumerate(of) if value.requires_grad]
    if not ways:
        return [torch.zeros_like(p) for p in at]
    seeds = None if along is None else [along[i] for i in ways]
    try:
        return torch.autograd.grad(
            [of[i] for i in ways], at, seeds, retain_graph=True, create_graph=more, materialize_grads=True
        )
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        twice = " twice" if more or along is not None else ""
        raise ModelError(f"the loss cannot be differentiated{twice}: {error}") from error


def _first(task: Task, points: Named, batch: Batch) -> Sequence[Tensor]:
    """Gradients of one batch's loss that can be differentiated again."""
    value = task.loss_at(batch, points)
    check_loss(value)
    return _slopes([value], list(points.values()), more=True)


def _second(slopes: Sequence[Tensor], at: Sequence[Tensor]) -> _Product | None:
    """The Hessian as a function of a direction; None where the loss is linear."""
    bent = [slope for slope in slopes if slope.requires_grad]
    if not bent:
        return None
    check_twice(torch.stack([slope.sum() for slope in bent]).sum())
    return lambda direction: _slopes(slopes, at, direction)


def _hessian(task: Task, points: Named, batch: Batch) -> _Product | None:
    return _second(_first(task, points, batch), list(points.values()))


def _ggn(task: Task, points: Named, batch: Batch) -> _Product | None:
    """``JᵀRJ`` of one batch as a function of a direction; None where the loss is linear in the output."""
    at = list(points.values())
    output = call(task.model, batch[0], points)
    if not isinstance(output, Tensor):
        raise ModelError(
            f"the network gives {type(output).__name__}; its Gauss-Newton matrix needs one tensor. Use 'hessian'."
        )
    free = output.detach().requires_grad_()
    value = task.loss(free, batch[1])
    check_loss(value)
    (outer,) = _slopes([value], [free], more=True)
    if not (outer.requires_grad and output.requires_grad):
        return None
    probe = torch.zeros_like(output, requires_grad=True)
    pulled = _slopes([output], at, [probe], more=True)  # Jᵀ probe; its slope in the probe along v is J v
    check_twice(torch.stack([outer.sum(), *(p.sum() for p in pulled)]).sum())

    def product(direction: Sequence[Tensor]) -> Sequence[Tensor]:
        pushed = _slopes(pulled, [probe], direction)
        return _slopes([output], at, _slopes([outer], [free], pushed))

    return product
