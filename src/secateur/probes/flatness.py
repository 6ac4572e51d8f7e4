"""Flatness: the curvature of the loss at the weights, and how far the loss rises around them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secateur.core.errors import SecateurError, UsageError
from secateur.core.masks import Masks
from secateur.core.names import Named
from secateur.core.reading import Paper, Reading
from secateur.core.sockets import Probe
from secateur.core.streams import stream
from secateur.core.task import Task
from secateur.linalg.products import Operator
from secateur.probes._flatness import filter_noise, fixed, free, mean_loss, signed_sums, spread_of_mean, top_eigenvalue
from secateur.probes._still import check_whole, unchanged


@dataclass(frozen=True)
class Flatness(Probe):
    """The largest eigenvalue of the Hessian of the mean loss, its trace, sharpness, and the rise under random noise.

    Everything is computed on the first ``examples`` of the data, in evaluation mode with running statistics. Only
    kept weights move: the Hessian of a pruned network is the submatrix of its kept weights, biases and scales, and
    neither gradients nor noise touch the others. Small figures are flat. Parts, which :meth:`measure` gives as
    readings of their own:

    - the value: the largest eigenvalue, by Lanczos on products with the Hessian. ``low..high`` is the value less and
      plus ``residual``, the norm of ``Hv - value v``: an eigenvalue lies there, and none of chance is in it.
    - ``trace`` and ``trace:stderr``: the mean of ``vᵀHv`` over ``draws`` vectors of random signs (Hutchinson).
      ``trace per weight``: the same by the number of free weights, the mean eigenvalue.
    - ``sharpness``: ``L(w + rho g / |g|) - L(w)`` with the gradient ``g`` of the mean loss; one norm over all of it.
    - ``noise SIZE`` and ``noise SIZE:stderr``: the mean over ``draws`` of ``L(w ± SIZE d) - L(w)``, both ways of each
      draw, so that a slope cancels. ``d`` is Gaussian, scaled so that each filter's part is as long as the filter;
      tensors of one dimension stay.
    - ``loss``: L(w). ``weights``: how many are free.

    Eigenvalue, trace and sharpness change when a layer with ReLU is scaled up and the next one down by as much,
    although the function stays; the rise under noise does not. Errors are over draws, not over examples. What cannot be
    computed is NaN, and the note says why. A network of a half type is measured in a float32 copy.

    Args:
        examples: how many of the data.
        rho: length of the step along the gradient.
        sizes: of the noise, as shares of each filter's length.
        draws: of random signs and of noise, 5 or more.
        products: with the Hessian for the eigenvalue, at most.
        seed: of all draws; noise is the same for all networks whose tensors have the same names and shapes.

    Raises:
        UsageError: for values out of range.
        DataError: when the data is empty or spent, or the loss changes from pass to pass.
        ModelError: when the loss is not one number.
        MaskError: when ``masks`` belong to another network.

    Cost: ``products + draws`` products with the Hessian (each about three gradients) and ``2 · draws · len(sizes)``
    forward passes over the examples; memory of 24 vectors of weights.
    """

    examples: int = 256
    rho: float = 0.05
    sizes: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)
    draws: int = 20
    products: int = 60
    seed: int = 0

    paper = Paper(
        "An Investigation into Neural Net Optimization via Hessian Eigenvalue Density",
        "Ghorbani, Krishnan, Xiao",
        2019,
        "arXiv:1901.10159",
        differs="no density; adds the sharpness of Foret, Kleiner, Mobahi, Neyshabur (2021, arXiv:2010.01412) and the "
        "mean rise under noise normalised by filters (Li et al. 2018, arXiv:1712.09913), and restricts all to kept "
        "weights",
    )
    needs = frozenset({"gradients", "hessian", "random"})

    def __post_init__(self) -> None:
        for name in ("examples", "draws", "products"):
            check_whole(name, getattr(self, name))
        if self.draws < 5:
            raise UsageError(f"draws={self.draws} is too few for an error; write `draws = 5` or more, 20 is usual.")
        for name, value in (("rho", self.rho), *(("sizes", size) for size in self.sizes)):
            if not (math.isfinite(value) and value > 0):
                raise UsageError(f"{name} holds {value!r}; it must be above 0 and finite, such as 0.05.")

    def __call__(self, task: Task, masks: Masks | None = None) -> Reading:
        """The largest eigenvalue, with all other figures among its parts."""
        found = self.measure(task, masks)
        first, parts = found["top_eigenvalue"], {"loss": found["loss"].value}
        for name in [name for name in found if name not in ("top_eigenvalue", "loss")]:
            parts[name] = found[name].value
            if (stderr := found[name].stderr) is not None:
                parts[f"{name}:stderr"] = stderr
        parts |= {"trace per weight": found["trace"].parts.get("per weight", math.nan)}
        return replace(first, parts={**first.parts, **parts})

    def measure(self, task: Task, masks: Masks | None = None) -> dict[str, Reading]:
        """All figures as readings: ``loss``, ``top_eigenvalue``, ``trace``, ``sharpness`` and ``noise SIZE`` each.

        Raises:
            DataError: when the data is empty or spent, or the loss changes from pass to pass.
            ModelError: when the loss is not one number.
            MaskError: when ``masks`` belong to another network.

        Cost: as above.
        """
        with unchanged():
            task, n, note = fixed(task, self.examples)
            kept, loss = free(task, masks), mean_loss(task)
            about = {"weights": float(kept.kept)}
            found = {"loss": Reading(loss, n=n, parts=about, note=note)}
            if not math.isfinite(loss):
                why = f"the loss at the weights is {loss}, so nothing can be measured around them"
                return found | self._unknown(about, why)
            weights = {name: p.detach() for name, p in task.params().items() if name in kept}
            found |= self._curvature(task, kept, about)
            found["sharpness"] = self._sharpness(task, kept, weights, loss)
            return found | self._noise(task, kept, weights, loss)

    def _unknown(self, about: Mapping[str, float], why: str) -> dict[str, Reading]:
        names = ("top_eigenvalue", "trace", "sharpness", *(f"noise {size:g}" for size in self.sizes))
        parts = {"sharpness": {"rho": self.rho}} | {f"noise {size:g}": {"size": size} for size in self.sizes}
        return {name: Reading(math.nan, parts=parts.get(name, about), note=why) for name in names}

    def _curvature(self, task: Task, kept: Masks, about: Mapping[str, float]) -> dict[str, Reading]:
        try:
            op = Operator(task, kept)
            top = top_eigenvalue(op, self.products, stream(self.seed, "flatness", "start"))
            sums = signed_sums(op, self.draws, stream(self.seed, "flatness", "signs"))
        except SecateurError as error:  # the rest needs no second derivative; the reader is told
            unknown = self._unknown(about, str(error))
            return {name: unknown[name] for name in ("top_eigenvalue", "trace")}
        parts = {**about, "residual": top.residual, "products": float(top.products)}
        ends, mean = (top.value - top.residual, top.value + top.residual), float(sums.mean())
        return {
            "top_eigenvalue": Reading(top.value, "", None, *ends, top.products, parts),
            "trace": Reading(mean, "", *spread_of_mean(sums), self.draws, {**about, "per weight": mean / op.size}),
        }

    def _sharpness(self, task: Task, kept: Masks, weights: Named, loss: float) -> Reading:
        gradients = task.gradients()
        slopes = {name: gradients[name] * mask for name, mask in kept.items()}
        length = float(torch.stack([g.double().square().sum() for g in slopes.values()]).sum().sqrt())
        parts, n = {"rho": self.rho, "gradient": length}, sum(n for _, _, n in task.batches())
        if not length:
            return Reading(0.0, n=n, parts=parts, note="the gradient is exactly zero, so there is no step to take")
        rise = mean_loss(task, _moved(weights, slopes, self.rho / length)) - loss
        return Reading(rise, n=n, parts=parts, note="" if math.isfinite(rise) else "the loss there is not finite")

    def _noise(self, task: Task, kept: Masks, weights: Named, loss: float) -> dict[str, Reading]:
        rises = torch.full((self.draws, len(self.sizes)), math.nan, dtype=torch.float64)
        for draw in range(self.draws):
            noise = filter_noise(weights, kept, self.seed, draw)
            for i, size in enumerate(self.sizes):
                both = [mean_loss(task, _moved(weights, noise, way)) if noise else loss for way in (size, -size)]
                rises[draw, i] = sum(both) / 2 - loss
        return {f"noise {size:g}": _rise(rises[:, i], size) for i, size in enumerate(self.sizes)}


def _moved(weights: Named, by: Named, length: float) -> Named:
    return {name: weights[name] + length * step for name, step in by.items()}


def _rise(values: Tensor, size: float) -> Reading:
    wrong = int((~values.isfinite()).sum())
    if wrong:
        note = f"{wrong:,} of {len(values):,} draws gave a loss that is not finite"
        return Reading(math.nan, n=len(values), parts={"size": size}, note=note)
    return Reading(float(values.mean()), "", *spread_of_mean(values), len(values), {"size": size})
