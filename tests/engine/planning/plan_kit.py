"""A small network whose milliseconds are plain numbers, for tests of plans."""

import torch
from torch import nn

from secateur.core.losses import CrossEntropy
from secateur.core.streams import stream
from secateur.core.task import Task
from secateur.engine.planning.costs import Curve, NetworkCost
from secateur.engine.planning.planner import Planning
from secateur.engine.planning.rises import Rises

NAMES = ("0.weight", "2.weight", "4.weight")
WORDS = ("unstructured", "4x1", "2:4")
RUNGS = (0.9, 0.6, 0.3, 0.1, 0.05, 0.02)
HARM = {"0.weight": 0.5, "2.weight": 0.2, "4.weight": 0.1}
WORSE = {"unstructured": 1.0, "4x1": 1.5, "2:4": 1.2}


def network():
    """Three layers: 24 x 16, 16 x 24 and 4 x 16, in that order."""
    net = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4))
    random = stream(0, "plan kit")
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=random) * 0.4)
    return net.eval()


def task_of(net=None, examples=48):
    """The network's own answers on random inputs, in three batches."""
    net, random = net or network(), stream(1, "plan kit")
    x = torch.randn((examples, 16), generator=random)
    with torch.no_grad():
        y = net(x).argmax(1)
    return Task(net, CrossEntropy(), list(zip(x.split(16), y.split(16), strict=True)))


def rises_of_kit(words=WORDS):
    """Shares that are plain numbers; patterns with blocks do more harm."""
    pruned = {p: [0.5 if p == "2:4" else 1 - d for d in RUNGS] for p in words}
    shares = {n: {p: tuple(HARM[n] * WORSE[p] * part**2 for part in pruned[p]) for p in words} for n in NAMES}
    return Rises(RUNGS, shares, fixed={"2:4": 0.5})


def cost_of_kit(words=WORDS, fixed=0.2):
    """Milliseconds in straight lines; the last layer never gets faster."""
    lines = {"unstructured": (0.1, 1.3), "4x1": (0.05, 1.1), "2:4": (0.8, 0.8)}
    curves = {
        name: {p: Curve((0.5,), (ms * 0.8,)) if p == "2:4" else Curve((0.02, 1.0), tuple(ms * k for k in lines[p]))
               for p in words}
        for name, ms in (("0.weight", 1.0), ("2.weight", 0.6))
    }  # fmt: skip
    curves["4.weight"] = {p: Curve((0.02, 1.0), (0.05, 0.06)) for p in words}
    return NetworkCost(curves, {"0.weight": 1.0, "2.weight": 0.6, "4.weight": 0.05}, fixed, 0.1, threads=1)


def how(words=WORDS, **options):
    """Options of a plan on plain numbers: nothing is timed or tried unless asked for."""
    given = {"cost": cost_of_kit(words), "rises": rises_of_kit(words), "measure": False, "threads": 1, **options}
    return Planning(words, **given)
