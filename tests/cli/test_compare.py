"""``secateur compare``: the words, the files, and what is told."""

import json
import sys

import pytest

import secateur

pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes .* were assigned during export:UserWarning")

FILE = """
[model]
use = "mlp"
widths = [16, 8]

[data]
use = "digits"
train = 100
test = 100
batch = 20

[compare]
sparsity = [0.75]
seeds = [0]
epochs = 2

[train]
lr = 0.05
"""


@pytest.fixture
def file(tmp_path):
    """A comparison file."""
    path = tmp_path / "small.toml"
    path.write_text(FILE)
    return path


def test_one_command_gives_figures_table_and_page(file, tmp_path, call):
    out = tmp_path / "out"
    code, shown, _ = call("compare", file, "-o", out, "--dry-run")
    assert code == 0 and not out.exists()
    assert [line.split()[0] for line in shown.splitlines()] == ["to"] * 4

    code, shown, said = call("compare", file, "-o", out, "-s", "train.lr=0.1", "-s", "compare.sparsity=[0.5]")
    assert code == 0 and "small-dense" in shown and "magnitude-0.5-0" in said
    table = json.loads((out / "compare.json").read_text())
    assert table["asked"]["train"]["lr"] == 0.1 and len(table["runs"]) == 4
    assert all((out / name).stat().st_size > 0 for name in ("table.md", "report.html", "compare.toml"))

    code, shown, said = call("compare", out / "compare.toml", "-o", out, "--json")
    assert code == 0 and not said and json.loads(shown) == table
    code, shown, _ = call("compare", out / "compare.toml", "-o", out, "--dry-run", "--json")
    assert [row["state"] for row in json.loads(shown)["runs"]] == ["done"] * 4
    assert secateur.compare(out / "compare.toml", out) == table


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["-s", 'compare.methods=["magnitud"]'], "Did you mean 'magnitude'?"),
        (["-s", "compare.sparsity=[1.5]"], "1.5"),
        (["-s", "compare.seeds=[]"], "compare.seeds is empty"),
        (["-s", "compare.epochs=0"], "compare.epochs is 0"),
        (["-s", "epochs=3"], "beginning with model, data, compare, train, method"),
        (["-s", "data.use=digit"], "digits"),
        (["-s", "model.use=lenet_300"], "lenet_300_100"),
        (["--workers", "0"], "workers is 0"),
    ],
)
def test_a_mistake_is_one_message_and_nothing_is_written(file, tmp_path, call, words, told):
    code, shown, said = call("compare", file, "-o", tmp_path / "out", *words)
    assert code == 2 and not shown and not (tmp_path / "out").exists()
    assert told in said and said.count("secateur: error:") == 1 and "Traceback" not in said


def test_a_missing_file_is_named(tmp_path, call):
    code, _, said = call("compare", tmp_path / "none.toml")
    assert code == 2 and "none.toml" in said


def test_without_ray_the_extra_is_named(file, tmp_path, call, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # how Python says that a module cannot be imported
    code, _, said = call("compare", file, "-o", tmp_path / "out", "--ray")
    assert code == 2 and "secateur[ray]" in said
