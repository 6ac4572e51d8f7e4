import contextlib
import fcntl
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.report.conftest import full_run

from secateur.cli.main import main
from secateur.core.errors import FileError, UsageError
from secateur.report import tracing
from secateur.report.live import Watched
from secateur.report.serving import Server
from secateur.report.tracing import LIMIT, Curve, Follower


def rows(count):
    return "".join(json.dumps({"step": i, "train/loss": 1 / i}) + "\n" for i in range(1, count + 1)).encode()


@settings(deadline=None)
@given(st.integers(1, 6 * LIMIT))
def test_a_long_curve_stays_short_and_keeps_its_mean(count):
    curve = Curve()
    for i in range(count):
        curve.add(float(i), float(i * i))
    points = curve.all()
    assert len(points) <= 2 * LIMIT + 1
    weights = [curve.every] * (len(points) - 1) + [count - curve.every * (len(points) - 1)]
    mean = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / count
    assert mean == pytest.approx(sum(i * i for i in range(count)) / count)
    assert [x for x, _ in points] == sorted(x for x, _ in points)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 400), max_size=8))
def test_a_file_read_while_it_grows_gives_what_it_gives_at_the_end(tmp_path_factory, cuts):
    path = tmp_path_factory.mktemp("grow") / "metrics.jsonl"
    content = rows(12) + b'{"step": "x"}\n[1]\nnot json\n' + rows(3)
    follower = Follower(path)
    follower.read()  # before there is a file
    for cut in sorted(min(cut, len(content)) for cut in cuts):
        path.write_bytes(content[:cut]) if not path.exists() else _append(path, content[path.stat().st_size : cut])
        follower.read()
    _append(path, content[path.stat().st_size if path.exists() else 0 :])
    follower.read()
    wanted = [(float(i), 1 / i) for i in [*range(1, 13), 1, 2, 3]]
    assert follower.curves["train/loss"].all() == wanted
    assert follower.length == 12 and not follower.behind


def _append(path, content):
    with open(path, "ab") as file:
        file.write(content)


def test_a_half_written_line_waits_and_a_shorter_or_missing_file_begins_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(rows(5) + b'{"step": 6, "train/lo')
    follower = Follower(path)
    follower.read()
    assert len(follower.curves["train/loss"].all()) == 5
    path.write_bytes(rows(2))
    follower.read()
    assert len(follower.curves["train/loss"].all()) == 2 and follower.length == 2
    path.unlink()
    follower.read()
    assert follower.curves == {} and follower.length == 0


def test_a_huge_file_is_read_piece_by_piece_and_a_line_without_end_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(tracing, "CHUNK", 200)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(rows(10) + b"x" * 1000 + b"\n" + b'{"step": 11, "train/loss": NaN}\n' + rows(3))
    follower = Follower(path)
    follower.read()
    assert follower.behind and len(follower.curves["train/loss"].all()) < 10
    for _ in range(20):
        follower.read()
    assert not follower.behind and follower.odd == 1
    assert [x for x, _ in follower.curves["train/loss"].all()] == [*range(1, 11), 1, 2, 3]


@pytest.fixture
def home(tmp_path):
    """A finished run, one that was stopped, and one with a damaged list of steps."""
    full_run(tmp_path / "runs" / "done")
    stopped = full_run(tmp_path / "runs" / "deep" / "stopped")
    (next(stopped.glob("3-train-*")) / "card.json").unlink()
    damaged = full_run(tmp_path / "runs" / "damaged")
    (damaged / "run.json").write_text('{"steps": [')
    for path in (tmp_path / "runs").rglob("*"):
        os.utime(path, (1e9, 1e9))
    return tmp_path / "runs"


def test_the_list_tells_finished_unfinished_running_and_damaged_runs(home):
    watched = Watched([home])
    states = {row["name"]: row["state"] for row in watched.listing()["runs"]}
    assert states == {"runs/done": "finished", "runs/deep/stopped": "unfinished", "runs/damaged": "damaged"}
    row = next(row for row in watched.listing()["runs"] if row["state"] == "unfinished")
    assert row["now"] == [3, "train", 10] and row["last"]["epoch"] == 10
    with open(home / "deep" / "stopped" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert watched.listing()["runs"][0]["state"] == "running"


def test_curves_are_those_of_the_metrics_file(home):
    watched = Watched([home])
    row = next(row for row in watched.listing()["runs"] if row["name"] == "runs/done")
    found = watched.curves(row["id"])
    assert [stretch["do"] for stretch in found["stretches"]] == ["train", "prune", "train"]
    lines = next((home / "done").glob("3-train-*")).joinpath("metrics.jsonl").read_text().splitlines()
    wanted = [(r["step"], r["test/accuracy"]) for r in map(json.loads, lines) if "test/accuracy" in r]
    assert found["stretches"][2]["series"]["test/accuracy"] == [(float(x), y) for x, y in wanted]
    assert found["stretches"][2]["length"] == 2000
    assert watched.curves("0" * 16) is None and watched.curves("../../etc") is None


def test_a_deleted_run_leaves_the_list(home):
    watched = Watched([home])
    before = watched.listing()["runs"]
    for path in sorted((home / "done").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    gone = next(row["id"] for row in before if row["name"] == "runs/done")
    assert len(watched.listing()["runs"]) == len(before) - 1 and watched.curves(gone) is None


def test_links_that_lead_outside_are_not_followed(home, tmp_path):
    secret = tmp_path / "secret.jsonl"
    secret.write_text('{"step": 7, "secret/loss": 1.5}\n')
    metrics = next((home / "done").glob("3-train-*")) / "metrics.jsonl"
    metrics.unlink()
    metrics.symlink_to(secret)
    outside = full_run(tmp_path / "outside")
    (home / "link").symlink_to(outside)
    watched = Watched([home])
    listed = watched.listing()["runs"]
    assert "outside" not in json.dumps(listed) and len(listed) == 3
    told = json.dumps([watched.curves(row["id"]) for row in listed])
    assert "secret" not in told and "secret" not in json.dumps(watched.listing())


def test_a_step_named_with_a_path_is_not_read(home):
    table = json.loads((home / "done" / "run.json").read_text())
    table["steps"][0]["folder"] = "../deep/stopped/1-train-1c1f00aa"
    (home / "done" / "run.json").write_text(json.dumps(table))
    row = next(r for r in Watched([home]).listing()["runs"] if r["name"] == "runs/done")
    assert [step[0] for step in row["steps"]] == [2, 3, 4]


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 300, "..", ".", "a/b", ""])
def test_a_step_whose_name_no_folder_can_have_leaves_the_rest_alone(home, name, capsys):
    table = json.loads((home / "done" / "run.json").read_text())
    whole = len(Watched([home]).listing()["runs"])
    table["steps"][0]["folder"] = name
    (home / "done" / "run.json").write_text(json.dumps(table))
    rows = Watched([home]).listing()["runs"]
    assert len(rows) == whole
    mine = next(row for row in rows if row["name"].endswith("done"))
    assert [number for number, _, _ in mine["steps"]] == [row["number"] for row in table["steps"][1:]]
    assert Watched([home]).curves(mine["id"]) is not None
    assert main(["watch", str(home), "--json"]) == 0
    assert main(["report", str(home / "done"), "-o", str(home / "page.html"), "--json"]) == 0
    capsys.readouterr()


def test_a_log_that_links_to_itself_is_left_out(home):
    log = next((home / "done").glob("1-train-*")) / "metrics.jsonl"
    log.unlink()
    log.symlink_to(log)
    watched = Watched([home])
    mine = next(row for row in watched.listing()["runs"] if row["name"].endswith("done"))
    assert watched.curves(mine["id"])["stretches"][0]["series"] == {}


def test_a_file_in_place_of_a_folder_is_called_one(home):
    with pytest.raises(FileError, match="is a file"):
        Watched([home / "done" / "run.json"])


def test_the_list_is_printed_as_json(home, capsys):
    assert main(["watch", str(home), "--json"]) == 0
    states = [row["state"] for row in json.loads(capsys.readouterr().out)["runs"]]
    assert sorted(states) == ["damaged", "finished", "unfinished"]


def test_folders_that_are_missing_or_only_a_step_are_refused(home):
    with pytest.raises(FileError, match="there is no folder"):
        Watched([home / "nothing"])
    with pytest.raises(FileError, match="is a step of a run"):
        Watched([next((home / "done").glob("1-train-*"))])


@contextlib.contextmanager
def serving(home, **options):
    with Server(Watched([home]), port=0, **options) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server, path="/", method="GET", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    with contextlib.closing(connection):
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()


def test_the_server_gives_the_page_its_parts_and_figures(home):
    with serving(home) as server:
        kinds = {"/": "html", "/watch.js": "javascript", "/watch_charts.js": "javascript", "/watch.css": "css"}
        for path, kind in kinds.items():
            status, headers, body = ask(server, path)
            assert status == 200 and kind in headers["Content-Type"] and body
            assert "default-src 'none'" in headers["Content-Security-Policy"]
            assert "unsafe" not in headers["Content-Security-Policy"]
        listed = json.loads(ask(server, "/runs.json")[2])["runs"]
        assert len(listed) == 3
        curves = json.loads(ask(server, f"/curves.json?run={listed[-1]['id']}")[2])
        assert curves["name"] == listed[-1]["name"]
        assert ask(server, "/curves.json?run=../done")[2] == ask(server, "/curves.json")[2] == b"null"
        status, headers, body = ask(server, "/runs.json", "HEAD")
        assert status == 200 and body == b"" and int(headers["Content-Length"]) > 100


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "BREW"])
def test_nothing_can_be_written(home, method):
    with serving(home) as server:
        status, headers, _ = ask(server, "/runs.json", method)
        assert status == 405 and headers["Allow"] == "GET, HEAD"


@pytest.mark.parametrize("path", ["/../../etc/passwd", "/runs/done/run.json", "/%2e%2e/x", "//x", "/watch.html"])
def test_no_other_path_is_answered(home, path):
    with serving(home) as server:
        assert ask(server, path)[0] == 404


def test_a_name_that_was_made_to_lead_here_is_refused(home):
    with serving(home) as server:
        port = server.server_port
        strangers = ("evil.example", f"evil.example:{port}", "127.0.0.1:1", "", "192.168.0.7", f"localhost.evil:{port}")
        for host in strangers:
            assert ask(server, Host=host)[0] == 421, host
        for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"):
            assert ask(server, Host=host)[0] == 200, host


def test_it_listens_on_this_machine_alone_unless_told_otherwise(home):
    with serving(home) as server:
        assert server.local and server.server_address[0] == "127.0.0.1"
    with serving(home, host="0.0.0.0") as server:
        assert not server.local
        assert ask(server, Host=f"192.168.0.7:{server.server_port}")[0] == 200
        assert ask(server, Host=f"evil.example:{server.server_port}")[0] == 421
        assert ask(server, Host=f"{socket.gethostname()}:{server.server_port}")[0] == 200
        assert ask(server, Host=f"{socket.gethostname()}.evil.example:{server.server_port}")[0] == 421


def test_a_port_that_is_taken_is_one_clear_error(home, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["watch", str(home), "--port", str(port)]) == 2
    assert f"port {port} of 127.0.0.1 is taken by another program" in capsys.readouterr().err
    with pytest.raises(UsageError, match="between 0 and 65535"):
        Server(Watched([home]), port=70000)


@pytest.mark.processes
def test_ctrl_c_ends_it_with_a_plain_message(home):
    words = [sys.executable, "-m", "secateur.cli.main", "watch", str(home), "--port", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert "watching at http://127.0.0.1:" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and err == "" and "watch ended; the runs go on" in out
