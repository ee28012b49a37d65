"""Following a task: reconnecting at the right byte, signals, the status line, the journal."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentd.cli.call import Call
from agentd.cli.connection import Client
from agentd.cli.failures import Refusal, Unreachable
from agentd.cli.following import Frame, FrameDecoder, Output, journal_frame, last_lines
from agentd.cli.main import main
from agentd.cli.summary import status_line, summary_lines
from agentd.cli.terminal import Terminal
from agentd.cli.verbs import events
from tests.unit.test_cli_daemon import NOW, FakeDaemon, Reply, Request, ended, frame, log, ok, refused, task

ROOT = Path(__file__).parents[2]
ID = "k7m2q9x4ta"
CONTENT = b"one\ntwo\nthree\n\xff\x00 four\nfive"


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    monkeypatch.delenv("AGENTD_ROOT", raising=False)
    with FakeDaemon(tmp_path / "agentd.sock") as found:
        monkeypatch.setenv("AGENTD_SOCKET", str(found.path))
        yield found


def all_of(output: Output) -> list[Frame]:
    found: list[Frame] = []
    while (frames := output.poll(5.0)) is not None:
        found += frames
    output.close()
    return found


def data_of(output: Output) -> bytes:
    return b"".join(one.data for one in all_of(output))


# Frames


@pytest.mark.parametrize("size", [1, 2, 12, 13, 14, 17, 1000])
def test_frames_are_the_same_however_they_are_cut(size: int) -> None:
    raw = frame(1, b"hello") + frame(2, b"") + frame(2, b"\x00\xff" * 20, 7.5)
    decoder = FrameDecoder()
    found = [one for at in range(0, len(raw), size) for one in decoder.feed(raw[at : at + size])]
    assert found == [
        Frame("stdout", 1790000000.25, b"hello"), Frame("stderr", 1790000000.25, b""), Frame("stderr", 7.5, b"\x00\xff" * 20),
    ]  # fmt: skip


@pytest.mark.parametrize("cut", [1, 3, 13, 50])
def test_output_arrives_whole_through_awkward_pieces(daemon: FakeDaemon, cut: int) -> None:
    daemon.on(f"GET /v1/tasks/{ID}/logs", log(frame(1, CONTENT), frame(2, CONTENT), cut=cut))
    assert data_of(Output(Client(daemon.path), ID, follow=False)) == CONTENT * 2


@pytest.mark.parametrize(
    "pieces", [[CONTENT], [CONTENT[:5], CONTENT[5:9], CONTENT[9:]], [bytes([one]) for one in CONTENT]]
)
@pytest.mark.parametrize("ending", [b"", b"\n"])
def test_the_last_lines_are_those_that_tail_shows(pieces: list[bytes], ending: bytes) -> None:
    frames = [Frame("stdout", 0.0, one) for one in [*pieces, ending] if one]
    lines = (CONTENT + ending).splitlines(keepends=True)
    for count in range(7):
        assert b"".join(one.data for one in last_lines(frames, count)) == b"".join(lines[-count:] if count else [])


# Coming back


def resumable(
    daemon: FakeDaemon, *, break_at: list[int], end: threading.Event | None = None, streams: bool = False
) -> list[int]:
    """A daemon that loses the connection after so many bytes; returns the offsets it is asked for."""
    asked: list[int] = []
    left = list(break_at)

    def logs(request: Request) -> Reply:
        offset = int(request.query.get("offset", 0))
        assert "stream" not in request.query
        asked.append(offset)
        upto = left.pop(0) if left else len(CONTENT)
        frames = [frame(1 + (at % 2 if streams else 0), CONTENT[at : at + 2]) for at in range(offset, upto, 2)]
        return log(*frames, drop=upto < len(CONTENT))

    daemon.on(f"GET /v1/tasks/{ID}/logs", logs)
    daemon.on(f"GET /v1/tasks/{ID}", ended())
    return asked


def test_no_byte_is_lost_or_seen_twice_when_the_daemon_comes_and_goes(daemon: FakeDaemon) -> None:
    asked = resumable(daemon, break_at=[4, 4, 10, 12])
    said: list[str] = []
    assert data_of(Output(Client(daemon.path), ID, follow=True, notice=said.append)) == CONTENT
    assert asked == [0, 4, 4, 10, 12]
    assert said[0].startswith("the daemon is away") and said[1] == "the daemon is back"


@pytest.mark.parametrize("tail", [None, 1])
def test_output_that_was_dropped_counts(daemon: FakeDaemon, tail: int | None) -> None:
    def logs(request: Request) -> Reply:
        if "offset" in request.query and int(request.query["offset"]) >= 1006:
            return log(frame(1, b"after\n"))
        return log(frame(1, b"kept 1\n"[1:]), drop=tail is None, headers="Agentd-Offset: 1000\r\n")

    daemon.on(f"GET /v1/tasks/{ID}/logs", logs)
    daemon.on(f"GET /v1/tasks/{ID}", ended())
    output = Output(Client(daemon.path), ID, follow=True, tail=tail)
    assert data_of(output) == b"ept 1\nafter\n"
    assert output.offset == 1012


def test_a_frame_that_was_cut_off_is_asked_for_again(daemon: FakeDaemon) -> None:
    asked: list[str] = []

    def logs(request: Request) -> Reply:
        asked.append(request.query.get("offset", "0"))
        if len(asked) == 1:
            return log(frame(1, b"abc"), frame(1, b"defgh")[:15], drop=True)
        return log(frame(2, b"defgh"))

    daemon.on(f"GET /v1/tasks/{ID}/logs", logs)
    daemon.on(f"GET /v1/tasks/{ID}", ended())
    assert data_of(Output(Client(daemon.path), ID, follow=True)) == b"abcdefgh"
    assert asked == ["0", "3"]


def test_one_stream_is_followed_by_the_offset_of_both(daemon: FakeDaemon) -> None:
    def logs(request: Request) -> Reply:
        if request.query.get("offset") == "6":
            return log(frame(2, b"e2\n"), frame(1, b"o2\n"))
        return log(frame(1, b"o1\n"), frame(2, b"e1\n"), drop=True)

    daemon.on(f"GET /v1/tasks/{ID}/logs", logs)
    daemon.on(f"GET /v1/tasks/{ID}", ended())
    assert data_of(Output(Client(daemon.path), ID, follow=True, streams=("stderr",))) == b"e1\ne2\n"


def test_an_answer_that_ends_before_the_task_is_not_the_end(daemon: FakeDaemon) -> None:
    states = ["running", "succeeded"]
    daemon.on(f"GET /v1/tasks/{ID}", lambda request: ok(task(state=states.pop(0))))
    daemon.on(
        f"GET /v1/tasks/{ID}/logs",
        lambda request: log(frame(1, b"b")) if "offset" in request.query else log(frame(1, b"a")),
    )
    assert data_of(Output(Client(daemon.path), ID, follow=True)) == b"ab"
    assert states == []


def test_following_from_the_tail_goes_on_behind_it(daemon: FakeDaemon) -> None:
    def logs(request: Request) -> Reply:
        offset = int(request.query.get("offset", 0))
        if "follow" in request.query:
            assert offset == 8
            return log(frame(1, b"three\n"))
        return log(frame(1, b"one\n"), frame(2, b"two\n"))

    daemon.on(f"GET /v1/tasks/{ID}/logs", logs)
    daemon.on(f"GET /v1/tasks/{ID}", ended())
    assert data_of(Output(Client(daemon.path), ID, follow=True, tail=1)) == b"two\nthree\n"


def test_a_daemon_that_is_not_ready_yet_is_waited_for(daemon: FakeDaemon) -> None:
    replies = [log(frame(1, b"a"), drop=True), refused(503, "not_ready", "cannot answer yet"), log(frame(1, b"b"))]
    daemon.on(f"GET /v1/tasks/{ID}/logs", lambda request: replies.pop(0))
    daemon.on(f"GET /v1/tasks/{ID}", ended())
    assert data_of(Output(Client(daemon.path), ID, follow=True)) == b"ab"


def test_patience_ends(daemon: FakeDaemon) -> None:
    output = Output(Client(daemon.path), ID, follow=True, patient=True, patience_s=0.05)
    daemon.stop()
    with pytest.raises(Unreachable, match="there is no socket"):
        all_of(output)
    daemon.start()


def test_without_following_a_lost_answer_is_an_error(daemon: FakeDaemon) -> None:
    daemon.on(f"GET /v1/tasks/{ID}/logs", log(frame(1, b"a"), drop=True))
    with pytest.raises(Unreachable, match="in the middle"):
        all_of(Output(Client(daemon.path), ID, follow=False))


def test_a_task_that_is_gone_after_a_restart_is_an_error(daemon: FakeDaemon) -> None:
    replies = [log(frame(1, b"a"), drop=True), refused(404, "no_such_task", "cannot find it")]
    daemon.on(f"GET /v1/tasks/{ID}/logs", lambda request: replies.pop(0))
    with pytest.raises(Refusal, match="cannot find it"):
        all_of(Output(Client(daemon.path), ID, follow=True))


def restarting(daemon: FakeDaemon) -> None:
    """The socket is gone for a moment, as when systemd restarts the unit."""
    daemon.stop()
    threading.Timer(0.3, daemon.start).start()


def test_run_and_logs_follow_through_a_restart(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    def pieces() -> Iterator[bytes]:
        yield frame(1, b"before\n")
        restarting(daemon)

    def logs(request: Request) -> Reply:
        if request.query.get("offset") == "7":
            return log(frame(1, b"after\n"))
        return (
            log(*[], drop=True)
            if "offset" in request.query
            else Reply(pieces(), kind="application/x-agentd-log", drop=True)
        )

    daemon.on("POST /v1/tasks", ok(task(state="queued"), 201))
    daemon.on(f"GET /v1/tasks/{ID}/logs", logs)
    daemon.on(f"GET /v1/tasks/{ID}", ended())
    daemon.on(f"GET /v1/tasks/{ID}/wait", ended())
    for argv in (["run", "--", "true"], ["logs", "-f", ID]):
        assert main(argv) == 0
        found = capsys.readouterr()
        assert found.out == "before\nafter\n"
        assert "the daemon is away" in found.err and "the daemon is back" in found.err


def test_wait_goes_on_through_a_restart(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    answers = iter([1, 2])

    def wait(request: Request) -> Reply:
        if next(answers) == 1:
            restarting(daemon)
            return Reply([b"{"], drop=True)
        return ok(ended("failed", reason="exit", exit_code=9))

    daemon.on(f"GET /v1/tasks/{ID}/wait", wait)
    assert main(["wait", ID]) == 9
    assert "the daemon is away" in capsys.readouterr().err


def test_events_go_on_behind_the_last_one_seen(daemon: FakeDaemon) -> None:
    asked: list[str | None] = []

    def stream(request: Request) -> Reply:
        asked.append(request.query.get("after"))
        seq = len(asked) * 10
        line = json.dumps({"seq": seq, "time": NOW, "event": "started"}).encode() + b"\n"
        return Reply([line, b'{"seq": 99'], drop=True)

    daemon.on("GET /v1/events", stream)
    args = type("Args", (), {"json": True})()
    call = Call(args, Client(daemon.path), Terminal(sys.stdout), Terminal(sys.stderr))  # type: ignore[arg-type]
    found = events.stream(call, follow=True, after=5, task=None)
    assert [next(found)["seq"] for _ in range(3)] == [10, 20, 30]
    assert asked == ["5", "10", "20"]


# The journal


def test_output_in_the_journal_is_read_from_there(
    daemon: FakeDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [
        {"MESSAGE": "submitted", "AGENTD_EVENT": "submitted", "__REALTIME_TIMESTAMP": "1790000000000000"},
        {"MESSAGE": "hello", "AGENTD_STREAM": "stdout", "__REALTIME_TIMESTAMP": "1790000000500000"},
        {"MESSAGE": [255, 10], "AGENTD_STREAM": "stderr", "__REALTIME_TIMESTAMP": "1790000000500000"},
    ]
    (tmp_path / "entries").write_text("".join(json.dumps(one) + "\n" for one in entries))
    journalctl = tmp_path / "journalctl"
    journalctl.write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/argv\ncat {tmp_path}/entries\ncase "$*" in *--follow*) exec sleep 60;; esac\n'
    )
    journalctl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    daemon.on(f"GET /v1/tasks/{ID}/logs", {"journald": {"AGENTD_TASK": ID}})
    daemon.on(f"GET /v1/tasks/{ID}", ended())
    for argv in (["logs", ID], ["logs", "-f", ID]):
        assert main([*argv, "--json"]) == 0
        assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
            {"stream": "stdout", "time": 1790000000.5, "data": "hello\n"},
            {"stream": "stderr", "time": 1790000000.5, "data": "�\n\n"},
        ]
    assert f"--follow --no-tail AGENTD_TASK={ID}" in (tmp_path / "argv").read_text()


def test_a_line_that_is_no_entry_is_no_frame() -> None:
    assert journal_frame(b"-- No entries --") is None


# What run shows


def terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> Terminal:
    found = Terminal(sys.stderr, "never")
    found.unicode = True
    monkeypatch.setattr(Terminal, "columns", lambda self: columns)
    return found


def test_the_status_line_fits_and_is_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    one = task(progress={"text": "reading\x1b[2J", "fraction": 0.25})
    shown = status_line(one, terminal(100, monkeypatch), NOW)
    assert shown == "k7m2q9x4ta running · 25% reading\\x1b[2J · 1m39s · $0.0012"
    assert status_line(one, terminal(30, monkeypatch), NOW) == "k7m2q9x4ta running · 25% read…"[:28] + "…"
    queued = task(state="queued", started_at=None, position=3, waiting_for="memory", progress=None, llm=None)
    assert status_line(queued, terminal(100, monkeypatch), NOW) == "k7m2q9x4ta queued · #3 memory · 1m39s"


def test_the_summary_says_what_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(80, monkeypatch)
    assert summary_lines(ended(has_result=True), screen) == [
        "k7m2q9x4ta succeeded · wall 1.2s · cpu 0.4s · memory peak 30.0M · tokens 310 in, 42 out · cost $0.0012 · 3 packets denied",
        "  its result: agentctl result k7m2q9x4ta",
    ]
    scripted = ended("failed", reason="start_failed", detail="no such file: agent.py", usage={})
    scripted["llm"]["scripted"] = True
    first, detail, advice = summary_lines(scripted, screen)
    assert first.endswith("cost $0.0012 · scripted provider, not a model")
    assert detail == "  no such file: agent.py"
    assert "exit code 125" in advice
    assert "no model calls" in summary_lines(ended(llm={"requests": 0}), screen)[0]


def test_run_for_programs_is_lines_between_two_tasks(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.on("POST /v1/tasks", ok(task(state="queued"), 201))
    daemon.on(f"GET /v1/tasks/{ID}/logs", log(frame(1, b"a"), frame(2, b"b")))
    daemon.on(f"GET /v1/tasks/{ID}", ended())
    daemon.on(f"GET /v1/tasks/{ID}/wait", ended())
    assert main(["run", "--json", "--", "true"]) == 0
    found = capsys.readouterr()
    first, *frames, last = map(json.loads, found.out.splitlines())
    assert (first["task"]["state"], last["task"]["state"]) == ("queued", "succeeded")
    assert [(one["stream"], one["data"]) for one in frames] == [("stdout", "a"), ("stderr", "b")]
    assert found.err == ""


# Signals


class Running:
    """A daemon with one task that runs until it is stopped or killed."""

    def __init__(self, daemon: FakeDaemon, ends_on: str):
        self.over = threading.Event()
        self.asked: list[str] = []
        self.following = threading.Event()

        def logs(request: Request) -> Reply:
            def pieces() -> Iterator[bytes]:
                yield frame(1, b"working\n")
                self.following.set()
                self.over.wait(15)

            return Reply(pieces(), kind="application/x-agentd-log")

        def act(request: Request) -> Reply:
            what = request.path.rsplit("/", 1)[1]
            self.asked.append(what)
            if what == ends_on:
                self.over.set()
            return ok(self.task())

        daemon.on("POST /v1/tasks", ok(task(state="queued"), 201))
        daemon.on(f"GET /v1/tasks/{ID}/logs", logs)
        daemon.on(f"GET /v1/tasks/{ID}", lambda request: ok(self.task()))
        daemon.on(f"GET /v1/tasks/{ID}/wait", self.wait)
        daemon.on(f"POST /v1/tasks/{ID}/stop", act)
        daemon.on(f"POST /v1/tasks/{ID}/kill", act)

    def wait(self, request: Request) -> Reply:
        self.over.wait(15)
        return ok(self.task())

    def task(self) -> dict[str, Any]:
        return ended("cancelled", reason="stopped", signal=15) if self.over.is_set() else task()


@contextlib.contextmanager
def started(*argv: str, **more: Any) -> Iterator[subprocess.Popen[bytes]]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-m", "agentd.cli", *argv], env=environment, **more)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


PIPES: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_without_a_terminal_a_signal_stops_the_task_at_once(daemon: FakeDaemon, number: signal.Signals) -> None:
    running = Running(daemon, "stop")
    with started("run", "--", "true", **PIPES) as process:
        assert process.stdout is not None and process.stdout.readline() == b"working\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=15)
    assert (process.returncode, running.asked) == (122, ["stop"])
    assert f"stopping {ID}".encode() in err and f"{ID} cancelled".encode() in err


def test_without_a_terminal_a_second_signal_kills_it(daemon: FakeDaemon) -> None:
    running = Running(daemon, "kill")
    with started("run", "--", "true", **PIPES) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"working\n"
        process.send_signal(signal.SIGTERM)
        assert b"stopping" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=15) == 122
    assert running.asked == ["stop", "kill"]


class Screen:
    """The other side of a pseudo-terminal."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        self.seen = b""

    def until(self, text: bytes) -> None:
        while text not in self.seen:
            try:
                data = os.read(self.master, 4096)
            except OSError:
                data = b""
            assert data, f"{text!r} is not in {self.seen!r}"
            self.seen += data

    def forget(self) -> None:
        self.seen = b""

    def close(self) -> None:
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def screen() -> Iterator[Screen]:
    found = Screen()
    yield found
    found.close()


def test_on_a_terminal_ctrl_c_tells_then_stops_then_kills(daemon: FakeDaemon, screen: Screen) -> None:
    running = Running(daemon, "kill")
    with started("run", "--", "true", stdin=screen.slave, stdout=screen.slave, stderr=screen.slave) as process:
        screen.until(b"working\r\n")
        screen.until(b"k7m2q9x4ta running")  # the status line
        process.send_signal(signal.SIGINT)
        screen.until(b"press again within 5 s to stop the task; it runs on as k7m2q9x4ta")
        assert running.asked == []
        process.send_signal(signal.SIGINT)
        screen.until(b"stopping k7m2q9x4ta")
        assert running.asked == ["stop"]
        process.send_signal(signal.SIGINT)
        screen.until(b"killing k7m2q9x4ta")
        screen.until(b"cancelled")
        assert process.wait(timeout=15) == 122
    assert running.asked == ["stop", "kill"]


def test_on_a_terminal_ctrl_backslash_leaves_the_task_running(daemon: FakeDaemon, screen: Screen) -> None:
    running = Running(daemon, "stop")
    with started("run", "--", "true", stdin=screen.slave, stdout=screen.slave, stderr=screen.slave) as process:
        screen.until(b"working\r\n")
        process.send_signal(signal.SIGQUIT)
        screen.until(b"k7m2q9x4ta runs on")
        assert process.wait(timeout=15) == 130
    assert running.asked == []
    running.over.set()


@pytest.mark.parametrize("argv", [["logs", "-f", ID], ["wait", ID], ["events", "-f"]])
def test_looking_ends_with_ctrl_c_and_the_task_goes_on(daemon: FakeDaemon, argv: list[str]) -> None:
    running = Running(daemon, "stop")
    looked = threading.Event()

    def stream(request: Request) -> Reply:
        def pieces() -> Iterator[bytes]:
            yield b'{"seq": 1, "time": 0, "event": "started"}\n'
            running.over.wait(15)

        return Reply(pieces())

    def wait(request: Request) -> Reply:
        looked.set()
        return running.wait(request)

    daemon.on("GET /v1/events", stream)
    daemon.on(f"GET /v1/tasks/{ID}/wait", wait)
    with started(*argv, **PIPES) as process:
        assert process.stdout is not None
        if argv[0] == "wait":
            assert looked.wait(15)
        else:
            assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=15) == 130
        assert process.stderr is not None and b"Traceback" not in process.stderr.read()
    assert running.asked == []
    running.over.set()
