import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib.resources import files

import pytest

from secateur import report

VOID = {"meta", "link", "br", "img", "hr", "input"}
HOSTILE = [
    "<script>alert(1)</script>.weight",
    "</script><img src=x onerror=alert(1)>",
    "<!--<script>",
    "quote\"'&amp;.weight",
    "слой.вес 層 🙂",
    "x" * 500,
    "bell\x07\x1b[31m\u202eevil",
    "lone\ud800",
]
SUFFIX = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}


class Page(HTMLParser):
    """Tables with their cells, tiles, tags and scripts of a page; checks that elements close in order."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.tiles, self.tags, self.attributes, self.scripts, self.open = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        attributes = dict(attrs)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append({"text": "", "span": "", "value": attributes.get("data-value")})
        elif tag == "dd" and attributes.get("class") == "big":
            self.tiles.append("")
        elif tag == "script":
            self.scripts.append("")
        if tag not in VOID:
            self.open.append((tag, attributes))

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        names = [tag for tag, _ in self.open]
        if "script" in names:
            self.scripts[-1] += data
        elif "summary" in names:
            return
        elif "td" in names or "th" in names:
            cell = self.tables[-1][-1][-1]
            cell["span" if "small" in names else "text"] += data
        elif self.open and self.open[-1][1].get("class") == "big":
            self.tiles[-1] += data


@pytest.fixture
def pages(make_run):
    """The parsed page, the JSON beside it and the page's text."""

    def make(**options):
        path = report.write(make_run(**options))
        text = path.read_text(encoding="utf-8")
        return Page(text), json.loads(path.with_suffix(".json").read_text(encoding="utf-8")), text

    return make


def as_printed(text):
    """Value and half a unit of the last digit of a printed number, read independently of how it was written."""
    found = re.match(r"([+−]?[\d,]*\.?\d+(?:e[+−]?\d+)?) ?([kMG]?B?)?", text)
    mantissa, _, power = found[1].replace("−", "-").replace(",", "").partition("e")
    factor = SUFFIX[found[2] or ""] * 10.0 ** int(power or 0)
    places = len(mantissa.partition(".")[2])
    return float(mantissa) * factor, 0.5 * 10.0**-places * factor


def close(text, value):
    shown, half = as_printed(text)
    return abs(shown - value) <= half * (1 + 1e-9) + 1e-12 * abs(value)


def test_every_number_on_the_page_equals_the_json_to_the_printed_digit(pages):
    page, table, _ = pages()
    tables = [s["table"] for s in table["sections"] if "table" in s]
    assert len(page.tables) == len(tables) >= 7
    numbers = 0
    for drawn, wanted in zip(page.tables, tables, strict=True):
        assert [c["text"] for c in drawn[0]] == [c["name"] if "name" in c else "" for c in wanted["columns"]]
        lines = wanted["rows"] + ([wanted["total"]] if "total" in wanted else [])
        for line, cells in zip(drawn[1:], lines, strict=True):
            for shown, cell in zip(line, cells, strict=True):
                assert (shown["text"], shown["span"]) == (cell["text"], cell.get("span", ""))
                if shown["value"] is None or isinstance(cell["value"], str):
                    continue
                assert float(shown["value"]) == cell["value"]
                assert close(shown["text"], cell["value"]), (shown, cell)
                numbers += 1
                if "span" in cell:
                    low, high = cell["span"].split(" to ")
                    assert close(low, cell["low"]) and close(high, cell["high"])
    assert numbers > 100
    tiles = [tile["text"] for section in table["sections"] for tile in section.get("tiles", [])]
    assert page.tiles == tiles and len(tiles) == 4


def test_the_json_inside_the_page_is_the_json_beside_it(pages):
    page, table, _ = pages()
    assert json.loads(page.scripts[0]) == table
    assert table["format"] == "secateur.report/1"


def test_hostile_names_stay_text(pages, layers):
    named = [{**row, "name": name} for row, name in zip(layers, HOSTILE, strict=False)]
    page, table, text = pages(layers=named)
    assert page.tags.count("script") == 2 and "img" not in page.tags
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    section = next(s for s in table["sections"] if s["title"] == "Layers")
    shown = [row[0]["text"] for row in section["table"]["rows"]]
    assert shown[:6] == HOSTILE[:6]
    assert shown[6:] == ["bell\ufffd\ufffd[31m\ufffdevil", "lone\ufffd"]
    for bad in ("\x1b", "\u202e", "\x07"):
        assert bad not in text
    layer_table = page.tables[[s["title"] for s in table["sections"] if "table" in s].index("Layers")]
    assert [row[0]["text"] for row in layer_table[1:7]] == HOSTILE[:6]


def test_a_hostile_title_and_recipe_stay_text(make_run, edit):
    run = make_run()
    edit(run / "run.json", title="</title><script>alert(1)</script>")
    (run / "recipe.toml").write_text("# </pre></script><script>alert(1)</script>")
    assert Page(report.write(run).read_text()).tags.count("script") == 2


def test_the_page_loads_nothing_and_is_small(pages, layers):
    many = [{**row, "name": f"block{i}.{row['name']}"} for i, row in enumerate(layers * 5)]
    page, _, text = pages(layers=many)
    assert len(text.encode()) < 200_000
    links = [value for _, name, value in page.attributes if name in ("href", "src", "srcset", "action", "data")]
    assert links and all(value.startswith("#") or value == "data:," for value in links)
    assert not re.search(r"https?://|@import|url\(", text)


def test_links_lead_to_sections_and_ids_are_unique(pages):
    page, _, _ = pages()
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = [value[1:] for tag, name, value in page.attributes if tag == "a" and name == "href"]
    assert targets and set(targets) <= set(ids)


def test_notes_are_listed_on_the_page(make_run):
    run = make_run(kinds=("train",))
    text = report.write(run).read_text()
    for note in report.build(run).notes:
        assert note.split(":")[0] in text.replace("\u00a0", " ")
    assert "What is missing" in text


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, two):
    high, low = sorted((luminance(one), luminance(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_curves_have_the_contrast_that_wcag_asks_for(scheme):
    css = files("secateur.report").joinpath("assets", "page.css").read_text()
    block = css.split("prefers-color-scheme: dark")[1 if scheme == "dark" else 0]
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block.split("* {")[0]))
    for name in ("ink", "soft", "link", "good", "bad", "even"):
        assert min(contrast(colours[name], colours[ground]) for ground in ("paper", "card")) >= 4.5, name
    for name in ("c0", "c1", "c2", "c3"):
        assert contrast(colours[name], colours["paper"]) >= 3, name


def dumped(page, tmp_path, *more):
    """The page as Chromium holds it after its script has run, and what the console said."""
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium on PATH")
    options = [
        "--headless",
        "--disable-gpu",
        "--no-sandbox",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path}/b",
    ]
    command = [browser, *options, *more, "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_a_browser_opens_the_page_without_a_console_error(make_run, layers, tmp_path):
    named = [{**row, "name": name} for row, name in zip(layers, HOSTILE, strict=False)]
    dom, console = dumped(report.write(make_run(layers=named)), tmp_path)
    assert console == []
    assert dom.count('<button type="button">') == 7
    assert "alert(1)</script>" not in dom.split('id="report"')[0]


def test_headings_sort_the_table_by_value_and_say_so(make_run, tmp_path):
    page = report.write(make_run())
    text = page.read_text()
    # Stands in for a reader's second click on "Kept"; the policy of the page would not let it run.
    click = 'document.querySelectorAll("[data-sortable] button")[3].click();' * 2
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    page.write_text(text.replace("</body>", f"<script>{click}</script></body>"))
    dom, console = dumped(page, tmp_path)
    assert console == []
    body = dom.split("<table data-sortable")[1].split("<tbody>")[1].split("</tbody>")[0]
    kept = [[int(v) for v in re.findall(r'data-value="(\d+)"', row)][1] for row in body.split("<tr>")[1:]]
    assert kept == sorted(kept) and len(kept) == 20
    assert re.search(r'aria-sort="ascending"[^>]*><button type="button">Kept', dom)
