"""Attention written out by hand (product, scale, mask, softmax, product) becomes one step."""

from __future__ import annotations

import numpy as np

from secateur.runtime.lower_ir import Dims, Program, Step, bury, rename

HIDDEN = -6e4
"""What is this far below other scores gets no weight in float32: masks at most this are taken for minus infinity."""


def attend(program: Program) -> None:
    """Turn every softmax between two matrix products into ``sdpa``; causal masks become a flag."""
    while True:
        bury(program)
        scan = _Scan(program)
        if not any(scan.fuse(step) for step in program.steps if step.op == "softmax"):
            break
    makers = program.makers()
    for step in program.steps:
        if step.op == "sdpa" and len(step.inputs) == 4 and not step.attrs["causal"]:
            mask = program.constant(step.inputs[3], makers)
            if mask is not None and _causal(mask, program.shapes[step.inputs[0]][-2]):
                step.attrs["causal"] = True
                del step.inputs[3]
    _fill(program)


class _Scan:
    """The program's links at one moment; a fusion makes them stale."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.makers = program.makers()
        self.readers = program.readers()

    def only(self, value: str, op: str) -> Step | None:
        """The step that makes a value which is read once, if it is this operator."""
        step = self.makers.get(value)
        return step if step is not None and step.op == op and self.readers[value] == 1 else None

    def number(self, value: str) -> float | None:
        """The one number of a constant."""
        array = self.program.constant(value, self.makers)
        return float(array.reshape(())) if array is not None and array.size == 1 else None

    def fuse(self, softmax: Step) -> bool:
        """Whether this softmax was the middle of attention, and is gone."""
        shape = self.program.shapes[softmax.out]
        after = [step for step in self.program.steps if softmax.out in step.inputs]
        if softmax.attrs["axis"] != len(shape) - 1 or len(shape) not in (3, 4) or len(after) != 1:
            return False
        last = after[0]
        if last.op != "matmul" or last.inputs[0] != softmax.out or self.readers[softmax.out] != 1:
            return False
        found = self._scores(softmax.inputs[0], shape)
        if found is None:
            return False
        product, scale, mask = found
        return self._replace(last, product, scale, mask)

    def _scores(self, value: str, shape: Dims) -> tuple[Step, float, str | None] | None:
        """From the softmax backwards: a mask at most, scales, the product."""
        scale, mask = 1.0, None
        while True:
            product = self.only(value, "matmul")
            if product is not None:
                return product, scale, mask
            step = self.only(value, "binary")
            filled = self.only(value, "masked_fill")
            if filled is not None and mask is None and scale == 1 and self._hidden(filled):
                mask, value = self._masked(filled), filled.inputs[0]
                continue
            if step is None or step.attrs["act"] != "none":
                return None
            factor = self._factor(step)
            if factor is not None:
                scale, value = scale * factor[1], factor[0]
            elif step.attrs["fn"] == "add" and mask is None and scale == 1:
                sides = [side for side in (0, 1) if self.program.shapes[step.inputs[side]] == shape]
                inner = [side for side in sides if self._leads(step.inputs[side])]
                if not inner:
                    return None
                value, mask = step.inputs[inner[0]], step.inputs[1 - inner[0]]
            else:
                return None

    def _leads(self, value: str) -> bool:
        """Whether a product stands behind a value, maybe scaled."""
        while self.only(value, "matmul") is None:
            step = self.only(value, "binary")
            factor = None if step is None else self._factor(step)
            if factor is None:
                return False
            value = factor[0]
        return True

    def _factor(self, step: Step) -> tuple[str, float] | None:
        """What a step multiplies by a number, and the number."""
        left, right = (self.number(value) for value in step.inputs)
        if step.attrs["fn"] == "mul" and (left is not None or right is not None):
            return (step.inputs[1], left) if left is not None else (step.inputs[0], right or 0.0)
        return (step.inputs[0], 1 / right) if step.attrs["fn"] == "div" and right else None

    def _hidden(self, step: Step) -> bool:
        """Whether a fill hides scores and leaves every row one to see."""
        mask = self.program.weights[step.weights["mask"]]
        return step.attrs["value"] <= HIDDEN and not (mask != 0).all(axis=-1).any()

    def _masked(self, step: Step) -> str:
        hidden = self.program.weights[step.weights["mask"]] != 0
        weight = self.program.weight(step.weights["mask"], np.where(hidden, -np.inf, 0.0).astype(np.float32))
        value = self.program.value(step.out, hidden.shape)
        self.program.steps.insert(0, Step("const", step.name, [], [value], {"value": weight}, {}, step.where))
        return value

    def _replace(self, last: Step, product: Step, scale: float, mask: str | None) -> bool:
        shapes = self.program.shapes
        q, keys, v = product.inputs[0], product.inputs[1], last.inputs[1]
        if not len(shapes[q]) == len(shapes[keys]) == len(shapes[v]):
            return False
        if not shapes[q][:-2] == shapes[keys][:-2] == shapes[v][:-2]:
            return False
        q, before = self._scaled(q)
        keys, beside = self._scaled(keys)
        turned = shapes[keys]
        k = self.program.value(keys, (*turned[:-2], turned[-1], turned[-2]))
        order = [*range(len(turned) - 2), len(turned) - 1, len(turned) - 2]
        at = self.program.steps.index(last)
        step = Step("permute", f"{last.where}.permute", [keys], [k], {}, {"dims": order}, last.where)
        self.program.steps.insert(at, step)
        last.op, last.inputs = "sdpa", [q, k, v, *([] if mask is None else [mask])]
        last.attrs = {"scale": scale * before * beside, "causal": False}
        last.name = f"{last.where}.sdpa".strip(".")
        return True

    def _scaled(self, value: str) -> tuple[str, float]:
        """A product's input without the number it is multiplied by."""
        step = self.only(value, "binary")
        factor = self._factor(step) if step is not None and step.attrs["act"] == "none" else None
        return factor if factor is not None else (value, 1.0)


def _causal(mask: np.ndarray, length: int) -> bool:
    """Whether a mask lets each of ``length`` positions see itself and those before it, and no other."""
    if mask.ndim < 2 or mask.size != mask.shape[-1] * mask.shape[-2] or mask.shape[-2] != length:
        return False
    columns = mask.shape[-1]
    square = mask.reshape(length, columns)
    seen = np.tri(length, columns, dtype=bool)
    return bool((square[seen] == 0).all() and (square[~seen] <= HIDDEN).all() and (~seen).any())


def _fill(program: Program) -> None:
    """Fills that no attention took: at most and at least the number where it is to stand, no bound elsewhere."""
    steps: list[Step] = []
    for step in program.steps:
        if step.op != "masked_fill":
            steps.append(step)
            continue
        mask = program.weights[step.weights["mask"]] != 0
        value = step.inputs[0]
        for fn, free in (("min", np.inf), ("max", -np.inf)):
            if step.attrs["value"] == free:
                continue
            bound = np.where(mask, step.attrs["value"], free)
            weight = program.weight(step.weights["mask"], bound.astype(np.float32))
            limit = program.value(step.out, mask.shape)
            steps.append(Step("const", step.name, [], [limit], {"value": weight}, {}, step.where))
            made = program.value(step.out, program.shapes[step.out])
            name = f"{step.where}.{fn}".strip(".")
            steps.append(Step("binary", name, [value, limit], [made], {}, {"fn": fn, "act": "none"}, step.where))
            value = made
        rename(program, step.out, value)
    program.steps = steps
