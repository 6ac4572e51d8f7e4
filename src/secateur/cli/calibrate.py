"""``secateur calibrate``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateur.cli.request import dump
from secateur.core.errors import UsageError, nearest
from secateur.core.patterns import parse_pattern
from secateur.core.streams import stream
from secateur.engine.machine import interrupts
from secateur.engine.planning import calibrating
from secateur.engine.planning.calibrating import Calibration, Subject
from secateur.engine.planning.engines import ENGINES

ALL = "all"


def run(request: argparse.Namespace) -> int:
    """Measure what layers cost on this machine, and remember it for the plans to come."""
    if request.status:
        return _status(request)
    batches = request.batch or [1]
    if min(batches) < 1 or request.threads is not None and request.threads < 1:
        raise UsageError("--batch and --threads must be at least 1.")
    given = request.pattern or list(calibrating.PATTERNS)
    words = [str(parse_pattern(word)) for entry in given for word in entry.split(",")]
    others = _engines(request.engine)
    subjects = [_subject(name, request) for name in request.nets] or calibrating.base_set()

    def say(text: str) -> None:
        if not request.json:
            print(text, file=sys.stderr, flush=True)

    with interrupts() as stop:
        found = calibrating.calibrate(
            subjects, batches, request.threads, words, None, request.again, say=say, stop=stop, others=others
        )  # fmt: skip
    if request.json:
        dump(found.to_json())
    else:
        _show(found)
    return 130 if found.stopped else 0


def _engines(given: list[str]) -> list[str]:
    """The engines beside the compiled core, which is always measured.

    Raises:
        UsageError: one that is not known.
    """
    words = [word.strip() for entry in given for word in entry.split(",")]
    for word in words:
        if word not in (*ENGINES, ALL):
            raise UsageError(f"--engine {word!r} is not known. {nearest(word, (*ENGINES, ALL))}")
    return [name for name in ENGINES[1:] if name in words or ALL in words]


def _status(request: argparse.Namespace) -> int:
    found = calibrating.status()
    if request.json:
        dump(found)
        return 0
    print(f"table {found['path']}" + ("" if found["machines"] else ": nothing is measured yet"))
    for row in found["machines"]:
        error = (
            "" if row["error"] is None else f"; {row['checks']} forecasts checked, 9 of 10 within {row['error']:.1%}"
        )
        print(f"  {row['machine']}\n    {row['layers']} layers, {row['figures']} figures, "
              f"{', '.join(row['patterns'])}{error}")  # fmt: skip
    for name, count in found["engines"].items():
        print(f"  {name}\n    {count} network{'s' if count > 1 else ''} timed")
    if found["note"]:
        print(f"note: {found['note']}")
    return 0


def _show(found: Calibration) -> None:
    for row in found.rows:
        print(f"{row['name']:<24} batch {row['batch']:<3} {row['layers']:>3} layers  {row['ms']:9.4f} ms as it is  "
              f"{row['measured']:>4} figures new  {row['seconds']:5.1f} s")  # fmt: skip
        for label, ms in row["engines"].items():
            beside = f"  {ms / row['ms']:6.2f} times as long" if row["ms"] else ""
            print(f"  {label:<43} {ms:9.4f} ms as it is{beside}")
    if found.error is not None and found.median is not None:
        print(f"shapes that are not measured are forecast within {found.error:.1%} (9 of 10 figures; half within "
              f"{found.median:.1%}), by {found.shapes} shapes held out in turn")  # fmt: skip
    for note in found.notes:
        print(note)
    print(f"table {found.path}" + ("; stopped: run it again to go on" if found.stopped else ""))


def _subject(name: str, request: argparse.Namespace) -> Subject:
    """A network by name, with the shape of its input, or a run folder, with the input of its data."""
    from secateur.engine.folder import Artefact
    from secateur.nets import build

    if Path(name).is_dir():
        net = Artefact.open(name).build().cpu().eval()
        return Subject(name, lambda batch: (net, _examples(name, request.data_dir, batch)))
    if not request.shape:
        raise UsageError(
            f"{name!r} is no run folder; a network by name needs its input's shape without the batch: --shape 3,32,32."
        )
    shape = _shape(request.shape)
    net = build(name, None if request.tokens else shape, request.tokens).cpu().eval()
    generator = stream(0, "calibrate")

    def make(batch: int) -> tuple[nn.Module, Any]:
        import torch

        if request.tokens:
            return net, torch.randint(0, request.tokens, (batch, *shape), generator=generator)
        return net, torch.randn(batch, *shape, generator=generator)

    return Subject(name, make)


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        raise UsageError(f"--shape {text!r} is not whole numbers such as 3,32,32.") from None
    if min(shape) < 1:
        raise UsageError(f"--shape {text!r} has a size below 1.")
    return shape


def _examples(folder: str, data_dir: str | None, batch: int) -> Any:
    from secateur import data
    from secateur.engine.folder import RECIPE, Artefact
    from secateur.engine.recipe import read_recipe

    spec: dict[str, Any] = dict(read_recipe(Artefact.open(folder).folder / RECIPE).get("data", {}))
    test = data.load(spec["use"], data_dir, **spec.get("options", {})).test
    first = next(iter(data.Loader(test, batch)))[0]
    return first if isinstance(first, Tensor) else tuple(first)
