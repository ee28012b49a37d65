"""A task's output on disk: bounded, in the order it came, byte for byte.

Bytes move from the pipe to the file inside the kernel (splice), so a daemon killed at any instant has either left them in the pipe or
written them. An index beside each segment says which stream and when. The two newest segments are kept; offsets count from the first byte ever.
"""

from __future__ import annotations

import asyncio
import errno
import os
import struct
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

FRAME = struct.Struct("!BdI")
STDOUT, STDERR = 1, 2
CHUNK = 1 << 16
RETRY_S = 1.0


class OutputLog:
    """The files of one task's output. `limit_bytes` bounds both segments together."""

    def __init__(self, directory: Path, limit_bytes: int, clock: Callable[[], float] = time.time):
        self._directory = directory
        self._segment_bytes = max(CHUNK, limit_bytes // 2)
        self._clock = clock
        self._data = -1
        self._index = -1
        self._base = 0
        self._size = 0
        self._readers = 0
        self._changed = asyncio.Event()
        self.complete = False

    # -- writing -------------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Ready to take output, after what is there already."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        segments = _segments(self._directory)
        self._open_segment(segments[-1] if segments else 0)

    def _open_segment(self, base: int) -> None:
        self._base = base
        name = self._directory / f"{base:020d}"
        self._data = os.open(name.with_suffix(".log"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._index = os.open(name.with_suffix(".idx"), os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._data).st_size
        raw = os.pread(self._index, os.fstat(self._index).st_size, 0)
        whole = len(raw) - len(raw) % FRAME.size
        if whole < len(raw):
            os.ftruncate(self._index, whole)
        indexed = sum(length for _, _, length in FRAME.iter_unpack(raw[:whole]))
        if indexed < self._size:  # killed between the bytes and their index
            os.write(self._index, FRAME.pack(STDOUT, self._clock(), self._size - indexed))

    async def take(self, stdout: int, stderr: int) -> None:
        """Move everything from both pipes (whose descriptors this closes) to the files, until both have ended."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._take_one(stdout, STDOUT))
                group.create_task(self._take_one(stderr, STDERR))
        finally:
            self.finish()

    def finish(self) -> None:
        """No more will come: followers end."""
        self.complete = True
        for fd in (self._data, self._index):
            if fd >= 0:
                os.close(fd)
        self._data = self._index = -1
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _take_one(self, pipe: int, stream: int) -> None:
        loop = asyncio.get_running_loop()
        os.set_blocking(pipe, False)
        readable = asyncio.Event()
        loop.add_reader(pipe, readable.set)
        try:
            while True:
                try:
                    moved = os.splice(
                        pipe, self._data, CHUNK, offset_dst=self._size, flags=os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE
                    )
                except BlockingIOError:
                    readable.clear()
                    await readable.wait()
                    continue
                except OSError as error:
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                        raise
                    loop.remove_reader(pipe)  # the program waits in its write until there is room again
                    await asyncio.sleep(RETRY_S)
                    loop.add_reader(pipe, readable.set)
                    continue
                if moved == 0:
                    return
                self._size += moved  # before anything that may wait: the other stream writes to the same file
                await self._note(FRAME.pack(stream, self._clock(), moved))
                self._wake()
                if self._size >= self._segment_bytes:
                    self._rotate()
                await asyncio.sleep(0)
        finally:
            loop.remove_reader(pipe)
            os.close(pipe)

    async def _note(self, entry: bytes) -> None:
        """Write an index entry; where there is no room for it, wait until there is."""
        while True:
            try:
                os.write(self._index, entry)
                return
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                    raise
                await asyncio.sleep(RETRY_S)

    def _rotate(self) -> None:
        os.close(self._data)
        os.close(self._index)
        self._open_segment(self._base + self._size)
        for base in _segments(self._directory)[:-2]:
            for suffix in (".log", ".idx"):
                (self._directory / f"{base:020d}{suffix}").unlink(missing_ok=True)

    # -- reading -------------------------------------------------------------------------------------------------------

    async def read(
        self, offset: int = 0, *, follow: bool = False, streams: frozenset[int] = frozenset({STDOUT, STDERR})
    ) -> AsyncIterator[bytes]:
        """Frames (`FRAME` and payload) from `offset` of the combined output; with `follow`, until it is complete.

        Where older output was dropped, reading begins at the oldest byte there is.
        """
        while True:
            changed, complete = self._changed, self.complete
            progressed = False
            for stream, when, data in _frames(self._directory, offset):
                offset += len(data) if offset >= data.offset else data.offset + len(data) - offset
                progressed = True
                if stream in streams:
                    yield FRAME.pack(stream, when, len(data)) + bytes(data)
            if progressed:
                continue
            if not follow or complete:
                return
            await changed.wait()


class _Piece(bytes):
    """Output with where it stands in the whole."""

    offset: int = 0


def _segments(directory: Path) -> list[int]:
    return sorted(int(path.stem) for path in directory.glob("*.log"))


def _frames(directory: Path, offset: int) -> list[tuple[int, float, _Piece]]:
    """At most about 256 KiB of frames from `offset`."""
    found: list[tuple[int, float, _Piece]] = []
    taken = 0
    if not directory.is_dir():
        return found
    for base in _segments(directory):
        try:
            with open(directory / f"{base:020d}.idx", "rb") as file:
                raw = file.read()
            data = open(directory / f"{base:020d}.log", "rb")  # noqa: SIM115  # closed by the with below
        except FileNotFoundError:
            continue
        with data:
            position = base
            for stream, when, length in FRAME.iter_unpack(raw[: len(raw) - len(raw) % FRAME.size]):
                end = position + length
                if end > offset:
                    start = max(position, offset)
                    data.seek(start - base)
                    piece = _Piece(data.read(end - start))
                    piece.offset = start
                    if piece:  # none where a power cut kept the index and lost the bytes
                        found.append((stream, when, piece))
                    taken += len(piece)
                    if taken > 4 * CHUNK:
                        return found
                position = end
    return found


def tail_offset(directory: Path, lines: int) -> int:
    """The offset at which the last `lines` lines begin, as far as they are kept."""
    if not directory.is_dir():
        return 0
    segments = _segments(directory)
    if lines <= 0:
        newest = directory / f"{segments[-1]:020d}.log" if segments else None
        return segments[-1] + newest.stat().st_size if newest else 0
    wanted, ending = lines, True
    for base in reversed(segments):
        data = (directory / f"{base:020d}.log").read_bytes()
        end = len(data)
        if data and ending:  # the newest segment may be empty still
            end -= data.endswith(b"\n")
            ending = False
        while (cut := data.rfind(b"\n", 0, end)) >= 0:
            wanted -= 1
            if wanted == 0:
                return base + cut + 1
            end = cut
    return segments[0] if segments else 0


def oldest_offset(directory: Path) -> int:
    """The offset of the first byte that is kept."""
    return _segments(directory)[0] if directory.is_dir() and _segments(directory) else 0


def size_on_disk(directory: Path) -> int:
    """Bytes kept."""
    return sum(path.stat().st_size for path in directory.glob("*.log")) if directory.is_dir() else 0
