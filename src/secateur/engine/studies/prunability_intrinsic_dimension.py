"""Prunability and intrinsic dimension: how far a network can be pruned, against how many dimensions its inputs have.

Ankner, Renda, Dziugaite, Frankle, Jin, "The Effect of Data Dimensionality on Neural Network Prunability", ICBINB
workshop at NeurIPS 2022, arXiv:2212.00291. The dimension is estimated by maximum likelihood (Levina & Bickel 2004),
with inverses averaged over points (MacKay & Ghahramani 2005).

The parts: :func:`intrinsic_dimension` estimates the dimension of any inputs; :func:`latent_data` makes data sets that
differ only in how many free variables lie behind the inputs; :func:`accuracy_curve` prunes iteratively;
:func:`prunability` reads the sparsity off a curve; :func:`relation` regresses the logarithm of the density that is
needed on the dimension, with an interval.

Unverified: of the paper we could read the abstract only, which asks whether dimension affects prunability and does not
answer, so data, pruning, tolerance and regression are our own choice, and either sign is a result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateur.core.errors import DataError, UsageError
from secateur.core.losses import CrossEntropy
from secateur.core.streams import stream
from secateur.core.task import Task
from secateur.data import Dataset, Loader, Split
from secateur.engine.studies.rewind import Way, prune_and_rewind
from secateur.probes.accuracy import Accuracy

_ROWS = 256
"""Points whose distances to all others are held at a time."""


@dataclass(frozen=True)
class Dimension:
    """An estimate of the intrinsic dimension.

    Args:
        value: from the mean of the inverses over points.
        arithmetic: mean of the estimates of single points, never below ``value``; infinite when a point has all its
            neighbours at one distance.
        k: neighbours.
        points: points it rests upon.
        copies: points left out because they are copies of others.
    """

    value: float
    arithmetic: float
    k: int
    points: int
    copies: int


def intrinsic_dimension(
    x: Tensor, k: Sequence[int] = (3, 5, 10, 20), copies: Literal["drop", "refuse"] = "drop"
) -> dict[int, Dimension]:
    """Maximum likelihood estimates of the dimension that points lie in, by number of neighbours.

    With ``T_j`` the distance to the j-th neighbour, the inverse estimate at a point is the mean of ``log(T_k / T_j)``
    over ``j < k``. It does not depend on rotation, shift, scale, or further constant columns. Estimates of more than
    about ten dimensions come out low unless points are many; noise of every pixel raises them to the number of pixels.

    Args:
        x: points ``(N, ...)``; everything behind the first dimension is one vector.
        k: numbers of neighbours, each 3 or more and below the number of different points.
        copies: of equal points keep one, or refuse them.

    Returns:
        An estimate for every k.

    Raises:
        UsageError: for a k out of range.
        DataError: for values that are not finite, for copies when they are refused, for points too close to tell apart,
            or when all neighbours lie at one distance.

    Cost: ``N² D`` differences in float64, without the faster product form, whose rounding is as large as the distances
    of close points; memory of 256 rows of distances. 5,000 points of 256 numbers take about five seconds on one core.
    """
    points, left_out = _different(x, copies)
    for number in k:
        if not 3 <= number < len(points):
            raise UsageError(
                f"k={number} neighbours of {len(points):,} different points; give 3 to {len(points) - 1:,}."
            )
    if not k:
        raise UsageError("k names no number of neighbours; write `k = (20,)`.")
    logs = _neighbours(points, max(k)).log()
    found = {}
    for number in k:
        inverse = (logs[:, number - 1 : number] - logs[:, : number - 1]).mean(1)  # equal distances give exactly 0
        middle = float(inverse.mean())
        if not middle > 0:
            raise DataError(
                f"every point has its {number} nearest neighbours at one distance, as on a lattice, which has no "
                "dimension by distances; take a larger k or a sample of the points."
            )
        found[number] = Dimension(1 / middle, float((1 / inverse).mean()), number, len(points), left_out)
    return found


def _different(x: Tensor, copies: str) -> tuple[Tensor, int]:
    """The different points as float64 vectors of moderate size, and how many were left out."""
    if copies not in ("drop", "refuse"):
        raise UsageError(f"copies={copies!r} must be 'drop' or 'refuse'.")
    if x.dim() < 2 or not x.numel():
        raise DataError(f"the points have shape {tuple(x.shape)}; give (N, ...) with one row a point.")
    rows = x.detach().flatten(1).double()
    bad = int((~rows.isfinite()).any(1).sum())
    if bad:
        raise DataError(f"{bad:,} of {len(rows):,} points hold NaN or infinity; mend or drop them.")
    points = rows.unique(dim=0)
    left_out = len(rows) - len(points)
    if left_out and copies == "refuse":
        raise DataError(
            f"{left_out:,} of {len(rows):,} points are copies of others, at distance 0; write `copies = 'drop'`."
        )
    power = torch.frexp(points.abs().amax()).exponent.clamp(-1022, 1022)
    return points * torch.exp2(-power.double()), left_out  # without rounding; squares of huge or tiny values fit then


def _neighbours(points: Tensor, k: int) -> Tensor:
    """Distances to the k nearest other points by rising distance, (N, k) float64."""
    nearest = torch.empty(len(points), k, dtype=torch.float64, device=points.device)
    for begin in range(0, len(points), _ROWS):
        rows = points[begin : begin + _ROWS]
        far = torch.cdist(rows, points, compute_mode="donot_use_mm_for_euclid_dist")
        own = torch.arange(len(rows), device=points.device)
        far[own, own + begin] = math.inf
        nearest[begin : begin + _ROWS] = far.topk(k, largest=False, sorted=True).values
    if not bool((nearest[:, 0] > 0).all()):
        raise DataError(
            f"{int((nearest[:, 0] == 0).sum()):,} points differ from a neighbour by too little for float64; round the "
            "points, so that these become copies."
        )
    return nearest


def latent_data(
    dimension: int,
    seed: int,
    *,
    ambient: int = 256,
    train: int = 5000,
    test: int = 2000,
    classes: int = 4,
    hidden: int = 128,
    bend: float = 1.0,
) -> Dataset:
    """Features made from normal latent variables by a random map, with labels that depend on the latent ones.

    ``z ~ N(0, I_d)``, ``x = B tanh(A z)`` and a score ``s = b cos(C z + p)`` with normal ``A, B, C, b`` and uniform
    phases; the label is which of ``classes`` equally full parts of the training scores holds ``s``. So the number of
    features, of examples and the balance of classes do not depend on the dimension. Features have mean 0 each and
    variance 1 all together.

    Args:
        dimension: free variables, 1 to ``min(ambient, hidden)``.
        seed: of map, labels and examples.
        ambient: features.
        train: training examples.
        test: test examples.
        classes: classes.
        hidden: hidden units of both maps.
        bend: standard deviation of ``C z`` in radians: more makes labels harder to learn, which
            serves to make the dense accuracy alike over dimensions.

    Returns:
        Data of kind ``"features"``.

    Raises:
        UsageError: for a number out of range.
    """
    for option, value, least in (("dimension", dimension, 1), ("classes", classes, 2), ("train", train, classes),
                                 ("test", test, 1)):  # fmt: skip
        if value < least:
            raise UsageError(f"{option}={value}: give {least} or more.")
    if dimension > min(ambient, hidden):
        raise UsageError(f"dimension={dimension} does not fit {ambient} features of {hidden} hidden units; widen both.")
    if not 0 < bend < math.inf:
        raise UsageError(f"bend={bend!r} must be positive; write `bend = 1.0`.")

    def drawn(name: str, *shape: int) -> Tensor:
        return torch.randn(shape, generator=stream(seed, "latent", name, dimension), dtype=torch.float64)

    z = drawn("z", train + test, dimension)
    x = (z @ drawn("A", dimension, hidden) / math.sqrt(dimension)).tanh() @ drawn("B", hidden, ambient)
    x = x - x[:train].mean(0)
    x = (x / x[:train].square().mean().sqrt()).float()
    phase = 2 * math.pi * torch.rand(hidden, generator=stream(seed, "latent", "p", dimension), dtype=torch.float64)
    score = (bend * z @ drawn("C", dimension, hidden) / math.sqrt(dimension) + phase).cos() @ drawn("b", hidden)
    inner = torch.arange(1, classes, dtype=torch.float64) / classes
    y = torch.bucketize(score, score[:train].quantile(inner))
    names = tuple(map(str, range(classes)))
    return Dataset(f"latent{dimension}", Split(x[:train], y[:train]), Split(x[train:], y[train:]), names, "features")


@dataclass(frozen=True)
class Curve:
    """Accuracies along one iterative pruning.

    Args:
        sparsities: pruned of what may be pruned, rising from 0.
        accuracies: per cent right, in the same order.
    """

    sparsities: tuple[float, ...]
    accuracies: tuple[float, ...]


def accuracy_curve(
    model: nn.Module, way: Way, folder: Path, test: Split, *, rounds: int, batch: int = 1000,
    scale: Mapping[str, Any] | None = None, **options: Any,
) -> Curve:  # fmt: skip
    """Iterative magnitude pruning with rewinding, and the accuracy after every round.

    Args:
        model: the network at its initial weights; it stays as it is.
        way: how every round is trained.
        folder: of the study; finished rounds in it are read.
        test: examples that accuracy is measured on.
        rounds: prunings.
        batch: examples in a batch of evaluation.
        scale: ``mean`` and ``std`` of the loader of ``test``.
        **options: of :func:`secateur.engine.studies.rewind.prune_and_rewind`, such as ``rewind`` and ``share``.

    Raises:
        SecateurError: as the functions of the parts.

    Cost: ``rounds + 1`` trainings.
    """
    loader = Loader(test, batch, **(scale or {}))
    sparsities, accuracies = [], []
    for found in prune_and_rewind(model, way, folder, rounds=rounds, **options):
        sparsities.append(found.masks.sparsity)
        accuracies.append(Accuracy()(Task(found.net, CrossEntropy(), loader)).value)
    return Curve(tuple(sparsities), tuple(accuracies))


@dataclass(frozen=True)
class Prunability:
    """How far a network can be pruned.

    Args:
        sparsity: the largest at which it and all smaller ones match the dense accuracy.
        loosest: the largest that matches at all, whatever lies between.
        place: of ``sparsity`` in the curve.
        last: whether the curve ended there, so that the true value may be larger.
        tolerance: points of accuracy that count as matching.
    """

    sparsity: float
    loosest: float
    place: int
    last: bool
    tolerance: float

    @property
    def density(self) -> float:
        """What has to stay: ``1 - sparsity``."""
        return 1 - self.sparsity


def prunability(curve: Curve, tolerance: float) -> Prunability:
    """The sparsity that a curve reaches without losing more than the tolerance.

    Args:
        curve: the dense network first.
        tolerance: points of accuracy. Below the spread between seeds the answer is random.

    Raises:
        DataError: for a curve that does not begin at 0 or rise, has values that are not finite, or other lengths.
        UsageError: for a tolerance that is negative or not finite.
    """
    if not 0 <= tolerance < math.inf:
        raise UsageError(f"tolerance={tolerance!r} must be 0 or more points; write `tolerance = 1.0`.")
    s, a = curve.sparsities, curve.accuracies
    rising = all(one < two for one, two in zip(s, s[1:], strict=False))
    if not s or len(s) != len(a) or s[0] != 0 or not rising or not s[-1] <= 1 or not all(map(math.isfinite, a)):
        raise DataError(
            f"a curve needs sparsities that rise from 0 to at most 1 and a finite accuracy for each; these are "
            f"{list(s)} and {list(a)}."
        )
    fine = [value >= a[0] - tolerance for value in a]
    place = fine.index(False) - 1 if False in fine else len(fine) - 1
    return Prunability(s[place], max(v for v, ok in zip(s, fine, strict=True) if ok), place, place == len(s) - 1,
                       tolerance)  # fmt: skip


@dataclass(frozen=True)
class Relation:
    """``log(density) = constant + slope * dimension + covariates``, by least squares.

    Args:
        slope: of the natural logarithm of the density that has to stay, for one dimension more; above 0: more
            dimensions, less prunable.
        low: end of the bootstrap interval of the slope.
        high: other end.
        level: of the interval.
        constant: the constant.
        covariates: slopes of the covariates.
        runs: how many.
        draws: resamples that had a slope.
    """

    slope: float
    low: float
    high: float
    level: float
    constant: float
    covariates: Mapping[str, float]
    runs: int
    draws: int


def relation(
    dimensions: Sequence[float],
    densities: Sequence[float],
    covariates: Mapping[str, Sequence[float]] | None = None,
    *,
    level: float = 0.9,
    draws: int = 2000,
    seed: int = 0,
) -> Relation:
    """Does the density that has to stay depend on the dimension? Runs are resampled for the interval.

    Args:
        dimensions: estimated dimension of the data of each run.
        densities: ``1 - sparsity`` that each run can be pruned to, above 0.
        covariates: further columns by name, such as the dense accuracy.
        level: of the percentile interval, between 0 and 1.
        draws: resamples; those in which the columns do not determine the slope are left out.
        seed: of the resamples.

    Raises:
        UsageError: for a level that is not between 0 and 1, or no draws.
        DataError: for columns of different lengths, values that are not finite, densities that are not positive, or
            columns that do not determine the slope, as when all runs have one dimension.
    """
    if not 0 < level < 1 or draws < 1:
        raise UsageError(f"level={level!r} must lie between 0 and 1 and draws={draws} be 1 or more.")
    columns = {"dimensions": dimensions, "densities": densities, **(covariates or {})}
    for name, values in columns.items():
        least = 0.0 if name == "densities" else -math.inf
        if len(values) != len(dimensions) or not all(least < v < math.inf for v in values):
            raise DataError(f"{name} must hold a finite{' positive' * (least == 0)} value for every run; it holds "
                            f"{list(values)}.")  # fmt: skip
    table = [torch.tensor(values, dtype=torch.float64) for name, values in columns.items() if name != "densities"]
    design = torch.stack([torch.ones(len(dimensions), dtype=torch.float64), *table], 1)
    target = torch.tensor(densities, dtype=torch.float64).log()
    fit = _fit(design, target)
    if fit is None:
        raise DataError(f"{len(dimensions)} runs do not tell {', '.join(c for c in columns if c != 'densities')} apart "
                        "from each other and from a constant; add runs, or leave a column out.")  # fmt: skip
    random, slopes = stream(seed, "relation"), []
    for _ in range(draws):
        picked = torch.randint(len(target), (len(target),), generator=random)
        again = _fit(design[picked], target[picked])
        slopes += [] if again is None else [again[1]]
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    spread = torch.tensor(slopes, dtype=torch.float64).quantile(ends).tolist() if slopes else [math.nan] * 2
    others = dict(zip(covariates or {}, fit[2:], strict=True))
    return Relation(fit[1], spread[0], spread[1], level, fit[0], others, len(target), len(slopes))


def _fit(design: Tensor, target: Tensor) -> list[float] | None:
    """Coefficients of least squares; None when they are not determined."""
    size = design.square().sum(0).sqrt()
    if not bool((size > 0).all()) or int(torch.linalg.matrix_rank(design / size)) < design.shape[1]:
        return None
    return (torch.linalg.lstsq(design / size, target[:, None]).solution[:, 0] / size).tolist()
