"""Comparisons: every figure against the files of the runs, the cost of training step by step, and what is refused."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

import copy
import json
import math
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file
from scipy import stats
from torch import nn

from secateur.core.errors import SecateurError, UsageError
from secateur.core.losses import CrossEntropy
from secateur.core.reading import Paper
from secateur.core.sockets import Rule
from secateur.core.task import Task
from secateur.engine.comparing import Comparison, Reference
from secateur.engine.comparing_macs import EXAMPLES, SPARSE, Counted
from secateur.engine.comparing_methods import Numbers, fill
from secateur.engine.comparing_summary import statistics, student, summarise
from secateur.engine.loop import Training
from secateur.engine.recipe import TrainStep
from secateur.report.comparing import compare
from secateur.report.views.comparison import markdown, report
from secateur.rules.acdc import Acdc
from secateur.rules.gradual import Gradual
from secateur.rules.rigl import Rigl
from secateur.rules.topkast import Topkast

pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes .* were assigned during export:UserWarning")

WEIGHTS = 64 * 16 + 16 * 8 + 8 * 10
PARAMS = WEIGHTS + 16 + 8 + 10
KEPT = WEIGHTS - WEIGHTS * 3 // 4
TRAIN, BATCH, EPOCHS = 190, 20, 4

TABLE = {
    "model": {"use": "mlp", "widths": [16, 8]},
    "data": {"use": "digits", "train": TRAIN, "test": 100, "batch": BATCH},
    "compare": {"sparsity": [0.75], "seeds": [0, 1], "epochs": EPOCHS, "methods": ["snip", "rigl", "gradual"]},
    "train": {"lr": 0.05},
    "method": [
        {"name": "late", "step": [
            {"do": "train", "epochs": "$0.75 epochs"},
            {"do": "prune", "to": "sparsity $sparsity", "criterion": {"use": "random", "seed": "$seed"}},
            {"do": "train", "epochs": "$0.25 epochs"},
        ]},
        {"name": "short", "epochs": 2, "step": [{"do": "train", "epochs": 2}]},
    ],
}  # fmt: skip


def changed(**sections):
    """The table with other entries in some sections; None takes a section away."""
    table = copy.deepcopy(TABLE)
    for name, entries in sections.items():
        if entries is None:
            del table[name]
        elif isinstance(entries, dict):
            table.setdefault(name, {}).update(entries)
        else:
            table[name] = entries
    return table


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished comparison and its folder."""
    out = tmp_path_factory.mktemp("compared") / "out"
    return compare(TABLE, out), out


def of(table, method):
    """The runs of one method, by seed."""
    return [run for run in table["runs"] if run["method"] == method]


def network(out, run):
    """The weights of a run's last step."""
    folder = sorted((out / run["name"]).glob("[0-9]*-*"))[-1]
    return load_file(folder / "weights.safetensors")


def zeros(state):
    return sum(int((t == 0).sum()) for name, t in state.items() if name.endswith("weight"))


def test_the_controls_and_the_dense_network_are_in_and_every_run_has_its_folder(made):
    table, out = made
    methods = list(dict.fromkeys(run["method"] for run in table["runs"]))
    assert methods == ["dense", "magnitude", "random", "small-dense", "snip", "rigl", "gradual", "late", "short"]
    told = {"dense": "0", "short": "own"}
    assert [run["name"] for run in table["runs"]] == [f"{m}-{told.get(m, '0.75')}-{s}" for s in (0, 1) for m in methods]
    assert all((out / run["name"] / "recipe.toml").is_file() for run in table["runs"])
    assert table["missing"] == [] and json.loads((out / "compare.json").read_text()) == table


def test_sizes_are_those_of_the_files(made):
    table, out = made
    assert table["reference"]["params"] == PARAMS and table["reference"]["prunable"] == WEIGHTS
    assert table["reference"]["macs"] == WEIGHTS
    for run in table["runs"]:
        state = network(out, run)
        params = sum(t.numel() for t in state.values())
        assert run["params"] == params
        if run["method"] in ("dense", "short", "small-dense"):
            assert run["kept"] == run["total"] and run["params_kept"] == params
        else:
            assert run["kept"] == KEPT and run["params_kept"] == PARAMS - WEIGHTS + KEPT
            assert zeros(state) >= WEIGHTS - KEPT
        assert run["macs"] == run["kept"], "in a perceptron each weight is one multiply-add"


def test_the_small_dense_network_is_no_larger_and_nearly_as_large(made):
    table, out = made
    for run in of(table, "small-dense"):
        state = network(out, run)
        wide, narrow = len(state["fc1.weight"]), len(state["fc2.weight"])
        assert run["params"] <= PARAMS - WEIGHTS + KEPT
        one_more = (wide + 1) * 65 + (narrow + 1) * (wide + 2) + 10 * (narrow + 2)
        assert one_more > PARAMS - WEIGHTS + KEPT


def test_training_costs_what_the_budget_and_the_zeros_say(made):
    table, _ = made
    seen, full = TRAIN * EPOCHS, 3 * WEIGHTS
    sizes = [*[BATCH] * 9, TRAIN - 9 * BATCH]
    expected = {
        "dense": full * seen, "short": full * seen // 2,
        "magnitude": (full + 3 * KEPT) * seen // 2, "late": (3 * full + 3 * KEPT) * seen // 4,
        "random": 3 * KEPT * seen, "snip": 3 * KEPT * seen,
    }  # fmt: skip
    updates = [step for step in range(10 * EPOCHS) if Rigl().due(step, 10 * EPOCHS)]
    dense_parts = sum(sizes[step % 10] for step in updates)
    expected["rigl"] = 3 * KEPT * seen + (WEIGHTS - KEPT) * dense_parts
    for run in table["runs"]:
        if run["method"] in expected:
            assert run["train_macs"] == expected[run["method"]], run["method"]
        assert run["train_examples"] == (seen // 2 if run["method"] == "short" else seen)
    small = of(table, "small-dense")[0]
    assert small["train_macs"] == 3 * small["macs"] * seen
    assert all(3 * KEPT * seen < run["train_macs"] < full * seen for run in of(table, "gradual"))


@dataclass(frozen=True)
class Spy(Rule):
    """The same sum from its definition: all weights of the network looked at in each step."""

    paper = Paper("none", "nobody", 2026, "", differs="in nothing known")

    def loss(self, run, loss, batch, output):
        sums = run.state(self)
        there = sum(int((w != 0).sum()) for w in run.weights().values())
        sums["macs"] = sums.get("macs", 0) + len(batch[1]) * (2 * there + run.masks.kept)
        return loss

    def after_step(self, run):
        run.note("spy", float(run.state(self)["macs"]))


@pytest.mark.parametrize("rule", [Gradual(0.8, updates=5), Acdc(0.8), Topkast(0.8, every=2), Rigl(0.8)])
def test_counted_steps_add_up_whatever_the_rule_does(rule, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    data = [(torch.randn(n, 6), torch.randint(0, 3, (n,))) for n in (5, 5, 3)]

    class Feed(list):
        def epoch(self, number, start=0):
            return iter(self[start:])

    step = TrainStep(epochs=10, rules=(Counted(), rule, Spy()), lr=0.05, accumulate=2)
    figures = {}
    Training(
        net, Feed(data), step, sample=lambda n, model: Task(model, CrossEntropy(), data), watch=figures.update
    ).fit()
    assert figures[SPARSE] == figures["spy"] and figures[EXAMPLES] == 130
    assert 2 * 130 * 20 < figures[SPARSE] < 3 * 130 * (6 * 12 + 12 * 3)


def test_counting_changes_nothing(made, tmp_path):
    """The run with the counting rule gives the weights of the run without it."""
    from secateur.engine.recipe import Recipe
    from secateur.engine.runner import Runner

    table, out = made
    recipe = Comparison.from_table(TABLE).jobs(Reference(PARAMS, WEIGHTS, WEIGHTS, "", "", (1, 1)))
    job = next(job for job in recipe if job.name == "gradual-0.75-0")
    plain = copy.deepcopy(job.recipe)
    plain["step"][0]["rules"] = plain["step"][0]["rules"][1:]
    Runner(Recipe.from_table(plain), tmp_path / "plain").run()
    state = load_file(next((tmp_path / "plain").glob("1-*/weights.safetensors")))
    other = network(out, of(table, "gradual")[0])
    assert all(torch.equal(state[name], other[name]) for name in other)


def test_again_skips_and_anew_gives_the_same_figures(made, tmp_path):
    table, out = made
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*/*")}
    assert compare(TABLE, out)["runs"] == table["runs"]
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/*/*")} == before
    other = compare(changed(compare={"seeds": [1], "methods": ["gradual"]}, method=[]), tmp_path / "anew")
    known = {run["name"]: run for run in table["runs"]}
    for run in other["runs"]:
        assert {**run, "seconds": 0} == {**known[run["name"]], "seconds": 0}
    assert {row["accuracy"]["half"] for row in other["rows"]} == {None}, "one seed gets no interval"
    assert any("one seed" in text for text in other["cautions"])


def test_rows_are_student_intervals_and_changes_are_paired_by_seed(made):
    table, _ = made
    dense = [run["accuracy"] for run in of(table, "dense")]
    for row in table["rows"]:
        values = [run["accuracy"] for run in of(table, row["method"])]
        mean, error = sum(values) / 2, stats.sem(values)
        assert row["accuracy"]["mean"] == pytest.approx(mean)
        assert row["accuracy"]["half"] == pytest.approx(stats.t.ppf(0.975, 1) * error)
        gaps = [a - b for a, b in zip(values, dense, strict=True)]
        assert row["change"]["mean"] == pytest.approx(sum(gaps) / 2)
        assert row["change"]["half"] == pytest.approx(stats.t.ppf(0.975, 1) * stats.sem(gaps))
    snip = next(row for row in table["rows"] if row["method"] == "snip")
    assert snip["compression"] == pytest.approx(PARAMS / (PARAMS - WEIGHTS + KEPT))
    assert snip["speedup"] == pytest.approx(WEIGHTS / KEPT)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 30])
def test_students_t_is_that_of_the_tables(freedom):
    assert student(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-12)
    assert student(freedom, 0.5) == pytest.approx(stats.t.ppf(0.75, freedom), rel=1e-12)


def test_one_value_has_no_interval():
    assert statistics([3.0]) == {"n": 1, "mean": 3.0, "std": None, "half": None}
    assert statistics([1.0, 1.0, 1.0])["half"] == 0.0


def test_a_small_dense_network_that_cannot_be_is_listed_with_the_reason(tmp_path):
    table = compare(changed(compare={"sparsity": [0.97], "seeds": [0], "methods": []}, method=[]), tmp_path / "out")
    (small,) = of(table, "small-dense")
    assert "params" in small["error"] and "accuracy" not in small
    (row,) = [row for row in table["rows"] if row["method"] == "small-dense"]
    assert row["errors"] == [small["error"]]
    text, page = (tmp_path / "out" / "table.md").read_text(), (tmp_path / "out" / "report.html").read_text()
    assert "refused" in text and small["error"].split("`")[0] in text and "small-dense at 97 % zeros" in page


def test_the_table_and_the_page_tell_every_figure(made):
    table, out = made
    text, page = (out / "table.md").read_text(), (out / "report.html").read_text()
    for row in table["rows"]:
        assert f"| {row['method']} |" in text and row["method"] in page
        assert f"{row['accuracy']['mean']:.2f} %" in text
    assert "Only two seeds" in text and "Only two seeds" in page
    assert "`short` trains 2 epochs, the others 4." in text
    assert "nan" not in page.split("<script")[0].lower().replace("finance", "")
    (section, *_) = report(table, "out").sections
    drawn = {series.name for chart in section.chart for series in chart.series}
    assert drawn == {row["method"] for row in table["rows"]} - {"dense"}
    assert markdown(table) == text


BAD = [
    (changed(compare={"methods": ["magnitud"]}), "magnitude"),
    (changed(compare={"methods": ["fpgm"]}), "whole units"),
    (changed(compare={"methods": ["l0"]}), "takes no sparsity"),
    (changed(compare={"methods": ["mine:Score"]}), "[[method]]"),
    (changed(compare={"sparsity": [1.5]}), "1.5"),
    (changed(compare={"sparsity": []}), "compare.sparsity is empty"),
    (changed(compare={"seeds": []}), "compare.seeds is empty"),
    (changed(compare={"seeds": [1, 1]}), "one twice"),
    (changed(compare={"seeds": [-1]}), "at least 0"),
    (changed(compare={"seeds": ["a"]}), "whole number"),
    (changed(compare={"epochs": 0}), "at least 2"),
    (changed(compare={"epoch": 3}), "Did you mean 'epochs'"),
    (changed(compare=None), "[compare]"),
    (changed(model=None), "[model]"),
    (changed(data=None), "[data]"),
    (changed(trian={"lr": 1.0}), "Did you mean 'train'"),
    (changed(train={"epochs": 3}), "train.epochs"),
    (changed(train={"lr": -1.0}), "lr is -1.0"),
    ({**TABLE, "method": {"name": "a"}}, "not a list of tables"),
    (changed(method=[{"name": "random", "step": [{"do": "train"}]}]), "always in"),
    (changed(method=[{"name": "../a", "step": [{"do": "train"}]}]), "letters"),
    (changed(method=[{"name": "a", "step": []}]), "[[method.step]]"),
    (changed(method=[{"name": "a", "step": [{"do": "train", "epochs": 3}]}]), "its budget is 4"),
    (changed(method=[{"name": "a", "step": [{"do": "train", "epochs": "$epoch"}]}]), "Did you mean 'epochs'"),
    (changed(method=[{"name": "a", "step": [{"do": "prune", "to": "sparsity $0.5 sparsity"}]}]), "only epochs"),
]


@pytest.mark.parametrize(("table", "told"), BAD, ids=[told for _, told in BAD])
def test_mistakes_are_told_before_anything_runs(table, told, tmp_path):
    with pytest.raises(SecateurError) as caught:
        compare(table, tmp_path / "out")
    assert told in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_comparison_reads_back_as_it_was_written(made):
    import tomllib

    table, out = made
    again = Comparison.from_table(tomllib.loads((out / "compare.toml").read_text()))
    assert again == Comparison.from_table(TABLE)


def test_the_rest_of_the_budget_is_what_other_steps_leave():
    own = {
        "name": "mine",
        "step": [{"do": "train", "epochs": "$0.5 epochs"}, {"do": "train", "epochs": "$rest epochs"}],
    }
    for budget, shares in ((5, [2, 3]), (4, [2, 2]), (7, [4, 3])):
        table = changed(method=[own], compare={"epochs": budget, "methods": []})
        jobs = Comparison.from_table(table).jobs(Reference(1, 1, 1, "", "", (1, 1)))
        steps = next(job.recipe["step"] for job in jobs if job.method == "mine")
        assert [step["epochs"] for step in steps] == shares


def test_a_measure_step_in_a_method_is_refused():
    own = {"name": "mine", "step": [{"do": "train", "epochs": "$epochs"}, {"do": "measure"}]}
    with pytest.raises(UsageError, match="has a step to measure; leave it out"):
        Comparison.from_table(changed(method=[own]))


def test_every_option_of_a_method_s_own_is_told():
    step = {"do": "train", "epochs": "$epochs", "optimizer": "adam", "lr": 1e-3, "skip": ["fc1*"]}
    made = Comparison.from_table(changed(method=[{"name": "mine", "step": [step]}], train={"lr": 0.1}))
    assert "`mine` trains with its own `lr`, `optimizer`, `skip`." in made.cautions()
    same = Comparison.from_table(changed(method=[{"name": "mine", "step": [{**step, "lr": 0.1}]}], train={"lr": 0.1}))
    assert "`mine` trains with its own `optimizer`, `skip`." in same.cautions()


def test_zeros_are_a_share_of_all_that_can_be_pruned():
    """A method that leaves a layer out: 90 zeros of its own 100 weights are 9 % of 1,000."""
    run = {"method": "mine", "sparsity": 0.9, "seed": 0, "epochs": 1, "accuracy": 1.0, "kept": 10, "total": 100,
           "params": 1100, "params_kept": 1010, "macs": 5, "train_macs": 1, "steps": 1, "seconds": 1.0}  # fmt: skip
    smaller = {**run, "method": "small", "params": 300, "kept": 200, "total": 200, "params_kept": 300}
    table = {"runs": [run, smaller], "asked": {"compare": {"epochs": 1}},
             "reference": {"params": 1100, "prunable": 1000, "macs": 10, "examples": [1, 1]}}  # fmt: skip
    assert [row["sparsity_reached"] for row in summarise(table)] == pytest.approx([0.09, 0.0])


@pytest.mark.parametrize("damage", ["not JSON", "{}", '{"keys": []}'])
def test_a_damaged_result_is_read_off_the_run_again(damage, tmp_path):
    table = changed(method=[], compare={"methods": [], "seeds": [0]})
    first = compare(table, tmp_path)
    file = tmp_path / "dense-0-0" / "result.json"
    file.write_text(damage)
    assert compare(table, tmp_path)["runs"] == first["runs"]
    assert json.loads(file.read_text())["method"] == "dense"


def test_words_become_numbers_everywhere():
    numbers = Numbers(0.9, 77, 10, 3)
    table = {"a": ["$density", {"b": "keep $params of $seed"}], "epochs": "$0.24 epochs", "c": 1, "d": "$epochs"}
    assert fill(table, numbers, "x") == {"a": [0.1, {"b": "keep 77 of 3"}], "epochs": 2, "c": 1, "d": 10}
    with pytest.raises(UsageError, match="stands for nothing"):
        fill("$sparsity", Numbers(None, 77, 10, 3), "x")


def test_rounds_of_synflow_lead_to_the_sparsity_in_equal_shares():
    table = changed(compare={"methods": ["synflow"]}, method=[])
    jobs = Comparison.from_table(table).jobs(Reference(PARAMS, WEIGHTS, WEIGHTS, "", "", (1, 1)))
    steps = next(job for job in jobs if job.method == "synflow").recipe["step"]
    cuts = [step["to"] for step in steps if step["do"] == "prune"]
    shares = [float(to.split()[1].rstrip("%")) / 100 for to in cuts[:-1]]
    assert cuts[-1] == "sparsity 0.75" and len(cuts) == 20
    ratios = [b / a for a, b in zip([1.0, *shares], [*shares, 0.25], strict=True)]
    assert all(math.isclose(ratio, 0.25 ** (1 / 20), rel_tol=1e-6) for ratio in ratios)
