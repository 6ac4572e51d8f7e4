"""Pages in Debian's Chromium, driven by Playwright; skipped with the reason where either is missing."""

import json
import os
import pathlib
import shutil

import pytest
from tests.browser.real_kit import real_run, real_runs

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 120_000  # milliseconds: an upper limit for a busy machine, not a wait
WITHIN = ("data:", "blob:")


def pytest_collection_modifyitems(items):
    here = pathlib.Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="module")
def browser():
    """One browser for the tests of a file."""
    reason = "playwright is not installed: pip install 'secateur[dev]'"
    driver = pytest.importorskip("playwright.sync_api", reason=reason)
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium on PATH: scripts/chromium.sh installs Debian's")
    driver.expect.set_options(timeout=PATIENCE)
    with driver.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture
def visit(browser):
    """Opens a page; the test fails when the page reports an error or asks for anything from elsewhere.

    A page in a file may ask for nothing but what it holds itself; one from a server, for what that server has.
    """
    contexts, faults = [], []

    def heard(message):
        if message.type == "error":
            faults.append(f"console: {message.text} ({message.location.get('url')})")

    def asked(request, home):
        inside = request.url.startswith(f"{home}/") if home.startswith("http") else request.url.split("#")[0] == home
        if not inside and not request.url.startswith(WITHIN):
            faults.append(f"request: {request.url}")

    def open_page(address, **options):
        address = address.as_uri() if isinstance(address, pathlib.Path) else address
        home = "/".join(address.split("/")[:3]) if address.startswith("http") else address
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.on("console", heard)
        page.on("pageerror", lambda error: faults.append(f"error: {error}"))
        context.on("request", lambda request: asked(request, home))
        page.goto(address)
        return page

    open_page.faults = faults
    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


@pytest.fixture
def shot(tmp_path):
    """Keeps a picture of a page or a part of one, in $SECATEUR_SHOTS or the test's own folder."""
    folder = pathlib.Path(os.environ.get("SECATEUR_SHOTS") or tmp_path)

    def keep(page, name, **options):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.png"
        whole = {"full_page": True} if hasattr(page, "goto") else {}  # else a part of a page
        page.screenshot(path=path, **{**whole, **options})
        assert path.stat().st_size > 5000
        return path

    return keep


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder that all workers share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base


@pytest.fixture(scope="session")
def run(shared):
    """The folder of a real run; one for all workers."""
    return real_run(shared)


@pytest.fixture(scope="session")
def runs(shared):
    """The folder of a page of eighteen real runs; one for all workers."""
    return real_runs(shared)


@pytest.fixture(scope="session")
def table(run):
    """The figures of its report."""
    return json.loads((run / "report.json").read_text(encoding="utf-8"))
