"""Linear mode connectivity: how far the error rises on the straight line between two networks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from secateur.core.errors import UsageError
from secateur.core.masks import Masks
from secateur.core.names import Named, unwrap
from secateur.core.reading import Paper, Reading
from secateur.core.sockets import Probe
from secateur.core.task import Batch, Task
from secateur.linalg.alignment import tensors_of
from secateur.probes._line import Point, along, heights
from secateur.probes._other import Other, check_zeros, tensors_like
from secateur.probes._still import check_whole, first_examples, unchanged
from secateur.surgery.symmetry import align


@dataclass(frozen=True)
class Connectivity(Probe):
    """The barrier between this network and another of the same architecture.

    ``E(alpha)`` is the error (per cent of wrong answers, of classifiers) or the mean loss with the weights
    ``(1 - alpha) own + alpha other``. With ``baseline = "mean"`` the value is Frankle's instability,
    ``max E - (E(0) + E(1)) / 2``; with ``"line"`` it is ``max [E(alpha) - (1 - alpha) E(0) - alpha E(1)]``. The maximum
    is over ``points`` evenly spaced ones, the ends among them, so the value is at least 0. Errors are in points, losses
    in the loss's own unit. Two training runs from one state count as stable below 2 points of error.

    Running statistics of BatchNorm that are interpolated too give barriers that are not there; they are taken anew at
    every point, the ends too. Counters and other whole numbers are not interpolated. With ``masks`` both networks must
    be zero wherever these prune, so that all of the line is.

    Parts: ``error:ALPHA`` and ``loss:ALPHA`` of each point; ``error above mean``, ``error above line``, the same of the
    loss; ``at``, the alpha of the highest value; ``distance``, Euclidean, of the parameters.

    Args:
        other: the other network: a module, a ``.safetensors`` file, or a step's folder. None compares the network with
            itself: the value is 0, and the note says so.
        points: points on the line, 2 or more.
        of: ``"error"``, or ``"loss"`` for networks that are no classifiers; errors are not counted then.
        baseline: ``"mean"`` of the ends, or the ``"line"`` between them.
        batchnorm: ``"estimated"`` anew at every point, or ``"interpolated"``.
        data: batches to estimate from, of the training data; by default those that the error is measured on, whose
            targets are not looked at.
        aligned: permute the other network's hidden units first so that its weights fit this one's best, which does not
            change what it computes (Ainsworth, Hayase, Srinivasa, arXiv:2209.04836); needs scipy.

    Raises:
        UsageError: when ``points`` is below 2.
        FileError: when the other network cannot be read.
        ModelError: when it is of another architecture.
        MaskError: when either network is not zero where ``masks`` prune.
        DataError: when the data is empty or spent, or holds no classes while errors are asked for.

    Cost: ``points`` forward passes over the data, and as many over ``data`` with BatchNorm; aligned also a trace and
    an assignment of O(units³) for each group of units and sweep.
    """

    other: Other = None
    points: int = 30
    of: Literal["error", "loss"] = "error"
    baseline: Literal["mean", "line"] = "mean"
    batchnorm: Literal["estimated", "interpolated"] = "estimated"
    data: Iterable[Batch] | None = None
    aligned: bool = False

    paper = Paper(
        "Linear Mode Connectivity and the Lottery Ticket Hypothesis",
        "Frankle, Dziugaite, Roy, Carbin",
        2020,
        "arXiv:1912.05671",
        differs="compares any two networks, not only children of one state; also gives the loss and the other baseline",
    )

    def __post_init__(self) -> None:
        check_whole("points", self.points)
        if self.points < 2:
            raise UsageError("points=1 leaves out one of the ends; write `points = 30`.")

    def __call__(self, task: Task, masks: Masks | None = None) -> Reading:
        """The barrier."""
        if masks is not None:
            masks.check(task.model)
        with unchanged():
            first = {name: tensor.detach() for name, tensor in tensors_of(task.model).items()}
            second = self._second(task, masks, first)
            count = 2 if self.other is None else self.points
            alphas = [i / (count - 1) for i in range(count)]
            wrong = self.of == "error"
            points = along(task, first, second, alphas, wrong, self.batchnorm == "estimated", self.data)
            examples = sum(n for _, _, n in task.batches())
        return self._reading(task, points, _distance(task, first, second), examples)

    def _second(self, task: Task, masks: Masks | None, first: Named) -> Named:
        if self.other is None:
            return first
        second = tensors_like(self.other, task.model)
        if self.aligned:
            second = align(task.model, second, first_examples(task, 2)).state
        if masks is not None:
            check_zeros(second, masks)
        return second

    def _reading(self, task: Task, points: list[Point], distance: float, examples: int) -> Reading:
        curves = {"error": lambda p: p.error, "loss": lambda p: p.loss}
        if self.of == "loss":
            del curves["error"]
        parts: dict[str, float] = {}
        for name, of in curves.items():
            parts |= {f"{name}:{point.alpha:.4g}": of(point) for point in points}
            found = heights(points, of)
            parts |= {f"{name} above mean": found.mean, f"{name} above line": found.line}
        top = heights(points, curves[self.of])
        parts |= {"at": top.at, "distance": distance}
        value = top.mean if self.baseline == "mean" else top.line
        ends = "mean of the ends" if self.baseline == "mean" else "line between the ends"
        note = f"highest {self.of} on the line less the {ends}"
        if self.other is None:
            note = "no other network is named (`other`), so the network was compared with itself"
        return Reading(value, "points" if self.of == "error" else "", n=examples, parts=parts, note=note)


def _distance(task: Task, first: Named, second: Named) -> float:
    """Euclidean distance of the parameters."""
    names = dict(unwrap(task.model).named_parameters())
    return sum(float((first[name].double() - second[name].double()).square().sum()) for name in names) ** 0.5
