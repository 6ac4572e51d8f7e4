"""Sparse double descent: test error and learning distance along a sweep of sparsities, trained on noisy labels.

He, Xie, Zhu, Qin, "Sparse Double Descent: Where Network Pruning Aggravates Overfitting", ICML 2022, arXiv:2206.08684.
With some training labels wrong, a network that is pruned further and further first overfits more (*critical*), then can
no longer fit the wrong labels and tests better (*sweet*), then fits nothing (*collapsed*).

The parts: :func:`secateur.engine.studies.label_noise.corrupt` makes training labels wrong; :func:`sweep` prunes a share
of what is left and trains again, round after round; :func:`measure` gives the figures of one round, of the last step
and never of the best epoch, which would hide the effect; :func:`phases` finds the phases and
:func:`rank_correlation` says how well the learning distance follows the test error. Augmentation weakens memorising,
so a study of it trains without.

Where this differs, or is unverified. The distance is that of the surviving
parameters, biases included, and not squared, as their helper has it. Their gradient criterion takes one batch in
training mode; the criteria here take the data they are given in evaluation mode. Rewinding the rate begins the whole
schedule anew. Fine-tuning and rewinding the rate measure the distance from the dense network's beginning, which we
could not verify.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from secateur.core.choose import choose, scores_of
from secateur.core.errors import DataError, UsageError, nearest
from secateur.core.losses import CrossEntropy
from secateur.core.masks import Masks
from secateur.core.sockets import Criterion
from secateur.core.task import Batch, Task
from secateur.criteria.magnitude import Magnitude
from secateur.data import Loader
from secateur.engine.folder import WEIGHTS
from secateur.engine.studies.label_noise import Corrupted
from secateur.engine.studies.rewind import Round, Way, fewer, train_from, train_to
from secateur.probes.accuracy import answers
from secateur.probes.learning_distance import LearningDistance

Retrain = Literal["lottery", "fine-tune", "rate", "scratch"]


@dataclass(frozen=True)
class Retraining:
    """What a pruned network is trained from.

    ``"lottery"``: survivors are set back to step ``rewind`` of the dense network. ``"fine-tune"``: they go on from
    their trained values at the constant rate ``lr``. ``"rate"``: they go on from their trained values through the whole
    schedule again. ``"scratch"``: they begin at other initial weights.

    Args:
        kind: one of the four.
        rewind: for ``"lottery"``; the authors take step 1000.
        lr: for ``"fine-tune"``.
        epochs: for ``"fine-tune"``; 0 for as many as the dense network had.
        draw: for ``"scratch"``: a fresh network, given the number of the round.

    Raises:
        UsageError: for another kind, or ``rewind`` or ``draw`` with a kind that does not use it.
    """

    kind: Retrain = "lottery"
    rewind: int = 0
    lr: float = 1e-3
    epochs: int = 0
    draw: Callable[[int], nn.Module] | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Retrain):
            raise UsageError(f"no retraining is called {self.kind!r}. {nearest(str(self.kind), get_args(Retrain))}")
        if self.rewind and self.kind != "lottery":
            raise UsageError(f"rewind={self.rewind} is for 'lottery'; {self.kind!r} sets nothing back to a step.")
        if (self.draw is None) == (self.kind == "scratch"):
            has = "needs `draw`, which gives a fresh network" if self.draw is None else "takes no `draw`; leave it out"
            raise UsageError(f"retraining of kind {self.kind!r} {has}.")


@dataclass(frozen=True)
class Level(Round):
    """A finished round of :func:`sweep`.

    Args:
        began: file of the weights that the learning distance is measured from.
    """

    began: Path


def sweep(
    model: nn.Module,
    way: Way,
    folder: Path,
    *,
    rounds: int,
    share: float = 0.2,
    criterion: Criterion | None = None,
    retraining: Retraining | None = None,
    examples: Iterable[Batch] = (),
) -> Iterator[Level]:
    """Train, prune a share of what is left over all layers together, train again, and so on.

    With magnitude and ``"lottery"`` the rounds are those of ``prune_and_rewind(..., scope="global")``.

    Args:
        model: the network at its initial weights; it stays as it is.
        way: how every round is trained.
        folder: of the study; finished rounds in it are read.
        rounds: prunings.
        share: of what is left that each round prunes.
        criterion: which weights go, judged at the end of training; magnitude by default.
        retraining: what the pruned network is trained from; the initial weights by default.
        examples: batches for criteria that look at data.

    Yields:
        Every round once it is trained, the dense one first.

    Raises:
        SecateurError: as the functions of the parts.

    Cost: ``rounds + 1`` trainings and as many scores.
    """
    criterion, how = criterion or Magnitude(), retraining or Retraining()
    task = Task(model, way.loss or CrossEntropy(), examples)
    masks = Masks.dense(model, way.step.only, way.step.skip)
    fewer(model, masks, share, "global")  # a wrong share is told before anything is trained
    began = start = folder / f"start-{how.rewind}"
    train_to(copy.deepcopy(model), way, start, how.rewind, masks)
    for number in range(rounds + 1):
        place = folder / f"round-{number}"
        net = train_from(start, model, way, place, masks)
        yield Level(number, net, masks, place, began / WEIGHTS)
        if number < rounds:
            masks = pruned(replace(task, model=net), masks, share, criterion)
            way, start = _next(net, way, how, number + 1, folder, start)
            began = start if how.kind == "scratch" else began


def pruned(task: Task, masks: Masks, share: float, criterion: Criterion) -> Masks:
    """Masks without the lowest scores of what is left, over all tensors together.

    Args:
        task: the trained network, its loss, and data when the criterion looks at any.
        masks: what is left.
        share: of what is left; ``n - round(share n)`` stay.
        criterion: scores; higher = keep.

    Raises:
        SecateurError: as the criterion does, and for a share that is not in 0 to 1.
    """
    if isinstance(criterion, Magnitude):
        return fewer(task.model, masks, share, "global")
    if not 0 <= share < 1:
        raise UsageError(f"share={share!r} must be at least 0 and below 1; write `share = 0.2`.")
    scores = {
        name: score.masked_fill(~masks[name].to(score.device), torch.finfo(score.dtype).min)
        for name, score in scores_of(criterion, task, masks).items()
    }
    return choose(scores, masks.kept - round(share * masks.kept)).to(next(iter(masks.values())).device)


def reinitialised(level: Round, fresh: nn.Module, way: Way, folder: Path) -> nn.Module:
    """The ablation: another network of the architecture trained under a round's masks, in evaluation mode.

    Args:
        level: gives the masks.
        fresh: at other initial weights; it stays as it is.
        way: how it is trained.
        folder: of this training, which is read when it is finished.
    """
    net = copy.deepcopy(fresh)
    level.masks.apply_(net)
    train_to(net, way, folder, masks=level.masks)
    return net


@dataclass(frozen=True)
class Point:
    """The figures of one round; errors in per cent.

    Args:
        number: of the round.
        density: kept of what may be pruned, 0 to 1.
        test: error on test examples, whose labels are clean.
        train: error on training examples by the labels that were trained on.
        clean: error on those training examples whose label is right; NaN when there is none.
        noisy: error by the wrong labels on those whose label is wrong: 0 when all are memorised; NaN without any.
        distance: learning distance of the surviving parameters.
    """

    number: int
    density: float
    test: float
    train: float
    clean: float
    noisy: float
    distance: float


def measure(level: Level, data: Corrupted, batch: int = 1000, **scale: Any) -> Point:
    """The figures of one round.

    Args:
        level: of :func:`sweep`.
        data: what it was trained on, with clean test labels.
        batch: examples in a batch.
        **scale: ``mean`` and ``std`` of the loader.

    Cost: one forward pass over training and test examples.
    """
    parts = (data.data.test, data.data.train)
    tasks = [Task(level.net, CrossEntropy(), Loader(part, batch, **scale)) for part in parts]
    test, train = (answers(task).right for task in tasks)
    wrong = data.wrong.cpu()
    distance = LearningDistance(level.began)(tasks[0], level.masks).value
    return Point(
        level.number, level.masks.kept / level.masks.total, _error(test), _error(train), _error(train[~wrong]),
        _error(train[wrong]), distance,
    )  # fmt: skip


@dataclass(frozen=True)
class Phases:
    """Where a curve of errors rises and falls, by place in the curve.

    ``light`` runs up to the last level before the peak that is about as good as the dense network, ``critical`` from
    there to the peak, ``sweet`` on to the valley, ``collapsed`` behind it.

    Args:
        light: places; so for the others, and each may be empty.
        critical: with the peak, unless that is the dense network.
        sweet: with the valley.
        collapsed: the rest.
        peak: where the deepest fall begins.
        valley: where it ends.
        rise: error at the peak minus that of the dense network.
        fall: error at the peak minus that at the valley; 0 when the error never falls.
    """

    light: range
    critical: range
    sweet: range
    collapsed: range
    peak: int
    valley: int
    rise: float
    fall: float


def phases(errors: Sequence[float], tolerance: float = 0.5) -> Phases:
    """Phases of a curve: peak and valley are the two ends of its deepest fall.

    That is a local maximum and then a minimum, however high the error climbs in the end.

    Args:
        errors: test errors in per cent by rising sparsity, the dense network first.
        tolerance: as good as the dense network is at most that many points worse.

    Raises:
        DataError: for fewer than three errors, or one that is not finite.
        UsageError: for a negative tolerance.
    """
    if len(errors) < 3 or not all(map(math.isfinite, errors)):
        raise DataError(f"phases need three or more finite errors, these are {list(errors)}; prune more rounds.")
    if not 0 <= tolerance < math.inf:
        raise UsageError(f"tolerance={tolerance!r} must be 0 or more points; write `tolerance = 0.5`.")
    pairs = [(i, j) for i in range(len(errors)) for j in range(i, len(errors))]
    peak, valley = max(pairs, key=lambda pair: errors[pair[0]] - errors[pair[1]])
    fine = [i for i in range(peak) if errors[i] <= errors[0] + tolerance]
    light = fine[-1] + 1 if fine else 1
    return Phases(
        range(light), range(light, peak + 1), range(max(light, peak + 1), valley + 1),
        range(max(light, valley + 1), len(errors)), peak, valley, errors[peak] - errors[0],
        errors[peak] - errors[valley],
    )  # fmt: skip


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's correlation, ties at their mean rank; of learning distance and test error it is above 0 in the paper.

    >>> round(rank_correlation([1.0, 2.0, 3.0, 4.0], [10.0, 30.0, 20.0, 40.0]), 6)
    0.8

    Raises:
        DataError: for lists of different lengths, or one whose values are all equal or not finite.
    """
    if len(one) != len(other):
        raise DataError(f"{len(one)} and {len(other)} values cannot be ranked together; give as many of both.")
    ranks = torch.stack([_ranks(one), _ranks(other)])
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Sequence[float]) -> Tensor:
    found = torch.tensor(values, dtype=torch.float64)
    different, place, count = found.unique(return_inverse=True, return_counts=True)
    if len(different) < 2 or not bool(found.isfinite().all()):
        raise DataError(f"{list(values)} has no order to compare; give finite values that are not all equal.")
    return (count.cumsum(0) - (count.double() - 1) / 2)[place]


def _next(net: nn.Module, way: Way, how: Retraining, number: int, folder: Path, start: Path) -> tuple[Way, Path]:
    """How the next round is trained, and the folder of the state that it begins at."""
    if how.kind == "lottery":
        return way, start
    if how.kind == "fine-tune":
        step = replace(way.step, lr=how.lr, schedule="constant", warmup=0.0, epochs=how.epochs or way.step.epochs)
        way = replace(way, step=step)
    begin = copy.deepcopy(net) if how.draw is None else how.draw(number)
    place = folder / f"begin-{number}"
    train_to(begin, way, place, 0)
    return way, place


def _error(right: Tensor) -> float:
    return 100 * (1 - int(right.sum()) / right.numel()) if right.numel() else math.nan
