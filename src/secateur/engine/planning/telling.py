"""From a choice to a plan: what is told of every layer, of the whole network, and of what else could be done."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from secateur.engine.planning.carrying import digest_of
from secateur.engine.planning.choosing import NANO, Choice, Market, Offer, Seller
from secateur.engine.planning.plans import Figure, LayerChoice, LayerPlan, Other
from secateur.engine.planning.table import Machine

if TYPE_CHECKING:
    from secateur.engine.planning.costs import NetworkCost
    from secateur.engine.planning.planner import Planner

__all__ = ["told"]


def told(planner: Planner, choice: Choice, measured: float | None) -> LayerPlan:
    """The plan of a choice.

    Args:
        planner: with its trial open; what is still to be measured is.
        choice: an offer of every tensor.
        measured: what was measured of it in the quantity of the target; None where that was counted or forecast.
    """
    how, total = planner.how, planner.rises.total(choice.chosen)
    scale = total.value / choice.loss if choice.loss > 0 else 0.0
    layers = tuple(_layer(planner, seller, choice, scale) for seller in planner.market.sellers)
    low, high = (None if rise is None else planner.loss + rise for rise in (total.low, total.high))
    figures = {**_figures(planner, choice), "loss": Figure(planner.loss, planner.loss + total.value, low, high)}
    if how.measure:
        figures = _measured(planner, choice, figures, measured)
    others = tuple(_others(planner, choice)) if how.compare else ()
    notes = tuple(dict.fromkeys([*planner.notes, *_extrapolated(planner, choice)]))
    return LayerPlan(
        str(planner.aim), tuple(how.patterns), layers, planner.left, figures, others, digest_of(planner.task.model),
        how.criterion, how.solver, how.inputs, None, choice.exact, _machine(planner.cost), notes,
    )  # fmt: skip


def _machine(cost: NetworkCost | None) -> dict[str, Any]:
    """Of which machine the milliseconds are."""
    if cost is None:
        return {}
    found = {name: getattr(cost, name) for name in ("engine", "isa", "threads", "batch")}
    return {**found, "name": str(Machine.here(cost.isa, cost.threads))}


def _figures(planner: Planner, choice: Choice) -> dict[str, Figure]:
    """What is forecast or counted."""
    found: dict[str, Figure] = {}
    if planner.cost is not None:
        ms, error = planner.offset("ms") + choice.cost("ms") / NANO, planner.cost.error
        now = planner.ms_now if planner.aim.quantity == "ms" else planner.cost.now
        found["ms"] = Figure(now, ms, ms * (1 - min(error, 1.0)), ms * (1 + error))
    spared = planner.market.now("bytes") - choice.cost("bytes")
    found["bytes"] = Figure(float(planner.bytes_now), float(planner.bytes_now - spared))
    for quantity in ("macs", "params"):
        found[quantity] = Figure(float(planner.market.now(quantity)), float(choice.cost(quantity)))
    return found


def _measured(
    planner: Planner, choice: Choice, figures: dict[str, Figure], measured: float | None
) -> dict[str, Figure]:
    """The figures with what was measured on the copy."""
    planner.carry(choice)
    quantity, trial = planner.aim.quantity, planner.trial
    found = {**figures, "loss": replace(figures["loss"], measured=trial.loss())}
    if quantity in ("ms", "bytes") and measured is not None:
        found[quantity] = replace(found[quantity], measured=measured)
    if planner.files and quantity != "bytes":
        size = next((size for tried, size in planner.sizes if tried is choice), None)
        size = size if size is not None else trial.bytes(planner.masks(choice))
        found["bytes"] = replace(found["bytes"], measured=float(size))
    if quantity == "accuracy":
        found["accuracy"] = Figure(planner.accuracy, None, measured=trial.accuracy())
    return found


def _layer(planner: Planner, seller: Seller, choice: Choice, scale: float) -> LayerChoice:
    """What becomes of one tensor, and why it stays as it is."""
    offer = choice.offers[seller.name]
    if choice.chosen:
        usual = "what it would save costs less loss elsewhere"
    elif planner.aim.resource:
        usual = "the target is met without it"
    else:
        usual = f"no choice that was found within {planner.aim} takes less"
    why = "" if offer.pattern else seller.never(planner.quantity) or usual
    before, after = _costs(seller.dense), _costs(offer)
    return LayerChoice(seller.name, seller.shape, offer.pattern, offer.kept, offer.loss * scale, before, after, why)


def _costs(offer: Offer) -> dict[str, float | int]:
    found: dict[str, float | int] = {"bytes": offer.bytes, "macs": offer.macs}
    return found if offer.ms is None else {"ms": offer.ms, **found}


def _extrapolated(planner: Planner, choice: Choice) -> list[str]:
    """That some tensors keep less than the forecast of the loss was taken at."""
    rises = planner.rises
    least = min(rises.densities)
    names = [n for n, (word, d) in choice.chosen.items() if d < least * 0.999 and word not in rises.fixed]
    if not names:
        return []
    few = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return [
        f"the forecast of the loss is extrapolated: {len(names)} of {len(choice.offers)} tensors keep less than "
        f"{least:.2%}, the least that it was taken at ({few})"
    ]


def _others(planner: Planner, choice: Choice) -> list[Other]:
    """What each pattern alone gives, chosen layer by layer and with the same density everywhere."""
    quantity, how, found = planner.quantity, planner.how, list[Other]()
    limit = choice.cost(quantity) if planner.aim.resource else 0
    for word in how.patterns:
        alone = planner.market.only((word,))
        if len(how.patterns) > 1:
            made = alone.best(quantity, limit) if planner.aim.resource else alone.cheapest(quantity, choice.loss)
            found.append(_other(planner, f"{word} alone", made, alone))
        if planner.aim.resource:
            even = alone.uniform(word, quantity, limit)
            found.append(_other(planner, f"{word} at the same density everywhere", even, alone))
    return found


def _other(planner: Planner, what: str, made: Choice | None, market: Market) -> Other:
    if made is None:
        return Other(what, False, planner.quantity, planner.figure(market.least(planner.quantity)))
    total = planner.rises.total(made.chosen)
    return Other(what, True, planner.quantity, planner.figure(made), total.value, total.low, total.high)
