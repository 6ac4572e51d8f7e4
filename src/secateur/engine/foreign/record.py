"""What was found in a foreign file."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from secateur.engine.foreign.guard import contained

Kind = Literal["safetensors", "torch", "onnx", "pt2", "compressed-tensors"]

_WRITERS = {
    "safetensors": "tensorfile", "torch": "torchfile", "onnx": "onnxwrite", "pt2": "pt2file",
    "compressed-tensors": "compressed",
}  # fmt: skip


@dataclass(frozen=True)
class Foreign:
    """The tensors of a file, and what else it tells.

    Args:
        path: the file, or the folder.
        kind: its format.
        tensors: by name, as plain dense tensors on the CPU.
        stored: how each lies in the file, such as ``plain`` or ``bitmask``.
        ties: names that share their memory in the file.
        left: entries that were not read, and why.
        facts: what the format says besides. ``under`` is the entry of a checkpoint that holds the tensors,
            ``others`` are further state dicts by entry (averaged copies among them), ``optimizer`` is the state of the
            optimizer, ``metadata`` a safetensors header's text, ``files`` the shards of a folder, ``config`` its
            ``config.json``; of ONNX ``opset``, ``inputs`` with their shapes, and by what operator a tensor is ``used``.
    """

    path: Path
    kind: Kind
    tensors: dict[str, Tensor]
    stored: dict[str, str]
    ties: tuple[tuple[str, ...], ...] = ()
    left: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path, tensors: Mapping[str, Tensor]) -> Path:
        """Write the same file with these tensors in the place of its own, and read it back.

        Args:
            path: a new file (a new folder for a folder or a sharded checkpoint).
            tensors: all of them, by name. Files of safetensors and ``torch.save`` take any names; the graph of ONNX
                and ``.pt2`` needs the names, shapes and types that it has.

        Returns:
            The path.

        Raises:
            FileError: when the format cannot hold them (the message says which can), the file cannot be written, or
                does not read back equal. Nothing is left behind then, and the original is never touched.

        Cost: writes and reads the file once; memory of one more copy of the tensors.
        """
        with contained(path, "written"):
            module = importlib.import_module(f"secateur.engine.foreign.{_WRITERS[self.kind]}")
            module.write(self, path, dict(tensors))
        return path
