"""A run without a loop, for tests of rules that train numbers behind the weights."""

import torch

from secateur.core.hold import Hold
from secateur.core.masks import Masks
from secateur.core.run import Run


def run_of(net, rule, per_epoch=2, epochs=5, masks=None, seed=0):
    """A run at its beginning; the optimizer is plain SGD at a rate of 1."""
    optimizer = torch.optim.SGD(net.parameters(), 1.0)
    hold = Hold(masks or Masks.dense(net), net, optimizer, hooks=False)
    run = Run(net, optimizer, hold, per_epoch * epochs, per_epoch, seed, rules=(rule,))
    rule.begin(run)
    return run


def heard(run, rule, count):
    """As if the loss of a batch of ``count`` examples had been computed."""
    rule.loss(run, torch.zeros(()), (None, torch.zeros(count, dtype=torch.long)), None)
