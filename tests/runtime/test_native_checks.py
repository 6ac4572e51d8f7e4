"""What ``scripts/native_checks.py`` says when a part fails; the parts run with all checks and in the long profile."""

import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not shutil.which("cmake"), reason="there is no cmake")


def test_a_failure_is_told(tmp_path):
    """What a program says reaches the caller with the status of a failure."""
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho this compiler is broken\nexit 3\n")
    broken.chmod(0o755)
    command = [sys.executable, ROOT / "scripts" / "native_checks.py", "--asan", "--quick"]
    env = {"PATH": "/usr/bin:/bin", "CXX": str(broken)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=env)
    assert done.returncode == 1 and "this compiler is broken" in done.stderr
