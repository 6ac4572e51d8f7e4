"""Data sets held in memory: tensors, class names and a digest that says which data a result used."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from secateur.core.errors import DataError, UsageError, nearest
from secateur.core.streams import stream

Kind = Literal["image", "features", "text", "tokens"]


@dataclass(frozen=True, eq=False)
class Split:
    """Examples and their targets.

    Args:
        x: inputs ``(N, ...)``.
        y: targets, ``(N,)`` class numbers or ``(N, T)`` tokens.

    Raises:
        DataError: when the lengths differ or there is no example.
    """

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        for name, part in (("x", self.x), ("y", self.y)):
            if not isinstance(part, Tensor) or part.dim() == 0:
                shown = "a number" if isinstance(part, Tensor) else type(part).__name__
                raise DataError(f"{name} of a split is {shown}; pass a tensor whose first dimension is the example.")
        if len(self.x) != len(self.y):
            raise DataError(
                f"the split has {len(self.x)} inputs and {len(self.y)} targets; give every input one target."
            )
        if len(self.x) == 0:
            raise DataError(f"the split is empty: x has shape {tuple(self.x.shape)}; give at least one example.")

    def __len__(self) -> int:
        return len(self.x)

    def take(self, index: Tensor) -> Split:
        """The examples at ``index`` ``(n,)``, in that order, as a copy."""
        return Split(self.x.index_select(0, index.to(self.x.device)), self.y.index_select(0, index.to(self.y.device)))

    def to(self, device: torch.device | str) -> Split:
        """The same split on another device, where a loader then does its work."""
        return Split(self.x.to(device), self.y.to(device))


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test part, and what is known of them.

    Args:
        name: the name it was loaded by.
        train: examples to train on.
        test: examples to report on.
        classes: names of the classes; for text, the vocabulary.
        kind: ``"image"`` (uint8 ``(N, C, H, W)``, or floating and already scaled), ``"features"`` (floating,
            ``(N, D)`` or more dimensions), ``"text"`` (int64 tokens ``(N, T)``, ``y`` the next tokens) or
            ``"tokens"`` (int64 ``(N, T)`` with one label each). Labels are int64 ``(N,)``.
        mean: mean of each channel of the training images in [0, 1], or None.
        std: standard deviation of each channel, or None.
        validation: examples held out of ``train``, or None.
        note: what a reader must know, for example that the test part was cut from the training part.

    Raises:
        DataError: when shapes, types or labels do not fit the kind and the classes.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    kind: Kind
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    validation: Split | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UsageError(f"no kind of data is called {self.kind!r}. {nearest(str(self.kind), get_args(Kind))}")
        for part, split in self.splits():
            _check(f"{self.name!r} {part}", split, self.kind, self.outputs)
            if split.x.shape[1:] != self.train.x.shape[1:]:
                raise DataError(
                    f"{self.name!r} {part}: an example has shape {tuple(split.x.shape[1:])}, in the training part "
                    f"{self.input_shape}; both must be of one shape."
                )
        check_scale(self.mean, self.std, self.train.x)

    def splits(self) -> Iterator[tuple[str, Split]]:
        """``("train", ...)``, ``("test", ...)`` and, when present, ``("validation", ...)``."""
        yield "train", self.train
        yield "test", self.test
        if self.validation is not None:
            yield "validation", self.validation

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example, for example ``(1, 28, 28)``."""
        return tuple(self.train.x.shape[1:])

    @property
    def outputs(self) -> int:
        """Number of classes, or of tokens in the vocabulary."""
        return len(self.classes)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all tensors (type, shape, values) and of ``mean`` and ``std``; 64 hex digits.

        Cost: one pass over the data (about 0.1 s for CIFAR-10), once.
        """
        whole = hashlib.sha256(repr((self.kind, self.mean, self.std)).encode())
        for part, split in self.splits():
            for tensor in (split.x, split.y):
                whole.update(f"{part} {tensor.dtype} {tuple(tensor.shape)}".encode())
                flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                whole.update(flat.numpy().data)
        return whole.hexdigest()

    def to(self, device: torch.device | str) -> Dataset:
        """The same data on another device."""
        return replace(self, **{part: split.to(device) for part, split in self.splits()})

    def subset(self, train: int | None = None, test: int | None = None, seed: int = 0) -> Dataset:
        """A random part of the data, for quick runs; None keeps a part whole.

        Raises:
            DataError: when more examples are asked for than there are, or fewer than one.
        """
        parts: dict[str, Split] = {}
        for part, count, split in (("train", train, self.train), ("test", test, self.test)):
            if count is not None:
                self._enough(part, count, len(split))
                parts[part] = split.take(_shuffled(split, seed, "subset", part)[:count])
        sizes = ", ".join(f"{len(s)} of {len(getattr(self, p))} {p} examples" for p, s in parts.items())
        return replace(self, **parts, note=_join(self.note, f"A random subset: {sizes}." if parts else ""))

    def split_validation(self, count: int, seed: int = 0) -> Dataset:
        """``count`` random training examples moved to ``validation``; the order of the others is kept.

        Raises:
            DataError: when that leaves no training example, or ``count`` is less than one.
        """
        self._enough("train", count, len(self.train) - 1)
        order = _shuffled(self.train, seed, "validation")
        held, kept = order[:count], order[count:].sort().values
        return replace(self, train=self.train.take(kept), validation=self.train.take(held))

    def _enough(self, part: str, count: int, there: int) -> None:
        if not 1 <= count <= there:
            raise DataError(f"{count} {part} examples asked of {self.name!r}; give 1 to {there}.")


def stratified(y: Tensor, count: int, seed: int, name: str) -> tuple[Tensor, Tensor]:
    """Numbers of the examples of two parts with the same mix of classes.

    Classes share ``count`` by largest remainder; which of their examples go is ``stream(seed, "split", name)``.

    Args:
        y: labels ``(N,)``.
        count: number of examples in the second part.
        seed: seed of the choice.
        name: name of the data set.

    Returns:
        Numbers of the first and of the second part, each in rising order.

    Raises:
        DataError: when one part would be empty.
    """
    if not 1 <= count < len(y):
        raise DataError(f"{name!r} has {len(y)} examples, too few to set {count} aside for testing; add examples.")
    labels, sizes = y.cpu().unique(return_counts=True)
    exact = sizes.double() * count / len(y)
    quota = exact.floor().long()
    more = (exact - quota).sort(descending=True, stable=True).indices[: count - int(quota.sum())]
    quota[more] += 1
    random = stream(seed, "split", name)
    second = torch.zeros(len(y), dtype=torch.bool)
    for label, n in zip(labels.tolist(), quota.tolist(), strict=True):
        mine = (y.cpu() == label).nonzero().flatten()
        second[mine[torch.randperm(len(mine), generator=random)[:n]]] = True
    return (~second).nonzero().flatten(), second.nonzero().flatten()


def check_scale(mean: Sequence[float] | None, std: Sequence[float] | None, x: Tensor) -> None:
    """Refuse a mean and standard deviation that do not fit the channels of ``x`` ``(N, C, ...)``.

    Raises:
        DataError: when only one is given, their number differs from the channels, or one is not positive.
    """
    if mean is None and std is None:
        return
    if mean is None or std is None:
        raise DataError("mean and std go together: give both, or neither.")
    if x.dim() < 2 or not (x.is_floating_point() or x.dtype == torch.uint8):
        raise DataError(
            f"inputs of type {x.dtype} and shape {tuple(x.shape)} have no channels; leave out mean and std."
        )
    if not len(mean) == len(std) == x.shape[1]:
        raise DataError(
            f"{len(mean)} means and {len(std)} standard deviations for {x.shape[1]} channels; give one of each."
        )
    if not all(s > 0 for s in std):
        raise DataError(f"std is {tuple(std)}; every entry must be positive.")


def _check(where: str, split: Split, kind: Kind, outputs: int) -> None:
    x, y = split.x, split.y
    fits = {
        "image": (x.dtype == torch.uint8 or x.is_floating_point()) and x.dim() == 4,
        "features": x.is_floating_point() and x.dim() >= 2,
        "text": x.dtype == torch.int64 and x.dim() == 2,
        "tokens": x.dtype == torch.int64 and x.dim() == 2,
    }
    wanted = {"image": "uint8 (N, C, H, W)", "features": "floating (N, D)"}.get(kind, "int64 (N, T)")
    if not fits[kind]:
        raise DataError(f"{where}: inputs of kind {kind!r} must be {wanted}, these are {x.dtype} {tuple(x.shape)}.")
    if y.dtype != torch.int64 or (y.shape != x.shape if kind == "text" else y.dim() != 1):
        shape = tuple(x.shape) if kind == "text" else f"({len(x)},)"
        raise DataError(f"{where}: labels must be int64 {shape}, these are {y.dtype} {tuple(y.shape)}.")
    tokens = (("input", x), ("label", y)) if kind == "text" else (("label", y),)
    for what, numbers in tokens:
        low, high = (int(v) for v in torch.aminmax(numbers)) if numbers.numel() else (0, 0)
        if low < 0 or high >= outputs:
            raise DataError(
                f"{where}: {what}s run from {low} to {high}, with {outputs} classes they must lie in 0..{outputs - 1}."
            )


def _shuffled(split: Split, seed: int, *names: str) -> Tensor:
    return torch.randperm(len(split), generator=stream(seed, *names))


def _join(*notes: str) -> str:
    return " ".join(note for note in notes if note)
