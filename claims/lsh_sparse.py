"""Hash-routed constants on a rough target: narrower strips err less, and one constant beats sixteen ReLUs."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path

from claims.kit import Check, Claim, Figures, mean, run
from secateur.blocks.hashes import euclidean
from secateur.engine.recipe import TrainStep
from secateur.engine.studies.lsh_sparse import Bilinear, dense, routed

SIDE, TRAIN, TEST, HASHES = 8, 50_000, 10_000, 4
WIDTHS = (0.8, 0.4, 0.2, 0.1)


def one(seed: int, data_dir: str | None) -> Figures:
    """Mean squared errors of routed constants at four widths, and of dense networks of 16 and 64 units."""
    target = Bilinear.drawn(SIDE, seed)
    train, test = target.sample(TRAIN, seed), target.sample(TEST, seed, "test")
    figures: Figures = {"Lipschitz constant of the target": target.lipschitz}
    for width in WIDTHS:
        _, found = routed(train, test, euclidean(2, HASHES, width, seed, unit=True))
        figures[f"error at width {width:g}"] = found.error
        figures[f"buckets at width {width:g}"] = float(found.occupancy.buckets)
        figures[f"buckets of one example at width {width:g}, %"] = (
            100 * found.occupancy.singles / found.occupancy.buckets
        )
        figures["numbers read for an example, routed"] = float(found.active)
    step = TrainStep(epochs=30, optimizer="adam", lr=0.03, schedule="cosine")
    for units in (16, 64):
        with tempfile.TemporaryDirectory() as folder:
            _, reached = dense(train, test, units, step, 250, Path(folder), seed)
        figures[f"error dense {units} units"] = reached.error
        figures[f"numbers read for an example, dense {units} units"] = float(reached.active)
    return figures


CLAIM = Claim(
    name="lsh_sparse",
    title="Routing by hashes: one constant an example learns a rough target that a small dense network does not",
    paper="Baykal, Dikkala, Panigrahy, Rashtchian & Wang, A Theoretical View on Sparsely Activated Networks, "
    "NeurIPS 2022, arXiv:2208.04461",
    states="data-dependent sparse models beat dense networks with as many active units on random polynomials and "
    "hypercube targets (figures only, numbers and settings unverified). Here: bilinear interpolation of 8 x 8 "
    "uniform random values over [-1, 1]^2, 50,000 points without noise, 4 Euclidean hashes with directions of "
    "length 1, one constant (the mean) a bucket; dense networks have one hidden layer of ReLUs and 6,000 steps "
    "of Adam, with the best of three rates on the training points of another target; mean squared error on "
    "10,000 other points. A seed draws the target, the points, the hashes and the initial weights",
    one=one,
    checks=(
        Check(
            "mean error falls from width 0.8 to 0.4 to 0.2 to 0.1",
            lambda rows: all(
                mean(rows, f"error at width {b:g}") < mean(rows, f"error at width {a:g}") for a, b in pairwise(WIDTHS)
            ),
        ),
        Check(
            "mean error at width 0.1 less than half of that of the dense network of 16 units",
            lambda rows: mean(rows, "error at width 0.1") < mean(rows, "error dense 16 units") / 2,
        ),
    ),
    seeds=(0, 1, 2, 3, 4),
    minutes=1.0,
    analysis="Width closes part of the gap: the dense network of 64 units has a mean error of 0.013 against 0.006 of "
    "the constants at width 0.1, and in one of five seeds (0) it is the better one, 0.0078 against 0.0098. "
    "The narrowest strips give 1,400 buckets for 50,000 points, 5 % of them with a single one, so little of "
    "the fit is mere memory; what grows with accuracy is the table, not the 14 numbers that an example reads. "
    "In seed 0, where the error at width 0.1 is largest, the four directions lie within 43 degrees, so its "
    "buckets are fewer and longer than those of the other seeds.",
)

if __name__ == "__main__":
    run(CLAIM)
