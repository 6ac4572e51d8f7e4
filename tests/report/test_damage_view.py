import json
import re

import numpy as np
import pytest
import torch
from tests.engine.damage_kit import Tagger, pruned
from tests.report.damage_kit import add_damage, made_up, measured, resample, rewrite
from tests.report.test_page import HOSTILE, Page, close

from secateur import report
from secateur.data import Dataset, Split
from secateur.engine.damage import damage
from secateur.report.exhibit_text import lines
from secateur.report.sections import EMPTY


@pytest.fixture
def damaged(make_run):
    """A run with a damage report, and its table."""
    run = add_damage(make_run())
    return run, json.loads((measured(run) / "damage.json").read_text())


def sections(run):
    return {section.title: section for section in report.build(run).sections}


def equal(cell, value, factor=1.0):
    """The cell is this number, and prints it to its last digit."""
    assert cell.value == pytest.approx(factor * value, rel=1e-12, abs=1e-12) and close(cell.text, cell.value)


def equal_reading(cell, entry, factor=1.0):
    equal(cell, entry["value"], factor)
    ends = [factor * entry[key] for key in ("low", "high")]
    assert [cell.low, cell.high] == pytest.approx(ends, rel=1e-12, abs=1e-12)
    assert all(close(text, end) for text, end in zip(cell.span.split(" to "), ends, strict=True))


def test_every_class_has_the_counts_and_the_change_of_the_file(damaged):
    run, table = damaged
    rows, found = table["changes"]["pruned"]["classes"], sections(run)["Damage"].table
    assert len(found.rows) == len(rows) == 3
    for cells, row in zip(found.rows, rows, strict=True):
        keys = ("name", "count", "right_before", "right_after", "only_before", "only_after")
        assert [cell.value for cell in cells[:6]] == [row[key] for key in keys]
        equal_reading(cells[6], row["change"])
    assert [cell.value for cell in found.total[1:4]] == [
        sum(row[key] for row in rows) for key in ("count", "right_before", "right_after")
    ]
    equal_reading(found.total[6], table["changes"]["pruned"]["accuracy"])


def test_flips_are_exact_integers_and_add_up(damaged):
    run, table = damaged
    flips, section = table["changes"]["pruned"]["flips"], sections(run)["Damage"]
    shown = {tile.label: tile.text for tile in section.tiles}
    assert [shown[label] for label in ("Right, now wrong", "Wrong, now right", "Wrong in another way")] == [
        str(flips[key]) for key in ("right_wrong", "wrong_right", "wrong_other")
    ]
    share = 100 * flips["agree"] / flips["count"]
    assert close(shown["Same answer"], share) and f"of {flips['count']} test examples" in section.says
    changed = sections(run)["Changed answers"]
    differing = sum(flips[key] for key in ("right_wrong", "wrong_right", "wrong_other"))
    assert changed.says.startswith(f"{differing} answers differ")
    pairs = [(row[0].value, row[1].value, row[2].value) for row in changed.table.rows]
    assert pairs == [(pair["label_name"], pair["answer_name"], pair["count"]) for pair in flips["pairs"]]


def test_the_most_hurt_class_is_said_to_be_so_only_when_its_interval_excludes_zero(damaged):
    run, table = damaged
    row = table["changes"]["pruned"]["classes"][1]

    def hurt(sentence):
        def change(table):
            table["changes"]["pruned"]["most_hurt"] = {"class": 1, "name": "kind 1", "sentence": sentence}

        rewrite(run, change)
        return sections(run)["Damage"].says

    says = hurt("Class kind 1 is hurt most.")
    assert f"Class kind 1 is hurt most: of {row['count']} the dense network has {row['right_before']} right" in says
    rows = table["changes"]["pruned"]["classes"]
    worst = min(rows, key=lambda row: row["change"]["value"])
    assert worst["change"]["value"] < 0 < worst["change"]["high"]
    says = hurt("")
    assert f"Class {worst['name']} loses most, −{abs(worst['change']['value']):.2f} points" in says
    assert "hurt most" not in says and "chance alone could explain that" in says


def test_calibration_has_the_figures_and_the_bins_of_the_file(damaged):
    run, table = damaged
    section = sections(run)["Calibration"]
    for cells, name in zip(section.table.rows, ("dense", "pruned"), strict=True):
        entry = table["calibration"][name]
        equal_reading(cells[1], entry["ece"])
        for cell, key, factor in zip(cells[2:], ("mce", "confidence", "accuracy", "nll", "brier"), (1, 100, 100, 1, 1),
                                     strict=True):  # fmt: skip
            equal(cell, entry[key], factor)
    reliability, confidence, margin = section.chart
    assert reliability.equal and confidence.log
    for series, name in zip(reliability.series, ("dense", "pruned"), strict=True):
        bins = [row for row in table["calibration"][name]["bins"] if row["count"]]
        wanted = sorted((100 * row["confidence"], 100 * row["accuracy"]) for row in bins)
        assert [tuple(point) for point in series.points] == [pytest.approx(pair) for pair in wanted]
    for chart, group, key in ((confidence, "calibration", "confidences"), (margin, "geometry", "margins")):
        for series, name in zip(chart.series, ("dense", "pruned"), strict=True):
            assert sum(y for _, y in series.points[:-1]) == 60
            bins = table[group][name][key]
            assert [x for x, _ in series.points] == bins["edges"]
            assert [y for _, y in series.points[:-1]] == [
                sum(p) for p in zip(bins["right"], bins["wrong"], strict=True)
            ]


def test_corruptions_have_a_line_each_and_charts_with_one_axis(damaged):
    run, table = damaged
    section, spoilt = sections(run)["Corruptions"], table["corruptions"]
    every = [{"corruption": "none", "severity": 0, **spoilt["clean"]}, *spoilt["rows"]]
    assert len(section.table.rows) == len(every) == 26
    for cells, row in zip(section.table.rows, every, strict=True):
        assert [cell.value for cell in cells[:2]] == [row["corruption"], row["severity"]]
        equal_reading(cells[3], row["accuracy"]["dense"])
        equal_reading(cells[4], row["accuracy"]["pruned"])
        equal_reading(cells[5], row["change"]["pruned"])
    assert len(section.chart) == 5 and {(chart.low, chart.high) for chart in section.chart} == {(0.0, 100.0)}
    noise = next(chart for chart in section.chart if chart.title == "Gaussian noise").series[1]
    assert [y for _, y in noise.points] == [
        row["accuracy"]["pruned"]["value"] for row in every if row["corruption"] in ("none", "gaussian noise")
    ]
    clear = sum(row["change"]["pruned"]["high"] < 0 for row in spoilt["rows"])
    assert section.says.startswith(f"In {clear} of 25 cases")


def test_the_geometry_table_has_the_figures_of_the_file(damaged):
    run, table = damaged
    rows = sections(run)["Features"].table.rows
    assert [(row[0].value, row[1].value) for row in rows] == [
        (metric, name) for metric in ("angle", "length", "margin") for name in ("dense", "pruned")
    ]
    for cells in rows:
        entry = table["geometry"][cells[1].value][cells[0].value]
        for cell, value in zip(cells[2:], (entry["mean"], entry["std"], *entry["quartiles"]), strict=False):
            equal(cell, value)
        assert cells[7].value == entry["undefined"]


def test_several_pruned_networks_have_sections_of_their_own_and_share_the_others(make_run):
    run = add_damage(make_run(), others=("wanda",))
    found = sections(run)
    assert {"Damage: pruned", "Damage: wanda", "Changed answers: wanda", "Calibration", "Features"} <= set(found)
    assert [row[0].value for row in found["Calibration"].table.rows] == ["dense", "pruned", "wanda"]
    assert [column.name for column in found["Corruptions"].table.columns][-2:] == ["Change: pruned", "Change: wanda"]
    assert found["Features"].explorer.networks == ("dense", "pruned", "wanda")


def test_the_page_and_its_json_hold_the_same_and_every_cell_prints_its_value(damaged):
    path = report.write(damaged[0])
    page, table = Page(path.read_text()), json.loads(path.with_suffix(".json").read_text())
    assert json.loads(page.scripts[0]) == table
    wanted = [s["table"] for s in table["sections"] if "table" in s]
    assert len(page.tables) == len(wanted)
    for drawn, one in zip(page.tables, wanted, strict=True):
        for line, cells in zip(drawn[1:], one["rows"] + ([one["total"]] if "total" in one else []), strict=True):
            assert [(c["text"], c["span"]) for c in line] == [(c["text"], c.get("span", "")) for c in cells]


def test_hostile_class_and_network_names_stay_text(make_run):
    run = add_damage(make_run(), names=tuple(HOSTILE[:3]), others=(HOSTILE[1], "y" * 500))
    text = report.write(run).read_text()
    page = Page(text)
    images = [attribute for attribute in page.attributes if attribute[0] == "img" and attribute[1] == "src"]
    assert images and all(value.startswith("data:image/png;base64,") for _, _, value in images)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert page.tags.count("script") == text.count("</script>")
    shown = [row[0]["text"] for table in page.tables for row in table]
    assert all(name in shown for name in HOSTILE[:3])


def test_a_run_that_was_not_asked_has_no_section_and_nothing_missing(make_run):
    run = make_run()
    assert not {"Damage", "Changed answers", "Calibration", "Corruptions", "Features"} & set(sections(run))
    assert not any("amage" in note for note in report.build(run).notes)


BROKEN = {
    "another format": ({"format": "secateur.damage/9"}, "is not of format"),
    "no networks": ({"variants": ["dense"]}, "does not name the networks"),
    "equal names": ({"variants": ["a", "a"]}, "does not name the networks"),
    "no changes": ({"changes": {}}, "holds no changes of network pruned"),
    "no calibration": ({"calibration": None}, "No calibration"),
    "reasons": ({"skipped": [{"what": "tsne of dense", "why": "<b>absent</b>"}]}, "tsne of dense: <b>absent</b>"),
    "another digest": ({"samples": {"digest": "0"}}, "is not the file that damage.json was written with"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_missing_is_noted_and_the_rest_is_shown(damaged, name):
    run, _ = damaged
    change, wanted = BROKEN[name]
    rewrite(run, lambda table: {**table, **change})
    made = report.build(run)
    assert any(wanted in note for note in made.notes), made.notes
    Page(report.write(run).read_text())


@pytest.mark.parametrize(
    "junk", [None, 7, "text", [], [3], {}, {"pruned": 1}, {"dense": [1], "pruned": {"classes": [1]}}]
)
def test_junk_in_the_table_never_stops_the_report(damaged, junk):
    run, table = damaged
    for key in [*table, None]:
        rewrite(
            run,
            lambda _, key=key: {**table, key: junk} if key else {k: junk for k in table} | {"format": table["format"]},
        )
        assert report.build(run).sections
    Page(report.write(run).read_text())


@pytest.mark.parametrize("content", [b"", b"{", b"\0" * 99], ids=["empty", "cut", "zeros"])
def test_damaged_files_are_left_out_with_a_note(damaged, content):
    run, table = damaged
    (measured(run) / "samples.safetensors").write_bytes(content)
    assert any("samples.safetensors" in note for note in report.build(run).notes)
    assert sections(run)["Damage"].table is not None and sections(run)["Features"].explorer is None
    (measured(run) / "samples.safetensors").unlink()
    assert any("is missing" in note for note in report.build(run).notes)
    (measured(run) / "damage.json").write_bytes(json.dumps(table).encode()[:-20])
    assert any("damage.json could not be read" in note for note in report.build(run).notes)


def test_metrics_that_are_undefined_and_places_that_are_missing_are_shown_as_such(damaged):
    run, _ = damaged

    def spoil(arrays):
        arrays["margin"][:] = np.nan
        arrays["tsne"][1] = np.nan
        return arrays

    def blank(table):
        table["geometry"]["pruned"]["margin"] = {"mean": None, "std": None, "quartiles": None, "undefined": 60}
        table["geometry"]["dense"] = None

    resample(run, spoil)
    rewrite(run, blank)
    found = sections(run)["Features"]
    assert found.table.rows[-1][2] is EMPTY and found.table.rows[-1][7].value == 60
    assert [view.name for view in found.explorer.views] == ["pca", "pca_own", "tsne"]
    Page(report.write(run).read_text())


def test_very_many_classes_are_cut_to_those_that_lost_most(damaged):
    run, table = damaged
    row = table["changes"]["pruned"]["classes"][0]

    def change(table):
        rows = []
        for k in range(500):
            reading = {**row["change"], "value": -0.1 * k, "low": -0.1 * k - 1, "high": -0.1 * k + 1}
            rows.append({**row, "class": k, "name": f"class {k}", "count": 2, "change": reading})
        table["changes"]["pruned"]["classes"] = rows

    rewrite(run, change)
    found = sections(run)["Damage"]
    assert [cells[0].value for cells in found.table.rows] == [f"class {k}" for k in range(499, 299, -1)]
    assert found.table.total[1].value == 1000 and len(found.chart[0].names) == 30
    assert "of 500 classes" in found.table.caption


def test_the_terminal_tells_the_same_in_80_columns(damaged):
    from tests.report.test_text import printed

    text = printed(damaged[0])
    gallery = sections(damaged[0])["Changed answers"].gallery
    assert re.sub(r"\s+", " ", gallery.items[0].name) in text and "Corruptions" in text
    assert max(map(len, text.splitlines())) <= 80


def test_two_thousand_pictures_of_two_networks_fit_in_the_page(make_run):
    run = add_damage(make_run())
    for kind in ("strokes", "noise"):
        resample(run, lambda _, kind=kind: made_up(2000, pictures=kind))
        assert report.write(run).stat().st_size < 2_500_000


def test_changed_answers_of_a_text_show_what_came_before(make_run):
    tokens = torch.randint(7, (9, 20), generator=torch.Generator().manual_seed(1))
    split, run = Split(tokens, tokens.roll(-1, 1)), make_run()
    letters = Dataset("letters", split, split, (*"abcdef", "\n"), "text")
    damage(Tagger(), pruned(Tagger()), letters, examples=60).write(measured(run))
    items = sections(run)["Changed answers"].gallery.items
    assert items
    for item in items:
        index, position = map(int, re.fullmatch(r"test sequence (\d+), token (\d+)", item.name).groups())
        assert item.text == "".join("abcdef\n"[t] for t in tokens[index, : position + 1]).replace("\n", "↵ ")
    assert f'<p class="before">{items[0].text}</p>' in report.write(run).read_text()
    assert f"after “{items[0].text}”" in "\n".join(lines(sections(run)["Changed answers"].gallery, None))
