"""Orphaned files become folders of this library: read, fitted, written, read back and compared."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.core import streams
from secateur.core.calls import first_line
from secateur.core.errors import FileError, ModelError, UsageError
from secateur.core.files import file_digest, write_json, write_tensors
from secateur.core.masks import Masks
from secateur.core.names import unwrap
from secateur.core.prunable import check_finite, comparable, coverage
from secateur.core.task import call
from secateur.engine import folder as folders
from secateur.engine.folder import CARD, MASKS, STRUCTURE, WEIGHTS, Artefact
from secateur.engine.foreign import hub
from secateur.engine.foreign.fitting import fit
from secateur.engine.foreign.orphans import Orphan, gather, masks_of, zeros
from secateur.engine.foreign.reading import read
from secateur.engine.foreign.record import Foreign
from secateur.nets import build

LIMIT = 1e-3
"""Largest difference of outputs from those of ONNX Runtime, relative to the largest output."""
_LACKS = (
    "structure.json: no class was given, so `secateur.load` cannot build the network; load weights.safetensors into "
    "yours, or adopt the folder again with --net"
)


@dataclass(frozen=True)
class Network:
    """The class that weights belong to.

    Args:
        use: a network of ``secateur.nets``, ``module:Class``, a ``.pt2`` file, or ``transformers:Class`` for a folder
            with ``config.json``.
        options: what it is built with.
        shape: of one example, without the batch; outputs are compared on random ones.
        outputs: classes of the data, for networks that ask for them.
        tokens: examples are numbers of tokens below this.
        unfold: BatchNorm that an exporter folded into the layers before it becomes an identity; else it is refused.
    """

    use: str
    options: Mapping[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] | None = None
    outputs: int | None = None
    tokens: int | None = None
    unfold: bool = False


@dataclass(frozen=True)
class Adopted:
    """What became of a file.

    Args:
        file: where it was.
        kind: its format.
        folder: what was written; empty after a dry run.
        network: the class, or an empty text.
        tensors: how many.
        zeros: in all of them together.
        kept: weights that the masks keep.
        total: weights that have a mask.
        compared: how the outputs were compared, or why they were not.
        error: the largest difference, relative to the largest output.
        notes: what was done on the way, and what was not read.
        lacks: what the folder does not have.
    """

    file: str
    kind: str
    folder: str
    network: str
    tensors: int
    zeros: int
    kept: int
    total: int
    compared: str
    error: float | None
    notes: list[str]
    lacks: list[str]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def adopt(path: Path, out: Path | None, network: Network | None = None, entry: str = "") -> Adopted:
    """Turn a file of another program into a folder of this library.

    With a class the folder is an artefact as every run writes it. Without one it has plain weights, masks and a card,
    and says what it lacks.

    Args:
        path: a file or folder that :func:`read` takes.
        out: the folder to write, which must not be there; None writes nothing.
        network: the class, where it is known.
        entry: another state dict in the file than the network's, such as its averaged copy.

    Returns:
        What was found and written.

    Raises:
        FileError: when the file is not believed, does not fit the class (the message lists the names), is this
            library's already, computes something else than the class, or does not read back equal.
        ModelError: when weights are not finite, or the class does not run.
        UsageError: when the class cannot be built.

    Cost: reads the file once, writes it once and reads it back; one batch of two examples where a shape is known.
    """
    if (path / STRUCTURE).is_file() and (path / CARD).is_file():
        raise FileError(f"{path} is a folder of this library already; use it as it is, `secateur.load({str(path)!r})`.")
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileError(f"{out} is there already; name a new folder with `-o`.")
    # What was adopted without a class has its weights, and the masks beside them.
    found = read(path / WEIGHTS if (path / CARD).is_file() and (path / WEIGHTS).is_file() else path)
    about = _about(found, network) if network is not None else {}
    net = _build(about) if network is not None else None
    orphan = gather(found, entry, frozenset() if net is None else frozenset(unwrap(net).state_dict()))
    weights = {name: t for name, t in orphan.tensors.items() if found.stored.get(name) != "constant node"}
    check_finite({name: t for name, t in weights.items() if t.is_floating_point() or t.is_complex()})
    if network is None or net is None:
        return _plain(found, orphan, out)
    return _artefact(found, orphan, out, network, about, net)


def _plain(found: Foreign, orphan: Orphan, out: Path | None) -> Adopted:
    """Weights and masks without a class."""
    masks, left = masks_of(orphan)
    made, compared = Masks(masks), "not compared: no class was given"
    done = _adopted(found, orphan, made, out, "", compared, None, [_LACKS])
    if out is None:
        return done
    with _place(out) as folder:
        state = {name: _clean(tensor) for name, tensor in orphan.tensors.items()}
        files = {WEIGHTS: write_tensors(folder / WEIGHTS, state, {"format": "pt"})}
        files[MASKS] = made.save(folder / MASKS, weights=files[WEIGHTS])
        whole = {"format": "secateur.card/1", **_card(done, made), "left_alone": left, "files": files}
        whole["made_by"] = folders.origin()
        write_json(folder / CARD, {**whole, "digest": folders.card_digest(whole)})
        _check_back(folder, orphan, Masks.load(folder / MASKS), made)
    return done


def _clean(tensor: Tensor) -> Tensor:
    """A copy in which -0.0 is 0.0, also of numbers of 8 bits, which torch cannot add."""
    if comparable(tensor).dtype == tensor.dtype:
        return folders.clean(tensor)
    return (comparable(tensor).cpu() + 0.0).to(tensor.dtype)


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(comparable(one), comparable(other))


def _check_back(folder: Path, orphan: Orphan, read_back: Masks, made: Masks) -> None:
    """The numbers on the disk are those of the file, zero for zero."""
    again = read(folder / WEIGHTS).tensors
    for name, tensor in orphan.tensors.items():
        if name not in again or zeros(again[name]) != zeros(tensor) or not _equal(again[name], tensor):
            raise FileError(f"`{name}` in {folder} did not read back as written; the disk may be failing.")
    if read_back != made:
        raise FileError(f"the masks in {folder} did not read back as written; the disk may be failing.")


def _artefact(
    found: Foreign, orphan: Orphan, out: Path | None, network: Network, about: dict[str, Any], net: nn.Module
) -> Adopted:
    """A folder with a class, compared with the file."""
    example = _example(found, network, about)
    if network.unfold and example is None:
        raise UsageError("--unfold runs the class once; pass --shape, the shape of one example.")
    masks = fit(found, orphan, net, example if network.unfold else None)
    compared, error = _against_file(found, net, example)
    done = _adopted(found, orphan, masks, out, type(net).__name__, compared, error, [])
    if out is None:
        return done
    left = {n: why for n, why in coverage(net).left_alone.items() if n not in masks}
    with _place(out) as folder:
        recipe = f"# adopted from {ascii(found.path.name)}\n"
        structure = folders.structure_of(net, about, left)
        artefact = folders.save(folder, net, masks, structure, recipe, _card(done, masks))
        _check_again(artefact, net, masks, example)
    Artefact.open(out)
    return done


def _about(found: Foreign, network: Network) -> dict[str, Any]:
    """How to build the network, for ``structure.json``."""
    use, options = network.use, dict(network.options)
    library, _, kind = use.partition(":")
    if library == "transformers":
        if not isinstance(found.facts.get("config"), dict):
            raise UsageError(f"--net {use} needs the config.json of the network beside {found.path}.")
        use, options = hub.USE, {"kind": kind, "config": found.facts["config"]}
    shape = list(network.shape) if network.shape else None
    return {"use": use, "options": options, "input_shape": shape, "outputs": network.outputs}


def _build(about: Mapping[str, Any]) -> nn.Module:
    with streams.seeded(0, "adopt"):
        net = build(about["use"], tuple(about["input_shape"] or ()) or None, about["outputs"], **about["options"])
    return net.cpu().eval()


def _example(found: Foreign, network: Network, about: Mapping[str, Any]) -> Tensor | None:
    """Two random examples, where their shape is known."""
    shape, tokens, batch = network.shape, network.tokens, 2
    inputs: dict[str, list[int | None]] = {}
    for name, sizes in found.facts.get("inputs", {}).items():
        if name not in found.tensors:  # old files list their weights among the inputs
            inputs[name] = sizes or []
    if len(inputs) == 1:
        sizes = next(iter(inputs.values()))
        batch = sizes[0] or 2 if sizes else 2
        if shape is None and len(sizes) > 1 and None not in sizes[1:]:
            shape = tuple(size for size in sizes[1:] if size is not None)
    config = about["options"].get("config") if about["use"] == hub.USE else None
    if isinstance(config, dict) and shape is None and type(config.get("vocab_size")) is int:
        shape, tokens = (8,), config["vocab_size"]
    if shape is None:
        return None
    draw = streams.stream(0, "adopt", "example")
    if tokens:
        return torch.randint(0, tokens, (batch, *shape), generator=draw)
    return torch.randn(batch, *shape, generator=draw)


def _outputs(net: nn.Module, example: Tensor) -> list[Tensor]:
    try:
        with torch.no_grad():
            made = call(net, example)
    except Exception as error:  # it is the user's code
        raise ModelError(
            f"{type(net).__name__}, filled from the file, does not run on inputs of shape {tuple(example.shape)} "
            f"({type(error).__name__}: {first_line(error)}). Check --shape and the options of the class."
        ) from error
    return [leaf.detach() for leaf in pytree.tree_leaves(made) if isinstance(leaf, Tensor)]


def _against_file(found: Foreign, net: nn.Module, example: Tensor | None) -> tuple[str, float | None]:
    """Compare with the file itself where something else can run it."""
    if example is None:
        return "not compared: pass --shape, the shape of one example", None
    ours = _outputs(net, example)
    if found.kind != "onnx":
        return "of the folder are those of the class filled from the file", None
    if importlib.util.find_spec("onnxruntime") is None:
        return "not compared with the file: `pip install onnxruntime`", None
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(found.path), providers=["CPUExecutionProvider"])
        theirs = session.run(None, {session.get_inputs()[0].name: example.numpy()})
    except Exception as error:  # ONNX Runtime has its own, and does not export them
        return f"not compared with the file: ONNX Runtime cannot run it ({first_line(error)})", None
    pairs = [(a.double(), torch.from_numpy(b).double()) for a, b in zip(ours, theirs, strict=False)]
    for a, b in pairs:
        if a.shape != b.shape:
            shapes = f"outputs of {list(b.shape)} and the class of {list(a.shape)}"
            raise FileError(f"{found.path} gives {shapes}. Name the class that was exported.")
    error = max((_apart(a, b) for a, b in pairs), default=0.0)
    if not error <= LIMIT:
        raise FileError(
            f"the weights of {found.path} fit {type(net).__name__}, but its outputs differ by {error:.2g} from those "
            "of the file: it computes something else. Name the class that was exported."
        )
    return "compared with the file in ONNX Runtime", error


def _apart(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest number of the second."""
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-12)) if other.numel() else 0.0


def _check_again(artefact: Artefact, net: nn.Module, masks: Masks, example: Tensor | None) -> None:
    """The folder gives the network back: zeros counted, outputs equal."""
    again = artefact.build()
    mine, theirs = net.state_dict(), again.state_dict()
    for name, tensor in mine.items():
        if zeros(theirs[name]) != zeros(tensor) or not _equal(theirs[name], tensor):
            raise FileError(f"`{name}` in {artefact.folder} did not read back as written; the disk may be failing.")
    if artefact.masks() != masks:
        raise FileError(f"the masks in {artefact.folder} did not read back as written; the disk may be failing.")
    if example is not None:
        for one, other in zip(_outputs(net, example), _outputs(again, example), strict=True):
            if not torch.allclose(one, other, rtol=1e-5, atol=1e-6, equal_nan=True):
                raise FileError(
                    f"{type(net).__name__} gives other outputs each time it is built with the same weights; "
                    "it holds numbers that are not in its state dict. Make them buffers."
                )


def _adopted(
    found: Foreign, orphan: Orphan, masks: Masks, out: Path | None, name: str, compared: str, error: float | None,
    lacks: list[str],
) -> Adopted:  # fmt: skip
    zero = sum(zeros(tensor) for tensor in orphan.tensors.values())
    return Adopted(
        str(found.path), found.kind, "" if out is None else str(out), name, len(orphan.tensors), zero,
        masks.kept, masks.total, compared, error, orphan.notes, lacks,
    )  # fmt: skip


def _card(done: Adopted, masks: Masks) -> dict[str, Any]:
    counts = {name: [int(mask.sum()), mask.numel()] for name, mask in masks.items()}
    source = {"file": Path(done.file).name, "kind": done.kind}
    if Path(done.file).is_file():
        source["digest"] = file_digest(Path(done.file))
    return {
        "do": "adopt", "kept": done.kept, "total": done.total, "sparsity": masks.sparsity, "counts": counts,
        "from": source, "compared": done.compared, "error": done.error, "notes": done.notes, "lacks": done.lacks,
    }  # fmt: skip


class _place:
    """A new folder that takes its name when the block ends well, and else is gone."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def __enter__(self) -> Path:
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix=f".{self.out.name}.", dir=self.out.parent))
            self.folder.chmod(0o755)
        except OSError as error:
            raise FileError(f"cannot write {self.out}: {error.strerror or error}. Name a folder with `-o`.") from error
        return self.folder

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        try:
            if kind is None:
                self.folder.replace(self.out)
        except OSError as error:
            raise FileError(f"cannot write {self.out}: {error.strerror or error}. Name a folder with `-o`.") from error
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
