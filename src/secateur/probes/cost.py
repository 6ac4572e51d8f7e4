"""Cost: parameters, multiply-adds and bytes, dense and without the pruned weights; all exact."""

from __future__ import annotations

import math
from dataclasses import dataclass

from secateur.core.budget import compression
from secateur.core.errors import ModelError
from secateur.core.masks import Masks
from secateur.core.names import parameters, unwrap
from secateur.core.prunable import coverage
from secateur.core.reading import Paper, Reading
from secateur.core.sockets import Probe
from secateur.core.task import Task
from secateur.probes._products import Products, count_products


@dataclass(frozen=True)
class Cost(Probe):
    """Multiply-adds (MACs) of one example with the pruned weights left out; 1 MAC = 2 FLOPs.

    Only matrix products and convolutions count, not sums, activations or norms. A weight costs one MAC at every
    output position (input position, for transposed convolutions) of every use, positions on the padding
    included; a pruned weight costs none. Products of two activations, such as attention's, are never saved. The
    pass is counted as torch runs it on one example of the first batch, so functions, grouped and recurrent
    layers, tied weights and slices of a tensor count as they are used. This is arithmetic, not time: dense kernels
    do not skip zeros; see the latency.

    Parts, all whole numbers but the ratios:

    - ``params``; ``params_prunable``: those that ``masks`` cover; ``params_kept``: all but the pruned ones.
    - ``macs_dense``, ``macs_effective``; ``macs_activations``: products of two activations, in both.
    - ``macs:NAME`` and ``macs_effective:NAME`` of each parameter that is multiplied or masked.
    - ``bytes_dense``: parameters and saved buffers in their types; ``bytes_sparse``: of masked tensors the kept
      values and one bit a weight, the others whole.
    - ``compression`` = params / params_kept; ``speedup_theoretical`` = macs_dense / macs_effective.

    Without ``masks`` nothing counts as pruned; pass ``Masks.from_zeros(model)`` to count zeros. The note says so
    when torch's own counter disagrees, and names masked tensors that no product used.

    Raises:
        MaskError: when ``masks`` belong to another network.
        DataError: when the data is empty or spent.

    Cost: one forward pass of one example with plain kernels; memory of one mask.
    """

    paper = Paper(
        "What is the State of Neural Network Pruning?",
        "Blalock, Gonzalez Ortiz, Frankle, Guttag",
        2020,
        "arXiv:2003.03033",
        differs="effective MACs are counted weight by weight and not as dense MACs times the layer's density, which "
        "is the same where every weight of a layer is used equally often",
    )

    def __call__(self, task: Task, masks: Masks | None = None) -> Reading:
        """MACs of one example, pruned weights left out."""
        if masks is not None:
            masks.match(task.model)
        found = count_products(task, masks)
        dense, kept = found.dense.total() + found.other, found.kept.total() + found.other
        parts = {**_sizes(task, masks), "macs_dense": dense, "macs_effective": kept}
        parts |= {"macs_activations": found.other, "speedup_theoretical": _ratio(dense, kept)}
        for name in parameters(task.model):
            if found.dense[name] or (masks is not None and name in masks):
                parts |= {f"macs:{name}": found.dense[name], f"macs_effective:{name}": found.kept[name]}
        return Reading(
            float(kept), "MAC", parts={key: float(part) for key, part in parts.items()}, note=_note(found, dense, masks)
        )


def weight_costs(task: Task) -> dict[str, int]:
    """MACs of one weight of each parameter, for one example; 0 for those that nothing is multiplied with.

    Where parts of a tensor are used unequally often: their mean, rounded, at least 1.

    Raises:
        DataError: when the data is empty or spent.

    Cost: one forward pass of one example with plain kernels.
    """
    found = count_products(task).dense
    sizes = {name: p.numel() for name, p in parameters(task.model).items()}
    return {name: max(1, round(found[name] / n)) if found[name] else 0 for name, n in sizes.items()}


def _ratio(dense: int, kept: int) -> float:
    return dense / kept if kept else math.inf if dense else 1.0


def _sizes(task: Task, masks: Masks | None) -> dict[str, int | float]:
    every = parameters(task.model)
    total, pruned = sum(p.numel() for p in every.values()), 0
    saved = unwrap(task.model).state_dict(keep_vars=True)
    buffers = {id(b): b for name, b in unwrap(task.model).named_buffers() if name in saved}
    dense = sum(t.numel() * t.element_size() for t in (*every.values(), *buffers.values()))
    sparse = dense
    for name, kept in (masks.counts() if masks is not None else {}).items():
        gone = every[name].numel() - kept
        pruned += gone
        sparse += -(-every[name].numel() // 8) - gone * every[name].element_size()
    return {
        "params": total,
        "params_prunable": masks.total if masks is not None else _prunable(task),
        "params_kept": total - pruned,
        "bytes_dense": dense,
        "bytes_sparse": sparse,
        "compression": compression(total, pruned) if pruned else 1.0,
    }


def _prunable(task: Task) -> int:
    try:
        return sum(p.numel() for p in coverage(task.model).prunable.values())
    except ModelError:  # nothing can be pruned; it can still be counted
        return 0


def _note(found: Products, dense: int, masks: Masks | None) -> str:
    says = []
    if found.reference != dense:
        says.append(
            f"torch's flop counter finds {found.reference:,} MACs, this count {dense:,}: a product that only one of "
            "them knows"
        )
    idle = [f"`{name}`" for name in masks or () if not found.dense[name]]
    if idle:
        says.append(f"no product used {', '.join(idle[:4])}{f' and {len(idle) - 4} more' if len(idle) > 4 else ''}")
    return "; ".join(says)
