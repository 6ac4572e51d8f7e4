import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.report.many_kit import METHODS, SEEDS, SPARSITIES, accuracy_of, many_runs, write_comparison, write_run
from tests.report.test_page import HOSTILE, Page, close

from secateur import report
from secateur.cli.main import main
from secateur.core.errors import FileError, UsageError
from secateur.report.groups import Group, Setting, front, grouped
from secateur.report.points import gather
from secateur.report.recipes import method_of

STUDENT = 12.706204736432095  # of one degree of freedom, 95 %: tan(0.475 pi)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return many_runs(tmp_path_factory.mktemp("many"))


def test_runs_that_differ_in_their_seed_are_one_setting_with_students_interval(runs):
    groups = grouped(gather(runs).points)
    assert [group.title for group in groups] == ["resnet20 on cifar10", "resnet56 on cifar10"]
    settings = {(s.method, s.target): s for s in groups[0].settings}
    assert set(settings) == {(m, f"sparsity {s}") for m in METHODS for s in SPARSITIES}
    for (method, target), setting in settings.items():
        one, two = (accuracy_of(method, float(target.split()[1]), seed) for seed in SEEDS)
        assert setting.accuracy["mean"] == pytest.approx((one + two) / 2)
        # Of two values the standard error is half their distance.
        assert setting.accuracy["half"] == pytest.approx(STUDENT * abs(one - two) / 2)
        assert setting.change["mean"] == pytest.approx((one + two) / 2 - 91.66)
    assert all(setting.accuracy["half"] is None for setting in groups[1].settings)


costs = st.integers(1, 6).map(float)


@settings(deadline=None)
@given(st.lists(st.tuples(costs, costs), min_size=1, max_size=12), st.tuples(costs, costs))
def test_the_front_is_what_nothing_beats(places, dense):
    made = tuple(Setting(str(i), "", (), {"mean": y}, None, {"params": x}, False) for i, (x, y) in enumerate(places))
    group = Group("g", made, {"mean": dense[1]}, {"params": dense[0]}, ())

    def beaten(x, y):
        return any((a <= x and b > y) or (a < x and b >= y) for a, b in [*places, dense])

    wanted = {str(i) for i, place in enumerate(places) if not beaten(*place)}
    found = front(group, "params")
    assert {setting.method for setting in found} == wanted
    assert [s.costs["params"] for s in found] == sorted(s.costs["params"] for s in found)


def test_a_comparison_is_paired_with_its_dense_networks_seed_by_seed(tmp_path):
    (group,) = grouped(gather([write_comparison(tmp_path / "cmp")]).points)
    assert group.dense["mean"] == 90.5 and group.dense_costs["params"] == 1000
    small, snip = group.settings
    assert snip.change["mean"] == pytest.approx(((80 - 90) + (83 - 91)) / 2)
    assert small.control and not snip.control
    assert [s.method for s in group.fronts["params"]] == ["snip"]
    assert [s.method for s in group.fronts["disk"]] == ["small-dense"]


def test_methods_of_one_name_are_told_apart_by_what_differs(tmp_path):
    for name, epochs in (("a", 10), ("b", 30)):
        run = write_run(tmp_path / name, seed=0)
        recipe = (run / "recipe.toml").read_text().replace("epochs = 10", f"epochs = {epochs}")
        (run / "recipe.toml").write_text(recipe)
        card = next(run.glob("2-train-*")) / "card.json"
        card.write_text(card.read_text().replace("gradual 0.9 0", f"weights {name}"))
    (group,) = grouped(gather([tmp_path]).points)
    assert [s.method for s in group.settings] == ["gradual (epochs 10)", "gradual (epochs 30)"]


def test_a_copy_is_no_second_seed_and_unfinished_runs_are_noted(tmp_path):
    first = write_run(tmp_path / "first")
    shutil.copytree(first, tmp_path / "second")
    unfinished = write_run(tmp_path / "third", seed=1)
    next(unfinished.glob("3-measure-*/card.json")).unlink()
    found = gather([tmp_path, first])
    assert [(point.name, point.folder) for point in found.points] == [("first", first)]
    assert len(found.notes) == 2
    assert "third is left out: step 3 (measure) is not finished" in found.notes[0]
    assert "second is left out: its network is the same" in found.notes[1]


def test_a_changed_verdict_is_left_out(tmp_path):
    write_run(tmp_path / "good")
    bad = write_run(tmp_path / "bad", seed=1)
    card = next(bad.glob("3-measure-*/card.json"))
    card.write_text(json.dumps({**json.loads(card.read_text()), "files": {"verdict.json": "0" * 64}}))
    found = gather([tmp_path])
    assert len(found.points) == 1 and "bad is left out" in found.notes[0]


def test_what_cannot_be_compared_is_one_clear_error(tmp_path, capsys):
    run = write_run(tmp_path / "runs" / "a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match="there is no folder .*Did you mean 'runs'"):
        gather([tmp_path / "rns"])
    with pytest.raises(FileError, match="no run.json"):
        gather([tmp_path / "empty"])
    with pytest.raises(FileError, match="is a file, not a run folder"):
        gather([run / "run.json"])
    other = write_run(tmp_path / "runs" / "b", seed=1)
    verdict = next(other.glob("3-measure-*/verdict.json"))
    table = json.loads(verdict.read_text())
    table["pruned"]["accuracy"]["n"] = 100
    verdict.write_text(json.dumps(table))
    with pytest.raises(UsageError, match="10,000 examples of cifar10 and .* on 100; their accuracies"):
        gather([run, other])
    next(run.glob("3-measure-*/card.json")).unlink()
    assert main(["compare-report", str(run), "-o", str(tmp_path / "page.html")]) == 2
    said = capsys.readouterr().err
    assert "there is nothing to compare" in said and "is not finished" in said and not (tmp_path / "page.html").exists()


def test_the_command_writes_page_and_json_and_shows_the_front(runs, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["compare-report", *map(str, runs), "-o", str(page)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "14 runs in 8 settings of 2 networks" in shown and "Pareto front by parameters kept: gradual" in shown
    table = json.loads(page.with_suffix(".json").read_text())
    assert json.loads(Page(page.read_text()).scripts[0]) == table


def test_every_number_on_the_page_equals_the_json_and_the_runs(runs, tmp_path):
    page = report.write_many(runs, tmp_path / "page.html")
    table = json.loads(page.with_suffix(".json").read_text())
    drawn = Page(page.read_text()).tables
    tables = [section["table"] for section in table["sections"] if "table" in section]
    numbers = 0
    for shown, wanted in zip(drawn, tables, strict=True):
        lines = wanted["rows"] + ([wanted["total"]] if "total" in wanted else [])
        for line, cells in zip(shown[1:], lines, strict=True):
            for seen, cell in zip(line, cells, strict=True):
                assert (seen["text"], seen["span"]) == (cell["text"], cell.get("span", ""))
                if seen["value"] is not None and not isinstance(cell["value"], str):
                    assert close(seen["text"], cell["value"]), (seen, cell)
                    numbers += 1
    assert numbers > 150
    every = tables[-1]
    heads = [column["name"] for column in every["columns"]]
    for row in every["rows"]:
        name, accuracy = row[heads.index("Run")]["text"], row[heads.index("Accuracy")]["value"]
        verdict = json.loads(next(p for p in runs if p.name == name).glob("3-*/verdict.json").__next__().read_text())
        assert accuracy == verdict["pruned"]["accuracy"]["value"]


def test_hostile_names_stay_text(tmp_path):
    made = [write_run(tmp_path / f"run{i}", seed=i) for i in range(3)]
    for run, name in zip(made, HOSTILE, strict=False):
        quoted = json.dumps(name)
        recipe = (run / "recipe.toml").read_text().replace('use = "resnet20"', f"use = {quoted}")
        (run / "recipe.toml").write_text(recipe.replace('use = "gradual"', f"use = {quoted}"))
    text = report.write_many(made, tmp_path).read_text()
    page = Page(text)
    assert page.tags.count("script") == 4 and "img" not in page.tags  # the figures, sorting, choice, overlay
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert "alert(1)</script>" not in text


def test_methods_are_named_after_what_pruned():
    step = {"do": "prune", "criterion": {"use": "snip"}, "pattern": {"use": "nm", "n": 2, "m": 4}}
    assert method_of({"step": [step, {"do": "train", "rules": ["distill"]}]}) == "snip nm + distill"
    assert method_of({}) == "no pruning"
