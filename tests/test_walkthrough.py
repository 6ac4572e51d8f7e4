"""The walk-through of CONTRIBUTING.md, run as it stands there."""

import pathlib
import re
import shlex
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_a_method_from_outside_in_two_files(tmp_path):
    """The two files and the three commands of the page work in an empty folder."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    method, test = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    commands = re.search(r"```sh\n(.*?)```", page, flags=re.S)[1].strip().splitlines()
    (tmp_path / "my_scores").mkdir()
    (tmp_path / "my_scores" / "depth.py").write_text(method)
    (tmp_path / "my_scores" / "test_depth.py").write_text(test)

    def run(*words):
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    for command in commands:
        assert command.startswith("secateur ")
        shown = run(sys.executable, "-m", "secateur.cli.main", *shlex.split(command)[1:])
    assert "DepthBiased" in shown and "base: float = 0.9" in shown
    recipe = (tmp_path / "runs" / "out" / "recipe.toml").read_text()
    assert 'use = "my_scores.depth:DepthBiased"' in recipe and "base = 0.8" in recipe
    run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "my_scores")
