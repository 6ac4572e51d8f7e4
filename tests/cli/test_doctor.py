"""``secateur doctor``: what a user types and sees."""

import json
import os
import re
import shlex

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune as torch_prune

from secateur.cli.main import main, parser
from secateur.core.files import file_digest
from secateur.engine.folder import Artefact, card_digest
from secateur.nets import build

NORMED = ["-s", "model.widths=[16, 12]", "-s", "model.batch_norm=true"]


def leftovers(path):
    """A file of torch.save that holds what torch.nn.utils.prune leaves."""
    torch.manual_seed(0)
    net = build("mlp", (1, 8, 8), 10, widths=(16, 12))
    torch_prune.l1_unstructured(net.fc1, "weight", amount=0.5)
    torch.save({"model": net.state_dict(), "epoch": 1}, path)
    torch_prune.remove(net.fc1, "weight")
    return net.state_dict()


def test_find_mend_and_find_nothing(call, tmp_path):
    """Exit code 2 with findings, 0 with a copy that has none, 0 of the copy itself; the original stays."""
    good = leftovers(tmp_path / "c.pt")
    before = (tmp_path / "c.pt").read_bytes()

    code, out, _ = call("doctor", tmp_path / "c.pt")
    assert code == 2 and "1 of 1 can be mended in a copy: add `--fix OUT`" in out
    code, out, _ = call("doctor", tmp_path / "c.pt", "--fix", tmp_path / "d.pt")
    assert code == 0 and "1 mended, 0 remain" in out
    code, out, _ = call("doctor", tmp_path / "d.pt")
    assert code == 0 and "nothing is wrong with it" in out

    assert (tmp_path / "c.pt").read_bytes() == before
    mended = torch.load(tmp_path / "d.pt", weights_only=True)["model"]
    assert all(torch.equal(mended[name], tensor) for name, tensor in good.items())


def test_what_cannot_be_mended_keeps_exit_code_2(call, tmp_path):
    good = {n: t.clone() for n, t in leftovers(tmp_path / "c.pt").items()}
    good["fc2.weight"][0, 0] = float("nan")
    good["fc1.bias"][0] = 1e-40
    save_file(good, tmp_path / "w.safetensors")

    code, out, _ = call("doctor", tmp_path / "w.safetensors", "--fix", tmp_path / "v.safetensors")

    assert code == 2 and "1 mended, 1 remain" in out and out.count("`fc2.weight`: 1 of 192 values are NaN") == 2
    assert load_file(tmp_path / "v.safetensors")["fc1.bias"][0] == 0


def test_json_tells_all(call, tmp_path):
    """Every field of a finding, rows, the copy and what is left in it."""
    leftovers(tmp_path / "c.pt")

    code, out, _ = call("doctor", tmp_path / "c.pt", "--fix", tmp_path / "d.pt", "--json")
    told = json.loads(out)

    assert code == 0 and told["kind"] == "torch" and told["copy"] == str(tmp_path / "d.pt")
    (finding,) = told["findings"]
    assert set(finding) == {"kind", "tensors", "what", "count", "cure", "fixable", "severity"}
    assert (finding["kind"], finding["count"], finding["fixable"]) == ("leftover", 512, True)
    assert told["fixed"] == [finding] and told["after"]["findings"] == []
    assert {row["name"]: row["zeros"] for row in told["tensors"]}["fc1.weight_mask"] == 512


def test_a_large_network_is_shown_in_short(call, tmp_path):
    """Only tensors with something to tell; ``--all`` shows every one. Many of a kind are counted."""
    state = {f"layers.{i}.weight": torch.randn(8, 8) for i in range(60)}
    for i in range(9):
        state[f"layers.{i}.weight"][0, 0] = float("nan")
    save_file(state, tmp_path / "w.safetensors")

    code, out, _ = call("doctor", tmp_path / "w.safetensors")
    rows = [line for line in out.splitlines() if line.startswith("layers.")]
    assert code == 2 and len(rows) == 9 and "60 tensors, 51 of them not shown" in out
    assert out.count("values are NaN") == 5 and "4 more of the kind 'not finite'" in out
    code, out, _ = call("doctor", tmp_path / "w.safetensors", "--all")
    assert len([line for line in out.splitlines() if line.startswith("layers.")]) == 60
    assert out.count("values are NaN") == 9


def test_statistics_of_a_run_folder(call, tmp_path):
    """With data: found, and a copy made that is a folder like any other."""
    words = ["train", "--net", "mlp", "--data", "digits", "--epochs", "1", "-s", "data.batch=50", *NORMED,
             "-s", "data.train=400", "-s", "data.test=100", "-o", str(tmp_path / "run")]  # fmt: skip
    assert main(words) == 0
    folder = Artefact.open(tmp_path / "run").folder
    state = load_file(folder / "weights.safetensors")
    for name in [name for name in state if name.endswith("running_mean")]:
        state[name] += 9
    save_file(state, folder / "weights.safetensors")
    card = json.loads((folder / "card.json").read_text())
    card["files"]["weights.safetensors"] = file_digest(folder / "weights.safetensors")
    (folder / "card.json").write_text(json.dumps({**card, "digest": card_digest(card)}))

    assert call("doctor", tmp_path / "run")[0] == 0
    code, out, _ = call("doctor", tmp_path / "run", "--data", "digits")
    assert code == 2 and "other means and variances on the data" in out
    code, out, err = call("doctor", tmp_path / "run", "--data", "digits", "--fix", tmp_path / "mended")
    assert code == 0 and "1 mended, 0 remain" in out, err

    built = Artefact.open(tmp_path / "mended").build().state_dict()
    assert all((built[name] - state[name]).abs().max() > 1 for name in state if name.endswith("running_mean"))


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def hostile(folder, kind):
    path = folder / f"{kind}.pt"
    if kind == "code":
        torch.save({"w": Evil(folder / "ran")}, path)
    elif kind == "module":
        torch.save(nn.Linear(2, 2), path)
    elif kind == "cut":
        torch.save({"w": torch.zeros(1000)}, path)
        path.write_bytes(path.read_bytes()[:900])
    else:
        path = folder / "header.safetensors"
        path.write_bytes((10**15).to_bytes(8, "little") + b"{}")
    return path


@pytest.mark.parametrize("kind", ["code", "module", "cut", "header"])
@pytest.mark.parametrize("flag", [None, "--masks", "--ema", "--dense"])
def test_hostile_files(call, tmp_path, kind, flag):
    """As the file, or beside it: one line, exit code 2, nothing run, nothing written."""
    path = hostile(tmp_path, kind)
    good = tmp_path / "good.pt"
    torch.save({"w": torch.randn(4, 4)}, good)
    words = [path] if flag is None else [good, flag, path]

    code, out, err = call("doctor", *words, "--fix", tmp_path / "out.pt")

    assert code == 2 and out == "" and err.startswith("secateur: error: ") and err.count("\n") == 1, err
    assert path.name in err and not (tmp_path / "ran").exists() and not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--fix", "x.pt"], "name the file to look at"),
        (["--masks", "x.pt"], "name the file to look at"),
        (["{good}", "--fix", "{good}"], "is the original, which is never touched"),
        (["{good}", "-s", "widths=3"], "write `-s model.NAME=value`"),
        (["{good}", "--net", "mlq"], "no network is called 'mlq'"),
        (["{good}", "--net", "mlp"], "does not fit the network"),
        (["{good}", "--masks", "{good}"], "holds no masks"),
        (["{good}", "--data", "digitz"], "no data set is called 'digitz'"),
    ],
)
def test_mistakes(call, tmp_path, words, says):
    good = tmp_path / "good.pt"
    torch.save({"w": torch.randn(4, 4)}, good)

    code, _, err = call("doctor", *[word.replace("{good}", str(good)) for word in words])

    assert code == 2 and says in err and "Traceback" not in err, err


def test_the_commands_that_it_names_can_be_typed(call, tmp_path):
    """Every cure that is a command of ours is understood by our own parser, every line of Python by Python's."""
    net = {n: t.clone() for n, t in leftovers(tmp_path / "c.pt").items()}
    net["fc1.weight"][:3] = 0
    net["fc2.weight"][:, :2] = 0
    net["head.weight"] = torch.zeros(10, 12)
    net["norm.running_mean"], net["norm.running_var"] = torch.zeros(4), -torch.ones(4)
    half = torch.randn(16, 40)
    half[half.abs() < 0.6] *= 1e-9
    net["fc3.weight"] = half.half().float() + half
    save_file(net, tmp_path / "w.safetensors")
    cures = []
    for path in (tmp_path / "w.safetensors", tmp_path / "c.pt"):
        told = json.loads(call("doctor", path, "--json")[1])
        cures += [finding["cure"] for finding in told["findings"] + told["notes"]]

    quoted = [text for cure in cures for text in re.findall(r"`([^`]+)`", cure)]
    commands = [text for text in [*cures, *quoted] if text.startswith("secateur ")]
    assert {command.split()[1] for command in commands} == {"doctor"}, commands
    for command in commands:
        parser().parse_args(shlex.split(command)[1:])
    flags = [text for text in quoted if text.startswith("-")]
    for text in flags:
        parser().parse_args(["prune", "runs/dense", *shlex.split(text.replace("`", ""))])
    for text in quoted:
        if text not in commands and text not in flags and not text.startswith("gzip "):
            compile(text, "cure", "exec")
