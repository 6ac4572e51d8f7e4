"""How fast the network should run compiled on this machine, from what is known of its layers' cost."""

from __future__ import annotations

from typing import Any

from secateur.core.errors import SecateurError
from secateur.engine.doctor.leftovers import normalised
from secateur.engine.doctor.norms import examples, network
from secateur.engine.doctor.subject import Subject, zeros

UNKNOWN = "not known: run `secateur calibrate`"


def expected_speed(subject: Subject, threads: int = 1) -> dict[str, Any]:
    """Milliseconds of one example as the network is and as it would be dense; nothing is measured for it.

    Returns:
        ``ms`` and ``dense_ms`` with their relative ``error``, ``threads`` and the ``layers``; or ``why`` it is not
        known, and whether it was ``asked`` for by naming network and data.
    """
    if subject.net is None or subject.data is None:
        return {"asked": False, "why": "not known: shapes need the network and data, `--net NAME --data NAME`"}
    from secateur.engine.planning.costs import network_cost

    net, batches = network(subject), examples(subject)
    example = next(iter(batches))[0][:1] if batches is not None else None
    try:
        cost = network_cost(net, example, threads=threads, measure=False)
    except SecateurError as error:
        return {"asked": True, "why": f"not known: {str(error).splitlines()[0]}"}
    if not cost.layers:
        return {"asked": True, "why": UNKNOWN}
    tensors = normalised(subject).tensors
    density = {n: 1 - zeros(tensors[n]) / tensors[n].numel() for n in cost.layers if n in tensors}
    layers = {
        name: {
            "density": share,
            "ms": cost.at(name, "unstructured", share),
            "dense_ms": cost.at(name, "unstructured", 1.0),
        }
        for name, share in density.items()
        if "unstructured" in cost.layers[name]
    }
    dense = cost.fixed + sum(layer["dense_ms"] for layer in layers.values())
    ms = cost.fixed + sum(layer["ms"] for layer in layers.values())
    return {"ms": ms, "dense_ms": dense, "error": cost.error, "threads": threads, "layers": layers}
