"""How a page about 200 layers and 10,000 examples feels: seconds until it is open, milliseconds until a brush is seen.

A vision transformer of 50 blocks is trained on a little of MNIST and pruned; all 10,000 test images are samples.
Chromium opens the page from the disk and a mouse draws a rectangle over the points; the browser's own clock counts.

    python benchmarks/bench_report_page.py RUNS [--data-dir FOLDER] [--write docs/results/report-page.md]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

from secateur.cli.main import main as command

RECIPE = """secateur = "0.1"

[model]
use = "vit_tiny"
patch = 14
dim = 16
depth = 50
heads = 2

[data]
use = "mnist"
train = 2000
batch = 100

[[step]]
do = "train"
optimizer = "adamw"
lr = 2e-3
epochs = 1

[[step]]
do = "prune"
to = "sparsity 0.7"

[[step]]
do = "measure"
damage = true
samples = 10000
"""
OPENINGS, MOVES = 5, 120
# Times drawings alone: an idle frame costs nothing and would make brushing look better than it is. A message posted
# in a frame arrives when the frame has been laid out and painted. Of several movements drawn at once the oldest counts.
CLOCK = """() => {
    const found = window.brushing = { waits: [], scripts: [] }, painted = new MessageChannel();
    const frame = window.requestAnimationFrame, pen = CanvasRenderingContext2D.prototype, put = pen.putImageData;
    let moved = null, drawn = false;
    painted.port1.onmessage = (event) => found.waits.push(performance.now() - event.data);
    addEventListener("mousemove", (event) => { moved ??= event.timeStamp; }, true);
    pen.putImageData = function (...rest) {
        drawn = true;
        return put.apply(this, rest);
    };
    window.requestAnimationFrame = (act) => frame.call(window, (now) => {
        const begun = performance.now();
        drawn = false;
        act(now);
        if (!drawn) return;
        found.scripts.push(performance.now() - begun);
        if (moved !== null) painted.port2.postMessage(moved);
        moved = null;
    });
}"""
TOLD = """() => new Promise((done) => requestAnimationFrame(() => setTimeout(() => done(window.brushing))))"""
READY = """() => {
    const one = document.querySelector(".said");
    return one !== null && one.textContent.includes("selected") ? performance.now() : null;
}"""


def make(folder: Path, data_dir: str | None) -> Path:
    """The run; made once."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "report-page.toml"
    recipe.write_text(RECIPE)
    out = folder / "report-page"
    if command(["run", str(recipe), "-o", str(out), *(["--data-dir", data_dir] if data_dir else [])]):
        raise SystemExit("the run failed")
    return out / "report.html"


def opened(page: Page, path: Path) -> dict[str, float]:
    """Seconds from asking for the page: until it is parsed, until all is loaded, until the points can be brushed."""
    page.goto(path.resolve().as_uri(), wait_until="commit")
    ready = page.wait_for_function(READY, polling=10).json_value()
    entry = page.evaluate("() => performance.getEntriesByType('navigation')[0].toJSON()")
    paint = page.evaluate("() => performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? null")
    found = {
        "first paint": paint,
        "parsed": entry["domContentLoadedEventEnd"],
        "loaded": entry["loadEventEnd"],
        "points ready": ready,
    }
    return {name: value / 1e3 for name, value in found.items() if value}


def brushed(page: Page) -> dict[str, list[float]]:
    """Milliseconds of each drawing while a rectangle grows over the points and is pulled about.

    ``waits`` go from the movement of the mouse to the end of the frame that shows it, ``scripts`` are those that the
    drawing itself took: marking the samples, both panels and the histograms.
    """
    stage = page.locator(".stage").first
    stage.scroll_into_view_if_needed()
    box = stage.bounding_box()
    assert box is not None
    x, y, w, h = box["x"], box["y"], box["width"], box["height"]
    page.mouse.move(x + 4, y + 4)
    page.evaluate(CLOCK)  # before the brush listens, for it keeps the movements to itself
    page.mouse.down()
    page.mouse.move(x + 20, y + 20)
    for k in range(MOVES):
        share = 0.1 + 0.85 * (1 - abs(1 - 2 * k / MOVES))
        page.mouse.move(x + share * w, y + share * h)
    page.mouse.up()
    return page.evaluate(TOLD)


def measure(path: Path) -> dict[str, Any]:
    """Figures of several openings and of one long brush."""
    program = next(found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name)))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        openings = []
        for _ in range(OPENINGS):
            page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
            openings.append(opened(page, path))
            brush = brushed(page)
            told = page.locator(".said").first.inner_text()
            page.context.close()
        version = browser.version
        browser.close()
    table = json.loads(path.with_suffix(".json").read_text())
    explorer = next(part["explorer"] for part in table["sections"] if part.get("explorer"))
    layers = next(part["table"]["rows"] for part in table["sections"] if part["title"] == "Layers")
    return {
        "layers": len(layers), "points": explorer["count"], "bytes": path.stat().st_size, "browser": version,
        "told": told,
        "open": {name: statistics.median(one[name] for one in openings) for name in openings[0]},
        "worst open": {name: max(one[name] for one in openings) for name in openings[0]},
        **{name: sorted(values) for name, values in brush.items()},
    }  # fmt: skip


def page_of(found: dict[str, Any]) -> str:
    """The figures as a page."""
    rows = "".join(
        f"| {name} | {found['open'][name]:.2f} | {found['worst open'][name]:.2f} |\n" for name in found["open"]
    )
    times = "".join(
        f"| {name} | {statistics.median(ms):.1f} | {ms[int(0.95 * (len(ms) - 1))]:.1f} | {ms[-1]:.1f} |\n"
        for name, ms in (("from the movement to the end of its frame", found["waits"]), ("script", found["scripts"]))
    )
    late, size = sum(ms > 100 for ms in found["waits"]), found["bytes"] / 1e6
    return f"""# How a large report feels

A report of {found["layers"]} layers and {found["points"]:,} points for each of two networks, {size:.2f} MB, in Chromium
{found["browser"]} without a graphics processor, on {os.cpu_count()} cores ({platform.machine()}), read from the disk.
Everything is measured by the browser's own clock.

| seconds from asking for the page until | median of {OPENINGS} | slowest |
|---|---|---|
{rows}
A rectangle is drawn over the points by {MOVES} movements of a mouse, which {len(found["scripts"])} drawings follow; a
drawing that comes late shows several movements at once, and the oldest counts. Frames without a drawing do not count.

| milliseconds of a drawing | median | 95th percentile | longest |
|---|---|---|---|
{times}
{late} of {len(found["waits"])} drawings were seen later than 100 milliseconds after the movement.

The goals are 3 seconds and 100 milliseconds. Made by

    python benchmarks/bench_report_page.py runs --write docs/results/report-page.md
"""


def main() -> None:
    """Make the run, measure its page, tell the figures."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("folder", type=Path)
    p.add_argument("--data-dir")
    p.add_argument("--write", type=Path)
    request = p.parse_args()
    text = page_of(measure(make(request.folder, request.data_dir)))
    print(text)
    if request.write:
        request.write.write_text(text)


if __name__ == "__main__":
    main()
