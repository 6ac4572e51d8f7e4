import os

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from secateur.data import Dataset, Split, load
from secateur.data.cache import cached


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache folder of its own that does not yet exist."""
    place = tmp_path / "cache" / "deep"
    monkeypatch.setenv("SECATEUR_CACHE", str(place))
    return place


def made(value=0.0, validation=False):
    x, y = torch.arange(12.0).view(6, 2) + value, torch.tensor([0, 1, 0, 1, 0, 1])
    held = Split(x[:2], y[:2]) if validation else None
    return Dataset("t", Split(x, y), Split(x + 1, y), ("a", "ü"), "features", (0.5, 0.25), (1.0, 2.0), held, "a note")


def never():
    raise AssertionError("the cache was not used")


@pytest.mark.parametrize("validation", [False, True])
def test_the_second_load_is_equal_and_builds_nothing(folder, validation):
    first = cached("t", ["key"], lambda: made(validation=validation))
    second = cached("t", ["key"], never)
    assert first.digest == second.digest
    for field in ("name", "classes", "kind", "mean", "std", "note"):
        assert getattr(first, field) == getattr(second, field)
    assert (first.validation is None) == (second.validation is None)
    assert [torch.equal(a[1].x, b[1].x) for a, b in zip(first.splits(), second.splits(), strict=True)]
    assert len(list(folder.iterdir())) == 1


def test_another_key_or_name_is_another_file(folder):
    assert cached("t", ["one"], made).digest != cached("t", ["two"], lambda: made(2.0)).digest
    assert cached("u", ["one"], lambda: made(3.0)).digest not in (made().digest, made(2.0).digest)
    assert len(list(folder.iterdir())) == 3


def damage_nothing_left(file):
    file.write_bytes(b"")


def damage_cut(file):
    file.write_bytes(file.read_bytes()[:-5])


def damage_one_bit(file):
    whole = bytearray(file.read_bytes())
    whole[-3] ^= 1
    file.write_bytes(whole)


def damage_header(file):
    file.write_bytes(file.read_bytes().replace(b"digest", b"digset"))


def damage_noise(file):
    file.write_bytes(os.urandom(500))


@pytest.mark.parametrize("damage", [damage_nothing_left, damage_cut, damage_one_bit, damage_header, damage_noise])
def test_a_corrupt_file_is_built_anew(folder, damage):
    cached("t", ["key"], made)
    (file,) = folder.iterdir()
    damage(file)
    assert cached("t", ["key"], made).digest == made().digest
    assert cached("t", ["key"], never).digest == made().digest


def test_a_folder_that_cannot_be_written_is_passed_over(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "file" / "cache"))
    assert cached("t", ["key"], made).digest == made().digest
    assert (tmp_path / "file").read_text() == "in the way"


def test_the_cache_can_be_switched_off(folder):
    cached("t", ["key"], made, enabled=False)
    assert not folder.exists()
    load("digits", cache=False)
    assert not folder.exists()


def test_the_file_is_plain_safetensors_and_nothing_else_is_left_behind(folder):
    cached("odd name/with: signs", ["key"], made)
    (file,) = folder.iterdir()
    assert file.name.startswith("odd-name-with-signs-")
    with safe_open(file, framework="pt") as opened:
        assert set(opened.keys()) == {"train.x", "train.y", "test.x", "test.y"}


def test_a_changed_source_is_decoded_again(folder, tmp_path):
    for i in range(5):
        (tmp_path / "set" / "a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((3, 3), i, np.uint8)).save(tmp_path / "set" / "a" / f"{i}.png")
    first = load(tmp_path / "set")
    assert load(tmp_path / "set").digest == first.digest
    assert len(list(folder.iterdir())) == 1
    target = tmp_path / "set" / "a" / "0.png"
    Image.fromarray(np.full((3, 3), 99, np.uint8)).save(target)
    later = target.stat().st_mtime_ns + 10**9
    os.utime(target, ns=(later, later))
    changed = load(tmp_path / "set")
    assert changed.digest != first.digest
    assert 99 in torch.cat([changed.train.x, changed.test.x])
