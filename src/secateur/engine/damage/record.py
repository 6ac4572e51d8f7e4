"""The damage report: what pruning did to a network's answers and features, as two files that others draw from."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import FileError, UsageError
from secateur.core.files import file_digest, read_json, read_tensors, write_json, write_tensors
from secateur.core.reading import Reading
from secateur.data import Dataset, Split
from secateur.engine.damage import classes as by
from secateur.engine.damage.certainty import LEADS, certainty, histogram
from secateur.engine.damage.corruptions import corruptions
from secateur.engine.damage.geometry import Geometry, by_class, logits_error, of_outputs, spread_of, summary
from secateur.engine.damage.outputs import BATCH, Outputs, alike, outputs
from secateur.engine.damage.samples import axes, choose, flipped, planes, tensors
from secateur.engine.damage.spoilt import spoilt
from secateur.probes._still import check_whole

FORMAT = "secateur.damage/1"
DAMAGE, SAMPLES = "damage.json", "samples.safetensors"

Network = nn.Module | tuple[str, nn.Module]
"""A network, or its name and the network."""


@dataclass(frozen=True, eq=False)
class Damage:
    """What pruning did to a network.

    Args:
        table: all figures as plain JSON values, as in ``damage.json``; NaN and infinity are None.
        samples: the sample set, as in ``samples.safetensors``.
    """

    table: Mapping[str, Any]
    samples: Mapping[str, Tensor]

    def write(self, folder: Path) -> dict[str, str]:
        """Write both files, ``damage.json`` last: it holds the digest of the other.

        Returns:
            The digest of each file, by its name.

        Raises:
            FileError: when one cannot be written.
        """
        digest = write_tensors(folder / SAMPLES, self.samples, {"format": FORMAT})
        samples = {**self.table["samples"], "file": SAMPLES, "digest": digest}
        write_json(folder / DAMAGE, {**self.table, "samples": samples})
        return {DAMAGE: file_digest(folder / DAMAGE), SAMPLES: digest}


def read_damage(folder: Path) -> Damage:
    """The inverse of :meth:`Damage.write`.

    Raises:
        FileError: when a file is missing, damaged, of another format, or the two do not belong together.
    """
    table = read_json(folder / DAMAGE)
    if not isinstance(table, dict) or table.get("format") != FORMAT or not isinstance(table.get("samples"), dict):
        raise FileError(
            f"{folder / DAMAGE} is not a damage report of format {FORMAT!r}. Measure again with `--damage`."
        )
    samples = {key: value for key, value in table["samples"].items() if key not in ("file", "digest")}
    if file_digest(folder / SAMPLES) != table["samples"].get("digest"):
        raise FileError(
            f"{folder / SAMPLES} is not the file that {DAMAGE} was written with (its digest differs). Restore a copy, "
            "or measure again with `--damage`."
        )
    return Damage({**table, "samples": samples}, read_tensors(folder / SAMPLES)[0])


def damage(
    dense: Network,
    pruned: Network,
    data: Dataset | Split,
    *,
    others: Sequence[tuple[str, nn.Module]] = (),
    examples: int = 2000,
    corrupted: int = 1000,
    seed: int = 0,
    batch: int = BATCH,
) -> Damage:
    """Compare pruned networks with the dense one: classes, flips, calibration, corruptions, features.

    Everything is measured on the test part. What a network or the data cannot give - features of a head that is not
    linear, corruptions of what is no image - is left out, and ``skipped`` in the table says why.

    Args:
        dense: the dense network, called "dense" unless a name is given with it.
        pruned: a pruned network, called "pruned" unless a name is given with it.
        data: a data set, or a split as the networks see it.
        others: further pruned networks with their names.
        examples: size of the sample set; its pictures take ``examples · C · H · W`` bytes.
        corrupted: at most so many test images are corrupted, in 25 ways.
        seed: of the sample, the corruptions and t-SNE.
        batch: examples in a batch.

    Raises:
        UsageError: for names that are not distinct, or counts below 1.
        DataError: when a network is no classifier or gives NaN, naming it, or no label counts.

    Cost: one forward pass of each network over the test part and 26 over the corrupted images; t-SNE of each network.
    """
    check_whole("examples", examples)
    check_whole("corrupted", corrupted)
    nets = _named(dense, pruned, others)
    clock, skipped = _Clock(), _Skipped()
    with clock("forward"):
        found = [outputs(net, data, name=name, batch=batch) for name, net in nets]
        for one in found[1:]:
            alike(found[0], one)
    names = _names(data, found)
    with clock("classes"):
        changes = {one.name: _changed(found[0], one, names) for one in found[1:]}
    with clock("calibration"):
        sure = {one.name: certainty(one) for one in found}
    with clock("geometry"):
        measured = [_measured(one, skipped) for one in found]
        shapes = _shapes(found, measured, len(names))
    with clock("corruptions"):
        corrupted_rows = corruptions(nets, data, examples=corrupted, seed=seed, batch=batch, skip=skipped)
    with clock("features in the plane"):
        chosen = choose(flipped(found), examples, seed)
        own = axes(found, skipped)
        placed, plane = planes(found, own, chosen, seed, skipped)
    samples = {**tensors(found, measured, chosen, data), **placed}
    with clock("corrupted samples"):
        copies, spoiling = spoilt(nets, data, samples, own, seed=seed, batch=batch, skip=skipped)
    table = {
        "format": FORMAT, "seed": seed, "variants": [name for name, _ in nets], "classes": names,
        "data": _about(data, found[0]), "accuracy": {one.name: by.accuracy(one) for one in found},
        "changes": changes, "calibration": sure, "geometry": shapes, "corruptions": corrupted_rows, "plane": plane,
        "samples": {**_sampled({**samples, **copies}, flipped(found), chosen), **spoiling},
        "skipped": skipped.rows, "seconds": clock.seconds,
    }  # fmt: skip
    return Damage(plain(table), {**samples, **copies})


class _Clock:
    """Seconds of each part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[part] = round(time.perf_counter() - began, 3)


class _Skipped:
    """What was left out, and why."""

    def __init__(self) -> None:
        self.rows: list[dict[str, str]] = []

    def __call__(self, what: str, why: str) -> None:
        self.rows.append({"what": what, "why": why})


def _named(dense: Network, pruned: Network, others: Sequence[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    nets = [
        net if isinstance(net, tuple) else (name, net)
        for name, net in (("dense", dense), ("pruned", pruned), *((name, (name, net)) for name, net in others))
    ]
    names = [name for name, _ in nets]
    if len(set(names)) < len(names) or not all(names):
        raise UsageError(f"the networks are called {', '.join(map(repr, names))}; give each a name of its own.")
    return nets


def _names(data: Dataset | Split, found: Sequence[Outputs]) -> list[str]:
    known = data.classes if isinstance(data, Dataset) else ()
    return [by.name_of(known, k) for k in range(max(len(known), *(one.classes for one in found)))]


def _about(data: Dataset | Split, first: Outputs) -> dict[str, Any]:
    split = data.test if isinstance(data, Dataset) else data
    known = {"name": data.name, "kind": data.kind, "note": data.note} if isinstance(data, Dataset) else {}
    counted = len(first.labels)
    return {
        **known, "input_shape": list(split.x.shape[1:]), "examples": len(split), "decisions": counted,
        "not_counted": split.y.numel() - counted, "tokens": first.tokens,
    }  # fmt: skip


def _changed(before: Outputs, after: Outputs, names: list[str]) -> dict[str, Any]:
    rows = by.classes(before, after, names)
    return {
        "accuracy": by.change(before, after), "most_hurt": by.most_hurt(rows),
        "flips": by.flips(before, after, names), "classes": rows,
    }  # fmt: skip


def _measured(found: Outputs, skip: _Skipped) -> Geometry | None:
    if found.features is None:
        skip(f"features of {found.name}", found.refused)
    return of_outputs(found)


def _shapes(found: Sequence[Outputs], measured: Sequence[Geometry | None], classes: int) -> dict[str, Any]:
    """Summaries of the metrics by network, and the dense network's margin of what flips beside what does not.

    ``margins`` is a histogram as those of :func:`certainty`, in bins that all networks share.
    """
    table: dict[str, Any] = {}
    low, high = _range(measured)
    for one, metrics in zip(found, measured, strict=True):
        if metrics is None or one.features is None:
            table[one.name] = None
            continue
        table[one.name] = {
            "layer": one.features.layer, "width": one.features.x.shape[1],
            "logits_error": logits_error(one, one.features), **summary(metrics),
            "classes": by_class(metrics, one.labels, classes),
        }  # fmt: skip
        good = metrics.margin.isfinite()
        table[one.name]["margins"] = histogram(metrics.margin[good], one.right[good], low, high, LEADS)
        if one is not found[0] and measured[0] is not None:
            flips = one.answers != found[0].answers
            before = measured[0].margin
            table[one.name]["margin_before"] = {
                "flipped": {"count": int(flips.sum()), **spread_of(before[flips])},
                "stable": {"count": int((~flips).sum()), **spread_of(before[~flips])},
            }
    return table


def _range(measured: Sequence[Geometry | None]) -> tuple[float, float]:
    """Lowest and highest margin of all networks, so that their histograms have the same bins."""
    every = torch.cat([torch.empty(0, dtype=torch.float64), *(one.margin for one in measured if one is not None)])
    every = every[every.isfinite()]
    low, high = (float(every.min()), float(every.max())) if len(every) else (0.0, 0.0)
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def _sampled(samples: Mapping[str, Tensor], changed: Tensor, chosen: Tensor) -> dict[str, Any]:
    return {
        "count": len(chosen), "flipped": int(changed[chosen].sum()), "flipped_in_all": int(changed.sum()),
        "tensors": {name: list(tensor.shape) for name, tensor in samples.items()},
    }  # fmt: skip


def plain(thing: Any) -> Any:
    """Readings as tables, NaN and infinity as None, at any depth."""
    if isinstance(thing, Reading):
        return plain(asdict(thing))
    if isinstance(thing, Mapping):
        return {key: plain(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple):
        return [plain(value) for value in thing]
    return None if isinstance(thing, float) and not math.isfinite(thing) else thing
