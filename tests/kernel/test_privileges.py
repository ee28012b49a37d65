"""What a program in a sandbox may not do; and, with the filter taken away, that the same attempts get further."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .conftest import Client, Warden

pytestmark = pytest.mark.kernel

CALLS = """
import ctypes, errno, json, os, platform
libc = ctypes.CDLL(None, use_errno=True)
X86 = platform.machine() == "x86_64"
NUMBERS = dict(
    mount=165, umount2=166, pivot_root=155, chroot=161, unshare=272, setns=308, ptrace=101, process_vm_readv=310, bpf=321,
    perf_event_open=298, userfaultfd=323, io_uring_setup=425, keyctl=250, add_key=248, request_key=249, open_by_handle_at=304,
    name_to_handle_at=303, kexec_load=246, init_module=175, swapon=167, acct=163, quotactl=179, reboot=169, fsopen=430,
    open_tree=428, move_mount=429, mount_setattr=442, pidfd_getfd=438, kcmp=312, clone3=435, unknown=599, syslog=103, settimeofday=164,
) if X86 else {}
def call(name, *arguments):
    ctypes.set_errno(0)
    result = libc.syscall(NUMBERS[name], *arguments)
    return "ok" if result >= 0 else errno.errorcode[ctypes.get_errno()]
found = {name: call(name, 0, 0, 0, 0, 0, 0) for name in NUMBERS if name != "unshare"}
for name, flag in dict(user=0x10000000, mnt=0x20000, net=0x40000000, pid=0x20000000, ipc=0x8000000, uts=0x4000000, cgroup=0x2000000, time=0x80).items():
    found["unshare " + name] = call("unshare", flag) if X86 else "EPERM"
print(json.dumps(found))
"""

x86 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="the raw numbers are x86_64's")


def test_no_capability_no_new_privileges_and_the_filter_is_on(client: Client) -> None:
    ran = client.run(["cat", "/proc/self/status"])
    status = dict(line.split(":\t", 1) for line in ran.out.splitlines() if ":\t" in line)
    assert {int(status[key], 16) for key in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert (status["NoNewPrivs"], status["Seccomp"], status["Seccomp_filters"]) == ("1", "2", "2")


@x86
def test_every_dangerous_call_is_refused(client: Client) -> None:
    found = client.run(CALLS).json()
    wrong = {name: what for name, what in found.items() if what not in ("EPERM", "ENOSYS")}
    assert wrong == {}
    assert found["clone3"] == found["io_uring_setup"] == found["unknown"] == "ENOSYS"


UNFILTERED = """
import sys
from agentd.warden import seccomp
seccomp.programs = lambda: []
from agentd.warden.__main__ import main
sys.exit(main())
"""


@x86
def test_without_the_filter_the_same_calls_reach_the_kernel(own_warden: Callable[..., Warden]) -> None:
    found = own_warden(["-c", UNFILTERED]).client().run(CALLS).json()
    reached = {name for name, what in found.items() if what not in ("EPERM", "ENOSYS")}
    assert {"keyctl", "ptrace", "process_vm_readv", "clone3", "fsopen", "name_to_handle_at"} & reached
    assert len(reached) >= 4, found


SOCKETS = """
import ctypes, errno, json, socket
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.argtypes = [ctypes.c_long] * 4
def family(number, kind=socket.SOCK_STREAM, protocol=0):
    ctypes.set_errno(0)
    fd = libc.syscall(41, number, kind, protocol)
    return "ok" if fd >= 0 else errno.errorcode[ctypes.get_errno()]
print(json.dumps({
    "unix": family(1), "inet": family(2), "inet6": family(10), "netlink": family(16, socket.SOCK_RAW),
    "packet": family(17, socket.SOCK_RAW), "vsock": family(40), "alg": family(38, socket.SOCK_SEQPACKET), "key": family(15, socket.SOCK_RAW),
    "vsock with high bits": family((1 << 32) | 40), "unix with high bits": family((1 << 32) | 1),
    "sctp": family(2, socket.SOCK_STREAM, 132), "udplite": family(2, socket.SOCK_DGRAM, 136), "udplite with high bits": family(2, socket.SOCK_DGRAM, (1 << 32) | 136),
    "raw": family(2, socket.SOCK_RAW, 1),
}))
"""


@x86
def test_only_the_usual_socket_families_exist(client: Client) -> None:
    found = client.run(SOCKETS).json()
    assert [found[name] for name in ("unix", "inet", "inet6", "netlink")] == ["ok"] * 4
    assert {found[name] for name in ("packet", "vsock", "alg", "key", "vsock with high bits")} == {"EAFNOSUPPORT"}
    assert {found[name] for name in ("sctp", "udplite", "udplite with high bits")} == {"EPROTONOSUPPORT"}
    assert found["raw"] == "EPERM"


@x86
def test_without_the_filter_a_tunnel_protocol_is_reachable(own_warden: Callable[..., Warden]) -> None:
    found = own_warden(["-c", UNFILTERED]).client().run(SOCKETS).json()
    assert "ok" in {found[name] for name in ("udplite", "alg", "vsock", "unix with high bits")}, found


TERMINAL = """
import ctypes, errno, json, os, pty
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.argtypes = [ctypes.c_long] * 4
master, slave = pty.openpty()
def inject(request):
    byte = ctypes.create_string_buffer(b"x")
    ctypes.set_errno(0)
    return "ok" if libc.syscall(16, slave, request, ctypes.addressof(byte)) >= 0 else errno.errorcode[ctypes.get_errno()]
size = ctypes.create_string_buffer(8)
print(json.dumps([inject(0x5412), inject((1 << 32) | 0x5412), inject(0x541C), libc.syscall(16, slave, 0x5413, ctypes.addressof(size))]))
"""


@x86
def test_no_terminal_injection_also_with_high_bits(client: Client) -> None:
    assert client.run(TERMINAL).json() == ["EPERM", "EPERM", "EPERM", 0]


@x86
def test_foreign_architecture_calls_kill(client: Client) -> None:
    ran = client.run("""
        import ctypes, mmap
        page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        page.write(bytes([0xB8, 20, 0, 0, 0, 0xCD, 0x80, 0xC3]))  # mov eax, getpid; int 0x80; ret
        print("before", flush=True)
        ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
        print("after")
        """)
    assert ran.out == "before\n" and ran.exit["signal"] == 31


def test_threads_and_processes_work_although_clone3_does_not(client: Client) -> None:
    ran = client.run("""
        import os, subprocess, threading
        done = []
        threads = [threading.Thread(target=done.append, args=(i,)) for i in range(20)]
        [t.start() for t in threads]; [t.join() for t in threads]
        print(len(done), subprocess.run(["echo", "hi"], capture_output=True, text=True).stdout.strip(), os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)[1])
        """)
    assert ran.out == "20 hi 0\n"


def test_pid_1_cannot_be_signalled_traced_or_read(client: Client) -> None:
    found = client.run("""
        import json, os
        def attempt(do):
            try: do()
            except OSError as error: return type(error).__name__
            return "ok"
        print(json.dumps({
            "kill": attempt(lambda: os.kill(1, 9)), "environ": attempt(lambda: open("/proc/1/environ").read()), "fds": attempt(lambda: os.listdir("/proc/1/fd")),
            "mem": attempt(lambda: open("/proc/1/mem", "rb")), "root": attempt(lambda: os.listdir("/proc/1/root")), "ns": attempt(lambda: os.readlink("/proc/1/ns/mnt")),
            "own": attempt(lambda: open("/proc/self/environ").read())}))
        """).json()
    assert found.pop("own") == "ok"
    assert set(found.values()) == {"PermissionError"}, found


def test_nothing_of_the_host_is_visible_in_proc(client: Client) -> None:
    marker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "host-marker-process"])
    try:
        found = client.run("""
            import json, os
            lines = [open(f"/proc/{p}/cmdline").read() for p in os.listdir("/proc") if p.isdigit()]
            print(json.dumps([lines, os.listdir("/proc/self/fd"), open("/proc/1/comm").read()]))
            """).json()
    finally:
        marker.kill()
        marker.wait()
    lines, fds, init = found
    assert len(lines) == 2 and init == "agentd-init\n"
    assert not [line for line in lines if "host-marker" in line or "zygote.py" in line or os.getcwd() in line]
    assert set(fds) <= {"0", "1", "2", "3"}  # 3: the directory being listed


def test_the_kernels_settings_cannot_be_written(client: Client) -> None:
    found = client.run("""
        import json
        def write(path):
            try: open(path, "w").write("1")
            except OSError as error: return type(error).__name__
            return "ok"
        print(json.dumps([write(p) for p in ("/proc/sys/kernel/hostname", "/proc/sys/net/ipv4/ip_forward", "/proc/sysrq-trigger", "/proc/self/oom_score_adj")]))
        """).json()
    assert "ok" not in found[:3] and found[3] == "ok"


def test_the_oom_score_is_fixed(client: Client) -> None:
    """Only who holds CAP_SYS_RESOURCE sets the floor; a host that denies it to root keeps the floor it was given."""
    capabilities = int(next(line for line in open("/proc/self/status") if line.startswith("CapEff")).split()[1], 16)
    lowered = client.run(
        "print(open('/proc/self/oom_score_adj').read().strip()); open('/proc/self/oom_score_adj', 'w').write('-1')"
    )
    assert lowered.out == "500\n"
    if capabilities >> 24 & 1:
        assert lowered.code == 1 and "PermissionError" in lowered.err
    assert client.run("open('/proc/self/oom_score_adj', 'w').write('600')").code == 0


def test_no_device_can_be_made_and_setuid_gains_nothing(client: Client) -> None:
    ran = client.run("""
        import os, stat
        try: os.mknod("/workspace/sda", stat.S_IFBLK | 0o666, os.makedev(8, 0))
        except OSError as error: print(type(error).__name__)
        os.mkfifo("/workspace/fifo")
        """)
    assert ran.code == 0 and ran.out == "PermissionError\n"
    ran = client.run(
        [
            "sh",
            "-c",
            "for f in /usr/bin/su /usr/bin/mount /usr/bin/passwd; do test -u $f && echo setuid; done; mount -t tmpfs x /mnt; su -c id",
        ]
    )
    assert "uid=0" not in ran.out and ran.code != 0


@pytest.mark.parametrize("what", ["user", "mount", "network"])
def test_no_namespace_below(client: Client, what: str) -> None:
    assert client.run(["unshare", f"--{what}" if what != "network" else "--net", "true"]).code != 0


def test_the_session_keyring_is_not_the_hosts(own_warden: Callable[..., Any]) -> None:
    read = "import ctypes; libc = ctypes.CDLL(None); print(libc.syscall(250, 0, -3, 0))"  # keyctl(KEYCTL_GET_KEYRING_ID, session)
    host = subprocess.run([sys.executable, "-c", read], capture_output=True, text=True, check=True).stdout
    client = own_warden(["-c", UNFILTERED]).client()
    first, second = client.run(read, name="one").out, client.run(read, name="two").out
    assert len({host, first, second}) == 3
