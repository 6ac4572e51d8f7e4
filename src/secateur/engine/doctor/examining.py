"""A whole examination: every check in turn, and the counts of every tensor."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from secateur.engine.doctor import leftovers, masked, names, norms, pairs, removable, units, values
from secateur.engine.doctor.findings import Check, Finding
from secateur.engine.doctor.opening import Beside, Source, open_subject
from secateur.engine.doctor.speed import expected_speed
from secateur.engine.doctor.subject import Subject
from secateur.engine.foreign.guard import contained

NAMES: tuple[Check, ...] = (
    leftovers.CHECKS["order"], leftovers.CHECKS["leftovers"], leftovers.CHECKS["halves"], names.CHECKS["prefixes"],
)  # fmt: skip
# In the order in which faults are mended: names first, since masks and pairs go by them; what sets zeros before what
# copies them; statistics last, since they depend on the weights.
CHECKS: tuple[Check, ...] = (
    *NAMES,
    values.CHECKS["not finite"],
    masked.CHECKS["strangers"], masked.CHECKS["closed"], masked.CHECKS["leaks"],
    values.CHECKS["near zero"], values.CHECKS["subnormal"],
    masked.CHECKS["n:m"], masked.CHECKS["vectors"],
    pairs.CHECKS["ties"], pairs.CHECKS["averages"], pairs.CHECKS["optimizer"],
    norms.CHECKS["odd"], norms.CHECKS["impossible"], norms.CHECKS["never taken"], norms.CHECKS["stale"],
    values.CHECKS["constant"], values.CHECKS["types"],
    units.CHECKS["dead"], removable.CHECKS["removable"], units.CHECKS["zeros"],
    units.CHECKS["left"], names.CHECKS["duplicates"],
)  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What was found in a file.

    Args:
        path: the file, or the folder.
        kind: its format.
        tensors: a row of counts for each tensor.
        findings: what is wrong.
        notes: what is not wrong, but worth knowing.
        masked: whether masks were there to compare with.
        left: entries that were not looked at, or not in every way, and why.
        speed: milliseconds expected on this machine, or why they are not known; empty where nobody asked.
    """

    path: Path
    kind: str
    tensors: tuple[dict[str, Any], ...]
    findings: tuple[Finding, ...]
    notes: tuple[Finding, ...] = ()
    masked: bool = False
    left: dict[str, str] = field(default_factory=dict)
    speed: dict[str, Any] = field(default_factory=dict)

    @property
    def fixable(self) -> tuple[Finding, ...]:
        """The findings that a repaired copy would not have."""
        return tuple(finding for finding in self.findings if finding.fixable)

    def to_table(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {
            "file": str(self.path), "kind": self.kind, "tensors": list(self.tensors),
            "findings": [finding.to_table() for finding in self.findings],
            "notes": [finding.to_table() for finding in self.notes],
            "masked": self.masked, "left": self.left, "speed": self.speed,
        }  # fmt: skip


def examine(path: Path, beside: Beside | None = None, *, speed: bool = False) -> Report:
    """Look for all that is wrong with a file of weights.

    Reads safetensors, ``torch.save``, ONNX, ``.pt2``, folders of Hugging Face and run folders; no code in them is run.

    Args:
        path: the file or folder.
        beside: the network, data, masks and other files that belong to it.
        speed: also what the network should take on this machine, compiled; needs network and data.

    Raises:
        SecateurError: when a file is missing, damaged or of another kind, or network and data do not fit it.

    Cost: some twenty passes over the tensors; with network and data also three passes over 512 examples.
    """
    with contained(path, "examined"):
        subject, source = open_subject(path, beside or Beside())
        report = report_on(subject, source)
        return replace(report, speed=expected_speed(subject)) if speed else report


def report_on(subject: Subject, source: Source) -> Report:
    """The report on tensors that are read already."""
    plain = leftovers.normalised(subject)  # masks and pairs go by plain names
    found = [finding for check in CHECKS for finding in check.find(subject if check in NAMES else plain)]
    left = dict(source.foreign.left) if source.foreign is not None else {}
    left |= {name: "neither the network nor an average of it; only NaN was looked for" for name in subject.others}
    return Report(
        subject.path, subject.kind, tuple(values.row(name, tensor) for name, tensor in subject.tensors.items()),
        tuple(f for f in found if f.severity != "note"), tuple(f for f in found if f.severity == "note"),
        subject.masked, left,
    )  # fmt: skip
