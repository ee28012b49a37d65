"""JSON packets with descriptors over SOCK_SEQPACKET: between server, zygote and PID 1, all of them ours."""

from __future__ import annotations

import array
import json
import os
import socket
from typing import Any

LONGEST = 200 * 1024
MOST_FDS = 64


def send(channel: socket.socket, message: dict[str, Any], fds: list[int] | None = None) -> None:
    """Send one object and `fds` (which stay open here)."""
    packet = json.dumps(message, separators=(",", ":")).encode()
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    channel.sendmsg([packet], ancillary)


def receive_raw(
    channel: socket.socket, longest: int = LONGEST, most_fds: int = MOST_FDS
) -> tuple[bytes | None, list[int], bool]:
    """One packet, the descriptors that came with it (close-on-exec), and whether anything was cut off. None at the end."""
    space = socket.CMSG_SPACE(most_fds * 4)
    packet, ancillary, flags, _ = channel.recvmsg(longest + 1, space, socket.MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found = array.array("i")
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
            fds.extend(found)
    cut = bool(flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)) or len(packet) > longest
    if not packet and not ancillary:
        return None, fds, cut
    return packet, fds, cut


def receive(channel: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """One object and its descriptors, from a peer that is trusted to speak well. None at the end."""
    packet, fds, cut = receive_raw(channel)
    if packet is None:
        return None, fds
    if cut:
        close(fds)
        raise OSError("a packet was cut off")
    found: dict[str, Any] = json.loads(packet)
    return found, fds


def close(fds: list[int]) -> None:
    """Close all of them."""
    for fd in fds:
        os.close(fd)
