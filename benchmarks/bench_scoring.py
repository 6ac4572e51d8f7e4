"""What a scoring pass costs beside one plain forward and backward pass over the same data.

Run: ``python benchmarks/bench_scoring.py [--rounds 15] [--bar 1.15]``. One thread, CPU time. Scores are checked
against ``|w · grad|`` from plain ``loss.backward()`` before anything is timed. Ends with 1 when a
ratio is above the bar.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
from timing import measure, medians, ratio, record
from torch import nn
from torch.nn import functional

from secateur.core.masks import Masks
from secateur.core.sockets import Criterion
from secateur.core.task import Task
from secateur.criteria.snip import Snip
from secateur.criteria.taylor import Taylor
from secateur.nets import build


def mlp() -> Task:
    """LeNet-300-100, 20 batches of 128."""
    return _task(build("lenet_300_100"), [torch.randn(128, 784) for _ in range(20)], 10)


def resnet() -> Task:
    """ResNet-20 on CIFAR-sized images, 2 batches of 32."""
    return _task(build("resnet20"), [torch.randn(32, 3, 32, 32) for _ in range(2)], 10)


def transformer() -> Task:
    """A tiny GPT on 4 batches of 8 sequences of 64 tokens."""
    net = build("gpt_tiny", vocab=64, length=64, dim=64, depth=2, heads=4)
    batches = [torch.randint(64, (8, 64)) for _ in range(4)]
    return Task(net, _per_token, [(words, words.roll(-1, 1)) for words in batches])


NETWORKS: dict[str, Callable[[], Task]] = {"lenet_300_100": mlp, "resnet20": resnet, "gpt_tiny": transformer}
CRITERIA: dict[str, Criterion] = {"snip": Snip(), "taylor": Taylor()}


def plain_pass(task: Task, training: bool) -> None:
    """What anyone would write: forward, backward, gradients added up in ``.grad``."""
    task.model.train(training)
    task.model.zero_grad(set_to_none=True)
    total = sum(len(target) for _, target in task.data)
    for inputs, target in task.data:
        (task.loss(task.model(inputs), target) * (len(target) / total)).backward()


def check(name: str, criterion: Criterion, task: Task, masks: Masks, training: bool) -> None:
    """Scores must be ``|w · grad|`` of the plain pass, or its square."""
    buffers = {key: buffer.clone() for key, buffer in task.model.named_buffers()}
    plain_pass(task, training)
    for key, buffer in task.model.named_buffers():
        buffer.copy_(buffers[key])
    scores = criterion(task, masks)
    for key, p in masks.match(task.model).items():
        slope = torch.zeros_like(p) if p.grad is None else p.grad
        expected = (p * slope).detach().abs()
        expected = expected.square() if name == "taylor" else expected
        torch.testing.assert_close(scores[key], expected, rtol=1e-3, atol=1e-3 * expected.max().item())


def run(rounds: int, bar: float) -> bool:
    """Time all pairs; whether every ratio is within the bar."""
    within = True
    for network, make in NETWORKS.items():
        for name, criterion in CRITERIA.items():
            torch.manual_seed(0)
            task = make()
            untrained_norms = name == "snip"  # scored with statistics of the batch, as in training mode
            if not untrained_norms:
                plain_pass(task, True)
            masks = Masks.dense(task.model)
            check(name, criterion, task, masks, untrained_norms)
            times = measure(_candidates(criterion, task, masks, untrained_norms), rounds, clock=time.process_time)
            middle, figure = medians(times), ratio(times, "score", "plain")
            within &= figure <= bar
            above = "" if figure <= bar else f"  ABOVE {bar}"
            plain, score = middle["plain"] * 1e3, middle["score"] * 1e3
            print(f"{network:14} {name:7} plain {plain:8.2f} ms  score {score:8.2f} ms  ratio {figure:.3f}{above}")
            results = {"network": network, "criterion": name, "ratio": round(figure, 4), "bar": bar, "rounds": rounds}
            record("scoring", {**results, **{f"{key}_s": round(value, 6) for key, value in middle.items()}})
    return within


def _candidates(criterion: Criterion, task: Task, masks: Masks, training: bool) -> dict[str, Callable[[], object]]:
    fresh = {key: buffer.clone() for key, buffer in task.model.named_buffers()}

    def score() -> object:
        if training:  # the plain pass has trained the statistics: make them untrained again
            for key, buffer in task.model.named_buffers():
                buffer.copy_(fresh[key])
        return criterion(task, masks)

    return {"plain": lambda: plain_pass(task, training), "score": score}


def _task(net: nn.Module, inputs: list[torch.Tensor], classes: int) -> Task:
    return Task(net, functional.cross_entropy, [(x, torch.randint(classes, (len(x),))) for x in inputs])


def _per_token(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def main() -> int:
    """Exit code 0 when all ratios are within the bar."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--bar", type=float, default=1.15)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    return 0 if run(chosen.rounds, chosen.bar) else 1


if __name__ == "__main__":
    sys.exit(main())
