"""Every bad input gives one clear error that names the thing and the cure, exit code 2, and nothing half-written."""

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

import secateur
from secateur.cli.verbs import VERBS
from secateur.core.errors import DataError, MaskError
from secateur.nets import build

TRAIN = ["train", "--net", "mlp", "--data", "digits", "--epochs", "1"]


def step(folder, verb="train"):
    """The folder of a run's step."""
    return next(p for p in folder.iterdir() if p.is_dir() and f"-{verb}-" in p.name)


def files(folder):
    """Every file below a folder with its bytes."""
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


FLAGS = [
    (["train", "--data", "digits"], "--net"),
    (["train", "--net", "lenet_300_10", "--data", "digits"], "lenet_300_100"),
    (["train", "--net", "mlp"], "--data"),
    (["train", "--net", "mlp", "--data", "digit"], "digits"),
    ([*TRAIN, "-s", "model.width=[3]"], "widths"),
    ([*TRAIN, "-s", "model.widths=many"], "widths"),
    ([*TRAIN, "-s", "data.batch=0"], "batch"),
    ([*TRAIN, "-s", "data.augment=rotate"], "crop-flip"),
    ([*TRAIN, "-s", "epochs=0"], "at least 1"),
    ([*TRAIN, "-s", "epochs=abc"], "whole number"),
    ([*TRAIN, "-s", "epohcs=3"], "epochs"),
    ([*TRAIN, "-s", "lr"], "a.b=value"),
    ([*TRAIN, "--lr", "-1"], "positive"),
    ([*TRAIN, "-s", "momentum=1.0"], "[0, 1)"),
    ([*TRAIN, "-s", "nesterov=true", "-s", "momentum=0"], "nesterov is True"),
    ([*TRAIN, "-s", "nesterov=true", "-s", "optimizer=adam"], "nesterov is True"),
    ([*TRAIN, "-s", "weight_decay=inf"], "weight_decay is inf"),
    ([*TRAIN, "-s", "data=5"], "data is a table"),
    ([*TRAIN, "-s", "model=mlp"], "model is a table"),
    ([*TRAIN, "-s", "step=3", "-s", "lr=0.1"], "step is a list of tables"),
    ([*TRAIN, "-s", "step=[4]"], "step is a list of tables"),
    ([*TRAIN, "-s", "step=[]", "-s", "lr=0.1"], "no step is left"),
    ([*TRAIN, "-s", "rules=[3]", "-s", "rules.1.sparsity=0.5"], "entry 1 is 3, not a table"),
    ([*TRAIN, "-s", "data.options=3"], "data.options is 3; it must be a table"),
    ([*TRAIN, "-s", "model.options=[1]"], "model.options is [1]; it must be a table"),
    ([*TRAIN, "-o", ""], "out is given as an empty text"),
    ([*TRAIN, "--rule", ""], "rule is given as an empty text"),
    ([*TRAIN, "-s", "schedule=cosin"], "cosine"),
    ([*TRAIN, "-s", "accumulate=100000"], "accumulate"),
    ([*TRAIN, "-s", "step.7.lr=1"], "1 to 1"),
    ([*TRAIN, "--rule", "gradul"], "gradual"),
    ([*TRAIN, "--rule", "distill"], "dense"),
    ([*TRAIN, "-s", 'rules=[{ use = "gradual", sparsity = 1.5 }]'], "1.5"),
    ([*TRAIN, "--epochs", "x"], "--epochs"),
    ([*TRAIN, "--colour", "red"], "--colour"),
    (["train", "--net", "no_such_module:net", "--data", "digits"], "no_such_module"),
    (["train", "--net", "json:loads", "--data", "digits"], "json:loads"),
    (["trian"], "train"),
    (["methods", "magnitud"], "magnitude"),
    (["run", "absent.toml"], "absent.toml"),
    (["report", "absent"], "absent"),
    (["doctor", "absent.safetensors"], "absent.safetensors"),
    (["prune", "absent"], "absent"),
    (["measure", "absent"], "absent"),
]


@pytest.mark.parametrize(("words", "says"), FLAGS, ids=lambda v: " ".join(v) if isinstance(v, list) else v)
def test_bad_flags(call, tmp_path, words, says, monkeypatch):
    """Names, options and numbers that are not understood."""
    monkeypatch.chdir(tmp_path)

    code, out, err = call(*words)

    assert code == 2, err
    assert says in err
    assert "Traceback" not in err and err.count("secateur: error:") == 1
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.name.startswith(".") and p.name != ".lock"]


PRUNE = [
    (["--to", "sparsity 1.5"], "1.5"),
    (["--to", "sparsity 1.0"], "[0, 1)"),
    (["--to", "-0.1"], "-0.1"),
    (["--to", "params 0%"], "(0, 1]"),
    (["--to", "params 150%"], "(0, 1]"),
    (["--to", "keep 0"], "at least 1"),
    (["--to", "keep 999999999"], "prunable"),
    (["--to", "keep 1"], "empty whole layers"),
    (["--to", "smaller"], "params 5%"),
    (["--to", "ms 12"], "secateur plan RUN"),
    (["--to", "4:2"], "1 <= N < M"),
    (["--to", "2:7"], "input width"),
    (["--to", "macs 0.0001x"], "cannot be met"),
    (["--to", "2:4", "--pattern", "block"], "contradict"),
    (["--criterion", "magnitud"], "magnitude"),
    (["--criterion", "magnitude", "-s", "criterion.power=2"], "power"),
    (["--criterion", "no.such:Thing"], "no.such"),
    (["--criterion", "json:loads"], "Criterion"),
    (["--allocation", "globl"], "global"),
    (["--pattern", "blok"], "block"),
    (["--pattern", "block", "-s", "pattern.rows=0"], "at least 1"),
    (["--only", "conv*"], "conv*"),
    (["--skip", "conv*"], "conv*"),
    (["--skip", "*"], "nothing"),
    (["--only", "*.bias", "--to", "2:4"], "bias"),
    (["--to", "sparsity 0.9", "--pattern", "nm"], "contradict"),
    (["--to", "params 10%", "--pattern", "nm"], "contradict"),
    (["--to", "macs 0.1x", "--pattern", "nm"], "contradict"),
    (["--to", "keep 100", "--pattern", "nm", "--skip", "head*"], "2:4 keeps 608 of 1,216 weights, not 100"),
    (["--to", "sparsity 0.9", "--pattern", "nm", "--epochs", "1"], "contradict"),
    (["--to", "2:4", "--pattern", "block", "--epochs", "1"], "contradict"),
    (["--to", ""], "to is given as an empty text"),
    (["-s", "to="], "the target '' is not understood"),
    (["--criterion", ""], "criterion is given as an empty text"),
    (["--epochs", "1", "--lr", "0"], "lr is 0.0; it must be a positive number"),
    (["--lr", "0.1"], "--lr has no effect"),
    (["--epochs", "0", "--lr", "0.1"], "--lr has no effect"),
    (["--epochs", "1", "--to", "0.5", "-s", 'rules=["distill"]'], "--to has no effect"),
    (["--epochs", "1", "--to", "0.8", "-s", "schedule=levels"], "set `final = 0.8` in the schedule"),
    (["--epochs", "-1"], "-1"),
    (["--epochs", "1", "--to", "macs 0.5x"], "step by step"),
    (["-s", "examples=0"], "at least 1"),
    (["--data", "monks1"], "was made for"),
    (["--data", "mnist", "--data-dir", "nowhere"], "SECATEUR_DATA"),
]


@pytest.mark.parametrize(("words", "says"), PRUNE, ids=lambda v: " ".join(v) if isinstance(v, list) else v)
def test_bad_prune(call, dense, tmp_path, words, says, data_dir):
    """Targets and choices that cannot be: the folder it began from is as it was."""
    before = files(dense)
    given = words if "--data-dir" in words else [*words, "--data-dir", data_dir]

    code, out, err = call("prune", dense, *given, "-o", tmp_path / "out")

    assert code == 2, err
    assert says in err and "Traceback" not in err
    assert files(dense) == before
    assert not list((tmp_path / "out").rglob("*.safetensors"))


RECIPES = [
    ("seed = [", "TOML"),
    ("sed = 1\n[model]\nuse='mlp'\n", "seed"),
    ("[model]\nuse = 'mlp'\n[data]\nuse = 'digits'\n", "step"),
    ("secateur = '9.9'\n[[step]]\ndo = 'train'\n", "9.9"),
    ("[[step]]\ndo = 'trian'\n", "train"),
    ("[[step]]\nepochs = 1\n", "do"),
    ("[data]\nuse='digits'\n[model]\nuse='mlp'\n[[step]]\ndo='train'\nrules=[3]\n", "rules"),
    ("seed = 'x'\n[[step]]\ndo = 'train'\n", "seed"),
    ("[data]\nuse='digits'\n[model]\nuse='mlp'\n[[step]]\ndo='prune'\nto='sparsity 2'\n", "sparsity"),
    ("[model]\nuse='mlp'\n[data]\nuse='digits'\n[[step]]\ndo='measure'\n", "nothing to measure"),
]


@pytest.mark.parametrize(("text", "says"), RECIPES)
def test_bad_recipes(call, tmp_path, text, says):
    """Recipes that are not TOML, or ask for what there is not."""
    recipe = tmp_path / "r.toml"
    recipe.write_text(text)

    code, out, err = call("run", recipe, "-o", tmp_path / "out")

    assert code == 2, err
    assert says in err and "Traceback" not in err


def test_truncated_and_flipped_files(call, dense, tmp_path):
    """A damaged file of the artefact is named, whatever the damage."""
    folder = step(dense)
    for name in ("weights.safetensors", "masks.safetensors", "structure.json", "recipe.toml", "card.json"):
        whole = (folder / name).read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 0x41
        for damaged in (whole[: len(whole) // 2], bytes(flipped), b""):
            (folder / name).write_bytes(damaged)
            code, out, err = call("prune", dense, "-o", tmp_path / "out")
            assert code == 2, (name, err)
            assert name in err and "Traceback" not in err
        (folder / name).write_bytes(whole)
    assert call("prune", dense, "-o", tmp_path / "out")[0] == 0


def weights_of(dense, tmp_path, change):
    """A weights file made from the trained one."""
    state = load_file(step(dense) / "weights.safetensors")
    change(state)
    save_file(state, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def spoil(state):
    """One NaN in the first weight."""
    next(v for k, v in state.items() if k.endswith("weight"))[0, 0] = float("nan")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (spoil, "NaN"),
        (lambda s: s.pop(next(iter(s))), "lacks"),
        (lambda s: s.update(extra=torch.zeros(2)), "extra"),
        (lambda s: s.update({next(iter(s)): torch.zeros(3, 3)}), "shape"),
        (lambda s: s.update(a_orig=torch.zeros(2), a_mask=torch.zeros(2)), "torch.nn.utils.prune"),
    ],
)
def test_bad_weights(call, dense, tmp_path, change, says):
    """Weights that are not finite or do not fit the network."""
    path = weights_of(dense, tmp_path, change)

    code, out, err = call(
        "prune", path, "--net", "mlp", "--data", "digits", "-s", "model.widths=[16, 12]", "-o", tmp_path / "o"
    )

    assert code == 2, err
    assert says in err and "Traceback" not in err


def test_files_of_another_kind(call, tmp_path):
    """Not safetensors, a pickle that would run code, and a folder that is no run."""
    (tmp_path / "w.safetensors").write_bytes(b"not a tensor file at all")
    (tmp_path / "w.bin").write_bytes(b"x")
    (tmp_path / "empty").mkdir()

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    torch.save({"w": Evil()}, tmp_path / "evil.pt")
    for words in (
        ["prune", tmp_path / "w.safetensors", "--net", "mlp", "--data", "digits"],
        ["prune", tmp_path / "w.bin", "--net", "mlp", "--data", "digits"],
        ["prune", tmp_path / "empty", "--data", "digits"],
        ["doctor", tmp_path / "w.bin"],
        ["doctor", tmp_path / "w.safetensors"],
        ["doctor", tmp_path / "evil.pt"],
        ["report", tmp_path / "empty"],
    ):
        code, out, err = call(*words)
        assert code == 2, (words, err)
        assert "error:" in err and "Traceback" not in err
    assert not (tmp_path / "ran").exists()


def test_places_that_cannot_be_written(call, dense, tmp_path):
    """The out folder is a file, or lies below one."""
    (tmp_path / "file").write_text("mine")

    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        code, _, err = call("prune", dense, "-o", out)
        assert code == 2, err
        assert "-o" in err

    assert (tmp_path / "file").read_text() == "mine"


def test_full_disk(dense, tmp_path):
    """When the disk is full (a limit on file size stands in), nothing is half-written and the old files stay."""
    before = files(dense)

    def small_files_only():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))

    words = [sys.executable, "-m", "secateur.cli.main", "prune", str(dense), "-o", str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, preexec_fn=small_files_only, timeout=120, check=False)

    assert done.returncode == 2, done.stderr
    assert "cannot write" in done.stderr and "Traceback" not in done.stderr
    assert files(dense) == before
    left = [p for p in (tmp_path / "out").rglob("*") if p.is_file() and p.name != ".lock"]
    assert not [p for p in left if p.name.startswith(".") or p.suffix == ".safetensors"]
    for path in left:
        json.loads(path.read_text()) if path.suffix == ".json" else path.read_text()


def test_python_refuses_the_same():
    """Spent iterators, empty data, and masks of another network."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 3))
    batch = (torch.randn(5, 4), torch.randint(0, 3, (5,)))
    loss = secateur.CrossEntropy()
    with pytest.raises(DataError, match="read only once"):
        secateur.prune(secateur.Task(net, loss, iter([batch])), "sparsity 0.5")
    with pytest.raises(DataError, match="no example"):
        secateur.prune(secateur.Task(net, loss, []), "sparsity 0.5")
    with pytest.raises(DataError, match="no batch"):
        secateur.train(net, [])
    with pytest.raises(MaskError, match="another network"):
        secateur.Masks.dense(build("mlp", (8,), 2)).apply_(net)


def test_two_processes_in_one_folder(call, dense, tmp_path):
    """A second process in the same run folder is refused."""
    import fcntl

    out = tmp_path / "out"
    out.mkdir()
    with open(out / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, err = call("prune", dense, "-o", out)

    assert code == 2
    assert "another process" in err


def test_a_network_that_fails_is_the_user_s_to_mend(call, monkeypatch, tmp_path):
    """An error inside a function of the user's own is told in one line."""
    (tmp_path / "broken_net.py").write_text("def net():\n    raise RuntimeError('inside')\n")
    monkeypatch.chdir(tmp_path)

    code, _, err = call("train", "--net", "broken_net:net", "--data", "digits")

    assert code == 2
    assert "inside" in err and "Traceback" not in err


@pytest.mark.parametrize("debug", [(), ("--debug",)])
def test_a_bug_is_exit_code_one(call, monkeypatch, debug):
    """What is not the user's mistake is not presented as one: the traceback and where to send it."""
    broken = types.ModuleType("secateur.cli.broken")

    def run(request):
        raise RuntimeError("a slip of ours")

    broken.run = run
    monkeypatch.setitem(sys.modules, "secateur.cli.broken", broken)
    monkeypatch.setitem(VERBS, "report", dataclasses.replace(VERBS["report"], module="broken"))

    code, out, err = call(*debug, "report", "anywhere")

    assert code == 1
    assert "Traceback" in err and "RuntimeError: a slip of ours" in err
    assert "this is a bug of secateur; please report it" in err and not out
