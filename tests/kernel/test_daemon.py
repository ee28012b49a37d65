"""The whole of it on this host: daemon without privileges, warden, agentctl; killed at the worst moments."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from .conftest import ROOT, Warden, until

if TYPE_CHECKING:
    pass

pytestmark = pytest.mark.kernel

DAEMON_UID = 1879048190


class Host:
    """A running agentd below a directory of its own."""

    def __init__(self, root: Path):
        self.warden = Warden(root)
        self.environ = self.warden.environ
        (root / "etc/agentd/warden.toml").write_text(f'daemon_user = "{DAEMON_UID}"\nmount_roots = []\n')
        for path in ("run/agentd", "var/lib/agentd"):
            (root / path).mkdir(parents=True, exist_ok=True)
            os.chown(root / path, DAEMON_UID, DAEMON_UID)
        self.root = root
        self.daemon: subprocess.Popen[bytes] | None = None

    def up(self) -> None:
        with open(self.root / "daemon.log", "ab") as log:
            drop = [
                "setpriv",
                f"--reuid={DAEMON_UID}",
                f"--regid={DAEMON_UID}",
                "--clear-groups",
                "--no-new-privs",
                "--bounding-set=-all",
                "--inh-caps=-all",
            ]
            self.daemon = subprocess.Popen(
                [*drop, sys.executable, "-m", "agentd.daemon"], cwd=ROOT, env=self.environ, stdout=log, stderr=log
            )
        until(self.ready, 30, lambda: (self.root / "daemon.log").read_text()[-3000:])

    def ready(self) -> bool:
        done = self.ctl("version", "--json")
        return done.returncode == 0 and '"ready": true' in done.stdout

    def kill(self) -> None:
        assert self.daemon is not None
        self.daemon.kill()
        self.daemon.wait()

    def ctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        call = [sys.executable, "-m", "agentd.cli", *arguments]
        return subprocess.run(call, cwd=ROOT, env=self.environ, capture_output=True, text=True, check=False, timeout=60)

    def submit(self, *command: str, flags: tuple[str, ...] = ()) -> str:
        done = self.ctl("run", "--detach", *flags, "--", *command)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def show(self, task: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.ctl("show", "--json", task).stdout)
        return found

    def wait(self, task: str) -> int:
        return self.ctl("wait", task).returncode


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, nothing_left: None) -> Iterator[Host]:
    root = tmp_path_factory.mktemp("host")
    for path in (root, root.parent, root.parent.parent):
        path.chmod(0o755)
    found = Host(root)
    found.warden.up()
    found.up()
    yield found
    for task in json.loads(found.ctl("ps", "-a", "--json").stdout)["tasks"]:
        found.ctl("rm", "-f", task["id"])
    assert found.daemon is not None
    found.daemon.terminate()
    assert found.daemon.wait(15) == 0
    found.warden.end()


def test_the_doctor_proves_the_sandbox(host: Host) -> None:
    done = host.ctl("doctor", "--json")
    assert done.returncode == 0
    found = json.loads(done.stdout)
    assert found["ok"] and {"no new namespaces", "nothing else reachable", "memory limit", "seccomp"} <= {
        one["name"] for one in found["checks"]
    }


def test_the_daemon_holds_no_privilege(host: Host) -> None:
    assert host.daemon is not None
    status = dict(
        line.split(":\t", 1)
        for line in Path(f"/proc/{host.daemon.pid}/status").read_text().splitlines()
        if ":\t" in line
    )
    assert {int(status[key], 16) for key in ("CapPrm", "CapEff", "CapBnd")} == {0} and status["NoNewPrivs"] == "1"


def test_run_passes_output_and_exit_code_on(host: Host) -> None:
    done = host.ctl("run", "--", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout) == (7, "out\n") and "err" in done.stderr


@pytest.mark.parametrize("after_s", [0.0, 0.005, 0.02, 0.05, 0.1])
def test_an_acknowledged_task_runs_once_whatever_happens_to_the_daemon(host: Host, after_s: float) -> None:
    task = host.submit("sh", "-c", "echo ran >> ran; sleep 0.05; echo done")
    time.sleep(after_s)  # not for synchronisation: the moment of the kill is what is varied
    host.kill()
    host.up()
    assert host.wait(task) == 0
    found = host.show(task)
    assert found["state"] == "succeeded"
    assert (Path(found["workspace"]) / "ran").read_text() == "ran\n"
    assert host.ctl("logs", task).stdout == "done\n"


def test_what_runs_is_adopted_with_its_output_whole_and_in_order(host: Host) -> None:
    script = "i=0; while [ $i -lt 300 ]; do echo line $i; i=$((i+1)); sleep 0.005; done; exit 5"
    tasks = [host.submit("sh", "-c", script) for _ in range(3)]
    for _ in range(2):
        host.kill()
        host.up()
    host.warden.down(signal.SIGKILL)
    host.kill()
    host.warden.up()
    host.up()
    for task in tasks:
        assert host.wait(task) == 5
        assert host.ctl("logs", task).stdout.splitlines() == [f"line {i}" for i in range(300)]
        assert host.show(task)["attempt"] == 1


def test_an_exit_while_the_daemon_is_away_is_collected(host: Host) -> None:
    task = host.submit("sh", "-c", "sleep 0.3; echo last; exit 9")
    until(lambda: host.show(task)["state"] == "running")
    host.kill()
    until(lambda: (host.warden.run / f"sandboxes/{task}/exit").read_text() != "")
    host.up()
    assert host.wait(task) == 9 and host.ctl("logs", task).stdout == "last\n"
    until(lambda: os.listdir(host.warden.run / "sandboxes") == [])


def test_time_over_stop_kill_and_rm(host: Host) -> None:
    slow = host.submit(
        "sh", "-c", "trap 'echo told; exit 0' TERM; while :; do sleep 0.05; done", flags=("--timeout", "0.5")
    )
    assert host.wait(slow) == 124 and host.ctl("logs", slow).stdout == "told\n"
    deaf = host.submit("sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.05; done")
    until(lambda: host.ctl("logs", deaf).stdout == "up\n")
    assert host.ctl("stop", "--grace", "0.2", deaf).returncode == 0
    assert host.wait(deaf) == 122
    killed = host.submit("sleep", "60")
    until(lambda: host.show(killed)["state"] == "running")
    assert host.ctl("rm", killed).returncode == 1
    assert host.ctl("kill", killed).returncode == 0
    assert host.wait(killed) == 122
    workspace = Path(host.show(killed)["workspace"])
    assert workspace.is_dir() and host.ctl("rm", killed).returncode == 0
    assert not workspace.exists() and host.ctl("show", killed).returncode == 4


CALL = """
import json, os, sys, urllib.error, urllib.request
def call(method, path, body=None, token=os.environ["AGENTD_TOKEN"]):
    request = urllib.request.Request(os.environ["AGENTD_URL"] + path, body, {"Authorization": "Bearer " + token}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer: return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error: return error.code, ""
"""


def agent(host: Host, program: str, *flags: str) -> Any:
    done = host.ctl("run", *flags, "--", "python3", "-c", CALL + program)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_an_agent_asks_the_model_and_leaves_a_result(host: Host) -> None:
    status, text = agent(
        host,
        """
body = json.dumps({"model": "gpt-4", "messages": [{"role": "user", "content": "A sentence that is quite long enough to be quoted."}]})
answer = call("POST", "/openai/v1/chat/completions", body.encode())
call("PUT", "/v1/result", b"the result")
print(json.dumps(answer))
""",
        "--name",
        "asks",
    )
    assert status == 200 and "not a model" in text
    shown = json.loads(host.ctl("ps", "-a", "--json").stdout)["tasks"][-1]
    assert shown["llm"]["requests"] == 1 and shown["llm"]["scripted"] and shown["has_result"]
    assert host.ctl("result", shown["id"]).stdout.strip() == "the result"


def test_memory_is_the_users_and_not_another_tenants(host: Host) -> None:
    assert agent(host, 'print(json.dumps(call("PUT", "/v1/memory/user/k", b"remember")[0]))') == 200
    recall = 'print(json.dumps(call("GET", "/v1/memory/user/k")))'
    assert agent(host, recall) == [200, "remember"]
    assert agent(host, recall, "--tenant", "other")[0] == 404


def test_another_tasks_token_is_good_for_nothing(host: Host) -> None:
    victim = host.submit("sh", "-c", "echo $AGENTD_TOKEN; sleep 30")
    until(lambda: host.ctl("logs", victim).stdout != "")
    token = host.ctl("logs", victim).stdout.strip()
    found = agent(host, f'print(json.dumps([call("GET", "/v1/task", token={token!r})[0], call("GET", "/v1/task")[0]]))')
    assert found == [401, 200]
    host.ctl("kill", victim)


def test_many_at_once_all_end_and_nothing_is_left(host: Host) -> None:
    tasks: list[str] = []
    threads = [
        threading.Thread(target=lambda i=i: tasks.append(host.submit("sh", "-c", f"exit {i}"))) for i in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(host.wait(task) for task in tasks) == list(range(12))
    until(lambda: os.listdir(host.warden.run / "sandboxes") == [])


def test_bad_input_names_the_field_and_makes_nothing(host: Host) -> None:
    before = len(json.loads(host.ctl("ps", "-a", "--json").stdout)["tasks"])
    for flags, word in (
        (("--memory", "12X"), "memory"),
        (("--memory", "900T"), "memory"),
        (("--mount", "/etc:/mnt/etc"), "mounts[0].source"),
        (("--timeout", "soon"), "timeout"),
    ):
        done = host.ctl("run", *flags, "--", "true")
        assert done.returncode == 2 and word in done.stderr, done.stderr
    assert len(json.loads(host.ctl("ps", "-a", "--json").stdout)["tasks"]) == before
