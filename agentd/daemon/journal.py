"""journald's native protocol: one datagram an entry, with fields; systemd's JOURNAL_NATIVE_PROTOCOL.md."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Mapping
from pathlib import Path

SOCKET = "/run/systemd/journal/socket"
LONGEST = 200_000


def _field(name: str, value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode(errors="replace")
    if b"\n" in raw:
        return name.encode() + b"\n" + struct.pack("<Q", len(raw)) + raw + b"\n"
    return name.encode() + b"=" + raw + b"\n"


class Journal:
    """A connection to the journal of this host."""

    def __init__(self, path: str = SOCKET):
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 20)

    @staticmethod
    def present(path: str = SOCKET) -> bool:
        """Whether there is a journal to write to."""
        return Path(path).exists()

    def send(self, message: str | bytes, priority: int, fields: Mapping[str, str | bytes]) -> None:
        """Write one entry; a journal that is away loses it, as it does for every other program."""
        packet = _field("MESSAGE", message) + _field("PRIORITY", str(priority)) + _field("SYSLOG_IDENTIFIER", "agentd")
        packet += b"".join(_field(name, value) for name, value in fields.items())
        try:
            self._socket.sendto(packet[:LONGEST], self._path)
        except OSError:
            pass

    def line(self, task: str, stream: str, text: bytes) -> None:
        """One line of a task's output."""
        self.send(text, 6, {"AGENTD_TASK": task, "AGENTD_STREAM": stream, "AGENTD_EVENT": "output"})


def under_systemd() -> bool:
    """Whether our standard error is the journal already."""
    stream = os.environ.get("JOURNAL_STREAM", "")
    try:
        info = os.fstat(2)
    except OSError:
        return False
    return stream == f"{info.st_dev}:{info.st_ino}"
