"""``secateur prune`` in all its forms: the target that flags mean, and pruning what is pruned already."""

import json
import tomllib

import pytest
from safetensors.torch import load_file

from secateur.core.sockets import SOCKETS, Init, names
from secateur.engine.folder import Artefact

WEIGHTS = 64 * 16 + 16 * 12 + 12 * 10
EACH = {"fc1.weight": 64 * 16, "fc2.weight": 16 * 12, "head.weight": 12 * 10}


def zeros(folder):
    """Zeros among the weights of a run's last network, counted in the file."""
    state = load_file(Artefact.open(folder).folder / "weights.safetensors")
    return sum(int((state[name] == 0).sum()) for name in EACH)


def card(folder):
    return Artefact.open(folder).card


@pytest.mark.parametrize(
    ("words", "n", "m"),
    [
        (["--pattern", "nm"], 2, 4),
        (["--pattern", "nm", "-s", "pattern.n=1"], 1, 4),
        (["--to", "1:4"], 1, 4),
        (["--to", "1:4", "--pattern", "nm", "-s", "pattern.n=1"], 1, 4),
        (["--to", "sparsity 0.5", "--pattern", "nm"], 2, 4),
        (["--to", "params 50%", "--pattern", "nm"], 2, 4),
    ],
)
@pytest.mark.parametrize("epochs", [0, 1])
def test_n_of_m_once_and_step_by_step(call, dense, tmp_path, words, n, m, epochs):
    """Every way to ask for a pattern ends at its own density."""
    code, _, err = call("prune", dense, *words, "--epochs", epochs, "-o", tmp_path / "out")

    assert code == 0, err
    assert card(tmp_path / "out")["kept"] == WEIGHTS // m * n
    assert zeros(tmp_path / "out") == WEIGHTS - WEIGHTS // m * n


@pytest.mark.parametrize(
    ("words", "name"), [([], "dense-prune-sparsity-0.9"), (["--pattern", "nm"], "dense-prune-2-4")]
)
@pytest.mark.parametrize("epochs", [0, 1])
def test_a_target_left_out_is_the_usual_one(call, dense, words, name, epochs):
    """90 %, or the density of the pattern; the folder is named after it and the printed recipe spells it."""
    code, out, err = call("prune", dense, *words, "--epochs", epochs, "--print-config")
    assert code == 0, err
    step = tomllib.loads(out)["step"][0]
    if epochs:
        assert step["rules"][0]["sparsity"] == (0.5 if words else 0.9)
    else:
        assert step["to"] == ("2:4" if words else "sparsity 0.9")

    code, out, err = call("prune", dense, *words, "--epochs", epochs, "--dry-run", "--json")
    assert code == 0, err
    assert all(f"/{name}/" in row["folder"] for row in json.loads(out)["steps"])


@pytest.mark.parametrize("pattern", ["unit", "block", "nm", "unstructured"])
def test_pruning_what_is_pruned_already(call, dense, tmp_path, pattern):
    """After single weights any pattern: the card counts what is in the file, and no zero is lost."""
    assert call("prune", dense, "--to", "sparsity 0.6", "-o", tmp_path / "first")[0] == 0
    target = [] if pattern == "nm" else ["--to", "sparsity 0.8"]

    code, out, err = call(
        "prune", tmp_path / "first", "--pattern", pattern, *target, "-o", tmp_path / "second", "--json"
    )

    assert code == 0, err
    first, second = (Artefact.open(tmp_path / name).masks() for name in ("first", "second"))
    made = card(tmp_path / "second")
    assert (second - first).kept == 0
    assert made["kept"] == second.kept == WEIGHTS - zeros(tmp_path / "second")
    assert made["counts"] == {name: [second.counts()[name], size] for name, size in EACH.items()}
    covered = [name for name in EACH if not (pattern == "block" and EACH[name] == 120)]  # ten rows are not whole blocks
    kept, total = (sum(made["counts"][name][i] for name in covered) for i in (0, 1))
    wanted = total - total * 8 // 10
    if pattern == "unstructured":
        assert kept == wanted
    elif pattern != "nm":
        assert wanted - 64 <= kept <= wanted
    assert covered == list(EACH) or made["counts"]["head.weight"] == [first.counts()["head.weight"], 120]
    code, out, err = call("prune", tmp_path / "first", "--pattern", pattern, *target, "--dry-run", "--json")
    assert sum(kept for kept, _ in json.loads(out)["plan"]["counts"].values()) == made["kept"]


@pytest.mark.parametrize("allocation", ["lamp", "by-cost", "erk", "uniform", "global"])
def test_every_allocation_prunes_further(call, dense, tmp_path, allocation):
    assert call("prune", dense, "--to", "sparsity 0.6", "-o", tmp_path / "first")[0] == 0

    code, _, err = call(
        "prune", tmp_path / "first", "--to", "keep 100", "--allocation", allocation, "-o", tmp_path / "o"
    )

    assert code == 0, err
    assert card(tmp_path / "o")["kept"] == 100 and zeros(tmp_path / "o") == WEIGHTS - 100


def test_pruning_one_tensor_further_keeps_the_zeros_of_the_others(call, dense, tmp_path):
    """Also through the training that follows: the masks still cover them."""
    assert call("prune", dense, "--to", "sparsity 0.6", "-o", tmp_path / "first")[0] == 0
    words = ["--only", "fc1.weight", "--to", "keep 50", "-o", tmp_path / "second"]
    assert call("prune", tmp_path / "first", *words)[0] == 0

    code, _, err = call("train", tmp_path / "second", "--epochs", "1", "--lr", "0.05", "-o", tmp_path / "third")

    assert code == 0, err
    first, third = (Artefact.open(tmp_path / name).masks() for name in ("first", "third"))
    assert third.counts() == {**first.counts(), "fc1.weight": 50}
    assert zeros(tmp_path / "third") == WEIGHTS - third.kept


def test_a_socket_without_methods_is_not_listed(call, monkeypatch):
    """A socket that later releases fill shows no empty heading."""
    monkeypatch.setitem(SOCKETS, "inits", Init)
    assert names("inits") == []

    code, out, _ = call("methods")
    assert code == 0 and "criteria" in out and "inits" not in out
    code, out, _ = call("methods", "--json")
    assert code == 0 and "inits" not in json.loads(out)
