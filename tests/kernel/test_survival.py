"""Warden, zygote and PID 1 may die at any time: what runs, runs on; what ended is known; what a crash left is removed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .conftest import Warden

pytestmark = pytest.mark.kernel

COUNT = "i=0; while [ $i -lt 60 ]; do echo line $i; i=$((i+1)); sleep 0.02; done; exit {code}"
LINES = [f"line {i}" for i in range(60)]


def alive(pid: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_sandboxes_outlive_a_killed_warden_and_the_next_one_finds_them(own_warden: Callable[..., Warden]) -> None:
    from .conftest import until

    own = own_warden()
    client = own.client()
    before = {}
    for index in range(4):
        _, before[f"s{index}"] = client.start(f"s{index}", ["sh", "-c", COUNT.format(code=index)])
    own.down(signal.SIGKILL)
    own.up()
    client = own.client()
    found = client.ask("list")[0]["sandboxes"]
    assert sorted(one["id"] for one in found) == [f"s{index}" for index in range(4)]
    for index in range(4):
        answer, fds = client.ask("attach", id=f"s{index}", epoch=1)
        for fd in fds:
            os.close(fd)  # the first descriptors still read the same pipe
        if answer["status"]["exit"]:
            client.ended[f"s{index}"] = answer["status"]["exit"]
        ran = client.finish(f"s{index}", before[f"s{index}"])
        assert ran.code == index and ran.out.splitlines() == LINES
        assert ran.status["usage"]["cpu_s"] > 0
    until(lambda: os.listdir(own.run / "sandboxes") == [])


def test_output_waits_in_the_pipe_while_nobody_reads(own_warden: Callable[..., Warden]) -> None:
    own = own_warden()
    client = own.client()
    _, fds = client.start("alone", ["sh", "-c", COUNT.format(code=7)])
    for fd in fds:
        os.close(fd)  # as when the daemon dies
    client.close()
    own.down(signal.SIGKILL)  # and the warden with it: only PID 1 holds the pipes now
    own.up()
    client = own.client()
    answer, fds = client.ask("attach", id="alone", epoch=1)
    if answer["status"]["exit"]:
        client.ended["alone"] = answer["status"]["exit"]
    ran = client.finish("alone", fds)
    assert ran.code == 7 and ran.out.splitlines() == LINES


def test_an_exit_while_there_was_no_warden_is_known_to_the_next(own_warden: Callable[..., Warden]) -> None:
    from .conftest import until

    own = own_warden()
    client = own.client()
    _, fds = client.start("brief", ["sh", "-c", "sleep 0.3; echo bye; exit 9"])
    own.down(signal.SIGKILL)
    until(lambda: (own.run / "sandboxes/brief/exit").read_text() != "")
    own.up()
    client = own.client()
    answer, _ = client.ask("status", id="brief", epoch=1)
    assert answer["status"]["exit"]["code"] == 9
    client.ended["brief"] = answer["status"]["exit"]
    assert client.finish("brief", fds).out == "bye\n"


def test_a_dead_zygote_is_replaced(own_warden: Callable[..., Warden]) -> None:
    from .conftest import until

    own = own_warden()
    client = own.client()
    _, fds = client.start("runs", ["sh", "-c", "sleep 0.5; exit 4"])
    assert own.process is not None
    children = Path(f"/proc/{own.process.pid}/task/{own.process.pid}/children").read_text().split()
    zygote = next(int(pid) for pid in children if Path(f"/proc/{pid}/comm").read_text() == "agentd-zygote\n")
    os.kill(zygote, signal.SIGKILL)
    until(lambda: not alive(zygote) or ") Z" in Path(f"/proc/{zygote}/stat").read_text())
    assert client.run(["sh", "-c", "exit 5"], name="next").code == 5
    assert client.finish("runs", fds).code == 4


def test_a_killed_pid_1_is_reported_as_lost_and_can_be_collected(own_warden: Callable[..., Warden]) -> None:
    import json

    own = own_warden()
    client = own.client()
    _, fds = client.start("victim", ["sleep", "60"])
    pid = json.loads((own.run / "sandboxes/victim/record.json").read_text())["pid"]
    os.kill(pid, signal.SIGKILL)
    ran = client.finish("victim", fds)
    assert ran.exit["lost"] and ran.exit["signal"] == 9
    assert client.run(["true"], name="victim").code == 0


def test_what_a_crash_left_half_made_is_removed(own_warden: Callable[..., Warden]) -> None:
    import json

    own = own_warden()
    client = own.client()
    _, fds = client.start("kept", ["sleep", "60"])
    veth = client.ask("rules", id="kept", epoch=1)[0]["text"].split('"')[1]
    roots = json.loads((own.run / "cgroups.json").read_text())
    own.down(signal.SIGKILL)
    half = own.run / "sandboxes/half"
    half.mkdir()
    (half / "record.json").write_text("{")
    group = Path(roots["unified"]) / "tenants/tests/orphan/agent"
    group.mkdir(parents=True)
    stray = subprocess.Popen(["sh", "-c", "echo $$ > $0/cgroup.procs && exec sleep 60", str(group)])
    own.gateway("nft", "add", "element", "inet", "agentd", "src4", '{ "agvstale" . 10.200.9.9 }')
    own.gateway("nft", "add", "counter", "inet", "agentd", "agvstale_tx")
    own.gateway("ip", "link", "add", "agvstale", "type", "veth", "peer", "name", "agvpeer")
    own.up()
    client = own.client()
    assert [one["id"] for one in client.ask("list")[0]["sandboxes"]] == ["kept"]
    assert not half.exists() and not group.exists() and stray.wait(5) != 0
    rules = own.gateway("nft", "list", "table", "inet", "agentd")
    assert "agvstale" not in rules and veth in rules
    assert "agvstale" not in own.gateway("ip", "-o", "link")
    client.ask("signal", id="kept", epoch=1, signo=9)
    assert client.finish("kept", fds).exit["signal"] == 9


def test_end_leaves_nothing_even_of_running_sandboxes(own_warden: Callable[..., Warden]) -> None:
    own = own_warden()
    client = own.client()
    for index in range(3):
        client.start(f"s{index}", ["sleep", "600"])
    holder = own.holder()
    own.end()
    assert os.listdir(own.run / "sandboxes") == [] and not alive(holder)
    own.up()  # and it starts again from nothing
    assert own.client().run(["true"]).code == 0
    shutil.rmtree(own.root / "shared")
