"""Shortcuts that skip pixels and pad channels (the first form of ResNet) become one convolution with a 1 a channel.

A strided slice of both map axes, and zero channels before and after, are what such a convolution computes, exactly:
each result is one input times 1. As a layer it keeps the layout of the maps around it.
"""

from __future__ import annotations

import numpy as np

from secateur.runtime.lower_ir import Program, Step, bury


def subsample(program: Program) -> None:
    """Rewrite every such chain in place."""
    makers = program.makers()
    readers = _readers(program)
    for step in program.steps:
        if step.op != "slice" or step.attrs["axis"] != 3 or not _whole(program, step):
            continue
        above = makers.get(step.inputs[0])
        if above is None or above.op != "slice" or above.attrs["axis"] != 2 or not _whole(program, above):
            continue
        if len(readers.get(above.out, ())) != 1 or above.attrs["step"] * step.attrs["step"] == 1:
            continue
        last, before, after = step, 0, 0
        following = readers.get(step.out, [])
        if len(following) == 1 and following[0] is not None and _pads_channels(following[0]):
            last = following[0]
            before, after = last.attrs["pad"][1]
        _replace(program, above, step, last, before, after)
    bury(program)


def _readers(program: Program) -> dict[str, list[Step | None]]:
    found: dict[str, list[Step | None]] = {}
    for step in program.steps:
        for value in step.inputs:
            found.setdefault(value, []).append(step)
    for value in program.outputs:
        found.setdefault(value, []).append(None)
    return found


def _whole(program: Program, step: Step) -> bool:
    dims = program.shapes[step.inputs[0]]
    return (
        len(dims) == 4
        and program.dtypes[step.inputs[0]] == "f32"
        and step.attrs["start"] == 0
        and step.attrs["stop"] == dims[step.attrs["axis"]]
    )


def _pads_channels(step: Step) -> bool:
    pads = step.attrs.get("pad", ())
    return (
        step.op == "pad"
        and step.attrs["value"] == 0
        and len(pads) == 4
        and all(tuple(pads[axis]) == (0, 0) for axis in (0, 2, 3))
    )


def _replace(program: Program, above: Step, step: Step, last: Step, before: int, after: int) -> None:
    channels = program.shapes[above.inputs[0]][1]
    chosen = np.zeros((before + channels + after, channels, 1, 1), np.float32)
    chosen[before + np.arange(channels), np.arange(channels)] = 1.0
    stride = [above.attrs["step"], step.attrs["step"]]
    last.op, last.inputs = "conv", [above.inputs[0]]
    last.weights = {"weight": program.weight(f"{last.name}.selection", chosen)}
    last.attrs = {"stride": stride, "pad": [0, 0, 0, 0], "dilation": [1, 1], "groups": 1, "act": "none"}
