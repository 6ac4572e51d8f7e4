"""``prune --plan`` carries out what was planned: by the plan's examples; a class of the user's own is to be named."""

import json

import pytest

from secateur.engine.folder import Artefact

OWN = """
from dataclasses import dataclass

from secateur import Criterion, Paper


@dataclass(frozen=True)
class Mine(Criterion):
    paper = Paper("none: a test", "nobody", 2026, "", differs="in nothing known")
    needs = frozenset({"data-free"})

    def __call__(self, task, masks):
        return {name: weight.detach().abs() for name, weight in masks.match(task.model).items()}
"""


@pytest.mark.parametrize("words", [["channels"], ["unstructured", "--criterion", "snip"]], ids=["units", "weights"])
def test_the_examples_are_those_of_the_plan(call, dense, tmp_path, words):
    """The command that ``plan`` prints does what was planned, without naming the examples again."""
    path = tmp_path / "plan.json"
    asked = ["--to", "macs 75%", "--examples", "16", "--no-measure", "--threads", "1", "--patterns", *words]
    code, _, err = call("plan", dense, *asked, "-o", path)
    assert code == 0, err
    plan = json.loads(path.read_text())
    assert plan["data"]["examples"] == 16 and bool(plan["masks"]) == ("snip" in words)

    code, _, err = call("prune", dense, "--plan", path, "-o", tmp_path / "out")

    assert code == 0, err
    planned = Artefact.open(tmp_path / "out").card["planned"]
    assert planned["figures"]["loss"]["before"] == pytest.approx(plan["figures"]["loss"]["before"], abs=1e-6)
    assert planned["figures"]["loss"]["forecast"] == pytest.approx(plan["figures"]["loss"]["forecast"], abs=1e-6)
    assert planned["met"] is True and planned["notes"] == []
    assert "target macs 0.75x: met, " in err


def test_other_examples_are_told_of(call, dense, tmp_path):
    path = tmp_path / "plan.json"
    words = ["--to", "params 50%", "--criterion", "snip", "--examples", "16", "--no-measure", "--threads", "1"]
    assert call("plan", dense, *words, "-o", path)[0] == 0
    plan = json.loads(path.read_text())
    path.write_text(json.dumps({**plan, "data": {**plan["data"], "examples": 100}}))

    code, _, err = call("prune", dense, "--plan", path, "-o", tmp_path / "out")

    assert code == 0 and "the examples are not those that the plan was made with" in err
    assert "other weights go than were planned" in err


def test_a_class_of_the_user_is_named_again(call, dense, tmp_path, monkeypatch):
    """A file alone imports nothing; naming the class beside the plan does, and any other is refused."""
    import sys

    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_plan_methods.py").write_text(OWN)
    path = tmp_path / "plan.json"
    words = ["--to", "params 50%", "--criterion", "own_plan_methods:Mine", "--no-measure", "--threads", "1"]
    code, out, err = call("plan", dense, *words, "-o", path)
    assert code == 0, err
    assert out.rstrip().endswith(f"--plan {path} --criterion own_plan_methods:Mine")
    del sys.modules["own_plan_methods"]

    code, _, err = call("prune", dense, "--plan", path, "-o", tmp_path / "out")
    assert code == 2 and "--criterion own_plan_methods:Mine" in err and "own_plan_methods" not in sys.modules

    code, _, err = call("prune", dense, "--plan", path, "--criterion", "own_plan_methods:Mine", "-o", tmp_path / "out")
    assert code == 0, err

    table = {**json.loads(path.read_text()), "criterion": {"use": "magnitude"}}
    path.write_text(json.dumps(table))
    code, _, err = call(
        "prune", dense, "--plan", path, "--criterion", "own_plan_methods:Mine", "-o", tmp_path / "other"
    )
    assert code == 2 and "criterion has no effect with this plan" in err
    sys.modules.pop("own_plan_methods", None)
