"""Optimal Brain Surgeon on the MONK's problems: how few weights are left at the paper's accuracies."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from claims._surgery import Way, everything, fit, lowest, network, percent, surgeon, task_of
from claims.kit import Check, Claim, Figures, run
from secateur.core.task import Task
from secateur.criteria.magnitude import Magnitude
from secateur.criteria.obd import Obd
from secateur.data import Dataset, load


class Problem(NamedTuple):
    """A network of the paper, the accuracies it has to keep (per cent), and the weights that are asked for."""

    hidden: int
    train: float
    test: float
    most: int


PROBLEMS = {
    "monks1": Problem(3, 100.0, 100.0, 20),
    "monks2": Problem(2, 100.0, 100.0, 20),
    "monks3": Problem(2, 93.4, 97.2, 10),
}
DECAY = 1e-2
RESTARTS = 10
WAYS: dict[str, Way] = {"obs": surgeon(alpha=1e-4), "obd": lowest(Obd()), "magnitude": lowest(Magnitude())}
LEAST = 3


def trained(data: Dataset, problem: Problem, seed: int) -> list[Task]:
    """As many networks as there are restarts, those that training does not bring to the accuracy left out."""
    tasks: list[Task] = []
    restart = 0
    while len(tasks) < RESTARTS:
        task = task_of(network(17, problem.hidden, seed, restart), data.train.x, data.train.y)
        fit(task, everything(task.model), DECAY)
        if percent(task.model, data.train.x, data.train.y) >= problem.train:
            tasks.append(task)
        restart += 1
    return tasks


def smallest(dense: Task, data: Dataset, problem: Problem, way: Way, retrain: bool) -> int:
    """The fewest weights at which the accuracies hold while weights go one by one; the network's own size if none.

    Args:
        dense: the trained network; it is left as it is.
        data: training and test examples.
        problem: the accuracies.
        way: which weight goes.
        retrain: whether the survivors are trained when the training accuracy is lost; the walk ends when that does
            not bring it back.
    """
    task = task_of(copy.deepcopy(dense.model), data.train.x, data.train.y)
    masks = everything(task.model)
    best = masks.total
    while masks.kept > LEAST:
        masks = way(task, masks)
        right = percent(task.model, data.train.x, data.train.y)
        if retrain and right < problem.train:
            fit(task, masks, DECAY, steps=100)
            right = percent(task.model, data.train.x, data.train.y)
            if right < problem.train:
                break
        if right >= problem.train and percent(task.model, data.test.x, data.test.y) >= problem.test:
            best = masks.kept
    return best


def one(seed: int, data_dir: str | None) -> Figures:
    """The fewest weights of each restart, problem and way, with and without training in between."""
    figures: Figures = {}
    for name, problem in PROBLEMS.items():
        data = load(name, data_dir)
        tasks = trained(data, problem, seed)
        for way, cut in WAYS.items():
            for retrain in (False, True):
                counts = sorted(smallest(task, data, problem, cut, retrain) for task in tasks)
                key = f"{name}, {way}{', retrained' if retrain else ''}"
                figures[f"{key}: fewest weights"] = counts[0]
                figures[f"{key}: median"] = float(median(counts))
                figures[f"{key}: restarts with at most {problem.most}, %"] = 100 * small(counts, problem) / len(counts)
                figures[f"{key}: all restarts"] = counts
    return figures


def small(counts: Sequence[int], problem: Problem) -> int:
    """How many are small enough."""
    return sum(count <= problem.most for count in counts)


def share(rows: Sequence[Figures], name: str, way: str) -> float:
    """Restarts of all seeds with few enough weights, without training in between, in per cent."""
    key = f"{name}, {way}: restarts with at most {PROBLEMS[name].most}, %"
    return sum(row[key] for row in rows) / len(rows)


def _fewest(name: str) -> Check:
    problem = PROBLEMS[name]
    says = (
        f"{name}: OBS without retraining leaves at most {problem.most} weights at {problem.train:g} % of the training "
        f"and {problem.test:g} % of the test examples, in the best of {RESTARTS} restarts, for every seed"
    )
    return Check(says, lambda rows: all(row[f"{name}, obs: fewest weights"] <= problem.most for row in rows))


CLAIM = Claim(
    name="monks_obs",
    title="Optimal Brain Surgeon on the MONK's problems: few weights at full accuracy, without retraining",
    paper="Hassibi, Stork, Second order derivatives for network pruning: Optimal Brain Surgeon, NIPS 5, 1992",
    states="weights before and after, training and test accuracy: MONK-1 58 to 14, 100/100 %; MONK-2 39 to 15, "
    "100/100 %; MONK-3 39 to 4, 93.4/97.2 % (accuracies unverified). Here: the original examples, 17-3-1, 17-2-1 and "
    "17-2-1 sigmoid networks from 10 random beginnings for each of three seeds, L-BFGS with decay 0.01 |w|²/P; weights "
    "and biases go one by one, the curvature taken anew each time; the smallest network on the way that has both "
    "accuracies counts; retrained: the survivors are trained when the training accuracy is lost",
    one=one,
    checks=(
        *(_fewest(name) for name in PROBLEMS),
        Check("monks1: OBS leaves at most 20 in at least 60 % of restarts", lambda r: share(r, "monks1", "obs") >= 60),
        Check(
            "monks1: magnitude does so in less than half as many",
            lambda r: 2 * share(r, "monks1", "magnitude") < share(r, "monks1", "obs"),
        ),
        Check("monks1: OBD does so in none", lambda rows: share(rows, "monks1", "obd") == 0),
    ),
    minutes=3.0,
    data=("monks",),
    analysis="A few of OBD's restarts come down to 16 to 20 weights on MONK-1, so that the check for none fails, set "
    "after one run of 23 networks; its median is 27 to 32. Without retraining the order is the paper's on MONK-1 and "
    "MONK-2. On MONK-3 magnitude gets to 4 or 5 weights more often than OBS, and OBS to 4 in the best restarts only: "
    "the noisy training rows have to be given up for the test accuracy, and which of the walks passes through such a "
    "network is a matter of luck (39 stands for none). Training the survivors when they are stuck brings OBS to 4 "
    "weights in 6 of 10 restarts, and lets magnitude catch up on MONK-1 and pass on MONK-2 (median 15.5 to 16 against "
    "18), so that what OBS gains over magnitude is the training that it saves",
)


if __name__ == "__main__":
    run(CLAIM)
