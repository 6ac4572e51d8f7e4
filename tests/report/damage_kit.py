"""Runs with a damage report: the files of the measuring code for a toy network, or made up in their layout."""

import functools
import hashlib
import json

import numpy as np
from safetensors.numpy import load_file, save_file
from tests.engine.damage_kit import conv, images, pruned

from secateur.engine.damage import damage


def measured(run):
    """The folder of the run's measure step."""
    return next(path for path in run.iterdir() if "-measure-" in path.name)


def add_damage(run, names=None, others=(), count=60):
    """What `measure --damage` writes, of a small network on random images, beside the run's verdict."""
    _report(names, tuple(others), count).write(measured(run))
    return run


@functools.cache
def _report(names, others, count):
    net = conv()
    return damage(net, pruned(net, 0.5), images(count, names=names), others=[(n, pruned(net, 0.8)) for n in others])


def rewrite(run, change):
    """Change ``damage.json`` by a function of its table."""
    path = measured(run) / "damage.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(change(table) or table), encoding="utf-8")


def resample(run, change):
    """Change the samples by a function of their arrays; the digest follows."""
    path = measured(run) / "samples.safetensors"
    arrays = load_file(path)
    arrays = change(arrays) or arrays
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    rewrite(run, lambda table: {**table, "samples": {**table["samples"], "digest": digest}})


def made_up(n, networks=2, classes=10, side=28, channels=1, seed=0, pictures="strokes"):
    """Arrays of a sample set: clusters of points, and pictures of strokes or of noise."""
    g = np.random.default_rng(seed)
    targets = g.integers(classes, size=n)
    answers = np.where(g.random((networks, n)) < 0.9, targets, g.integers(classes, size=(networks, n)))
    middle = g.normal(size=(classes, 2)) * 5
    arrays = {"index": np.arange(n) * 3, "targets": targets, "predictions": answers}
    for name in ("pca", "pca_own", "tsne"):
        arrays[name] = (middle[targets] + g.normal(size=(networks, n, 2))).astype(np.float32)
    for name in ("confidence", "angle", "length", "margin"):
        arrays[name] = g.random((networks, n)).astype(np.float32)
    noise = g.integers(256, size=(n, side, side, channels)).astype(np.uint8)
    if pictures == "strokes":  # about as many grey pixels as a handwritten digit has
        rows, columns = np.mgrid[:side, :side]
        centre = g.uniform(0.35, 0.65, size=(n, 2, 1, 1)) * side
        far = np.hypot(rows - centre[:, 0], columns - centre[:, 1])
        ring = np.abs(far - g.uniform(0.15, 0.3, size=(n, 1, 1)) * side) < 1.8
        noise = np.where(ring[..., None], 128 + noise // 2, 0).astype(np.uint8)
    return {**arrays, "images": noise}
