"""The artefact: a folder that holds a network, its masks and what was measured. Never a pickle.

``weights.safetensors`` (plain names, loads without this library), ``masks.safetensors`` (one bit a
weight), ``structure.json`` (how to build the network), ``recipe.toml`` (how it came about) and
``card.json`` (figures, seeds, versions, machine, and the digest of every other file), written last.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from secateur import __version__
from secateur.core.errors import FileError, ModelError, nearest
from secateur.core.files import file_digest, read_json, read_tensors, write_bytes, write_json, write_tensors
from secateur.core.masks import Masks
from secateur.core.names import aliases, unwrap
from secateur.engine.rebuilding import classes_of, resize, sizes_of
from secateur.nets import build
from secateur.runtime.paths import cpu_name

WEIGHTS, MASKS, STRUCTURE, RECIPE, CARD = (
    "weights.safetensors", "masks.safetensors", "structure.json", "recipe.toml", "card.json",
)  # fmt: skip
BUFFERS = "buffers.safetensors"
"""Buffers that ``state_dict`` leaves out, where there are any: a smaller network needs what surgery left of them."""
PROGRAM = "program.pt2"
"""The graph of a network that has no class of its own any more."""
REWRITTEN = "torch.fx:GraphModule"
"""How ``structure.json`` names such a network."""


@dataclass(frozen=True)
class Artefact:
    """A finished folder, its files checked against their digests.

    Args:
        folder: where it is.
        structure: how to build the network.
        card: what was measured.
    """

    folder: Path
    structure: Mapping[str, Any]
    card: Mapping[str, Any]

    @classmethod
    def open(cls, folder: str | Path, *, bare: bool = False) -> Artefact:
        """Open a folder and verify every file.

        Args:
            folder: where it is.
            bare: take a folder without ``structure.json`` too, as ``adopt`` writes it without a class; the structure is
                empty then, and the network cannot be built.

        Raises:
            FileError: when it is missing, unfinished, names files elsewhere, or a file was changed or truncated.
        """
        folder = resolve(Path(folder))
        card = _checked_card(folder)
        if bare and STRUCTURE not in card["files"]:
            return cls(folder, {}, card)
        structure = read_json(folder / STRUCTURE)
        about = structure.get("model") if isinstance(structure, dict) else None
        if not isinstance(about, dict) or not isinstance(about.get("use"), str):
            raise FileError(f"{folder / STRUCTURE} does not say how to build a network. Make the folder again.")
        return cls(folder, structure, card)

    @property
    def digest(self) -> str:
        """Digest of weights and masks together."""
        files = self.card["files"]
        return f"{files[WEIGHTS]}{files.get(MASKS, '')}"

    def masks(self) -> Masks:
        """Which weights are kept."""
        return Masks.load(self.folder / MASKS)

    def state(self) -> dict[str, Tensor]:
        """The weights and buffers, under the names of ``state_dict``."""
        return read_tensors(self.folder / WEIGHTS)[0]

    def build(self) -> nn.Module:
        """A fresh network with the saved weights, in evaluation mode.

        Raises:
            FileError: when the weights do not fit the network that ``structure.json`` names.
        """
        about = self.structure["model"]
        if PROGRAM in self.card["files"] and ":" in about["use"]:
            return self.program()
        net = build(about["use"], tuple(about["input_shape"] or ()) or None, about["outputs"], **about["options"])
        resize(net, self.structure, self.buffers(), str(self.folder / STRUCTURE))
        load_state(net, self.state(), str(self.folder / WEIGHTS))
        self.masks().check(net)
        return net.eval()

    def buffers(self) -> dict[str, Tensor]:
        """Buffers that are not among the weights."""
        return read_tensors(self.folder / BUFFERS)[0] if BUFFERS in self.card["files"] else {}

    def program(self) -> nn.Module:
        """The network from its graph, without its class.

        Raises:
            FileError: when the graph cannot be read.
        """
        try:
            exported = torch.export.load(str(self.folder / PROGRAM))
            net = exported.module(check_guards=False)
        except Exception as error:  # the format is torch's own and may fail in any way
            raise FileError(f"{self.folder / PROGRAM} cannot be read by torch {torch.__version__}: {error}") from error
        net = GraphModule(net, net.graph)
        load_state(net, self.state(), str(self.folder / WEIGHTS))
        self.masks().check(net)
        return net


def _checked_card(folder: Path) -> dict[str, Any]:
    """The card of a folder whose files are all its own and are those that were saved.

    Raises:
        FileError: when they are not. A digest is no seal: whoever makes the card can name any file in it.
    """
    card = read_json(folder / CARD)
    if not isinstance(card, dict) or not isinstance(card.get("files"), dict):
        raise FileError(f"{folder / CARD} is not a card of this library. Make the folder again.")
    if card.get("digest") != card_digest(card):
        raise FileError(f"{folder / CARD} was changed after it was written (its digest differs). Restore a copy.")
    if WEIGHTS not in card["files"]:
        raise FileError(f"{folder} holds no network, only results. Pass the folder of a step that has weights.")
    for name, digest in card["files"].items():
        if not _is_own(folder, name):
            raise FileError(
                f"{folder / CARD} names the file {ascii(name)[:80]}, which is no plain file in its own folder. "
                "Get the folder again from where it was made."
            )
        if file_digest(folder / name) != digest:
            raise FileError(
                f"{folder / name} is not the file that was saved (its digest differs from the one in {CARD}). "
                "Restore a copy, or run the step again after deleting the folder."
            )
    return card


def _is_own(folder: Path, name: str) -> bool:
    """Whether a name is that of an ordinary file in the folder itself (or of none): no path, link, pipe or device."""
    if not name.isprintable() or name in ("", ".", "..") or {"/", "\\", ":"} & set(name) or name == CARD:
        return False
    path = folder / name
    return not os.path.islink(path) and (os.path.isfile(path) or not os.path.exists(path))


def opened(folders: Sequence[str]) -> list[tuple[str, Artefact]]:
    """The networks of some folders, each called as its folder is.

    Raises:
        FileError: when one is missing, unfinished or changed.
    """
    return [(Path(folder).resolve().name, Artefact.open(folder)) for folder in folders]


def resolve(path: Path) -> Path:
    """The step folder behind a path: itself, or the last finished step of a run folder.

    Raises:
        FileError: when there is none; the message says what is there.
    """
    if (path / CARD).is_file():
        return path
    if not path.is_dir():
        near = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
        hint = f" {nearest(path.name, near)}" if near else ""
        raise FileError(f"there is no folder {path}.{hint} Pass a run folder made by `secateur train` or `prune`.")
    finished = sorted((p for p in path.iterdir() if (p / CARD).is_file() and (p / WEIGHTS).is_file()), key=_order)
    if not finished:
        unfinished = [p.name for p in path.iterdir() if (p / "state.pt").is_file()]
        why = (
            f"step {unfinished[0]} is unfinished: run the same command again to go on"
            if unfinished
            else "no step in it is finished"
        )
        raise FileError(f"{path} holds no network: {why}.")
    return finished[-1]


def _order(folder: Path) -> tuple[str, float]:
    return folder.name.partition("-")[0].zfill(6), (folder / CARD).stat().st_mtime


def load_state(net: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """``load_state_dict`` with one clear message.

    Raises:
        FileError: naming the first missing, unknown or misshapen tensor.
    """
    own = unwrap(net).state_dict()
    missing, unknown = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    leftovers = [name for name in unknown if name.endswith(("_orig", "_mask"))]
    if leftovers:
        raise FileError(
            f"{origin} holds leftovers of torch.nn.utils.prune (`{leftovers[0]}`). Call `prune.remove(module, name)` "
            "for each pruned tensor and save again; `secateur doctor` lists them."
        )
    if missing or unknown:
        what = f"it lacks `{missing[0]}`" if missing else f"the network has no `{unknown[0]}`"
        raise FileError(
            f"{origin} does not fit the network: {what} ({len(missing)} missing, {len(unknown)} unknown). "
            "Check `--net` and its options."
        )
    for name, tensor in own.items():
        if state[name].shape != tensor.shape:
            raise FileError(
                f"{origin} does not fit the network: `{name}` has shape {tuple(state[name].shape)} in the file and "
                f"{tuple(tensor.shape)} in the network. Give the widths it was made with."
            )
    unwrap(net).load_state_dict(dict(state))


def structure_of(net: nn.Module, model: Mapping[str, Any], left_alone: Mapping[str, str]) -> dict[str, Any]:
    """What ``structure.json`` holds: how to build the network, its shapes, and what pruning left alone."""
    plain = unwrap(net)
    return {
        "format": "secateur.structure/1",
        "model": dict(model),
        "parameters": {n: {"shape": list(p.shape), "dtype": str(p.dtype)} for n, p in plain.named_parameters()},
        "buffers": {n: {"shape": list(b.shape), "dtype": str(b.dtype)} for n, b in plain.named_buffers()},
        "sizes": sizes_of(net),
        "thin_attention": classes_of(net),
        "tied": {first: names[1:] for first, names in aliases(net).items() if len(names) > 1},
        "left_alone": dict(left_alone),
    }


def save(
    folder: Path,
    net: nn.Module,
    masks: Masks,
    structure: Mapping[str, Any],
    recipe: str,
    card: Mapping[str, Any],
    program: ExportedProgram | None = None,
) -> Artefact:
    """Write an artefact, read it back and compare; the card comes last, so a folder with one is whole.

    Args:
        folder: where; made if absent.
        net: the network.
        masks: which weights are kept.
        structure: see :func:`structure_of`.
        recipe: how it came about.
        card: what was measured.
        program: its graph, for loading without the class.

    Raises:
        MaskError: when a pruned weight is not zero.
        ModelError: when a weight is not finite.
        FileError: when it cannot be written or does not read back equal.
    """
    masks.check(net)
    state = {name: clean(tensor) for name, tensor in unwrap(net).state_dict().items() if isinstance(tensor, Tensor)}
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ModelError(
                f"`{name}` holds NaN or infinity; nothing was saved. Train with a lower rate, or clip gradients."
            )
    files = {WEIGHTS: write_tensors(folder / WEIGHTS, state, {"format": "pt"})}
    files[MASKS] = masks.save(folder / MASKS, weights=files[WEIGHTS])
    write_json(folder / STRUCTURE, dict(structure))
    write_bytes(folder / RECIPE, recipe.encode())
    files |= {name: file_digest(folder / name) for name in (STRUCTURE, RECIPE)}
    aside = {name: clean(b) for name, b in unwrap(net).named_buffers() if name not in state}
    if aside:
        files[BUFFERS] = write_tensors(folder / BUFFERS, aside, {"format": "pt"})
    if program is not None:
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        write_bytes(folder / PROGRAM, buffer.getvalue())
        files[PROGRAM] = file_digest(folder / PROGRAM)
    whole = {"format": "secateur.card/1", **card, "files": files, "made_by": origin()}
    write_json(folder / CARD, {**whole, "digest": card_digest(whole)})
    return Artefact.open(folder)


@contextlib.contextmanager
def new_folder(out: Path, flag: str) -> Iterator[Path]:
    """A temporary neighbour that takes the name of a new folder when the block ends well, and else is gone.

    Args:
        out: the folder, which must not be there.
        flag: the option that named it, for messages.

    Raises:
        FileError: when it cannot be written; nothing is left behind then.
    """
    temporary = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        temporary.chmod(0o755)
        yield temporary
        temporary.replace(out)
    except OSError as error:
        raise FileError(
            f"cannot write {out}: {error.strerror or error}. Choose another folder with `{flag}`."
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def card_digest(card: Mapping[str, Any]) -> str:
    """SHA-256 of a card without its own digest."""
    table = {key: value for key, value in card.items() if key != "digest"}
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def clean(tensor: Tensor) -> Tensor:
    """A copy on the CPU in which -0.0 is 0.0 (a pruned weight must be all zero bits, so that zeros compress)."""
    copy = tensor.detach().cpu().clone()
    return copy + 0.0 if copy.is_floating_point() else copy


def origin() -> dict[str, Any]:
    """Versions and machine, for the card."""
    return {
        "secateur": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }
