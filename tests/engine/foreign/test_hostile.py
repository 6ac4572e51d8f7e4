"""Files that lie, or would run code, get one clear error: nothing runs, nothing hangs, memory is bounded."""

import os
import pathlib
import subprocess
import sys
import textwrap

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file
from tests.engine.foreign.hostile_kit import CASES, graph, hub, program, tensors, weight

from secateur.core.errors import FileError
from secateur.engine.foreign import read

KIT = pathlib.Path(__file__).with_name("hostile_kit.py")


@pytest.mark.parametrize("name", list(CASES))
def test_refused_with_one_clear_error(name, tmp_path):
    """The message is one line that names the file and what is wrong; code in the file has not run."""
    make, words = CASES[name]
    path = make(tmp_path)

    with pytest.raises(FileError, match=words) as caught:
        read(path)

    message = str(caught.value)
    assert len(message.splitlines()) == 1 and message.isprintable() and message.endswith((".", ")", "`", "?"))
    assert str(tmp_path) in message
    assert "TypeCheckError" not in message
    assert not (tmp_path / "it-ran").exists()


def test_the_code_in_these_files_does_run_elsewhere(tmp_path):
    """The marker means something: the plain unpickler leaves it."""
    path = CASES["code_in_the_old_format"][0](tmp_path)
    import pickle

    with open(path, "rb") as file:
        for _ in range(4):
            pickle.load(file)

    assert (tmp_path / "it-ran").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path):
    """The reason of the system is told."""
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").chmod(0)

    with pytest.raises(FileError, match="Permission denied"):
        read(tmp_path / "a.safetensors")


def test_memory_stays_bounded(tmp_path):
    """All of these files together, some of which claim petabytes, need less than 150 MB in a process of their own."""
    script = textwrap.dedent(
        """
        import importlib.util, pathlib, resource, sys
        import onnx, torch
        from secateur.core.errors import FileError
        from secateur.engine.foreign import read

        spec = importlib.util.spec_from_file_location("kit", sys.argv[1])
        kit = importlib.util.module_from_spec(spec)
        sys.modules["kit"] = kit
        spec.loader.exec_module(kit)
        made = []
        for name, (make, _) in kit.CASES.items():
            if name == "zip_bomb":
                continue  # making it takes what it claims
            folder = pathlib.Path(sys.argv[2]) / name
            folder.mkdir()
            made.append(make(folder))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for path in made:
            try:
                read(path)
            except FileError:
                continue
            raise SystemExit(f"{path} was read")
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        """
    )
    done = subprocess.run([sys.executable, "-c", script, str(KIT), str(tmp_path)], capture_output=True, text=True,
                          timeout=120)  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 150 * 1024


def valid(folder):
    """One small file of each kind."""
    state = {"a.weight": torch.arange(12.0).reshape(3, 4), "a.bias": torch.ones(3)}
    save_file(state, folder / "a.safetensors", {"format": "pt"})
    torch.save(state, folder / "new.pt")
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    graph(folder, [onnx.numpy_helper.from_array(t.numpy(), n) for n, t in state.items()])
    program(folder, {"w": weight([4], [1])}, [("a/data/weights/weight_0", bytes(16))])
    return [folder / name for name in ("a.safetensors", "new.pt", "old.pt", "a.onnx", "a.pt2")]


def test_damaged_anywhere(tmp_path):
    """Bytes changed, cut or repeated at random places: tensors or one error, never anything else."""
    draw = np.random.default_rng(11)
    refused = 0
    for path in valid(tmp_path):
        whole = path.read_bytes()
        for trial in range(120):
            content = bytearray(whole)
            for place in draw.integers(0, len(whole), 1 + trial % 4):
                content[place] = int(draw.choice([0, 255, 0x80, content[place] ^ (1 << int(draw.integers(8)))]))
            if trial % 3 == 0:
                del content[int(draw.integers(len(content))) :]
            if trial % 10 == 0:
                content += content[: int(draw.integers(len(content) + 1))]
            damaged = tmp_path / f"damaged{path.suffix}"
            damaged.write_bytes(content)
            try:
                read(damaged)
            except FileError as error:
                refused += 1
                assert "TypeCheckError" not in str(error)
    assert refused > 200


def test_what_is_made_by_hand_here_is_read_when_it_tells_the_truth(tmp_path):
    """The same makers give files that are accepted, so the refusals are not for another reason."""
    path = tensors(tmp_path, {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4))
    assert read(path).tensors["a"].tolist() == [0.0]
    for path in valid(tmp_path):
        assert read(path).tensors
    assert read(hub(tmp_path, {"a": torch.ones(1)}, {})).tensors["a"].tolist() == [1.0]
