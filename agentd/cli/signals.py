"""Signals as data: those a `Signals` names arrive in its `take()` and wake a `select` on it."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterable
from types import FrameType, TracebackType


class Signals:
    """Collects signals instead of dying of them; a context manager for the main thread."""

    def __init__(self, numbers: Iterable[signal.Signals]):
        self._numbers = tuple(numbers)
        self._arrived: list[signal.Signals] = []
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {}
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._woken.setblocking(False)
        self._wakeup_before = -1

    def __enter__(self) -> Signals:
        # Python restarts select after a signal (PEP 475); the wake-up descriptor is what makes it return.
        self._wakeup_before = signal.set_wakeup_fd(self._woken.fileno(), warn_on_full_buffer=False)
        for number in self._numbers:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        signal.set_wakeup_fd(self._wakeup_before)
        self._wake.close()
        self._woken.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._arrived.append(signal.Signals(number))

    def fileno(self) -> int:
        """Readable when a signal has arrived."""
        return self._wake.fileno()

    def take(self) -> list[signal.Signals]:
        """The signals since the last call, oldest first."""
        try:
            while self._wake.recv(256):
                pass
        except BlockingIOError:
            pass
        found, self._arrived = self._arrived, []
        return found
