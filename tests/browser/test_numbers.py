"""Walks every number of a real report: the page shows those of the JSON, and these are those of the run folder."""

import copy
import itertools

import pytest
from tests.browser.charts_kit import cells_of, chart_faults, charts, counted, sentences, tiles
from tests.browser.printed_kit import cell_faults, in_order, tokens
from tests.browser.tables_kit import NAMED, TABLES, Folder

from secateur.core.masks import Masks


@pytest.fixture(scope="module")
def folder(run):
    return Folder(run)


@pytest.fixture(scope="module")
def masks(folder):
    return Masks.load(folder.places[folder.of("train", "prune")[-1]["number"]] / "masks.safetensors")


def section(table, title):
    return next(part for part in table["sections"] if part["title"] == title)


def rows_of(grid):
    return [*grid["rows"], *([grid["total"]] if grid.get("total") else [])]


def tables(table):
    """The sections whose tables hold numbers."""
    for part in table["sections"]:
        if "table" in part and any(is_number(cell) for row in rows_of(part["table"]) for cell in row):
            yield part


def named(title, row):
    """The cells that tell which row it is."""
    return tuple(cell["text"] for cell in row[: NAMED.get(title, 1)])


def is_number(cell):
    return isinstance(cell.get("value"), int | float)


def table_faults(title, grid, wanted):
    """What is not so in a table, by row and heading; a number without a rule is a fault, as is a figure not shown."""
    heads, faults, left = [column.get("name", "") for column in grid["columns"]], [], dict(wanted)
    for row in rows_of(grid):
        name = named(title, row)
        rules = left.pop(name, None)
        if rules is None:
            faults.append((name, "no such row, or twice"))
            continue
        for head, cell in zip(heads, row, strict=True):
            if head in rules:
                faults += [(name, head, fault) for fault in cell_faults(cell, rules[head])]
            elif is_number(cell):
                faults.append((name, head, "no rule"))
        faults += [(name, head, "no column") for head in rules.keys() - set(heads)]
    return faults + [(name, "missing") for name in left]


def test_every_number_of_every_table_is_that_of_the_run_folder(table, folder):
    shown = {part["title"]: part["table"] for part in tables(table)}
    assert shown.keys() == TABLES.keys()
    for title, grid in shown.items():
        assert table_faults(title, grid, TABLES[title](folder)) == [], title


def exchanged(rows):
    """Two numbers of a row or of a column exchanged, or only their values, texts or intervals; then set back."""
    places = [(i, j) for i, row in enumerate(rows) for j, cell in enumerate(row) if is_number(cell)]
    for (i, j), (k, m) in itertools.combinations(places, 2):
        if (i == k or j == m) and rows[i][j]["value"] != rows[k][m]["value"]:
            one, two = rows[i][j], rows[k][m]
            rows[i][j], rows[k][m] = two, one
            yield (i, j), (k, m), "cell"
            rows[i][j], rows[k][m] = one, two
            for key in ("value", "text", "span"):
                if key in one and key in two and one[key] != two[key]:
                    one[key], two[key] = two[key], one[key]
                    yield (i, j), (k, m), key
                    one[key], two[key] = two[key], one[key]


def nudged(rows):
    """One number a little larger; then set back."""
    for i, row in enumerate(rows):
        for j, cell in enumerate(row):
            for key in ("value", "low", "high") if is_number(cell) else ():
                if isinstance(cell.get(key), int | float):
                    before, cell[key] = cell[key], cell[key] * 1.000001 + 1e-9
                    yield (i, j), key
                    cell[key] = before


@pytest.mark.parametrize("title", TABLES)
def test_the_walk_sees_numbers_exchanged_or_changed(table, folder, title):
    grid, wanted, seen = copy.deepcopy(section(table, title)["table"]), TABLES[title](folder), 0
    rows = rows_of(grid)
    for some in itertools.pairwise(rows) if len(rows) > 1 else [rows]:  # two rows at a time, which is faster
        part = {"columns": grid["columns"], "rows": list(some)}
        rules = {name: wanted[name] for row in some if (name := named(title, row)) in wanted}
        assert table_faults(title, part, rules) == []
        for place in itertools.chain(exchanged(part["rows"]), nudged(part["rows"])):
            seen += 1
            assert table_faults(title, part, rules), place
    assert seen >= 2 * len(rows) - 1
    del grid["rows"][0]
    assert table_faults(title, grid, wanted)


def drawn(table):
    """All charts but the masks, by section and title."""
    return {
        (part["title"], chart["title"]): chart
        for part in table["sections"]
        for chart in part.get("chart", [])
        if chart["kind"] != "heat"
    }


def test_every_chart_draws_the_figures_of_the_run_folder(table, folder):
    wanted, found = charts(folder), drawn(table)
    assert found.keys() == wanted.keys()
    for key, chart in found.items():
        assert chart_faults(chart, wanted[key]) == [], key


def numbers(nest, path=()):
    """Places of all numbers in a nest of lists."""
    for place, entry in enumerate(nest):
        if isinstance(entry, list):
            yield from numbers(entry, (*path, place))
        elif isinstance(entry, int | float):
            yield nest, place


def lists(chart):
    """The lists of numbers in a chart."""
    found = [chart[key] for key in ("values", "points", "edges", "kept", "pruned", "marks") if key in chart]
    return [*found, *(series["points"] for series in chart.get("series", []))]


def test_the_walk_sees_points_exchanged_or_changed(table, folder):
    wanted = charts(folder)
    for key, chart in copy.deepcopy(drawn(table)).items():
        places = [place for nest in lists(chart) for place in numbers(nest)]
        assert places, key
        for nest, place in places:
            before, nest[place] = nest[place], nest[place] * 1.000001 + 1e-9
            assert chart_faults(chart, wanted[key]), (key, place)
            nest[place] = before
        for (one, i), (two, j) in itertools.pairwise(places):
            if one[i] != two[j]:
                one[i], two[j] = two[j], one[i]
                assert chart_faults(chart, wanted[key]), (key, i, j)
                one[i], two[j] = two[j], one[i]
        assert chart_faults(chart, wanted[key]) == []


def test_masks_are_drawn_cell_by_cell(table, folder, masks):
    heats = section(table, "Masks")["chart"]
    assert [heat["title"] for heat in heats] == list(masks.keys())
    for heat in heats:
        mask, cells = masks[heat["title"]], cells_of(heat)
        assert cells == counted(mask, heat)
        assert sum(cells) == heat["kept"] == int(mask.sum()) and heat["shape"] == list(mask.shape)
        assert f"{int(mask.sum()):,} of {mask.numel():,} weights kept" in heat["says"]
    assert len({count for heat in heats for count in cells_of(heat)}) > 1


def test_the_counts_are_those_of_the_masks_themselves(table, folder, masks):
    wanted = {name: (int(mask.sum()), mask.numel()) for name, mask in masks.items()}
    wanted["all"] = (masks.kept, masks.total)
    grid = section(table, "Layers")["table"]
    heads = [column["name"] for column in grid["columns"]]
    kept, weights = heads.index("Kept"), heads.index("Weights")
    assert {row[0]["text"]: (row[kept]["value"], row[weights]["value"]) for row in rows_of(grid)} == wanted
    whole = section(table, "Scores")["chart"][0]
    below = folder.cut["scores"]["all"]["below"]
    assert (sum(whole["kept"]) + below[0], sum(whole["pruned"]) + below[1]) == (masks.kept, masks.total - masks.kept)


def test_tiles_are_figures_of_the_run_folder(table, folder):
    for title, wanted in tiles(folder).items():
        shown = section(table, title)["tiles"]
        assert [tile["label"] for tile in shown] == list(wanted)
        for tile in shown:
            want, beside = wanted[tile["label"]]
            assert want.shown(tile["text"]), tile
            found = tokens(tile.get("beside", ""))
            assert len(found) == len(beside) and in_order(found, beside), tile


def told(part):
    return [part["says"], *part.get("more", [])]


def said_rightly(sentence, wanted):
    return any(in_order(tokens(sentence), figures) for figures in wanted)


def test_every_number_in_a_sentence_is_a_figure_of_its_section(table, folder):
    seen = 0
    for title, wanted in sentences(folder).items():
        for sentence in told(section(table, title)):
            seen += len(tokens(sentence))
            assert said_rightly(sentence, wanted), (title, sentence, tokens(sentence))
    assert seen > 35


def test_a_wrong_number_in_a_sentence_is_seen(table, folder):
    for title, wanted in sentences(folder).items():
        for sentence in told(section(table, title)):
            for token in set(tokens(sentence)) - {"0"}:
                place = max(i for i, sign in enumerate(token) if sign.isdigit())
                wrong = f"{token[:place]}{(int(token[place]) + 5) % 10}{token[place + 1 :]}"
                assert not said_rightly(sentence.replace(token, wrong), wanted), (sentence, token)


def test_the_page_shows_what_the_json_says(visit, run, table):
    page = visit(run / "report.html")
    assert page.evaluate("JSON.parse(document.getElementById('report').textContent)") == table
    read = page.evaluate(
        """() => [...document.querySelectorAll("main > section")].map((part) => ({
            title: part.querySelector("h2").textContent,
            says: part.querySelector("p.says")?.textContent,
            tiles: [...part.querySelectorAll("dl.tiles > div")].map((tile) => tile.querySelector(".big").textContent),
            rows: [...part.querySelectorAll("div.scroll table tbody tr, div.scroll table tfoot tr")].map((row) =>
                [...row.cells].map((cell) => [
                    cell.firstChild.textContent, cell.querySelector("small")?.textContent ?? "",
                    cell.dataset.value ?? null,
                ])),
            bars: [...part.querySelectorAll("figure svg")].map((svg) => svg.textContent).join(" "),
            whole: part.textContent,
        }))"""
    )
    assert len(read) == len(table["sections"]) + bool(table.get("notes"))
    for part, shown in zip(read, table["sections"], strict=False):
        compare(part, shown)


def plain(text):
    return text.replace("\u00a0", " ")


def compare(part, shown):
    """One section of the page with its JSON."""
    assert (part["title"], plain(part["says"])) == (shown["title"], shown["says"])
    assert part["tiles"] == [tile["text"] for tile in shown.get("tiles", [])]
    assert all(sentence in plain(part["whole"]) for sentence in shown.get("more", []))
    grid = shown.get("table", {"rows": []})
    assert len(part["rows"]) == len(rows_of(grid))
    for cells_shown, row in zip(part["rows"], rows_of(grid), strict=True):
        for (text, span, value), cell, column in zip(cells_shown, row, grid["columns"], strict=True):
            assert plain(text) == cell["text"] and span == cell.get("span", "")
            if column.get("numeric") and cell.get("value") is not None:
                assert float(value) == float(cell["value"])
    for chart in shown.get("chart", []):
        if chart["kind"] == "bars":
            assert all(text in part["bars"] for text in chart["texts"])
