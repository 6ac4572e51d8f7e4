"""Shared by all tests: types checked at run time, float64 cases, and where real data lies."""

import os
import pathlib

from jaxtyping import install_import_hook

install_import_hook("secateur", "beartype.beartype")

import pytest  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """The folder of large real data sets, or a skip that says how to provide it."""
    for place in (os.environ.get("SECATEUR_DATA"), ROOT.parent / "shared" / "data"):
        if place and pathlib.Path(place).is_dir():
            return pathlib.Path(place)
    pytest.skip("no real data sets here: set SECATEUR_DATA to a folder that holds mnist/, cifar10/, ...")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded data sets are cached for the test session only."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    monkeypatch.setenv("SECATEUR_CACHE", str(shared / "secateur-cache"))
