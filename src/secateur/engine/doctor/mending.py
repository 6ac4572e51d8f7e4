"""A repaired copy of a file: what can be mended is, in the same format; the original is never touched."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.core.errors import FileError, UsageError
from secateur.core.files import file_digest, read_json, write_json, write_tensors, writing
from secateur.core.masks import Masks
from secateur.engine.doctor.examining import CHECKS, Report, examine
from secateur.engine.doctor.findings import Finding
from secateur.engine.doctor.opening import Beside, Source, names_of, open_subject
from secateur.engine.doctor.subject import Subject
from secateur.engine.folder import CARD, MASKS, WEIGHTS, Artefact, card_digest, clean
from secateur.engine.foreign import Foreign
from secateur.engine.foreign.torchfile import load_object

_OPTIMIZERS = ("optimizer", "optimizer_state_dict", "optim", "optimizer_states", "opt")


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
    _refuse(path, out)
    subject, source = open_subject(path, given)
    for other in (given.masks, given.ema, given.dense):
        if other is not None and out.resolve() == other.resolve():
            raise UsageError(f"--fix {out} is a file that was given to be read; name a new file.")
    whole, fixed = mended(subject)
    if source.artefact is not None:
        _write_folder(source.artefact, out, whole, fixed)
    elif source.foreign is not None:
        _write_foreign(source, out, subject, whole)
    again = replace(given, masks=None) if source.artefact is not None else given
    return Mended(out, tuple(fixed), examine(out, again))


def _refuse(path: Path, out: Path) -> None:
    if out.resolve() == path.resolve():
        raise UsageError(f"--fix {out} is the original, which is never touched; name a new file.")
    if out.exists():
        raise UsageError(f"--fix {out} is there already; name a new file, or remove it first.")
    if path.is_dir() and out.resolve().is_relative_to(path.resolve()):
        raise UsageError(f"--fix {out} lies inside {path}; name a folder elsewhere.")


def mended(subject: Subject) -> tuple[Subject, list[Finding]]:
    """The subject without what can be mended, and what that was."""
    fixed = []
    for check in CHECKS:
        if check.mend is None:
            continue
        for finding in check.find(subject):
            if finding.fixable:
                subject = check.mend(subject, finding)
                fixed.append(finding)
    return subject, fixed


def _write_folder(artefact: Artefact, out: Path, subject: Subject, fixed: list[Finding]) -> None:
    """A step's folder with other weights; its card says what was mended, and that its figures are from before."""
    files = dict(artefact.card["files"])
    try:
        out.mkdir(parents=True)
        for name in files:
            if name not in (WEIGHTS, MASKS):
                shutil.copyfile(artefact.folder / name, out / name)
    except OSError as error:
        raise FileError(
            f"cannot write {out}: {error.strerror or error}. Choose another folder with `--fix`."
        ) from error
    state = {name: clean(tensor) for name, tensor in subject.tensors.items()}
    files[WEIGHTS] = write_tensors(out / WEIGHTS, state, {"format": "pt"})
    files[MASKS] = Masks(subject.masks).save(out / MASKS, weights=files[WEIGHTS])
    card = {key: value for key, value in read_json(artefact.folder / CARD).items() if key != "digest"}
    card |= {"files": {name: files.get(name) or file_digest(out / name) for name in files}}
    card["mended"] = {"from": artefact.digest, "what": [f.what for f in fixed], "figures": "measured before mending"}
    write_json(out / CARD, {**card, "digest": card_digest(card)})


def _write_foreign(source: Source, out: Path, before: Subject, after: Subject) -> None:
    foreign = source.foreign
    if foreign is None:
        return
    foreign.write(out, after.tensors)
    if foreign.kind == "torch" and (after.averages is not before.averages or after.optimizer is not before.optimizer):
        try:
            _write_aside(foreign, out, after)
        except BaseException:
            out.unlink(missing_ok=True)
            raise
    if before.masked and out.name == WEIGHTS and before.masks and not (out.parent / MASKS).exists():
        Masks(after.masks).save(out.parent / MASKS)


def _write_aside(foreign: Foreign, out: Path, after: Subject) -> None:
    """Averages and the optimizer's state, into the checkpoint that holds the new weights already."""
    whole, old = load_object(out)
    for name, tensors in after.averages.items():
        if name in after.outside or name not in whole:
            continue
        paths = names_of(foreign.facts["others"][name], foreign.tensors)
        new = {path: tensors[known] for path, known in paths.items() if known in tensors}
        whole[name] = _replaced(whole[name], new)
    for name in _OPTIMIZERS:
        if name in whole and after.optimizer is not None:
            whole[name] = dict(after.optimizer)
            break
    with writing(out) as temporary, open(temporary, "wb") as file:
        torch.save(whole, file, _use_new_zipfile_serialization=not old)


def _replaced(place: Any, new: Mapping[str, Tensor], prefix: str = "") -> Any:
    """Tables and lists with the tensors that the dotted names say."""
    if isinstance(place, Tensor):
        return new.get(prefix.removesuffix("."), place)
    if isinstance(place, Mapping):
        return {key: _replaced(value, new, f"{prefix}{key}.") for key, value in place.items()}
    if isinstance(place, list | tuple):
        return type(place)(_replaced(value, new, f"{prefix}{index}.") for index, value in enumerate(place))
    return place
