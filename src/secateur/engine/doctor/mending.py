"""A repaired copy of a file: what can be mended is, in the same format; the original is never touched."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.core.errors import FileError, UsageError
from secateur.core.files import file_digest, write_json, write_tensors
from secateur.core.masks import Masks
from secateur.engine.doctor import leftovers
from secateur.engine.doctor.examining import CHECKS, NAMES, Report, examine
from secateur.engine.doctor.findings import Check, Finding
from secateur.engine.doctor.names import stripped
from secateur.engine.doctor.opening import Beside, Source, names_of, open_subject
from secateur.engine.doctor.subject import Subject
from secateur.engine.folder import CARD, MASKS, WEIGHTS, Artefact, card_digest, clean, new_folder
from secateur.engine.foreign import Foreign
from secateur.engine.foreign.guard import contained


@dataclass(frozen=True)
class Mended:
    """A repaired copy.

    Args:
        path: where it lies.
        fixed: what was mended.
        report: what is found in the copy.
    """

    path: Path
    fixed: tuple[Finding, ...]
    report: Report

    def to_table(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        fixed = [finding.to_table() for finding in self.fixed]
        return {"fixed": fixed, "copy": str(self.path), "after": self.report.to_table()}


def mend(path: Path, out: Path, beside: Beside | None = None) -> Mended:
    """Write a copy without the faults that can be mended, in the same format, and examine it.

    Args:
        path: the file or folder.
        out: the copy; a new file, or a new folder for a folder.
        beside: what belongs to it, as for :func:`examine`.

    Raises:
        UsageError: when the copy would take the place of the original, or ``out`` is there already.
        SecateurError: as :func:`examine`, or when the format cannot be written; nothing is left behind then.

    Cost: one examination for each of the two, one pass for each finding, and the writing.
    """
    given = beside or Beside()
    with contained(path, "mended"):
        _refuse(path, out)
        subject, source = open_subject(path, given)
        for other in (given.masks, given.ema, given.dense):
            if other is not None and out.resolve() == other.resolve():
                raise UsageError(f"--fix {out} is a file that was given to be read; name a new file.")
        lost = leftovers.CHECKS["order"].find(subject)
        whole, fixed = mended(subject)
        beside_it = _write(source, out, subject, whole, fixed)
        again = replace(given, masks=None) if source.artefact is not None else given
        try:
            report = examine(out, again)
        except BaseException:
            _remove(out, beside_it)
            raise
    # what the original's names told is not to be seen in the copy any more
    return Mended(out, tuple(fixed), replace(report, findings=(*lost, *report.findings)))


def _refuse(path: Path, out: Path) -> None:
    if out.resolve() == path.resolve():
        raise UsageError(f"--fix {out} is the original, which is never touched; name a new file.")
    if out.exists() or out.is_symlink():
        raise UsageError(f"--fix {out} is there already; name a new file, or remove it first.")
    if path.is_dir() and out.resolve().is_relative_to(path.resolve()):
        raise UsageError(f"--fix {out} lies inside {path}; name a folder elsewhere.")


def _remove(out: Path, beside: Path | None) -> None:
    if out.is_dir():
        shutil.rmtree(out, ignore_errors=True)
    else:
        out.unlink(missing_ok=True)
    if beside is not None:
        beside.unlink(missing_ok=True)


def mended(subject: Subject) -> tuple[Subject, list[Finding]]:
    """The subject without what can be mended, and what that was."""
    fixed: list[Finding] = []
    for check in NAMES:
        subject = _without(check, subject, fixed)
    subject, restore = stripped(subject)
    for check in CHECKS:
        subject = _without(check, subject, fixed) if check not in NAMES else subject
    return restore(subject), fixed


def _without(check: Check, subject: Subject, fixed: list[Finding]) -> Subject:
    """The subject without what one check finds; what was mended is added to the list."""
    if check.mend is None:
        return subject
    for finding in check.find(subject):
        if finding.fixable:
            subject = check.mend(subject, finding)
            fixed.append(finding)
    return subject


def _write(source: Source, out: Path, before: Subject, after: Subject, fixed: list[Finding]) -> Path | None:
    """Write the copy, whole or not at all; gives the file of masks that was written beside it, if one was."""
    if source.artefact is not None:
        _write_folder(source.artefact, out, after, fixed)
    elif source.foreign is not None:
        return _write_foreign(source.foreign, out, before, after)
    return None


def _write_folder(artefact: Artefact, out: Path, subject: Subject, fixed: list[Finding]) -> None:
    """A step's folder with other weights; its card says what was mended, and that its figures are from before."""
    files = dict(artefact.card["files"])  # plain names in the folder itself: it was opened
    with new_folder(out, "--fix") as folder:
        for name in files:
            if name not in (WEIGHTS, MASKS):
                shutil.copyfile(artefact.folder / name, folder / name)
        state = {name: clean(tensor) for name, tensor in subject.tensors.items()}
        files[WEIGHTS] = write_tensors(folder / WEIGHTS, state, {"format": "pt"})
        files[MASKS] = Masks(subject.masks).save(folder / MASKS, weights=files[WEIGHTS])
        for name, digest in files.items():
            if file_digest(folder / name) != digest:
                raise FileError(f"{artefact.folder / name} changed while it was copied. Run the command again.")
        card = {key: value for key, value in artefact.card.items() if key != "digest"} | {"files": files}
        what = [finding.what for finding in fixed]
        card["mended"] = {"from": artefact.digest, "what": what, "figures": "measured before mending"}
        write_json(folder / CARD, {**card, "digest": card_digest(card)})


def _write_foreign(foreign: Foreign, out: Path, before: Subject, after: Subject) -> Path | None:
    others = _averages(foreign, before, after) or None
    foreign.write(out, after.tensors, others, after.optimizer if after.optimizer is not before.optimizer else None)
    beside = out.parent / MASKS
    if not (before.masked and before.masks and out.name == WEIGHTS) or beside.exists():
        return None
    try:
        Masks(after.masks).save(beside)
    except BaseException:
        _remove(out, None)
        raise
    return beside


def _averages(foreign: Foreign, before: Subject, after: Subject) -> dict[str, dict[str, Tensor]]:
    """Tensors of averages in the file that changed, by the names that they have there."""
    found = {}
    for name, tensors in after.averages.items():
        if name in after.outside:
            continue
        paths = names_of(foreign.facts["others"][name], foreign.tensors)
        old = before.averages[name]
        new = {path: tensors[known] for path, known in paths.items() if tensors[known] is not old[known]}
        found |= {name: new} if new else {}
    return found
