"""A small trained network that command-line tests begin with."""

import pathlib
import shutil

import pytest

from secateur.cli.main import main

TINY = ["-s", "model.widths=[16, 12]", "-s", "data.train=200", "-s", "data.test=100"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A dense run folder, trained once for all tests; copy it before changing it."""
    out = tmp_path_factory.mktemp("runs") / "dense"
    words = ["train", "--net", "mlp", "--data", "digits", "--epochs", "2", "-s", "data.batch=50", *TINY, "-o", str(out)]
    assert main(words) == 0
    return out


@pytest.fixture
def dense(trained, tmp_path):
    """A copy of the dense run folder."""
    return pathlib.Path(shutil.copytree(trained, tmp_path / "dense"))


@pytest.fixture
def call(capsys):
    """Run a command; gives exit code, standard output and standard error."""

    def run(*words):
        capsys.readouterr()
        code = main([str(word) for word in words])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run
