import contextlib
import re
import shutil
import signal
import subprocess
import sys
import threading

import pytest
from tests.report.conftest import full_run

from secateur.report.live import Watched
from secateur.report.serving import Server

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect

RECIPE = """secateur = "0.1"

[model]
use = "mlp"
widths = [32]

[data]
use = "digits"
batch = 50
train = 500
test = 200

[[step]]
do = "train"
epochs = 20000
lr = 0.05
"""


@contextlib.contextmanager
def serving(folder):
    with Server(Watched([folder]), port=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.url
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def runs(tmp_path):
    full_run(tmp_path / "runs" / "<b>finished & done</b>")
    return tmp_path / "runs"


@pytest.fixture
def training(runs):
    """A run in progress, which would go on for hours."""
    (runs.parent / "long.toml").write_text(RECIPE)
    words = [sys.executable, "-m", "secateur.cli.main", "run", str(runs.parent / "long.toml"), "-o", str(runs / "long")]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(words, **quiet) as process:
        yield process
        if process.poll() is None:
            process.kill()


@pytest.mark.processes
def test_a_run_in_progress_is_followed_until_it_is_stopped(visit, shot, runs, training):
    with serving(runs) as url:
        page = visit(url)
        row = page.locator("#runs tr", has=page.get_by_role("button", name="runs/long"))
        row.locator(".state.running").wait_for()
        row.get_by_role("button").click()
        page.locator("#charts figure", has_text="Accuracy").wait_for()
        epoch = row.locator("td").nth(2)
        expect(epoch).to_have_text(re.compile(r"^\d+ of 20000$"))
        before = epoch.inner_text()
        expect(epoch).not_to_have_text(before)
        assert int(epoch.inner_text().split()[0]) > int(before.split()[0])
        path = page.locator("#charts path").first
        expect(path).not_to_have_attribute("d", path.get_attribute("d"))
        shot(page, "watch-running")
        training.send_signal(signal.SIGINT)
        training.wait()
        row.locator(".state.unfinished").wait_for()
        expect(page.locator("#run-says")).to_contain_text("unfinished")


def test_a_finished_run_is_drawn_with_its_prunings_and_names_stay_text(visit, shot, runs):
    with serving(runs) as url:
        page = visit(url, color_scheme="dark")
        page.locator("#charts figure").first.wait_for()
        assert page.locator("#run-title").inner_text() == "runs/<b>finished & done</b>"
        assert page.locator("#runs b").count() == 0
        titles = page.locator("#charts h3").all_inner_texts()
        assert titles == ["Loss", "Accuracy", "Sparsity"]
        assert page.locator("#charts figure").first.locator("line.mark title").all_text_contents() == ["step 2: prune"]
        assert re.fullmatch(r".*test accuracy 91\.05\.", page.locator("#charts figure p").nth(1).inner_text())
        shot(page, "watch-dark")


def test_a_half_written_line_a_deleted_run_and_a_new_one(visit, runs):
    full_run(runs / "second", kinds=("train",))
    with serving(runs) as url:
        page = visit(url)
        page.get_by_role("button", name="runs/second").click()
        expect(page.locator("#run-title")).to_have_text("runs/second")
        with open(next((runs / "second").glob("1-train-*")) / "metrics.jsonl", "a") as file:
            file.write('{"step": 4001, "test/accuracy": 12.5}\n{"step": 4002, "test/acc')
        expect(page.locator("#charts")).to_contain_text("test accuracy 12.5")
        full_run(runs / "third", kinds=("train",))
        page.get_by_role("button", name="runs/third").wait_for()
        shutil.rmtree(runs / "second")
        page.get_by_role("button", name="runs/second").wait_for(state="detached")
        expect(page.locator("#run-says")).to_contain_text("is gone")


def test_the_list_is_filtered_and_reached_by_keyboard(visit, runs):
    full_run(runs / "second", kinds=("train",))
    with serving(runs) as url:
        page = visit(url)
        page.get_by_role("button", name="runs/second").wait_for()
        page.get_by_role("searchbox").fill("SECOND finished")
        assert page.locator("#runs tr").count() == 1
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "runs/second"
        page.keyboard.press("Enter")
        expect(page.locator("#run-title")).to_have_text("runs/second")


def test_a_server_that_went_away_is_told(visit, runs):
    with serving(runs) as url:
        page = visit(url)
        page.locator("#charts figure").first.wait_for()
    expect(page.locator("#about")).to_contain_text("does not answer")
    assert page.locator("#charts figure").count() == 3
    assert all("ERR_CONNECTION" in fault or "ERR_EMPTY" in fault for fault in visit.faults)
    visit.faults.clear()
