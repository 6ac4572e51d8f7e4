"""What was found in a foreign file."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from secateur.core.errors import FileError
from secateur.engine.foreign.guard import contained, told

Kind = Literal["safetensors", "torch", "onnx", "pt2", "compressed-tensors"]

_WRITERS = {
    "safetensors": "tensorfolder", "torch": "torchwrite", "onnx": "onnxwrite", "pt2": "pt2file",
    "compressed-tensors": "compressed",
}  # fmt: skip
_SUFFIXES: dict[str, tuple[Kind, ...]] = {
    ".safetensors": ("safetensors", "compressed-tensors"), ".onnx": ("onnx",), ".pt2": ("pt2",), ".pt": ("torch",),
    ".pth": ("torch",), ".ckpt": ("torch",),
}  # fmt: skip
"""Formats that a name promises; a file under another's name would be refused when it is read back."""


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
            ``others`` are further state dicts by entry, ``averages`` which of them are averaged copies, ``joined`` the
            entries that were joined under their names because no single one is the network, ``optimizer`` is the state
            of the optimizer, ``metadata`` a safetensors header's text, ``files`` the shards of a folder, ``config`` its
            ``config.json``; of ONNX ``opset``, ``inputs`` with their shapes, and by what operator a tensor is ``used``.
    """

    path: Path
    kind: Kind
    tensors: dict[str, Tensor]
    stored: dict[str, str]
    ties: tuple[tuple[str, ...], ...] = ()
    left: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def write(
        self,
        path: Path,
        tensors: Mapping[str, Tensor],
        others: Mapping[str, Mapping[str, Tensor]] | None = None,
        optimizer: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write the same file with these tensors in the place of its own, and read it back.

        Args:
            path: a new file (a new folder for a folder or a sharded checkpoint).
            tensors: all of them, by name. Files of safetensors and ``torch.save`` take any names, and get them in this
                order; the graph of ONNX and ``.pt2`` needs the names, shapes and types that it has.
            others: of a checkpoint, tensors of its further state dicts that changed, by entry and name as in
                ``facts["others"]``.
            optimizer: of a checkpoint, the new state of its optimizer.

        Returns:
            The path.

        Raises:
            FileError: when the format cannot hold them (the message says which can), the name promises another format,
                the file cannot be written, or does not read back equal. Nothing is left behind then, and the original
                is never touched.

        Cost: writes and reads the file once; memory of one more copy of the tensors.
        """
        self._check_suffix(path)
        aside = {key: value for key, value in (("others", others), ("optimizer", optimizer)) if value is not None}
        if aside and self.kind != "torch":
            raise FileError(f"{path} cannot hold {' and '.join(aside)}: only checkpoints of torch.save do.")
        with contained(path, "written"):
            module = importlib.import_module(f"secateur.engine.foreign.{_WRITERS[self.kind]}")
            module.write(self, path, dict(tensors), **aside)
        return path

    def _check_suffix(self, path: Path) -> None:
        """Refuse the name of another format, unless the original bears it too."""
        suffix = path.suffix.lower()
        if (
            "files" in self.facts
            or suffix == self.path.suffix.lower()
            or self.kind in _SUFFIXES.get(suffix, (self.kind,))
        ):
            return
        usual = self.path.suffix or next(s for s, kinds in _SUFFIXES.items() if self.kind in kinds)
        raise FileError(
            f"{told(path)} would hold {self.kind}, as {told(self.path)} does, and its suffix {suffix} belongs to "
            f"another format. Name it {told(path.with_suffix(usual))}."
        )
