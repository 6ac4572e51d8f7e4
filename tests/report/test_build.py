import json
import math
import subprocess
import sys

import pytest

from secateur import report
from secateur.core.errors import FileError, UsageError
from secateur.report.page import to_html

TITLES = ["Verdict", "Baselines", "Layers", "Forecast and truth", "Training", "Curvature and flatness", "Probes"]
TITLES += ["Left alone", "Repeat"]


def section(made, title):
    return next(s for s in made.sections if s.title == title)


def row(made, label):
    return next(r for r in section(made, "Verdict").table.rows if r[0].text == label)


def curve(made, chart, name):
    charts = section(made, "Training").chart
    return next(s for c in charts if c.title == chart for s in c.series if s.name == name).points


def step_folder(run, number):
    return next(run.glob(f"{number}-*"))


def test_a_whole_run_has_every_section_in_order_and_no_notes(make_run):
    made = report.build(make_run())
    assert [s.title for s in made.sections] == TITLES
    assert made.notes == ()
    assert all(s.says for s in made.sections)


def test_verdict_shows_values_and_intervals_of_the_verdict_file(make_run):
    made = report.build(make_run())
    _, dense, pruned, change, *_ = row(made, "Accuracy")
    assert (dense.text, pruned.text, change.text) == ("91.66 %", "91.05 %", "−0.61 points")
    assert (change.low, change.high, change.span) == (-0.98, -0.24, "−0.98 to −0.24")
    assert row(made, "File on disk")[3].text == "0.0 %"
    assert row(made, "File, compressed")[2].text == "187.7 kB"


def test_verdict_counts_weights_and_macs(make_run, layers):
    made = report.build(make_run())
    kept, total = sum(r["kept"] for r in layers), sum(r["weights"] for r in layers)
    assert [c.value for c in row(made, "Weights kept")[1:3]] == [total, kept]
    effective = sum(r["macs_effective"] for r in layers)
    assert [c.value for c in row(made, "Effective MACs")[1:3]] == [sum(r["macs"] for r in layers), effective]


def test_forecast_stands_beside_the_measured_rise(make_run):
    made = report.build(make_run())
    cells = row(made, "Loss right after pruning")
    assert (cells[3].value, cells[4].value) == (1.7921, 1.2034)
    assert "67 % of it" in section(made, "Forecast and truth").says


@pytest.mark.parametrize(
    ("interval", "word", "says"),
    [
        ((0.98, 1.02), "no clear change", "did not change measurably"),
        ((1.2, 1.4), "faster", "Time changed"),
        ((0.7, 0.8), "slower", "Time changed"),
    ],
)
def test_time_is_called_changed_only_when_the_interval_of_the_ratio_leaves_out_1(make_run, edit, interval, word, says):
    run = make_run()
    low, high = interval
    path = step_folder(run, 4) / "verdict.json"
    change = json.loads(path.read_text())["change"]
    edit(path, change={**change, "latency": {"value": (low + high) / 2, "low": low, "high": high}})
    made = report.build(run)
    assert row(made, "Time for one example")[-1].text == word
    assert any(says in line for line in section(made, "Verdict").more)


@pytest.mark.parametrize(
    ("low", "high", "word"), [(-1, -0.1, "worse"), (-1, 0.5, "no clear change"), (0.1, 1, "better")]
)
def test_accuracy_is_called_worse_or_better_only_when_the_interval_leaves_out_0(make_run, edit, low, high, word):
    run = make_run()
    path = step_folder(run, 4) / "verdict.json"
    edit(path, change={"accuracy": {"value": (low + high) / 2, "unit": "points", "low": low, "high": high}})
    assert row(report.build(run), "Accuracy")[-1].text == word


def test_a_standard_error_makes_an_interval_of_1_96_either_way(make_run, edit):
    run = make_run()
    edit(step_folder(run, 4) / "verdict.json", change={"accuracy": {"value": -1.0, "unit": "%", "stderr": 0.5}})
    change = row(report.build(run), "Accuracy")[3]
    assert (change.low, change.high) == pytest.approx((-1.98, -0.02), abs=1e-12)


def test_a_reading_without_unit_is_a_share_of_1(make_run, edit):
    run = make_run()
    edit(step_folder(run, 4) / "verdict.json", pruned={"accuracy": {"value": 0.5, "unit": ""}})
    assert row(report.build(run), "Accuracy")[2].text == "50.00 %"


def test_training_steps_are_chained_and_the_cut_lies_between_them(make_run):
    made = report.build(make_run())
    chart = section(made, "Training").chart[0]
    assert chart.marks == ((4000.0, "step 2: pruned to 10.64 %"),)
    points = curve(made, "Loss", "test loss")
    assert [x for x, _ in points[:2]] == [200, 400]
    assert [x for x, _ in points[-2:]] == [5800, 6000]
    assert len(points) == 30


def test_thinned_curves_keep_the_mean_and_the_sparsity_keeps_its_corners(make_run):
    made = report.build(make_run())
    rows = (make_run("again") / "1-train-1c1f00aa" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(r)["train/loss"] for r in rows if "train/loss" in r]
    drawn = [y for x, y in curve(made, "Loss", "train loss") if x <= 4000]
    assert len(drawn) < len(losses)
    assert sum(drawn) / len(drawn) == pytest.approx(sum(losses) / len(losses), rel=1e-12)
    sparsity = curve(made, "Sparsity", "sparsity")
    assert [y for _, y in sparsity] == pytest.approx([0, 89.36, 89.36], abs=0.01)
    assert [x for x, _ in sparsity] == [10, 4000, 6000]


def test_a_half_written_metrics_line_is_left_out_and_told(make_run):
    run = make_run()
    whole = report.build(run)
    with open(step_folder(run, 3) / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 2010, "train/loss": 0.\xe2')
    made = report.build(run)
    assert made.sections == whole.sections
    assert made.notes == (*whole.notes, "1 line of 3-train-3c1f00aa/metrics.jsonl could not be read and is left out.")


def test_figures_that_are_not_finite_are_left_out_of_curves(make_run):
    run = make_run()
    with open(step_folder(run, 3) / "metrics.jsonl", "a") as file:
        file.write('{"step": 2010, "train/loss": "nan", "test/loss": "inf", "test/accuracy": "nan"}\n')
    made = report.build(run)
    assert all(math.isfinite(y) for c in section(made, "Training").chart for s in c.series for _, y in s.points)


def test_figures_that_are_not_finite_are_written_as_words(make_run, edit):
    run = make_run()
    edit(step_folder(run, 4) / "verdict.json", pruned={"accuracy": {"value": "nan", "unit": "%"}})
    made = report.build(run)
    assert row(made, "Accuracy")[2].text == "not a number %"
    assert json.loads(report.write(run).with_suffix(".json").read_text())["format"] == "secateur.report/1"


@pytest.mark.parametrize("kinds", [("train",), ("prune",), ("measure",), ("train", "prune"), ("train", "measure")])
def test_a_run_of_a_few_steps_skips_sections_with_a_note(make_run, kinds):
    made = report.build(make_run(kinds=kinds))
    titles = [s.title for s in made.sections]
    assert titles == [t for t in TITLES if t in titles]
    assert "Repeat" in titles and "Verdict" in titles
    if "measure" not in kinds:
        assert any("measure" in note for note in made.notes)
    if "train" not in kinds:
        assert "No curves: the run has no training step." in made.notes


@pytest.mark.parametrize(
    "pattern",
    [
        "run.json",
        "recipe.toml",
        "*/card.json",
        "*/metrics.jsonl",
        "*/verdict.json",
        "*/weights.safetensors",
        "*-prune-*/*",
    ],
)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
def test_missing_and_damaged_files_never_crash(make_run, pattern, damage):
    run = make_run()
    for path in [p for p in run.glob(pattern) if p.is_file()]:
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(b"" if damage == "empty" else path.read_bytes()[: path.stat().st_size // 2])
    if pattern == "run.json":
        with pytest.raises(FileError, match=r"run\.json"):
            report.build(run)
        return
    made = report.build(run)
    if pattern in ("*/card.json", "*/verdict.json"):
        assert made.notes
    assert report.write(run).is_file()


def places(entry, path=()):
    yield path
    items = entry.items() if isinstance(entry, dict) else enumerate(entry) if isinstance(entry, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def replaced(entry, path, odd):
    if not path:
        return odd
    copy = dict(entry) if isinstance(entry, dict) else list(entry)
    copy[path[0]] = replaced(entry[path[0]], path[1:], odd)
    return copy


ODD = [None, "nan", "text", -1, 0, 1e308, True, [], {}, [None], {"value": "inf"}]


@pytest.mark.parametrize("name", ["run.json", "1-prune-1c1f00aa/card.json", "2-measure-2c1f00aa/verdict.json"])
@pytest.mark.parametrize("turn", range(2))
def test_no_odd_value_anywhere_crashes_a_report(make_run, layers, name, turn):
    run = make_run(layers=layers[:1], kinds=("prune", "measure"))
    path = run / name
    table = json.loads(path.read_text())
    for i, place in enumerate(places(table)):
        if name == "run.json" and not place:
            continue
        # Each place meets another odd value in each turn; all of them everywhere would take minutes.
        path.write_text(json.dumps(replaced(table, place, ODD[(i + 5 * turn) % len(ODD)])))
        assert "</html>" in to_html(report.build(run))


def test_no_odd_value_in_the_metrics_crashes_a_report(make_run, layers):
    run = make_run(layers=layers[:1], kinds=("train",))
    path = run / "1-train-1c1f00aa" / "metrics.jsonl"
    figures = json.loads(path.read_text().splitlines()[20])
    lines = [json.dumps({**figures, key: odd}) for key in figures for odd in ODD]
    path.write_text("\n".join([*lines, "[]", "3", "null", '"text"']))
    assert "</html>" in to_html(report.build(run))


def test_an_unfinished_step_is_shown_as_far_as_it_got(make_run):
    run = make_run(kinds=("train", "prune", "train"))
    (step_folder(run, 3) / "card.json").unlink()
    made = report.build(run)
    assert any("Step 3 (train) is not finished" in note for note in made.notes)
    assert curve(made, "Loss", "test loss")[-1][0] == 6000
    assert "3 train (unfinished)" in made.folder


def test_a_step_folder_stands_for_its_run(make_run):
    run = make_run()
    assert report.build(step_folder(run, 2)) == report.build(run)


def test_a_step_folder_on_its_own_is_reported_alone(make_run, tmp_path):
    lone = step_folder(make_run(), 2).rename(tmp_path / "lone")
    made = report.build(lone)
    assert made.title == "lone"
    assert section(made, "Verdict").says.startswith(
        "After step 1 (prune): 10.64 % of the weights kept, accuracy 34.50 %"
    )


def test_a_missing_folder_is_an_error_that_names_the_nearest(make_run, tmp_path):
    make_run("resnet")
    with pytest.raises(FileError, match="Did you mean 'resnet'"):
        report.build(tmp_path / "resnett")


def test_a_file_or_a_foreign_folder_is_an_error_that_says_what_to_pass(make_run, tmp_path):
    with pytest.raises(FileError, match="is a file; pass the run folder"):
        report.build(make_run() / "run.json")
    with pytest.raises(FileError, match="not a run folder"):
        report.build(tmp_path)


def test_step_names_that_lead_out_of_the_run_folder_are_not_followed(make_run, tmp_path, edit):
    run, other = make_run(), make_run("other")
    edit(run / "run.json", steps=[{"number": 1, "do": "train", "folder": f"../other/{step_folder(other, 1).name}"}])
    assert "no step has begun" in report.build(run).folder


def test_the_same_network_on_both_sides_is_said_so(make_run, edit):
    run = make_run()
    edit(step_folder(run, 4) / "card.json", dense="x", pruned="x")
    assert section(report.build(run), "Verdict").more[0].startswith("Dense and pruned are the same network")


def test_a_result_no_better_than_chance_is_said_so(make_run, edit):
    run = make_run()
    edit(step_folder(run, 4) / "verdict.json", baselines={"random": {"value": 95.0, "unit": "%"}})
    assert "does not beat the random baseline" in section(report.build(run), "Baselines").says


def test_steps_from_two_machines_are_said_so(make_run, edit):
    run = make_run()
    edit(step_folder(run, 1) / "card.json", made_by={"secateur": "0.1.0", "torch": "2.12.0"})
    assert "PyTorch" in section(report.build(run), "Repeat").more[0]


def test_the_report_tells_how_to_repeat_the_run(make_run):
    run = make_run()
    texts = dict(section(report.build(run), "Repeat").texts)
    assert texts["Save as recipe.toml"] == (run / "recipe.toml").read_text()
    assert texts["Then run"] == "secateur run recipe.toml"


def test_verdict_lines_are_short_and_carry_the_intervals(make_run):
    lines = report.verdict_lines(make_run())
    assert lines[0].startswith("89.36 % of the prunable weights are zero")
    assert "Accuracy: 91.05 %, dense 91.66 %, −0.61 points (95 % interval −0.98 to −0.24)" in lines
    assert "Loss right after pruning: 1.834, dense 0.04210, +1.792, forecast +1.203" in lines
    assert len(report.verdict_lines(make_run("short", kinds=("train",)))) >= 2


def test_reports_land_where_they_are_asked_for(make_run, tmp_path):
    run = make_run()
    assert report.write(run) == run / "report.html"
    (tmp_path / "there").mkdir()
    assert report.write(run, tmp_path / "there") == tmp_path / "there" / "report.html"
    assert report.write(run, tmp_path / "new") == tmp_path / "new" / "report.html"
    page = report.write(run, tmp_path / "verdict.html")
    assert page == tmp_path / "verdict.html" and page.with_suffix(".json").is_file()
    with pytest.raises(UsageError, match=r"verdict\.html"):
        report.write(run, tmp_path / "verdict.pdf")


def test_writing_twice_gives_the_same_bytes(make_run):
    run = make_run()
    first = report.write(run).read_bytes()
    assert report.write(run).read_bytes() == first


def test_building_a_report_does_not_import_torch(make_run):
    code = (
        "import sys; from secateur import report; report.build(sys.argv[1]); "
        "report.verdict_lines(sys.argv[1]); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(make_run())], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_training_is_told_with_the_figures_of_the_cards(make_run, edit):
    run = make_run()
    assert "Training cost" not in [part.title for part in report.build(run).sections]
    steps = sorted(run.glob("*-train-*"))
    macs = {"dense": 4_000_000, "sparse": 1_000_000, "examples": 50}
    edit(steps[0] / "card.json", training_macs=macs, optimizer_bytes=123_000)
    edit(steps[1] / "card.json", training_macs={"uncounted": ["acdc"]})

    found = section(report.build(run), "Training cost")

    assert "1.000 M" in found.says and "25.00 %" in found.says and "step 3 not counted" in found.says
    texts = [[cell.text for cell in row] for row in found.table.rows]
    assert texts[0] == ["1 train", "50", "4.000 M", "1.000 M", "25.00 %", "123.0 kB", "61.2"]
    assert texts[1][2:5] == ["–", "–", "–"]
    assert "acdc" in found.more[0]
