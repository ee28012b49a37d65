"""HTTP/1.1 over the control socket, by hand: `http.client` alone would cost half of the start-up time.

`Answer` parses a response from whatever pieces arrive and does no I/O. `Exchange` is one request on its own
connection whose body can be read as it comes, with a deadline, beside other descriptors in a `select`.
`Client` is what verbs use. Nothing is retried here: whether a lost answer may be asked for again is known
to the caller alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from agentd.cli.failures import AnswerLost, Failure, Refusal, Unreachable
from agentd.core.places import Places

MAX_HEAD_BYTES = 64 * 1024
_SUN_PATH_BYTES = 107  # sizeof(sockaddr_un.sun_path) - 1, unix(7)
_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")


def quote(text: str) -> str:
    """`text` as one path segment or query value (RFC 3986); `urllib` would cost 5 ms."""
    raw = text.encode("utf-8", "surrogateescape")
    return "".join(chr(byte) if byte in _UNRESERVED else f"%{byte:02X}" for byte in raw)


def target(path: str, **query: object) -> str:
    """`path` with the query parameters that are not None, False or empty."""
    found = "&".join(
        f"{key}={quote(str(int(value) if isinstance(value, bool) else value))}"
        for key, value in query.items()
        if value is not None and value is not False and value != ""
    )
    return f"{path}?{found}" if found else path


def control_socket() -> Path:
    """Where the daemon listens: `AGENTD_SOCKET`, else below `AGENTD_ROOT`."""
    named = os.environ.get("AGENTD_SOCKET")
    return Path(named) if named else Places.from_environ().control_socket


class Answer:
    """One HTTP/1.1 response, fed in pieces of any size.

    `status` is None until the head is complete. Bodies end by length, by chunks, or with the connection.
    """

    def __init__(self) -> None:
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.complete = False
        self._raw = bytearray()
        self._body = bytearray()
        self._left: int | None = None  # bytes of this body or chunk still to come; None: until the connection ends
        self._chunked = False
        self._stage = "head"

    def feed(self, data: bytes) -> None:
        """Takes the next bytes from the wire.

        Raises:
            Failure: they are not HTTP.
        """
        self._raw += data
        while not self.complete and self._step():
            pass

    def end(self) -> None:
        """The connection ended.

        Raises:
            AnswerLost: in the middle of the answer.
        """
        if self.complete:
            return
        if self.status is not None and self._stage == "body" and self._left is None:
            self.complete = True
            return
        raise AnswerLost("cannot read the daemon's answer: the connection ended in the middle of it")

    def take(self) -> bytes:
        """The body bytes decoded since the last call."""
        found = bytes(self._body)
        self._body.clear()
        return found

    def _line(self) -> bytes | None:
        at = self._raw.find(b"\n")
        if at < 0:
            if len(self._raw) > MAX_HEAD_BYTES:
                raise Failure("cannot read the daemon's answer: a line without end")
            return None
        line = bytes(self._raw[:at]).rstrip(b"\r")
        del self._raw[: at + 1]
        return line

    def _step(self) -> bool:
        """Consumes one element; False when more bytes are needed."""
        match self._stage:
            case "head":
                return self._read_head()
            case "body":
                return self._read_body()
            case "size":
                line = self._line()
                if line is None:
                    return False
                digits = line.split(b";")[0].strip().decode("latin-1")
                if not digits or set(digits) - set("0123456789abcdefABCDEF"):
                    raise Failure(f"cannot read the daemon's answer: {line[:40]!r} is not a chunk size")
                self._left = int(digits, 16)
                self._stage = "body" if self._left else "trailer"
                return True
            case "chunk end":
                line = self._line()
                if line is None:
                    return False
                if line:
                    raise Failure("cannot read the daemon's answer: a chunk is longer than it says")
                self._stage = "size"
                return True
            case _:
                line = self._line()
                self.complete = line == b""
                return bool(line)

    def _read_head(self) -> bool:
        end = self._raw.find(b"\r\n\r\n")
        if end < 0:
            if len(self._raw) > MAX_HEAD_BYTES:
                raise Failure("cannot read the daemon's answer: its head has no end")
            return False
        first, *lines = bytes(self._raw[:end]).decode("latin-1").split("\r\n")
        del self._raw[: end + 4]
        version, _, rest = first.partition(" ")
        if not version.startswith("HTTP/1.") or not rest[:3].isdigit():
            raise Failure(f"cannot read the daemon's answer: {first[:60]!r} is not HTTP")
        status = int(rest[:3])
        if 100 <= status < 200:
            return True  # an interim answer; the real one follows
        self.status = status
        for line in lines:
            name, _, value = line.partition(":")
            self.headers[name.strip().lower()] = value.strip()
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            self._chunked, self._stage = True, "size"
            return True
        self._stage = "body"
        length = self.headers.get("content-length")
        if status in (204, 304):
            length = "0"
        if length is not None:
            if not length.isdigit():
                raise Failure(f"cannot read the daemon's answer: {length[:40]!r} is not a length")
            self._left = int(length)
        return True

    def _read_body(self) -> bool:
        if self._left is None:
            self._body += self._raw
            self._raw.clear()
            return False
        piece = self._raw[: self._left]
        del self._raw[: len(piece)]
        self._body += piece
        self._left -= len(piece)
        if self._left:
            return False
        if self._chunked:
            self._stage = "chunk end"
            return True
        self.complete = True
        return False


class Exchange:
    """One request on its own connection; a context manager that closes it."""

    def __init__(self, connection: socket.socket):
        self._socket = connection
        self._answer = Answer()

    def __enter__(self) -> Exchange:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def fileno(self) -> int:
        """For `select`: readable when `receive` may find more."""
        return self._socket.fileno()

    def close(self) -> None:
        """Gives the connection up."""
        self._socket.close()

    @property
    def status(self) -> int | None:
        """None until the head has arrived."""
        return self._answer.status

    @property
    def headers(self) -> Mapping[str, str]:
        """Names in lower case."""
        return self._answer.headers

    def receive(self, timeout_s: float) -> bytes | None:
        """The next bytes of the body; b"" once it is complete; None when none came in time.

        Raises:
            AnswerLost: the connection ended in the middle of the answer.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            if found := self._answer.take():
                return found
            if self._answer.complete:
                return b""
            readable, _, _ = select.select([self._socket], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                return None
            try:
                data = self._socket.recv(65536)
            except OSError as error:
                raise AnswerLost(f"cannot read the daemon's answer: {error.strerror or error}") from error
            if data:
                self._answer.feed(data)
            else:
                self._answer.end()

    def read(self, timeout_s: float) -> bytes:
        """The rest of the body.

        Raises:
            Unreachable: it did not come in `timeout_s`, or not whole.
        """
        deadline = time.monotonic() + timeout_s
        found = bytearray()
        while True:
            piece = self.receive(max(0.0, deadline - time.monotonic()))
            if piece is None:
                raise Unreachable(
                    f"cannot reach the daemon: no answer within {timeout_s:g} s",
                    hint="journalctl -u agentd shows what it does",
                )
            if not piece:
                return bytes(found)
            found += piece


class Client:
    """The daemon behind the control socket `path`."""

    def __init__(self, path: Path):
        self.path = path

    def open(self, method: str, where: str, body: object = None, *, timeout_s: float = 10.0) -> Exchange:
        """Sends a request; its answer is read from the `Exchange`.

        Raises:
            Unreachable: there is no daemon to send it to.
        """
        payload = b"" if body is None else json.dumps(body, separators=(",", ":")).encode()
        head = f"{method} {where} HTTP/1.1\r\nHost: agentd\r\nConnection: close\r\nAccept: */*\r\n"
        if body is not None:
            head += "Content-Type: application/json\r\n"
        if payload or method == "POST":
            head += f"Content-Length: {len(payload)}\r\n"
        connection = self._connect(timeout_s)
        # A daemon that refuses a body early closes its end while we still write: its answer is there anyway.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            try:
                connection.sendall(head.encode("ascii") + b"\r\n" + payload)
            except TimeoutError as error:
                connection.close()
                raise Unreachable(f"cannot reach the daemon: it took nothing within {timeout_s:g} s") from error
        return Exchange(connection)

    def call(self, method: str, where: str, body: object = None, *, timeout_s: float = 30.0) -> dict[str, Any]:
        """The JSON object of a 2xx answer.

        Raises:
            Refusal: the answer is an error.
            Unreachable: there is no answer.
        """
        with self.open(method, where, body, timeout_s=timeout_s) as exchange:
            raw = exchange.read(timeout_s)
            return answered(exchange.status or 0, raw)

    def _connect(self, timeout_s: float) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(timeout_s)
        deadline = time.monotonic() + timeout_s
        directory: int | None = None
        try:
            where = str(self.path)
            if len(os.fsencode(where)) > _SUN_PATH_BYTES:
                directory = os.open(self.path.parent, os.O_PATH | os.O_DIRECTORY)
                where = f"/proc/self/fd/{directory}/{self.path.name}"
            while True:
                try:
                    connection.connect(where)
                    return connection
                except BlockingIOError:  # the listener's backlog is full: on AF_UNIX nothing tells when it is not
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.01)
        except OSError as error:
            connection.close()
            raise _unreachable(self.path, error) from error
        finally:
            if directory is not None:
                os.close(directory)


def answered(status: int, raw: bytes) -> dict[str, Any]:
    """The object in the body of a 2xx answer.

    Raises:
        Refusal: another status.
        Failure: the body is not a JSON object.
    """
    try:
        found = json.loads(raw)
    except ValueError:
        found = None
    if not 200 <= status < 300:
        error = found.get("error") if isinstance(found, dict) else None
        raise Refusal(status, error if isinstance(error, dict) else {})
    if not isinstance(found, dict):
        raise Failure(
            "cannot read the daemon's answer: it is not a JSON object",
            hint="is something else listening there?",
        )
    return found


def _unreachable(path: Path, error: OSError) -> Unreachable:
    """The cause and what to do about it, in the words of this host."""
    systemd = Path("/run/systemd/system").is_dir()
    below = os.environ.get("AGENTD_ROOT")
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        start = "start it with `systemctl start agentd`" if systemd else "start it with `sudo ./scripts/quickstart`"
        if os.environ.get("AGENTD_SOCKET"):
            where = "AGENTD_SOCKET names this path"
        elif below:
            where = f"AGENTD_ROOT is {below}: is that where the daemon was started?"
        else:
            where = "if it runs below another directory, set AGENTD_ROOT to that"
        return Unreachable(f"cannot reach the daemon: there is no socket {path}", hint=f"{start}; {where}")
    if isinstance(error, PermissionError):
        group = _group_of(path)
        return Unreachable(
            f"cannot reach the daemon: the socket {path} is for the group {group} and you are not in it",
            hint=f"`sudo usermod -aG {group} $USER` and log in again, or use sudo",
        )
    if isinstance(error, ConnectionRefusedError):
        look = "`systemctl status agentd` says why, " if systemd else "`sudo ./scripts/quickstart` starts it again, "
        return Unreachable(
            f"cannot reach the daemon: nothing listens on {path} any more",
            hint=look + "`agentctl doctor` checks the host",
        )
    return Unreachable(f"cannot reach the daemon: {path}: {error.strerror or error}")


def _group_of(path: Path) -> str:
    """The socket's group, or `agentd` when its directory is closed to us as well."""
    import grp

    try:
        return grp.getgrgid(path.stat().st_gid).gr_name
    except (OSError, KeyError):
        return "agentd"
