"""Label noise: training labels made wrong once, by a seed, while test labels stay clean.

The kinds of noise are those of He, Xie, Zhu, Qin, "Sparse Double Descent", ICML 2022, arXiv:2206.08684, and the uniform
replacement of the examples in their repository, of which one label in as many as there are classes is right by chance.
Noise is drawn for every label on its own, so realised rates vary as a binomial does. Their asymmetric pairs for each
data set are unverified: name the pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from secateur.core.errors import DataError, UsageError, nearest
from secateur.core.streams import stream
from secateur.data import Dataset, Split

Kind = Literal["symmetric", "pairflip", "asymmetric", "uniform"]


@dataclass(frozen=True)
class Noise:
    """How labels go wrong.

    ``"symmetric"``: with probability ``rate`` to another class, each as likely. ``"pairflip"``: to the next class, the
    last to class 0. ``"asymmetric"``: classes of ``similar`` to the class named there, others not at all.
    ``"uniform"``: the label is drawn anew from all classes, so ``rate / classes`` of the labels are drawn right.

    Args:
        kind: one of the four.
        rate: probability, 0 to 1.
        similar: for ``"asymmetric"``: from a class to the one it is mistaken for.

    Raises:
        UsageError: for another kind, a rate outside 0 to 1, or ``similar`` missing or of no use.
    """

    kind: Kind
    rate: float
    similar: Mapping[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UsageError(f"no noise is called {self.kind!r}. {nearest(str(self.kind), get_args(Kind))}")
        if not 0 <= self.rate <= 1:
            raise UsageError(f"the noise has rate={self.rate!r}; give a probability from 0 to 1, such as 0.2 for 20 %.")
        if bool(self.similar) != (self.kind == "asymmetric"):
            has = "needs `similar`, such as {7: 1}" if self.kind == "asymmetric" else "takes no `similar`; leave it out"
            raise UsageError(f"noise of kind {self.kind!r} {has}.")

    def matrix(self, classes: int) -> Tensor:
        """Probability that a label of class i (row) becomes j (column): float64 ``(classes, classes)``.

        Raises:
            UsageError: for fewer than two classes, or when ``similar`` names one that does not exist or itself.
        """
        if classes < 2:
            raise UsageError(f"{classes} classes have no wrong label; noise needs at least 2.")
        keep = torch.eye(classes, dtype=torch.float64)
        return (1 - self.rate) * keep + self.rate * self._elsewhere(keep)

    def _elsewhere(self, keep: Tensor) -> Tensor:
        """Where labels go that the noise takes hold of."""
        classes = len(keep)
        if self.kind == "uniform":
            return torch.full_like(keep, 1 / classes)
        if self.kind == "symmetric":
            return (1 - keep) / (classes - 1)
        if self.kind == "pairflip":
            return keep.roll(1, 1)
        for here, there in self.similar.items():
            if here == there or not (0 <= here < classes and 0 <= there < classes):
                raise UsageError(f"similar={{{here}: {there}}}: give two different classes from 0 to {classes - 1}.")
        moved = keep.clone()
        for here, there in self.similar.items():
            moved[here] = keep[there]
        return moved


@dataclass(frozen=True, eq=False)
class Corrupted:
    """Data whose training labels are partly wrong, beside the clean data.

    Args:
        data: with wrong training labels; test labels are clean.
        clean: the same examples with their own labels.

    Raises:
        DataError: when test labels differ, examples are not the same, or labels are not one number each.
    """

    data: Dataset
    clean: Dataset

    def __post_init__(self) -> None:
        for part, split in self.clean.splits():
            other: Split | None = getattr(self.data, part)
            if other is None or not (other.x is split.x or torch.equal(other.x, split.x)) or split.y.dim() != 1:
                raise DataError(
                    f"the {part} part of {self.data.name!r} must hold the clean part's examples in the same order, "
                    "with one label each; change labels only."
                )
            wrong = int((other.y != split.y).sum())
            if part != "train" and wrong:
                raise DataError(
                    f"{wrong:,} of {len(split):,} {part} labels of {self.data.name!r} are not the clean ones; noise is "
                    "for training labels, keep the others as they are."
                )

    @property
    def wrong(self) -> Tensor:
        """Which training labels are wrong, boolean ``(N,)``."""
        return self.data.train.y != self.clean.train.y


def corrupt(data: Dataset, noise: Noise, seed: int) -> Corrupted:
    """Make training labels wrong, each on its own; test and validation labels stay.

    Args:
        data: with one label an example.
        noise: how.
        seed: another seed takes hold of other labels.

    Raises:
        DataError: when examples have more than one label, as texts have.
        UsageError: when the noise does not fit the classes.
    """
    if data.train.y.dim() != 1:
        raise DataError(f"{data.name!r} has labels of shape {tuple(data.train.y.shape)}; noise needs one an example.")
    clean = data.train.y
    upto = noise.matrix(data.outputs).cumsum(1)
    upto = upto / upto[:, -1:]  # exactly 1 at the end, so a class of probability 0 is never drawn
    drawn = torch.rand(len(clean), 1, generator=stream(seed, "label noise", noise.kind), dtype=torch.float64)
    found = (drawn >= upto[clean.cpu()]).sum(1).to(clean.device)
    share = float((found != clean).double().mean())
    note = f"{data.note} {100 * share:.3g} % of the training labels are wrong: {noise.kind} noise {noise.rate:g}."
    return Corrupted(replace(data, train=Split(data.train.x, found), note=note.strip()), data)
