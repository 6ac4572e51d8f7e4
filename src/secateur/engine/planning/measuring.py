"""From a network to its cost: what the table lacks is measured in the network, the rest is brought to today's pace."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

import numpy as np
from torch import nn

from secateur.core.errors import SecateurError
from secateur.core.patterns import Block, Pattern, parse_pattern
from secateur.engine.planning.checking import ENOUGH, FLOOR, checked, network_key, stated
from secateur.engine.planning.clocks import LEAST_ROUNDS, Timing, in_turn
from secateur.engine.planning.costs import NetworkCost
from secateur.engine.planning.curves import Curve
from secateur.engine.planning.engines import known_times
from secateur.engine.planning.operators import Layer
from secateur.engine.planning.shapes import Known, held_out
from secateur.engine.planning.table import CostTable, Machine, Point
from secateur.engine.planning.variants import DENSE, Choice, Variants, kept_units
from secateur.runtime.capture import Captured
from secateur.runtime.session import Session

__all__ = ["Rung", "forecast", "ladder", "missing_rungs"]

Rung = tuple[str, float]
LADDER = (0.7, 0.5, 0.3, 0.18, 0.1, 0.05, 0.02, 0.007)
BLOCK_LADDER = (0.7, 0.4, 0.2, 0.1, 0.04, 0.01)
UNKNOWN = 1.0  # the error stated where no forecast was ever held against the clock
AS_IS = "as it is"
UNSAVED = "what was measured is not remembered"
ANCHORS = (0.3, 0.1, 0.03)
FEWER_ANCHORS = (0.3, 0.05)  # of large networks, all of whose layers are known
LARGE = 10_000_000  # weights
ANCHOR_ROUNDS = 3
MEASURING, ANCHORING = 20.0, 2.0  # seconds of the clock for one network, at most about
CHECKS, MOST_CHECKS, CHECKING = 3, 20, 1 / 8  # of what was measured now: at least, at most, share of the seconds
MORE_CHECKS, MORE_CHECKING = 3, 0.3  # on a later occasion: at most, seconds
DENSE_ABOVE = 0.95  # share of weights that are not zero
TOGETHER = 4 << 30  # bytes of packed weights that are open at a time


def ladder(pattern: str) -> tuple[float, ...]:
    """Densities at which a pattern is measured: what an N:M pattern prescribes, else from 0.7 down."""
    made = parse_pattern(pattern)
    group = getattr(made, "m", 0)
    if group:
        return (getattr(made, "n", 0) / group,)
    return BLOCK_LADDER if isinstance(made, Block) else LADDER


def forecast(
    model: nn.Module,
    example: Any,
    threads: int | None,
    patterns: Sequence[str],
    measure: bool,
    cache: str | PathLike[str] | None,
    seconds: float = MEASURING,
    say: Callable[[str], None] = lambda text: None,
    stop: Callable[[], bool] = lambda: False,
    captured: Captured | None = None,
    again: bool = False,
) -> NetworkCost:
    """The cost of a network on the compiled core.

    Args:
        model: As for `network_cost`.
        example: As there.
        threads: As there.
        patterns: In words.
        measure: As there.
        cache: As there.
        seconds: Of the clock, at most about, for what is not known.
        say: Told what is being done.
        stop: Asked now and then whether to end with what is measured.
        captured: As for `network_cost`.
        again: Measure what is known anew; it is replaced when all is done.
    """
    table = CostTable.open(cache)
    variants = Variants(model, example, threads, captured)
    try:
        machine = Machine.here(variants.isa, variants.threads)
        missing = missing_rungs(CostTable(table.path) if again else table, machine, variants.layers, patterns)
        weights = sum(math.prod(layer.shape) for layer in variants.layers.values())
        anchors = FEWER_ANCHORS if weights >= LARGE and not missing else ANCHORS
        choices: dict[str, Choice] = {f"anchor {d:g}": _uniform(variants, patterns, d) for d in anchors}
        new = bool(measure and missing)
        if new:
            plans = _versions(variants, missing)
            say(f"{sum(map(len, missing.values()))} figures to measure, in {len(plans)} versions of the network")
            choices |= plans
        timings, job = _timed(variants, choices, seconds if new else min(seconds, ANCHORING), say, stop)
        count = _remember(table, machine, variants, choices, timings, job)
        network = network_key(model, example)
        cost = _cost(variants, table, machine, patterns, choices, timings, job)
        cost = replace(cost, network=network, measured=count)
        if again and not stop():
            table.outdate(machine, network)
        have = len(table.checks.get(str(machine), {}).get(network, []))
        more = 0 if weights >= LARGE or not measure else min(MORE_CHECKS, ENOUGH - have)
        many = (CHECKS, MOST_CHECKS, CHECKING * seconds) if new else (1, more, MORE_CHECKING)
        for told, measured in checked(variants, cost, have, *many, stop):
            table.check(machine, network, told, measured)
        cost = replace(cost, engines=known_times(table, network, variants.threads))
        return _told(cost, table, machine, _saved(table))
    finally:
        variants.close()


def missing_rungs(
    table: CostTable, machine: Machine, layers: Mapping[str, Layer], patterns: Sequence[str]
) -> dict[str, list[Rung]]:
    """What the table lacks of each layer that is not known whole: pattern and density."""
    found = {}
    for name, layer in layers.items():
        wanted = [(DENSE, 1.0)] + [(p, d) for p in patterns if _fits(p, layer.shape) for d in ladder(p)]
        lacking = [rung for rung in wanted if _word(rung[1]) not in table.lookup(machine, layer.key, rung[0])]
        if lacking:
            found[name] = lacking
    return found


def _word(density: float) -> str:
    return f"{density:g}"


def _fits(pattern: str, shape: tuple[int, ...]) -> bool:
    return not parse_pattern(pattern).why_not(shape)


def _uniform(variants: Variants, patterns: Sequence[str], density: float) -> Choice:
    """Every layer at one density, under the first pattern that fits it."""
    found: dict[str, Rung] = {}
    for name, layer in variants.layers.items():
        fitting = [p for p in patterns if _fits(p, layer.shape)]
        if fitting:
            found[name] = (fitting[0], ladder(fitting[0])[0] if len(ladder(fitting[0])) == 1 else density)
    return found


def _versions(variants: Variants, missing: Mapping[str, list[Rung]]) -> dict[str, Choice]:
    """Versions of the network in which every layer stands once on each of its rungs, all at about the same density.

    How long a layer takes depends on what its neighbours leave in the caches, and the layers of a plan have densities
    of one order. Layers of one kind share the work: each rung is then seen in two of them.
    """
    kinds: dict[str, list[str]] = {}
    for name in missing:
        kinds.setdefault(variants.layers[name].key, []).append(name)
    rungs = {key: sorted(missing[names[0]], key=lambda rung: -rung[1]) for key, names in kinds.items()}
    counts = {key: len({variants.layers[name].group for name in names}) for key, names in kinds.items()}
    needed = max(min(len(rungs[key]), math.ceil(2 * len(rungs[key]) / count)) for key, count in counts.items())
    places: dict[int, tuple[str, float]] = {}  # a group goes by the kind of its first layer, and by its turn in it
    for key, names in kinds.items():
        for turn, group in enumerate(dict.fromkeys(variants.layers[name].group for name in names)):
            places.setdefault(group, (key, turn / counts[key]))
    choices: dict[str, Choice] = {}
    for number in range(needed):
        chosen: dict[str, Rung] = {}
        for name, layer in variants.layers.items():
            key, turn = places.get(layer.group, ("", 0.0))
            ladder_of = rungs.get(key, [(DENSE, 1.0)])
            rung = ladder_of[int((number + turn) * len(ladder_of) / needed)]
            chosen[name] = rung if rung[0] == DENSE or _fits(rung[0], layer.shape) else (DENSE, 1.0)
        choices[f"version {number}"] = chosen
    return choices


def _timed(
    variants: Variants,
    choices: Mapping[str, Choice],
    seconds: float,
    say: Callable[[str], None],
    stop: Callable[[], bool],
) -> tuple[dict[str, Timing], float]:
    """All versions on the clock, as many at a time as memory holds; the network as it is takes part in each time."""
    timings: dict[str, Timing] = {}
    jobs: list[float] = []
    waiting = list(choices)
    while waiting and not (timings and stop()):
        with contextlib.ExitStack() as stack:
            opened: dict[str, Session] = {AS_IS: stack.enter_context(variants.as_it_is())}
            size = 0
            while waiting and (size < TOGETHER or len(opened) < 3):
                label = waiting.pop(0)
                session = stack.enter_context(variants.session(choices[label], len(waiting)))
                size += int(session.explain(variants.batch)["bytes"])
                opened[label] = session
            part = max(min(seconds, ANCHORING), seconds * len(opened) / (len(choices) + 1))
            began = time.perf_counter()
            least = LEAST_ROUNDS if any(label.startswith("version") for label in choices) else ANCHOR_ROUNDS
            found, job = in_turn(opened, variants.arrays, variants.sharing, AS_IS, part, stop, least)
            say(f"{len(opened)} versions timed in {time.perf_counter() - began:.1f} s")
        first = timings.get(AS_IS)
        pace = first.ms() / found[AS_IS].ms() if first is not None else 1.0
        timings |= {label: timing.times(pace) for label, timing in found.items() if label not in timings}
        jobs.append(job * pace)
    return timings, float(np.median(jobs))


def _remember(
    table: CostTable, machine: Machine, variants: Variants, choices: Mapping[str, Choice],
    timings: Mapping[str, Timing], job: float,
) -> int:  # fmt: skip
    """Put the figures of all versions into the table: the median over layers of one kind; how many those are."""
    seen: dict[tuple[str, str, float], list[tuple[Layer, float]]] = {}
    for label, chosen in choices.items():
        for name, (pattern, density) in chosen.items() if label.startswith("version") and label in timings else ():
            layer = variants.layers[name]
            seen.setdefault((layer.key, pattern, density), []).append((layer, timings[label].layer(name)))
    for (key, pattern, density), found in seen.items():
        layer = found[0][0]
        share = 1.0 if pattern == DENSE else _share(parse_pattern(pattern), layer.shape, density)
        ms = max(float(np.median([ms for _, ms in found])), 1e-6)
        table.add(machine, key, pattern, _word(density), Point(share, ms, job, layer.features))
    return len(seen)


def _share(pattern: Pattern, shape: tuple[int, ...], density: float) -> float:
    return kept_units(pattern, shape, density) * pattern.unit_size(shape) / math.prod(shape)


def _cost(
    variants: Variants, table: CostTable, machine: Machine, patterns: Sequence[str], choices: Mapping[str, Choice],
    timings: Mapping[str, Timing], job: float,
) -> NetworkCost:  # fmt: skip
    """Curves from the table, brought to the pace of the timings by one factor and what a call costs in itself."""
    now = timings[AS_IS]
    known = Known(table, machine)
    curves: dict[str, dict[str, Curve]] = {}
    dense: dict[str, float] = {}
    left: dict[str, str] = dict(variants.sharing.left)
    for name, layer in variants.layers.items():
        whole = known.dense(layer, job) or now.layer(name)
        fitting = [pattern for pattern in patterns if _fits(pattern, layer.shape)]
        made = {pattern: known.curve(layer, pattern, job, whole) for pattern in fitting}
        curves[name] = {pattern: curve for pattern, curve in made.items() if curve is not None}
        own = variants.density(name)
        sparse = next((curve.at(own) for curve in curves[name].values() if len(curve.densities) > 1), now.layer(name))
        dense[name] = whole if own > DENSE_ABOVE else sparse
        if not fitting:
            left[name] = f"its shape {layer.shape} takes none of the patterns {', '.join(patterns)}"
        elif not curves[name]:
            left[name] = "it was not measured, and no layer like it was; allow measuring, or run `secateur calibrate`"
    with_curve = {name: found for name, found in curves.items() if found}
    plain = NetworkCost(with_curve, dense, 0.0, 0.0)
    pairs = [(plain.now, now.ms())]
    whole = all(variants.density(name) > DENSE_ABOVE for name in variants.layers)
    for label, chosen in choices.items():
        if label in timings and (label.startswith("anchor") or label.startswith("version") and whole):
            told = {n: c for n, c in chosen.items() if n in with_curve and c[0] in with_curve[n]}
            pairs.append((plain.total(told), timings[label].ms()))
    factor, fixed = _line(pairs)
    scaled = {name: {p: curve.times(factor) for p, curve in by.items()} for name, by in with_curve.items()}
    spread = max(0.0, now.ms() - fixed) / max(sum(now.layer(name) for name in dense), 1e-12)
    return NetworkCost(
        scaled, {name: spread * now.layer(name) for name in dense}, fixed, 1.0, "secateur", variants.isa,
        variants.threads, variants.batch, left, factor,
    )  # fmt: skip


def _line(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Slope and height, neither below 0, of the line nearest to points in relative error."""
    x = np.array([[1.0 / b, a / b] for a, b in pairs])  # unknowns: height, slope
    best = np.linalg.lstsq(x, np.ones(len(pairs)), rcond=None)[0]
    height, slope = float(best[0]), float(best[1])
    if slope <= 0 or height < 0:
        ratios = [b / a for a, b in pairs if a > 0]
        return (float(np.exp(np.mean(np.log(ratios)))) if ratios else 1.0), 0.0
    return slope, height


def _saved(table: CostTable) -> list[str]:
    """Write the table; a folder that cannot be written is told, for all is measured anew next time."""
    try:
        table.save()
    except SecateurError as error:
        return [f"{UNSAVED}: {error}"]
    return []


def _told(cost: NetworkCost, table: CostTable, machine: Machine, unsaved: Sequence[str]) -> NetworkCost:
    """The forecast with its error, that of shapes held out for the layers not measured; and what is to be known."""
    guessed = [name for name, by in cost.layers.items() if any(c.source != "measured" for c in by.values())]
    share = sum(cost.dense[name] for name in guessed) / max(sum(cost.dense.values()), 1e-12)
    plans = stated(table, machine, cost.network, cost.now)
    shapes = held_out(table, machine).error if share or math.isnan(plans) else 0.0
    if math.isnan(plans):
        error = UNKNOWN if math.isnan(shapes) else max(FLOOR, shapes)
    else:
        error = plans if math.isnan(shapes) else max(plans, share * shapes)
    notes = [table.note] if table.note else []
    if guessed:
        notes.append(
            f"{len(guessed)} of {len(cost.layers)} layers were not measured; their curves are those of like shapes"
        )
    if cost.engines:
        times = ", ".join(f"{ms:.4g} ms in {name}" for name, ms in cost.engines.items())
        notes.append(f"as it is, a call takes {cost.now:.4g} ms in secateur, {times}")
    return replace(cost, error=error, notes=(*notes, *unsaved))
