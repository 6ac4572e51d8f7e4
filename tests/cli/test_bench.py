"""``secateur bench`` as a newcomer uses it."""

import json
from pathlib import Path

import pytest

from secateur.cli.main import main

NET = ["bench", "--net", "lenet_300_100", "--shape", "1,28,28", "--rounds", "1", "--seconds", "0.001"]


def test_a_network_by_name_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*NET, "--zeros", "0.9", "--batch", "1", "3", "--threads", "1", "--json", "--explain"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [line["batch"] for line in found] == [1, 3]
    for line in found:
        assert set(line["rounds"]) == {"torch", "secateur"}
        assert line["error"]["secateur"] < 1e-5
        assert line["ratio"]["torch"][0] > 0
        assert line["about"]["threads"] == 1
        assert any(row["op"] == "linear" for row in line["explain"])


def test_the_table_names_each_layer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*NET, "--explain"]) == 0
    out = capsys.readouterr().out
    assert "secateur is" in out and "plan file" in out and "zeros" in out


def test_paths_are_measured_on_request(capsys, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    assert main([*NET, "--batch", "3", "--measure-paths"]) == 0
    assert "secateur is" in capsys.readouterr().out
    assert (tmp_path / "paths.json").is_file()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["bench"], "give a run folder, or a network by --net"),
        (["bench", "--net", "resnet20"], "--shape"),
        ([*NET, "--zeros", "1.5"], "--zeros is 1.5"),
        ([*NET, "--batch", "0"], "--batch must be at least 1"),
        ([*NET, "--threads", "0"], "--threads is 0"),
        ([*NET, "--rounds", "0"], "--rounds is 0"),
        ([*NET, "--seconds", "0"], "--seconds is 0"),
        ([*NET, "--against", "tensorrt"], "known are onnxruntime and deepsparse"),
        ([*NET, "--against", "deepsparse"], "deepsparse=PYTHON"),
        ([*NET, "--isa", "z80"], "z80"),
        (["bench", "--net", "lenet_300_100", "--shape", "1,x,28"], "--shape"),
        (["bench", "--net", "lenet_300_100", "--shape", "1,0,28"], "--shape"),
        (["bench", "--net", "no_such_net", "--shape", "3"], "no_such_net"),
        (["bench", "no/such/folder"], "no/such/folder"),
        (["bench", "--net", "resnet20", "--shape", "3,32"], ""),
    ],
)
def test_mistakes_are_named(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert says in error and "Traceback" not in error


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
