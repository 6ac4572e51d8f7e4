"""How a pruned network transfers: a new head on frozen features, or the whole backbone trained further under its masks.

Iofinova, Peste, Kurtz, Alistarh, How Well Do Sparse ImageNet Models Transfer?, CVPR 2022, arXiv:2111.13445 (code:
IST-DASLab/sparse-imagenet-transfer). A network trained and pruned on one task gets a new dense head for another.
*Linear*: the features before the head are taken once, in evaluation mode, and the head alone is trained on them.
*Full*: everything is trained, pruned weights stay zero. Backbones are compared by the relative increase of the error,
``r = (err_sparse - err_dense) / err_dense``, for each task and in the mean.

Where this differs: linear training is the loop's own (SGD, Adam) on cached features, so that it equals training behind
a frozen backbone; the authors' speed with a sparse inference engine is not measured here; their pretrained networks,
data sets and the resizing for RigL are left out. Every training has a folder and is read when it is finished; features
are taken anew then, which is one forward pass.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core import streams
from secateur.core.errors import DataError, MaskError, ModelError, UsageError
from secateur.core.losses import CrossEntropy
from secateur.core.masks import Masks
from secateur.core.names import unwrap
from secateur.core.task import Task
from secateur.data import Loader, Split
from secateur.engine.last_layer import last_layer
from secateur.engine.studies.rewind import Way, train_to
from secateur.engine.training_cost import TrainingMacs, forward
from secateur.probes.accuracy import Accuracy


@dataclass(frozen=True, eq=False)
class Backbone:
    """A network that was trained on one task, for use on others; made by :func:`backbone`.

    Args:
        net: the network with its old head, in evaluation mode.
        masks: which weights of the backbone are kept; the head is not among them.
        head: name of the last linear layer.
        mean: of the channels of its training inputs, or None.
        std: of the channels, or None.
    """

    net: nn.Module
    masks: Masks
    head: str
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


@dataclass(frozen=True)
class Increase:
    """How much more a sparse backbone errs than the dense one.

    Args:
        tasks: relative increase of the error by task; below 0 where the sparse one errs less.
        mean: over tasks. It hides hard tasks, so look at ``tasks`` too.
    """

    tasks: dict[str, float]
    mean: float


class Frozen(nn.Module):
    """A network of which only the head is trained: the rest stays in evaluation mode and gets no gradient.

    Args:
        net: the network, changed in place: its parameters outside the head no longer require gradients.
        head: name of the linear layer that is trained.
    """

    def __init__(self, net: nn.Module, head: str) -> None:
        super().__init__()
        self.net, self.head = net, head
        net.requires_grad_(False)
        net.get_submodule(head).requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> Frozen:
        """Switch the head alone; statistics of BatchNorm and dropout stand still."""
        super().train(mode)
        self.net.eval()
        self.net.get_submodule(self.head).train(mode)
        return self

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """What the network gives."""
        return self.net(*inputs, **options)


def backbone(net: nn.Module, loader: Loader, masks: Masks | None = None, *, infer: bool = False) -> Backbone:
    """A network as the start of transfers.

    Args:
        net: trained, with the head of its own task; it is copied.
        loader: batches of its own task, for the scale of the inputs; the first one is looked at.
        masks: under which it was trained; those of the head are left out.
        infer: allow masks to be read off the zeros when there are none. A kept weight that is zero by chance then
            counts as pruned.

    Raises:
        MaskError: without masks and consent to infer them, for masks of another network or of other shapes, or when
            pruned weights are not zero.
        ModelError: when the network's output is not that of a linear layer.
    """
    net = copy.deepcopy(unwrap(net)).eval()
    head = last_layer(Task(net, CrossEntropy(), [next(loader.epoch(0))]))
    if masks is None:
        if not infer:
            raise MaskError(
                "the backbone came without masks; pass `masks=`, or `infer=True` to take its zeros for pruned weights."
            )
        masks = Masks.from_zeros(net)
    masks = Masks({name: mask for name, mask in masks.items() if not name.startswith(f"{head}.")})
    masks.check(net)
    mean, std = (None if value is None else tuple(value) for value in (loader.mean, loader.std))
    return Backbone(net, masks, head, mean, std)


def with_head(found: Backbone, outputs: int, seed: int) -> nn.Module:
    """A copy with a new dense head, whose weights are a function of the seed.

    Raises:
        ModelError: for fewer than two outputs.
    """
    if outputs < 2:
        raise ModelError(f"a head with {outputs} outputs; a task has at least 2 classes.")
    net = copy.deepcopy(found.net)
    old = _linear(net, found.head)
    with streams.seeded(seed, "head", outputs):
        new = nn.Linear(old.in_features, outputs, old.bias is not None, dtype=old.weight.dtype)
    _put(net, found.head, new.to(old.weight.device))
    return net


def features(found: Backbone, split: Split, batch: int = 500) -> Split:
    """The inputs of the head for every example, in the order of the split, with its targets.

    Args:
        found: the backbone; its network is as it was.
        split: examples, scaled here as the backbone's own were.
        batch: examples at once.

    Returns:
        Features (N, width) and targets (N,).

    Raises:
        ModelError: when the head is called more than once a batch, or on other than one row an example.

    Cost: one forward pass; memory of the features.
    """
    head = _linear(found.net, found.head)
    dtype = head.weight.dtype
    loader = Loader(split, batch, mean=found.mean, std=found.std, dtype=dtype)

    def fold(_: str, sofar: list[Tensor] | None, inputs: Any, __: Any) -> list[Tensor]:
        return [*(sofar or ()), inputs[0].detach().clone()]

    task = Task(found.net, CrossEntropy(), loader)
    rows = torch.cat(task.collect({found.head: head}, fold)[found.head])
    if rows.shape != (len(split), head.in_features):
        raise ModelError(
            f"the head `{found.head}` gets {tuple(rows.shape)} for {len(split)} examples; linear transfer needs one "
            f"row of {head.in_features} for each. Train the whole network instead."
        )
    return Split(rows, split.y)


def linear(found: Backbone, way: Way, folder: Path, outputs: int, *, cached: bool = True) -> nn.Module:
    """Train a new head on frozen features.

    Args:
        found: the backbone.
        way: how, on images of the new task. The head starts from ``way.seed``. Its ``evaluate`` is called without
            cached features only, since it judges a whole network.
        folder: of the training.
        outputs: classes of the new task.
        cached: take the features once and train on them. Without it every batch goes through the frozen network, which
            is slower, gives the same and allows augmentation.

    Returns:
        The network with its new head, in evaluation mode; all else, buffers included, is to the bit the backbone's.

    Raises:
        UsageError: for augmentation with cached features.
        DataError: when the loader scales its inputs otherwise than the backbone's own.
        ModelError: when the labels do not fit the outputs.
        FileError: when the folder belongs to another training.

    Cost: one forward pass over the images and the training of one linear layer.
    """
    loader = _checked(found, way, outputs)
    net = with_head(found, outputs, way.seed)
    if not cached:
        frozen = Frozen(net, found.head)
        train_to(frozen, way, folder, masks=_named(found.masks, "net."))
        return net.requires_grad_(True).eval()
    if loader.augment != "none":
        raise UsageError(
            f"the loader augments ({loader.augment!r}), and cached features are those of images as they are; write "
            "augment='none', or cached=False."
        )
    taken = features(found, loader.split)
    batches = Loader(
        taken, loader.batch, shuffle=loader.shuffle, seed=loader.seed, drop_last=loader.drop_last, dtype=taken.x.dtype
    )
    alone = _Head(_linear(net, found.head), taken.x)
    masks = Masks({"linear.weight": torch.ones_like(alone.linear.weight, dtype=torch.bool)})
    train_to(alone, replace(way, loader=batches, evaluate=None), folder, masks=masks)
    return net.eval()


def full(found: Backbone, way: Way, folder: Path, outputs: int) -> nn.Module:
    """Train everything further under the backbone's masks, with a new dense head.

    Args:
        found: the backbone.
        way: how, on images of the new task. The head starts from ``way.seed``; decay and momentum move no pruned
            weight.
        folder: of the training.
        outputs: classes of the new task.

    Returns:
        The trained network, in evaluation mode.

    Raises:
        DataError: when the loader scales its inputs otherwise than the backbone's own.
        ModelError: when the labels do not fit the outputs.
        FileError: when the folder belongs to another training.
    """
    _checked(found, way, outputs)
    net = with_head(found, outputs, way.seed)
    train_to(net, way, folder, masks=found.masks)
    return net.eval()


def score(net: nn.Module, split: Split, found: Backbone, per_class: bool = False, batch: int = 1000) -> float:
    """Per cent of right answers, or the mean of those of each class, as the data set prescribes."""
    loader = Loader(split, batch, mean=found.mean, std=found.std)
    reading = Accuracy()(Task(net, CrossEntropy(), loader))
    if not per_class:
        return reading.value
    return sum(reading.parts.values()) / len(reading.parts)


def increase(dense: Mapping[str, float], sparse: Mapping[str, float]) -> Increase:
    """Relative increase of the error by task.

    Args:
        dense: per cent of right answers of the dense backbone by task.
        sparse: of the sparse one, on the same tasks.

    Raises:
        UsageError: when the tasks differ, there is none, a figure is no per cent, or the dense backbone makes no error.
    """
    if not dense or dense.keys() != sparse.keys():
        raise UsageError(f"tasks {sorted(dense)} of the dense backbone and {sorted(sparse)} of the sparse one differ.")
    for name, value in [*dense.items(), *sparse.items()]:
        if not 0 <= value <= 100:
            raise UsageError(f"the accuracy on {name!r} is {value!r}; it must be per cent, 0 to 100.")
    faultless = [name for name, value in dense.items() if value == 100]
    if faultless:
        raise UsageError(
            f"the dense backbone makes no error on {', '.join(faultless)}, so a relative increase is not defined; "
            "leave those tasks out and report their accuracies."
        )
    tasks = {name: (value - sparse[name]) / (100 - value) for name, value in dense.items()}
    return Increase(tasks, sum(tasks.values()) / len(tasks))


def best_rate(rates: Sequence[float], trial: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """The learning rate whose trial scores highest, by the same search for every backbone and task.

    Args:
        rates: what is tried, the budget of the search; of equal scores the earlier rate is taken.
        trial: the score of a rate, higher = better, on held-out training examples (never on the test part).

    Returns:
        The rate, and the score of each.

    Raises:
        UsageError: when there is no rate, or one is tried twice.
        DataError: when a score is NaN.
    """
    if not rates or len(set(rates)) != len(rates):
        raise UsageError(f"the rates {list(rates)} are none or not all different; give each rate once.")
    scores = {rate: trial(rate) for rate in rates}
    odd = [rate for rate, value in scores.items() if math.isnan(value)]
    if odd:
        raise DataError(f"the trial with the rate {odd[0]:g} scored NaN; leave that rate out.")
    return max(rates, key=lambda rate: scores[rate]), scores


def only_classes(split: Split, classes: Sequence[int]) -> Split:
    """The examples of some classes, numbered from 0 in the order given.

    Raises:
        DataError: when a class has no example, or is named twice.
    """
    missing = [c for c in classes if not bool((split.y == c).any())]
    if missing or not classes or len(set(classes)) != len(classes):
        raise DataError(f"classes {list(classes)}: each must be named once and have examples; {missing} have none.")
    number = {c: i for i, c in enumerate(classes)}
    wanted = torch.isin(split.y, torch.tensor(list(classes), device=split.y.device))
    part = split.take(wanted.nonzero().flatten())
    return Split(part.x, torch.tensor([number[c] for c in part.y.tolist()], device=part.y.device))


def macs(found: Backbone, way: Way, outputs: int) -> dict[str, TrainingMacs]:
    """Multiply-adds of both kinds of transfer, ``"linear"`` (features included) and ``"full"``.

    A forward pass of every image once and three of the head for each step's examples, against three forward passes of
    the whole network for each; what pruned weights would cost is left out of ``sparse``.

    Raises:
        DataError: as :func:`linear`.
        ModelError: as :func:`linear`.
    """
    loader = _checked(found, way, outputs)
    net = with_head(found, outputs, way.seed)
    cost = forward(Task(net, CrossEntropy(), [next(loader.epoch(0))]), found.masks)
    each = len(loader.split) if not loader.drop_last else len(loader) * loader.batch
    seen = way.step.epochs * each
    head = 3 * seen * _linear(net, found.head).weight.numel()
    once = len(loader.split)
    return {
        "linear": TrainingMacs(cost.dense * once + head, cost.sparse * once + head, seen),
        "full": TrainingMacs(cost.dense_step * seen, cost.sparse_step * seen, seen),
    }


class _Head(nn.Module):
    """A head alone; the digest of its features makes a folder know which backbone and images it was trained for."""

    digest: Tensor

    def __init__(self, linear: nn.Linear, rows: Tensor) -> None:
        super().__init__()
        self.linear = linear
        sha = hashlib.sha256(rows.detach().cpu().contiguous().view(torch.uint8).numpy().data).digest()
        self.register_buffer("digest", torch.tensor(list(sha), dtype=torch.uint8, device=rows.device))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def _checked(found: Backbone, way: Way, outputs: int) -> Loader:
    """The loader of a transfer, which must fit the backbone and the new head."""
    loader = way.loader
    if not isinstance(loader, Loader):
        raise UsageError(f"the batches are of {type(loader).__name__}; a transfer needs a `secateur.data.Loader`.")
    for name in ("mean", "std"):
        own, given = getattr(found, name), getattr(loader, name)
        if own != (None if given is None else tuple(given)):
            raise DataError(
                f"the loader's {name} is {given}, the backbone was trained with {own}; scale the new images as those, "
                "or its features mean something else."
            )
    top = int(loader.split.y.max())
    if top >= outputs:
        raise ModelError(f"a head with {outputs} outputs for labels up to {top}; give it {top + 1}.")
    return loader


def _linear(net: nn.Module, head: str) -> nn.Linear:
    found = net.get_submodule(head)
    if not isinstance(found, nn.Linear):
        raise ModelError(f"the head `{head}` is {type(found).__name__}; it must be `nn.Linear`.")
    return found


def _put(net: nn.Module, head: str, new: nn.Linear) -> None:
    parent, _, name = head.rpartition(".")
    setattr(net.get_submodule(parent), name, new.train(net.training))


def _named(masks: Masks, prefix: str) -> Masks:
    return Masks({prefix + name: mask for name, mask in masks.items()})
