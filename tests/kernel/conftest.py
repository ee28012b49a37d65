"""A real warden on this host's kernel, and a client that speaks to it as the daemon does. What it leaves behind fails the run."""

from __future__ import annotations

import array
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PATH = "/usr/local/bin:/usr/bin:/bin"


@dataclass
class Ran:
    """How one program in a sandbox ended."""

    exit: dict[str, Any]
    out: str
    err: str
    status: dict[str, Any]

    @property
    def code(self) -> int | None:
        found: int | None = self.exit["code"]
        return found

    def json(self) -> Any:
        assert self.code == 0, (self.exit, self.err)
        return json.loads(self.out)


class Refused(Exception):
    """The warden's reason."""

    def __init__(self, error: dict[str, Any]):
        super().__init__(error["message"])
        self.error = error


class Client:
    """One connection to the warden."""

    def __init__(self, path: Path):
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(30)
        self._socket.connect(str(path))
        self._seq = 0
        self.ended: dict[str, dict[str, Any]] = {}

    def close(self) -> None:
        self._socket.close()

    def raw(self, packet: bytes, fds: list[int] | None = None) -> None:
        extra = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self._socket.sendmsg([packet], extra)

    def receive(self) -> tuple[dict[str, Any] | None, list[int]]:
        packet, extra, _, _ = self._socket.recvmsg(1 << 18, socket.CMSG_SPACE(64))
        fds = array.array("i")
        for _, _, data in extra:
            fds.frombytes(data)
        return (json.loads(packet) if packet else None), list(fds)

    def answer(self) -> tuple[dict[str, Any], list[int]]:
        while True:
            found, fds = self.receive()
            if found is None:
                raise ConnectionError("the warden closed the connection")
            if "event" not in found:
                return found, fds
            self.ended[found["id"]] = found["exit"]

    def ask(self, op: str, fds: list[int] | None = None, **fields: Any) -> tuple[dict[str, Any], list[int]]:
        self._seq += 1
        self.raw(json.dumps({"seq": self._seq, "op": op, **fields}).encode(), fds)
        found, given = self.answer()
        if "error" in found:
            raise Refused(found["error"])
        return found, given

    def spec(self, name: str, argv: list[str], **more: Any) -> dict[str, Any]:
        limits = {
            "memory_bytes": more.pop("memory", 256 << 20),
            "cpus": more.pop("cpus", 1.0),
            "pids": more.pop("pids", 64),
        }
        env = {"PATH": PATH, "HOME": "/workspace"} | more.pop("env", {})
        fixed = {
            "id": name,
            "epoch": 1,
            "tenant": "tests",
            "argv": argv,
            "env": env,
            "cwd": "/workspace",
            "limits": limits,
        }
        return fixed | more

    def start(self, name: str, argv: list[str], **more: Any) -> tuple[dict[str, Any], list[int]]:
        self.ask("workspace", id=name)
        answer, fds = self.ask("start", spec=self.spec(name, argv, **more))
        return answer["status"], fds

    def wait(self, name: str) -> dict[str, Any]:
        while name not in self.ended:
            found, _ = self.receive()
            assert found is not None and "event" in found
            self.ended[found["id"]] = found["exit"]
        return self.ended.pop(name)

    def finish(self, name: str, fds: list[int], keep: bool = False) -> Ran:
        texts = ["", ""]

        def read(index: int) -> None:
            with os.fdopen(fds[index], "rb") as file:
                texts[index] = file.read().decode(errors="replace")

        readers = [threading.Thread(target=read, args=(index,)) for index in (0, 1)]
        for reader in readers:
            reader.start()
        ended = self.wait(name)
        for reader in readers:
            reader.join()
        answer, _ = self.ask("collect", id=name, epoch=1)
        if not keep:
            self.ask("remove_workspace", id=name)
        return Ran(ended, texts[0], texts[1], answer["status"])

    def run(self, program: list[str] | str, name: str = "probe", keep: bool = False, **more: Any) -> Ran:
        """Run argv, or Python source, to its end."""
        argv = ["python3", "-I", "-c", textwrap.dedent(program)] if isinstance(program, str) else program
        _, fds = self.start(name, argv, **more)
        return self.finish(name, fds, keep)


class Warden:
    """A warden process below a directory of its own."""

    def __init__(self, root: Path, program: list[str] | None = None):
        self.root = root
        self.run = root / "run/agentd-warden"
        self.program = program or ["-m", "agentd.warden"]
        self.environ = os.environ | {"AGENTD_ROOT": str(root)}
        (root / "etc/agentd").mkdir(parents=True)
        (root / "shared").mkdir()
        (root / "run").mkdir(exist_ok=True)
        text = f'daemon_user = "0"\nmount_roots = ["{root}/shared"]\n'
        (root / "etc/agentd/warden.toml").write_text(text)
        self.process: subprocess.Popen[bytes] | None = None

    def up(self) -> None:
        log = open(self.root / "warden.log", "ab")
        with log:
            self.process = subprocess.Popen(
                [sys.executable, *self.program], cwd=ROOT, env=self.environ, stdout=log, stderr=log
            )
        until(self._answers, 30, lambda: (self.root / "warden.log").read_text())

    def _answers(self) -> bool:
        try:
            client = self.client()
        except OSError:
            return False
        client.close()
        return True

    def client(self) -> Client:
        return Client(self.run / "warden.sock")

    def down(self, number: int = signal.SIGTERM) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(10)

    def end(self) -> None:
        """Stop it, end everything it made, and see that nothing is left."""
        if self.process is not None and self.process.poll() is None:
            self.down()
        subprocess.run(
            [sys.executable, "-m", "agentd.warden", "end"], cwd=ROOT, env=self.environ, check=True, capture_output=True
        )

    def holder(self) -> int:
        return int((self.run / "holder").read_text().split()[0])

    def gateway(self, *command: str) -> str:
        """Run a command in the gateway's network namespace."""
        done = subprocess.run(
            ["nsenter", f"--net=/proc/{self.holder()}/ns/net", *command], capture_output=True, text=True, check=True
        )
        return done.stdout


def until(condition: Callable[[], Any], seconds: float = 10, why: Callable[[], str] = str) -> None:
    """Poll until `condition` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, why()
        time.sleep(0.01)


def kernel_objects() -> dict[str, list[str]]:
    """What agentd could leave behind on this host."""
    groups = [str(path) for path in Path("/sys/fs/cgroup").glob("**/agentd-*") if path.is_dir()]
    mounts = [line for line in Path("/proc/self/mounts").read_text().splitlines() if "agentd" in line]
    processes = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            if path.read_text().startswith("agentd-"):
                processes.append(path.parent.name)
        except OSError:
            pass
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    return {
        "groups": sorted(groups),
        "mounts": sorted(mounts),
        "processes": sorted(processes),
        "links": [line for line in links.splitlines() if "agv" in line],
    }


@pytest.fixture(scope="session")
def nothing_left() -> Iterator[None]:
    before = kernel_objects()
    yield
    until(lambda: kernel_objects() == before, 10, lambda: f"left behind: {kernel_objects()}, before: {before}")


@pytest.fixture(scope="session")
def warden(tmp_path_factory: pytest.TempPathFactory, nothing_left: None) -> Iterator[Warden]:
    found = Warden(tmp_path_factory.mktemp("warden"))
    found.up()
    yield found
    found.end()
    assert list((found.run / "sandboxes").iterdir()) == []


@pytest.fixture
def client(warden: Warden) -> Iterator[Client]:
    found = warden.client()
    yield found
    for one in found.ask("list")[0]["sandboxes"]:
        found.ask("collect", id=one["id"], epoch=one["epoch"])
    for name in os.listdir(warden.root / "var/lib/agentd-warden/workspaces"):
        found.ask("remove_workspace", id=name)
    found.close()


@pytest.fixture
def own_warden(tmp_path: Path, nothing_left: None) -> Iterator[Callable[..., Warden]]:
    """Makes wardens for one test, which may break them."""
    made: list[Warden] = []

    def make(program: list[str] | None = None) -> Warden:
        found = Warden(tmp_path / f"w{len(made)}", program) if (tmp_path / f"w{len(made)}").mkdir() is None else None
        assert found is not None
        made.append(found)
        found.up()
        return found

    yield make
    for one in made:
        one.end()
