"""A task's output: whole, in order, bounded, resumable."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentd.tasks import output
from agentd.tasks.output import FRAME, STDERR, STDOUT, OutputLog, size_on_disk, tail_offset


async def read_all(log: OutputLog, offset: int = 0, *, follow: bool = False) -> list[tuple[int, bytes]]:
    found = []
    async for frame in log.read(offset, follow=follow):
        stream, _, length = FRAME.unpack(frame[: FRAME.size])
        assert len(frame) == FRAME.size + length
        found.append((stream, frame[FRAME.size :]))
    return found


def joined(frames: list[tuple[int, bytes]], stream: int | None = None) -> bytes:
    return b"".join(data for which, data in frames if stream in (None, which))


async def write(fd: int, data: bytes) -> None:
    await asyncio.to_thread(_write, fd, data)


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.close(fd)


async def filled(directory: Path, out: bytes, err: bytes, limit: int = 64 << 20) -> OutputLog:
    log = OutputLog(directory, limit)
    log.open()
    (out_r, out_w), (err_r, err_w) = os.pipe(), os.pipe()
    await asyncio.gather(log.take(out_r, err_r), write(out_w, out), write(err_w, err))
    return log


async def test_both_streams_arrive_whole(tmp_path: Path) -> None:
    out, err = os.urandom(1_500_000), os.urandom(700_001)
    log = await filled(tmp_path / "o", out, err)
    frames = await read_all(log)
    assert joined(frames, STDOUT) == out and joined(frames, STDERR) == err


async def test_reading_from_any_offset_gives_the_rest(tmp_path: Path) -> None:
    log = await filled(tmp_path / "o", b"0123456789" * 1000, b"")
    whole = joined(await read_all(log))
    for offset in (0, 1, 4095, 4096, 9_999, 10_000, 10_001):
        assert joined(await read_all(log, offset)) == whole[offset:]


async def test_a_follower_sees_what_comes_and_the_end(tmp_path: Path) -> None:
    log = OutputLog(tmp_path / "o", 1 << 20)
    log.open()
    (out_r, out_w), (err_r, err_w) = os.pipe(), os.pipe()
    taking = asyncio.create_task(log.take(out_r, err_r))
    follower = asyncio.create_task(read_all(log, follow=True))
    os.write(out_w, b"one ")
    async with asyncio.timeout(5):
        while size_on_disk(tmp_path / "o") < 4:
            await asyncio.sleep(0)
        os.write(err_w, b"two")
        os.close(out_w)
        os.close(err_w)
        await taking
        frames = await follower
    assert (joined(frames, STDOUT), joined(frames, STDERR)) == (b"one ", b"two")


async def test_old_output_is_dropped_and_the_newest_kept(tmp_path: Path) -> None:
    data = b"".join(b"%09d\n" % i for i in range(100_000))
    log = await filled(tmp_path / "o", data, b"", limit=256 << 10)
    assert size_on_disk(tmp_path / "o") <= (256 << 10) + 2 * 65536
    kept = joined(await read_all(log))
    assert data.endswith(kept) and len(kept) >= 128 << 10
    assert joined(await read_all(log, len(data) - 25)) == data[-25:]


async def test_bytes_without_an_index_entry_are_found_on_opening(tmp_path: Path) -> None:
    await filled(tmp_path / "o", b"before ", b"")
    segment = next((tmp_path / "o").glob("*.log"))
    with segment.open("ab") as file:
        file.write(b"killed here ")
    with segment.with_suffix(".idx").open("ab") as file:
        file.write(b"\1\2\3")
    again = OutputLog(tmp_path / "o", 1 << 20)
    again.open()
    (out_r, out_w), (err_r, err_w) = os.pipe(), os.pipe()
    await asyncio.gather(again.take(out_r, err_r), write(out_w, b"after"), write(err_w, b""))
    assert joined(await read_all(again)) == b"before killed here after"


@pytest.mark.parametrize(("lines", "expected"), [(1, b"c\n"), (2, b"b\nc\n"), (3, b"a\nb\nc\n"), (9, b"a\nb\nc\n")])
async def test_the_tail_is_whole_lines(tmp_path: Path, lines: int, expected: bytes) -> None:
    log = await filled(tmp_path / "o", b"a\nb\nc\n", b"")
    assert joined(await read_all(log, tail_offset(tmp_path / "o", lines))) == expected


async def test_a_task_without_output_has_none(tmp_path: Path) -> None:
    log = OutputLog(tmp_path / "none", 1 << 20)
    assert await read_all(log) == []
    assert tail_offset(tmp_path / "none", 5) == size_on_disk(tmp_path / "none") == 0


async def test_a_tail_of_zero_begins_at_the_end(tmp_path: Path) -> None:
    await filled(tmp_path / "o", b"a\nb\n", b"")
    assert tail_offset(tmp_path / "o", 0) == 4


async def test_the_tail_is_found_when_the_newest_segment_is_empty(tmp_path: Path) -> None:
    log = await filled(tmp_path / "o", b"a\nb\nc\n", b"")
    for suffix in ("log", "idx"):
        (tmp_path / "o" / f"{6:020d}.{suffix}").touch()
    assert joined(await read_all(log, tail_offset(tmp_path / "o", 1))) == b"c\n"


async def test_an_index_that_promises_lost_bytes_does_not_hold_the_reader(tmp_path: Path) -> None:
    log = await filled(tmp_path / "o", b"kept, lost", b"")
    os.truncate(next((tmp_path / "o").glob("*.log")), 4)
    assert joined(await asyncio.wait_for(read_all(log), 5)) == b"kept"


async def test_a_full_disk_loses_nothing_once_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, refusals = os.splice, [errno.ENOSPC, errno.EDQUOT, errno.ENOSPC]

    def full(*args: Any, **more: Any) -> int:
        if refusals:
            number = refusals.pop()
            raise OSError(number, os.strerror(number))
        return real(*args, **more)

    monkeypatch.setattr(os, "splice", full)
    monkeypatch.setattr(output, "RETRY_S", 0.001)
    log = await filled(tmp_path / "o", b"o" * 100_000, b"e" * 5)
    frames = await read_all(log)
    assert not refusals
    assert (joined(frames, STDOUT), joined(frames, STDERR)) == (b"o" * 100_000, b"e" * 5)


async def test_taking_output_leaves_no_descriptor_behind(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    await filled(tmp_path / "o", b"x" * 300_000, b"y", limit=128 << 10)
    assert len(os.listdir("/proc/self/fd")) == before


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([STDOUT, STDERR]), st.integers(1, 20)), max_size=12), st.data())
def test_any_two_reads_that_meet_make_the_whole(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[tuple[int, int]], data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("o") / "log"
    directory.mkdir()
    whole = bytes(index % 251 for index in range(sum(length for _, length in pieces)))
    (directory / f"{0:020d}.log").write_bytes(whole)
    (directory / f"{0:020d}.idx").write_bytes(b"".join(FRAME.pack(stream, 1.0, length) for stream, length in pieces))
    cut = data.draw(st.integers(0, len(whole)))

    async def go() -> None:
        log = OutputLog(directory, 1 << 20)
        assert joined(await read_all(log)) == whole
        assert whole[:cut] + joined(await read_all(log, cut)) == whole

    asyncio.run(go())
