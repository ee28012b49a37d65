"""The only thing a sandbox reaches is agentd.internal, port 80; everything else is refused at once."""

from __future__ import annotations

import socket
import subprocess
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from agentd.warden.server import skeleton_text

if TYPE_CHECKING:
    from .conftest import Client, Warden

pytestmark = pytest.mark.kernel

REACH = """
import json, socket, sys, time
def reach(host, port, kind=socket.SOCK_STREAM):
    started = time.monotonic()
    try:
        if kind == socket.SOCK_DGRAM:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            with socket.socket(family, kind) as s:
                s.settimeout(2); s.connect((host, port)); s.send(b"x"); s.recv(1)
        else:
            with socket.create_connection((host, port), timeout=2) as s: s.sendall(b"hi"); s.recv(2)
        return "open"
    except OSError as error:
        return type(error).__name__ if time.monotonic() - started < 1.5 else "slow"
print(json.dumps([reach(*target) for target in json.loads(sys.argv[1])]))
"""


def reach(client: Client, targets: list[list[object]], name: str = "probe") -> list[str]:
    import json

    found: list[str] = client.run(["python3", "-I", "-c", REACH, json.dumps(targets)], name=name).json()
    return found


@pytest.fixture
def api(client: Client) -> list[socket.socket]:
    _, fds = client.ask("listen")
    listeners = [socket.socket(fileno=fd) for fd in fds]

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            with peer:
                peer.recv(2)
                peer.sendall(b"ok")

    for listener in listeners:
        listener.setblocking(True)
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
    return listeners


def test_agentd_internal_is_reachable_over_both_protocols(client: Client, api: list[socket.socket]) -> None:
    assert reach(client, [["agentd.internal", 80], ["10.199.255.1", 80], ["fd00:a6e7::1", 80]]) == ["open"] * 3


def test_everything_else_is_refused_at_once(client: Client, api: list[socket.socket]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as host, socket.create_server(("0.0.0.0", 0)) as everywhere:
        targets: list[list[object]] = [
            ["10.199.255.1", 22],
            ["fd00:a6e7::1", 81],
            ["169.254.169.254", 80],
            ["192.0.2.1", 443],
            ["2001:db8::1", 443],
            ["127.0.0.1", host.getsockname()[1]],
            ["10.199.255.1", everywhere.getsockname()[1]],
            ["10.199.255.1", 53, socket.SOCK_DGRAM],
            ["192.0.2.53", 53, socket.SOCK_DGRAM],
            ["10.199.255.1", 80],
        ]
        found = reach(client, targets)
    assert found[-1] == "open"
    assert set(found[:-1]) <= {"ConnectionRefusedError", "PermissionError", "OSError"}, found


def test_names_fail_at_once(client: Client) -> None:
    ran = client.run("""
        import socket, time
        started = time.monotonic()
        try: socket.getaddrinfo("example.com", 443); print("resolved")
        except OSError: print("failed", time.monotonic() - started < 2)
        """)
    assert ran.out == "failed True\n"


def test_sandboxes_do_not_reach_each_other(client: Client, api: list[socket.socket]) -> None:
    status, fds = client.start(
        "server",
        [
            "python3",
            "-c",
            "import socket, time; s = socket.create_server(('0.0.0.0', 8000)); print('up', flush=True); s.accept()",
        ],
    )
    try:
        assert open(fds[0], "rb", closefd=False).readline() == b"up\n"
        assert reach(client, [[status["address4"], 8000], [status["address6"], 8000], ["10.199.255.1", 80]]) == [
            "ConnectionRefusedError"
        ] * 2 + ["open"]
    finally:
        client.ask("signal", id="server", epoch=1, signo=9)
        client.finish("server", fds)


def test_no_raw_packets_and_no_other_address(client: Client) -> None:
    ran = client.run("""
        import socket
        for make in (lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1), lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW),
                     lambda: socket.socket().bind(("10.200.0.77", 0)), lambda: open("/proc/sys/net/ipv4/ip_nonlocal_bind", "w").write("1")):
            try: make(); print("ok")
            except OSError as error: print(type(error).__name__)
        """)
    assert "ok" not in ran.out and len(ran.out.splitlines()) == 4


def test_the_printed_rules_are_the_rules_in_force(client: Client, warden: Warden) -> None:
    _, fds = client.start("shown", ["sleep", "30"])
    text = client.ask("rules", id="shown", epoch=1)[0]["text"]
    listed = warden.gateway("nft", "list", "table", "inet", "agentd")
    elements = [line.split("{ ")[1].split(" }")[0] for line in text.splitlines() if line.startswith("add element")]
    assert len(elements) == 7
    for element in elements:
        assert element.replace(" : ", " : ").replace("tcp . 80", "tcp . 80") in " ".join(listed.split()), element
    done = subprocess.run(
        ["unshare", "--net", "nft", "-c", "-f", "-"],
        input=skeleton_text() + text,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    client.ask("signal", id="shown", epoch=1, signo=9)
    client.finish("shown", fds)
    veth = text.split('"')[1]
    assert veth not in warden.gateway("nft", "list", "table", "inet", "agentd")


def test_the_hosts_own_rules_are_untouched(client: Client) -> None:
    listed = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout
    assert "agentd" not in listed


def test_without_the_rules_the_gateway_would_answer(own_warden: Callable[..., Warden]) -> None:
    """The refusals above are the rules' work: with the jump taken out, the same connection succeeds."""
    own = own_warden()
    client = own.client()
    program = "import socket; s = socket.create_server(('10.199.255.1', 81)); print('up', flush=True)\nwhile True: c, _ = s.accept(); c.recv(2); c.sendall(b'ok'); c.close()"
    server = subprocess.Popen(
        ["nsenter", f"--net=/proc/{own.holder()}/ns/net", "python3", "-c", program], stdout=subprocess.PIPE
    )
    try:
        assert server.stdout is not None and server.stdout.readline() == b"up\n"
        assert reach(client, [["10.199.255.1", 81]]) == ["ConnectionRefusedError"]
        own.gateway("nft", "flush", "chain", "inet", "agentd", "prerouting")
        own.gateway("nft", "flush", "chain", "inet", "agentd", "to_task")
        assert reach(client, [["10.199.255.1", 81]]) == ["open"]
    finally:
        server.kill()
        server.wait()
