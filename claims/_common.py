"""What several claims need: fresh networks from a seed, batches with every class, accuracy in per cent.

Finished seeds are kept by the text of the claim's own file, so runs made before a change here have to be removed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from secateur.core.losses import CrossEntropy
from secateur.core.streams import seed_global, stream
from secateur.core.task import Batch, Task
from secateur.data import Loader, Split
from secateur.nets import build
from secateur.probes.accuracy import Accuracy


def fresh(name: str, seed: int, **options: Any) -> nn.Module:
    """A network with initial weights that are a function of the seed; torch's own generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        seed_global(seed, "init")
        return build(name, **options)


def percent(model: nn.Module, split: Split, **scale: Any) -> float:
    """Per cent of right answers."""
    return Accuracy()(Task(model, CrossEntropy(), Loader(split, 1000, **scale))).value


def balanced(split: Split, each: int, seed: int, **scale: Any) -> list[Batch]:
    """One batch with ``each`` examples of every class, drawn by the seed."""
    order = torch.randperm(len(split), generator=stream(seed, "balanced"))
    labels = split.y[order]
    picked = torch.cat([order[labels == label][:each] for label in labels.unique()])
    return list(Loader(split.take(picked), len(picked), **scale))
