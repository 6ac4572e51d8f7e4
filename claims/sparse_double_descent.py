"""Sparse double descent on LeNet-300-100: test error along a sweep of sparsities with 40 % of the labels wrong."""

from __future__ import annotations

import tempfile
from pathlib import Path

from claims._common import fresh
from claims.kit import Check, Claim, Figures, run
from secateur.data import Loader, load
from secateur.engine.recipe import TrainStep
from secateur.engine.studies.label_noise import Noise, corrupt
from secateur.engine.studies.rewind import Way
from secateur.engine.studies.sparse_double_descent import measure, phases, rank_correlation, sweep

TRAIN, RATE, EPOCHS, SHARE, ROUNDS = 4000, 0.4, 60, 0.3, 15
"""15 rounds of 30 % leave 0.47 %."""


def one(seed: int, data_dir: str | None) -> Figures:
    """Curves of test error, error on wrong labels and learning distance, with their peak and valley."""
    data = corrupt(load("mnist", data_dir).subset(train=TRAIN, seed=seed), Noise("symmetric", RATE), seed)
    step = TrainStep(epochs=EPOCHS, optimizer="adam", lr=1e-3, schedule="constant")
    way = Way(Loader(data.data.train, 128, shuffle=True, seed=seed), step, seed)
    with tempfile.TemporaryDirectory() as folder:
        levels = sweep(fresh("lenet_300_100", seed), way, Path(folder), rounds=ROUNDS, share=SHARE)
        points = [measure(level, data) for level in levels]
    errors = [point.test for point in points]
    found = phases(errors)
    return {
        "wrong labels, %": 100 * float(data.wrong.double().mean()),
        "error on wrong labels dense, %": points[0].noisy,
        "test error dense, %": errors[0],
        "test error at the peak, %": errors[found.peak],
        "density at the peak, %": 100 * points[found.peak].density,
        "error on wrong labels at the peak, %": points[found.peak].noisy,
        "test error at the valley, %": errors[found.valley],
        "density at the valley, %": 100 * points[found.valley].density,
        "error on wrong labels at the valley, %": points[found.valley].noisy,
        "test error at the end, %": errors[-1],
        "density at the end, %": 100 * points[-1].density,
        "rank correlation of distance and test error": rank_correlation([p.distance for p in points], errors),
        "densities": [point.density for point in points],
        "test errors": errors,
        "errors on wrong labels": [point.noisy for point in points],
        "learning distances": [point.distance for point in points],
    }


CLAIM = Claim(
    name="sparse_double_descent",
    title="With wrong labels, moderate pruning makes the test error worse and further pruning better than dense",
    paper="He, Xie, Zhu & Qin, Sparse Double Descent: Where Network Pruning Aggravates Overfitting, ICML 2022, "
    "arXiv:2206.08684",
    states="the test error is not monotone in sparsity for all criteria and retrainings tested, and the learning "
    "distance follows it (abstract). Here: 4,000 MNIST images, 40 % symmetric noise, LeNet-300-100 reset to its "
    "initial weights, 16 trainings of 60 epochs of Adam 1e-3, batch 128, constant rate, each round prunes 30 % of what "
    "is left over all layers; 10,000 clean test images, last step. Peak and valley are the ends of the deepest fall of "
    "the curve. Just under three minutes a seed on one core",
    one=one,
    checks=(
        Check(
            "every seed: test error falls by at least 8 points from the peak to the valley at a lower density",
            lambda rows: all(
                row["test error at the peak, %"] - row["test error at the valley, %"] >= 8
                and row["density at the peak, %"] > row["density at the valley, %"]
                for row in rows
            ),
        ),
        Check(
            "every seed: test error at the peak at least 2 points above that of the dense network",
            lambda rows: all(row["test error at the peak, %"] >= row["test error dense, %"] + 2 for row in rows),
        ),
        Check(
            "every seed: rank correlation of learning distance and test error above 0.5",
            lambda rows: all(row["rank correlation of distance and test error"] > 0.5 for row in rows),
        ),
        Check(
            "every seed: the dense network's error on the wrong labels is at most 1 %",
            lambda rows: all(row["error on wrong labels dense, %"] <= 1 for row in rows),
        ),
    ),
    minutes=9.0,
    data=("mnist",),
)

if __name__ == "__main__":
    run(CLAIM)
