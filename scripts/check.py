"""All checks, one after the other: style, imports, types, tests. `--lint` leaves the tests out."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent

LINT = [
    ["ruff", "check", "src", "tests", "benchmarks", "scripts", "claims"],
    ["ruff", "format", "--check", "src", "tests", "benchmarks", "scripts", "claims"],
    ["lint-imports"],
    ["pyright"],
    [sys.executable, "scripts/methods_page.py", "--check"],
    [sys.executable, "scripts/claims_page.py", "--check"],
]
TESTS = [
    [sys.executable, "-m", "pytest", "-n", "2", "-m", "not long"],
    [sys.executable, "scripts/native_checks.py", "--quick"],  # sanitizers, NEON, no compiler
]


def main() -> int:
    """Run the checks; stop at the first that fails."""
    for command in LINT + ([] if "--lint" in sys.argv else TESTS):
        began = time.perf_counter()
        print(f"== {' '.join(command)}", flush=True)
        # Two test processes with a team of threads each wait for one another at every barrier.
        done = subprocess.run(command, cwd=ROOT, check=False, env={"OMP_NUM_THREADS": "1", **os.environ})
        if done.returncode:
            print(f"== failed: {' '.join(command)}", flush=True)
            return done.returncode
        print(f"== {time.perf_counter() - began:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
