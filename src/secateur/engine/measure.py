"""The verdict: a pruned network against the dense one, both from the files on disk."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core import streams
from secateur.core.errors import UsageError
from secateur.core.losses import CrossEntropy
from secateur.core.masks import Masks
from secateur.core.reading import Reading
from secateur.core.select import top_mask
from secateur.core.sockets import Probe, blame, name_of
from secateur.core.task import Batch, Task, device_of, to
from secateur.engine.compiling import PLAN, FromFile, clock
from secateur.engine.folder import MASKS, WEIGHTS, Artefact
from secateur.engine.layer_times import layer_times
from secateur.probes.accuracy import Accuracy, difference
from secateur.probes.cost import Cost
from secateur.probes.flatness import Flatness
from secateur.probes.latency import dense_and_pruned
from secateur.runtime import Session


@dataclass(frozen=True)
class Verdict:
    """Accuracy, milliseconds and bytes of a network beside the dense one it came from.

    Args:
        dense: readings of the dense network by name.
        pruned: readings of the pruned one.
        change: accuracy difference (paired) and latency ratio, with intervals.
        baselines: accuracy of the baselines, for example ``random``.
        layers: one row a tensor.
        probes: further readings of the pruned network.
        time: milliseconds of each layer, compiled and dense in torch; see :func:`layer_times`. Empty without a plan.
        flatness: readings of :func:`flatness` for ``dense`` and ``pruned``. Empty where it is not asked for.
    """

    dense: dict[str, Reading]
    pruned: dict[str, Reading]
    change: dict[str, Reading]
    baselines: dict[str, Reading]
    layers: list[dict[str, Any]]
    probes: dict[str, Reading]
    time: dict[str, Any] = field(default_factory=dict)
    flatness: dict[str, dict[str, Reading]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        groups = ("dense", "pruned", "change", "baselines", "probes")
        table: dict[str, Any] = {g: {name: r.to_json() for name, r in getattr(self, g).items()} for g in groups}
        flat = {side: {name: r.to_json() for name, r in found.items()} for side, found in self.flatness.items()}
        more = {"time": self.time, "flatness": flat}
        return {**table, "layers": self.layers, **{name: entry for name, entry in more.items() if entry}}


def verdict(
    dense: Artefact,
    pruned: Artefact,
    data: Iterable[Batch],
    *,
    device: torch.device,
    probes: tuple[Probe, ...] = (),
    baselines: tuple[str, ...] = ("random",),
    seed: int = 0,
    plan: Path | None = None,
) -> Verdict:
    """Measure two artefacts against each other.

    Args:
        dense: the dense network.
        pruned: the pruned one.
        data: test batches.
        device: where to compute.
        probes: further probes for the pruned network.
        baselines: ``"random"``: random masks on the dense network with the pruned one's counts, untrained.
        seed: for the baselines.
        plan: folder for the compiled network, which is timed from that file beside dense torch, and whose accuracy is
            measured too; None leaves it out.

    Cost: about six passes over the data and a few seconds of timing.
    """
    one, two = dense.build().to(device), pruned.build().to(device)
    masks = pruned.masks().to(device)
    before, after = Task(one, CrossEntropy(), data), Task(two, CrossEntropy(), data)
    first: dict[str, Reading] = {"accuracy": Accuracy()(before)}
    second: dict[str, Reading] = {"accuracy": Accuracy()(after)}
    example = _example(data, device)
    slow, fast, ratio = dense_and_pruned(one, two, example)
    first |= {"latency": slow, "cost": Cost()(before, dense.masks().to(device)), "disk": _bytes(dense.folder)}
    second |= {"latency": fast, "cost": Cost()(after, masks), "disk": _bytes(pruned.folder)}
    change = {"accuracy": difference(after, before), "latency": ratio}
    spent: dict[str, Any] = {}
    if plan is not None:
        near, threads = to(example, torch.device("cpu")), torch.get_num_threads()
        timed = clock(one.cpu(), two.cpu(), near, plan, threads)
        if "ratio" in timed:
            spent = layer_times(one, plan / PLAN, masks, near, threads)
        for net in (one, two):
            net.to(device)
        second["compiled"] = timed["compiled"]
        if "ratio" in timed:
            first["compiled"], second["plan"], change["compiled"] = timed["against"], timed["plan"], timed["ratio"]
            with Session(plan / PLAN) as session:
                if session.isa != "reference":  # which would take minutes
                    compiled = Task(FromFile(session), CrossEntropy(), data)
                    second["compiled accuracy"] = Accuracy()(compiled)
                    change["compiled accuracy"] = difference(compiled, before)
    extra = {name_of(probe): reading_of(probe, after, masks) for probe in probes}
    random = (
        {"random": _random(dense, masks, data, device, seed)}
        if "random" in baselines and masks.kept < masks.total and _alike(dense, masks)
        else {}
    )
    return Verdict(first, second, change, random, layers(two, masks, second["cost"]), extra, spent)


def flatness(
    dense: Artefact, pruned: Artefact, sample: Iterable[Batch], *, device: torch.device, seed: int = 0
) -> dict[str, dict[str, Reading]]:
    """Curvature and flatness of both networks, each restricted to its own kept weights.

    Args:
        dense: the dense network.
        pruned: the pruned one.
        sample: batches of training data, the same every time they are read.
        device: where to compute.
        seed: of all draws, which are the same for both networks where their tensors are of the same shape.

    Raises:
        DataError: when a network's loss changes from pass to pass.

    Cost: that of :class:`~secateur.probes.flatness.Flatness`, for each network.
    """
    probe, found = Flatness(seed=seed), {}
    for side, artefact in (("dense", dense), ("pruned", pruned)):
        task = Task(artefact.build().to(device), CrossEntropy(), sample)
        found[side] = probe.measure(task, artefact.masks().to(device))
    return found


def reading_of(probe: Probe, task: Task, masks: Masks) -> Reading:
    """The reading of a probe, checked: it may be a class from outside.

    Raises:
        UsageError: when it fails, or gives something else than a reading of one number.
    """
    with blame(probe):
        reading: Any = probe(task, masks)
    if not isinstance(reading, Reading):
        raise UsageError(f"{probe} gave {type(reading).__name__}; it must give a secateur.Reading: `Reading(value)`.")
    for name, number in (("value", reading.value), *reading.parts.items()):
        if not isinstance(number, int | float):
            raise UsageError(f"{probe} gave a reading with {name} = {number!r}; it must be a number: `float(...)`.")
    return reading


def layers(net: nn.Module, masks: Masks, cost: Reading) -> list[dict[str, Any]]:
    """One row a pruned tensor: weights, kept, MACs dense and effective."""
    rows = []
    for name, kept in masks.counts().items():
        total = masks[name].numel()
        rows.append({
            "name": name, "shape": list(masks[name].shape),
            "weights": total, "kept": kept, "sparsity": 1 - kept / total,
            "macs": int(cost.parts.get(f"macs:{name}", 0)),
            "macs_effective": int(cost.parts.get(f"macs_effective:{name}", 0)),
        })  # fmt: skip
    return rows


def _example(data: Iterable[Batch], device: torch.device) -> Any:
    inputs = to(next(iter(data))[0], device)
    return _first(inputs)


def _first(inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return inputs[:1]
    if isinstance(inputs, dict):
        return {key: _first(value) for key, value in inputs.items()}
    return tuple(_first(value) for value in inputs)


def _bytes(folder: Path) -> Reading:
    """Bytes of the files that carry the network."""
    sizes = {name: float((folder / name).stat().st_size) for name in (WEIGHTS, MASKS)}
    packed = float(_deflated(folder / WEIGHTS))
    note = "dense safetensors; `weights compressed` is what zip (deflate) makes of the same file"
    return Reading(sizes[WEIGHTS], "B", parts={**sizes, "weights compressed": packed}, note=note)


def _deflated(path: Path) -> int:
    import zlib

    packer, size = zlib.compressobj(6), 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            size += len(packer.compress(chunk))
    return size + len(packer.flush())


def _alike(dense: Artefact, masks: Masks) -> bool:
    """Whether the masks fit the dense network: not when units were removed."""
    shapes = dense.structure["parameters"]
    return all(list(mask.shape) == shapes[name]["shape"] for name, mask in masks.items() if name in shapes)


def _random(dense: Artefact, masks: Masks, data: Iterable[Batch], device: torch.device, seed: int) -> Reading:
    net = dense.build().to(device)
    chosen = {}
    for name, mask in masks.items():
        scores = torch.rand(mask.shape, generator=streams.stream(seed, "baseline", name)).to(device_of(net))
        chosen[name] = top_mask(scores, int(mask.sum()))
    Masks(chosen).apply_(net)
    return Accuracy()(Task(net, CrossEntropy(), data))
