"""Checks of the compiled core that need builds of their own: sanitizers, NEON under an emulator, no compiler.

    scripts/native_checks.py [--asan] [--tsan] [--neon] [--pure] [--quick]

Without the name of a part all run. ``--quick`` leaves out what takes long: AVX-512, most random networks, most rounds.
Builds stay under build/checks, so that a second run is short. A part that cannot run here says why and does not fail.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from types import ModuleType
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUILDS = ROOT / "build" / "checks"
TESTS = ROOT / "tests" / "runtime"
NEON = {"aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu", "qemu-aarch64": "qemu-user"}


class SkipPart(Exception):
    """A part that cannot run on this machine."""


def run(*command: Any, **options: Any) -> str:
    """Runs a command; its output. A failure shows the end of what it said."""
    environment = {**os.environ, **options.pop("env", {})}
    words = [str(word) for word in command]
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "check": False}
    done = subprocess.run(words, env=environment, **both, **options)
    if done.returncode:
        end = "\n".join(done.stdout.splitlines()[-60:])
        raise SystemExit(f"{end}\nfailed with {done.returncode}: {' '.join(words)[:300]}")
    return done.stdout


def build(name: str, **settings: str) -> pathlib.Path:
    """The folder of one configuration, built."""
    folder = BUILDS / name
    ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
    options = [f"-D{key}={value}" for key, value in {"CMAKE_BUILD_TYPE": "Release", **settings}.items()]
    run("cmake", "-S", ROOT, "-B", folder, *ninja, "-DSECATEUR_TESTS=ON", *options)
    run("cmake", "--build", folder, "--parallel", max(2, os.cpu_count() or 2))
    return folder


def load(name: str) -> ModuleType:
    """A module of the tests."""
    spec = importlib.util.spec_from_file_location(name, TESTS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_plan(folder: pathlib.Path) -> Any:
    """A network with enough work that threads share it, and what it gives."""
    kit = load("native_kit")
    net = kit.Net(1)
    x = net.input(0, 8, 24, 24)
    a = net.conv(x, 24, 8, 3, 3, pad=(1, 1, 1, 1), act="relu", density=0.3)
    b = net.conv(a, 24, 24, 3, 3, pad=(1, 1, 1, 1), residual=a, density=0.5)
    return kit.Case(net, [net.add("reduce", b, fn="mean", axes=(2, 3), keepdims=False), b], folder / "small.plan")


def programs(folder: pathlib.Path, quick: bool, launcher: tuple[str, ...], env: dict[str, str]) -> None:
    """The test programs of one build: the reader of plans, the plain operators, the thread pool."""
    with tempfile.TemporaryDirectory() as place:
        plans = pathlib.Path(place)
        run(sys.executable, ROOT / "native" / "tests" / "make_plans.py", plans)
        good, bad = (sorted((plans / part).glob("*.safetensors")) for part in ("good", "bad"))

        def program(name: str, *arguments: Any) -> None:
            last = run(*launcher, folder / name, *arguments, env=env).strip().rpartition("\n")[2]
            print(f"  {name}: {last}", flush=True)

        program("test_parse", "--self")
        program("test_parse", *good)
        program("test_parse", "--refuse", *bad)
        program("test_parse", "--fuzz", 2000 if quick else 20000, 1, *good)
        program("test_plain")
        program("test_pool", 8 if quick else 60, small_plan(plans).path)


def sanitizer_library(name: str) -> str:
    """The compiler's copy of a sanitizer, to be loaded before everything else."""
    path = run(os.environ.get("CXX", "g++"), f"-print-file-name={name}").strip()
    if "/" not in path:
        raise SkipPart(f"the compiler has no {name}")
    return path


def asan(quick: bool) -> None:
    """Addresses and undefined behaviour: the programs, then the Python tests on the sanitized library."""
    preload = " ".join(sanitizer_library(name) for name in ("libasan.so", "libubsan.so"))
    vectors = {"SECATEUR_AVX512": "OFF" if quick else "ON"}
    folder = build("asan", SECATEUR_SANITIZE="address,undefined", **vectors)
    halt = {"UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1"}
    programs(folder, quick, (), {"ASAN_OPTIONS": "detect_leaks=1:allocator_may_return_null=1", **halt})
    env = {
        "SECATEUR_NATIVE": str(folder / "libsecateur.so"),
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",  # Python keeps what it allocates
        "SECATEUR_FUZZ": "40" if quick else "600",
        "OMP_NUM_THREADS": "1",
        **halt,
    }
    ops, values, fuzz, life = (TESTS / f"test_native_{name}.py" for name in ("ops", "values", "fuzz", "life"))
    runs: list[list[Any]] = [[fuzz, f"{life}::test_mutated_plans"]]
    runs += [[ops, "-k", "avx2"], [values, "-k", "base and not edges"]] if quick else [[ops, values, life]]
    runs += [] if quick else [[TESTS / "test_native_tuning.py"]]
    for files in runs:
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", "-m", "not long"]
        print("  " + run(*command, *files, env=env, cwd=ROOT).strip().rpartition("\n")[2], flush=True)


def tsan(quick: bool) -> None:
    """Races of the thread pool and of sessions that several threads call."""
    sanitizer_library("libtsan.so")
    folder = build("tsan", SECATEUR_SANITIZE="thread", SECATEUR_AVX2="OFF")
    # Without a random layout of addresses: the sanitizer wants its own places.
    launcher = ("setarch", "-R") if shutil.which("setarch") else ()
    with tempfile.TemporaryDirectory() as place:
        plan = small_plan(pathlib.Path(place)).path
        rounds = 40 if quick else 400
        said = run(*launcher, folder / "test_pool", rounds, plan, env={"TSAN_OPTIONS": "halt_on_error=1"})
        print("  " + said.strip(), flush=True)


def need_neon() -> None:
    """The cross compiler and the emulator, installed where that is possible."""
    missing = [package for program, package in NEON.items() if not shutil.which(program)]
    if missing and shutil.which("apt-get") and os.geteuid() == 0:
        quiet: dict[str, Any] = {
            "check": False,
            "capture_output": True,
            "env": {**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        }
        subprocess.run(["apt-get", "update"], **quiet)
        subprocess.run(["apt-get", "install", "-y", "--no-install-recommends", *missing], **quiet)
    missing = [package for program, package in NEON.items() if not shutil.which(program)]
    if missing:
        raise SkipPart(f"needs the Debian packages {' '.join(NEON.values())}; {' '.join(missing)} cannot be installed")


def neon_cases(quick: bool, folder: pathlib.Path) -> list[tuple[Any, int, int, dict[str, Any], bool]]:
    """Networks with batch, threads, tuning, and whether one rounding of a large value is let pass."""
    kit, ops, growing = load("native_kit"), load("test_native_ops"), load("native_grow")
    made: list[tuple[Any, int, int, dict[str, Any], bool]] = []
    for name, make in ops.CASES.items():
        net = kit.Net(len(name))
        case = kit.Case(net, make(net), folder / f"{name}.plan")
        made += [(case, batch, 1 + 2 * (batch > 1), {}, False) for batch in ((5,) if quick else (1, 3, 4, 5))]
    for seed in range(5000, 5030 if quick else 5400):
        random = np.random.default_rng(seed)
        net = kit.Net(seed)
        grower = growing.Grower(net, random)
        case = kit.Case(net, grower.grow(int(random.integers(3, 11))), folder / f"{seed}.plan")
        path = grower.pick(("lists", "blocks"))
        layers = {n.name: {"path": path, "p": grower.pick((0, 3))} for n in net.nodes if n.op in ("conv", "linear")}
        tuning = {"strips": grower.pick((0, 1, 2, 4)), "layers": layers if random.random() < 0.5 else {}}
        made.append((case, grower.pick((1, 3, 5)), grower.pick((1, 3)), tuning, True))
    return made


def neon(quick: bool) -> None:
    """The NEON unit, cross-compiled and emulated, against the reference of this machine."""
    need_neon()
    cross = {"CMAKE_C_COMPILER": "aarch64-linux-gnu-gcc", "CMAKE_CXX_COMPILER": "aarch64-linux-gnu-g++"}
    folder = build("neon", CMAKE_SYSTEM_NAME="Linux", CMAKE_SYSTEM_PROCESSOR="aarch64", **cross)
    emulator = ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu")
    programs(folder, quick, emulator, {})
    assert_close = load("native_kit").assert_close
    with tempfile.TemporaryDirectory() as place:
        golden, lines = pathlib.Path(place), []
        cases = neon_cases(quick, golden)
        for number, (case, batch, threads, tuning, _) in enumerate(cases):
            given, made = golden / f"{number}.in", golden / f"{number}.out"
            given.write_bytes(b"".join(array.tobytes() for array in case.inputs(batch)))
            lines.append("\t".join(map(str, (case.path, batch, threads, "neon", json.dumps(tuning), given, made))))
        (golden / "list").write_text("\n".join(lines) + "\n", encoding="utf-8")
        said = run(*emulator, folder / "run_raw", golden / "list").strip()
        for number, (case, batch, threads, tuning, rounding) in enumerate(cases):
            found, at = np.fromfile(golden / f"{number}.out", np.float32), 0
            for name, want in zip(case.graph.outputs, case.wanted(batch), strict=True):
                what = f"{case.path.name}: {name} at batch {batch} with {threads} threads, {tuning}"
                part = found[at : at + want.size].reshape(want.shape)
                assert_close(part, want, what, case.rounding(batch) if rounding else 0.0)
                at += want.size
            assert at == found.size, f"{case.path.name} gave {found.size} numbers, not {at}"
        print(f"  {said}: {len(cases)} runs agree with the reference", flush=True)


PLAIN = """
import sys
sys.modules["torch"] = None  # importing it fails from here on
import numpy as np, secateur
from secateur import _native
from secateur.runtime import load
place, plan, given, wanted, kind = sys.argv[1:]
if not secateur.__file__.startswith(place):
    raise SystemExit(f"not the wheel's: {secateur.__file__}")
with load(plan) as session:
    found = session(np.load(given))[0]
    if (session.isa == "reference") != (kind == "any") or bool(_native.why_not()) != (kind == "any"):
        raise SystemExit(f"{kind}: {session.isa} {_native.why_not()}")
want = np.load(wanted)
if not np.abs(found - want).max() <= 1e-5 * np.abs(want).max():
    raise SystemExit("the results differ")
print(session.isa)
"""


def wheel(place: pathlib.Path, kind: str, *options: str, **env: str) -> str:
    """Builds a wheel, installs it apart and runs a plan from it without torch; its file name."""
    source = place / f"source-{kind}"
    copied = ("src", "native", "CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE")
    for name in copied:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
        elif (ROOT / name).is_file():
            source.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "-w", place / kind, *options, source, env=env)
    (made,) = (place / kind).glob("*.whl")
    site = place / f"site-{kind}"
    run(*pip, "install", "--no-deps", "--target", site, made)
    case = small_plan(place)
    np.save(place / "given.npy", case.inputs(3)[0])
    np.save(place / "wanted.npy", case.wanted(3)[0])
    # -S: an editable installation puts itself before every path
    clean = {"PYTHONPATH": f"{site}{os.pathsep}{sysconfig.get_path('platlib')}", "SECATEUR_NATIVE": ""}
    arrays = (place / "given.npy", place / "wanted.npy")
    isa = run(sys.executable, "-S", "-c", PLAIN, site, case.path, *arrays, kind, env=clean, cwd=place)
    print(f"  {made.name} runs on {isa.strip()}", flush=True)
    return made.name


def pure(quick: bool) -> None:
    """Without a compiler there is a wheel that runs on the reference; with one it belongs to the platform alone."""
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place)
        name = wheel(folder, "any", CC="/nonexistent", CXX="/nonexistent")
        if not name.endswith("-py3-none-any.whl"):
            raise SystemExit(f"{name} is not pure")
        light = ["SECATEUR_OPTIMIZE=-O0", "SECATEUR_AVX512=OFF"] if quick else []
        options = [word for setting in light for word in ("-C", f"cmake.define.{setting}")]
        name = wheel(folder, "platform", *options, "-C", f"build-dir={BUILDS / 'wheel'}")
        if "-py3-none-linux_" not in name:
            raise SystemExit(f"{name} has another tag than py3-none-linux_...")


def main() -> int:
    """Runs the parts asked for; 1 when one fails."""
    parts = {"asan": asan, "tsan": tsan, "neon": neon, "pure": pure}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, part in parts.items():
        parser.add_argument(f"--{name}", action="store_true", help=(part.__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="what takes minutes, not more")
    chosen = parser.parse_args()
    for name, part in parts.items():
        if not getattr(chosen, name) and any(getattr(chosen, other) for other in parts):
            continue
        began = time.perf_counter()
        print(f"== native checks: {name}", flush=True)
        try:
            part(chosen.quick)
        except SkipPart as reason:
            print(f"== {name} skipped: {reason}", flush=True)
            continue
        print(f"== {name}: {time.perf_counter() - began:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
