"""Which reader a file is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secateur.engine.foreign import compressed, onnxfile, pt2file, tensorfile, torchfile
from secateur.engine.foreign.guard import check_zip, contained, opened, read_config, refusal
from secateur.engine.foreign.record import Foreign
from secateur.engine.foreign.tensorfile import Content

_OTHERS = {
    b"\x89HDF\r\n\x1a\n": "HDF5 (Keras)", b"GGUF": "GGUF", b"\x93NUMPY": "a NumPy array", b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
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
        return _folder(path) if path.is_dir() else _file(path)


def _file(path: Path) -> Foreign:
    if path.suffix == ".safetensors":
        return _tensors(path, tensorfile.load(path), {})
    if path.name.endswith(".index.json"):
        return _shards(path)
    with opened(path) as file:
        start = file.read(64)
        for mark, name in _OTHERS.items():
            if start.startswith(mark):
                raise refusal(path, f"it is {name}, which is not read here", f"Read are: {KINDS}.")
        if start[:2] == b"PK":
            program = pt2file.is_program(check_zip(path, file).namelist())
            return (
                Foreign(path, "pt2", **pt2file.load(path))
                if program
                else Foreign(path, "torch", **torchfile.load(path))
            )
    if torchfile.is_old(start) and path.suffix != ".onnx":
        return Foreign(path, "torch", **torchfile.load(path))
    if start[8:9] == b"{" and path.suffix != ".onnx":
        return _tensors(path, tensorfile.load(path), {})
    if onnxfile.is_onnx(path, start):
        return Foreign(path, "onnx", **onnxfile.load(path))
    if path.suffix == ".json":
        raise refusal(path, "it holds no weights", f"Pass its folder, {path.parent}, or an index of shards.")
    raise refusal(path, "it is of no kind that is read here, or damaged at its beginning", f"Read are: {KINDS}.")


def _tensors(path: Path, found: Content, facts: dict[str, Any]) -> Foreign:
    """A checkpoint in safetensors, with the settings that lie beside it."""
    folder = path if path.is_dir() else path.parent
    config = folder / "config.json"
    facts = {"metadata": found.metadata, **facts}
    told: dict[str, Any] = {}
    if config.is_file() or (path.is_dir() and config.exists()):
        facts["config"] = read_config(config)
        told = compressed.settings(config, facts["config"])
    packed = compressed.bases(found.tensors)
    if not packed and told.get("format", "dense") == "dense":
        stored = {name: "plain" for name in found.tensors}
        return Foreign(path, "safetensors", found.tensors, stored, (), found.left, facts)
    tensors, stored = compressed.decode(path, found.tensors, told)
    facts |= {"packed": {compressed.dense_name(base): base for base in packed}, "sparsity": told}
    return Foreign(path, "compressed-tensors", tensors, stored, (), found.left, facts)


def _shards(index: Path, path: Path | None = None) -> Foreign:
    found, where = tensorfile.load_shards(index)
    return _tensors(path or index, found, {"files": where, "index": index.name})


def _folder(path: Path) -> Foreign:
    known, indices = (path / "config.json").exists(), _indices(path)
    if not known and len(indices) != 1:
        kinds = (".safetensors", ".pt", ".pth", ".bin", ".onnx", ".pt2", ".index.json")
        there = sorted(p.name for p in path.iterdir() if p.name.endswith(kinds))
        hint = f"Name one of its files: {', '.join(there[:4])}." if there else "It holds no file of weights."
        raise refusal(path, "it is a folder without config.json, so not one of Hugging Face", hint)
    single = sorted(path.glob("*.safetensors"))
    if len(indices) == 1:
        return _shards(indices[0], path)
    if (path / "model.safetensors").exists() or len(single) == 1:
        file = path / "model.safetensors" if (path / "model.safetensors").exists() else single[0]
        found = tensorfile.load(file)
        return _tensors(path, found, {"files": {name: file.name for name in found.tensors}})
    older = sorted(path.glob("pytorch_model*.bin"))
    if len(older) == 1:
        return _file(older[0])
    what = f"it holds {len(single) or len(older)} files of weights" + ("" if not single else " and no index of them")
    raise refusal(path, what, "Name one of the files, or an index of shards (`*.index.json`).")


def _indices(path: Path) -> list[Path]:
    """The index of shards of safetensors in a folder; of several the one with the usual name."""
    if (path / tensorfile.INDEX).exists():
        return [path / tensorfile.INDEX]
    return sorted(p for p in path.glob("*.index.json") if not p.name.endswith(".bin.index.json"))
