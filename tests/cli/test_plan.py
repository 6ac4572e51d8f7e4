"""``secateur plan`` and ``prune --plan`` in process: what is planned is what is done; mistakes are told at once."""

import json
import shutil
import tomllib

import pytest
import torch

from secateur.engine.folder import Artefact
from secateur.engine.planning.carrying import digest_of

QUICK = ["--threads", "1"]


@pytest.fixture(scope="module")
def planned(trained, tmp_path_factory):
    """A plan for the trained network, kept in a file."""
    from secateur.cli.main import main

    path = tmp_path_factory.mktemp("plans") / "plan.json"
    words = [
        "plan",
        str(trained),
        "--to",
        "params 30%",
        "--patterns",
        "unstructured,4x1",
        "--no-measure",
        "-o",
        str(path),
    ]
    assert main(words) == 0
    return path


def files(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_plan_changes_nothing_and_prints_every_layer(call, dense, tmp_path):
    before = files(dense)

    code, out, err = call("plan", dense, "--to", "macs 0.5x", "--patterns", "unstructured", "--patterns", "2:4", *QUICK)

    assert code == 0, err
    assert files(dense) == before and [p.name for p in tmp_path.iterdir()] == ["dense"]
    for word in ("fc1.weight", "fc2.weight", "head.weight", "macs: ", "loss: ", "2:4 alone", "bytes: "):
        assert word in out


def test_what_is_planned_is_what_is_done(call, dense, planned, tmp_path):
    """Counts, patterns and figures of the plan are those of the folder; the report shows forecast beside truth."""
    plan = json.loads(planned.read_text())

    code, out, err = call("prune", dense, "--plan", planned, "-o", tmp_path / "out")

    assert code == 0, err
    card, masks = Artefact.open(tmp_path / "out").card, Artefact.open(tmp_path / "out").masks()
    assert {la["name"]: la["kept"] for la in plan["layers"]} == masks.counts()
    assert card["target"] == "params 30%" and card["planned"]["figures"]["params"]["measured"] == masks.kept
    assert card["planned"]["figures"]["loss"]["forecast"] == plan["figures"]["loss"]["forecast"]
    assert f"  params 1,336 before, {masks.kept:,} planned, {masks.kept:,} measured" in err
    sections = json.loads((tmp_path / "out" / "report.json").read_text())["sections"]
    assert {"Plan and truth", "Plan and truth by layer"} <= {section["title"] for section in sections}
    again = call("prune", dense, "--plan", planned, "-o", tmp_path / "out")
    assert again[0] == 0 and "done before" in again[2]


def test_a_dry_run_writes_nothing_and_the_configuration_is_that_of_the_plan(call, dense, tmp_path):
    words = ["plan", dense, "--to", "macs 50%", "--patterns", "2:4,unstructured", "--examples", "60", "--no-measure"]
    words += ["--score", "snip", "-o", tmp_path / "plan.json", *QUICK]

    code, out, err = call(*words, "--dry-run")
    assert code == 0 and "fc1.weight" in out and "carry it out" not in out, err
    code, out, err = call(*words, "--print-config")
    asked = tomllib.loads(out)

    assert code == 0 and "step" not in asked and not (tmp_path / "plan.json").exists(), err
    assert (asked["plan"]["to"], asked["plan"]["patterns"]) == ("macs 0.5x", ["2:4", "unstructured"])
    assert asked["plan"]["criterion"]["use"] == "snip" and asked["plan"]["measure"] is False
    assert (asked["plan"]["examples"], asked["plan"]["threads"], asked["plan"]["least"]) == (60, 1, "ms")


def test_another_plan_in_the_same_file_is_another_step(call, dense, planned, tmp_path):
    copy = tmp_path / "plan.json"
    shutil.copy(planned, copy)
    keys = []
    for change in (lambda table: table, lambda table: {**table, "notes": ["other"]}):
        copy.write_text(json.dumps(change(json.loads(copy.read_text()))))
        code, out, err = call("prune", dense, "--plan", copy, "-o", tmp_path / "out", "--dry-run", "--json")
        assert code == 0, err
        shown = json.loads(out)
        keys.append(shown["steps"][0]["key"])
        assert shown["plan"]["counts"]["fc1.weight"][1] == 64 * 16
    assert keys[0] != keys[1] and not (tmp_path / "out").exists()


def test_channels_alone_go(call, dense, tmp_path):
    """The folder loads as the smaller network, with as few weights as were asked for."""
    path = tmp_path / "plan.json"
    words = ["--to", "params 50%", "--patterns", "channels", "--examples", "60", "--no-measure", *QUICK]
    code, _, err = call("plan", dense, *words, "-o", path)
    assert code == 0, err

    code, _, err = call("prune", dense, "--plan", path, "-s", "examples=60", "-o", tmp_path / "out")

    assert code == 0, err
    shapes = {name: tuple(p.shape) for name, p in Artefact.open(tmp_path / "out").build().named_parameters()}
    plan = json.loads(path.read_text())
    assert {la["name"]: tuple(la["shape"]) for la in plan["layers"]}.items() <= shapes.items()
    assert shapes["fc1.weight"][0] < 16


@pytest.mark.long
def test_channels_go_first_and_weights_after(call, dense, tmp_path):
    """One plan removes units and sets weights to zero; the folder loads as the smaller network."""
    path = tmp_path / "plan.json"
    words = ["--to", "params 15%", "--patterns", "channels,unstructured", "--examples", "100", "--no-measure"]
    code, _, err = call("plan", dense, *words, "-o", path)
    assert code == 0, err
    plan = json.loads(path.read_text())

    code, _, err = call("prune", dense, "--plan", path, "-s", "examples=100", "-o", tmp_path / "out")

    assert code == 0, err
    made = Artefact.open(tmp_path / "out")
    net = made.build()
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    assert {la["name"]: tuple(la["shape"]) for la in plan["layers"]}.items() <= shapes.items()
    if plan["removal"] is not None:
        assert made.card["shrunk"]["params"][1] < made.card["shrunk"]["params"][0]
    assert sum(la["kept"] for la in plan["layers"]) <= -(-(64 * 16 + 16 * 12 + 12 * 10) * 15 // 100)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "speed 3"], "'speed'"),
        (["--to", "ms -3"], "above 0"),
        (["--to", "latency 2x"], "share"),
        (["--to", "accuracy 0.5"], "accuracy -0.5"),
        (["--to", "params 10%", "--patterns", "unstructured,diagonal"], "'diagonal'"),
        (["--to", "params 10%", "--patterns", "depth", "--examples", "60"], "no residual block"),
        (["--to", "params 10%", "--patterns", "heads", "--examples", "60"], "channels"),
        (["--to", "params 10%", "--patterns", "4x1", "--solver", "sparsegpt"], "4x1"),
        (["--to", "params 10%", "--inputs", "dense"], "--solver"),
        (["--to", "params 10%", "--batch", "0"], "--batch is 0"),
        (["--to", "keep 1", "--examples", "60", "--no-measure"], "best reachable is"),
        (["--to", "params 10%", "-o", "."], "is a folder"),
        (["--to", "params 10%", "-o", f"{__file__}/plan.json"], "is no folder"),
        (["--to", "params 10%", "-s", "allocation=erk"], "`-s allocation=...` has no effect"),
        (["--to", "params 10%", "-s", "pattern=nm"], "use --patterns"),
        (["--to", "params 10%", "-s", "to=params 5%"], "use --to"),
        (["--to", "params 10%", "-s", "step.1.do=measure"], "a plan has no steps"),
        (["--to", "latency 0.5"], "latency 0.5x"),
        (["--to", "params 10%", "--examples", "60", "--batch", "61"], "fewer than a batch of 61"),
        (["--to", "params 10%", "--only", "nothing*", "--examples", "60"], "nothing*"),
    ],
)
def test_mistakes_are_told(call, dense, words, said):
    code, out, err = call("plan", dense, *words, *QUICK)

    assert code == 2 and out == "" and said in err and "Traceback" not in err


def test_plans_of_other_networks_and_damaged_ones_are_refused(call, dense, planned, tmp_path):
    """Nothing is pruned: not by a plan that was made for other weights, nor by one that is no plan."""
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**json.loads(planned.read_text()), "weights": "0" * 64}))
    broken = tmp_path / "broken.json"
    broken.write_text(planned.read_text()[:-40])

    for path, said in ((broken, "damaged"), (tmp_path / "none.json", "cannot read"), (other, "other weights")):
        code, out, err = call("prune", dense, "--plan", path, "-o", tmp_path / "out")
        assert code == 2 and said in err and "Traceback" not in err
        assert path == other or not (tmp_path / "out").exists()  # what is no plan at all leaves no folder
    for words, said in ((["--to", "params 5%"], "to has no effect"), (["--epochs", "2"], "--epochs"),
                        (["--criterion", "snip"], "criterion has no effect")):  # fmt: skip
        code, out, err = call("prune", dense, "--plan", planned, *words, "-o", tmp_path / "out")
        assert code == 2 and said in err
    weights = Artefact.open(dense).build()
    assert digest_of(weights) == json.loads(planned.read_text())["weights"] and torch.is_grad_enabled()


def test_the_old_verb_says_where_milliseconds_belong(call, dense):
    code, _, err = call("prune", dense, "--to", "ms 3.5")

    assert code == 2 and "secateur plan RUN --to 'ms 3.5'" in err
