"""What every verb asks, prints and exits with, against a daemon that speaks docs/api.md."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentd.cli import hostcheck
from agentd.cli.main import VERBS, main, parser_of
from agentd.cli.outcomes import exit_code_of
from agentd.cli.terminal import Terminal, clip, cost, harmless, width
from tests.unit.test_cli_daemon import NOW, FakeDaemon, Reply, Request, ended, frame, log, ok, refused, task

ROOT = Path(__file__).parents[2]


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    for name in ("AGENTD_ROOT", "NO_COLOR", "CLICOLOR_FORCE"):
        monkeypatch.delenv(name, raising=False)
    with FakeDaemon(tmp_path / "agentd.sock") as found:
        monkeypatch.setenv("AGENTD_SOCKET", str(found.path))
        monkeypatch.setenv("TZ", "UTC")
        time.tzset()
        monkeypatch.chdir(tmp_path)
        yield found


def script(*argv: str, **more: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "agentd.cli", *argv],
        capture_output=True, check=False, timeout=20, **({"env": os.environ | {"PYTHONPATH": str(ROOT)}} | more),
    )  # fmt: skip


# What is printed


def test_the_table_of_tasks(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.on("GET /v1/tasks", {"tasks": [
        task(name="first agent", progress={"text": "reading the third of twelve long chapters", "fraction": 0.25}),
        task(id="p3nd", name="", state="queued", started_at=None, position=2, waiting_for="memory", progress=None,
             llm={"requests": 0}, **{"class": "batch"}),
        ended("failed", id="x9", name="日本", reason="exit", exit_code=3, progress=None, usage={}, llm={}),
    ]})  # fmt: skip
    monkeypatch.setattr(time, "time", lambda: NOW)
    assert main(["ps", "-a"]) == 0
    assert (
        capsys.readouterr().out
        == """\
ID          NAME              CLASS   STATE    AGE    RUN    REASON     PROGRESS                              COST
k7m2q9x4ta  first agent       normal  running  1m39s  1m39s  -          25% reading the third of twelve lon…  $0.0012
p3nd        python3 agent.py  batch   queued   1m39s  -      #2 memory  -                                     -
x9          日本              normal  failed   1m39s  1.2s   exit 3     -                                     -
"""
    )
    assert daemon.requests[-1].query == {"all": "1"}


def test_filters_and_quiet(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.on("GET /v1/tasks", {"tasks": [task(), task(id="b")]})
    assert main(["ps", "-q", "--state", "running", "--class", "batch", "--tenant", "a b"]) == 0
    assert capsys.readouterr().out == "k7m2q9x4ta\nb\n"
    assert daemon.requests[-1].query == {"state": "running", "class": "batch", "tenant": "a b"}


def test_show_tells_everything(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: NOW)
    spec = {
        "memory": 1 << 30, "cpus": 1.0, "pids": 512, "timeout": 3600, "grace": "10s", "labels": {"team": "a"},
        "mounts": [{"source": "/data", "target": "/mnt", "read_only": False}],
        "inputs": [{"path": "notes.md", "base64": "aGVsbG8h"}],
    }  # fmt: skip
    done = ended(
        "failed", name="n", reason="signal", signal=9, detail="killed by \x1b[31msignal 9", has_result=True, spec=spec
    )
    done["llm"]["scripted"] = True
    daemon.on("GET /v1/tasks/k7", done)
    assert main(["show", "k7"]) == 0
    assert (
        capsys.readouterr().out
        == r"""Task       k7m2q9x4ta
Name       n
State      failed (signal 9)
Detail     killed by \x1b[31msignal 9
Command    python3 agent.py
Class      normal, priority 0
Owner      root, tenant default
Submitted  2026-09-21 14:13:20 (1m39s ago)
Started    2026-09-21 14:13:20 (1m39s ago)
Ended      2026-09-21 14:13:21 (1m38s ago), after 1.2s
Exit       signal 9
Progress   25% reading (1m39s ago)
Used       cpu 0.4s · memory peak 30.0M · read 0B · written 4.0K · received 1.2K · sent 900B · 3 packets denied
Models     2 requests · 310 tokens in, 42 out · cost $0.0012 · gpt-4o-mini x2 · scripted provider, not a model
Limits     memory 1.0G · cpus 1.0 · pids 512 · timeout 1h · grace 10s
Mount      /data at /mnt, read-write
Input      notes.md, 6B
Label      team=a
Workspace  /var/lib/agentd/workspaces/k7m2q9x4ta
Result     agentctl result k7m2q9x4ta
"""
    )


def test_events_are_lines_for_people_and_for_programs(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    events = [
        {
            "seq": 7,
            "time": 1790000000.5,
            "task": "k7",
            "event": "progress",
            "text": "a\x1b]0;b\x07\nc",
            "fraction": 0.5,
        },
        {"seq": 8, "time": 1790000001.0, "task": None, "event": "adopted", "tasks": ["k7"]},
    ]
    daemon.on("GET /v1/events", Reply([json.dumps(one).encode() + b"\n" for one in events], cut=5))
    assert main(["events", "--after", "6", "k7"]) == 0
    assert capsys.readouterr().out == (
        "2026-09-21 14:13:20       7  k7          progress    text=a\\x1b]0;b\\x07\\nc fraction=0.5\n"
        '2026-09-21 14:13:21       8  -           adopted     tasks=["k7"]\n'
    )
    assert daemon.requests[-1].query == {"after": "6", "task": "k7"}
    assert main(["events", "--json"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == events


def test_log_streams_go_to_their_own_descriptors(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.on("GET /v1/tasks/k7/logs", log(frame(1, b"out\x1b[1m\n"), frame(2, b"err\n"), cut=3))
    assert main(["logs", "k7"]) == 0
    assert capsys.readouterr() == ("out\x1b[1m\n", "err\n")


def test_log_timestamps_stand_before_lines_not_before_frames(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.on("GET /v1/tasks/k7/logs", log(frame(1, b"a"), frame(1, b"b\n\nc\r5%"), frame(1, b"\n")))
    assert main(["logs", "-t", "k7"]) == 0
    stamp = "2026-09-21T14:13:20.250Z"
    assert capsys.readouterr().out.replace("\r", "<CR>") == f"{stamp} ab\n{stamp} \n{stamp} c<CR>5%\n"


def test_logs_for_programs_survive_bytes_that_are_no_text(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.on("GET /v1/tasks/k7/logs", log(frame(2, b"\xff\n")))
    assert main(["logs", "--json", "--tail", "5", "--stream", "stderr", "k7"]) == 0
    assert json.loads(capsys.readouterr().out) == {"stream": "stderr", "time": 1790000000.25, "data": "�\n"}
    assert daemon.requests[-1].query == {"tail": "5", "stream": "stderr"}


def test_results_are_text_or_json(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    answer = {"id": "k7", "state": "succeeded", "result": {"a": [1]}, "text": "# Report"}
    daemon.on("GET /v1/tasks/k7/result", answer)
    daemon.on("GET /v1/tasks/k8/result", answer | {"text": None})
    assert main(["result", "k7"]) == main(["result", "k8"]) == main(["result", "--json", "k7"]) == 0
    text, _, document = capsys.readouterr().out.partition('{"id"')
    assert text == '# Report\n{\n  "a": [\n    1\n  ]\n}\n'
    assert json.loads('{"id"' + document) == answer
    assert main(["result", "-o", str(tmp_path / "r.md"), "k7"]) == 0
    assert (tmp_path / "r.md").read_text() == "# Report\n"
    assert main(["result", "-o", str(tmp_path / "no/r.md"), "k7"]) == 1
    assert "cannot write the result" in capsys.readouterr().err


def test_a_task_without_a_result_is_not_a_missing_task(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.on("GET /v1/tasks/k7/result", refused(404, "no_result", "cannot show the result of k7: it left none"))
    assert main(["result", "k7"]) == 1
    assert capsys.readouterr().err == "agentctl: cannot show the result of k7: it left none\n"


def test_versions_of_both_sides(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.on("GET /v1/version", {"version": "0.1.0", "api": 1, "uptime_s": 90, "ready": True})
    assert main(["version"]) == 0
    assert capsys.readouterr().out == "agentctl 0.1.0\nagentd   0.1.0 (API v1, up 1m30s)\n"
    daemon.stop()
    assert main(["--json", "version"]) == 0
    assert json.loads(capsys.readouterr().out) == {"agentctl": "0.1.0", "daemon": None}
    daemon.start()


def test_the_schema_is_json_either_way(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.on("GET /v1/schema/task", {"type": "object"})
    assert main(["schema", "task"]) == main(["schema", "task", "--json"]) == 0
    assert capsys.readouterr().out == '{\n  "type": "object"\n}\n{"type": "object"}\n'


def test_stop_kill_and_rm_say_what_they_ask(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.on("POST /v1/tasks/k7/stop", task())
    daemon.on("POST /v1/tasks/k7/kill", task())
    daemon.on("DELETE /v1/tasks/k7", {"id": "k7m2q9x4ta", "removed": True})
    assert main(["stop", "--grace", "1m30s", "k7"]) == main(["stop", "k7"]) == 0
    assert main(["kill", "k7"]) == main(["kill", "-s", "SIGusr1", "k7"]) == main(["kill", "-s", "15", "k7"]) == 0
    assert main(["rm", "k7", "-f", "k7"]) == 0
    assert [one.body for one in daemon.requests] == [
        {"grace_s": 90.0}, {}, {"signal": "KILL"}, {"signal": "USR1"}, {"signal": "TERM"}, None, None,
    ]  # fmt: skip
    assert daemon.requests[-1].query == {"force": "1"}
    assert capsys.readouterr().out == "k7m2q9x4ta\n" * 7


def test_one_bad_id_does_not_keep_the_others(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.on("POST /v1/tasks/no/stop", refused(404, "no_such_task", "cannot find the task no"))
    daemon.on("POST /v1/tasks/k7/stop", task())
    assert main(["stop", "no", "k7"]) == 4
    found = capsys.readouterr()
    assert found.out == "k7m2q9x4ta\n"
    assert "cannot find the task no" in found.err


def test_an_id_cannot_reach_another_call(daemon: FakeDaemon) -> None:
    daemon.on("GET /v1/tasks/../config?x", task())
    assert main(["show", "../config?x"]) == 0
    assert main(["show", " "]) == 2


# Text from tasks


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
        ("\x9b31m", "\\x9b31m"),
        ("\r\n\t\x00\x7f", "\\r\\n\\t\\x00\\x7f"),
        ("a\u202eb\u2066", "a\\u202eb\\u2066"),
        ("\ud800", "\\ud800"),
        ("äß日本 🎉 \\x1b", "äß日本 🎉 \\x1b"),
    ],
)
def test_control_characters_are_written_out(text: str, shown: str) -> None:
    assert harmless(text) == shown


@pytest.mark.parametrize("verb", [["ps"], ["show", "k7"], ["wait", "k7"]])
def test_no_escape_of_a_task_reaches_the_terminal(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], verb: list[str]
) -> None:
    evil = "\x1b]52;c;ZXZpbA==\x07\r\x9b2J"
    bad = ended(
        "failed", name=evil, detail=evil, waiting_for=evil, user=evil, tenant=evil, workspace=evil, command=[evil],
        progress={"text": evil}, spec={"labels": {evil: evil}, "memory": evil, "inputs": [{"path": evil}]}, reason=evil,
        **{"class": evil},
    )  # fmt: skip
    bad["llm"] = {"requests": 1, "models": {evil: 1}}
    daemon.on("GET /v1/tasks", {"tasks": [bad, bad | {"state": "queued"}]})
    daemon.on("GET /v1/tasks/k7", bad)
    daemon.on("GET /v1/tasks/k7/wait", bad)
    main(verb)
    found = capsys.readouterr()
    assert set(found.out + found.err) & set("\x1b\x07\r\x9b") == set()


def test_errors_with_control_characters_are_written_out(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.on("GET /v1/tasks/k7", refused(400, "invalid_field", "cannot \x1b[31m", hint="a\nb"))
    assert main(["show", "k7"]) == 2
    assert capsys.readouterr().err == "agentctl: cannot \\x1b[31m\n  hint: a\\nb\n"


def test_widths_count_columns() -> None:
    assert [width(one) for one in ("abc", "日本", "e\u0301")] == [3, 4, 1]
    assert [clip("日本語", 6), clip("日本語", 5), clip("abcdef", 4, "~")] == ["日本語", "日本…", "abc~"]


@pytest.mark.parametrize(
    ("llm", "text"),
    [
        (None, "-"),
        ({"requests": 0, "cost_usd": 0}, "-"),
        ({"requests": 1, "cost_usd": 0.0}, "$0.00"),
        ({"requests": 1, "cost_usd": 0.0012}, "$0.0012"),
        ({"requests": 1, "cost_usd": 12.3456}, "$12.35"),
        ({"requests": 1, "cost_usd": 0.5, "cost_known": False}, ">=$0.5000"),
    ],
)
def test_costs(llm: dict[str, Any] | None, text: str) -> None:
    assert cost(llm) == text


@pytest.mark.parametrize(
    ("environment", "tty", "option", "colored"),
    [
        ({}, True, "auto", True),
        ({}, False, "auto", False),
        ({"NO_COLOR": "1"}, True, "auto", False),
        ({"CLICOLOR_FORCE": "1"}, False, "auto", True),
        ({"CLICOLOR_FORCE": "1", "NO_COLOR": "1"}, True, "auto", False),
        ({"TERM": "dumb"}, True, "auto", False),
        ({"NO_COLOR": "1"}, False, "always", True),
        ({"CLICOLOR_FORCE": "1"}, True, "never", False),
    ],
)
def test_when_there_is_colour(
    environment: dict[str, str], tty: bool, option: str, colored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "CLICOLOR_FORCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return tty

    assert Terminal(Stream(), option).colored is colored


def test_colours_are_only_around_states(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.on("GET /v1/tasks", {"tasks": [task()]})
    assert main(["ps", "--color=always"]) == 0
    assert "\x1b[36mrunning\x1b[0m" in capsys.readouterr().out
    assert main(["ps"]) == 0
    assert "\x1b" not in capsys.readouterr().out


# Exit codes


ENDS = [
    ({"state": "succeeded"}, 0),
    ({"state": "failed", "reason": "exit", "exit_code": 3}, 3),
    ({"state": "failed", "reason": "exit", "exit_code": 255}, 255),
    ({"state": "failed", "reason": "signal", "signal": 15}, 143),
    ({"state": "failed", "reason": "signal", "signal": "SIGSEGV"}, 139),
    ({"state": "failed", "reason": "killed", "signal": "KILL"}, 137),
    ({"state": "failed", "reason": "oom"}, 137),
    ({"state": "failed", "reason": "lost"}, 120),
    ({"state": "failed", "reason": "start_failed"}, 125),
    ({"state": "failed", "reason": None, "exit_code": 0}, 125),
    ({"state": "cancelled", "reason": "stopped", "signal": 15}, 122),
    ({"state": "expired", "reason": "timeout", "signal": 9}, 124),
]


@pytest.mark.parametrize(("changes", "code"), ENDS)
def test_run_and_wait_exit_as_the_task_did(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], code: int
) -> None:
    done = ended(**changes)
    assert exit_code_of(done) == code
    daemon.on("GET /v1/tasks/k7m2q9x4ta/wait", done)
    daemon.on("GET /v1/tasks/k7m2q9x4ta", done)
    daemon.on("POST /v1/tasks", ok(task(state="queued"), 201))
    daemon.on("GET /v1/tasks/k7m2q9x4ta/logs", log(frame(1, b"hello\n")))
    assert main(["wait", "k7m2q9x4ta"]) == code
    assert capsys.readouterr().out == f"k7m2q9x4ta {changes['state']}\n"
    assert main(["run", "--", "true"]) == code
    found = capsys.readouterr()
    assert found.out == "hello\n"
    assert found.err.startswith(f"k7m2q9x4ta {changes['state']}")


def test_wait_exits_with_the_first_failure_of_several(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.on("GET /v1/tasks/a/wait", ended(id="a"))
    daemon.on("GET /v1/tasks/b/wait", ended("failed", id="b", reason="exit", exit_code=7))
    daemon.on("GET /v1/tasks/c/wait", ended("expired", id="c"))
    assert main(["wait", "--json", "a", "b", "c"]) == 7
    assert [one["id"] for one in json.loads(capsys.readouterr().out)["tasks"]] == ["a", "b", "c"]


def test_wait_gives_up_at_its_timeout(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.on("GET /v1/tasks/a/wait", task(id="a"))
    assert main(["wait", "--timeout", "10ms", "a"]) == 75
    assert capsys.readouterr() == ("a running\n", "agentctl: 1 of 1 have not ended in time\n")
    assert main(["wait", "--timeout", "soon", "a"]) == 2


@pytest.mark.parametrize(
    ("status", "code", "exit_code"),
    [
        (400, "invalid_field", 2), (400, "unknown_field", 2), (403, "not_permitted", 77), (404, "no_such_task", 4),
        (404, "not_found", 1), (409, "ambiguous_id", 1), (409, "wrong_state", 1), (413, "too_large", 1),
        (503, "not_ready", 75), (503, "queue_full", 75), (500, "internal", 1),
    ],
)  # fmt: skip
def test_refusals_have_exit_codes(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], status: int, code: str, exit_code: int
) -> None:
    reply = refused(status, code, "cannot do it: because", hint="do that")
    for route in (
        "GET /v1/tasks/k7",
        "POST /v1/tasks",
        "GET /v1/tasks/k7/logs",
        "GET /v1/events",
        "GET /v1/tasks/k7/wait",
    ):
        daemon.on(route, reply)
    verbs = [
        ["show", "k7"],
        ["submit", "--", "true"],
        ["logs", "-f", "k7"],
        ["logs", "--tail", "1", "-f", "k7"],
        ["events"],
    ]
    for argv in verbs:
        assert main(argv) == exit_code
        assert capsys.readouterr() == ("", "agentctl: cannot do it: because\n  hint: do that\n")
    assert main(["show", "--json", "k7"]) == exit_code
    assert json.loads(capsys.readouterr().err)["error"]["code"] == code


def test_a_daemon_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AGENTD_SOCKET", raising=False)
    monkeypatch.setenv("AGENTD_ROOT", str(tmp_path))
    for argv in (["ps"], ["run", "--", "true"], ["logs", "-f", "k7"], ["wait", "k7"], ["events", "-f"], ["rm", "k7"]):
        assert main(argv) == 69, argv
        err = capsys.readouterr().err
        assert f"there is no socket {tmp_path}/run/agentd/agentd.sock" in err
        assert "start it with" in err
        assert f"AGENTD_ROOT is {tmp_path}" in err


def test_a_socket_that_nobody_listens_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(path))
    monkeypatch.setenv("AGENTD_SOCKET", str(path))
    assert main(["ps"]) == 69
    assert f"nothing listens on {path} any more" in capsys.readouterr().err


def test_a_socket_for_another_group(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    def denied(*found: object) -> None:
        raise PermissionError(13, "Permission denied")

    class Denied(socket.socket):
        connect = denied  # type: ignore[assignment]

    monkeypatch.setattr(socket, "socket", Denied)
    monkeypatch.setenv("AGENTD_SOCKET", str(tmp_path / "s"))
    assert main(["ps"]) == 69
    err = capsys.readouterr().err
    assert "is for the group agentd and you are not in it" in err
    assert "usermod -aG agentd" in err


# What is asked for wrongly


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["lgos"], "did you mean `agentctl logs`?"),
        (["zzzzzz"], "`agentctl --help` lists them"),
        (["ps", "--stat", "running"], "did you mean --state?"),
        (["--jsn", "ps"], "did you mean --json?"),
        (["ps", "--state", "walking"], "walking"),
        (["run"], "put it behind `--`"),
        (["run", "--"], "put it behind `--`"),
        (["run", "python3", "agent.py"], "put the command behind `--`"),
        (["run", "agent.py"], "put a command behind `--`"),
        (["kill", "-s", "TREM", "k7"], "did you mean TERM?"),
        (["stop", "--grace", "soon", "k7"], "not a duration"),
        (["logs", "--tail", "-1", "k7"], "--tail"),
        (["wait"], "ID"),
        (["config", "show", "x.toml"], "agentctl config check x.toml"),
        (["help", "lgs"], "did you mean 'logs'?"),
        (["submit", "--env", "AGENTD_TEST_UNSET", "--", "true"], "write --env AGENTD_TEST_UNSET=VALUE"),
        (["submit", "--env", "=x", "--", "true"], "it has no name"),
        (["submit", "--label", "x", "--", "true"], "NAME=VALUE"),
        (["submit", "--mount", "/a:/b:rx", "--", "true"], "SOURCE:TARGET:rw"),
        (["submit", "--cpus", "two", "--", "true"], "two"),
        (["submit", "-f", "a.toml", "b.toml"], "name one"),
    ],
)
def test_mistakes_are_answered_with_the_way_out(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], argv: list[str], said: str
) -> None:
    assert main(argv) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.startswith("agentctl: cannot ")
    assert said in found.err
    assert daemon.requests == []


# Tasks from flags and files


TOML = """
command = ["python3", "agent.py"]
name = "first"
class = "batch"
priority = 5
tenant = "lab"
memory = "512M"
cpus = 0.5
pids = 64
timeout = 90
grace = "5s"
inputs = ["notes.md", {source = "sub/run.sh", path = "bin/run.sh"}]
mounts = [{source = "data", target = "/data"}, "/srv:/srv:rw"]
[env]
A = "1"
[labels]
team = "x"
"""
FLAGS = [
    "--name", "first", "--class", "batch", "--priority", "5", "--tenant", "lab", "--memory", "512M", "--cpus", "0.5",
    "--pids", "64", "--timeout", "90", "--grace", "5s", "--input", "notes.md", "--input", "sub/run.sh:bin/run.sh",
    "--mount", "data:/data:ro", "--mount", "/srv:/srv:rw", "--env", "A", "--label", "team=x", "--", "python3", "agent.py",
]  # fmt: skip


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "notes.md").write_bytes(b"caf\xe9\x00")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/run.sh").write_text("#!/bin/sh\n")
    (tmp_path / "sub/run.sh").chmod(0o755)
    (tmp_path / "task.toml").write_text(TOML)
    return tmp_path


def accepting(daemon: FakeDaemon) -> None:
    daemon.on("POST /v1/tasks", lambda request: ok(task(state="queued"), 201))


def test_flags_a_toml_file_and_a_json_file_ask_for_the_same(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tomllib

    accepting(daemon)
    monkeypatch.setenv("A", "1")
    assert main(["submit", *FLAGS]) == 0
    monkeypatch.chdir("/")  # a file's paths are relative to the file
    assert main(["submit", str(files / "task.toml")]) == 0
    (files / "task.json").write_text(json.dumps(tomllib.loads(TOML)))
    (files / "task").write_text(json.dumps(tomllib.loads(TOML)))
    assert main(["submit", str(files / "task.json")]) == main(["run", "--detach", "-f", str(files / "task")]) == 0
    assert capsys.readouterr().out == "k7m2q9x4ta\n" * 4
    first, *others = [one.body for one in daemon.requests]
    for other in others:
        for mount in other["mounts"]:
            mount.setdefault("read_only", True)
        assert other == first
    notes, run = first.pop("inputs")
    assert (notes["path"], base64.b64decode(notes["base64"])) == ("notes.md", b"caf\xe9\x00")
    assert (run["path"], run["mode"], base64.b64decode(run["base64"])) == ("bin/run.sh", 0o755, b"#!/bin/sh\n")
    assert first == {
        "command": ["python3", "agent.py"], "name": "first", "class": "batch", "priority": 5, "tenant": "lab",
        "memory": "512M", "cpus": 0.5, "pids": 64, "timeout": 90, "grace": "5s", "env": {"A": "1"}, "labels": {"team": "x"},
        "mounts": [
            {"source": str(files / "data"), "target": "/data", "read_only": True},
            {"source": "/srv", "target": "/srv", "read_only": False},
        ],
    }  # fmt: skip


def test_flags_go_before_the_file(daemon: FakeDaemon, files: Path) -> None:
    accepting(daemon)
    (files / "more.txt").write_text("x")
    argv = [
        "--memory",
        "1G",
        "--env",
        "B=2=3",
        "--env",
        "A=",
        "--label",
        "team=y",
        "--input",
        "more.txt",
        "--mount",
        "/a:/b",
    ]
    assert main(["submit", *argv, "task.toml", "--", "sh", "-c", "--", "x"]) == 0
    body = daemon.requests[-1].body
    assert (body["command"], body["memory"], body["cpus"]) == (["sh", "-c", "--", "x"], "1G", 0.5)
    assert (body["env"], body["labels"]) == ({"A": "", "B": "2=3"}, {"team": "y"})
    assert [one["path"] for one in body["inputs"]] == ["notes.md", "bin/run.sh", "more.txt"]
    assert [one["target"] for one in body["mounts"]] == ["/data", "/srv", "/b"]


def test_a_task_comes_from_standard_input(daemon: FakeDaemon) -> None:
    accepting(daemon)
    done = script("submit", "-", input=b'\xef\xbb\xbf\n {"command": ["true"], "name": "\xc3\xa4"}')
    assert (done.returncode, done.stdout) == (0, b"k7m2q9x4ta\n")
    assert daemon.requests[-1].body == {"command": ["true"], "name": "ä"}
    done = script("submit", "-", input=b'command = ["true"]')
    assert (done.returncode, daemon.requests[-1].body) == (0, {"command": ["true"]})


def test_an_input_that_is_encoded_already_stays_as_it_is(daemon: FakeDaemon, tmp_path: Path) -> None:
    accepting(daemon)
    body = {"command": ["true"], "inputs": [{"path": "a", "base64": "aGk=", "mode": 384}]}
    (tmp_path / "t.json").write_text(json.dumps(body))
    assert main(["submit", "t.json"]) == 0
    assert daemon.requests[-1].body == body


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        (b'command = ["a"', 2, "cannot read the task file t.toml as TOML"),
        (b"\xff", 2, "byte 0 is not UTF-8"),
        (b'command = ["a"]\ninputs = "x"', 2, "inputs is not a list"),
        (b'command = ["a"]\ninputs = ["missing"]', 1, "No such file or directory"),
        (b'command = ["a"]\ninputs = ["."]', 1, "it is a directory"),
        (b'command = ["a"]\ninputs = [{source = "t.toml", pth = "x"}]', 2, "there is no field 'pth'"),
        (b'command = ["a"]\ninputs = ["t.toml", "../x/t.toml"]', 2, "cannot send two inputs as 't.toml'"),
        (b'command = ["a"]\nmounts = ["/a"]', 2, "cannot read the mount '/a'"),
        (b'name = "x"', 2, "without a command"),
    ],
)
def test_a_task_file_that_is_wrong_is_not_sent(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes, code: int, said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "x").mkdir()
    (tmp_path / "x/t.toml").write_bytes(content)
    monkeypatch.chdir(tmp_path / "x")
    assert main(["submit", "t.toml"]) == code
    assert said in capsys.readouterr().err
    assert daemon.requests == []


def test_a_missing_task_file(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "nowhere.toml"]) == 1
    assert "cannot read the task file nowhere.toml: No such file or directory" in capsys.readouterr().err


def test_inputs_together_are_limited(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agentd.cli import taskspec

    accepting(daemon)
    monkeypatch.setattr(taskspec, "MAX_INPUT_BYTES", 15)  # notes.md has 5 bytes, run.sh 10
    argv = ["submit", "--input", "notes.md", "--input", "sub/run.sh"]
    assert main([*argv, "--", "true"]) == 0
    monkeypatch.setattr(taskspec, "MAX_INPUT_BYTES", 14)
    assert main([*argv, "--", "true"]) == 1
    assert "all inputs together" in capsys.readouterr().err


def test_a_lost_answer_to_submit_is_not_asked_again(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.on("POST /v1/tasks", Reply([b'{"id'], drop=True))
    assert main(["submit", "--", "true"]) == 69
    assert "whether the task was accepted is not known" in capsys.readouterr().err
    assert len(daemon.requests) == 1


# doctor


def test_doctor_prints_the_daemons_checks(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    checks = [
        {"name": "cgroups", "ok": True, "detail": "unified", "remedy": ""},
        {"name": "nft", "ok": False, "detail": "no nft", "remedy": "apt-get install nftables"},
    ]
    daemon.on("GET /v1/doctor", {"ok": False, "checks": checks, "facts": {"kernel": "6.1"}})
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out == (
        "✓ cgroups  unified\n✗ nft      no nft\n           → apt-get install nftables\n\n  kernel: 6.1\n\n1 of 2 checks failed.\n"
    )
    daemon.on("GET /v1/doctor", {"ok": True, "checks": checks[:1], "facts": {}})
    assert main(["doctor"]) == 0
    assert main(["doctor", "--json"]) == 0


def test_doctor_speaks_ascii_where_the_terminal_does(daemon: FakeDaemon) -> None:
    daemon.on("GET /v1/doctor", {"ok": True, "checks": [{"name": "ä", "ok": True, "detail": "x"}], "facts": {}})
    done = script("doctor", env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout) == (0, b"ok   \\xe4  x\n\nThis host can run sandboxes.\n")


def test_doctor_checks_by_itself_when_no_daemon_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTD_SOCKET", str(tmp_path / "none"))
    monkeypatch.setattr(hostcheck, "probed", lambda: {})
    assert main(["doctor", "--json"]) in (0, 1)
    report = json.loads(capsys.readouterr().out)
    assert report["source"] == "agentctl"
    assert {"kernel", "cgroups", "namespaces", "nftables", "seccomp"} <= {one["name"] for one in report["checks"]}
    required = [one for one in report["checks"] if one["required"] and not one["ok"]]
    assert report["ok"] is (not required)


# Completion, help, start-up


def candidates(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(["_complete", "--", *words]) == 0
    return [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()]


def test_completion_knows_verbs_flags_values_and_ids(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.on("GET /v1/tasks", {"tasks": [task(), task(id="kz"), task(id="p3nd", name="x\x1b")]})
    assert candidates(capsys, "s") == ["submit", "show", "stop", "schema"]
    assert candidates(capsys, "logs", "--t") == ["--tail", "--timestamps"]
    assert candidates(capsys, "ps", "--state", "s") == ["starting", "succeeded"]
    assert candidates(capsys, "logs", "k") == ["k7m2q9x4ta", "kz"]
    assert candidates(capsys, "stop", "kz", "k") == ["k7m2q9x4ta"]
    assert candidates(capsys, "config", "") == ["check", "show"]
    assert candidates(capsys, "run", "--input", "a") == []
    assert candidates(capsys, "run", "--", "") == []
    assert candidates(capsys, "nonsense", "") == []


def test_completion_waits_200_ms_at_most(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    import threading

    held = threading.Event()

    def slow(request: Request) -> Reply:
        held.wait(5)
        return ok({"tasks": []})

    daemon.on("GET /v1/tasks", slow)
    began = time.monotonic()
    assert candidates(capsys, "logs", "") == []
    assert time.monotonic() - began < 2
    held.set()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_printed(capsys: pytest.CaptureFixture[str], shell: str) -> None:
    assert main(["completion", shell]) == 0
    assert "agentctl _complete -- " in capsys.readouterr().out.replace('"${COMP_WORDS[0]}"', "agentctl").replace(
        '"${words[1]}"', "agentctl"
    )


def test_bash_completes(daemon: FakeDaemon, tmp_path: Path) -> None:
    done = script("completion", "bash")
    (tmp_path / "c.bash").write_bytes(done.stdout)
    subprocess.run(["bash", "-n", str(tmp_path / "c.bash")], check=True)
    (tmp_path / "agentctl").write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m agentd.cli "$@"\n')
    (tmp_path / "agentctl").chmod(0o755)
    daemon.on("GET /v1/tasks", {"tasks": [task(), task(id="p3nd")]})
    line = (
        f"PATH={tmp_path}:$PATH; source c.bash; COMP_WORDS=(agentctl logs -f k); COMP_CWORD=3; _agentctl; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    found = subprocess.run(["bash", "-c", line], capture_output=True, cwd=tmp_path, check=True, timeout=20)
    assert found.stdout == b"k7m2q9x4ta\n"


def test_help_leads_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == main(["help"]) == 0
    text = capsys.readouterr().out
    assert text.index("Examples:") < text.index("Usage:") < text.index("Verbs:")
    for verb in VERBS:
        assert f"\n  {verb} " in text
        assert main([verb, "--help"]) == 0
        helped = capsys.readouterr().out
        if verb != "help":
            assert main(["help", verb]) == 0
            assert capsys.readouterr().out == helped
        assert helped.index("Examples:") < helped.lower().index("usage:")
        assert "--json" in parser_of(verb).flags()


def test_no_arguments_is_a_question_for_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert "Verbs:" in found.err


def test_ps_imports_little(daemon: FakeDaemon) -> None:
    daemon.on("GET /v1/tasks", {"tasks": [task()]})
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from agentd.cli.main import main; "
        "code = main(['ps']); print(*sys.modules, file=sys.stderr); sys.exit(code)"
    )
    # Without site: what an environment's .pth files import is not agentctl's doing.
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, check=True, timeout=20)
    imported = set(done.stderr.decode().split())
    assert "agentd.cli.verbs.ps" in imported
    heavy = {"asyncio", "aiohttp", "ssl", "http.client", "http", "subprocess", "tomllib", "difflib", "msgspec"}
    assert imported & (heavy | {"bz2", "lzma", "shutil"}) == set()
    others = {name for name in imported if name.startswith("agentd.cli.verbs.")} - {"agentd.cli.verbs.ps"}
    assert others == set()


def test_ps_starts_in_80_ms_of_cpu(daemon: FakeDaemon) -> None:
    import resource

    daemon.on("GET /v1/tasks", {"tasks": [task()]})
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from agentd.cli.main import main; sys.exit(main(['ps']))"
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-I", "-c", code], check=True, capture_output=True, timeout=20)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) <= 0.080


def test_only_the_standard_library_and_core_are_imported() -> None:
    foreign = set()
    for path in (ROOT / "agentd/cli").rglob("*.py"):
        for name in re.findall(r"^\s*(?:from|import) ([\w.]+)", path.read_text(), re.MULTILINE):
            top = name.split(".")[0]
            if top == "agentd":
                if not name.startswith(("agentd.cli", "agentd.core")) and name != "agentd":
                    foreign.add(name)
            elif top not in sys.stdlib_module_names:
                foreign.add(name)
    assert foreign == set()


def test_a_reader_that_has_enough_is_not_an_error(daemon: FakeDaemon) -> None:
    daemon.on("GET /v1/tasks/k7/logs", log(*[frame(1, b"x" * 60_000)] * 20))
    line = f"{sys.executable} -m agentd.cli logs k7 | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, check=False, timeout=20, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert (done.returncode, done.stdout, done.stderr) == (141, b"x", b"")


def test_config_passes_output_and_exit_code_on(
    daemon: FakeDaemon, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho "$@"\necho bad >&2\nexit 2\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    assert main(["config", "check", "--json", "a.toml"]) == 2
    said = {"ok": False, "exit_code": 2, "output": "-m agentd.daemon config check a.toml\nbad\n"}
    assert json.loads(capsys.readouterr().out) == said
    assert main(["config", "show"]) == 2
    daemon.on("GET /v1/config", {"a": 1})
    assert main(["config", "show", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"a": 1}
