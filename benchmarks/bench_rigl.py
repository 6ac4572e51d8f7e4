"""What moving zeros costs in training: RigL's updates in the loop, and the same loop with zeros that stand still.

ResNet-20 at batch 128, zeros 90 %, an update every 100 steps. Goal: updates take less than 2 % of the training time.
Both are taken in one process, a plain step and an update in turn; the share is ``update / (99 steps + update)`` with
the update's own work alone (its forward and backward pass are those of a step).
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from timing import measure, medians, record
from torch import nn

from secateur.core.hold import Hold
from secateur.core.masks import Masks
from secateur.core.run import Run
from secateur.nets import build
from secateur.rules.rigl import Rigl

EVERY = 100


class Bench:
    """A network under RigL, of which single steps and single updates can be timed."""

    def __init__(self, net: nn.Module, x: torch.Tensor, y: torch.Tensor, rule: Rigl) -> None:
        self.net, self.x, self.y, self.rule = copy.deepcopy(net), x, y, rule
        self.optimizer = torch.optim.SGD(self.net.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
        hold = Hold(Masks.dense(self.net), self.net, self.optimizer, hooks=False)
        self.run = Run(self.net, self.optimizer, hold, 100 * EVERY, 10 * EVERY, rules=(rule,))
        rule.begin(self.run)
        self.step()

    def _backward(self) -> None:
        nn.functional.cross_entropy(self.net(self.x), self.y).backward()

    def step(self) -> None:
        """A step as the loop does it between updates."""
        self.optimizer.zero_grad(set_to_none=True)
        self._backward()
        self.run.step = 1
        self.rule.before_step(self.run)
        self.run.hold.mask_gradients_()
        self.optimizer.step()
        self.run.hold.mask_weights_()
        self.slopes = {name: p.grad for name, p in self.net.named_parameters()}

    def update(self) -> None:
        """The work of an update beside the forward and backward pass."""
        for name, p in self.net.named_parameters():
            p.grad = self.slopes[name]  # an update takes them away
        self.run.step = EVERY
        before = self.run.masks
        self.rule.before_step(self.run)
        if self.run.masks is before:
            raise RuntimeError("no update was made")


def main() -> None:
    """Print and record the share of updates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    asked = parser.parse_args()
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    net = build("resnet20", (3, 32, 32), 10).to(where)
    x, y = torch.randn(128, 3, 32, 32, device=where), torch.randint(0, 10, (128,), device=where)
    for threads in asked.threads:
        torch.set_num_threads(threads)
        bench = Bench(net, x, y, Rigl(sparsity=0.9, every=EVERY))
        candidates: dict[str, Callable[[], object]] = {"step": bench.step, "update": bench.update}
        times = measure(candidates, rounds=asked.rounds, warmup=2)
        # Both of a round are neighbours in time, so what slows one down slows the other down too
        shares = [u / ((EVERY - 1) * s + u) for s, u in zip(times["step"], times["update"], strict=True)]
        taken, share = medians(times), sorted(shares)[len(shares) // 2]
        told = f"step {taken['step'] * 1e3:.2f} ms   update {taken['update'] * 1e3:.2f} ms   share {share:.3%}"
        print(f"resnet20   {threads} thread(s)   {told}")
        record("rigl", {"case": "resnet20", "threads": threads, "every": EVERY, "share": share})


if __name__ == "__main__":
    main()
