"""``secateur export``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from secateur import data
from secateur.cli.request import dump
from secateur.core.errors import UsageError
from secateur.engine.exporting import LIMIT, Exported, export, format_of
from secateur.engine.exporting_files import FORMATS
from secateur.engine.exporting_step import beside, examples, normalisation
from secateur.engine.folder import RECIPE, Artefact
from secateur.engine.recipe import read_recipe


def run(request: argparse.Namespace) -> int:
    """Write the network of a folder for other programs, and show what the file was found to be."""
    batch = 1 if request.batch is None else request.batch
    if batch < 1:
        raise UsageError(f"--batch is {batch}; give at least 1.")
    artefact = Artefact.open(request.start)
    path = Path(request.out) if request.out else artefact.folder / f"network{_suffix(request.format)}"
    format_of(path, request.format, request.opset)  # before data are read
    example, about = _example(artefact, batch, request.data_dir)
    net, masks = artefact.build(), artefact.masks()
    made = export(
        net, example, path, request.format, opset=request.opset, masks=masks, beside=beside(artefact), about=about
    )
    if request.json:
        dump({"path": str(path), **made.to_json()})
    else:
        _show(made)
    return 0


def _suffix(kind: str | None) -> str:
    return FORMATS.get(kind or "onnx", f".{kind}")


def _example(artefact: Artefact, batch: int, data_dir: str | None) -> tuple[Any, dict[str, Any]]:
    """The first test examples, as the network is given them, and how they were normalised."""
    spec: dict[str, Any] = dict(read_recipe(artefact.folder / RECIPE).get("data", {}))
    if not spec.get("use"):
        raise UsageError(
            f"{artefact.folder} names no data to take an example from; export it from Python: "
            "`secateur.export(model, example, path)`."
        )
    found = data.load(spec["use"], data_dir, **spec.get("options", {}))
    return examples(found, batch), {"data": spec["use"], "normalised": normalisation(found)}


def _show(made: Exported) -> None:
    others = ", ".join(f"{name} {size:,}" for name, size in made.bytes.items() if name != "file")
    print(f"{made.path}  {made.bytes['file']:,} bytes ({others})")
    opset = f", opset {made.about['opset']}" if "opset" in made.about else ""
    batch = "any batch" if made.batch is None else f"batch {made.batch} only"
    print(f"  format    {made.format}{opset}, {batch}, run by {made.about['engine']}")
    apart = ", ".join(f"{error:.1e} at batch {size}" for size, error in made.parity.items())
    print(f"  parity    {apart} (largest relative difference from torch; allowed {LIMIT:g})")
    zeros, weights = sum(row["zeros"] for row in made.zeros), sum(row["weights"] for row in made.zeros)
    if zeros:
        print(f"  zeros     all {zeros:,} zeros among {weights:,} weights of {len(made.zeros)} tensors are in the file")
    if spread := [row["name"] for row in made.zeros if row["in_file"] is None]:
        print(
            f"            of {len(spread)} of these, cut or joined by the exporter, counted together: {spread[0]} ..."
        )
    for line in _times(made.latency):
        print(line)
    for note in made.notes:
        print(f"  note      {note}")
    print(f"  figures   {made.path}.json")


def _times(found: dict[str, Any]) -> list[str]:
    if "ms" not in found:
        return [f"  latency   {found['note']}"]
    names, ratio = list(found["ms"]), found["ratio"]
    times = ", ".join(f"{name} {found['ms'][name]:.4f} ms" for name in names)
    return [
        f"  latency   {times} at batch {found['batch']}, {found['threads']} threads, taken in turn (medians)",
        f"            the file is {ratio['value']:.2f}x as fast as torch (rounds {ratio['low']:.2f} to "
        f"{ratio['high']:.2f})",
    ]
