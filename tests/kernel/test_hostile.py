"""The warden takes the daemon for hostile: whatever arrives gets a reason or a closed connection, and the warden goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from .conftest import Client, Warden

pytestmark = pytest.mark.kernel

few = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

OPS = [
    "hello",
    "listen",
    "workspace",
    "put",
    "remove_workspace",
    "start",
    "list",
    "attach",
    "status",
    "signal",
    "collect",
    "rules",
    "rm -rf",
    "",
]
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=True)
    | st.text(max_size=20)
    | st.sampled_from(["../..", "/etc", "a/../b", "\0", "x" * 5000]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident(pid: int) -> int:
    return next(
        int(line.split()[1])
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("VmRSS")
    )


@pytest.fixture(autouse=True)
def unharmed(warden: Warden, client: Client) -> Any:
    assert warden.process is not None
    pid = warden.process.pid
    client.run(["true"])  # so that the zygote is up before counting
    for fd in client.ask("listen")[1]:  # and the listening sockets, which it keeps
        os.close(fd)
    before = descriptors(pid), resident(pid)
    yield
    assert warden.process.poll() is None and warden.process.pid == pid
    assert client.run(["sh", "-c", "exit 3"]).code == 3
    assert descriptors(pid) <= before[0] + 1
    assert resident(pid) < before[1] + 20_000


@few
@given(packet=st.binary(min_size=1, max_size=300), count=st.integers(0, 8))
def test_bytes(warden: Warden, packet: bytes, count: int) -> None:
    client = warden.client()
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(count)]
    try:
        client.raw(packet, fds)
        answer, _ = client.answer()
        assert "error" in answer
    finally:
        client.close()
        for fd in fds:
            os.close(fd)


@few
@given(
    op=st.sampled_from(OPS),
    fields=st.dictionaries(st.sampled_from(["id", "epoch", "spec", "path", "mode", "signo", "x"]), json_values),
)
def test_wrong_fields(warden: Warden, op: str, fields: dict[str, Any]) -> None:
    client = warden.client()
    try:
        client.raw(json.dumps({"seq": 1, "op": op, **fields}).encode())
        answer, fds = client.answer()
        for fd in fds:
            os.close(fd)
        assert "error" in answer or answer["ok"]
        if op in ("rm -rf", "") or "x" in fields:
            assert "error" in answer
        if answer.get("ok") and op == "workspace":
            client.ask("remove_workspace", id=fields["id"])
    finally:
        client.close()


@few
@given(
    change=st.dictionaries(
        st.sampled_from(
            ["id", "epoch", "tenant", "argv", "env", "cwd", "limits", "mounts", "cpu_weight", "filters", "id_base"]
        ),
        json_values,
        min_size=1,
    )
)
def test_wrong_specs(warden: Warden, change: dict[str, Any]) -> None:
    client = warden.client()
    try:
        client.ask("workspace", id="fuzz")
        spec = client.spec("fuzz", ["true"]) | change
        client.raw(json.dumps({"seq": 7, "op": "start", "spec": spec}).encode())
        answer, fds = client.answer()
        for fd in fds:
            os.close(fd)
        if "ok" in answer:
            client.ask("collect", id=spec["id"], epoch=spec["epoch"])
        else:
            assert answer["error"]["message"]
    finally:
        client.close()


@pytest.mark.parametrize(
    "packet",
    [
        b'{"a":' * 30_000,
        b"[" * 150_000,
        b'{"seq":1,"op":"hello"',
        b"x" * 170_000,
        b'{"seq":1,"op":"start","spec":{"env":{"A":"' + b"y" * 190_000 + b'"}}}',
    ],
)
def test_deep_truncated_and_oversized_packets(warden: Warden, packet: bytes) -> None:
    client = warden.client()
    client.raw(packet)
    answer, _ = client.answer()
    assert answer["error"]["code"] in ("invalid_json", "too_large")
    client.close()


def test_a_burst_of_requests_is_answered_in_full(warden: Warden) -> None:
    client = warden.client()
    for _ in range(3000):
        client.ask("hello")
    client.close()


def test_connections_are_bounded_and_freed(warden: Warden) -> None:
    from .conftest import until

    many = []
    refused = 0
    for _ in range(60):
        try:
            many.append(warden.client())
            many[-1].ask("hello")
        except OSError:  # closed by the warden, or its backlog is full
            refused += 1
    assert refused > 0
    for one in many:
        one.close()

    def served() -> bool:
        try:
            last = warden.client()
            found = bool(last.ask("hello")[0]["ok"])
            last.close()
        except OSError:
            return False
        return found

    until(served)


def test_a_peer_that_does_not_read_is_dropped_and_others_are_served(warden: Warden) -> None:
    deaf = warden.client()
    deaf._socket.setblocking(False)
    try:
        for _ in range(5000):
            deaf.raw(b'{"seq":1,"op":"hello"}')
    except OSError:
        pass
    other = warden.client()
    assert other.ask("hello")[0]["ok"]
    other.close()
    deaf.close()


def test_another_users_connection_is_closed(warden: Warden) -> None:
    for path in (warden.root, *warden.root.parents):
        if path.owner() == "root" and not path.stat().st_mode & 1:
            path.chmod(path.stat().st_mode | 0o011)
    program = 'import socket, sys; s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.connect(sys.argv[1]); s.settimeout(5)\ntry: s.send(b\'{"seq":1,"op":"hello"}\'); print(len(s.recv(1000)))\nexcept OSError as e: print(type(e).__name__)'
    call = ["/usr/bin/python3", "-c", program, str(warden.run / "warden.sock")]
    stranger = subprocess.run(
        ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups", *call],
        capture_output=True,
        text=True,
        check=False,
    )
    assert stranger.stdout.strip() in ("0", "ConnectionResetError", "BrokenPipeError"), (
        stranger.stdout + stranger.stderr
    )
    mine = subprocess.run([sys.executable, *call[1:]], capture_output=True, text=True, check=True)
    assert int(mine.stdout) > 100
