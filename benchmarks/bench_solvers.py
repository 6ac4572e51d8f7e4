"""What the solvers and the second-order criteria cost, in time and memory, beside what they must do at least.

Run: ``python benchmarks/bench_solvers.py [--rounds 2] [--only SECTION ...] [--write docs/results/solvers.md]``. One
thread, CPU time, candidates in turn, results checked first; peaks in a process of their own. Some minutes, more
on a busy machine. Sections left out stand on the page as they were last recorded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from bench_scoring import NETWORKS, plain_pass
from timing import RESULTS, machine, measure, medians, ratio, record
from torch import Tensor, nn
from torch.nn import functional

from secateur.core.masks import Masks
from secateur.core.patterns import NM, Unstructured
from secateur.core.streams import stream
from secateur.core.task import Task
from secateur.criteria.obd import Obd
from secateur.criteria.sosp_h import SospH
from secateur.solvers.exact_obs import ExactObs
from secateur.solvers.obs import Obs
from secateur.solvers.sparsegpt import SparseGpt

Row = tuple[str, str, str]
"""What was measured, the figure, the goal and whether it is held."""

PEAK = """
import sys, torch
from secateur.core.patterns import NM, Unstructured
from secateur.core.sockets import find
name, (rows, width, pattern, options) = sys.argv[1], map(eval, sys.argv[2:])
torch.set_num_threads(1)
solver = find("solvers", name)(**options)
def status(key):
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])
def layer(rows, width):
    x, gram = torch.randn(256, width), torch.empty(width, width)
    for i in range(0, width, 128):
        gram[i : i + 128] = x[:, i : i + 128].T @ x / 256
    gram.diagonal().add_(0.1)
    return torch.randn(rows, width), gram
w, gram = layer(4, 256)
solver(w, gram, pattern, w.numel() // 2)
w, gram = layer(rows, width)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
solver(w, gram, pattern, w.numel() // 2)
print((status("VmHWM") - before) / (8 * width * width))
"""

PEAKS = (
    ("sparsegpt", 256, Unstructured(), {}),
    ("sparsegpt", 2048, Unstructured(), {}),
    ("sparsegpt", 2048, NM(2, 4), {}),
    ("exact_obs", 2, Unstructured(), {}),
    ("exact_obs", 2, NM(2, 4), {}),
    ("obs", 1, Unstructured(), {}),
    ("alps", 256, Unstructured(), {"rounds": 3, "fit": 2}),
    ("alps", 2048, Unstructured(), {"rounds": 3, "fit": 2}),
)


def layer(rows: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Random weights and the Gram matrix of correlated inputs, two examples an input."""
    random = stream(0, "bench", f"{rows, width}")
    x = torch.randn(2 * width, width, generator=random)
    x += torch.randn(len(x), 1, generator=random)
    return torch.randn(rows, width, generator=random).to(dtype), (x.T @ x / len(x)).to(dtype)


def damped(gram: Tensor, damping: float) -> Tensor:
    return gram.double() + damping * gram.double().diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def goal(what: str, figure: float, bar: float, least: bool = False) -> Row:
    """A line of the table: at most (or at least) the bar."""
    held = figure >= bar if least else figure <= bar
    row = what, f"{figure:.3g}x", f"{'at least' if least else 'at most'} {bar:g}x: {'held' if held else '**missed**'}"
    print(" | ".join(row), flush=True)
    return row


def sparsegpt(rounds: int, width: int = 4096) -> list[Row]:
    """The sweep beside the factorisations of the method and one product."""
    _check_sweep()
    w, gram = layer(width, width)

    def must() -> Tensor:
        matrix = damped(gram, 0.01)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
        torch.linalg.cholesky(inverse, upper=True)
        del inverse
        return matrix @ matrix

    cases = {"50 %": Unstructured(), "2:4": NM(2, 4)}
    run: dict[str, Callable[[], object]] = {"must": must}
    run |= {name: lambda p=p: SparseGpt()(w, gram, p, w.numel() // 2) for name, p in cases.items()}
    times = measure(run, rounds, 0, time.process_time)
    middle = medians(times)
    print({name: round(value, 2) for name, value in middle.items()}, flush=True)
    what = f"`sparsegpt`, {width} x {width}, {{}}: {{:.1f}} s beside {middle['must']:.1f} s"
    return [goal(what.format(name, middle[name]), ratio(times, name, "must"), 2) for name in cases]


def _check_sweep() -> None:
    w, gram = layer(24, 48, torch.float64)
    new, mask = SparseGpt()(w, gram, NM(2, 4), w.numel() // 2)
    swept, matrix = w.clone(), damped(gram, 0.01)
    for j in range(48):
        inverse = torch.linalg.inv(matrix[j:, j:])
        swept[:, j:] -= (swept[:, j] * ~mask[:, j] / inverse[0, 0])[:, None] * inverse[0]
    zeroed = (new == w * mask).all(1)  # rows that are better off so
    torch.testing.assert_close(new[~zeroed], (swept * mask)[~zeroed], rtol=1e-8, atol=1e-10)


def naive(w: Tensor, inverse: Tensor, steps: int) -> tuple[Tensor, list[int]]:
    """A row loses ``steps`` weights, one by one; after each the whole inverse is updated."""
    w, inverse, order, gone = w.clone(), inverse.clone(), [], torch.zeros(len(w), dtype=torch.bool)
    for _ in range(steps):
        q = int((w.square() / inverse.diagonal()).masked_fill(gone, torch.inf).argmin())
        column = inverse[q] / inverse[q, q]
        w = w - w[q] * column
        inverse = inverse - torch.outer(inverse[q], column)
        gone[q] = True
        inverse[q, q] = 1.0
        order.append(q)
    return w * ~gone, order


def tuned(w: Tensor, inverse: Tensor, steps: int) -> tuple[Tensor, list[int]]:
    """The same in place: what goes changes places with the last, and all work is on what is left."""
    w, inverse, place, order = w.clone(), inverse.clone(), list(range(len(w))), []
    for last in range(len(w) - 1, len(w) - 1 - steps, -1):
        now, left = w[: last + 1], inverse[: last + 1, : last + 1]
        q = int((now.square() / left.diagonal()).argmin())
        swap = [last, q]
        left[:, [q, last]] = left[:, swap]
        left[[q, last]] = left[swap]
        now[[q, last]] = now[swap]
        place[q], place[last] = place[last], place[q]
        column = left[last, :last] / left[last, last].sqrt()
        w[:last].sub_(column, alpha=float(now[last] / left[last, last].sqrt()))
        inverse[:last, :last].addr_(column, column, alpha=-1)
        order.append(place[last])
    new = torch.zeros_like(w)
    new[place[: len(w) - steps]] = w[: len(w) - steps]
    return new, order


def exact_obs(rounds: int, width: int = 512, sample: int = 2) -> list[Row]:
    """All rows together beside a loop over rows; the loop does ``sample`` rows and is scaled up."""
    w, gram = layer(width, width)
    inverse = torch.linalg.inv(damped(gram, 0.01))
    new, mask = ExactObs()(w, gram, Unstructured(), w.numel() // 2)
    loops = {"naive": naive, "tuned": tuned}
    for r in range(sample):
        for loop in loops.values():
            found, order = loop(w[r].double(), inverse, int((~mask[r]).sum()))
            if set(order) != set((~mask[r]).nonzero()[:, 0].tolist()):
                raise SystemExit(f"row {r} of exact_obs lost other weights than the {loop.__name__} loop")
            torch.testing.assert_close(new[r].double(), found, rtol=1e-4, atol=1e-4)

    def all_losses(loop: Callable) -> Callable[[], object]:
        return lambda: [loop(w[r].double(), inverse, width) for r in range(sample)]

    run: dict[str, Callable[[], object]] = {"ours": lambda: ExactObs()(w, gram, Unstructured(), w.numel() // 2)}
    times = measure(run | {name: all_losses(loop) for name, loop in loops.items()}, rounds, 0, time.process_time)
    print({name: round(value, 2) for name, value in medians(times).items()}, flush=True)
    factor, ours = width / sample, medians(times)["ours"]
    plain = f"`exact_obs`, {width} x {width}: {ours:.1f} s; a loop over rows that updates "
    slow, fast = (factor * ratio(times, name, "ours") for name in loops)
    extra = plain + "in place, only what is left (no goal)", f"{fast:.3g}x", "-"
    print(extra, flush=True)
    return [goal(plain + "the whole inverse at every loss", slow, 20, least=True), extra]


def obs(width: int = 4000) -> list[Row]:
    """One row with a full matrix loses 90 %; the survivors must be the least-squares fit on their set."""
    w, gram = layer(1, width, torch.float64)
    wall, begin = time.perf_counter(), time.process_time()
    new, mask = Obs()(w, gram, Unstructured(), width // 10)
    taken, wall = time.process_time() - begin, time.perf_counter() - wall
    matrix, kept = damped(gram, 1e-4), mask[0]
    best = torch.linalg.solve(matrix[kept][:, kept], matrix[kept] @ w[0])
    torch.testing.assert_close(new[0, kept], best, rtol=1e-6, atol=1e-6)
    held = "held" if taken < 120 else "**missed**"
    what = f"`obs`, {width:,} weights, full Hessian, 90 % removed, one thread"
    row = what, f"{taken:.0f} s CPU, {wall:.0f} s wall", f"under 120 s: {held}"
    print(" | ".join(row), flush=True)
    return [row]


def criteria(rounds: int) -> list[Row]:
    """`obd` and `sosp_h` beside one forward and backward pass over the same data."""
    _check_criteria()
    rows = []
    for network, make in NETWORKS.items():
        torch.manual_seed(0)
        task = make()
        plain_pass(task, True)
        task.model.eval()
        masks = Masks.dense(task.model)
        run: dict[str, Callable[[], object]] = {
            "plain": lambda task=task: plain_pass(task, False),
            "obd": lambda task=task, masks=masks: Obd()(task, masks),
            "sosp_h": lambda task=task, masks=masks: SospH()(task, masks),
        }
        times = measure(run, rounds, 1, time.process_time)
        way = "the recursion" if network == "lenet_300_100" else "signs at the outputs: no chain of layers"
        rows.append(goal(f"`obd`, {network} ({way})", ratio(times, "obd", "plain"), 3))
        rows.append(goal(f"`sosp_h`, {network}", ratio(times, "sosp_h", "plain"), 4))
    return rows


def _check_criteria() -> None:
    random = stream(0, "bench", "criteria")
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    data = [(torch.randn(7, 6, generator=random).double(), torch.randn(7, 3, generator=random).double())]
    task = Task(net, functional.mse_loss, data)
    masks = Masks.dense(net)
    one, other = (Obd(diagonal=way)(task, masks) for way in ("recursion", "exact"))
    weights = dict(masks.match(net))
    loss = functional.mse_loss(net(data[0][0]), data[0][1])
    slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
    pushed = torch.stack([(s * w.detach()).sum() for s, w in zip(slopes, weights.values(), strict=True)]).sum()
    curved = torch.autograd.grad(pushed, list(weights.values()))
    sosp = SospH()(task, masks)
    for (name, w), slope, bent in zip(weights.items(), slopes, curved, strict=True):
        torch.testing.assert_close(one[name], other[name])
        unit = (w * slope).sum(1).abs() + (w * bent).sum(1).abs() / 2
        torch.testing.assert_close(sosp[name].sum(1), unit.detach().to(sosp[name].dtype), rtol=1e-5, atol=1e-8)


def memory(width: int = 2048) -> list[Row]:
    """By how much the peak resident set of a process rises, in float64 copies of the Gram matrix."""
    rows = []
    for name, count, pattern, options in PEAKS:
        command = [sys.executable, "-c", PEAK, name, *map(str, (count, width)), repr(pattern), repr(options)]
        env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
        figure, bar = float(done.stdout), 3 + count / width
        verdict = f"at most {bar:.3g}: {'held' if figure <= bar else '**missed**'}"
        held = "held" if 2 * figure <= 3 + count / width else "missed"
        row = (
            f"`{name}`, {count} x {width}, {pattern}",
            f"{figure:.2f}",
            f"{verdict}; as given {2 * figure:.2f}, {held}",
        )
        print(" | ".join(row), flush=True)
        rows.append(row)
    return rows


def _table(head: Row, rows: list[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ("---",) * 3, *rows])


def page() -> str:
    """The page of results, from what was recorded last of each section."""
    lines = map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines())
    last = {line["section"]: line for line in lines if line["benchmark"] == "solvers"}
    load = [value for line in last.values() for value in line["load"]]
    rounds = [last[name]["rounds"] for name in ("sparsegpt", "exact_obs", "criteria")]
    times = [row for name in SECTIONS if name != "memory" for row in last[name]["rows"]]
    on, peaks = machine(), last["memory"]["rows"]
    missed = [what for what, _, verdict in times + peaks if "**missed**" in verdict]

    return f"""# What the solvers and the second-order criteria cost

`python benchmarks/bench_solvers.py --write docs/results/solvers.md` makes this page. {on["cpu"]},
{on["cores"]} cores, one thread; torch {on["torch"]}, python {on["python"]}. Load average between {min(load):.1f} and
{max(load):.1f}: times are CPU time and ratios are of neighbours taken in turn, but caches and memory are shared with
whatever else runs, and seconds grow with the load. Results are checked against an independent computation first.
Weights are random, inputs correlated; the matrices are float32 (float64 for `obs`), the solvers work in float64.

## Time

{_table(("what", "figure", "goal"), times)}

What `sparsegpt` is measured by: a Cholesky factorisation of the Gram matrix, its inverse, a factorisation of the
inverse, and one product of two matrices of that size, all in float64. It does one factorisation and no inverse,
the sweep, and two half products that compare each row with zeroing. The loops over rows beside `exact_obs` do 2 rows
of 512 and all losses of each; their time is scaled up. One is a plain loop that updates the whole inverse, out of
place, at every loss; the other works in place on what is left. `obd` and `sosp_h` stand beside one forward and
backward pass over the same data. `obs` is judged by its CPU seconds: the wall shows how little of the machine it had.
Medians of {min(rounds)} rounds or more (`obs` once), sections one by one: differences of a few per cent are noise.

{_memory(peaks, missed)}"""


def _memory(peaks: list[Sequence[str]], missed: list[str]) -> str:
    return f"""## Memory

By how much the peak resident set of a process rises during one call, in float64 copies of the Gram matrix, the type
the solvers work in. The goal is 3 such copies and one of the layer. "As given" counts in copies of the float32 matrix
that the caller hands over, twice as many. `alps` runs 3 rounds and 2 steps of the fit, which hold as much as any more.

{_table(("layer", "peak", "goal"), peaks)}

## Missed

{chr(10).join(f"- {what}" for what in missed) or "Nothing, counted in float64 copies."}

`obs` holds an inverse for each row that loses a weight, so with more than two rows it is above the goal for memory; the
solver `exact_obs` takes the same weights away without.
"""


SECTIONS: dict[str, Callable[[int], list[Row]]] = {
    "sparsegpt": sparsegpt,
    "exact_obs": exact_obs,
    "obs": lambda _: obs(),
    "criteria": criteria,
    "memory": lambda _: memory(),
}


def main() -> None:
    """Measure, record, and write the page if asked."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--only", nargs="*", choices=list(SECTIONS), default=list(SECTIONS))
    options.add_argument("--write", type=Path)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    for name in chosen.only:
        before = os.getloadavg()[0]
        rows = SECTIONS[name](chosen.rounds)
        load = [round(before, 1), round(os.getloadavg()[0], 1)]
        record("solvers", {"section": name, "rows": rows, "load": load, "rounds": chosen.rounds})
    if chosen.write:
        chosen.write.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
