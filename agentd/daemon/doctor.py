"""`agentctl doctor`: whether this host can do what agentd promises, proved by doing it.

A probe sandbox runs a small program that tries what must work and what must fail, and reports. The daemon runs the same at start and lets no
task start while it fails.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
from typing import Any

import msgspec

from agentd.core import wire
from agentd.core.addresses import AGENT_API_PORT, GATEWAY4, INTERNAL_NAME
from agentd.core.errors import AgentdError, NotFound
from agentd.isolation.client import WardenClient

PROBE = "agentd-probe"
PROBE_S = 60.0
LEAST_KERNEL = (5, 15)
"""cgroup.kill is 5.14, mount_setattr 5.12, detached mounts and clone3 into a cgroup 5.7."""

PROGRAM = f"""
import ctypes, errno, json, os, socket
found = {{}}
def note(name, ok, detail=""): found[name] = [bool(ok), str(detail)]
status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines() if ":" in line)
note("uid", os.getuid() == 1000 and os.getgid() == 1000, f"uid {{os.getuid()}}")
note("capabilities", all(int(status[key], 16) == 0 for key in ("CapPrm", "CapEff", "CapBnd", "CapAmb")), status["CapBnd"].strip())
note("no_new_privs", status["NoNewPrivs"].strip() == "1")
note("seccomp", status["Seccomp"].strip() == "2")
libc = ctypes.CDLL(None, use_errno=True)
refused = lambda result: (result == -1 and ctypes.get_errno() in (errno.EPERM, errno.ENOSYS), os.strerror(ctypes.get_errno()))
note("no new namespaces", *refused(libc.unshare(0x10000000)))
note("no mounts", *refused(libc.mount(b"none", b"/mnt", b"tmpfs", 0, None)))
pids = [name for name in os.listdir("/proc") if name.isdigit()]
note("processes hidden", len(pids) <= 3, f"{{len(pids)}} visible")
def writable(path):
    try:
        open(path + "/x", "w").close()
        return True
    except OSError:
        return False
note("host read-only", not any(writable(path) for path in ("/usr", "/etc", "/", "/proc/sys/kernel", "/dev")))
note("workspace writable", writable("/workspace"))
def reach(host, port):
    try:
        socket.create_connection((host, port), timeout=3).close()
        return "open"
    except OSError as error:
        return type(error).__name__
api = reach("{INTERNAL_NAME}", {AGENT_API_PORT})
note("agentd reachable", api == "open", api)
nothing = reach("192.0.2.1", 443)
note("nothing else reachable", nothing == reach("{GATEWAY4}", 22) == "ConnectionRefusedError", nothing)
try:
    hog = bytearray(256 << 20)
    for i in range(0, len(hog), 4096): hog[i] = 1
    note("memory limit", False, "256M allocated under a limit of 96M")
except MemoryError:
    note("memory limit", True)
print(json.dumps(found), flush=True)
"""
# The memory check is last: where the limit works the kernel ends the program there, so what was found is printed before it.
PROGRAM = PROGRAM.replace("try:\n    hog", "print(json.dumps(found), flush=True)\ntry:\n    hog", 1)

REMEDIES = {
    "agentd reachable": "nothing listens on agentd.internal: see journalctl -u agentd",
    "nothing else reachable": "the network rules are not in force: systemctl restart agentd-warden",
    "memory limit": "the memory controller does not limit: see /proc/cgroups, boot with cgroup_enable=memory",
    "seccomp": "the kernel needs CONFIG_SECCOMP_FILTER",
}


class Check(msgspec.Struct, frozen=True):
    """One thing that was tried."""

    name: str
    ok: bool
    detail: str = ""
    remedy: str = ""


async def probe(warden: WardenClient) -> list[Check]:
    """Run the probe and say what it found."""
    spec = wire.SandboxSpec(
        id=PROBE,
        epoch=1,
        tenant=PROBE,
        argv=("python3", "-I", "-S", "-c", PROGRAM),
        env={"PATH": "/usr/bin:/bin", "HOME": "/workspace", "LANG": "C.UTF-8"},
        cwd="/workspace",
        limits=wire.Limits(96 << 20, 1.0, 16),
    )
    try:
        await _clean(warden)
        await warden.make_workspace(PROBE)
        _, pipes = await warden.start(spec)
    except AgentdError as error:
        return [
            Check(
                "a sandbox starts",
                False,
                error.message,
                error.hint or "see journalctl -u agentd-warden; in a container try scripts/quickstart --vm",
            )
        ]
    try:
        texts = await asyncio.gather(*(asyncio.to_thread(_read_all, fd) for fd in pipes))
        status = await warden.status(PROBE, 1)
        for _ in range(200):
            if status.exit is not None:
                break
            await asyncio.sleep(0.02)
            status = await warden.status(PROBE, 1)
    finally:
        await _clean(warden)
    return _judge(texts[0], texts[1], status)


def _judge(out: str, err: str, status: wire.SandboxStatus) -> list[Check]:
    lines = out.strip().splitlines()
    if not lines:
        return [
            Check("the probe runs", False, f"it printed nothing; {err.strip()[-300:]}", "python3 must be in /usr/bin")
        ]
    checks = [Check("a sandbox starts", True, f"exit {status.exit}")]
    found = json.loads(lines[0])
    if len(lines) > 1:
        found |= {key: value for key, value in json.loads(lines[-1]).items() if key == "memory limit"}
    else:
        ended = status.exit is not None and (status.exit.signal == 9 or status.exit.oom)
        found["memory limit"] = [
            ended,
            "the kernel ended a program that took 256M under a limit of 96M" if ended else err.strip()[-200:],
        ]
    for name, (good, detail) in found.items():
        checks.append(
            Check(
                name,
                good,
                detail,
                "" if good else REMEDIES.get(name, "report this: the sandbox is weaker than it should be"),
            )
        )
    counted = status.usage.memory_peak_bytes > 0 and status.usage.cpu_s > 0
    checks.append(
        Check(
            "usage is counted",
            counted,
            f"cpu {status.usage.cpu_s:.3f} s, memory peak {status.usage.memory_peak_bytes}, denied packets {status.usage.denied_packets}",
        )
    )
    return checks


def _read_all(fd: int) -> str:
    with os.fdopen(fd, "rb") as file:
        return file.read(1 << 20).decode(errors="replace")


async def _clean(warden: WardenClient) -> None:
    for epoch in {1} | {epoch for name, epoch in (await warden.list()).items() if name == PROBE}:
        try:
            await warden.collect(PROBE, epoch)
        except NotFound:
            pass
    await warden.remove_workspace(PROBE)


def host_checks(hello: dict[str, Any], connected: bool) -> list[Check]:
    """What can be seen without trying."""
    release = platform.release()
    version = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdigit())
    checks = [
        Check(
            "kernel",
            version >= LEAST_KERNEL,
            release,
            "" if version >= LEAST_KERNEL else f"agentd needs Linux {LEAST_KERNEL[0]}.{LEAST_KERNEL[1]}",
        ),
        Check(
            "warden",
            connected,
            f"pid {hello.get('pid')}" if connected else "not connected",
            "" if connected else "systemctl status agentd-warden",
        ),
    ]
    for problem in hello.get("problems", []):
        checks.append(Check("host", False, problem["message"], problem["hint"]))
    return checks


async def examine(warden: WardenClient, hello: dict[str, Any]) -> list[Check]:
    """Everything; the probe only where the warden answers."""
    checks = host_checks(hello, warden.connected)
    if all(check.ok for check in checks):
        try:
            async with asyncio.timeout(PROBE_S):
                checks += await probe(warden)
        except TimeoutError:
            checks.append(
                Check("the probe ends", False, f"not within {PROBE_S:.0f} s", "see journalctl -u agentd-warden")
            )
        except AgentdError as error:
            checks.append(
                Check("the probe runs", False, error.message, error.hint or "see journalctl -u agentd-warden")
            )
    return checks
