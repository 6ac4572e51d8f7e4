"""Small sigmoid networks as in the papers on surgery: trained by L-BFGS with decay, and losing one weight at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from secateur.core import streams
from secateur.core.masks import Masks
from secateur.core.sockets import Criterion
from secateur.core.task import Task
from secateur.engine.surgeon import operate
from secateur.linalg.products import per_example_gradients
from secateur.solvers.obs import Obs


class Way(Protocol):
    """Takes one more weight away from the task's network, in place; gives the masks that are left."""

    def __call__(self, task: Task, masks: Masks) -> Masks: ...


def network(inputs: int, hidden: int, seed: int, restart: int) -> nn.Sequential:
    """One hidden layer and one output, all sigmoid, float64; the initial weights are a function of the numbers."""
    with torch.random.fork_rng(devices=[]):
        streams.seed_global(seed, "init", restart)
        layers = [nn.Linear(inputs, hidden), nn.Sigmoid(), nn.Linear(hidden, 1), nn.Sigmoid()]
        net = nn.Sequential(OrderedDict(zip(("fc", "act", "head", "out"), layers, strict=True))).double()
        with torch.no_grad():
            for p in net.parameters():
                p.uniform_(-1.0, 1.0)
    return net


def half_square(output: Tensor, target: Tensor) -> Tensor:
    """The paper's error ``|t - o|² / 2``, mean over the examples."""
    return (output[:, 0] - target).square().mean() / 2


def task_of(net: nn.Module, x: Tensor, y: Tensor) -> Task:
    """The network with that error on one batch of all examples."""
    return Task(net, half_square, [(x.double(), y.double())])


def percent(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Per cent of outputs on the right side of one half."""
    with torch.no_grad():
        return 100 * float(((net(x.double())[:, 0] > 0.5) == (y > 0.5)).double().mean())


def everything(net: nn.Module) -> Masks:
    """All weights and biases, all kept."""
    return Masks.dense(net, only=["*"])


def aim(task: Task, decay: float) -> Tensor:
    """What training minimises: the error and ``decay · |w|² / P`` over P examples."""
    ((x, y),) = task.data
    return task.loss(task.model(x), y) + decay / len(x) * sum(p.square().sum() for p in task.model.parameters())


def fit(task: Task, masks: Mapping[str, Tensor], decay: float, steps: int = 300) -> float:
    """L-BFGS from where the network stands, the pruned weights held at zero; gives the aim at the end."""
    params = task.params()
    optimizer = torch.optim.LBFGS(
        list(params.values()), max_iter=steps, tolerance_grad=1e-9, tolerance_change=1e-13, history_size=20,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> float:
        optimizer.zero_grad()
        value = aim(task, decay)
        value.backward()
        for name, p in params.items():  # weights that start at zero and have no slope stay at zero
            if p.grad is not None:
                p.grad.mul_(masks[name])
        return float(value.detach())

    optimizer.step(closure)
    optimizer.zero_grad()
    return float(aim(task, decay).detach())


def slopes(task: Task) -> Task:
    """The same network and data with the output for a loss, so that its gradients are the paper's ``X``."""
    return Task(task.model, lambda output, _: output.mean(), task.data)


def surgeon(alpha: float) -> Way:
    """The cheapest weight goes and all others move, by the paper's matrix ``mean XXᵀ`` of the outputs' slopes ``X``.

    It is the empirical Fisher matrix of a loss that is the output itself, and the Gauss-Newton matrix of the error.

    Args:
        alpha: added to the diagonal, as the paper does.
    """

    def cut(task: Task, masks: Masks) -> Masks:
        own = slopes(task)
        squares = torch.cat(list(per_example_gradients(own, masks))).square()
        return operate(own, masks, masks.kept - 1, Obs(damping=alpha / float(squares.mean())), "fisher")[0]

    return cut


def lowest(criterion: Criterion) -> Way:
    """The weight of the lowest score goes, nothing else moves."""

    def cut(task: Task, masks: Masks) -> Masks:
        scores = criterion(task, masks)
        least = {name: score.masked_fill(~masks[name], torch.inf) for name, score in scores.items()}
        name = min(least, key=lambda key: float(least[key].min()))
        mask = masks[name].clone()
        mask.view(-1)[int(least[name].argmin())] = False
        left = Masks({**masks, name: mask})
        left.apply_(task.model)
        return left

    return cut
