"""A rule that does nothing but count what training costs while other rules change the zeros."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.core.names import Named
from secateur.core.reading import Paper
from secateur.core.run import Run
from secateur.core.sockets import Rule
from secateur.core.task import Batch
from secateur.probes.cost import Cost

SPARSE, EXAMPLES = "macs/sparse", "macs/examples"
"""Figures of the last step in ``metrics.jsonl``."""


@dataclass(frozen=True)
class Counted(Rule):
    """Adds up the multiply-adds of every step from the zeros that are in the network when it computes.

    A step costs, for each example, twice the forward pass without the weights that are zero (outputs, and gradients of
    activations) and once that without the weights the masks prune (gradients of weights). Rules that keep zeros in the
    network but let all weights learn, such as Top-KAST, are so counted with a dense gradient of the weights, which is
    the most it can be. Where a weight hides behind a gate, it counts as there until it is pruned. Put this rule first:
    it looks at the network before others change it.

    Cost: one forward pass of one example; at each step a count over the prunable weights.
    """

    paper = Paper(
        "Rigging the Lottery: Making All Tickets Winners",
        "Evci, Gale, Menick, Castro, Elsen",
        2019,
        "arXiv:1911.11134",
        differs="their convention for the cost of training, from the zeros of each step",
    )

    def begin(self, run: Run) -> None:
        """Find out what each weight costs."""
        state = run.state(self)
        where = next(run.model.parameters()).device
        if run.resumed:
            state["sparse"] = state["sparse"].to(where)
            return
        parts = Cost()(run.task(1)).parts
        state["dense"], state["examples"] = int(parts["macs_dense"]), 0
        for name in run.masks:
            state[f"macs:{name}"] = int(parts.get(f"macs:{name}", 0))
        state["sparse"] = torch.zeros((), dtype=torch.int64, device=where)

    @torch.no_grad()
    def loss(self, run: Run, loss: Tensor, batch: Batch, output: Any) -> Tensor:
        """Count one batch; the loss is handed on as it is."""
        state, weights = run.state(self), run.weights()
        examples = len(batch[1])
        state["examples"] += examples
        there = {name: torch.count_nonzero(w) for name, w in weights.items()}
        allowed = {name: torch.count_nonzero(mask) for name, mask in run.masks.items()}
        cost = 2 * _forward(state, weights, there) + _forward(state, weights, allowed)
        state["sparse"] += examples * cost.to(state["sparse"].device)
        return loss

    def after_step(self, run: Run) -> None:
        """Hand the sums to the metrics of the last step."""
        if run.step == run.total:
            state = run.state(self)
            run.note(SPARSE, float(int(state["sparse"])))
            run.note(EXAMPLES, float(state["examples"]))

    def end(self, run: Run) -> None:
        """Forget them."""
        run.state(self).clear()


def _forward(state: dict[str, Any], weights: Named, left: Named) -> Tensor:
    """MACs of the forward pass of one example when so many weights of each tensor are left."""
    cost = state["sparse"].new_full((), state["dense"])
    for name, w in weights.items():
        whole = state[f"macs:{name}"]
        cost -= whole - (whole * left[name].to(cost.device)) // w.numel()
    return cost
