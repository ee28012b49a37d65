"""The daemon that the command line's tests talk to, and how `agentctl` reads HTTP from it.

`FakeDaemon` is a real server on a real Unix socket that speaks docs/api.md as far as a test scripts it.
"""

from __future__ import annotations

import json
import socketserver
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from agentd.cli.connection import Answer, Client, target
from agentd.cli.failures import AnswerLost, Failure, Refusal, Unreachable

NOW = 1790000100.0
LOG = "application/x-agentd-log"


def frame(stream: int, data: bytes, when: float = 1790000000.25) -> bytes:
    return struct.pack("!BdI", stream, when, len(data)) + data


def task(**changes: Any) -> dict[str, Any]:
    """The task object of docs/api.md."""
    found: dict[str, Any] = {
        "id": "k7m2q9x4ta", "name": "", "class": "normal", "priority": 0, "tenant": "default", "user": "root",
        "state": "running", "reason": None, "exit_code": None, "signal": None, "attempt": 1,
        "submitted_at": 1790000000.1, "started_at": 1790000000.4, "ended_at": None,
        "position": None, "waiting_for": None,
        "progress": {"text": "reading", "fraction": 0.25, "time": 1790000001.0},
        "has_result": False, "command": ["python3", "agent.py"],
        "usage": {"cpu_s": 0.41, "memory_peak_bytes": 31457280, "io_read_bytes": 0, "io_write_bytes": 4096,
                  "net_rx_bytes": 1200, "net_tx_bytes": 900, "denied_packets": 3, "wall_s": 1.2},
        "llm": {"requests": 2, "input_tokens": 310, "output_tokens": 42, "cached_tokens": 0, "cost_usd": 0.0012,
                "cost_known": True, "models": {"gpt-4o-mini": 2}, "scripted": False},
        "workspace": "/var/lib/agentd/workspaces/k7m2q9x4ta",
    }  # fmt: skip
    return found | changes


def ended(state: str = "succeeded", **changes: Any) -> dict[str, Any]:
    return task(
        **({"state": state, "ended_at": 1790000001.6, "exit_code": 0 if state == "succeeded" else None} | changes)
    )


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: dict[str, str]
    body: Any


@dataclass
class Reply:
    """What is sent. `pieces` may wait for something between two; `drop` ends the connection in the middle."""

    pieces: Iterable[bytes]
    status: int = 200
    kind: str = "application/json"
    chunked: bool = True
    drop: bool = False
    cut: int = 0
    headers: str = ""


def ok(value: Any, status: int = 200, **more: Any) -> Reply:
    return Reply([json.dumps(value).encode()], status, **more)


def refused(status: int, code: str, message: str, **more: str) -> Reply:
    return ok({"error": {"code": code, "message": message, **more}}, status)


def log(*frames: bytes, **more: Any) -> Reply:
    return Reply(frames, kind=LOG, **more)


@dataclass
class FakeDaemon:
    path: Path
    routes: dict[str, Callable[[Request], Reply]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)

    def __enter__(self) -> FakeDaemon:
        self.start()
        return self

    def __exit__(self, *found: object) -> None:
        self.stop()

    def start(self) -> None:
        outer = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                outer._handle(self)

        class Server(socketserver.ThreadingUnixStreamServer):
            daemon_threads = True
            block_on_close = False

        self.path.unlink(missing_ok=True)
        self._server = Server(str(self.path), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Nothing listens afterwards, and there is no socket; connections that are open stay so."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self.path.unlink(missing_ok=True)

    def on(self, route: str, reply: Reply | Callable[[Request], Reply] | dict[str, Any]) -> None:
        if isinstance(reply, Reply):
            fixed = reply
            self.routes[route] = lambda request: fixed
        elif isinstance(reply, dict):
            value = reply
            self.routes[route] = lambda request: ok(value)
        else:
            self.routes[route] = reply

    def asked(self, route: str) -> list[Request]:
        return [one for one in self.requests if f"{one.method} {one.path}" == route]

    def _handle(self, handler: socketserver.StreamRequestHandler) -> None:
        line = handler.rfile.readline().decode()
        method, where, _ = line.split(" ")
        headers: dict[str, str] = {}
        while (raw := handler.rfile.readline().strip()) != b"":
            name, _, value = raw.decode().partition(":")
            headers[name.lower()] = value.strip()
        length = int(headers.get("content-length", 0))
        raw_body = handler.rfile.read(length) if length else b""
        parts = urlsplit(where)
        query = {key: values[0] for key, values in parse_qs(parts.query, keep_blank_values=True).items()}
        request = Request(method, unquote(parts.path), query, json.loads(raw_body) if raw_body else None)
        self.requests.append(request)
        route = self.routes.get(f"{method} {request.path}")
        reply = route(request) if route else refused(404, "not_found", f"cannot find {request.path}")
        try:
            self._send(handler, reply)
        except OSError:
            pass  # the reader has gone

    @staticmethod
    def _send(handler: socketserver.StreamRequestHandler, reply: Reply) -> None:
        def write(data: bytes) -> None:
            step = reply.cut or len(data) or 1
            for at in range(0, len(data), step):
                handler.request.sendall(data[at : at + step])

        head = f"HTTP/1.1 {reply.status} Whatever\r\nContent-Type: {reply.kind}\r\nConnection: close\r\n{reply.headers}"
        if reply.chunked:
            write(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
            for piece in reply.pieces:
                write(f"{len(piece):x};ext=1\r\n".encode() + piece + b"\r\n")
            if not reply.drop:
                write(b"0\r\nTrailer: x\r\n\r\n")
        else:
            body = b"".join(reply.pieces)
            write(f"{head}Content-Length: {len(body) + reply.drop}\r\n\r\n".encode() + body)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(tmp_path / "agentd.sock") as found:
        yield found


RESPONSES = {
    "length": b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\nhello world",
    "chunks": b"HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n3\r\nhel\r\n8;a=b\r\nlo world\r\n0\r\nX: y\r\n\r\n",
    "to the end": b"HTTP/1.1 200 OK\r\n\r\nhello world",
    "interim": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\nhello world",
}


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("kind", RESPONSES)
def test_an_answer_is_the_same_however_it_is_cut(kind: str, size: int) -> None:
    raw = RESPONSES[kind]
    answer = Answer()
    body = b""
    for at in range(0, len(raw), size):
        answer.feed(raw[at : at + size])
        body += answer.take()
    answer.end()
    assert (answer.status, body, answer.complete) == (200, b"hello world", True)


@pytest.mark.parametrize("kind", ["length", "chunks", "interim"])
def test_an_answer_that_ends_early_is_lost_at_every_byte(kind: str) -> None:
    raw = RESPONSES[kind]
    for at in range(len(raw)):
        answer = Answer()
        answer.feed(raw[:at])
        with pytest.raises(AnswerLost):
            answer.end()


@pytest.mark.parametrize(
    "raw",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab\r\n",
        b"x" * 70_000,
    ],
)
def test_what_is_not_http_is_refused(raw: bytes) -> None:
    with pytest.raises(Failure, match="cannot read the daemon's answer"):
        Answer().feed(raw)


def test_a_body_cut_into_single_bytes_arrives_whole(daemon: FakeDaemon) -> None:
    daemon.on("GET /v1/version", ok({"version": "ä" * 50}, cut=1))
    assert Client(daemon.path).call("GET", "/v1/version") == {"version": "ä" * 50}


def test_an_error_object_becomes_a_refusal(daemon: FakeDaemon) -> None:
    daemon.on("GET /x", refused(400, "invalid_field", "cannot accept", field="memory", hint="write 1G"))
    with pytest.raises(Refusal) as caught:
        Client(daemon.path).call("GET", "/x")
    assert caught.value.as_dict() == {
        "code": "invalid_field", "message": "cannot accept", "field": "memory", "hint": "write 1G", "status": 400,
    }  # fmt: skip


def test_an_error_without_json_still_has_its_status(daemon: FakeDaemon) -> None:
    daemon.on("GET /x", Reply([b"<html>"], 502))
    with pytest.raises(Refusal, match="answered 502"):
        Client(daemon.path).call("GET", "/x")


@pytest.mark.parametrize("chunked", [True, False])
def test_a_dropped_answer_is_lost(daemon: FakeDaemon, chunked: bool) -> None:
    daemon.on("GET /x", Reply([b'{"a":'], chunked=chunked, drop=True))
    with pytest.raises(AnswerLost):
        Client(daemon.path).call("GET", "/x")


def test_an_answer_that_does_not_come_is_waited_for_so_long(daemon: FakeDaemon) -> None:
    held = threading.Event()

    def silent(request: Request) -> Reply:
        held.wait(5)
        return ok({})

    daemon.on("GET /x", silent)
    with pytest.raises(Unreachable, match=r"no answer within 0\.05 s"):
        Client(daemon.path).call("GET", "/x", timeout_s=0.05)
    held.set()


def test_an_early_refusal_of_a_large_body_is_read(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    def early(handler: socketserver.StreamRequestHandler) -> None:
        handler.rfile.readline()
        daemon._send(handler, refused(413, "too_large", "cannot take so much"))

    monkeypatch.setattr(daemon, "_handle", early)
    with pytest.raises(Refusal, match="cannot take so much"):
        Client(daemon.path).call("POST", "/v1/tasks", {"x": "y" * 8_000_000})


def test_a_socket_path_longer_than_the_kernel_takes_is_reached(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 120)
    with FakeDaemon(tmp_path / "s") as daemon:
        daemon.on("GET /x", {"a": 1})
        deep.mkdir()
        (deep / "agentd.sock").symlink_to(daemon.path)
        assert Client(deep / "agentd.sock").call("GET", "/x") == {"a": 1}


def test_query_values_cannot_break_out_of_the_query() -> None:
    assert target("/x", a="1&b=2 /ü", c=None, d=False, e=True, f=0) == "/x?a=1%26b%3D2%20%2F%C3%BC&e=1&f=0"
