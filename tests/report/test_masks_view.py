"""Heat maps of masks: counts against the masks themselves, the budget, damaged files and hostile names."""

import base64
import json
import shutil
import subprocess

import pytest
import torch

from secateur import report
from secateur.core.masks import Masks
from secateur.core.patterns import NM, Block, Unit
from secateur.report.count_text import bars, lines
from secateur.report.maskfile import NAME, Damaged, read_masks
from secateur.report.page import to_html
from secateur.report.sections import Heat
from secateur.report.views.masks import BUDGET, SIDE, drawn

HOSTILE = [
    "</script><img src=x onerror=alert(1)>.weight",
    "quote\"'&amp;.weight",
    "層🙂" + "x" * 500,
    "bell\x07\u202eevil",
]


def random_mask(shape, density, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


@pytest.fixture
def masked(make_run):
    """A run whose last network has the given masks."""

    def make(masks, **options):
        run = make_run(kinds=("train", "prune", "measure"), **options)
        Masks(masks).save(next(run.glob("2-*")) / NAME)
        return run

    return make


def section(made, title="Masks"):
    return next((s for s in made.sections if s.title == title), None)


def brute(mask, tall, wide):
    """Counts of kept weights by plain loops over cells."""
    matrix = mask.reshape(1, -1, 1) if mask.dim() < 2 else mask.reshape(mask.shape[0], mask.shape[1], -1)
    height, width = matrix.shape[:2]
    return [
        int(matrix[r : r + tall, c : c + wide].sum()) for r in range(0, height, tall) for c in range(0, width, wide)
    ]


@pytest.mark.parametrize("shape", [(10, 7), (130, 65), (16, 3, 3, 3), (70, 129, 5), (300,), (3, 1000), (1, 1)])
def test_every_cell_counts_the_kept_weights_in_it(masked, shape):
    mask = random_mask(shape, 0.3)
    mask.view(-1)[0] = True
    made = section(report.build(masked({"body.weight": mask, "other.weight": ~mask})))
    for heat, wanted in zip(made.chart, (mask, ~mask), strict=True):
        assert isinstance(heat, Heat) and heat.shape == shape
        rows, columns = -(-heat.height // heat.tall), -(-heat.width // heat.wide)
        assert max(rows, columns) <= SIDE and heat.height * heat.width * heat.depth == mask.numel()
        assert heat.counts() == brute(wanted, heat.tall, heat.wide)
        assert heat.kept == sum(heat.counts()) == int(wanted.sum())
        assert len(base64.b64decode(heat.data)) == rows * columns * heat.size


def test_a_small_tensor_has_a_cell_for_each_weight_and_a_kernel_for_each_pair(masked):
    matrix, conv = random_mask((40, 64), 0.2), random_mask((8, 6, 3, 3), 0.2)
    made = section(report.build(masked({"fc.weight": matrix, "conv.weight": conv})))
    assert made.chart[0].counts() == matrix.int().flatten().tolist()
    assert made.chart[1].counts() == conv.sum((2, 3)).flatten().tolist()


def test_counts_too_large_for_a_byte_take_more(tmp_path):
    mask = torch.ones(1024, 1030, dtype=torch.bool)
    mask[:300] = False
    Masks({"w": mask}).save(tmp_path / NAME)
    (heat,) = drawn(read_masks(tmp_path / NAME))
    assert heat.size == 2 and heat.counts() == brute(mask, heat.tall, heat.wide) and max(heat.counts()) > 255


def test_two_hundred_tensors_stay_in_the_budget(masked):
    masks = {f"blocks.{i}.conv.weight": random_mask((96, 96, 3, 3), 0.1, i) for i in range(200)}
    made = report.build(masked(masks))
    pictures = section(made).chart
    assert len(pictures) == 200 and {(p.tall, p.wide) for p in pictures} == {(3, 3)}  # 32 cells a side, not 64
    assert [p.kept for p in pictures] == [int(mask.sum()) for mask in masks.values()]
    alone = report.Report(made.title, made.folder, (section(made),))
    assert sum(len(p.data) for p in pictures) <= BUDGET
    assert len(to_html(alone).encode()) < 1_000_000


def test_the_file_is_read_as_the_masks_wrote_it_and_patterns_are_seen(tmp_path):
    score = torch.rand(32, 64, generator=torch.Generator().manual_seed(1))
    masks = {
        "nm": NM(2, 4).mask(score, 1024), "block": Block(4, 1).mask(score, 100), "unit": Unit().mask(score, 9),
        "single": score > 0.5, "dense": score > -1, "empty": score > 2, "columns": (score[:1] > 0.5).expand(32, 64),
        "kernels": (score[..., None, None] > 0.7).expand(32, 64, 3, 3),
    }  # fmt: skip
    Masks(masks).save(tmp_path / NAME)
    found = {mask.name: mask for mask in read_masks(tmp_path / NAME)}
    for name, mask in masks.items():
        bits = found[name].rows(0, found[name].height)
        assert torch.equal(torch.from_numpy(bits.copy()).bool().reshape(mask.shape), mask)
    assert {name: mask.pattern() for name, mask in found.items()} == {
        "nm": "2:4", "block": "4 × 1 blocks", "unit": "rows", "single": "unstructured", "dense": "dense",
        "empty": "empty", "columns": "columns", "kernels": "kernels",
    }  # fmt: skip


@pytest.mark.parametrize("spoil", ["bit", "cut", "text", "shape"])
def test_a_damaged_file_becomes_a_note(masked, spoil):
    run = masked({"w": random_mask((20, 20), 0.5)})
    path = next(run.glob("2-*")) / NAME
    content = path.read_bytes()
    if spoil == "bit":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif spoil == "cut":
        path.write_bytes(content[:-9])
    elif spoil == "text":
        path.write_text("no tensors here")
    else:
        path.write_bytes(content.replace(b"[20, 20]", b"[90, 90]"))
    with pytest.raises(Damaged):
        read_masks(path)
    made = report.build(run)
    assert section(made) is None
    assert any(NAME in note for note in made.notes)


def test_a_dense_network_and_a_run_without_masks_have_no_pictures(make_run):
    run = make_run(kinds=("train",))
    assert section(report.build(run)) is None
    Masks({"w": torch.ones(4, 4, dtype=torch.bool)}).save(next(run.glob("1-*")) / NAME)
    assert section(report.build(run)) is None


def test_the_terminal_shows_a_row_of_blocks_for_each_tensor(masked):
    mask = torch.zeros(24, 10, dtype=torch.bool)
    mask[12:, :5] = True
    made = section(report.build(masked({"fc.weight": mask})))
    text = lines(made.chart)
    assert text[1].split() == ["fc.weight", "████████████", "25.00", "%"]
    assert made.chart[0].profile == (0.0,) * 12 + (0.5,) * 12
    assert bars([]) == "" and bars([0, 0]) == "  "


def browsed(page, tmp_path):
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
    done = subprocess.run([browser, *options, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


SCRIPT = """
dispatchEvent(new Event("beforeprint"));
const canvases = [...document.querySelectorAll("figure.heat canvas")];
const pixels = (canvas) => {
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  return Array.from({ length: data.length / 4 }, (_, i) => data.slice(4 * i, 4 * i + 3).join());
};
const colours = canvases.map((canvas) => [canvas.width, canvas.height, pixels(canvas)]);
document.querySelector(".picture").click();
const field = document.querySelector(".heat-field");
const told = [];
for (const key of ["", "ArrowRight", "ArrowDown", "End", "ArrowRight", "Home", "ArrowUp", "ArrowUp"]) {
  if (key) field.dispatchEvent(new KeyboardEvent("keydown", { key }));
  told.push(document.querySelector(".told").textContent);
}
const node = document.createElement("pre");
node.id = "found";
node.textContent = JSON.stringify({ colours, told, open: document.querySelector("dialog").open });
document.body.append(node);
"""


def test_the_script_draws_the_counts_and_arrow_keys_tell_them(masked, tmp_path):
    masks = {name: random_mask((5, 4), 0.4, i) for i, name in enumerate(HOSTILE)}
    path = report.write(masked(masks))
    text = path.read_text()
    strict, console = browsed(path, tmp_path)
    assert console == [] and "<img" not in strict.split('id="report"')[0]
    # Stands in for a reader; the policy of the page would not let it run.
    policy = text.index('<meta http-equiv="Content-Security-Policy"')
    text = text[:policy] + text[text.index("\n", policy) :]
    path.write_text(text.replace("</body></html>", f"<script>{{{SCRIPT}}}</script></body></html>"))
    dom, console = browsed(path, tmp_path)
    assert console == []
    found = json.loads(dom.split('<pre id="found">')[1].split("</pre>")[0])
    for (width, height, pixels), mask in zip(found["colours"], masks.values(), strict=True):
        assert (width, height) == (4, 5)
        assert len(set(pixels)) == 2
        assert [pixel == pixels[mask.flatten().tolist().index(True)] for pixel in pixels] == mask.flatten().tolist()
    first = next(iter(masks.values()))
    places = [(0, 0), (0, 1), (1, 1), (1, 3), (1, 3), (1, 0), (0, 0), (0, 0)]
    shares = [f"{int(first[r, c])} of 1 kept ({100 * int(first[r, c])}.00 %)" for r, c in places]
    assert found["told"] == [f"row {r}, column {c}: {s}" for (r, c), s in zip(places, shares, strict=True)]
    assert found["open"]
