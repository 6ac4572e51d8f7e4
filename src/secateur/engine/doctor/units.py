"""Units that do nothing, and zeros that take room: what pruning left to be gained. Notes, no faults."""

from __future__ import annotations

from torch import Tensor

from secateur.engine.doctor.findings import Check, Finding, listed, typed
from secateur.engine.doctor.leftovers import parts
from secateur.engine.doctor.subject import Subject, real, recurrent, zeros

_MUCH = 0.5  # share of zeros from which on the file is worth packing
_SPARE = 1 << 16  # bytes of zeros below which nobody cares


def _command(subject: Subject) -> str:
    """What removes these units and no others; it needs the network."""
    shrink = "secateur.surgery.shrink_dead(model, example)"
    if subject.kind == "folder" and subject.path.name.isprintable():
        return f"in Python: `model, masks = secateur.load({str(subject.path)!r}); {shrink}`"
    return f"in Python, with the network: `{shrink}`"


def silent_rows(subject: Subject, name: str) -> Tensor:
    """Outputs of a weight that are the same whatever comes in: rows of zeros."""
    return (real(subject.tensors[name]).flatten(1) == 0).all(1)


def _unsure(subject: Subject, name: str) -> bool:
    """Whether rows may be inputs: matrices of ONNX lie either way."""
    return subject.kind == "onnx" and subject.tensors[name].dim() == 2


def _dead(subject: Subject) -> list[Finding]:
    """Outputs whose weights are all zero; in one note, since high sparsity leaves some in many layers."""
    counts, units, biased = {}, 0, 0
    tied = {name for tie in subject.ties for name in tie}
    for name in subject.weights():
        rows = silent_rows(subject, name)
        count = int(rows.sum())
        if not count or count == len(rows) or recurrent(name) or name in tied or _unsure(subject, name):
            continue
        counts[name], units = count, units + len(rows)
        bias = subject.tensors.get(f"{name.removesuffix('weight')}bias") if name.endswith("weight") else None
        biased += int((real(bias)[rows] != 0).sum()) if bias is not None and bias.shape == rows.shape else 0
    whole = sum(counts.values())
    gives = f"; {biased:,} of them give their bias, the others zero" if biased else ""
    return _note(
        subject, "dead units", counts,
        f"{whole:,} of {units:,} outputs of {{}} meet no weight, always give the same, and are still computed{gives}",
    ) + _unread(subject) + _closed_scales(subject)  # fmt: skip


def _note(subject: Subject, kind: str, counts: dict[str, int], what: str) -> list[Finding]:
    names = sorted(counts, key=lambda name: -counts[name])
    shown = ", ".join(f"`{name}` ({counts[name]:,})" for name in names[:4])
    shown += f" and {len(names) - 4:,} more" if len(names) > 4 else ""
    count = sum(counts.values())
    note = Finding(kind, tuple(counts), what.format(shown), count, _command(subject), severity="note")
    return [note] if counts else []


def _unread(subject: Subject) -> list[Finding]:
    """Inputs that a weight never looks at: what comes before computes them for nothing."""
    counts, inputs = {}, 0
    for name, tensor in subject.weights().items():
        if tensor.shape[1] == 1 or recurrent(name) or _unsure(subject, name):
            continue
        columns = (real(tensor).transpose(0, 1).flatten(1) == 0).all(1)
        count = int(columns.sum())
        if count and count < len(columns):
            counts[name], inputs = count, inputs + len(columns)
    whole = sum(counts.values())
    return _note(
        subject, "unread inputs", counts,
        f"{whole:,} of {inputs:,} inputs of {{}} meet no weight: unless they are read elsewhere, they are computed for "
        "nothing",
    )  # fmt: skip


def _closed_scales(subject: Subject) -> list[Finding]:
    """Channels that a BatchNorm multiplies by zero."""
    counts = {}
    for name in subject.tensors:
        stem = name.removesuffix("running_var")
        scale = subject.tensors.get(f"{stem}weight")
        if stem != name and scale is not None and 0 < zeros(scale) < scale.numel():
            counts[f"{stem}weight"] = zeros(scale)
    return _note(
        subject, "closed channels", counts,
        f"{sum(counts.values()):,} channels are multiplied by zero in {{}}, and are still computed",
    )  # fmt: skip


def _dense_zeros(subject: Subject) -> list[Finding]:
    """Zeros that are stored like any other number."""
    plain = {n: t for n, t in subject.matrices().items() if subject.stored.get(n, "plain") == "plain"}
    hidden = {original for original, _ in parts(subject.tensors).values()}
    bytes_of_zeros = sum(zeros(t) * t.element_size() for n, t in plain.items() if n not in hidden)
    whole = sum(t.nbytes for t in plain.values())
    if not whole or bytes_of_zeros < max(_SPARE, _MUCH * whole):
        return []
    names = [name for name, tensor in plain.items() if zeros(tensor) > tensor.numel() * _MUCH]
    cure = f"pack it for keeping: `gzip -k {_files(subject)}`"
    if subject.kind == "folder" and subject.path.name.isprintable():
        cure += f"; to run it, `secateur.compile({str(subject.path)!r})` skips them"
    return [Finding(
        "zeros stored", tuple(names),
        f"{bytes_of_zeros / 1e6:,.1f} of {whole / 1e6:,.1f} MB are zeros that are stored and loaded like other numbers",
        len(names), cure, severity="note",
    )]  # fmt: skip


def _files(subject: Subject) -> str:
    """The files of weights, as a shell takes them."""
    if subject.path.name.endswith(".index.json"):
        return f"{typed(subject.path.parent)}/*.safetensors"
    if not subject.path.is_dir():
        return typed(subject.path)
    if subject.kind == "folder":
        return typed(subject.path / "weights.safetensors")
    return f"{typed(subject.path)}/*.{'bin' if subject.kind == 'torch' else 'safetensors'}"


def _scattered(subject: Subject) -> list[Finding]:
    """One layer or many without any zero in a network that is otherwise pruned: often forgotten, sometimes meant."""
    weights = {n: t for n, t in subject.weights().items() if not subject.is_mask(n)}
    if subject.masked or not weights:
        return []
    total, none = sum(t.numel() for t in weights.values()), {n: zeros(t) for n, t in weights.items()}
    if sum(none.values()) < _MUCH * total:
        return []
    dense = [n for n, count in none.items() if not count and weights[n].numel() * 20 > total]
    if not dense:
        return []
    return [Finding(
        "left dense", tuple(dense),
        f"{listed(dense)}: no zeros at all, though the network is pruned to {sum(none.values()) / total:.0%}",
        len(dense), "if that is not meant, prune again without `--skip`", severity="note",
    )]  # fmt: skip


CHECKS = {
    "dead": Check(_dead),
    "zeros": Check(_dense_zeros),
    "left": Check(_scattered),
}
