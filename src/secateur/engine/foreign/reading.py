"""Which reader a file is for."""

from __future__ import annotations

from pathlib import Path

from secateur.engine.foreign import tensorfile, torchfile
from secateur.engine.foreign.guard import contained, opened, refusal
from secateur.engine.foreign.record import Foreign

_OTHERS = {
    b"\x89HDF\r\n\x1a\n": "HDF5 (Keras)", b"GGUF": "GGUF", b"\x93NUMPY": "a NumPy array", b"\x1f\x8b": "gzip",
    b"ustar": "tar", b"\x28\xb5\x2f\xfd": "zstd",
}  # fmt: skip
KINDS = "safetensors, torch.save, ONNX, .pt2, and folders of Hugging Face with safetensors"


def read(path: Path) -> Foreign:
    """Read the tensors of a file without running anything in it.

    Args:
        path: a file of safetensors, ``torch.save``, ONNX or ``torch.export.save``; an index of shards
            (``*.index.json``); or a folder of Hugging Face.

    Returns:
        Its tensors by name, decoded to plain dense ones, and what else it tells.

    Raises:
        FileError: when it is missing, damaged, of another kind, names files elsewhere, declares sizes that cannot be
            true, or would run code. The message names the file, what is wrong, and the cure.

    Cost: reads the file once; memory of its tensors, which is bounded by the size of the file.
    """
    with contained(path):
        return _read(path)


def _read(path: Path) -> Foreign:
    if path.suffix == ".safetensors":
        return _single(path)
    with opened(path) as file:
        start = file.read(64)
    for mark, name in _OTHERS.items():
        if start.startswith(mark):
            raise refusal(path, f"it is {name}, which is not read here", f"Read are: {KINDS}.")
    if start[:4] == b"PK\x03\x04" or torchfile.is_old(start):
        return Foreign(path, "torch", **torchfile.load(path))
    if start[8:9] == b"{":
        return _single(path)
    raise refusal(path, "it is of no kind that is read here", f"Read are: {KINDS}.")


def _single(path: Path) -> Foreign:
    found = tensorfile.load(path)
    stored = {name: "plain" for name in found.tensors}
    return Foreign(path, "safetensors", found.tensors, stored, (), found.left, {"metadata": found.metadata})
