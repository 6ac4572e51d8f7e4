"""Files are whole or absent: after any failure the old content is there and nothing else."""

import json
import os
import stat
import subprocess
import sys

import pytest
import torch

from secateur.core.errors import FileError
from secateur.core.files import file_digest, read_json, read_tensors, write_bytes, write_json, write_tensors, writing

FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from secateur.core.errors import FileError
from secateur.core.files import write_bytes, write_json, write_tensors
from secateur.core.masks import Masks

folder = Path(sys.argv[1])
writes = {
    "bytes": lambda path: write_bytes(path, bytes(100_000)),
    "json": lambda path: write_json(path, list(range(50_000))),
    "tensors": lambda path: write_tensors(path, {"w": torch.ones(100_000)}),
    "masks": lambda path: Masks({"w": torch.ones(1_000_000, dtype=torch.bool)}).save(path),
}
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))  # like a full disk
for name, write in writes.items():
    for path in (folder / name, folder / f"{name}.new"):
        try:
            write(path)
        except FileError as error:
            print(f"{path.name}: {error}")
"""


@pytest.fixture
def folder(tmp_path):
    """A folder that must hold nothing but what a test names."""
    return tmp_path / "files"


def test_a_full_disk_leaves_the_old_files_and_no_temporary_ones(folder):
    folder.mkdir()
    names = ["bytes", "json", "masks", "tensors"]
    for name in names:
        (folder / name).write_text(f"old {name}")

    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(folder)],
        capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sorted(line.partition(":")[0] for line in lines) == sorted([*names, *(f"{n}.new" for n in names)])
    assert all(
        "File too large. Nothing was changed there; free some space" in line and "`-o`" in line for line in lines
    )
    assert sorted(p.name for p in folder.iterdir()) == names
    assert all((folder / name).read_text() == f"old {name}" for name in names)


def test_a_failure_while_writing_leaves_the_old_file_and_no_temporary_one(folder):
    write_bytes(folder / "a", b"old")

    with pytest.raises(KeyboardInterrupt), writing(folder / "a") as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt

    assert (folder / "a").read_bytes() == b"old"
    assert [p.name for p in folder.iterdir()] == ["a"]


def test_the_new_content_takes_the_place_of_the_old_only_at_the_end(folder):
    write_bytes(folder / "a", b"old")

    with writing(folder / "a") as temporary:
        temporary.write_bytes(b"new")
        assert (folder / "a").read_bytes() == b"old"
        assert temporary.parent == folder, "a rename across disks would not be atomic"

    assert (folder / "a").read_bytes() == b"new"
    assert [p.name for p in folder.iterdir()] == ["a"]


def test_a_folder_that_cannot_be_written_is_one_clear_error(folder):
    folder.mkdir()
    (folder / "file").write_text("a file, not a folder")

    for path in (folder / "file" / "masks", folder / "file" / "deeper" / "masks"):
        with pytest.raises(FileError, match=r"cannot write .*masks: .*choose another folder with `-o`"):
            write_bytes(path, b"new")
    assert (folder / "file").read_text() == "a file, not a folder"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_one_clear_error(folder):
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(FileError, match="Permission denied"):
            write_bytes(folder / "a", b"new")
    finally:
        folder.chmod(stat.S_IRWXU)


def test_a_folder_in_the_place_of_the_file_is_one_clear_error(folder):
    (folder / "a").mkdir(parents=True)

    with pytest.raises(FileError, match="cannot write"):
        write_bytes(folder / "a", b"new")
    assert [p.name for p in folder.iterdir()] == ["a"]


def test_missing_folders_are_made_and_the_file_has_the_usual_rights(folder):
    write_bytes(folder / "b" / "c", b"new")
    (folder / "usual").write_bytes(b"")

    assert (folder / "b" / "c").stat().st_mode == (folder / "usual").stat().st_mode


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float64])
def test_tensors_come_back_bit_for_bit(folder, dtype):
    values = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).mul(10).to(dtype)
    tensors = {"w": values, "strided": values.T, "empty": values[:0], "one": values[0, 0], "tied": values}

    digest = write_tensors(folder / "t", tensors, {"made_by": "a test"})

    back, about = read_tensors(folder / "t")
    assert about == {"made_by": "a test"} and digest == file_digest(folder / "t")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], t) and back[name].dtype == dtype for name, t in tensors.items())


def test_equal_tensors_make_equal_files(folder):
    tensors = {"a": torch.ones(3), "b": torch.zeros(2)}

    assert write_tensors(folder / "one", tensors) == write_tensors(folder / "two", dict(reversed(tensors.items())))


@pytest.mark.parametrize("content", [b"", b"x", b"\xff" * 100, b'{"w": 1}', bytes(8)])
def test_a_file_that_is_no_safetensors_is_one_clear_error(folder, content):
    write_bytes(folder / "t", content)

    with pytest.raises(FileError, match=r"t is damaged or not a safetensors file .*restore a copy"):
        read_tensors(folder / "t")


def test_a_missing_file_says_what_is_there(folder):
    with pytest.raises(FileError, match="there is no folder"):
        read_tensors(folder / "weights.safetensors")
    write_bytes(folder / "weights.safetensors", b"")
    with pytest.raises(FileError, match=r"did you mean .*weights.safetensors\?"):
        read_tensors(folder / "weihgts.safetensors")
    with pytest.raises(FileError, match="holds weights.safetensors"):
        read_tensors(folder / "q")
    with pytest.raises(FileError, match="cannot read .*gone: No such file"):
        file_digest(folder / "gone")


def test_json_comes_back_and_damage_is_one_clear_error(folder):
    table = {"name": "Sécateur", "values": [1, 2.5, None, True]}

    write_json(folder / "card.json", table)

    assert read_json(folder / "card.json") == json.loads((folder / "card.json").read_text()) == table
    with pytest.raises(FileError, match="cannot read .*none.json: No such file"):
        read_json(folder / "none.json")
    for damaged in (b'{"name": ', b"\xff\xfe", b""):
        write_bytes(folder / "card.json", damaged)
        with pytest.raises(FileError, match="card.json is damaged: it is not JSON"):
            read_json(folder / "card.json")


def test_json_without_a_meaning_is_never_written(folder):
    write_json(folder / "card.json", {"fine": 1})

    with pytest.raises(ValueError, match="JSON"):
        write_json(folder / "card.json", {"loss": float("nan")})
    assert read_json(folder / "card.json") == {"fine": 1}
