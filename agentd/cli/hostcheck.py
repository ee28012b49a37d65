"""Whether this host can run sandboxes, found out without the daemon.

Each check is a function of the root directory to look below (`/`; a test has others) that returns a
`Check`. What can only be learned by trying is tried in a child process, so that nothing stays behind: no
namespace, no cgroup, no rule. The daemon's own `GET /v1/doctor` knows more; this is for the moment at which
there is no daemon yet.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

KERNEL_MIN = (5, 15)
CONTROLLERS = ("cpu", "memory", "pids")
ELSEWHERE = "this host cannot sandbox at all: `sudo ./scripts/quickstart --vm` runs agentd in a virtual machine on it"

# Runs in a fresh interpreter: libc is called from there, since os.unshare came with Python 3.12, and a
# namespace once left cannot be entered again. System call 444 is
# landlock_create_ruleset(NULL, 0, LANDLOCK_CREATE_RULESET_VERSION), landlock(7).
_PROBE = r"""
import ctypes, json, os
libc = ctypes.CDLL(None, use_errno=True)
found = {"namespaces": {}}
flags = {"mount": 0x20000, "cgroup": 0x2000000, "uts": 0x4000000, "ipc": 0x8000000, "user": 0x10000000,
         "pid": 0x20000000, "net": 0x40000000, "time": 0x80}
inside_user = 0 if os.geteuid() == 0 else flags["user"]
for name, flag in flags.items():
    child = os.fork()
    if child == 0:
        os._exit(ctypes.get_errno() & 255 if libc.unshare(ctypes.c_int(flag | inside_user)) else 0)
    found["namespaces"][name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
version = libc.syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
found["landlock"] = version if version > 0 else 0
try:
    ctypes.CDLL("libseccomp.so.2")
    found["libseccomp"] = True
except OSError:
    found["libseccomp"] = False
print(json.dumps(found))
"""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at. `detail` is what was found, `remedy` how to get what is missing."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""
    required: bool = True


def report(root: Path = Path("/")) -> dict[str, Any]:
    """All checks, in the shape of the daemon's answer; `advice` where the host is of no use."""
    probe = probed()
    checks = [
        linux(),
        kernel(),
        privileges(),
        cgroups(root),
        cgroup_lifecycle(root),
        user_namespaces(root),
        namespaces(probe),
        nftables(),
        seccomp(root),
        libseccomp(probe),
        overlayfs(root),
        landlock(probe),
        service_manager(root),
    ]
    ok = all(check.ok for check in checks if check.required)
    found: dict[str, Any] = {
        "ok": ok,
        "checks": [asdict(check) for check in checks],
        "facts": {},
        "source": "agentctl",
    }
    hopeless = {"Linux", "kernel", "cgroups", "cgroup.kill", "namespaces", "seccomp"}
    if any(not check.ok and check.name in hopeless for check in checks if check.required):
        found["advice"] = ELSEWHERE
    return found


def probed() -> dict[str, Any]:
    """What the probe found out; empty where it cannot run."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _PROBE],
            check=False,
            capture_output=True,
            timeout=20,
            stdin=subprocess.DEVNULL,
        )
        found = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return {}
    return found if isinstance(found, dict) else {}


def linux() -> Check:
    """Another kernel has none of what follows."""
    return Check(
        "Linux",
        sys.platform == "linux",
        platform.system(),
        "run agentd on Linux, or in a virtual machine that does",
    )


def kernel(release: str | None = None) -> Check:
    """cgroup.kill came with 5.14, idmapped mounts with 5.12, Landlock with 5.13; 5.15 is long-term."""
    release = platform.release() if release is None else release
    found = re.match(r"(\d+)\.(\d+)", release)
    ok = found is not None and (int(found[1]), int(found[2])) >= KERNEL_MIN
    wanted = ".".join(map(str, KERNEL_MIN))
    return Check("kernel", ok, release, f"install a kernel {wanted} or later (cgroup.kill, idmapped mounts, Landlock)")


def privileges() -> Check:
    """The warden is root; who asks here need not be, but sees less."""
    root = os.geteuid() == 0
    return Check(
        "privileges",
        root,
        "root" if root else f"uid {os.geteuid()}",
        "`sudo agentctl doctor` can try more",
        required=False,
    )


def _mounts(root: Path) -> list[tuple[str, str, str]]:
    """Mount point, type and options of every mount."""
    try:
        text = (root / "proc/self/mounts").read_text()
    except OSError:
        return []
    rows = [line.split(" ") for line in text.splitlines()]
    return [(row[1], row[2], row[3]) for row in rows if len(row) > 3]


def _unified(root: Path) -> Path | None:
    """Where cgroup v2 is mounted."""
    point = next((where for where, kind, _ in _mounts(root) if kind == "cgroup2"), None)
    return root / point.lstrip("/") if point else None


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def cgroups(root: Path = Path("/")) -> Check:
    """cpu, memory and pids, on v2 or, on a hybrid host, on v1 beside it."""
    remedy = "boot with systemd.unified_cgroup_hierarchy=1, or mount cgroup2 with cpu, memory and pids"
    unified = _unified(root)
    if unified is None:
        return Check("cgroups", False, "cgroup v2 is not mounted", remedy)
    on_v2 = set(_words(unified / "cgroup.controllers"))
    on_v1 = {
        name
        for _, kind, options in _mounts(root)
        if kind == "cgroup"
        for name in options.split(",")
        if name in CONTROLLERS
    }
    missing = [name for name in CONTROLLERS if name not in on_v2 | on_v1]
    if missing:
        return Check("cgroups", False, f"no controller {', '.join(missing)}", remedy)
    used_v1 = [name for name in CONTROLLERS if name not in on_v2]
    if used_v1:
        return Check("cgroups", True, f"hybrid: {', '.join(used_v1)} on v1")
    return Check("cgroups", True, f"unified: {', '.join(CONTROLLERS)}")


def cgroup_lifecycle(root: Path = Path("/")) -> Check:
    """A cgroup can be made, and has `cgroup.kill` and `cgroup.freeze` (which the topmost one lacks)."""
    name = "cgroup.kill"
    unified = _unified(root)
    if unified is None:
        return Check(name, False, "cgroup v2 is not mounted", "mount -t cgroup2 none /sys/fs/cgroup/unified")
    if os.geteuid() == 0:
        tried = unified / f"agentd-doctor-{os.getpid()}"
        try:
            tried.mkdir()
        except OSError as error:
            return Check(
                name,
                False,
                f"no cgroup can be made: {error.strerror}",
                "give this container a writable cgroup tree",
            )
        try:
            return _lifecycle_of(tried)
        finally:
            tried.rmdir()
    try:
        below = next((path for path in unified.iterdir() if path.is_dir()), None)
    except OSError:
        below = None
    if below is None:
        return Check(name, False, "no cgroup to look at", "sudo agentctl doctor", required=False)
    return _lifecycle_of(below)


def _lifecycle_of(cgroup: Path) -> Check:
    missing = [file for file in ("cgroup.kill", "cgroup.freeze") if not (cgroup / file).exists()]
    if missing:
        return Check("cgroup.kill", False, f"no {' and no '.join(missing)}", "install a kernel 5.15 or later")
    return Check("cgroup.kill", True, "cgroup.kill and cgroup.freeze")


def _number(path: Path) -> int | None:
    words = _words(path)
    return int(words[0]) if words and words[0].isdigit() else None


def user_namespaces(root: Path = Path("/")) -> Check:
    """`user.max_user_namespaces` above 0; what concerns only unprivileged users does not count."""
    name = "user namespaces"
    most = _number(root / "proc/sys/user/max_user_namespaces")
    if most is None:
        return Check(name, False, "the kernel has none", "install a kernel with CONFIG_USER_NS")
    if most == 0:
        return Check(name, False, "user.max_user_namespaces is 0", "sysctl -w user.max_user_namespaces=15000")
    remarks = []
    if _number(root / "proc/sys/kernel/apparmor_restrict_unprivileged_userns") == 1:
        remarks.append("AppArmor restricts them to root, which is enough")
    if _number(root / "proc/sys/kernel/unprivileged_userns_clone") == 0:
        remarks.append("only root may make them, which is enough")
    return Check(name, True, "; ".join([f"up to {most}", *remarks]))


def namespaces(probe: dict[str, Any]) -> Check:
    """Every kind that a sandbox has could be made just now."""
    name = "namespaces"
    found: dict[str, int] = probe.get("namespaces") or {}
    if not found:
        return Check(name, False, "the probe did not run", f"{sys.executable} must be able to start")
    failed = {kind: code for kind, code in found.items() if code}
    required = os.geteuid() == 0
    if not failed:
        return Check(name, True, f"{', '.join(found)} can be made", required=required)
    causes = sorted({errno.errorcode.get(code, str(code)) for code in failed.values()})
    remedy = (
        "run on the host itself or in a container with CAP_SYS_ADMIN (--privileged)"
        if required
        else "sudo agentctl doctor"
    )
    return Check(name, False, f"{', '.join(failed)}: {', '.join(causes)}", remedy, required=required)


def nftables(run: Callable[..., subprocess.CompletedProcess[bytes]] = subprocess.run) -> Check:
    """nft is there and, for root, the kernel would take a table (`--check` changes nothing)."""
    name = "nftables"
    argv = ["nft", "--version"] if os.geteuid() else ["nft", "--check", "add table inet agentd_doctor"]
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    try:
        done = run(argv, check=False, capture_output=True, timeout=10, stdin=subprocess.DEVNULL, env={"PATH": path})
    except FileNotFoundError:
        return Check(name, False, "there is no nft", "apt-get install nftables")
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check(name, False, f"nft does not run: {error}", "apt-get install nftables")
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        why = said[0] if said else f"exit code {done.returncode}"
        return Check(name, False, f"the kernel refuses: {why}", "load nf_tables, and run where CAP_NET_ADMIN is given")
    return Check(name, True, "nft runs" if os.geteuid() else "nft runs and the kernel takes tables")


def seccomp(root: Path = Path("/")) -> Check:
    """The filter's actions that agentd uses are there."""
    actions = _words(root / "proc/sys/kernel/seccomp/actions_avail")
    missing = [one for one in ("errno", "kill_process", "allow") if one not in actions]
    detail = "filters" if not missing else f"no {', '.join(missing)}"
    return Check("seccomp", not missing, detail, "install a kernel with CONFIG_SECCOMP_FILTER")


def libseccomp(probe: dict[str, Any]) -> Check:
    """The library that compiles the filters."""
    ok = bool(probe.get("libseccomp"))
    return Check("libseccomp", ok, "libseccomp.so.2" if ok else "no libseccomp.so.2", "apt-get install libseccomp2")


def overlayfs(root: Path = Path("/")) -> Check:
    """For images; tasks on the host's own files do without."""
    known = "overlay" in _words(root / "proc/filesystems")
    module = any((root / "lib/modules" / platform.release()).glob("kernel/fs/overlayfs/overlay.ko*"))
    detail = "built in or loaded" if known else "as a module" if module else "none"
    return Check("overlayfs", known or module, detail, "modprobe overlay; only image roots need it", required=False)


def landlock(probe: dict[str, Any]) -> Check:
    """A second wall around the files, where the kernel has it."""
    version = int(probe.get("landlock") or 0)
    detail = f"ABI {version}" if version else "none"
    return Check("Landlock", version > 0, detail, "boot with lsm=landlock,... to have a second wall", required=False)


def service_manager(root: Path = Path("/")) -> Check:
    """Informational: agentd also runs without systemd."""
    systemd = (root / "run/systemd/system").is_dir()
    detail = "systemd" if systemd else "none: scripts/quickstart starts agentd without it"
    return Check("service manager", True, detail, required=False)
