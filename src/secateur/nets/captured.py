"""Networks captured by ``torch.export``, from their files."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
from torch import nn

from secateur.core.errors import FileError

CAPTURE = (
    'torch.export.save(torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},)), path)'
)
"""How to capture a network for batches of any size."""

_MARKS = ("archive_format", "serialized_exported_program.json")


def load(path: str) -> nn.Module:
    """The network in a file of ``torch.export.save``; its parameters can be trained and pruned.

    The graph acts as it did when it was captured, usually in evaluation mode (dropout off, BatchNorm with its
    running statistics): ``train()`` and ``eval()`` set the flag and change nothing else. Such a file can hold
    code: load only files that you trust.

    Raises:
        FileError: when the file is missing, damaged, or of another kind; the message names it.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileError(f"there is no file {path!r} (looked in {Path.cwd()}). Check the path.")
    cure = f"Write it anew with {CAPTURE}."
    try:
        with zipfile.ZipFile(file) as archive:
            members = {member.rpartition("/")[2] for member in archive.namelist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise FileError(f"{path!r} cannot be read: {error}. {cure}") from error
    if members.isdisjoint(_MARKS):
        raise FileError(f"{path!r} is not a file of torch.export.save. {cure}")
    try:
        model = torch.export.load(file).module()
    except Exception as error:  # torch promises no kind of error for damaged files
        raise FileError(f"{path!r} cannot be read: {type(error).__name__}: {error}. {cure}") from error
    # torch hangs refusals on the module; behind them are nn.Module's own methods, which every user of a network calls.
    for method in ("train", "eval"):
        vars(model).pop(method, None)
    return model
