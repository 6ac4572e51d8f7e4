"""What lies in a folder beside its weights: copied along, but for other weights of the same network."""

from __future__ import annotations

import fnmatch
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from secateur.core.errors import FileError
from secateur.engine.foreign.guard import opened
from secateur.engine.foreign.tensorfile import header

_WEIGHTS = (
    "pytorch_model*", "tf_model*", "flax_model*", "consolidated*", "model*.bin", "model*.pt", "model*.pth", "*.onnx",
    "*.onnx_data", "*.onnx.data", "*.gguf", "*.ggml", "*.h5", "*.msgpack", "*.ot", "*.tflite", "*.ckpt", "*.pt2",
    "*.index.json",
)  # fmt: skip
"""Names under which the programs of Hugging Face save the same network again."""
_SMALL = (".json", ".txt", ".model")


def copy_beside(folder: Path, into: Path, own: Collection[str], names: Collection[str]) -> dict[str, str]:
    """Copy everything in a folder but its weights.

    Subfolders are copied too. A link is followed where it leads into the folder itself or into the cache of Hugging
    Face that the folder belongs to, and where it is a small text as such folders have them.

    Args:
        folder: where the files lie.
        into: where they go.
        own: names of the weights and their index, which are written anew.
        names: of the tensors; other files of weights that hold such are the same network from before.

    Returns:
        What was not copied, and why.

    Raises:
        OSError: when a file cannot be read or written.
    """
    left: dict[str, str] = {}
    for file in _files(folder, left):
        name = file.relative_to(folder).as_posix()
        if name in own:
            continue
        if file.is_symlink() and not _sensible(file, folder):
            left[name] = "it is a link that leads elsewhere"
        elif not file.is_file():
            left[name] = "it is no ordinary file"
        elif _again(file, folder, names):
            left[name] = "it holds the same network as it was before"
        else:
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, into / name)
    return left


def _files(folder: Path, left: dict[str, str], here: str = "") -> Iterator[Path]:
    """All files, those in subfolders too; not in hidden ones, which are stores of other programs."""
    for file in sorted((folder / here).iterdir()):
        name = file.relative_to(folder).as_posix()
        if not file.is_dir():
            yield file
        elif file.is_symlink() or file.name.startswith("."):
            left[name] = "it is a link to a folder" if file.is_symlink() else "it is a hidden folder"
        else:
            yield from _files(folder, left, name)


def _sensible(file: Path, folder: Path) -> bool:
    """Whether a link may be followed: other files of the user are none of this copy's business."""
    target, home = Path(os.path.realpath(file)), Path(os.path.realpath(folder))
    caches = [place.parent / "blobs" for place in home.parents if place.name == "snapshots"]
    return any(target.is_relative_to(place) for place in (home, *caches)) or file.suffix in _SMALL


def _again(file: Path, folder: Path, names: Collection[str]) -> bool:
    """Whether a file holds the weights of the network once more."""
    if file.suffix != ".safetensors":
        return not _configured(file, folder) and any(fnmatch.fnmatchcase(file.name, known) for known in _WEIGHTS)
    try:
        with opened(file) as stream:
            found, metadata, _ = header(file, stream)
    except FileError:  # whatever it is, the network's tensors are not in it
        return False
    masks = metadata.get("format", "").startswith("secateur.masks")
    return not masks and 2 * len(found.keys() & set(names)) > len(found)


def _configured(file: Path, folder: Path) -> bool:
    """Whether a file belongs to another network, which a subfolder holds with its own settings."""
    inside = file.parent
    while inside != folder and not (inside / "config.json").is_file():
        inside = inside.parent
    return inside != folder
