"""Optimal brain damage: the rise of the loss when a weight goes, from the diagonal of the curvature."""

import warnings
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from secateur.core.errors import ModelError, UsageError
from secateur.core.masks import Masks
from secateur.core.names import Named, unwrap
from secateur.core.prunable import check_finite
from secateur.core.reading import Paper
from secateur.core.sockets import Criterion
from secateur.core.streams import stream
from secateur.core.task import Task, check_loss, frozen
from secateur.linalg.diagonals import exact_diagonal, ggn_diagonal, hutchinson
from secateur.linalg.flat import Flat
from secateur.linalg.products import Operator

Diagonal = Literal["auto", "recursion", "outputs", "hutchinson", "exact"]
Curvature = Literal["ggn", "hessian"]

_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MOVES = (nn.Identity, nn.Flatten, nn.Unflatten, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_EACH = (nn.Tanh, nn.Sigmoid, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
         nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Tanhshrink, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid,
         nn.Dropout, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)  # fmt: skip
"""Functions of each number by itself; dropout and norms are, in evaluation mode."""


_COLUMNS = 16


@dataclass(frozen=True)
class Obd(Criterion):
    """``h_qq w² / 2``: the rise of the mean loss when one weight of a network at its minimum is set to zero.

    Scores have the shape of each weight, float32 or wider, in units of the loss, with the sign of the curvature;
    pruned weights score 0. Evaluation mode: running statistics of BatchNorm. The slope does not count, so the
    network must be trained to (nearly) a minimum; before that use ``taylor``.

    Args:
        diagonal: where ``h`` comes from. ``"recursion"`` is the paper's backward pass: noise-free, exact for one
            hidden layer whose outputs do not mix in the loss (or for the last layer under any loss), an
            approximation otherwise; it takes ``nn.Sequential`` networks of linear and convolution layers,
            elementwise functions, max pooling and BatchNorm. ``"outputs"`` estimates the true diagonal of the
            Gauss-Newton matrix of any network from random signs at the outputs, one draw for each example, for
            losses like mean squared error and cross entropy. ``"hutchinson"`` estimates either diagonal under
            any loss from random signs at the weights, which costs far more. ``"exact"`` takes a product with
            every axis: tiny networks only. ``"auto"`` takes the first of these that network, loss and curvature
            allow.
        curvature: ``"ggn"`` (the paper's Levenberg-Marquardt form, without second derivatives of the activations)
            is never negative for a convex loss; of ``"hutchinson"`` the size of the estimate plus its standard
            error counts, so that no weight goes because the estimate of it is poor. ``"hessian"`` may be negative, away
            from a minimum: a warning says for how many weights, and those go first.
        samples: random signs drawn by ``"hutchinson"``; its error falls with their square root.
        seed: of the random signs.
        draws: random signs at the outputs for each example; the error falls with the root of examples times draws.

    Raises:
        UsageError: for an unknown option.
        ModelError: when a weight is NaN or infinite, the network cannot be differentiated twice, or
            ``"recursion"`` or ``"outputs"`` is asked of a network or loss that it does not take.
        DataError: when the data is empty or spent, or the loss is not finite.
        MaskError: when ``masks`` belong to another network.

    Cost: about two forward and backward passes over the data (recursion), a gradient for each example (outputs),
    ``samples`` curvature products, or one for each weight.
    """

    diagonal: Diagonal = "auto"
    curvature: Curvature = "ggn"
    samples: int = 32
    seed: int = 0
    draws: int = 1

    paper = Paper(
        "Optimal Brain Damage",
        "LeCun, Denker, Solla",
        1990,
        "NIPS 2",
        differs="one score, without the rounds of deleting and training; a loss that mixes its outputs (cross entropy) "
        "enters the recursion by the diagonal of its Hessian; outside the recursion random signs, those of Hutchinson "
        "with their standard error added, and for a shared weight its true second derivative, not the sum over uses",
    )
    needs = frozenset({"gradients", "hessian", "random"})

    def __post_init__(self) -> None:
        for name, known in (("diagonal", get_args(Diagonal)), ("curvature", get_args(Curvature))):
            if getattr(self, name) not in known:
                ways = ", ".join(map(repr, known))
                raise UsageError(f"{name} must be one of {ways}, not {getattr(self, name)!r}.")
        if self.samples < 2 or self.draws < 1:
            raise UsageError(f"samples must be at least 2 and draws at least 1, not {self.samples} and {self.draws}.")
        if self.diagonal == "outputs" and self.curvature == "hessian":
            raise UsageError("diagonal 'outputs' is that of curvature 'ggn', not 'hessian'; use 'hutchinson' for it.")

    def __call__(self, task: Task, masks: Masks) -> Named:
        """Scores for every tensor of ``masks``; higher = keep."""
        weights = masks.match(task.model)
        check_finite(dict(weights))
        flat = Flat(task, masks)
        bent, error = self._diagonal(task, flat)
        if self.curvature == "ggn" and isinstance(error, Tensor):
            bent = bent.abs() + error
        below = int((bent < -3 * error).sum())
        if below and self.curvature == "hessian":
            where = f"{below:,} of {flat.size:,} weights (down to {float(bent.min()):.3g})"
            warnings.warn(
                f"the curvature is negative for {where}, which go first; train on, or use 'ggn'", stacklevel=2
            )
        return flat.unflatten(bent * flat.flatten({n: w.detach() for n, w in weights.items()}).square() / 2)

    def _diagonal(self, task: Task, flat: Flat) -> tuple[Tensor, Tensor | float]:
        """The curvature of each kept weight and its standard error, 0 where that is not known."""
        bent, signs = None, stream(self.seed, "obd")
        if self.diagonal in ("auto", "recursion"):
            bent = self._recursion(task, flat)
        if bent is None and (self.diagonal == "outputs" or (self.diagonal == "auto" and self.curvature == "ggn")):
            named = ggn_diagonal(task, flat.masks, self.seed, self.draws)
            bent = None if named is None else flat.flatten(named)
            if bent is None and self.diagonal == "outputs":
                raise ModelError(
                    "the curvature of this loss in the outputs is not known, or the output is not one tensor with "
                    "the examples first. Use diagonal 'hutchinson'."
                )
        if bent is not None:
            return bent, 0.0
        op = Operator(task, flat.masks, self.curvature)
        return (exact_diagonal(op), 0.0) if self.diagonal == "exact" else hutchinson(op, self.samples, signs)

    def _recursion(self, task: Task, flat: Flat) -> Tensor | None:
        """The diagonal by the paper's backward pass; None where the network is no chain and need not be one."""
        layers, weights = _chain(unwrap(task.model)), task.params()
        why = _why_not(layers, {name: weights[name] for name in flat.masks})
        if why and self.diagonal == "auto":
            return None
        if why:
            raise ModelError(f"the recursion needs a chain of known layers: {why}. Use diagonal 'hutchinson'.")
        lowest = min(i for i, layer in enumerate(layers) if type(layer) in _LINEAR)
        names, count = {id(p): name for name, p in weights.items()}, 0
        total = {name: torch.zeros(p.shape, dtype=flat.dtype, device=p.device) for name, p in weights.items()}
        for inputs, target, n in task.batches():
            with frozen(task.model):
                passed = [(inputs[0] if isinstance(inputs, tuple | list) else inputs).to(flat.dtype)]
                for layer in layers:
                    passed.append(_run(layer, _state(layer, flat.dtype), passed[-1]).detach())
                slope, bend = _outer(task, passed.pop(), target)
                slope = slope if self.curvature == "hessian" else None  # nothing else asks for it
                for i in range(len(layers) - 1, lowest - 1, -1):
                    layer = layers[i]
                    own, slope, bend = _back(layer, passed[i], slope, bend, i == lowest)
                    for key, part in own.items():
                        total[names[id(getattr(layer, key))]] += n * part
            count += n
        return flat.flatten(total) / count


def _chain(module: nn.Module) -> list[nn.Module]:
    """The layers of a Sequential in order, those of Sequentials inside it among them."""
    parts = module if type(module) is nn.Sequential else []  # a module that stands there twice is passed twice
    return [layer for child in parts for layer in _chain(child)] or [module]


def _why_not(layers: list[nn.Module], weights: Named) -> str:
    for layer in layers:
        if type(layer) not in _LINEAR + _MOVES + _EACH or getattr(layer, "running_mean", layer) is None:
            return f"{type(layer).__name__} is none"
    known = {id(p) for layer in layers if type(layer) in _LINEAR for p in layer.parameters()}
    lost = [name for name, p in weights.items() if id(p) not in known]
    return f"`{lost[0]}` is not of a linear layer or a convolution" if lost else ""


def _state(layer: nn.Module, dtype: torch.dtype) -> Named:
    return {key: value.to(dtype) for key, value in layer.state_dict().items() if value.is_floating_point()}


def _run(layer: nn.Module, state: Named, x: Tensor) -> Tensor:
    return functional_call(layer, state, (x.clone() if getattr(layer, "inplace", False) else x,))


@torch.enable_grad()
def _outer(task: Task, output: Tensor, target: Any) -> tuple[Tensor, Tensor]:
    """First and second derivatives of a batch's loss in each output by itself."""
    free = output.detach().requires_grad_()
    value = task.loss(free, target)
    check_loss(value)
    (slope,) = torch.autograd.grad(value, free, create_graph=True)
    if not slope.requires_grad:
        return slope, torch.zeros_like(slope)
    # an example's outputs are no business of the others, so one slope serves them all
    columns = slope.reshape(len(slope), -1).sum(0)
    axes = torch.eye(len(columns), dtype=slope.dtype, device=slope.device)
    bend = torch.empty_like(slope.detach()).view(len(slope), -1)
    for part in torch.arange(len(columns), device=slope.device).split(_COLUMNS):
        (rows,) = torch.autograd.grad(columns, free, axes[part], retain_graph=True, is_grads_batched=True)
        bend[:, part] = rows.reshape(len(part), len(slope), -1)[torch.arange(len(part)), :, part].T
    bend = bend.view_as(slope)
    return slope.detach(), bend


@torch.enable_grad()
def _back(
    layer: nn.Module, x: Tensor, slope: Tensor | None, bend: Tensor, first: bool
) -> tuple[Named, Tensor | None, Tensor]:
    """Second derivatives in a layer's own weights, and both derivatives in its input, from those in its output.

    Nobody asks for those in the input of the ``first`` linear layer.
    """
    state, x = _state(layer, x.dtype), x.detach().requires_grad_()
    linear, down = type(layer) in _LINEAR, None
    y = None if linear and slope is None else _run(layer, state, x)
    if type(layer) in _EACH and y is not None:
        (tilt,) = torch.autograd.grad(y.sum(), x, create_graph=slope is not None)
        bend = tilt.detach().square() * bend
        if slope is None:
            return {}, None, bend
        second = torch.autograd.grad(tilt.sum(), x)[0] if tilt.requires_grad else 0.0
        return {}, tilt.detach() * slope, bend + second * slope
    if slope is not None and y is not None:
        (down,) = torch.autograd.grad(y, x, slope, retain_graph=True)
    if not linear and y is not None:
        return {}, down, torch.autograd.grad(y, x, bend)[0]
    # a sum of products has the squares of its factors as second derivatives: its own backward pass, over squares
    squares = {key: (v.square() if key == "weight" else v.clone()).requires_grad_() for key, v in state.items()}
    free = x.detach().square().requires_grad_(not first)
    asked = [*squares.values()] if first else [*squares.values(), free]
    found = torch.autograd.grad(_run(layer, squares, free), asked, bend)
    return dict(zip(squares, found[: len(squares)], strict=True)), down, bend if first else found[-1]
