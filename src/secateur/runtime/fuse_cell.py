"""A recurrence written out position by position, with plain linear layers, becomes one ``lstm``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from secateur.runtime.lower_ir import Program, Step, bury, rename


@dataclass(frozen=True)
class _Cell:
    """One position: what it reads, and in which order the four gates lie."""

    given: str
    hidden: str
    state: str
    cell: str
    gates: tuple[int, ...]


def roll(program: Program) -> None:
    """Replace every stack of states h(0), h(1), ... that an LSTM's equations link."""
    bury(program)
    for step in list(program.steps):
        if step.op == "concat" and step.attrs["axis"] == 1 and len(step.inputs) > 1:
            _Chain(program).roll(step)
    bury(program)


class _Chain:
    """The links of a program at one moment."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.makers = program.makers()
        self.readers = program.readers()

    def roll(self, stack: Step) -> bool:
        """Whether a stack was the states of an LSTM, and is now read off it."""
        states: list[str] = []
        cells: list[_Cell] = []
        for value in stack.inputs:
            state = self._inner(value, "reshape")
            cell = None if state is None else self._cell(state)
            if state is None or cell is None:
                return False
            states.append(state)
            cells.append(cell)
        layer = self._linked(states, cells)
        gates = self._gates(cells)
        if layer is None or gates is None or not self._starts_at_zero(cells[0], layer):
            return False
        self._replace(stack, states, gates, layer, cells[0].gates)
        return True

    def _linked(self, states: list[str], cells: list[_Cell]) -> Step | None:
        """The layer through which each position reads the one before; no cell state is read from outside."""
        layers: list[Step] = []
        for before, old, new in zip(states, cells, cells[1:], strict=False):
            layer = self.makers.get(new.hidden)
            if layer is None or layer.op != "linear" or layer.inputs != [before] or layer.attrs["act"] != "none":
                return None
            if new.state != old.cell or new.gates != old.gates or self.readers[old.cell] != 2:
                return None
            layers.append(layer)
        same = all(layer.weights == layers[0].weights for layer in layers)
        return layers[0] if same and self.readers[cells[-1].cell] == 1 else None

    def _gates(self, cells: list[_Cell]) -> Step | None:
        """The layer that makes what all positions are given, in their order."""
        first = self._given(cells[0].given)
        gates = None if first is None else self.makers.get(first[0])
        if gates is None or gates.op != "linear" or len(gates.inputs) != 1 or gates.attrs["act"] != "none":
            return None
        if any(self._given(cell.given) != (gates.out, at) for at, cell in enumerate(cells)):
            return None
        return gates if self.program.shapes[gates.out][1] == len(cells) else None

    def _inner(self, value: str, op: str) -> str | None:
        step = self.makers.get(value)
        return step.inputs[0] if step is not None and step.op == op and len(step.inputs) == 1 else None

    def _function(self, value: str, fn: str) -> str | None:
        step = self.makers.get(value)
        return step.inputs[0] if step is not None and step.op == "unary" and step.attrs["fn"] == fn else None

    def _pair(self, value: str, fn: str) -> list[str] | None:
        step = self.makers.get(value)
        if step is None or step.op != "binary" or step.attrs["fn"] != fn or step.attrs["act"] != "none":
            return None
        return step.inputs

    def _product(self, value: str, other: str | None) -> tuple[str, str] | None:
        """What stands in sigmoid(a) * b, or in sigmoid(a) * tanh(b)."""
        pair = self._pair(value, "mul") or []
        for gate, rest in (pair, pair[::-1]) if pair else ():
            a = self._function(gate, "sigmoid")
            b = self._function(rest, other) if other else rest
            if a is not None and b is not None:
                return a, b
        return None

    def _cell(self, state: str) -> _Cell | None:
        """The equations of one position, from its hidden state backwards."""
        leave = self._product(state, "tanh")
        terms = self._pair(leave[1], "add") if leave else None
        for kept, added in (terms, terms[::-1]) if terms else ():
            enter, keep = self._product(added, "tanh"), self._product(kept, None)
            if leave is None or enter is None or keep is None or self._product(kept, "tanh"):
                continue
            parts = [self._part(gate) for gate in (enter[0], keep[0], enter[1], leave[0])]
            sums = {part[0] for part in parts if part is not None}
            pair = self._pair(sums.pop(), "add") if len(sums) == 1 and None not in parts else None
            if pair is None:
                return None
            given, hidden = pair if self._given(pair[0]) else pair[::-1]
            gates = tuple(part[1] for part in parts if part is not None)
            return _Cell(given, hidden, keep[1], leave[1], gates)
        return None

    def _part(self, value: str) -> tuple[str, int] | None:
        """Which quarter of the gates a value is."""
        step = self.makers.get(value)
        if step is None or step.op != "slice" or step.attrs["axis"] != 1 or step.attrs["step"] != 1:
            return None
        width = step.attrs["stop"] - step.attrs["start"]
        quarters = len(self.program.shapes[step.inputs[0]]) == 2 and self.program.shapes[step.inputs[0]][1] == 4 * width
        return (step.inputs[0], step.attrs["start"] // width) if quarters and step.attrs["start"] % width == 0 else None

    def _given(self, value: str) -> tuple[str, int] | None:
        """Of which sequence, and which position, a value is one."""
        part = self.makers.get(self._inner(value, "reshape") or "")
        if part is None or part.op != "slice" or part.attrs["axis"] != 1:
            return None
        one = part.attrs["stop"] - part.attrs["start"] == 1 and len(self.program.shapes[part.out]) == 3
        return (part.inputs[0], part.attrs["start"]) if one else None

    def _starts_at_zero(self, cell: _Cell, layer: Step) -> bool:
        state, hidden = self._numbers(cell.state), self._numbers(cell.hidden)
        bias = self.program.weights[layer.weights["bias"]] if "bias" in layer.weights else np.zeros(())
        return state is not None and not state.any() and hidden is not None and bool((hidden == bias).all())

    def _numbers(self, value: str) -> np.ndarray | None:
        return self.program.constant(self._inner(value, "expand") or value, self.makers)

    def _replace(self, stack: Step, states: list[str], gates: Step, layer: Step, order: tuple[int, ...]) -> None:
        program = self.program
        n, t, width = program.shapes[stack.out]
        outputs = [program.value(stack.out, shape) for shape in ((n, t, width), (1, n, width), (1, n, width))]
        weights = {
            f"{kind}.0.0": self._ordered(step, role, order, 4 * width)
            for step, kind, role in ((gates, "w_ih", "weight"), (layer, "w_hh", "weight"), (gates, "b_ih", "bias"),
                                     (layer, "b_hh", "bias"))
        }  # fmt: skip
        attrs = {"hidden": width, "layers": 1, "bidirectional": False, "batch_first": True}
        made = [Step("lstm", stack.where or "lstm", list(gates.inputs), outputs, weights, attrs, stack.where)]
        for at, state in enumerate(states):
            part, alone = program.value(stack.out, (n, 1, width)), program.value(stack.out, (n, width))
            cut = {"axis": 1, "start": at, "stop": at + 1, "step": 1}
            made.append(Step("slice", stack.name, [outputs[0]], [part], {}, cut, stack.where))
            made.append(Step("reshape", stack.name, [part], [alone], {}, {}, stack.where))
            rename(program, state, alone)
        rename(program, stack.out, outputs[0])
        place = program.steps.index(gates) + 1
        program.steps[place:place] = made

    def _ordered(self, step: Step, role: str, order: tuple[int, ...], rows: int) -> str:
        """A layer's weight with the gates in torch's order; zeros for a bias that is not there."""
        name = step.weights.get(role)
        if name is None:
            return self.program.weight(step.weights["weight"].removesuffix("weight") + role, np.zeros(rows, np.float32))
        if order == (0, 1, 2, 3):
            return name
        array = self.program.weights[name]
        blocks = np.split(array, 4)
        return self.program.weight(name, np.concatenate([blocks[at] for at in order]))
