"""What systemd and we tell each other: readiness, watchdog, sockets. Nothing happens where systemd is not; sd_notify(3), sd_listen_fds(3)."""

from __future__ import annotations

import asyncio
import os
import socket
import time


def notify(state: str) -> None:
    """Tell the service manager."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)


def reloading() -> str:
    """The state to send when a reload begins (Type=notify-reload wants the time)."""
    return f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}"


def listening() -> list[socket.socket]:
    """Sockets that systemd opened for us."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = int(os.environ.get("LISTEN_FDS", "0"))
    found = []
    for fd in range(3, 3 + count):
        os.set_inheritable(fd, False)
        found.append(socket.socket(fileno=fd))
    return found


async def watchdog() -> None:
    """Say that the event loop turns, twice as often as systemd asks; for ever."""
    allowed = os.environ.get("WATCHDOG_USEC")
    if not allowed:
        return
    while True:
        notify("WATCHDOG=1")
        await asyncio.sleep(int(allowed) / 2e6)
