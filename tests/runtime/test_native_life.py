"""Sessions come and go, run beside each other, survive a fork and a Ctrl-C, and refuse what is wrong in one line."""

import concurrent.futures
import ctypes
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from secateur import _native
from secateur.core.errors import FileError, UsageError
from secateur.runtime.session import Session, load

HERE = pathlib.Path(__file__).parent
_spec = importlib.util.spec_from_file_location("native_kit", HERE / "native_kit.py")
kit = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kit)
pytestmark = kit.needs_native

# What every script below begins with: a session on the plan named first, and an input for it.
BEGIN = """
import os, signal, sys, threading
import numpy as np
from secateur.runtime.session import Session
x = np.random.default_rng(0).standard_normal((3, 8, 24, 24)).astype(np.float32)
def new(threads=3):
    return Session(sys.argv[1], threads=threads)
def tasks():
    return len(os.listdir("/proc/self/task"))
"""
lean = pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="a sanitizer keeps freed memory and reserves much more")


def maps(net):
    """Enough work that threads share it."""
    x = net.input(0, 8, 24, 24)
    a = net.conv(x, 24, 8, 3, 3, pad=(1, 1, 1, 1), act="relu", density=0.3)
    b = net.conv(a, 24, 24, 3, 3, pad=(1, 1, 1, 1), residual=a, density=0.5)
    pooled = net.add("reduce", b, fn="mean", axes=(2, 3), keepdims=False)
    return [net.linear(pooled, 10, 24), net.add("softmax", b, axis=1)]


def words(net):
    """Token ids and a mask."""
    ids, mask = net.input(0, 11, ids=31), net.input(0, 1, 1, 11)
    x = net.add("embedding", ids, weight=net.numbers(31, 40))
    q, k, v = (net.linear(x, 40, 40, density=0.5) for _ in range(3))
    y = net.linear(net.add("attention", q, k, v, mask, heads=4, scale=0.3), 40, 40, residual=x)
    return [net.linear(y, 5, 40), net.linear(net.add("slice", y, axis=1, start=0, stop=8), 3, 40)]


def loose(net):
    """Layers whose options may change without breaking the rest."""
    x = net.input(0, 5, 23, 19)
    y = net.conv(x, 9, 5, 3, 3, pad=(1, 1, 1, 1), stride=(2, 1), act="relu", density=0.5)
    y = net.add("max_pool", y, kernel=(3, 3), stride=(1, 2), pad=(1, 1, 1, 1))
    y = net.conv(y, 9, 9, 3, 3, pad=(1, 1, 1, 1), dilation=(1, 2))
    y = net.add("avg_pool", y, kernel=(2, 2), pad=(1, 0, 1, 0), count_pad=False)
    y = net.add("slice", net.conv(y, 9, 1, 3, 3, groups=9, pad=(1, 1, 1, 1)), axis=1, start=1, stop=7)
    z = net.conv(y, 5, 6, 5, 1, pad=(2, 0, 2, 0), density=0.3)
    y = net.add("adaptive_avg_pool", net.conv(y, 7, 6, 1, 1, block=4, density=0.5), size=(5, 3))
    y = net.add("group_norm", net.add("affine", y, scale=net.numbers(7), shift=net.numbers(7)), groups=7, eps=0.1)
    gate = net.conv(net.add("adaptive_avg_pool", y, size=(1, 1)), 7, 7, 1, 1, act="sigmoid")
    y = net.conv(net.add("binary", y, gate, fn="mul"), 4, 7, 2, 3, pad=(0, 1, 1, 1))
    return [y, z, net.add("reduce", y, fn="mean", axes=(2, 3), keepdims=False)]


def states(net):
    """Recurrent layers, products and views."""
    x = net.input(0, 9, 7)
    shape = {"hidden": 6, "layers": 2, "bidirectional": True, "batch_first": True}
    y, h, _ = net.add("lstm", x, **shape, **net.cell("lstm", 7, 6, 2, 2))
    one = {"hidden": 5, "layers": 1, "bidirectional": False, "batch_first": True}
    z, _ = net.add("gru", y, **one, **net.cell("gru", 12, 5, 1, 1))
    padded = net.add("pad", z, pad=((0, 0), (1, 2), (0, 1)), value=0.5)
    turned = net.add("permute", padded, dims=(0, 2, 1))
    return [net.add("matmul", padded, turned), net.add("concat", z, y, axis=2), h]


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("plans"), {}
    for build in (maps, words, loose, states):
        net = kit.Net(2)
        made[build.__name__] = kit.Case(net, build(net), folder / build.__name__)
    return made


def ends_well(code, *arguments, **options):
    """Runs a script that begins as all do; what it printed."""
    done = kit.child(BEGIN + code, *arguments, **options)
    assert done.returncode == 0, f"{kit.crash(done)} {done.stderr[-2000:]}"
    return done.stdout


@lean
def test_a_hundred_sessions_leave_nothing(cases):
    """Threads end with their session, and memory does not grow from the twentieth session to the hundredth."""
    ends_well(
        """
import psutil
me, before = psutil.Process(), tasks()
def one():
    with new(4) as session:
        session(x)
        if tasks() != before + 3:
            raise SystemExit(f"{tasks()} threads")
for _ in range(20):
    one()
early = me.memory_info().rss
for _ in range(80):
    one()
grown = me.memory_info().rss - early
while tasks() != before:  # a joined thread may stay listed for a moment
    os.sched_yield()
if grown > 16 << 20:
    raise SystemExit(f"{grown} bytes more")
""",
        cases["maps"].path,
    )


def test_a_forgotten_session_is_freed(cases):
    """Without ``close`` the session ends with its last reference, or with the interpreter."""
    ends_well(
        """
before = tasks()
session = new(4)
session(x)
del session
while tasks() != before:
    os.sched_yield()
last = new(4)
last(x)
""",
        cases["maps"].path,
    )


def test_one_session_serves_many_threads(cases):
    """Callers take turns: each gets the answer to its own input, whatever batch the others bring."""
    case = cases["maps"]
    with Session(case.path, threads=3) as session:
        batches = (1, 2, 3, 5, 9, 17)
        alone = {batch: session(*case.inputs(batch)) for batch in batches}

        def caller(number):
            for turn in range(30):
                batch = batches[(number + turn) % len(batches)]
                found = session(*case.inputs(batch))
                assert all(np.array_equal(a, b) for a, b in zip(found, alone[batch], strict=True))
                if turn % 10 == number:
                    session.profile(turn % 20 == number)
                    assert session.explain(batch)["batch"] == batch

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(caller, range(4)))


def test_sessions_run_side_by_side(cases):
    """Several sessions of several plans in threads of their own, made and ended while the others run."""

    def life(number):
        case = cases[("maps", "words", "loose", "states")[number % 4]]
        for batch in (1, 3, 9, 2):
            case.check(kit.ISAS[(number + batch) % len(kit.ISAS)], (batch, 1), (1 + number % 3,))

    for case in cases.values():
        for batch in (1, 2, 3, 9):
            case.wanted(batch)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(life, range(8)))


def test_a_fork_after_the_first_use(cases):
    """The child's session works and ends, and the parent's goes on; also while another thread is in a run."""
    ends_well(
        """
session = new()
want = session(x)
def same():
    return all(np.array_equal(a, b) for a, b in zip(session(x), want))
stop = threading.Event()
def busy():
    while not stop.is_set():
        session(x)
def fork(leave):
    child = os.fork()
    if child == 0:
        leave(0 if same() and same() else 3)
    _, status = os.waitpid(child, 0)
    if status or not same():
        raise SystemExit(f"child ended with {status}")
fork(os._exit)
thread = threading.Thread(target=busy)
thread.start()
for _ in range(10):
    fork(os._exit)
stop.set()
thread.join()
if os.fork() == 0:
    session.close()  # frees what it has, and joins no thread of the parent's
    sys.exit(0)
_, status = os.wait()
fork(sys.exit) if status == 0 else sys.exit(f"closing child ended with {status}")
""",
        cases["maps"].path,
    )


def test_ctrl_c_ends_a_loop_of_runs(cases):
    """An interrupt in the middle of runs is a KeyboardInterrupt, and the threads let the process end."""
    # A process started in the background ignores interrupts unless it asks for them.
    asks = "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script = BEGIN + asks + "session = new()\nprint('running', flush=True)\nwhile True:\n    session(x)\n"
    command = [sys.executable, "-c", script, str(cases["maps"].path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout.readline() == "running\n"
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=60)
    assert running.returncode in (-signal.SIGINT, 130) and "KeyboardInterrupt" in said


@lean
def test_threads_that_cannot_start(cases):
    """Where the system has no room for the threads there is an error, and the process goes on."""
    ends_well(
        """
import resource
new(2)(x)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)
try:
    new(256)
except Exception as error:
    if "256 threads" not in str(error):
        raise SystemExit(f"not told: {error!r}")
else:
    raise SystemExit("256 threads started")
new(1)(x)
""",
        cases["maps"].path,
    )


def test_a_closed_session(cases):
    session = Session(cases["maps"].path, threads=2)
    session(*cases["maps"].inputs(1))
    session.close()
    session.close()
    for use in (lambda: session(*cases["maps"].inputs(1)), session.prepare, session.explain, session.profile):
        with pytest.raises(UsageError, match="closed"):
            use()


def test_the_memory_limit(cases):
    """A batch that needs too much is refused by name, and a smaller one still runs."""
    case = cases["maps"]
    whole = {"piece": 64}
    with Session(case.path, threads=1, tuning=whole) as session:
        need = session.explain(64)["bytes"]
    for limit, message in [
        (need - 1, f"batch 64 needs {need} bytes, more than the limit of {need - 1}; use a smaller batch"),
        (need // 16, "has more than .* elements; use a smaller batch or a larger memory_limit"),
    ]:
        with Session(case.path, threads=1, memory_limit=limit, tuning=whole) as session:
            for _ in range(2):
                with pytest.raises(UsageError, match=message):
                    session(*case.inputs(64))
                kit.assert_close(session(*case.inputs(1))[0], case.wanted(1)[0])
    with pytest.raises(UsageError, match="memory_limit is negative"):
        Session(case.path, memory_limit=-1)


@lean
def test_the_memory_limit_holds_for_all_batches_together(cases):
    """Batch sizes that were planned before make room for the next."""
    ends_well(
        """
import psutil
me = psutil.Process()
def largest(limit):
    with Session(sys.argv[1], threads=1, memory_limit=limit, tuning={"piece": 1000}) as session:
        before = me.memory_info().rss
        for batch in (400, 401, 402, 403):
            session.prepare(batch)
        return me.memory_info().rss - before, session.explain(403)["bytes"]
free, need = largest(16 << 30)
tight, _ = largest(need * 3 // 2)
if need < 40 << 20 or free < 3 * need or tight > 1.2 * need:
    raise SystemExit(f"{need} bytes for a batch, {free} for four, {tight} within the limit")
""",
        cases["maps"].path,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads is 0"),
        ({"threads": 257}, "threads is 257"),
        ({"isa": "sse9"}, "isa 'sse9' is not one of: auto"),
    ],
)
def test_wrong_options(cases, options, message):
    with pytest.raises(UsageError, match=message):
        Session(cases["maps"].path, **options)


def test_wrong_inputs(cases):
    """Count, type, shape, batches that differ, an empty batch and ids that do not exist, each named."""
    case = cases["words"]
    with load(case.path, threads=3) as session:
        ids, mask = case.inputs(3)
        wanted = session(ids, mask)
        for given, message in [
            ((ids,), "1 inputs given, the network takes 2: x0, x1"),
            ((ids.astype(np.float32), mask), "input 'x0' is float32; the network takes int64"),
            ((ids, mask.astype(complex)), "input 'x1' is complex128"),
            ((ids[:, :5], mask), r"input 'x0' has shape \[3, 5\]; the network takes \['batch', 11\]"),
            ((ids[:0], mask[:0]), "input 'x0' has shape"),
            ((ids[:2], mask), "different batch sizes"),
            ((ids + 31, mask), r"token id \d+ is not in 0 .. 30"),
            ((ids - 31, mask), r"token id -\d+ is not in 0 .. 30"),
        ]:
            with pytest.raises(UsageError, match=message):
                session(*given)
        again = session(ids.astype(np.int32), mask.astype(np.float64))
        assert all(np.array_equal(a, b) for a, b in zip(again, wanted, strict=True))
        backwards = np.asfortranarray(mask)
        assert all(np.array_equal(a, b) for a, b in zip(session(ids, backwards), wanted, strict=True))


def test_wrong_arrays_for_run(cases):
    """``run`` reads and writes what it is given, so it takes nothing but arrays that fit."""
    case = cases["maps"]
    with Session(case.path, threads=1) as session:
        (x,) = case.inputs(2)
        outs = [np.empty_like(array, np.float32) for array in case.wanted(2)]
        session.run([x], outs)
        kit.assert_close(outs[0], case.wanted(2)[0])
        for inputs, outputs, message in [
            ([x], outs[:1], "1 outputs given, the network has 2"),
            ([x], [outs[0], outs[1][:1]], "output 1 must have shape"),
            ([x], [outs[0].astype(np.int64), outs[1]], "output 0 must have shape"),
            ([x], [outs[0].astype(np.float64), outs[1]], "float64"),
            ([x[..., ::2]], outs, "contiguous"),
            ([x, x], outs, "2 inputs given, the network has 1"),
        ]:
            with pytest.raises(UsageError, match=message):
                session.run(inputs, outputs)


def test_wrong_files(tmp_path):
    with pytest.raises(FileError, match="there is no plan"):
        Session(tmp_path / "nothing")
    (tmp_path / "plan.safetensors").write_bytes(b"no plan at all")
    with pytest.raises(FileError):
        Session(tmp_path)


def test_null_pointers_and_short_messages(cases):
    """The C interface refuses what is missing, and writes no more than it may."""
    library, plan, session = _native.library(), ctypes.c_void_p(), ctypes.c_void_p()
    assert library.sec_plan_open(None, ctypes.byref(plan), None, 0) == 3
    assert library.sec_plan_open(b"/nowhere", None, None, 0) == 3
    text = ctypes.create_string_buffer(b"#" * 16)
    assert library.sec_plan_open(b"/nowhere", ctypes.byref(plan), text, 8) == 1
    assert len(text.value) == 7 and text.raw[8:16] == b"#" * 8
    assert library.sec_plan_open(str(cases["maps"].path).encode(), ctypes.byref(plan), text, 8) == 0 and not text.value
    assert library.sec_plan_input(plan, 1, None, None) == 3 and library.sec_plan_output(plan, -1, None) == 3
    assert library.sec_session_create(None, None, ctypes.byref(session), None, 0) == 3
    assert library.sec_session_create(plan, None, ctypes.byref(session), None, 0) == 0
    library.sec_plan_free(plan)  # the session keeps its own reference
    assert library.sec_session_run(session, None, 1, None, 2, None, 0) == 3
    assert library.sec_session_run(None, None, 0, None, 0, None, 0) == 3
    assert (
        library.sec_session_prepare(session, 0, None, 0) == 3 and library.sec_session_prepare(session, 2, None, 0) == 0
    )
    assert library.sec_session_explain(None, 1, None, 0) == 0 and library.sec_session_explain(session, -1, None, 0) == 0
    whole = library.sec_session_explain(session, 2, None, 0)
    short = ctypes.create_string_buffer(b"#" * 32)
    assert library.sec_session_explain(session, 2, short, 8) == whole and len(short.value) == 7
    for free in (library.sec_session_free, library.sec_plan_free):
        free(None)
    library.sec_session_free(session)


def mutate(cases, count, seed):
    """How many damaged plans ended in which way; a crash fails and names the case."""
    paths = [str(case.path) for case in cases.values()]
    command = [sys.executable, HERE / "native_mutate.py", str(count), str(seed), *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    last = done.stdout.strip().rpartition("\n")[2]
    assert done.returncode == 0, f"{kit.crash(done)} at {last}: {done.stderr[-2000:]}"
    ends = json.loads(last)
    assert sum(ends.values()) == count and ends["sound"] > count // 50 and ends["file"] > count // 2
    return ends


def test_mutated_plans(cases):
    """A thousand damaged files: each opens and runs, or is refused with one line."""
    mutate(cases, 1000, 1)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2, 12))
def test_many_mutated_plans(cases, seed):
    mutate(cases, 1000, seed)
