"""Features in the plane: principal components, and t-SNE where scikit-learn is installed."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.core.errors import DataError
from secateur.core.streams import number
from secateur.data.images import require

FIT = 2000
"""Rows that principal components are fitted on, evenly spaced in the data."""
TSNE = 2000
"""Rows that t-SNE takes."""
FEWEST = 4
"""Rows below which there is nothing for t-SNE to arrange."""


class Plane(NamedTuple):
    """A projection to two dimensions.

    Args:
        centre: the mean, float64 ``(p,)``.
        axes: the two directions, ``(2, p)``, orthonormal; zero where the features have fewer dimensions.
        explained: share of the variance along each, ``(2,)``; zero for features that are all equal.
    """

    centre: Tensor
    axes: Tensor
    explained: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Coordinates ``(n, 2)`` of features ``(n, p)``, float64.

        Raises:
            DataError: when the features are of another width.
        """
        if x.shape[1] != self.axes.shape[1]:
            raise DataError(
                f"features of {x.shape[1]} numbers do not fit axes of {self.axes.shape[1]}: the networks have last "
                "layers of different widths. Look at each on its own axes."
            )
        return (x.to(self.centre) - self.centre) @ self.axes.T


def pca(x: Tensor) -> Plane:
    """The first two principal components of features ``(n, p)``.

    Of each direction the largest loading (of several the first) is positive, so that the same features always give
    the same picture. Of more than 2,000 rows, 2,000 evenly spaced ones are taken.

    Raises:
        DataError: when the features are not finite.

    Cost: O(n · p · m + m³) with m the smaller of n (at most 2,000) and p, in float64.
    """
    if not bool(x.isfinite().all()):
        raise DataError("the features hold NaN or infinity: they have no principal components.")
    rows = x[torch.linspace(0, len(x) - 1, min(FIT, len(x)), dtype=torch.float64).round().long()].double()
    centre = rows.mean(0)
    rows = rows - centre
    wide = rows.shape[1] > rows.shape[0]
    values, vectors = torch.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
    values, vectors = values.flip(0).clamp(min=0.0), vectors.flip(1)
    total = float(rows.square().sum())
    axes, explained = rows.new_zeros(2, rows.shape[1]), rows.new_zeros(2)
    for i in range(min(2, len(values))):
        if float(values[i]) <= 1e-12 * total:  # what rounding leaves of a direction without variance
            break
        axis = rows.T @ vectors[:, i] if wide else vectors[:, i]
        axis = axis / axis.norm()
        axes[i] = axis * axis[axis.abs().argmax()].sign()
        explained[i] = values[i] / total
    return Plane(centre, axes, explained)


def tsne(x: Tensor, seed: int) -> Tensor:
    """t-SNE (van der Maaten and Hinton 2008) of features ``(n, p)`` by scikit-learn, seeded; float64 ``(n, 2)``.

    It begins with the principal components; perplexity is the lesser of 30 and a third of n - 1. Distances between
    far groups mean nothing, and so do their sizes.

    Raises:
        UsageError: when scikit-learn is not installed.
        DataError: for fewer than 4 or more than 2,000 rows, features that are not finite, or all equal.

    Cost: some 10 seconds for 2,000 rows.
    """
    if not FEWEST <= len(x) <= TSNE:
        raise DataError(f"{len(x):,} examples: t-SNE is made of {FEWEST} to {TSNE:,}.")
    start = pca(x)(x)
    scale = float(start[:, 0].std(correction=0))
    if scale == 0:
        raise DataError("the features are all equal: there is nothing for t-SNE to arrange.")
    kind = require("sklearn.manifold", "t-SNE").TSNE
    made = kind(
        perplexity=min(30.0, (len(x) - 1) / 3), init=(start / scale * 1e-4).float().numpy(), learning_rate="auto",
        random_state=number(seed, "damage", "tsne") % 2**32, n_jobs=1,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numerical libraries, about themselves
        return torch.from_numpy(made.fit_transform(x.float().numpy())).double()
