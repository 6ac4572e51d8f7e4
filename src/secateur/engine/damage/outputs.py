"""One pass of a network over a split: what it answers, how sure it is, and what its last linear layer looks at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from secateur.core.errors import DataError, UsageError
from secateur.core.losses import CrossEntropy
from secateur.core.names import unwrap
from secateur.core.reading import Reading
from secateur.core.task import Batch, Task
from secateur.data import Dataset, Loader, Split
from secateur.linalg.memory import check as check_memory
from secateur.probes._logits import IGNORED, check, flat, wide
from secateur.probes.calibration import Calibration

BATCH = 256
"""Examples in a batch, unless told otherwise."""
BINS = 15
"""Bins of the calibration error."""

SEQUENCES = "the network answers for every position of a sequence; features are of networks with one answer an example"
NOT_CALLED = "the network calls no linear layer (`nn.Linear`) as a module, so there is no last one to look at"
NOT_LAST = "the network's output is not that of a linear layer: something else comes last, such as a convolution"


class Features(NamedTuple):
    """What the last linear layer looks at, and the layer; on the CPU.

    Args:
        layer: its name.
        x: its inputs in evaluation mode, one row a counted example, ``(n, p)``.
        weight: ``(classes, p)``.
        bias: ``(classes,)``, or None.
    """

    layer: str
    x: Tensor
    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, eq=False)
class Outputs:
    """What a network answered on a split, a row a counted decision, on the CPU.

    A decision is an example or, for a network that answers with sequences, a token. Targets of -100 are not counted.

    Args:
        name: the network's name.
        labels: the classes asked for, int64 ``(n,)``.
        answers: the classes answered (of equal logits the lowest), int64 ``(n,)``.
        confidence: the highest probability, float64 ``(n,)``.
        lead: probability of the right class less the highest other one, in [-1, 1], float64 ``(n,)``.
        example: number of the example (sequence) in the split, int64 ``(n,)``.
        position: place of the token in its sequence (0 for whole examples), int64 ``(n,)``.
        tokens: whether decisions are tokens.
        classes: number of the network's outputs.
        calibration: the expected calibration error, as the probe gives it.
        logits: ``(n, classes)`` in the network's type; None for tokens, whose logits are not kept.
        features: what the last linear layer looks at, or None.
        refused: why there are no features; empty when there are.
    """

    name: str
    labels: Tensor
    answers: Tensor
    confidence: Tensor
    lead: Tensor
    example: Tensor
    position: Tensor
    tokens: bool
    classes: int
    calibration: Reading
    logits: Tensor | None
    features: Features | None
    refused: str

    @property
    def right(self) -> Tensor:
        """Which answers are right, boolean ``(n,)``."""
        return self.answers == self.labels


def outputs(net: nn.Module, data: Dataset | Split, *, name: str = "network", batch: int = BATCH) -> Outputs:
    """One pass in evaluation mode, without gradients, on the network's device.

    The network's modes, its hooks and torch's random state are as before, also after an error.

    Args:
        net: a classifier: logits ``(N, classes)`` for labels ``(N,)``, or ``(N, T, classes)`` for ``(N, T)``.
        data: a data set, whose test part is taken and scaled as for training, or a split as it is.
        name: what messages call the network.
        batch: examples in a batch.

    Raises:
        DataError: when it is no classifier, a logit is NaN or +infinity, a label is out of range, or no label counts.

    Cost: one forward pass, 1,000 resamples for the calibration error; memory of logits and features.
    """
    loader = loader_of(data, net, batch)
    ears = _Ears(unwrap(net), len(loader))
    rows = _Pass(net, loader, ears)
    try:
        with ears:
            reading = Calibration(BINS)(Task(nn.Identity(), CrossEntropy(), rows))
    except DataError as error:
        raise DataError(f"network {name!r}: {error}") from error
    columns = [torch.cat(column) for column in zip(*rows.kept, strict=True)]
    labels, answers, confidence, lead, example, position = columns
    logits = torch.cat(rows.logits) if not rows.tokens else None
    features, refused = ears.result(rows.tokens)
    return Outputs(
        name, labels, answers, confidence, lead, example, position, rows.tokens, rows.classes, reading, logits,
        features, refused,
    )  # fmt: skip


def loader_of(data: Dataset | Split, net: nn.Module, batch: int) -> Loader:
    """Batches in order; floating inputs are of the type of the network's first floating parameter."""
    kinds = (p.dtype for p in net.parameters() if p.is_floating_point())
    dtype = next(kinds, torch.float32)
    split = data.test if isinstance(data, Dataset) else data
    mean, std = (data.mean, data.std) if isinstance(data, Dataset) else (None, None)
    return Loader(split, min(batch, len(split)), mean=mean, std=std, dtype=dtype)


class _Pass:
    """Batches ``(logits, labels)`` of a network, on the CPU; what else is needed of them is kept on the way."""

    def __init__(self, net: nn.Module, data: Loader, ears: _Ears) -> None:
        self.task, self.ears = Task(net, CrossEntropy(), data), ears
        self.kept: list[tuple[Tensor, ...]] = []
        self.logits: list[Tensor] = []
        self.tokens, self.classes, self.seen = False, 0, 0

    def __iter__(self) -> Iterator[Batch]:
        for output, target, n in self.task.outputs():
            logits, labels, example = flat(output, target)
            counted = labels != IGNORED
            check(logits[counted], labels[counted])
            self.tokens, self.classes = output.dim() == 3, logits.shape[1]
            places = torch.arange(len(labels), device=labels.device) % (output.shape[1] if self.tokens else 1)
            self._keep(logits[counted], labels[counted], example[counted], places[counted])
            self.ears.take(output, counted)
            self.seen += n
            yield output.cpu(), target.cpu()

    def _keep(self, logits: Tensor, labels: Tensor, example: Tensor, position: Tensor) -> None:
        p, own = wide(logits).log_softmax(1).exp(), labels[:, None]  # as the calibration error has it
        best = p.max(1)
        others = p.scatter(1, own, -1.0).max(1).values.clamp(min=0.0)  # of a single class there is no other
        lead = p.gather(1, own)[:, 0] - others
        # Answers by the logits: two that differ in the last bit may have equal probabilities.
        columns = (labels, logits.argmax(1), best.values.double(), lead.double(), example + self.seen, position)
        self.kept.append(tuple(column.cpu() for column in columns))
        if not self.tokens:
            self.logits.append(logits.cpu())


class _Ears:
    """Finds the linear layer whose output is the network's in the first batch, and keeps its inputs from then on."""

    def __init__(self, net: nn.Module, batches: int) -> None:
        self.batches = batches
        self.layers = {name: module for name, module in net.named_modules() if isinstance(module, nn.Linear)}
        self.handles: dict[str, Any] = {}
        self.heard: dict[str, tuple[Tensor, Tensor]] = {}
        self.layer, self.refused = "", ""
        self.kept: list[Tensor] = []

    def __enter__(self) -> _Ears:
        for name, module in self.layers.items():
            self.handles[name] = module.register_forward_hook(self._listener(name), with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._silence(*self.handles)

    def take(self, output: Tensor, counted: Tensor) -> None:
        """Hear what the batch that gave ``output`` has told; only ``counted`` rows are kept."""
        heard, self.heard = self.heard, {}
        if self.refused:
            return
        if output.dim() != 2:
            return self._refuse(SEQUENCES)
        if not self.layer:
            if not heard:
                return self._refuse(NOT_CALLED)
            found = next((name for name in reversed(heard) if _same(output, heard[name][1])), "")
            if not found:
                return self._refuse(f"{NOT_LAST}; the last linear layer called is `{next(reversed(heard))}`")
            self.layer = found
            self._silence(*(name for name in self.handles if name != found))
        if self.layer not in heard or not _same(output, heard[self.layer][1]):
            return self._refuse(f"{NOT_LAST}, or is so for some examples only")
        self._keep(heard[self.layer][0][counted])

    def result(self, tokens: bool) -> tuple[Features | None, str]:
        """The features, or why there are none."""
        if tokens or self.refused:
            return None, self.refused or SEQUENCES
        head: Any = self.layers[self.layer]
        bias = None if head.bias is None else head.bias.detach().cpu().clone()
        return Features(self.layer, torch.cat(self.kept), head.weight.detach().cpu().clone(), bias), ""

    def _keep(self, x: Tensor) -> None:
        try:
            if not self.kept:
                check_memory(2 * x.nbytes * self.batches, "the features", "use fewer test examples")
            self.kept.append(x.cpu())
        except UsageError as error:
            self._refuse(str(error))

    def _refuse(self, why: str) -> None:
        self.refused, self.kept = why.rstrip("."), []
        self._silence(*self.handles)

    def _silence(self, *names: str) -> None:
        for name in names:
            self.handles.pop(name).remove()

    def _listener(self, name: str) -> Any:
        def listen(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            self.heard.pop(name, None)  # so that the layer called last stands last
            given = args[0] if args else kwargs["input"]
            self.heard[name] = (given.detach().clone(), output.detach().clone())  # what follows may write into them

        return listen


def _same(output: Tensor, heard: Tensor) -> bool:
    """Whether a layer's output is the network's, up to a wider type."""
    return output.shape == heard.shape and torch.equal(output.double(), heard.double())


def alike(first: Outputs, other: Outputs) -> None:
    """Refuse outputs that do not belong to the same decisions.

    Raises:
        DataError: when they were asked different labels.
    """
    if not (torch.equal(first.labels, other.labels) and torch.equal(first.example, other.example)):
        raise DataError(
            f"{first.name!r} and {other.name!r} were asked different labels. Use the same data for both, unshuffled."
        )
