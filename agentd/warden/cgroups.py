"""Control groups of sandboxes, on unified (v2) and hybrid hosts: the same limits, the same figures.

On a unified host everything is v2. On a hybrid host, where controllers are bound to v1, lifecycle (kill, freeze, placing a child at
birth) stays on v2 and limits go through cgroupspy's v1 controllers. A host that offers neither for a needed controller is refused by name.
Our groups lie below `Roots`, never elsewhere: `<root>/tenants/<tenant>/<sandbox>/agent`.
Sources: Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from cgroupspy.controllers import BlkIOController, Controller, CpuAcctController, CpuController, MemoryController

from agentd.core.errors import HostLacks
from agentd.core.wire import Limits, Usage

NEEDED = ("cpu", "memory", "pids")
OPTIONAL = ("io", "cpuset", "hugetlb")
PERIOD_US = 100_000
V1_LEAST_QUOTA_US = 1_000


@dataclass(frozen=True, slots=True)
class Roots:
    """Where our groups go: `unified` is a v2 directory, `v1` holds a directory per v1 controller on a hybrid host (else empty)."""

    unified: Path
    v1: dict[str, Path] = field(default_factory=dict)


class _Place:
    """What a cgroupspy controller wants to know of its node."""

    def __init__(self, path: Path):
        self.full_path = os.fsencode(path)  # cgroupspy joins bytes


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _number(path: Path) -> int:
    try:
        return int(_read(path))
    except ValueError:
        return 0


def _table(path: Path) -> dict[str, int]:
    return {key: int(value) for key, value in (line.split() for line in _read(path).splitlines())}


def _mounts() -> tuple[Path | None, dict[str, Path]]:
    """The v2 mount and, by controller, the v1 mounts."""
    unified: Path | None = None
    v1: dict[str, Path] = {}
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, options, *_ = line.split()
        if kind == "cgroup2" and unified is None:
            unified = Path(where)
        elif kind == "cgroup":
            for option in options.split(","):
                if option in ("cpu", "cpuacct", "memory", "pids", "blkio", "freezer", "devices", "cpuset", "hugetlb"):
                    v1.setdefault(option, Path(where))
    return unified, v1


def _own() -> dict[str, str]:
    """This process's group by controller; `""` is v2's."""
    found = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            found[controller] = path
    return found


def find(name: str, delegated: str | None) -> Roots:
    """The roots for our groups: the delegated v2 group (a path from the v2 root), or one called `name` below our own.

    Raises:
        HostLacks: a needed controller is bound to neither hierarchy.
    """
    unified, v1 = _mounts()
    if unified is None:
        raise HostLacks(
            "cannot use control groups: no cgroup2 file system is mounted",
            hint="mount -t cgroup2 none /sys/fs/cgroup/unified",
        )
    own = _own()
    base = unified / (delegated or own.get("", "/")).strip("/")
    root = base if delegated else base / name
    available = set(_read(unified / "cgroup.controllers").split())
    missing = [controller for controller in NEEDED if controller not in available and controller not in v1]
    if missing:
        raise HostLacks(
            f"cannot enforce limits: no cgroup hierarchy has the controller {', '.join(missing)}",
            hint="boot with systemd.unified_cgroup_hierarchy=1 and cgroup_enable=memory, or mount the v1 controllers",
        )
    hybrid: dict[str, Path] = {
        controller: v1[controller] / own.get(controller, "/").strip("/") / name
        for controller in ("cpu", "cpuacct", "memory", "pids", "blkio")
        if controller in v1 and controller not in available
    }
    return Roots(root, hybrid)


def remember(roots: Roots, record: Path) -> None:
    """Keep where our groups are: a later warden may be started in another group and must find them all the same."""
    record.write_text(
        json.dumps({"unified": str(roots.unified), "v1": {name: str(path) for name, path in roots.v1.items()}})
    )


def recall(record: Path) -> Roots | None:
    """The roots an earlier warden used, if they still exist."""
    try:
        raw = json.loads(record.read_text())
    except (OSError, ValueError):
        return None
    roots = Roots(Path(raw["unified"]), {name: Path(path) for name, path in raw["v1"].items()})
    return roots if all(path.is_dir() for path in (roots.unified, *roots.v1.values())) else None


def _step_aside(base: Path) -> None:
    """Let our own v2 group hand its controllers down: inner groups hold no processes, so the warden moves into a leaf of it.

    Raises:
        HostLacks: other processes are in the same group, which are not ours to move.
    """
    if set(NEEDED) <= set(_read(base / "cgroup.subtree_control").split()):
        return
    others = [pid for pid in _read(base / "cgroup.procs").split() if int(pid) != os.getpid()]
    if others and (base / "cgroup.type").exists():  # the root of the hierarchy, which has no type, may hold processes
        raise HostLacks(
            f"cannot make control groups below {base}: other processes are in it",
            hint="start the warden in a group of its own: systemd-run --scope -p Delegate=yes",
        )
    leaf = base / "agentd-warden"
    leaf.mkdir(exist_ok=True)
    (leaf / "cgroup.procs").write_text(str(os.getpid()))
    _hand_down(base)


def prepare(roots: Roots, *, delegated: bool = False) -> None:
    """Make the roots and hand the controllers down to `tenants/`. `delegated`: the root was given to us by name.

    Raises:
        HostLacks: a needed controller cannot be handed down.
    """
    if not roots.v1 and not delegated:
        _step_aside(roots.unified.parent)
    roots.unified.mkdir(exist_ok=True)
    residents = _read(roots.unified / "cgroup.procs").split()
    if residents and not roots.v1:
        # No processes in inner groups: whoever holds the delegated group open moves into a leaf beside ours.
        (roots.unified / "holder").mkdir(exist_ok=True)
        for pid in residents:
            (roots.unified / "holder/cgroup.procs").write_text(pid)
    (roots.unified / "tenants").mkdir(exist_ok=True)
    if not roots.v1:
        _hand_down(roots.unified)
        _hand_down(roots.unified / "tenants")
    for path in roots.v1.values():
        (path / "tenants").mkdir(parents=True, exist_ok=True)
    _hierarchical(roots)


def _hierarchical(roots: Roots) -> None:
    if "memory" in roots.v1:
        controller = MemoryController(_Place(roots.v1["memory"]))
        if controller.get_property(b"memory.use_hierarchy") != "1":
            controller.set_property(b"memory.use_hierarchy", 1)


def _hand_down(path: Path) -> None:
    offered = set(_read(path / "cgroup.controllers").split())
    missing = [controller for controller in NEEDED if controller not in offered]
    if missing:
        raise HostLacks(
            f"cannot enforce limits: {path} was not delegated the controller {', '.join(missing)}",
            hint="the unit needs Delegate=yes, and its parents' cgroup.subtree_control these controllers",
        )
    wanted = " ".join(f"+{controller}" for controller in (*NEEDED, *OPTIONAL) if controller in offered)
    (path / "cgroup.subtree_control").write_text(wanted)


class Group:
    """The control groups of one sandbox."""

    def __init__(self, roots: Roots, tenant: str, sandbox: str):
        self._roots = roots
        self.unified = roots.unified / "tenants" / tenant / sandbox
        self.v1 = {controller: path / "tenants" / tenant / sandbox for controller, path in roots.v1.items()}

    def create(self, limits: Limits, cpu_weight: int) -> None:
        """Make the groups with their limits in force, before any process exists."""
        tenant = self.unified.parent
        tenant.mkdir(exist_ok=True)
        if not self.v1:
            _hand_down(tenant)
        self.unified.mkdir(exist_ok=True)
        if not self.v1:
            _hand_down(self.unified)
        (self.unified / "agent").mkdir(exist_ok=True)
        for path in self.v1.values():
            path.mkdir(parents=True, exist_ok=True)
        self.limit(limits, cpu_weight)

    def limit(self, limits: Limits, cpu_weight: int) -> None:
        """Put `limits` into force; raises OSError when the kernel refuses one."""
        quota = max(V1_LEAST_QUOTA_US, int(limits.cpus * PERIOD_US))
        if not self.v1:
            self._write("memory.max", limits.memory_bytes)
            # No memory.high: without swap it slows a program that is over it almost to a stand, where memory.max ends it with a reason.
            if (self.unified / "memory.swap.max").exists():
                self._write("memory.swap.max", 0)
            self._write("cpu.max", f"{quota} {PERIOD_US}")
            self._write("cpu.weight", cpu_weight)
            self._write("pids.max", limits.pids)
            return
        memory = MemoryController(_Place(self.v1["memory"]))
        both = b"memory.memsw.limit_in_bytes"
        swap_counted = (self.v1["memory"] / both.decode()).exists()
        if swap_counted:
            memory.set_property(both, -1)
        memory.limit_in_bytes = limits.memory_bytes
        if swap_counted:
            memory.set_property(both, limits.memory_bytes)
        cpu = CpuController(_Place(self.v1["cpu"]))
        cpu.cfs_period_us = PERIOD_US
        cpu.cfs_quota_us = quota
        cpu.shares = max(2, cpu_weight * 1024 // 100)
        Controller(_Place(self.v1["pids"])).set_property(b"pids.max", limits.pids)

    def _write(self, name: str, value: object) -> None:
        (self.unified / name).write_text(str(value))

    def open_leaf(self) -> int:
        """A descriptor for CLONE_INTO_CGROUP."""
        return os.open(self.unified / "agent", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def open_v1_procs(self) -> dict[str, int]:
        """Descriptors of the v1 groups' `cgroup.procs`, which a child is written into before it runs."""
        return {
            f"v1:{controller}": os.open(path / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
            for controller, path in self.v1.items()
        }

    def kill(self) -> None:
        """SIGKILL for everything in it, also for what forks meanwhile; cgroup.kill (Linux 5.14)."""
        try:
            self._write("cgroup.kill", 1)
        except FileNotFoundError:
            pass

    def populated(self) -> bool:
        """Whether a process is left."""
        return "populated 1" in _read(self.unified / "cgroup.events")

    def oom_killed(self) -> bool:
        """Whether the kernel killed anything in it for memory."""
        if not self.v1:
            return _table(self.unified / "memory.events").get("oom_kill", 0) > 0
        return _table(self.v1["memory"] / "memory.oom_control").get("oom_kill", 0) > 0

    def usage(self) -> Usage:
        """What the kernel has counted; the network is counted elsewhere."""
        if not self.v1:
            read, written = _io_v2(_read(self.unified / "io.stat"))
            return Usage(
                cpu_s=_table(self.unified / "cpu.stat").get("usage_usec", 0) / 1e6,
                memory_bytes=_number(self.unified / "memory.current"),
                memory_peak_bytes=_number(self.unified / "memory.peak"),
                pids=_number(self.unified / "pids.current"),
                io_read_bytes=read,
                io_write_bytes=written,
            )
        memory = MemoryController(_Place(self.v1["memory"]))
        read = written = 0
        if "blkio" in self.v1:
            for line in (
                BlkIOController(_Place(self.v1["blkio"])).get_property(b"blkio.throttle.io_service_bytes").splitlines()
            ):
                parts = line.split()
                if len(parts) == 3 and parts[1] == "Read":
                    read += int(parts[2])
                elif len(parts) == 3 and parts[1] == "Write":
                    written += int(parts[2])
        return Usage(
            cpu_s=CpuAcctController(_Place(self.v1["cpuacct"])).usage / 1e9 if "cpuacct" in self.v1 else 0.0,
            memory_bytes=memory.usage_in_bytes,
            memory_peak_bytes=memory.max_usage_in_bytes,
            pids=_number(self.v1["pids"] / "pids.current"),
            io_read_bytes=read,
            io_write_bytes=written,
        )

    def remove(self, within_s: float = 2.0) -> bool:
        """Take the groups away; kills what is left. False if something would not die in time."""
        deadline = time.monotonic() + within_s
        self.kill()
        while self.populated():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        paths = [self.unified / "agent", self.unified, *self.v1.values()]
        while paths:
            left = [path for path in paths if not _rmdir(path)]
            if left == paths or time.monotonic() > deadline:
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.002)
            paths = left
        for parent in (self.unified.parent, *(path.parent for path in self.v1.values())):
            _rmdir(parent)
        return True


def _rmdir(path: Path) -> bool:
    try:
        path.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _io_v2(text: str) -> tuple[int, int]:
    read = written = 0
    for line in text.splitlines():
        for part in line.split()[1:]:
            key, _, value = part.partition("=")
            if key == "rbytes":
                read += int(value)
            elif key == "wbytes":
                written += int(value)
    return read, written


def existing(roots: Roots) -> list[tuple[str, str]]:
    """Every `(tenant, sandbox)` that has a group, alive or left over."""
    found: set[tuple[str, str]] = set()
    for root in (roots.unified, *roots.v1.values()):
        tenants = root / "tenants"
        if tenants.is_dir():
            for tenant in tenants.iterdir():
                if tenant.is_dir():
                    found |= {(tenant.name, sandbox.name) for sandbox in tenant.iterdir() if sandbox.is_dir()}
    return sorted(found)


def remove_roots(roots: Roots) -> None:
    """Take the empty roots away again; what is not empty stays."""
    for root in (roots.unified, *roots.v1.values()):
        _rmdir(root / "tenants")
        _rmdir(root / "holder")
        _rmdir(root)
