"""agentd as systemd runs it: unified control groups, journald, restarts, power loss, removal. In order of the file: the last one uninstalls."""

from __future__ import annotations

import json
import re
import textwrap
import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .conftest import Host

pytestmark = pytest.mark.system

NUMBERED = "i=0; while [ $i -lt {count} ]; do echo line $i; i=$((i+1)); sleep {pause}; done; exit {code}"


def submit(host: Host, script: str, flags: str = "") -> str:
    return host.out(f"agentctl run --detach {flags} -- sh -c '{script}'")


def wait(host: Host, task: str) -> int:
    return int(host.run(f"agentctl wait {task} >/dev/null", check=False).rc)


def test_the_host_is_what_the_tests_are_about(host: Host) -> None:
    assert host.out("cat /proc/1/comm") == "systemd"
    controllers = set(host.out("cat /sys/fs/cgroup/cgroup.controllers").split())
    assert {"cpuset", "cpu", "io", "memory", "hugetlb", "pids"} <= controllers


def test_the_units_run_and_the_doctor_finds_nothing(host: Host) -> None:
    for unit in ("agentd.service", "agentd-warden.service", "agentd-sandboxes.service", "agentd.socket"):
        assert host.out(f"systemctl is-active {unit}") == "active"
        assert host.out(f"systemctl is-enabled {unit}") == "enabled"
    found = host.json("agentctl doctor --json")
    assert found["ok"] and len(found["checks"]) >= 15
    assert found["facts"]["cgroups"] == "unified"


def test_the_daemon_is_closed_and_holds_no_capability(host: Host) -> None:
    level = re.search(r"level for agentd.service: ([\d.]+)", host.out("systemd-analyze security agentd.service"))
    assert level is not None and float(level[1]) <= 2.0
    level = re.search(
        r"level for agentd-warden.service: ([\d.]+)", host.out("systemd-analyze security agentd-warden.service")
    )
    assert level is not None and float(level[1]) < 8.0
    status = host.out("cat /proc/$(systemctl show -P MainPID agentd)/status")
    assert re.search(r"CapBnd:\s+0+$", status, re.M) and re.search(r"CapEff:\s+0+$", status, re.M)
    assert re.search(r"NoNewPrivs:\s+1", status)


def test_the_watchdog_is_fed_and_readiness_is_told(host: Host) -> None:
    for unit in ("agentd", "agentd-warden"):
        shown = dict(
            line.split("=", 1) for line in host.out(f"systemctl show -p WatchdogUSec -p Type {unit}").splitlines()
        )
        assert shown["WatchdogUSec"] not in ("0", "infinity") and shown["Type"] == "notify"


def test_a_task_runs_and_its_exit_code_and_output_come_back(host: Host) -> None:
    result = host.run("agentctl run -- sh -c 'echo out; echo err >&2; exit 7'", check=False)
    assert (result.rc, result.stdout) == (7, "out\n") and "err" in result.stderr


def test_a_task_is_below_the_delegated_group_with_its_limits(host: Host) -> None:
    task = submit(host, "sleep 60", "--memory 64M --cpus 0.5 --pids 20")
    host.until(f'agentctl show --json {task} | grep -q \'"state": *"running"\'')
    group = f"/sys/fs/cgroup/agentd.slice/agentd-sandboxes.service/tenants/default/{task}"
    assert host.out(f"cat {group}/memory.max {group}/cpu.max {group}/pids.max").split() == [
        "67108864",
        "50000",
        "100000",
        "20",
    ]
    assert int(host.out(f"wc -l < {group}/agent/cgroup.procs")) >= 2
    host.run(f"agentctl stop --grace 1 {task}")
    assert wait(host, task) == 122
    host.until(f"! test -e {group}")


def test_memory_over_the_limit_ends_the_task_and_says_why(host: Host) -> None:
    task = submit(host, "head -c 200M /dev/zero | tail", "--memory 48M")
    wait(host, task)
    found = host.task(task)
    assert found["state"] == "failed" and found["reason"] == "oom"
    assert 0 < found["usage"]["memory_peak_bytes"] <= 48 << 20


def test_the_journal_tells_a_tasks_life_by_its_fields(host: Host) -> None:
    task = submit(host, "true")
    wait(host, task)
    host.until(f"journalctl AGENTD_TASK={task} AGENTD_EVENT=succeeded -o json | grep -q .")
    lines = [json.loads(line) for line in host.out(f"journalctl AGENTD_TASK={task} -o json").splitlines()]
    assert [line["AGENTD_EVENT"] for line in lines] == ["submitted", "starting", "started", "succeeded"]
    assert {line["AGENTD_TENANT"] for line in lines} == {"default"}


def test_only_the_group_may_use_the_socket(host: Host) -> None:
    host.run("id eve >/dev/null 2>&1 || useradd eve")
    assert host.run("runuser -u eve -- agentctl ps", check=False).rc in (69, 77)
    host.run("usermod -aG agentd eve")
    task = submit(host, "true")
    assert host.run("runuser -u eve -- agentctl ps -a", check=False).rc == 0
    assert host.run(f"runuser -u eve -- agentctl show {task}", check=False).rc == 4
    mine = host.out("runuser -u eve -- agentctl run --detach -- id")
    assert host.task(mine)["user"] == "eve"


def test_restart_of_the_daemon_leaves_tasks_running_and_their_output_whole(host: Host) -> None:
    task = submit(host, NUMBERED.format(count=30, pause=0.3, code=3))
    host.until(f"agentctl logs {task} | grep -q 'line 2'")
    host.run("systemctl restart agentd")
    host.ready()
    assert wait(host, task) == 3
    assert host.out(f"agentctl logs {task}").splitlines() == [f"line {i}" for i in range(30)]
    assert "adopted" in host.out(f"agentctl events {task}")


def test_kill_9_of_daemon_and_warden_loses_neither_task_nor_exit_code(host: Host) -> None:
    long = submit(host, NUMBERED.format(count=40, pause=0.3, code=5))
    short = submit(host, NUMBERED.format(count=8, pause=0.3, code=6))
    host.until(f"agentctl logs {long} | grep -q 'line 2'")
    host.run("systemctl kill -s KILL agentd agentd-warden")
    host.ready()
    assert (wait(host, short), wait(host, long)) == (6, 5)
    assert host.out(f"agentctl logs {long}").splitlines() == [f"line {i}" for i in range(40)]
    assert host.out(f"agentctl logs {short}").splitlines() == [f"line {i}" for i in range(8)]
    host.until('test -z "$(ls /run/agentd-warden/sandboxes)"')


def test_reload_makes_a_new_configuration_take_effect_and_refuses_a_wrong_one(host: Host) -> None:
    conf = "/etc/agentd/agentd.toml.d/test.toml"
    provider = textwrap.dedent("""
        [[llm.providers]]
        name = "local"
        base_url = "http://127.0.0.1:9/v1"
        models = ["reloaded-model"]
        """)
    host.run(f"cat > {conf} <<'X'\n{provider}\nX\nsystemctl reload agentd")
    host.until("agentctl doctor --json | grep -q reloaded-model")
    host.run(f"echo 'nonsense = 1' >> {conf}")
    check = host.run("agentctl config check", check=False)
    assert check.rc != 0 and "nonsense" in check.stderr + check.stdout
    host.run("systemctl reload agentd")
    host.until("journalctl -u agentd | grep -q 'new configuration is not used'")
    assert "reloaded-model" in host.out("agentctl doctor --json")
    host.run(f"rm {conf}; systemctl reload agentd")


def test_output_can_go_to_the_journal(host: Host) -> None:
    host.run(
        "printf '[log]\\ntasks = \"journald\"\\n' > /etc/agentd/agentd.toml.d/journal.toml; systemctl restart agentd"
    )
    host.ready()
    task = submit(host, "echo to the journal; echo and errors >&2")
    wait(host, task)
    host.until(f"agentctl logs {task} | grep -q 'to the journal'")
    streams = host.out(
        f"journalctl AGENTD_TASK={task} AGENTD_EVENT=output -o json | jq -r '.AGENTD_STREAM + \": \" + .MESSAGE'"
    )
    assert sorted(streams.splitlines()) == ["stderr: and errors", "stdout: to the journal"]
    host.run("rm /etc/agentd/agentd.toml.d/journal.toml; systemctl restart agentd")
    host.ready()


def test_after_power_loss_every_acknowledged_task_is_accounted_for(host: Host) -> None:
    ended = submit(host, "echo kept")
    wait(host, ended)
    running = submit(host, "sleep 600")
    host.until(f'agentctl show --json {running} | grep -q \'"state": *"running"\'')
    waiting = host.out("agentctl run --detach --memory 1500M -- sh -c 'echo ran once'")
    host.machine.power_off_hard()
    host.machine.boot()
    host.ready()
    assert host.task(ended)["state"] == "succeeded" and host.out(f"agentctl logs {ended}") in ("kept", "")
    lost = host.task(running)
    assert (lost["state"], lost["reason"]) == ("failed", "lost")
    assert wait(host, waiting) in (0, 120)
    assert host.json("agentctl ps --json")["tasks"] == []


def test_uninstall_keeps_the_data_and_a_new_install_finds_it(host: Host) -> None:
    before = host.out("agentctl ps -aq").split()
    host.run("/root/agentd/scripts/uninstall")
    assert host.run("command -v agentctl", check=False).rc != 0
    assert not re.search(r"agentd(-warden|-sandboxes)?\.", host.out("systemctl list-unit-files --no-legend 'agentd*'"))
    assert host.out("ls /var/lib/agentd/state") != ""
    host.run("/root/agentd/scripts/install", timeout_s=600)
    host.ready()
    assert host.out("agentctl ps -aq").split() == before


def test_purge_leaves_nothing(host: Host) -> None:
    host.run("/root/agentd/scripts/uninstall --purge")
    host.until(
        "! find /sys/fs/cgroup -type d -name '*agentd*' | grep -v wheels | grep -v 'agentd.slice$' | grep -q .", 30
    )
    left = host.out(
        "ls -d /var/lib/agentd* /etc/agentd /opt/agentd /run/agentd* /usr/local/bin/agentctl 2>/dev/null; true"
    )
    assert left == ""
    assert host.run("id agentd", check=False).rc != 0
    assert "agentd" not in host.out("ip -o link; nft list ruleset")
    assert not [line for line in host.out("ps -eo args").splitlines() if re.match(r"agentd-|/opt/agentd", line)]


def test_the_quickstart_works_on_a_systemd_host_too(host: Host) -> None:
    started = time.monotonic()
    result = host.run("/root/agentd/scripts/quickstart", timeout_s=900)
    assert "This host can run sandboxes" in result.stdout
    assert "I remember nothing: this is the first run." in result.stdout
    assert result.stdout.count("stopped (") == 2 and "reached" not in result.stdout.replace("stopped", "")
    assert "scripted provider, not a model" in result.stdout + result.stderr
    first = time.monotonic() - started
    started = time.monotonic()
    again = host.run("/root/agentd/scripts/quickstart", timeout_s=300)
    assert "I remember: in run 1" in again.stdout
    assert time.monotonic() - started < first
    host.run("/root/agentd/scripts/quickstart --stop")
    assert not [line for line in host.out("ps -eo args").splitlines() if "agentd." in line and "python" in line]
    host.until("! find /sys/fs/cgroup -type d -name 'agentd-*' | grep -q .", 30)
