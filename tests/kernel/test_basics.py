"""A program runs in a sandbox and everything about it is as promised."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .conftest import Client, Warden

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("code", [0, 1, 42, 127, 255])
def test_the_exit_code_comes_back(client: Client, code: int) -> None:
    assert client.run(["sh", "-c", f"exit {code}"]).code == code


def test_a_signal_comes_back(client: Client) -> None:
    ran = client.run("import os; os.kill(os.getpid(), 11)")
    assert (ran.code, ran.exit["signal"], ran.exit["oom"]) == (None, 11, False)


def test_output_is_complete_to_the_last_byte(client: Client) -> None:
    ran = client.run("""
        import sys
        sys.stdout.write("o" * 1_000_000); sys.stderr.write("e" * 1_000_000); sys.stdout.write("END")
        """)
    assert ran.out == "o" * 1_000_000 + "END" and ran.err == "e" * 1_000_000


def test_identity_environment_and_place_are_as_given(client: Client) -> None:
    found = client.run(
        """
        import json, os, sys
        print(json.dumps([os.getresuid(), os.getresgid(), os.getgroups(), dict(os.environ), os.getcwd(), sys.stdin.read(),
                          os.uname().nodename, sorted(os.listdir("/proc/self/fd"))[:3], os.getpid() < 10]))
        """,
        env={"A": "ä b"},
    ).json()
    uids, gids, groups, environ, cwd, stdin, name, fds, young = found
    assert uids == gids == [1000] * 3 and groups in ([], [1000])
    assert environ.pop("LC_CTYPE", "C.UTF-8") == "C.UTF-8"
    assert environ == {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/workspace", "A": "ä b"}
    assert (cwd, stdin, name, young) == ("/workspace", "", "probe", True) and fds == ["0", "1", "2"]


def test_all_eight_namespaces_are_its_own(client: Client) -> None:
    names = ("user", "pid", "mnt", "net", "ipc", "uts", "cgroup", "time")
    found = client.run(
        f"import os, json; print(json.dumps([os.readlink('/proc/self/ns/' + n) for n in {names}]))"
    ).json()
    host = [os.readlink(f"/proc/self/ns/{name}") for name in names]
    assert all(inside != outside for inside, outside in zip(found, host, strict=True))


def test_background_processes_end_with_the_main_one_and_their_output_is_kept(client: Client, warden: Warden) -> None:
    ran = client.run(["sh", "-c", "(while :; do echo tick; sleep 0.01; done) & sleep 0.3; echo main"])
    assert ran.code == 0 and "tick" in ran.out and "main" in ran.out
    assert os.listdir(warden.run / "sandboxes") == []


def test_orphans_are_reaped(client: Client) -> None:
    ran = client.run("""
        import os, subprocess, time
        for _ in range(20): subprocess.run(["sh", "-c", "true & exit"])
        deadline = time.monotonic() + 5
        def zombie(p):
            try: return ") Z" in open(f"/proc/{p}/stat").read()
            except OSError: return False  # reaped since it was listed
        def zombies(): return [p for p in os.listdir("/proc") if p.isdigit() and zombie(p)]
        while zombies() and time.monotonic() < deadline: pass
        print(len(zombies()))
        """)
    assert ran.out.strip() == "0"


def test_a_program_that_is_not_there_is_named_and_nothing_is_left(client: Client, warden: Warden) -> None:
    with pytest.raises(Exception, match="no program 'no-such-thing' on PATH"):
        client.run(["no-such-thing"])
    assert client.ask("list")[0]["sandboxes"] == [] and os.listdir(warden.run / "sandboxes") == []
    assert client.run(["true"]).code == 0


def test_ten_at_once_share_neither_ids_nor_addresses(client: Client) -> None:
    started = {
        f"many{i}": client.start(f"many{i}", ["sh", "-c", "stat -c %u /workspace; cat /proc/self/uid_map; sleep 0.2"])
        for i in range(10)
    }
    ran = {name: client.finish(name, fds) for name, (_, fds) in started.items()}
    assert len({status["address4"] for status, _ in started.values()}) == 10
    assert all(one.out.splitlines()[0] == "1000" for one in ran.values())
    bases = {int(one.out.splitlines()[1].split()[1]) for one in ran.values()}
    assert len(bases) == 10 and all(base >= 0x70000000 and base % 65536 == 0 for base in bases)


def test_usage_is_counted(client: Client) -> None:
    ran = client.run("""
        import socket, time
        data = bytearray(50 << 20)
        for i in range(0, len(data), 4096): data[i] = 1
        end = time.process_time() + 0.3
        while time.process_time() < end: pass
        try: socket.create_connection(("10.199.255.1", 22), timeout=2)
        except OSError: pass
        """)
    usage = ran.status["usage"]
    assert 0.3 <= usage["cpu_s"] < 3 and usage["memory_peak_bytes"] > 50 << 20
    assert usage["net_tx_bytes"] > 0 and usage["denied_packets"] >= 1


def test_an_agent_can_really_work_here(client: Client) -> None:
    ran = client.run(
        """
        import multiprocessing, os, pty, socket, sqlite3, subprocess, sys, tempfile, threading
        from multiprocessing import shared_memory
        def square(x): return x * x
        if __name__ == "__main__":
            with multiprocessing.get_context("fork").Pool(2) as pool: assert pool.map(square, [1, 2, 3]) == [1, 4, 9]
            done = []
            threads = [threading.Thread(target=lambda: done.append(1)) for _ in range(8)]
            [t.start() for t in threads]; [t.join() for t in threads]
            assert len(done) == 8
            block = shared_memory.SharedMemory(create=True, size=4096); block.close(); block.unlink()
            db = sqlite3.connect("/workspace/x.db"); db.execute("create table t (a)"); db.commit()
            a, b = socket.socketpair(); a.send(b"x"); assert b.recv(1) == b"x"
            server = socket.socket(socket.AF_UNIX); server.bind("/tmp/s"); server.listen()
            client = socket.socket(socket.AF_UNIX); client.connect("/tmp/s")
            master, slave = pty.openpty(); os.write(slave, b"hi"); assert os.read(master, 2) == b"hi"
            assert subprocess.run(["sh", "-c", "echo $((6*7))"], capture_output=True).stdout == b"42\\n"
            with tempfile.TemporaryDirectory() as d:
                for i in range(2000): open(f"{d}/{i}", "w").close()
            local = socket.create_server(("127.0.0.1", 0))
            socket.create_connection(local.getsockname()).close()
            open("/dev/null", "w").write("x"); assert len(open("/dev/urandom", "rb").read(8)) == 8
            print("works")
        """,
        pids=64,
    )
    assert ran.out.strip() == "works", ran.err
