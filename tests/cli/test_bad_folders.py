"""Folders that cannot be written, or whose files are not those that were saved: one clear error, no half-made file."""

import errno
import json
import os
import pathlib
import tempfile

import pytest

from secateur.core.files import file_digest
from secateur.engine.folder import card_digest

TRAIN = ["train", "--net", "mlp", "--data", "digits", "--epochs", "1"]


def step(folder, verb="train"):
    """The folder of a run's step."""
    return next(p for p in folder.iterdir() if p.is_dir() and f"-{verb}-" in p.name)


def files(folder):
    """Every file below a folder with its bytes."""
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def refuse(*args, **kwargs):
    """What the system says of a folder that may only be read."""
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def test_a_folder_that_may_only_be_read(call, dense, tmp_path, monkeypatch):
    """The system refuses every new file: nothing is written, and the message names the place and the cure."""
    before = files(dense)
    monkeypatch.setattr(tempfile, "mkstemp", refuse)

    code, _, err = call("prune", dense, "-o", tmp_path / "out")

    assert code == 2, err
    assert "Permission denied" in err and "cannot write" in err and "-o" in err and "Traceback" not in err
    assert files(dense) == before and not files(tmp_path / "out")


def test_a_folder_that_cannot_be_made(call, dense, tmp_path, monkeypatch):
    before = files(dense)
    monkeypatch.setattr(pathlib.Path, "mkdir", refuse)

    code, _, err = call("prune", dense, "-o", tmp_path / "out")

    assert code == 2, err
    assert "Permission denied" in err and str(tmp_path / "out") in err and "Traceback" not in err
    assert files(dense) == before and not (tmp_path / "out").exists()


@pytest.fixture
def other(call, tmp_path):
    """A network of other widths."""
    words = [
        *TRAIN,
        "-s",
        "model.widths=[20, 8]",
        "-s",
        "data.train=100",
        "-s",
        "data.test=50",
        "-o",
        tmp_path / "other",
    ]
    assert call(*words)[0] == 0
    return tmp_path / "other"


def seal(folder):
    """Write the card anew over the files as they are now, as one who means it would."""
    card = json.loads((folder / "card.json").read_text())
    card["files"] = {name: file_digest(folder / name) for name in card["files"]}
    (folder / "card.json").write_text(json.dumps({**card, "digest": card_digest(card)}))


@pytest.mark.parametrize("verb", ["prune", "train", "measure", "doctor"])
def test_masks_of_another_network(call, dense, other, tmp_path, verb):
    """Masks swapped between two folders: caught by the card's digest, and, with a new card, by names and shapes."""
    one, two = step(dense) / "masks.safetensors", step(other) / "masks.safetensors"
    mine, theirs = one.read_bytes(), two.read_bytes()
    one.write_bytes(theirs)
    two.write_bytes(mine)
    words = [verb, dense] if verb == "doctor" else [verb, dense, "-o", tmp_path / "out"]

    code, _, err = call(*words)
    assert code == 2, err
    assert "masks.safetensors is not the file that was saved" in err or verb == "doctor"

    seal(step(dense))
    code, out, err = call(*words)
    assert code == 2, err
    assert "Traceback" not in err
    says = "belong to different networks" if verb == "doctor" else "`fc1.weight` has shape (16, 64), its mask (20, 64)"
    assert says in err + out
    assert not list((tmp_path / "out").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda path: path.write_text("{}"), "is missing or holds no readings"),
        (lambda path: path.unlink(), "is missing or holds no readings"),
        (lambda path: path.write_text(path.read_text().replace("accuracy", "accuracv")), "was changed after it was"),
    ],
    ids=["empty", "gone", "changed"],
)
def test_a_verdict_that_is_not_the_measured_one(call, dense, tmp_path, change, says):
    """The page is made of what is there, and says what is wrong with it."""
    out = tmp_path / "out"
    assert call("prune", dense, "-o", out)[0] == 0
    change(step(out, "measure") / "verdict.json")

    code, shown, err = call("report", out)

    assert code == 0, err
    assert f"{step(out, 'measure').name}/verdict.json {says}" in " ".join(shown.split())
    assert any(says in note for note in json.loads((out / "report.json").read_text())["notes"])
