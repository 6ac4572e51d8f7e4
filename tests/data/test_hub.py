"""Sets that come from the Hugging Face hub when no folder holds them; the hub's library is stood in for."""

import importlib.machinery
import io
import sys
import types

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from secateur.core.errors import DataError
from secateur.data import load

KIND = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CLASSES = [f"digit {i}" for i in range(10)]


def png(array):
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


class Features:
    """What the library tells of a set's columns."""

    def to_dict(self):
        return {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": CLASSES}}


class Part:
    """One part as the library gives it: an Arrow table behind ``with_format("arrow")[:]``."""

    def __init__(self, arrays, labels, mark):
        self.table = pa.table(
            {"image": pa.array([{"bytes": png(a), "path": None} for a in arrays], KIND), "label": labels}
        )
        self.features, self._fingerprint = Features(), mark

    def with_format(self, name):
        assert name == "arrow"
        return self

    def __getitem__(self, which):
        assert which == slice(None)
        return self.table


@pytest.fixture
def hub(monkeypatch):
    """A module ``datasets`` with a few pictures; it notes what is asked of it."""
    random = np.random.default_rng(0)
    arrays = {part: random.integers(0, 256, (n, 28, 28), dtype=np.uint8) for part, n in (("train", 12), ("test", 5))}
    labels = {"train": [i % 10 for i in range(12)], "test": [3, 1, 4, 1, 5]}
    module = types.ModuleType("datasets")
    module.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
    asked, mark = [], ["first"]

    def load_dataset(name, split):
        asked.append((name, split))
        return Part(arrays[split], labels[split], f"{mark[0]}-{split}")

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.delenv("SECATEUR_DATA", raising=False)
    return types.SimpleNamespace(module=module, arrays=arrays, labels=labels, asked=asked, mark=mark)


@pytest.mark.parametrize(("name", "repository"), [("mnist", "ylecun/mnist"), ("cifar10", "uoft-cs/cifar10")])
def test_a_set_that_no_folder_holds_is_fetched(hub, tmp_path, name, repository):
    """Byte for byte the pictures of the hub, with its class names, whether or not a data folder is named."""
    for place in (None, tmp_path):
        hub.asked.clear()

        data = load(name, place, cache=False)

        assert hub.asked == [(repository, "train"), (repository, "test")]
        for part, split in (("train", data.train), ("test", data.test)):
            assert np.array_equal(split.x[:, 0].numpy(), hub.arrays[part])
            assert split.y.tolist() == hub.labels[part]
        assert data.classes == tuple(CLASSES) and data.input_shape == (1, 28, 28)


def test_what_was_fetched_is_cached_by_its_fingerprint(hub, tmp_path, monkeypatch):
    """The same fingerprint: the decoded arrays are read again; another one: they are decoded anew."""
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    first = load("mnist")
    hub.arrays["train"] = 255 - hub.arrays["train"]

    assert load("mnist").digest == first.digest
    hub.mark[0] = "second"
    assert torch.equal(load("mnist").train.x, 255 - first.train.x)


def test_a_folder_with_one_part_only_is_no_set(hub, tmp_path):
    """Half a download must not be taken for the whole: the hub is asked."""
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "train.parquet").write_bytes(b"half")

    assert len(load("mnist", tmp_path, cache=False).train) == 12
    assert hub.asked


@pytest.mark.parametrize(
    "error", [ConnectionError("no route to host\nand a long tail"), FileNotFoundError("gone"), OSError()]
)
def test_a_failed_fetch_says_both_ways(hub, tmp_path, error):
    """The library's own words in one line, the folder that was looked in, and what to put there."""

    def fail(name, split):
        raise error

    hub.module.load_dataset = fail

    with pytest.raises(DataError) as caught:
        load("mnist", tmp_path)

    text = str(caught.value)
    assert "fetching 'ylecun/mnist' from the Hugging Face hub failed" in text and type(error).__name__ in text
    assert "and a long tail" not in text
    assert str(tmp_path / "mnist") in text and "mnist/train.parquet" in text and "SECATEUR_DATA" in text
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("name", ["monks1", "nettalk", "tinyshakespeare"])
def test_sets_of_text_files_are_not_asked_of_the_hub(hub, tmp_path, name):
    with pytest.raises(DataError, match="original text files, which are not fetched"):
        load(name, tmp_path)

    assert hub.asked == []
