"""Limits bite, and only where they are set."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .conftest import Client

pytestmark = pytest.mark.kernel

HOG = """
data = bytearray({megabytes} << 20)
for i in range(0, len(data), 4096): data[i] = 1
print("all of it")
"""


def test_memory_over_the_limit_ends_the_program_and_is_called_so(client: Client) -> None:
    ran = client.run(HOG.format(megabytes=200), memory=64 << 20)
    assert ran.exit["oom"] and ran.exit["signal"] == 9 and ran.out == ""
    assert ran.status["usage"]["memory_peak_bytes"] <= 64 << 20
    assert client.run(HOG.format(megabytes=200), memory=400 << 20).out == "all of it\n"


@pytest.mark.parametrize("place", ["/tmp", "/dev/shm"])
def test_memory_file_systems_count_as_memory(client: Client, place: str) -> None:
    ran = client.run(["sh", "-c", f"head -c 200M /dev/zero > {place}/x; echo ended $?"], memory=64 << 20)
    assert "ended 0" not in ran.out
    assert (
        client.run(["sh", "-c", f"head -c 20M /dev/zero > {place}/x; echo ended $?"], memory=128 << 20).out
        == "ended 0\n"
    )


FORKS = """
import os, time
made = 0
try:
    while made < 200:
        if os.fork() == 0: time.sleep(30)
        made += 1
except OSError as error:
    print(made, type(error).__name__, flush=True)
else:
    print(made, "no limit", flush=True)
"""


def test_a_fork_bomb_is_contained_while_another_works(client: Client) -> None:
    _, other = client.start("other", ["sh", "-c", "sleep 0.5; for i in 1 2 3 4 5; do /bin/true; done; echo fine"])
    ran = client.run(FORKS, pids=32)
    assert ran.out.split()[1] == "BlockingIOError" and int(ran.out.split()[0]) < 32
    assert client.finish("other", other).out == "fine\n"
    assert client.run(FORKS, pids=400, memory=1 << 30).out == "200 no limit\n"


def test_processor_time_is_rationed(client: Client) -> None:
    busy = "import time\nend = time.monotonic() + 1.5\nwhile time.monotonic() < end: pass\nprint(time.process_time())"
    assert float(client.run(busy, cpus=0.2).out) < 0.6
    assert float(client.run(busy, cpus=1.0).out) > 0.6


def test_limits_over_the_host_are_refused(client: Client) -> None:
    with pytest.raises(Exception, match="the host has"):
        client.run(["true"], memory=1 << 49)
