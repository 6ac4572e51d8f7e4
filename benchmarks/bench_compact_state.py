"""Memory and time of optimizer state for kept weights only, beside dense state.

Run: ``python benchmarks/bench_compact_state.py``. Each optimizer trains an MLP of 17 million weights with 95 % zeros
for three steps in a process of its own. ``state`` is the size of its tensors, without the places of kept weights (four
bytes each), which are in the peak; ``peak`` is by how much the peak resident set rises from before the optimizer is
made to the end of the third step: masks, gradients and temporary copies are in it. Plain SGD, which has no state, shows
how much of the peak that is. ``step`` is the ratio of the optimizers' own step times, taken in turn.
"""

from __future__ import annotations

import subprocess
import sys

import torch
from timing import measure, ratio, record
from torch import nn

from secateur.core.choose import choose
from secateur.core.compact import CompactState
from secateur.core.masks import Masks

KINDS = {
    "none": lambda p: torch.optim.SGD(p, 0.01),
    "sgd": lambda p: torch.optim.SGD(p, 0.01, 0.9),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-3),
}
SPARSITY = 0.95


def network() -> tuple[nn.Module, Masks]:
    """An MLP and the masks of its largest weights."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2048, 4096), nn.ReLU(), nn.Linear(4096, 2048), nn.ReLU(), nn.Linear(2048, 10))
    scores = {name: dict(net.named_parameters())[name].detach().abs() for name in Masks.dense(net)}
    total = sum(score.numel() for score in scores.values())
    return net, choose(scores, round((1 - SPARSITY) * total))


def held(net: nn.Module, masks: Masks, kind: str, compact: bool) -> torch.optim.Optimizer:
    """An optimizer that holds the zeros."""
    optimizer = KINDS[kind](net.parameters())
    optimizer = CompactState(optimizer) if compact else optimizer
    masks.hold(net, optimizer)
    return optimizer


def backward(net: nn.Module) -> None:
    """Gradients of a small batch."""
    nn.functional.cross_entropy(net(torch.ones(4, 2048)), torch.tensor([0, 1, 2, 3])).backward()


def status(key: str) -> int:
    """A figure of this process, kB."""
    with open("/proc/self/status", encoding="ascii") as file:
        return int(next(line for line in file if line.startswith(key)).split()[1])


def child(kind: str, compact: bool) -> None:
    """Print the MiB of state and the MiB that three steps add to the peak."""
    net, masks = network()
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # the peak so far is forgotten
    before = status("VmRSS")
    optimizer = held(net, masks, kind, compact)
    for _ in range(3):
        backward(net)
        optimizer.step()
        optimizer.zero_grad()
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    size = sum(v.numel() * v.element_size() for v in tensors)
    print(size / 2**20, (status("VmHWM") - before) / 1024)


def figures(kind: str, compact: bool) -> tuple[float, float]:
    """State and peak of one optimizer, MiB."""
    command = [sys.executable, __file__, kind, "compact" if compact else "dense"]
    size, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return float(size), float(peak)


def main() -> None:
    """Print and record a line for each optimizer."""
    torch.set_num_threads(1)
    floor = figures("none", False)[1]
    for kind in ("sgd", "adamw"):
        made = {}
        for name in ("dense", "compact"):
            net, masks = network()
            made[name] = held(net, masks, kind, name == "compact")
            backward(net)
        times = measure({name: optimizer.step for name, optimizer in made.items()}, rounds=10)
        row: dict[str, object] = {"case": kind, "sparsity": SPARSITY, "step": ratio(times, "compact", "dense")}
        row["plain_sgd_peak_mib"] = round(floor, 2)
        for name in made:
            size, peak = figures(kind, name == "compact")
            row |= {f"{name}_state_mib": round(size, 2), f"{name}_peak_mib": round(peak, 2)}
        print(
            "   ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{value}" for key, value in row.items())
        )
        record("compact_state", row)


if __name__ == "__main__":
    child(sys.argv[1], sys.argv[2] == "compact") if len(sys.argv) == 3 else main()
