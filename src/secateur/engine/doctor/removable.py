"""Units that certainly never make a difference, found on the network's graph."""

from __future__ import annotations

from secateur.core.errors import SecateurError
from secateur.engine.doctor.findings import Check, Finding, listed
from secateur.engine.doctor.norms import examples, network
from secateur.engine.doctor.subject import Subject, real, zeros
from secateur.surgery import analyse, dead_units


def _removable(subject: Subject) -> list[Finding]:
    """Counted where network and data are given and the network has zeros; a network that cannot be traced has none."""
    batches = examples(subject)
    if subject.net is None or batches is None or not any(zeros(t) for t in subject.weights().values()):
        return []
    if any(t.is_floating_point() and not bool(real(t).isfinite().all()) for t in subject.tensors.values()):
        return []
    net = network(subject)
    example = next(iter(batches))[0][:2]
    try:
        found = {group: units for group, units in dead_units(analyse(net, example), net, example).items() if units}
    except SecateurError:  # a network without a graph: nothing is certain of it
        return []
    count = sum(len(units) for units in found.values())
    if not count:
        return []
    return [Finding(
        "removable units", tuple(found),
        f"{count:,} units in {listed(tuple(found))} change nothing whatever comes in and can be removed", count,
        "in Python: `secateur.surgery.shrink_dead(model, example)`", severity="note",
    )]  # fmt: skip


CHECKS = {"removable": Check(_removable)}
