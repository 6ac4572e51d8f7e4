import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from secateur import report

HOSTILE = ["[red]loud[/red].weight", "a\x1b[31mb\u202ec", "층.вес", "x" * 500, "[/]", "line\nbreak"]


def printed(run, encoding="utf-8", width=80):
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, newline="\n")
    report.show(run, Console(file=file, width=width))
    file.flush()
    return raw.getvalue().decode(encoding)


def test_the_terminal_shows_every_section_in_80_columns(make_run):
    text = printed(make_run())
    for title in ("Verdict", "Baselines", "Layers", "Training", "Forecast and truth", "Left alone", "Repeat"):
        assert f"\n{title}" in text
    assert "91.05 %" in text and "−0.98 to −0.24" in text and "187.7 kB" in text
    assert max(map(cell_len, text.splitlines())) <= 80


def test_every_number_of_the_narrow_columns_is_printed_whole(make_run):
    run = make_run()
    text = printed(run)
    table = next(s for s in report.build(run).sections if s.title == "Layers").table
    for cells in (*table.rows, table.total):
        for cell, column in zip(cells, table.columns, strict=True):
            assert not column.numeric or cell.text in text


@pytest.mark.parametrize("kinds", [("train",), ("prune",), ("measure",), ("train", "prune")])
def test_short_runs_print_and_tell_what_is_missing(make_run, kinds):
    assert "What is missing" in printed(make_run(kinds=kinds))


def test_hostile_names_print_as_plain_text(make_run, layers):
    named = [{**row, "name": name} for row, name in zip(layers, HOSTILE, strict=False)]
    text = printed(make_run(layers=named))
    assert "[red]loud[/red].weight" in text and "층.вес" in text
    assert "\x1b" not in text and "\u202e" not in text
    assert max(map(cell_len, text.splitlines())) <= 80


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_without_unicode_gets_plain_characters(make_run, encoding):
    text = printed(make_run(), encoding)
    assert "-0.61 points" in text or "−0.61 points" in text
    assert "▁" not in text
