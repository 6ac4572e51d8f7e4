"""Each part of ``scripts/native_checks.py``, short, as a test: minutes where nothing is built yet."""

import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.long, pytest.mark.skipif(not shutil.which("cmake"), reason="there is no cmake")]


@pytest.mark.parametrize("part", ["asan", "tsan", "neon", "pure"])
def test_part(part):
    command = [sys.executable, ROOT / "scripts" / "native_checks.py", f"--{part}", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    if "skipped" in done.stdout:
        pytest.skip(done.stdout.strip().rpartition("\n")[2])


def test_a_failure_is_told(tmp_path):
    """What a program says reaches the caller with the status of a failure."""
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho this compiler is broken\nexit 3\n")
    broken.chmod(0o755)
    command = [sys.executable, ROOT / "scripts" / "native_checks.py", "--asan", "--quick"]
    env = {"PATH": "/usr/bin:/bin", "CXX": str(broken)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=env)
    assert done.returncode == 1 and "this compiler is broken" in done.stderr
