"""What a compared method does with its budget of epochs: the steps of each kind, with numbers put in.

Methods that score a trained network train half of the epochs before and the rest after; those that score an untrained
one, and rules, train all epochs in a row. Tickets train half of them, are pruned and set back, and train the rest.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.core.errors import UsageError, nearest
from secateur.core.sockets import find, names

DENSE, SMALL, LAYERS = "dense", "small-dense", "magnitude-layer"

CONTROLS = ("magnitude", "random", SMALL)
"""Always in, whatever is listed, and so is the dense network."""

AT_START = ("grasp", "random", "snip", "synflow")
"""Criteria that are made for networks at their initialisation; all others score a trained one."""

UNITS = ("bn_scale", "flap", "fpgm", "minitron", "sosp_h", "sosp_i", "taylor_filter")
"""Criteria of whole units: they say nothing about single weights."""

ROUNDS = {"synflow": 20}
"""Criteria that are applied in so many rounds, each of which leaves the same share of the weights."""

TICKETS: dict[str, dict[str, str]] = {
    "lth": {},
    "lth-reinit": {"weights": "fresh"},
    "lth-shuffled": {"masks": "shuffled"},
}
"""Pruned as ``magnitude`` is, and set back: to the initial weights, to fresh ones, or with other places kept."""

REST = "$rest epochs"
"""The epochs that other train steps of a method leave."""

_WORD = re.compile(r"\$(?:(\d*\.?\d+) )?([a-z]+)")


@dataclass(frozen=True)
class Numbers:
    """What the words with a dollar sign stand for.

    Args:
        sparsity: pruned / prunable weights; None for a method whose options say it themselves.
        params: parameters that a network of this sparsity keeps, those that cannot be pruned included.
        epochs: the budget.
        seed: the seed of the run.
    """

    sparsity: float | None
    params: int
    epochs: int
    seed: int

    def of(self, word: str, share: str | None, where: str) -> Any:
        """The number behind one word.

        Raises:
            UsageError: for an unknown word, or a share of something other than epochs.
        """
        known: dict[str, Any] = {"params": self.params, "epochs": self.epochs, "seed": self.seed}
        if self.sparsity is not None:
            known |= {"sparsity": self.sparsity, "density": round(1 - self.sparsity, 12)}
        if word not in known:
            raise UsageError(f"{where}: `${word}` stands for nothing. {nearest(word, known)}")
        if share is None:
            return known[word]
        if word != "epochs":
            raise UsageError(f"{where}: `${share} {word}` is a share of {word}; only epochs are shared out.")
        return max(1, round(float(share) * self.epochs))


def fill(thing: Any, numbers: Numbers, where: str) -> Any:
    """The same nested values with numbers in the place of words; a text that is one word becomes its number.

    >>> fill({"to": "sparsity $sparsity", "epochs": "$0.5 epochs"}, Numbers(0.9, 100, 10, 0), "a")
    {'to': 'sparsity 0.9', 'epochs': 5}

    Raises:
        UsageError: for an unknown word.
    """
    if isinstance(thing, Mapping):
        return {key: fill(value, numbers, where) for key, value in thing.items()}
    if isinstance(thing, list | tuple):
        return [fill(value, numbers, where) for value in thing]
    if not isinstance(thing, str) or thing == REST:
        return thing
    whole = _WORD.fullmatch(thing)
    if whole:
        return numbers.of(whole[2], whole[1], where)
    return _WORD.sub(lambda found: str(numbers.of(found[2], found[1], where)), thing)


def takes_sparsity(thing: Any) -> bool:
    """Whether nested values ask for the sparsity of the comparison, in whatever form."""
    if isinstance(thing, Mapping):
        return any(takes_sparsity(value) for value in thing.values())
    if isinstance(thing, list | tuple):
        return any(takes_sparsity(value) for value in thing)
    words = _WORD.findall(thing) if isinstance(thing, str) else []
    return any(word in ("sparsity", "density", "params") for _, word in words)


def rules() -> list[str]:
    """Rules that take a sparsity."""
    return [name for name in names("rules") if "sparsity" in _fields("rules", name)]


def builtin() -> list[str]:
    """Names that can stand in ``methods``; a name that is both a rule and a criterion is the rule."""
    criteria = [name for name in names("criteria") if name not in UNITS]
    return sorted({*criteria, *rules(), *CONTROLS, *TICKETS, LAYERS, DENSE})


def check(name: str, own: Sequence[str]) -> None:
    """Refuse what cannot be compared by its name alone.

    Args:
        name: an entry of ``methods``.
        own: names of the ``[[method]]`` tables.

    Raises:
        UsageError: saying why, and what to write.
    """
    known = builtin()
    if name in known or name in own:
        return
    write = f'write a [[method]] with `name = "{name}"` and its steps'
    if ":" in name:
        raise UsageError(f"compare.methods: {name!r} comes from outside; {write.replace(name, 'mine')}.")
    if name in UNITS:
        raise UsageError(f"compare.methods: {name!r} scores whole units; {write}, for example a shrink step.")
    if name in names("rules"):
        raise UsageError(f"compare.methods: the rule {name!r} takes no sparsity; {write} and its own options.")
    raise UsageError(f"compare.methods: there is no method {name!r}. {nearest(name, [*known, *own])}")


def steps(name: str, numbers: Numbers, named: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The steps of a built-in method, without the options that all train steps share.

    Args:
        name: one of :func:`builtin`.
        numbers: sparsity, budget and seed.
        named: ``only`` and ``skip`` of the train steps, so that pruning covers the same tensors.
    """
    whole = {"do": "train", "epochs": numbers.epochs}
    if name == DENSE:
        return [whole]
    if name == SMALL:
        chance = {"use": "random", "seed": numbers.seed}
        return [{"do": "shrink", "to": f"params {numbers.params}", "criterion": chance, "scope": "group"}, whole]
    if name in names("rules"):
        return [{**whole, "rules": [{"use": name, "sparsity": numbers.sparsity}]}]
    if name in AT_START:
        criterion = {"use": name, **({"seed": numbers.seed} if name == "random" else {})}
        cuts = [{"do": "prune", "to": to, "criterion": criterion, "recover": "nothing", **named}
                for to in _targets(numbers, ROUNDS.get(name, 1))]  # fmt: skip
        return [*cuts, whole]
    first = numbers.epochs // 2
    prune: dict[str, Any] = {"do": "prune", "to": f"sparsity {numbers.sparsity!r}", **named}
    prune |= {"allocation": "uniform"} if name == LAYERS else {}
    score = "magnitude" if name == LAYERS or name in TICKETS else name
    prune["criterion"] = {"use": score, **({"seed": numbers.seed} if "seed" in _fields("criteria", score) else {})}
    back = [{"do": "rewind", **TICKETS[name]}] if name in TICKETS else []
    return [{**whole, "epochs": first}, prune, *back, {**whole, "epochs": numbers.epochs - first}]


def _targets(numbers: Numbers, rounds: int) -> list[str]:
    """Targets that leave the same share of the weights each; the last one is the sparsity itself."""
    sparsity = numbers.sparsity or 0.0
    ways = [f"params {100 * (1 - sparsity) ** (k / rounds):.10g}%" for k in range(1, rounds)]
    return [*ways, f"sparsity {sparsity!r}"]


def _fields(socket: str, name: str) -> set[str]:
    return {field.name for field in dataclasses.fields(find(socket, name))}
