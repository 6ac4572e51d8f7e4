"""The filter box and the CSV of long tables, as a browser runs them."""

import csv
import io
import json
import shutil
import subprocess

import pytest

from secateur import report
from secateur.report.sections import Cell, Column, Table

SCRIPT = """
const saved = [];
window.Blob = function (parts) { saved.push(parts.join("")); };
URL.createObjectURL = () => "blob:none";
HTMLAnchorElement.prototype.click = () => {};
const [box] = document.querySelectorAll("#layers .tools input");
const told = document.querySelector("#layers .tools [role=status]");
const counts = [];
const asked = ["", "stage1", "STAGE1 conv2", "kept<100", "weights >= 36,864", "stage2 weights=9216", "none such"];
for (const words of asked) {
  box.value = words;
  box.dispatchEvent(new Event("input"));
  const shown = [...document.querySelectorAll("#layers tbody tr")].filter((row) => !row.hidden);
  counts.push([words, shown.map((row) => row.cells[0].textContent), told.textContent]);
}
box.value = "stage1";
box.dispatchEvent(new Event("input"));
document.querySelector("#layers .tools button").click();
const node = document.createElement("pre");
node.id = "found";
node.textContent = JSON.stringify({ counts, text: saved[0], tables: document.querySelectorAll(".tools").length });
document.body.append(node);
"""


@pytest.fixture
def asked(tmp_path):
    """What the page answers to a reader who filters and downloads."""
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium on PATH")

    def ask(page):
        # Stands in for a reader; the policy of the page would not let it run.
        text = page.read_text()
        policy = text.index('<meta http-equiv="Content-Security-Policy"')
        text = text[:policy] + text[text.index("\n", policy) :]
        page.write_text(text.replace("</body></html>", f"<script>{{{SCRIPT}}}</script></body></html>"))
        options = ["--headless", "--disable-gpu", "--no-sandbox", f"--user-data-dir={tmp_path}/b"]
        done = subprocess.run(
            [browser, *options, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0
        body = done.stdout.split('<pre id="found">')[1].split("</pre>")[0]
        for entity, sign in (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
            body = body.replace(entity, sign)
        return json.loads(body)

    return ask


def test_rows_are_filtered_by_words_and_figures_and_written_as_csv(make_run, layers, asked):
    layers[2]["name"] = '=stage1."x",<b>'
    found = asked(report.write(make_run(layers=layers)))
    names = [row["name"] for row in layers]
    wanted = {
        "": names,
        "stage1": [n for n in names if "stage1" in n],
        "STAGE1 conv2": [n for n in names if "stage1" in n and "conv2" in n],
        "kept<100": [r["name"] for r in layers if r["kept"] < 100],
        "weights >= 36,864": [r["name"] for r in layers if r["weights"] >= 36864],
        "stage2 weights=9216": [r["name"] for r in layers if "stage2" in r["name"] and r["weights"] == 9216],
        "none such": [],
    }
    for words, shown, told in found["counts"]:
        assert (shown, told) == (wanted[words], f"{len(wanted[words])} of {len(names)} rows"), words
    rows = list(csv.reader(io.StringIO(found["text"].lstrip("\ufeff"))))
    assert rows[0][:4] == ["Tensor", "Shape", "Weights", "Kept"]
    kept = [r for r in layers if "stage1" in r["name"]]
    assert [row[0].removeprefix("'") for row in rows[1:]] == [r["name"] for r in kept]
    assert rows[2][0].startswith("'=")
    assert [[float(v) for v in row[2:4]] for row in rows[1:]] == [[r["weights"], r["kept"]] for r in kept]
    assert found["tables"] == 1


def test_short_tables_have_no_tools_unless_they_are_worth_saving(make_run, layers):
    columns = (Column("Name"), Column("Figure", True))
    rows = tuple((Cell(str(i), str(i)), Cell(i, str(i))) for i in range(9))
    tools = [Table("", columns, rows[:n], sortable=True).tools for n in (0, 8, 9)]
    assert tools == [False, False, True] and not Table("", columns, rows).tools
    assert Table("", columns, rows[:1], sortable=True, saved=True).tools
    page = report.write(make_run("short", layers=layers[:2])).read_text()
    assert page.count("data-sortable data-tools aria-label") == 1
