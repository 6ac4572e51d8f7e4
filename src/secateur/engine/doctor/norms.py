"""Statistics of BatchNorm: impossible, never taken, or not those of the data any more."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.core.losses import CrossEntropy
from secateur.core.names import unwrap
from secateur.core.streams import stream
from secateur.core.task import Task
from secateur.data import Loader
from secateur.engine.doctor.findings import Check, Finding, listed, typed
from secateur.engine.doctor.leftovers import normalised
from secateur.engine.doctor.subject import Subject, real
from secateur.engine.doctor.units import silent_rows
from secateur.engine.folder import load_state
from secateur.engine.recovering import normed, reestimate

EXAMPLES = 512
_FAR = 0.5  # standard deviations that a mean may be away; and the factor that a variance may be off, less one
_CHANNELS = 0.25  # share of a layer's channels from which on it is stale


def _layers(tensors: Mapping[str, Tensor]) -> list[str]:
    """Stems of the names of normalisations with statistics, such as ``"body.1."``."""
    stems = [name.removesuffix("running_var") for name in tensors if name.endswith("running_var")]
    return [stem for stem in stems if f"{stem}running_mean" in tensors and not _misshapen(tensors, stem)]


def _misshapen(tensors: Mapping[str, Tensor], stem: str) -> str:
    """Why two tensors cannot be mean and variance of the same channels; empty where they can."""
    mean, variance = tensors[f"{stem}running_mean"], tensors[f"{stem}running_var"]
    if mean.shape != variance.shape or mean.dim() != 1:
        return f"means of shape {list(mean.shape)} and variances of shape {list(variance.shape)}"
    kinds = {str(t.dtype).removeprefix("torch.") for t in (mean, variance) if not t.is_floating_point()}
    return f"statistics of type {', '.join(sorted(kinds))}" if kinds else ""


def _odd(subject: Subject) -> list[Finding]:
    """Statistics that no normalisation could have written."""
    stems = [name.removesuffix("running_var") for name in subject.tensors if name.endswith("running_var")]
    told = {s: _misshapen(subject.tensors, s) for s in stems if f"{s}running_mean" in subject.tensors}
    return [
        Finding(
            "odd statistics", (f"{stem}running_mean", f"{stem}running_var"),
            f"`{stem}running_mean` and `{stem}running_var`: {why}; they do not belong together", 1,
            "take both from one checkpoint",
        )
        for stem, why in told.items() if why
    ]  # fmt: skip


def _impossible(subject: Subject) -> list[Finding]:
    bad: list[tuple[str, int, str]] = []
    for stem in _layers(subject.tensors):
        name = f"{stem}running_var"
        variance, mean = real(subject.tensors[name]), real(subject.tensors[f"{stem}running_mean"])
        negative = int((variance < 0).sum())
        zero = int((variance == 0).sum()) - _explained(subject, variance, mean)
        if negative:
            bad.append((name, negative, "variances are negative, so the outputs are NaN"))
        elif zero > 0:
            why = "variances are zero though the channels carry something: they are blown up instead of normalised"
            bad.append((name, zero, why))
    falls = bool(bad) and _falls(subject)
    return [
        Finding(
            "bad variance", (name,), f"`{name}`: {count:,} of {subject.tensors[name].numel():,} {why}", count,
            _cure(subject, falls), falls,
        )
        for name, count, why in bad
    ]  # fmt: skip


def _explained(subject: Subject, variance: Tensor, mean: Tensor) -> int:
    """Channels of no variance that may well have none: nothing comes in, or a weight of as many rows has a dead one."""
    constant = variance == 0
    if not bool(constant.any()):
        return 0
    fine = constant & (mean == 0) if not bool((constant & (mean == 0)).all()) else torch.zeros_like(constant)
    for name, tensor in subject.weights().items():
        if len(tensor) == len(variance):
            fine |= constant & silent_rows(subject, name)
    return int(fine.sum())


def _cure(subject: Subject, falls: bool) -> str:
    if not _can(subject):
        return f"take them anew: `secateur doctor {typed(subject.path)} --net NAME --data NAME --fix OUT`"
    if not falls:
        return "take an earlier checkpoint; with the statistics of this data the loss is no lower"
    return "write a copy with the statistics of the data: the same command with `--fix OUT`"


def _can(subject: Subject) -> bool:
    return subject.net is not None and subject.data is not None


def _falls(subject: Subject) -> bool:
    """Whether the loss falls with the statistics of the data; one that is not a number yet may become any."""
    measured = _measured(subject)
    if measured is None:
        return False
    before, after = measured[2]
    return bool(after.isfinite()) and not bool(after >= before)


def _never_taken(subject: Subject) -> list[Finding]:
    """Means of 0, variances of 1 and no batch seen, beside scales and shifts that were trained."""
    found = []
    for stem in _layers(subject.tensors):
        about = {key: subject.tensors.get(f"{stem}{key}") for key in ("weight", "bias", "num_batches_tracked")}
        mean, variance = (real(subject.tensors[f"{stem}running_{key}"]) for key in ("mean", "var"))
        seen = about["num_batches_tracked"]
        if (
            not len(mean)
            or not bool((mean == 0).all() and (variance == 1).all())
            or (seen is not None and bool((seen != 0).any()))
        ):
            continue
        if any(
            t is not None and t.numel() and bool((real(t) != real(t).flatten()[0]).any())
            for t in (about["weight"], about["bias"])
        ):
            found.append(f"{stem}running_mean")
    if not found:
        return []
    falls = _falls(subject)
    return [Finding(
        "statistics never taken", tuple(found),
        f"{listed(found)}: means are 0 and variances 1, as at the start, though scales and shifts were trained",
        len(found), _cure(subject, falls), falls,
    )]  # fmt: skip


def network(subject: Subject) -> nn.Module:
    """A copy of the network that holds the file's tensors, in evaluation mode.

    Raises:
        FileError: when they do not fit it.
    """
    net = copy.deepcopy(unwrap(subject.net or nn.Identity()))
    tensors = normalised(subject).tensors
    load_state(net, tensors, str(subject.path))
    return net.eval()


def examples(subject: Subject) -> Loader | None:
    """Training examples, always the same, at most :data:`EXAMPLES`."""
    data = subject.data
    if data is None:
        return None
    order = torch.randperm(len(data.train), generator=stream(0, "doctor"))
    picked = data.train.take(order[:EXAMPLES])
    return Loader(picked, min(128, len(picked)), mean=data.mean, std=data.std)


def _measured(subject: Subject) -> tuple[nn.Module, nn.Module, list[Tensor]] | None:
    """The network as it is, with the statistics of the data, and the mean losses of both; None where it cannot be."""
    batches = examples(subject)
    if subject.net is None or batches is None or not normed(subject.net):
        return None
    if any(t.is_floating_point() and not bool(real(t).isfinite().all()) for t in subject.tensors.values()):
        return None
    old = network(subject)
    new = copy.deepcopy(old)
    reestimate(Task(new, CrossEntropy(), batches))
    losses = [torch.tensor(Task(net, CrossEntropy(), batches).mean_loss()) for net in (old, new)]
    return old, new, losses


def _far(old: _BatchNorm, new: _BatchNorm) -> Tensor:
    """Channels whose statistics are not those of the data."""
    mean, var = old.running_mean, old.running_var
    now, spread = new.running_mean, new.running_var
    if mean is None or var is None or now is None or spread is None:
        return torch.zeros(0, dtype=torch.bool)
    moved = (mean - now).abs() > _FAR * (spread + new.eps).sqrt()
    ratio = (var + old.eps) / (spread + new.eps)
    return moved | (ratio > 1 + 2 * _FAR) | (ratio < 1 / (1 + 2 * _FAR))


def _stale(subject: Subject) -> list[Finding]:
    measured = _measured(subject)
    if measured is None:
        return []
    old, new, losses = measured
    pairs = zip(normed(old), normed(new), strict=True)
    paths = {id(module): path for path, module in old.named_modules()}
    far = {f"{paths[id(a)]}.running_mean".lstrip("."): _far(a, b) for a, b in pairs}
    stale = [name for name, where in far.items() if len(where) and float(where.double().mean()) > _CHANNELS]
    if not stale:
        return []
    count = sum(int(far[name].sum()) for name in stale)
    falls = bool(
        losses[1] < losses[0]
    )  # else the network may have been trained on other examples, and the file is right
    return [Finding(
        "stale statistics", tuple(stale),
        f"{listed(stale)}: {count:,} channels have other means and variances on the data (loss {losses[0]:.3f} as it "
        f"is, {losses[1]:.3f} with those of the data)", count, _cure(subject, falls), falls,
        "warning" if falls else "note",
    )]  # fmt: skip


def _renew(subject: Subject, finding: Finding) -> Subject:
    """The statistics of the data in the place of all that the file holds."""
    del finding
    measured = _measured(subject)
    if measured is None or not _falls(subject):
        return subject
    net = measured[1]
    parts = ("running_mean", "running_var", "num_batches_tracked")
    return subject.changed({
        name: tensor.detach().clone().to(subject.tensors[name].dtype)
        for name, tensor in net.state_dict().items()
        if name.endswith(parts) and name in subject.tensors
    })  # fmt: skip


CHECKS = {
    "odd": Check(_odd),
    "impossible": Check(_impossible, _renew),
    "never taken": Check(_never_taken, _renew),
    "stale": Check(_stale, _renew),
}
