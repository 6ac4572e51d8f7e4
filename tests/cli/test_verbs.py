"""The verbs, one after the other as a user types them; with --json, standard output is JSON and nothing else."""

import json
import shutil
import tomllib

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune as torch_prune

from secateur.cli.verbs import VERBS
from secateur.core.masks import Masks
from secateur.core.sockets import SOCKETS, names
from secateur.engine.folder import Artefact
from secateur.nets import build

WEIGHTS = 64 * 16 + 16 * 12 + 12 * 10
SMALL = ["-s", "model.widths=[16, 12]", "-s", "data.train=200", "-s", "data.test=100", "-s", "data.batch=50"]


def step(folder, verb):
    """The folder of a run's step."""
    return next(p for p in folder.iterdir() if p.is_dir() and f"-{verb}-" in p.name)


def files(folder):
    """Every file below a folder with its bytes."""
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def zeros(path):
    """Zeros among the weights (not biases) of a file."""
    return sum(int((t == 0).sum()) for name, t in load_file(path).items() if name.endswith("weight"))


@pytest.fixture
def pruned(call, dense, tmp_path):
    """The dense folder pruned once to a tenth."""
    out = tmp_path / "pruned"
    assert call("prune", dense, "--to", "sparsity 0.9", "-o", out)[0] == 0
    return out


KEPT = WEIGHTS - WEIGHTS * 9 // 10


def test_from_training_to_the_report_in_json(call, tmp_path):
    """Train, prune, measure, report: one JSON document each on standard output, all figures as on disk."""
    dense, cut = tmp_path / "dense", tmp_path / "cut"

    def ask(*words):
        code, out, err = call(*words, "--json")
        assert code == 0, err
        return json.loads(out)

    shown = ask("train", "--net", "mlp", "--data", "digits", "--epochs", "1", "--seed", "5", *SMALL, "-o", dense)
    assert shown["folder"] == str(dense)
    card = json.loads((step(dense, "train") / "card.json").read_text())
    assert card["seed"] == 5 and card["kept"] == card["total"] == WEIGHTS

    shown = ask("prune", dense, "--to", "params 10%", "--score", "random", "-s", "score.seed=3", "-o", cut)
    assert shown["folder"] == str(cut)
    card = json.loads((step(cut, "prune") / "card.json").read_text())
    assert (card["kept"], card["total"]) == (KEPT, WEIGHTS)
    assert zeros(step(cut, "prune") / "weights.safetensors") == WEIGHTS - KEPT
    recipe = tomllib.loads((step(cut, "prune") / "recipe.toml").read_text())
    assert recipe["step"][0]["criterion"] == {"use": "random", "seed": 3}
    assert recipe["model"]["load"] == str(dense)
    verdict = json.loads((step(cut, "measure") / "verdict.json").read_text())
    if "compiled accuracy" in verdict["pruned"]:  # where there is a compiled core
        same = ("value", "low", "high", "n")
        one, two = (verdict["pruned"][name] for name in ("accuracy", "compiled accuracy"))
        assert [one[key] for key in same] == [two[key] for key in same]
    assert verdict

    shown = ask("measure", cut, "--probe", "calibration", "-o", tmp_path / "measured")
    assert "calibration" in json.dumps(
        json.loads((step(tmp_path / "measured", "measure") / "verdict.json").read_text())
    )
    shown = ask("report", cut)
    assert shown == json.loads((cut / "report.json").read_text())
    assert (cut / "report.html").read_text().lstrip().lower().startswith("<!doctype html>")


def test_the_same_in_words(call, dense, tmp_path):
    """Without --json the result and the page's place are on standard output, progress on standard error."""
    code, out, err = call("prune", dense, "--to", "2:4", "--skip", "head*", "-o", tmp_path / "cut")
    assert code == 0, err
    assert "report.html" in out and "prune" in err and "kept" in err
    masks = Artefact.open(tmp_path / "cut").masks()
    assert set(masks) == {"fc1.weight", "fc2.weight"} and masks.sparsity == 0.5

    code, out, err = call("report", tmp_path / "cut", "-o", tmp_path / "page.html")
    assert code == 0 and "page.html" in out and (tmp_path / "page.html").is_file()


def test_methods_lists_every_method_and_shows_cards(call):
    """All sockets, all names; a card has the options with their defaults."""
    code, out, _ = call("methods", "--json")
    listed = json.loads(out)
    assert code == 0 and {s: list(m) for s, m in listed.items()} == {s: names(s) for s in SOCKETS}
    assert all(line for methods in listed.values() for line in methods.values())

    for name in (n for methods in listed.values() for n in methods):
        code, out, _ = call("methods", name, "--json")
        card = json.loads(out)
        assert code == 0 and card["name"] == name and card["about"] and card["paper"]["title"]
        code, out, _ = call("methods", name)
        assert code == 0 and card["paper"]["title"] in out and all(f["name"] in out for f in card["options"])
    code, out, _ = call("methods")
    assert code == 0 and all(name in out for methods in listed.values() for name in methods)


def test_doctor_tells_about_the_machine(call, tmp_path):
    code, out, _ = call("doctor", "--json", "--data-dir", tmp_path)
    facts = json.loads(out)
    assert code == 0 and facts["torch"] == torch.__version__ and facts["data digits"].startswith("1,")
    assert "not found" in facts["data mnist"]
    assert call("doctor", "--data-dir", tmp_path)[0] == 0


@pytest.mark.parametrize("verb", ["train", "prune", "gradual", "measure", "run"])
@pytest.mark.parametrize("as_json", [False, True])
def test_a_dry_run_writes_nothing(call, dense, tmp_path, verb, as_json):
    """Not a file anywhere, whatever the verb; the plan names every step and, for pruning, the exact counts."""
    (tmp_path / "r.toml").write_text("[model]\nuse = 'mlp'\n[data]\nuse = 'digits'\n[[step]]\ndo = 'train'\n")
    words = {
        "train": ["train", "--net", "mlp", "--data", "digits"],
        "prune": ["prune", dense, "--to", "sparsity 0.9"],
        "gradual": ["prune", dense, "--to", "sparsity 0.9", "--epochs", "2"],
        "measure": ["measure", dense],
        "run": ["run", tmp_path / "r.toml"],
    }[verb]
    before = files(tmp_path)

    code, out, err = call(*words, "--dry-run", "-o", tmp_path / "out", *(["--json"] if as_json else []))

    assert code == 0, err
    assert files(tmp_path) == before and not (tmp_path / "out").exists()
    if as_json:
        shown = json.loads(out)
        assert all(row["state"] == "to do" for row in shown["steps"])
        assert ("plan" in shown) == (verb == "prune")
        if verb == "prune":
            assert sum(kept for kept, _ in shown["plan"]["counts"].values()) == KEPT
    else:
        assert "to do" in out and "[[step]]" in out
        assert (f"{KEPT:,} of" in out) == (verb == "prune")


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--net", "mlp", "--data", "digits", "--epochs", "1", "--rule", "gradual", *SMALL],
        ["prune", "DENSE", "--to", "params 10%", "--criterion", "taylor", "-s", "examples=64"],
        [
            "prune",
            "DENSE",
            "--to",
            "sparsity 0.5",
            "--epochs",
            "1",
            "-s",
            "criterion.use=random",
            "-s",
            "data.train=100",
        ],
        ["measure", "DENSE", "--probe", "calibration"],
    ],
    ids=lambda words: " ".join(words[:5]),
)
def test_a_printed_recipe_is_one_that_run_takes(call, dense, tmp_path, words):
    """--print-config writes TOML with every default; running it makes the step folders the flags would make."""
    words = [str(dense) if word == "DENSE" else word for word in words]
    code, text, err = call(*words, "--print-config", "-o", tmp_path / "no")
    assert code == 0, err
    table = tomllib.loads(text)
    assert table["data"]["evaluation_batch"] == 500 and not (tmp_path / "no").exists()
    (tmp_path / "printed.toml").write_text(text)
    made = json.loads(call(*words, "--dry-run", "--json", "-o", tmp_path / "out")[1])["steps"]

    code, _, err = call("run", tmp_path / "printed.toml", "-o", tmp_path / "out")

    assert code == 0, err
    assert all((tmp_path / "out" / row["folder"].rpartition("/")[2] / "card.json").is_file() for row in made)


def test_settings_reach_the_recipe(call, dense, tmp_path):
    """Bare keys belong to the first step, others to the section they name; numbers count steps and rules from 1."""
    words = ["train", "--net", "mlp", "--data", "digits", "--rule", "gradual", "--rule", "distill", "-s", "lr=0.3",
             "-s", "rules.1.sparsity=0.5", "-s", "rules.1.criterion.use=random", "-s", "rules.2.alpha=0.5",
             "-s", "data.batch=17", "-s", "model.activation=tanh", "-s", "seed=9", "-s", "step.1.epochs=4"]  # fmt: skip
    table = tomllib.loads(call(*words, "--print-config")[1])

    assert (table["seed"], table["data"]["batch"], table["model"]["activation"]) == (9, 17, "tanh")
    made = table["step"][0]
    assert (made["lr"], made["epochs"], made["rules"][0]["sparsity"], made["rules"][1]["alpha"]) == (0.3, 4, 0.5, 0.5)
    assert made["rules"][0]["criterion"]["use"] == "random"

    table = tomllib.loads(call("prune", dense, "-s", "score=taylor", "-s", "to=keep 99", "-s", "step.2.baselines=[]",
                               "--print-config")[1])  # fmt: skip
    assert table["step"][0]["criterion"] == {"use": "taylor"} and table["step"][0]["to"] == "keep 99"
    assert table["step"][1]["baselines"] == [] and table["data"]["train"] == 200


@pytest.mark.parametrize("epochs", ["0", "1"])
@pytest.mark.parametrize("key", ["score.seed", "criterion.seed"])
def test_a_score_is_a_criterion_once_and_while_training(call, dense, epochs, key):
    """``-s score.seed=3`` reaches the criterion, wherever the flags put it."""
    words = ["prune", dense, "--epochs", epochs, "--score", "random", "-s", f"{key}=3", "--print-config"]
    code, out, err = call(*words)

    assert code == 0, err
    first = tomllib.loads(out)["step"][0]
    place = first["rules"][0] if epochs == "1" else first
    assert place["criterion"] == {"use": "random", "seed": 3}


def test_training_onward_keeps_the_zeros(call, pruned, tmp_path):
    """From a pruned folder, any optimizer: the same masks, zeros at the end, other weights have moved."""
    before = Artefact.open(pruned)

    for optimizer in ("sgd", "adam"):
        out = tmp_path / optimizer
        code, _, err = call("train", pruned, "--epochs", "1", "--lr", "0.01", "-s", f"optimizer={optimizer}", "-o", out)
        assert code == 0, err
        after = Artefact.open(out)
        assert after.masks() == before.masks()
        assert zeros(after.folder / "weights.safetensors") == WEIGHTS - KEPT
        assert not torch.equal(after.state()["fc1.weight"], before.state()["fc1.weight"])
        assert after.card["parent"]["digest"] == before.digest


def test_pruning_step_by_step_ends_at_the_target(call, dense, tmp_path):
    """With --epochs the same count is reached while training; metrics show it falling."""
    code, _, err = call("prune", dense, "--to", "params 10%", "--epochs", "2", "--lr", "0.05", "-o", tmp_path / "out")

    assert code == 0, err
    assert Artefact.open(tmp_path / "out").masks().kept == KEPT
    folder = step(tmp_path / "out", "train")
    kept = [json.loads(line)["kept"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert kept == sorted(kept, reverse=True) and kept[-1] == KEPT


def test_zeros_of_a_plain_file_are_taken_as_pruned(call, pruned, tmp_path):
    """A safetensors file without masks: its zeros stay zero through training, and that is said."""
    shutil.copy(Artefact.open(pruned).folder / "weights.safetensors", tmp_path / "plain.safetensors")
    out = tmp_path / "onward"

    code, _, err = call("train", tmp_path / "plain.safetensors", "--net", "mlp", "--data", "digits", "--epochs", "1",
                        *SMALL, "-o", out)  # fmt: skip

    assert code == 0, err
    assert "taken as pruned" in " ".join(err.split())
    assert Artefact.open(out).masks() == Artefact.open(pruned).masks()
    assert zeros(Artefact.open(out).folder / "weights.safetensors") == WEIGHTS - KEPT


def spoiled(path, change):
    """A copy of weights with something wrong in it."""
    state = load_file(path)
    change(state)
    save_file(state, path.parent / "spoiled.safetensors")
    return path.parent / "spoiled.safetensors"


def set_entry(value):
    """Puts a value into the first weight."""

    def change(state):
        state["fc1.weight"][0, :2] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (set_entry(float("nan")), "`fc1.weight`: 2 of 1,024 values are NaN or infinite"),
        (set_entry(float("-inf")), "`fc1.weight`: 2 of 1,024 values are NaN or infinite"),
        (set_entry(1e-40), "`fc1.weight`: 2 values are subnormal"),
    ],
    ids=["nan", "inf", "subnormal"],
)
def test_doctor_finds_values_that_are_wrong(call, dense, change, says):
    """Exit code 2, the tensor, the count and the cure; JSON says the same."""
    path = spoiled(Artefact.open(dense).folder / "weights.safetensors", change)

    code, out, _ = call("doctor", path)
    assert code == 2 and says in out and "do: " in out
    code, out, _ = call("doctor", path, "--json")
    assert code == 2 and [f["what"] for f in json.loads(out)["findings"]] == [next(
        f["what"] for f in json.loads(out)["findings"] if says in f["what"])]  # fmt: skip


def test_doctor_finds_leftovers_of_torch_prune(call, tmp_path):
    """In a file of ``torch.save`` and in safetensors; after ``prune.remove`` nothing is wrong any more."""
    net = build("mlp", (1, 8, 8), 10, widths=(16, 12))
    torch_prune.l1_unstructured(net.fc1, "weight", amount=0.5)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    torch.save({"epoch": 3, "state_dict": net.state_dict()}, tmp_path / "checkpoint.pt")
    save_file(net.state_dict(), tmp_path / "net.safetensors")

    for name in ("net.pt", "checkpoint.pt", "net.safetensors"):
        code, out, err = call("doctor", tmp_path / name)
        assert code == 2, err
        assert "`fc1.weight_orig`" in out and "prune.remove(module, 'weight')" in out

    torch_prune.remove(net.fc1, "weight")
    torch.save(net.state_dict(), tmp_path / "net.pt")
    code, out, _ = call("doctor", tmp_path / "net.pt", "--json")
    rows = {row["name"]: row for row in json.loads(out)["tensors"]}
    assert code == 0 and json.loads(out)["findings"] == [] and rows["fc1.weight"]["zeros"] == 512


def test_doctor_finds_pruned_weights_that_came_back(call, pruned, tmp_path):
    """Weights beside the masks they no longer agree with: counted by tensor."""
    folder = Artefact.open(pruned).folder
    mask = Masks.load(folder / "masks.safetensors")["fc1.weight"]
    state = load_file(folder / "weights.safetensors")
    state["fc1.weight"][~mask] = torch.eye(1, int((~mask).sum()))[0] * 0.5
    (tmp_path / "pair").mkdir()
    shutil.copy(folder / "masks.safetensors", tmp_path / "pair")
    save_file(state, tmp_path / "pair" / "weights.safetensors")

    code, out, _ = call("doctor", tmp_path / "pair" / "weights.safetensors")
    assert code == 2 and f"1 of {int((~mask).sum()):,} pruned weights of `fc1.weight` are not zero" in out

    del state["fc1.weight"]
    save_file(state, tmp_path / "pair" / "weights.safetensors")
    code, out, _ = call("doctor", tmp_path / "pair" / "weights.safetensors", "--json")
    assert code == 2 and "which the weights do not hold" in json.loads(out)["findings"][0]["what"]


def test_doctor_is_content_with_a_clean_folder(call, dense, pruned):
    """Run folder, step folder and file; zeros are counted by tensor."""
    for folder, gone in ((dense, 0), (pruned, WEIGHTS - KEPT)):
        for path in (folder, Artefact.open(folder).folder, Artefact.open(folder).folder / "weights.safetensors"):
            code, out, _ = call("doctor", path, "--json")
            found = json.loads(out)
            assert code == 0 and found["findings"] == [] and found["masked"]
            assert sum(row["zeros"] for row in found["tensors"] if row["name"].endswith("weight")) == gone
        code, out, _ = call("doctor", folder)
        assert code == 0 and "nothing is wrong with it" in out


def test_doctor_does_not_take_a_pickle_for_a_state_dict(call, tmp_path):
    """A whole module saved by ``torch.save`` is refused without running code from it."""
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")

    code, _, err = call("doctor", tmp_path / "module.pt")

    assert code == 2 and "state_dict" in err and "Traceback" not in err


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_has_help(call, verb, capsys):
    """--help ends well and shows every flag."""
    with pytest.raises(SystemExit) as ended:
        call(verb, "--help")
    assert ended.value.code == 0
    assert "--json" in capsys.readouterr().out
