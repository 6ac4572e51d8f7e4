"""Contract suites: what every criterion and every probe must do, checked on small networks.

For authors of methods: one line in a test file, ``check_criterion(MyScore())``. The first broken promise raises
:class:`ContractError` with the method, the promise, the network and the values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from secateur.core.masks import Masks
from secateur.core.names import Named, parameters
from secateur.core.reading import Reading
from secateur.core.sockets import Criterion, Probe
from secateur.core.streams import seed_global, stream
from secateur.core.task import Task
from secateur.testing.cases import HIDDEN, conv_bn, recut, relu_mlp, reorder, reordered, tied
from secateur.testing.promises import (
    ContractError,
    broken,
    call,
    case,
    check_form,
    check_refusals,
    chosen,
    compare,
    disturbed,
    expect,
    expecting,
    half_pruned,
    same_random_state,
    untouched,
)

__all__ = ["ContractError", "check_criterion", "check_probe"]

_NEEDS = frozenset({"data-free", "gradients", "activations", "hessian", "random"})
_EXACT = 1e-10
_ROUNDED = 1e-3


def check_criterion(
    criterion: Criterion, networks: Iterable[str] | None = None, device: torch.device | str = "cpu"
) -> None:
    """Check a criterion against the contract of all criteria; returns when it holds.

    Its form (a frozen dataclass, docstring with a *Cost*, paper, repr that rebuilds it); on every network: keys,
    shapes, finite and detached scores that share no memory with the weights; network, ``.grad``, flags, hooks,
    data and global random state untouched to the bit; the same scores twice, in training mode, for frozen
    parameters, for any cut into batches and any order of the examples, in float32 as in float64; finite scores in
    bfloat16 and for a pruned network; scores that follow their hidden channels when these change places; a
    ranking that a factor on the loss leaves alone. Then: a dead unit scores 0 where scores come from gradients,
    a tied tensor is scored once, untrained BatchNorm is left untrained, empty and spent data are refused (a
    data-free criterion works without). ``criterion.needs`` says which of these apply.

    Args:
        criterion: the instance to check.
        networks: names in :data:`secateur.testing.CASES`; all by default.
        device: where the networks live.

    Raises:
        ContractError: at the first promise broken.
        UsageError: for an unknown network.

    Cost: about a hundred calls on tiny networks, a few seconds.
    """
    check_form(criterion, Criterion)
    known = bool(criterion.needs) and criterion.needs <= _NEEDS
    found = f"needs is {set(criterion.needs)}; use some of {sorted(_NEEDS)}"
    expect(known, criterion, "declares its needs", "class", found)
    with same_random_state():
        for name in chosen(networks):
            for check in _ON_EACH_NETWORK:
                check(criterion, name, device)
        for check in _ONCE:
            check(criterion, device)


def check_probe(probe: Probe, networks: Iterable[str] | None = None, device: torch.device | str = "cpu") -> None:
    """Check a probe against the contract of all probes; returns when it holds.

    Its form, as for criteria; on every network, with and without masks: everything it was given and the global
    random state are untouched to the bit, the reading is finite, has a unit and survives JSON, and a second call
    gives the same reading (not asked of a probe that needs the ``"clock"``), whatever the training flags and the
    cut into batches. A probe that needs ``"random"`` gives an error with its value. Empty and spent data are
    refused unless it is ``"data-free"``.

    Args:
        probe: the instance to check.
        networks: names in :data:`secateur.testing.CASES`; all by default.
        device: where the networks live.

    Raises:
        ContractError: at the first promise broken.
        UsageError: for an unknown network.

    Cost: eight readings of each network.
    """
    check_form(probe, Probe)
    with same_random_state():
        for name in chosen(networks):
            for masks_of in (lambda _: None, lambda task: Masks.dense(task.model), half_pruned):
                task = case(name, device)
                _check_reading(probe, name, untouched(probe, name, disturbed(task), masks_of(task)))
            if "clock" not in probe.needs:
                _check_same_reading(probe, name, device)
        check_refusals(probe, device)


def _check_reading(probe: Probe, name: str, reading: Any) -> None:
    must = expecting(probe, name)
    must(isinstance(reading, Reading), "gives a Reading", f"it gave {type(reading).__name__}")
    must(math.isfinite(reading.value), "gives a finite value", f"value = {reading.value}")
    must(isinstance(reading.unit, str), "gives a unit", f"unit = {reading.unit!r}; a string, '' for a number")
    must(isinstance(reading.n, int) and reading.n >= 1, "counts what stands behind it", f"n = {reading.n!r}")
    if "random" in probe.needs:
        spread = reading.stderr if reading.stderr is not None else reading.low
        must(spread is not None, "gives an error with a random value", "neither stderr nor low and high are set")
    if reading.stderr is not None:
        must(reading.stderr >= 0, "gives a standard error of at least 0", f"stderr = {reading.stderr}")
    if reading.low is not None and reading.high is not None:
        inside = reading.low <= reading.value <= reading.high
        must(inside, "lies in its own interval", f"{reading.low}, {reading.value}, {reading.high}")
    try:
        back = Reading.from_json(json.loads(json.dumps(reading.to_json(), allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise broken(probe, "survives JSON", name, f"{type(error).__name__}: {error}") from error
    must(_alike(reading, back), "survives JSON", f"{reading} came back as {back}")


def _check_same_reading(probe: Probe, name: str, device: torch.device | str) -> None:
    first = call(probe, name, case(name, device))
    seed_global(1)
    second = call(probe, name, case(name, device))
    expect(_alike(first, second), probe, "gives the same twice", name, f"{first}, then {second}")
    training = call(probe, name, disturbed(case(name, device)))
    expect(_alike(first, training), probe, "ignores training flags", name, f"{first}, then {training}")
    if "random" not in probe.needs:
        cut = call(probe, name, recut(case(name, device), (1, 2, 3)))
        close = math.isclose(first.value, cut.value, rel_tol=1e-9, abs_tol=1e-12)
        expect(close, probe, "does not depend on the cut into batches", name, f"{first.value}, then {cut.value}")


def _check_scores(criterion: Criterion, name: str, device: torch.device | str) -> None:
    task = disturbed(case(name, device))
    masks = Masks.dense(task.model)
    _well_formed(criterion, name, task, masks, untouched(criterion, name, task, masks))
    first = next(iter(masks))
    one = Masks({first: masks[first]})
    _well_formed(criterion, f"{name}, `{first}` alone", task, one, call(criterion, name, task, one))
    pruned = case(name, device)
    masks = half_pruned(pruned)
    _well_formed(criterion, f"{name}, half pruned", pruned, masks, call(criterion, name, pruned, masks))


def _check_repeats(criterion: Criterion, name: str, device: torch.device | str) -> None:
    tolerance = 0.0 if torch.device(device).type == "cpu" else _EXACT  # other devices add up in any order
    task = case(name, device)
    first = _scores(criterion, name, task)
    seed_global(1)
    compare(criterion, "gives the same twice", name, first, _scores(criterion, name, task), tolerance)
    training = _scores(criterion, name, disturbed(case(name, device)))
    compare(criterion, "ignores training flags", name, first, training, tolerance)
    frozen = case(name, device)
    frozen.model.requires_grad_(False)
    scores = untouched(criterion, name, frozen, Masks.dense(frozen.model))
    compare(criterion, "scores frozen parameters", name, first, scores, tolerance)


def _check_batches(criterion: Criterion, name: str, device: torch.device | str) -> None:
    task = case(name, device)
    first = _scores(criterion, name, task)
    for cut in ((6,), (1, 2, 3)):
        scores = _scores(criterion, name, recut(task, cut))
        compare(criterion, "does not depend on the cut into batches", f"{name} in {cut}", first, scores, _EXACT)
    order = torch.tensor([3, 5, 0, 2, 4, 1])
    scores = _scores(criterion, name, recut(task, (4, 2), order))
    compare(criterion, "does not depend on the order of the examples", name, first, scores, _EXACT)


def _check_types(criterion: Criterion, name: str, device: torch.device | str) -> None:
    exact = _scores(criterion, name, case(name, device))
    single = _scores(criterion, name, case(name, device, torch.float32))
    compare(criterion, "agrees in float32 and float64", name, exact, single, _ROUNDED)
    task = case(name, device, torch.bfloat16)
    masks = Masks.dense(task.model)
    scores = untouched(criterion, name, task, masks)
    _well_formed(criterion, f"{name} in bfloat16", task, masks, scores)
    expect(any(bool(s.any()) for s in scores.values()), criterion, "works in bfloat16", name, "all scores are zero")


def _check_channels(criterion: Criterion, name: str, device: torch.device | str) -> None:
    if "random" in criterion.needs:
        return
    task, hidden = case(name, device), HIDDEN[name]
    order = torch.randperm(hidden.width, generator=stream(0, "contracts", name))
    expected = dict(_scores(criterion, name, task))
    for place, dim, blocks in hidden.places:
        if place in expected:
            expected[place] = reorder(expected[place], dim, blocks, order)
    scores = _scores(criterion, name, reordered(task, hidden, order))
    compare(criterion, "scores follow hidden channels that change places", name, expected, scores, _EXACT)


def _check_loss_scale(criterion: Criterion, name: str, device: torch.device | str) -> None:
    task = case(name, device)
    louder = Task(task.model, lambda output, target: 8 * task.loss(output, target), task.data)
    one, other = _joined(_scores(criterion, name, task)), _joined(_scores(criterion, name, louder))
    steps = other[torch.argsort(one, stable=True)].diff()
    worst = -steps.min().item()
    fine = worst <= _EXACT * max(other.abs().max().item(), 1e-300)
    found = f"two scores change order by {worst:.3g}"
    expect(fine, criterion, "ranks alike when the loss is multiplied by 8", name, found)


def _check_dead_unit(criterion: Criterion, device: torch.device | str) -> None:
    task = relu_mlp()
    with torch.no_grad():
        parameters(task.model)["0.bias"][2] = -1e3
    task.model.to(device)
    masks = Masks.dense(task.model)
    scores = call(criterion, "relu_mlp with a dead unit", task, masks)
    _well_formed(criterion, "relu_mlp with a dead unit", task, masks, scores)
    wanted = {"0.weight": scores["0.weight"][2]} if criterion.needs & {"gradients", "hessian"} else {}
    if not criterion.needs & {"data-free"}:
        wanted["3.weight"] = scores["3.weight"][:, 2]
    for name, score in wanted.items():
        where = f"its scores in `{name}` reach {score.abs().max().item():.3g}"
        expect(not bool(score.any()), criterion, "gives a dead unit the score 0", "relu_mlp", where)


def _check_tied(criterion: Criterion, device: torch.device | str) -> None:
    task = tied()
    task.model.to(device)
    masks = Masks.dense(task.model, only=["head.weight"])
    _well_formed(criterion, "tied, embedding and head", task, masks, untouched(criterion, "tied", task, masks))


def _check_untrained_norms(criterion: Criterion, device: torch.device | str) -> None:
    task = conv_bn(trained=False)
    task.model.to(device)
    masks = Masks.dense(task.model)
    name = "conv_bn, never trained"
    _well_formed(criterion, name, task, masks, untouched(criterion, name, disturbed(task), masks))


_ON_EACH_NETWORK: tuple[Callable[[Criterion, str, torch.device | str], None], ...] = (
    _check_scores,
    _check_repeats,
    _check_batches,
    _check_types,
    _check_channels,
    _check_loss_scale,
)
_ONCE: tuple[Callable[[Criterion, torch.device | str], None], ...] = (
    _check_dead_unit,
    _check_tied,
    _check_untrained_norms,
    check_refusals,
)


def _well_formed(criterion: Criterion, name: str, task: Task, masks: Masks, scores: Any) -> None:
    must = expecting(criterion, name)
    must(isinstance(scores, dict), "gives scores by name", f"it gave {type(scores).__name__}")
    must(set(scores) == set(masks), "scores the tensors of the masks", f"masks {list(masks)}, scores {list(scores)}")
    weights = parameters(task.model)
    memory = {p.untyped_storage().data_ptr(): key for key, p in weights.items()}
    for key, score in scores.items():
        must = expecting(criterion, f"{name}, `{key}`")
        real = isinstance(score, Tensor) and score.is_floating_point()
        must(real, "gives real numbers", f"it gave {getattr(score, 'dtype', type(score).__name__)}")
        shapes = f"weights {tuple(weights[key].shape)}, scores {tuple(score.shape)}"
        must(score.shape == weights[key].shape, "scores every weight", shapes)
        devices = f"weights on {weights[key].device}, scores on {score.device}"
        must(score.device == weights[key].device, "stays on the device", devices)
        must(not score.requires_grad, "gives detached scores", "they require a gradient; use .detach()")
        bad = int((~score.isfinite()).sum())
        must(bad == 0, "gives finite scores", f"{bad} of {score.numel()} are NaN or infinite")
        shared = memory.get(score.untyped_storage().data_ptr())
        must(shared is None, "gives scores of their own", f"they share memory with `{shared}`")


def _scores(criterion: Criterion, name: str, task: Task) -> Named:
    return call(criterion, name, task, Masks.dense(task.model))


def _joined(scores: Named) -> Tensor:
    return torch.cat([score.double().reshape(-1) for score in scores.values()])


def _alike(one: Any, other: Any) -> bool:
    """Equal, NaN included."""
    return isinstance(one, Reading) and isinstance(other, Reading) and one.to_json() == other.to_json()
