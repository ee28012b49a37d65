"""A task's output as it comes, taken up again after the daemon was away.

`Output` counts the payload bytes it has handed out and reopens the answer at that offset, so a restart of
the daemon costs a pause and not a byte. For that it always asks for both streams while it follows, and
drops what was not asked for: the offset counts the combined output. Where the operator keeps output in the
journal it is read from there, in the same frames.
"""

from __future__ import annotations

import json
import os
import select
import struct
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from agentd.cli.call import task_path
from agentd.cli.connection import Client, Exchange, answered, target
from agentd.cli.failures import Failure, Refusal, Unreachable
from agentd.cli.outcomes import has_ended
from agentd.cli.terminal import Terminal, timestamp

PATIENCE_S = 30.0
"""How long a daemon may be away before a follower gives up; a restart takes a few seconds."""

_HEAD = struct.Struct("!BdI")
_STREAMS = {1: "stdout", 2: "stderr"}
_JOURNAL_GLANCE_S = 0.5
MAX_FRAME_BYTES = 64 * 1024 * 1024


class Frame(NamedTuple):
    """Some bytes of the output: from which stream and when."""

    stream: str
    time: float
    data: bytes


class FrameDecoder:
    """Frames out of `application/x-agentd-log`, however the bytes are cut."""

    def __init__(self) -> None:
        self._raw = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that `data` completes.

        Raises:
            Failure: it is something else.
        """
        self._raw += data
        found = []
        at = 0
        while len(self._raw) - at >= _HEAD.size:
            stream, when, length = _HEAD.unpack_from(self._raw, at)
            if stream not in _STREAMS or length > MAX_FRAME_BYTES:
                raise Failure("cannot read the task's output: the daemon's answer is not made of log frames")
            end = at + _HEAD.size + length
            if len(self._raw) < end:
                break
            found.append(Frame(_STREAMS[stream], when, bytes(self._raw[at + _HEAD.size : end])))
            at = end
        del self._raw[:at]
        return found


def last_lines(frames: list[Frame], count: int) -> list[Frame]:
    """The frames with the last `count` lines; a line begun and not ended is one."""
    if count <= 0:
        return []
    left = count
    for index in range(len(frames) - 1, -1, -1):
        data = frames[index].data
        end = len(data)
        if index == len(frames) - 1 and data.endswith(b"\n"):
            end -= 1
        while (at := data.rfind(b"\n", 0, end)) >= 0:
            left -= 1
            if left == 0:
                rest = frames[index]._replace(data=data[at + 1 :])
                return ([rest] if rest.data else []) + frames[index + 1 :]
            end = at
    return frames


class Output:
    """The output of one task.

    `streams` are those wanted, `tail` how many of the last lines to begin with. `patient` says that the
    daemon has answered before, so that it not being there means a restart. `notice` is told, once each,
    that it is away and that it is back.
    """

    def __init__(
        self,
        client: Client,
        task: str,
        *,
        follow: bool,
        streams: tuple[str, ...] = ("stdout", "stderr"),
        tail: int | None = None,
        patient: bool = False,
        patience_s: float = PATIENCE_S,
        notice: Callable[[str], None] = lambda text: None,
    ):
        self.offset = 0
        self._client = client
        self._task = task
        self._follow = follow
        self._streams = streams
        self._tail = tail
        self._known = patient
        self._patience_s = patience_s
        self._notice = notice
        self._exchange: Exchange | None = None
        self._decoder = FrameDecoder()
        self._journal: Journal | None = None
        self._checked = False
        self._done = False
        self._away_since: float | None = None
        self._pause_s = 0.1
        self._retry_at = 0.0

    def close(self) -> None:
        """Gives the connection, or journalctl, up."""
        if self._exchange is not None:
            self._exchange.close()
            self._exchange = None
        if self._journal is not None:
            self._journal.close()

    def poll(self, timeout_s: float, wake_fd: int | None = None) -> list[Frame] | None:
        """The next frames, perhaps none; None when there will be no more. Returns early when `wake_fd` is
        readable.

        Raises:
            Unreachable: the daemon has been away for too long, or was never there.
            Refusal: there is no such task, or it is not the caller's.
        """
        if self._done:
            return None
        if self._journal is not None:
            return self._poll_journal(self._journal, timeout_s, wake_fd)
        try:
            if self._exchange is None:
                pause = self._retry_at - time.monotonic()
                if pause > 0:
                    _readable(None, wake_fd, min(pause, timeout_s))
                    return []
                if self._follow and self._tail is not None:
                    return self._read_tail()
                self._open()
            return self._receive(timeout_s, wake_fd)
        except Unreachable as failure:
            self._lose(failure)
            return []

    def _where(self, *, follow: bool) -> str:
        stream = self._streams[0] if not follow and len(self._streams) == 1 else None
        tail = None if follow else self._tail
        return target(
            task_path(self._task, "/logs"),
            follow=follow,
            offset=self.offset or None,
            tail=tail,
            stream=stream,
        )

    def _open(self) -> None:
        self._exchange = self._client.open("GET", self._where(follow=self._follow))
        self._decoder = FrameDecoder()
        self._checked = False

    def _receive(self, timeout_s: float, wake_fd: int | None) -> list[Frame] | None:
        exchange = self._exchange
        assert exchange is not None
        data = exchange.receive(0)
        if data is None:
            _readable(exchange.fileno(), wake_fd, timeout_s)
            data = exchange.receive(0)
        if exchange.status is not None and not self._checked and not self._check(exchange, data or b""):
            return []
        if data is None:
            return []
        if data:
            return self._wanted(self._decoder.feed(data))
        self._end()
        return None if self._done else []

    def _check(self, exchange: Exchange, begun: bytes) -> bool:
        """Looks at the head of the answer; False when its body is not frames and has been dealt with."""
        assert exchange.status is not None
        kind = exchange.headers.get("content-type", "")
        if exchange.status == 200 and not kind.startswith("application/json"):
            self._checked = self._known = True
            self.offset = begins_at(exchange, self.offset)
            if self._away_since is not None:
                self._notice("the daemon is back")
            self._away_since, self._pause_s = None, 0.1
            return True
        try:
            body = answered(exchange.status, begun + exchange.read(10.0))
        except Refusal as refusal:
            if refusal.status != 503 or not self._known:
                raise
            raise Unreachable(refusal.message, hint=refusal.hint) from refusal
        exchange.close()
        self._exchange = None
        fields = body.get("journald")
        if not isinstance(fields, dict):
            raise Failure("cannot read the task's output: the daemon's answer is not made of log frames")
        self._known = True
        self._journal = Journal(fields, follow=self._follow, tail=self._tail)
        return False

    def _wanted(self, frames: list[Frame]) -> list[Frame]:
        self.offset += sum(len(frame.data) for frame in frames)
        return [frame for frame in frames if frame.stream in self._streams]

    def _end(self) -> None:
        """The answer is complete. So is the output, unless a daemon on its way out ended the answer."""
        assert self._exchange is not None
        self._exchange.close()
        self._exchange = None
        if not self._follow or self._task_has_ended():
            self._done = True
        else:
            self._retry_at = time.monotonic() + 0.2

    def _task_has_ended(self) -> bool:
        try:
            return has_ended(self._client.call("GET", task_path(self._task)))
        except Refusal as refusal:
            if refusal.status == 503:
                return False
            if refusal.status == 404:
                return True  # it was removed meanwhile
            raise

    def _lose(self, failure: Unreachable) -> None:
        if self._exchange is not None:
            self._exchange.close()
            self._exchange = None
        if not self._known or not self._follow:
            raise failure
        now = time.monotonic()
        if self._away_since is None:
            self._away_since = now
            self._notice(f"the daemon is away; waiting up to {self._patience_s:g} s for it to come back")
        elif now - self._away_since > self._patience_s:
            raise failure
        self._retry_at = now + self._pause_s
        self._pause_s = min(1.0, self._pause_s * 2)

    def _read_tail(self) -> list[Frame]:
        """The last lines of what there is. All of it is read, since only so the offset behind it is known."""
        assert self._tail is not None
        kept: list[Frame] = []
        size = 0
        self.offset = 0
        with self._client.open("GET", target(task_path(self._task, "/logs"))) as exchange:
            decoder = FrameDecoder()
            while data := exchange.receive(30.0):
                if exchange.status != 200 or exchange.headers.get("content-type", "").startswith("application/json"):
                    self._check(exchange, data)
                    return []
                if not kept and self.offset == 0:
                    self.offset = begins_at(exchange, 0)
                for frame in self._wanted(decoder.feed(data)):
                    kept.append(frame)
                    size += len(frame.data)
                if size > 4 * 1024 * 1024:
                    kept = last_lines(kept, self._tail)
                    size = 0
            if data is None:
                raise Unreachable("cannot read the task's output: no answer within 30 s")
            if exchange.status != 200:
                self._check(exchange, b"")
        found = last_lines(kept, self._tail)
        self._tail = None
        self._known = True
        return found

    def _poll_journal(self, journal: Journal, timeout_s: float, wake_fd: int | None) -> list[Frame] | None:
        frames = journal.poll(min(timeout_s, _JOURNAL_GLANCE_S), wake_fd)
        if frames is None:
            self._done = True
            return None
        if not frames and self._follow and time.monotonic() >= self._retry_at:
            # journalctl -f never ends: ask now and then whether the task has, and read once more then.
            self._retry_at = time.monotonic() + _JOURNAL_GLANCE_S
            try:
                if self._task_has_ended():
                    journal.drain()
            except Unreachable:
                pass  # the journal is there without the daemon; whether the task has ended is asked again
        return [frame for frame in frames if frame.stream in self._streams]


class Journal:
    """A task's output out of the systemd journal: what matches `fields` and has `AGENTD_STREAM`."""

    def __init__(self, fields: Mapping[str, Any], *, follow: bool, tail: int | None):
        argv = ["journalctl", "--no-pager", "--quiet", "--output=json", "--all"]
        if follow:
            argv.append("--follow")
        if tail is not None:
            argv.append(f"--lines={tail}")
        elif follow:
            argv.append("--no-tail")
        argv += [f"{name}={value}" for name, value in fields.items()]
        try:
            self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        except OSError as error:
            raise Failure(
                f"cannot read the task's output: it is in the journal, and journalctl: {error.strerror}",
                hint='run this on the daemon\'s host, or set log.tasks = "files" in agentd.toml',
            ) from error
        self._raw = b""
        self._last_read = False

    def close(self) -> None:
        """Ends journalctl."""
        self._process.terminate()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def drain(self) -> None:
        """What is read next without a pause is the end."""
        self._last_read = True

    def poll(self, timeout_s: float, wake_fd: int | None) -> list[Frame] | None:
        """As `Output.poll`."""
        pipe = self._process.stdout
        assert pipe is not None
        if self._last_read:
            timeout_s = 0.5  # journald takes entries in by itself: what the task wrote last may still be on its way
        ready = _readable(pipe.fileno(), wake_fd, timeout_s)
        if pipe.fileno() not in ready:
            return None if self._last_read and not ready else []
        data = os.read(pipe.fileno(), 65536)
        if not data:
            if self._process.wait() != 0:
                raise Failure(
                    f"cannot read the task's output: journalctl ended with {self._process.returncode}",
                    hint="reading the journal takes root or membership in systemd-journal",
                )
            return None
        *lines, self._raw = (self._raw + data).split(b"\n")
        return [frame for frame in map(journal_frame, lines) if frame is not None]


def journal_frame(line: bytes) -> Frame | None:
    """The frame in one line of `journalctl -o json`; None for entries that are not output."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    if not isinstance(entry, dict) or "AGENTD_STREAM" not in entry:
        return None
    message = entry.get("MESSAGE")
    data = bytes(message) if isinstance(message, list) else str(message or "").encode("utf-8", "surrogateescape")
    stream = "stderr" if entry.get("AGENTD_STREAM") == "stderr" else "stdout"
    return Frame(stream, int(entry.get("__REALTIME_TIMESTAMP", 0)) / 1e6, data + b"\n")


def _readable(fd: int | None, wake_fd: int | None, timeout_s: float) -> list[int]:
    return select.select([one for one in (fd, wake_fd) if one is not None], [], [], timeout_s)[0]


def begins_at(exchange: Exchange, asked: int) -> int:
    """The offset of the answer's first byte: later than asked for where a bounded log has dropped older output."""
    said = exchange.headers.get("agentd-offset", "")
    return int(said) if said.isdigit() else asked


class Printer:
    """Writes frames: raw, with timestamps, or as JSON lines."""

    def __init__(self, out: Terminal, err: Terminal, *, as_json: bool = False, timestamps: bool = False):
        self._out = out
        self._err = err
        self._json = as_json
        self._timestamps = timestamps
        self._at_line_start = {"stdout": True, "stderr": True}
        self.ended_line = True
        """Whether the last byte written was a newline."""
        self.escaped = False
        """Whether an escape sequence was among the output."""

    def write(self, frame: Frame) -> None:
        """One frame."""
        if not frame.data:
            return
        if self._json:
            self._out.record(
                {"stream": frame.stream, "time": frame.time, "data": frame.data.decode("utf-8", "replace")}
            )
            return
        data = frame.data
        self.escaped = self.escaped or b"\x1b" in data
        self.ended_line = data.endswith(b"\n")
        if self._timestamps:
            data = self._stamped(frame)
        (self._out if frame.stream == "stdout" else self._err).raw(data)

    def _stamped(self, frame: Frame) -> bytes:
        stamp = timestamp(frame.time).encode() + b" "
        # Only newlines begin a line that is worth a time: a progress bar's \r does not.
        lines = [line + b"\n" for line in frame.data.split(b"\n")]
        lines[-1] = lines[-1][:-1]
        if not lines[-1]:
            lines.pop()
        written = stamp.join(lines)
        if self._at_line_start[frame.stream]:
            written = stamp + written
        self._at_line_start[frame.stream] = frame.data.endswith(b"\n")
        return written
