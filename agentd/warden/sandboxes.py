"""Sandboxes as the warden holds them: started, found again after a restart, collected. Kernel objects only; no policy."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import agentd
from agentd.core import addresses
from agentd.core.errors import HostLacks, InvalidField, NotFound, WrongState
from agentd.core.wire import Exit, Limits, SandboxSpec, SandboxStatus, Usage
from agentd.warden import cgroups, packets, rootfs, seccomp
from agentd.warden import syscalls as sc
from agentd.warden.config import WardenConfig
from agentd.warden.gateway import Gateway, Wire, start_time
from agentd.warden.workspaces import BENEATH, Workspaces

WORKSPACE = "/workspace"
READY_S = 10.0
"""How long a child may take to build its root before it is given up."""
TARGET_TOPS = frozenset({"mnt", "opt", "srv", "home", "data", "media"})
PIPE_BYTES = 1 << 18


@dataclass(slots=True)
class Sandbox:
    """One sandbox, live or ended but not collected."""

    spec_id: str
    epoch: int
    tenant: str
    slot: int
    wire: Wire
    pid: int
    started_at: float
    group: cgroups.Group
    directory: Path
    pidfd: int = -1
    control: socket.socket | None = None
    pipes: list[int] = field(default_factory=list)
    exit: Exit | None = None
    namespace: int = -1


class Zygote:
    """The forking process; started when first needed and again if it died."""

    def __init__(self, stage: Path):
        self._stage = stage
        self._channel: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for one in (ours, theirs):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        root = Path(agentd.__file__).parent.parent
        program = Path(__file__).with_name("zygote.py")
        self._stage.mkdir(exist_ok=True)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(program), str(root), str(theirs.fileno()), str(self._stage)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"},
                cwd="/",
            )
        ours.settimeout(READY_S)
        return ours

    def spawn(self, plan: dict[str, Any], fds: dict[str, int]) -> tuple[int, int]:
        """`(pid, pidfd)` of a new sandbox's PID 1.

        Raises:
            OSError: the kernel refused; the message says which call.
        """
        for last in (False, True):
            if self._channel is None:
                self._channel = self._start()
            try:
                packets.send(self._channel, {"plan": plan, "fds": list(fds)}, list(fds.values()))
                answer, given = packets.receive(self._channel)
            except OSError:
                answer, given = None, []
            if answer is not None:
                break
            self.close()
            if last:
                raise OSError(0, "the forking process died twice")
        assert answer is not None
        if "error" in answer:
            raise OSError(answer["errno"] or 0, answer["error"])
        return answer["pid"], given[0]

    def close(self) -> None:
        """End it; sandboxes live on."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class Sandboxes:
    """Every sandbox on this host that is ours."""

    def __init__(
        self,
        config: WardenConfig,
        run: Path,
        workspaces: Workspaces,
        roots: cgroups.Roots,
        gateway: Gateway,
        watch: Callable[[Sandbox], None],
    ):
        self._config = config
        self._run = run / "sandboxes"
        self._run.mkdir(mode=0o700, exist_ok=True)
        self._workspaces = workspaces
        self._roots = roots
        self._gateway = gateway
        self._watch = watch
        self._zygote = Zygote(run / "stage")
        self._filters = [program.hex() for program in seccomp.programs()]
        self.live: dict[str, Sandbox] = {}

    # -- finding again -------------------------------------------------------------------------------------------------

    def recover(self) -> int:
        """After a restart: adopt what lives, keep the exits of what ended, remove what a crash left half-made. How many were found."""
        for directory in sorted(self._run.iterdir()):
            record = directory / "record.json"
            try:
                raw = json.loads(record.read_text())
                wire = Wire(**raw["wire"])
            except (OSError, ValueError, KeyError, TypeError):
                shutil.rmtree(directory, ignore_errors=True)
                continue
            sandbox = Sandbox(
                spec_id=raw["id"],
                epoch=raw["epoch"],
                tenant=raw["tenant"],
                slot=raw["slot"],
                wire=wire,
                pid=raw["pid"],
                started_at=raw["started_at"],
                group=cgroups.Group(self._roots, raw["tenant"], raw["id"]),
                directory=directory,
            )
            self.live[sandbox.spec_id] = sandbox
            alive = start_time(sandbox.pid) == raw["start_time"] and raw["start_time"] > 0
            if alive:
                try:
                    self._adopt(sandbox)
                except OSError:
                    sandbox.group.kill()
            self._note_end(sandbox)
            self._watch(sandbox)
        for tenant, name in cgroups.existing(self._roots):
            if name not in self.live or self.live[name].tenant != tenant:
                cgroups.Group(self._roots, tenant, name).remove()
        self._gateway.forget_all_but({sandbox.wire.veth: sandbox.wire for sandbox in self.live.values()})
        return len(self.live)

    def _adopt(self, sandbox: Sandbox) -> None:
        sandbox.pidfd = os.pidfd_open(sandbox.pid)
        sandbox.namespace = os.open(f"/proc/{sandbox.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        sandbox.control = self._dial(sandbox.directory)
        answer, sandbox.pipes = self._ask(sandbox, {"op": "pipes"})
        answer, _ = self._ask(sandbox, {"op": "status"})
        if answer["exit"]:
            sandbox.exit = Exit(**answer["exit"], oom=sandbox.group.oom_killed())

    @staticmethod
    def _dial(directory: Path) -> socket.socket:
        """Connect to a PID 1. Through a descriptor of its directory, so the path's length does not matter."""
        found = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        found.settimeout(READY_S)
        where = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            found.connect(f"/proc/self/fd/{where}/control")
        finally:
            os.close(where)
        return found

    def _ask(self, sandbox: Sandbox, request: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
        """Ask a PID 1 and wait; an exit it reports meanwhile is kept."""
        if sandbox.control is None:
            raise OSError(0, "its PID 1 is gone")
        packets.send(sandbox.control, request)
        while True:
            answer, fds = packets.receive(sandbox.control)
            if answer is None:
                raise OSError(0, "its PID 1 went away")
            if answer.get("event") == "exited":
                sandbox.exit = Exit(**answer["exit"], oom=sandbox.group.oom_killed())
                continue
            return answer, fds

    # -- starting ------------------------------------------------------------------------------------------------------

    def start(self, spec: SandboxSpec) -> tuple[Sandbox, list[int]]:
        """A running sandbox and the read ends of its output (the caller's copies). On any error nothing is left of it.

        Raises:
            WrongState: it runs already, or `epoch` is not newer.
            InvalidField: a mount is not allowed, or the program cannot be executed.
            HostLacks: the kernel refused a namespace, limit or filter.
        """
        old = self.live.get(spec.id)
        if old is not None:
            raise WrongState(f"cannot start {spec.id}: attempt {old.epoch} of it is not collected")
        slot = self._workspaces.slot(spec.id)
        group = cgroups.Group(self._roots, spec.tenant, spec.id)
        directory = self._run / spec.id
        with contextlib.ExitStack() as undo:
            mounts = self._open_mounts(spec, undo)
            workspace = self._workspaces.open(spec.id)
            undo.callback(os.close, workspace)
            undo.callback(group.remove)
            try:
                group.create(spec.limits, spec.cpu_weight)
                namespace, wire = self._gateway.connect(slot, spec.id)
            except OSError as error:
                raise HostLacks(f"cannot start {spec.id}: {error}", code="start_failed") from error
            undo.callback(os.close, namespace)
            undo.callback(self._gateway.disconnect, wire)
            undo.callback(shutil.rmtree, directory, ignore_errors=True)
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(mode=0o700)
            binds = [
                {"fd": f"m{index}", "target": mount.target, "read_only": True, "file": is_file}
                for index, (mount, _, is_file) in enumerate(mounts)
            ]
            binds.append({"fd": "workspace", "target": WORKSPACE, "read_only": False})
            hostname = spec.id.replace("_", "-").replace(".", "-")
            plan = {
                "root": rootfs.plan(
                    hostname=hostname,
                    id_base=addresses.slot_id_base(slot),
                    agent_id=addresses.AGENT_ID,
                    hosts={addresses.GATEWAY4: addresses.INTERNAL_NAME, addresses.GATEWAY6: addresses.INTERNAL_NAME},
                    nameserver=addresses.GATEWAY4,
                    workspace=WORKSPACE,
                    binds=binds,
                    tmp_bytes=min(self._config.tmp_bytes, spec.limits.memory_bytes),
                    shm_bytes=min(self._config.shm_bytes, spec.limits.memory_bytes),
                ),
                "hostname": hostname,
                "id_base": addresses.slot_id_base(slot),
                "id_range": addresses.ID_RANGE,
                "filters": self._filters,
            }
            fds = {f"m{index}": fd for index, (_, fd, _) in enumerate(mounts)} | {
                "workspace": workspace,
                "netns": namespace,
            }
            pid, pidfd, pipes = self._spawn(group, directory, plan, fds, undo)
            sandbox = Sandbox(
                spec.id,
                spec.epoch,
                spec.tenant,
                slot,
                wire,
                pid,
                time.time(),
                group,
                directory,
                pidfd,
                namespace=namespace,
            )
            sandbox.control = self._dial(directory)
            undo.callback(sandbox.control.close)
            record = {
                "id": spec.id,
                "epoch": spec.epoch,
                "tenant": spec.tenant,
                "slot": slot,
                "wire": asdict(wire),
                "pid": pid,
                "start_time": start_time(pid),
                "started_at": sandbox.started_at,
            }
            (directory / "record.new").write_text(json.dumps(record))
            (directory / "record.new").rename(directory / "record.json")
            request = {
                "op": "start",
                "argv": spec.argv,
                "env": dict(spec.env),
                "cwd": spec.cwd,
                "uid": addresses.AGENT_ID,
                "gid": addresses.AGENT_ID,
            }
            answer, _ = self._ask(sandbox, request)
            if "exec" in answer:
                raise InvalidField(
                    f"cannot start {spec.id}: {answer['exec']['error']}", field="command", code="exec_failed"
                )
            if "error" in answer:
                raise HostLacks(f"cannot start {spec.id}: {answer['error']}", code="start_failed")
            sandbox.pipes = pipes
            undo.pop_all()
            for _, fd, _ in mounts:
                os.close(fd)
            os.close(workspace)
        self.live[spec.id] = sandbox
        self._watch(sandbox)
        return sandbox, [os.dup(fd) for fd in pipes]

    def _spawn(
        self,
        group: cgroups.Group,
        directory: Path,
        plan: dict[str, Any],
        fds: dict[str, int],
        undo: contextlib.ExitStack,
    ) -> tuple[int, int, list[int]]:
        with contextlib.ExitStack() as local:

            def mine(fd: int) -> int:
                local.callback(os.close, fd)
                return fd

            status_r, status_w = map(mine, os.pipe())
            pipes = []
            for name in ("stdout", "stderr"):
                read, write = os.pipe()
                undo.callback(os.close, read)
                mine(write)
                fcntl_setpipe(write)
                pipes.append(read)
                fds[f"{name}_r"], fds[f"{name}_w"] = read, write
            control = local.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC))
            where = mine(os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
            control.bind(f"/proc/self/fd/{where}/control")
            control.listen(4)
            fds["control"] = control.fileno()
            fds["exit"] = mine(
                os.open(directory / "exit", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            )
            fds["status"] = status_w
            fds["cgroup"] = mine(group.open_leaf())
            for name, fd in group.open_v1_procs().items():
                fds[name] = mine(fd)
            try:
                pid, pidfd = self._zygote.spawn(plan, fds)
            except OSError as error:
                raise HostLacks(f"cannot make a sandbox: {error}", code="start_failed") from error
            undo.callback(os.close, pidfd)
            undo.callback(group.kill)
            os.close(status_w)
            local.pop_all()
            # status_w is closed above so that a child that dies is seen as the end of the pipe; close the rest by hand
            for name, fd in fds.items():
                if name.startswith("v1:") or name in ("stdout_w", "stderr_w", "exit", "cgroup"):
                    os.close(fd)
            os.close(where)
            control.close()
            try:
                ready, _, _ = select.select([status_r], [], [], READY_S)
                said = os.read(status_r, 600) if ready else b"!it did not answer in time"
            finally:
                os.close(status_r)
            if said != b"ok":
                raise HostLacks(
                    f"cannot make a sandbox: {said[1:].decode(errors='replace') or 'its first process died'}",
                    code="start_failed",
                )
        return pid, pidfd, pipes

    def _open_mounts(self, spec: SandboxSpec, undo: contextlib.ExitStack) -> list[tuple[Any, int, bool]]:
        found = []
        for index, mount in enumerate(spec.mounts):
            where = f"mounts[{index}]"
            if not mount.read_only:
                raise InvalidField(
                    f"cannot mount {mount.source}: {where}.read_only = false is not offered",
                    field=f"{where}.read_only",
                    hint="write results into the workspace",
                )
            if mount.target.split("/")[1] not in TARGET_TOPS or mount.target.count("/") < 2:
                tops = ", ".join(f"/{top}" for top in sorted(TARGET_TOPS))
                raise InvalidField(
                    f"cannot mount {mount.source}: {where}.target: {mount.target!r} is not below {tops}",
                    field=f"{where}.target",
                )
            root = next(
                (
                    root
                    for root in self._config.mount_roots
                    if mount.source == root or mount.source.startswith(root + "/")
                ),
                None,
            )
            if root is None:
                allowed = ", ".join(self._config.mount_roots) or "none"
                raise InvalidField(
                    f"cannot mount {mount.source}: {where}.source is outside the allowed roots ({allowed})",
                    field=f"{where}.source",
                    hint="root can add it to mount_roots in warden.toml",
                )
            try:
                base = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    fd = sc.openat2(base, mount.source[len(root) :].lstrip("/") or ".", os.O_PATH, BENEATH)
                finally:
                    os.close(base)
            except OSError as error:
                raise InvalidField(
                    f"cannot mount {mount.source}: {where}.source: {error.strerror}", field=f"{where}.source"
                ) from error
            undo.callback(os.close, fd)
            found.append((mount, fd, not os.path.isdir(f"/proc/self/fd/{fd}")))
        return found

    # -- while it lives ------------------------------------------------------------------------------------------------

    def get(self, name: str, epoch: int) -> Sandbox:
        """The sandbox `name`, if it is of attempt `epoch`.

        Raises:
            NotFound: there is none, or it belongs to another attempt.
        """
        found = self.live.get(name)
        if found is None or found.epoch != epoch:
            raise NotFound(f"cannot find sandbox {name!r} of attempt {epoch}", code="no_such_sandbox")
        return found

    def hear(self, sandbox: Sandbox) -> bool:
        """Take what its PID 1 says unasked; True when its end became known by this."""
        assert sandbox.control is not None
        before = sandbox.exit
        try:
            answer, fds = packets.receive(sandbox.control)
            packets.close(fds)
        except OSError:
            answer = None
        if answer is None:
            sandbox.control.close()
            sandbox.control = None
        elif answer.get("event") == "exited":
            sandbox.exit = Exit(**answer["exit"], oom=sandbox.group.oom_killed())
        return before is None and sandbox.exit is not None

    def died(self, sandbox: Sandbox) -> bool:
        """Its PID 1 has ended (the pidfd says so); True when its end became known by this."""
        before = sandbox.exit
        self._note_end(sandbox, gone=True)
        return before is None

    def _note_end(self, sandbox: Sandbox, gone: bool = False) -> None:
        """Where PID 1 is gone: how the main process ended, from the exit record, else from what the kernel knows."""
        if sandbox.exit is not None or (sandbox.pidfd >= 0 and not gone):
            return
        try:
            lines = (sandbox.directory / "exit").read_text().splitlines()
            sandbox.exit = Exit(**json.loads(lines[-1]), oom=sandbox.group.oom_killed())
        except (OSError, ValueError, IndexError, TypeError):
            oom = sandbox.group.oom_killed()
            cause = "the kernel ended it for memory" if oom else "its first process was killed"
            sandbox.exit = Exit(signal=int(signal.SIGKILL), ended_at=time.time(), oom=oom, lost=cause)

    def signal(self, sandbox: Sandbox, number: int) -> None:
        """Send a signal to the main process; KILL also ends everything else. Harmless when it has ended."""
        if sandbox.exit is None:
            try:
                self._ask(sandbox, {"op": "signal", "signo": number})
            except OSError:
                sandbox.group.kill()

    def status(self, sandbox: Sandbox) -> SandboxStatus:
        """What is known and counted now."""
        return SandboxStatus(
            id=sandbox.spec_id,
            epoch=sandbox.epoch,
            tenant=sandbox.tenant,
            address4=sandbox.wire.address4,
            address6=sandbox.wire.address6,
            started_at=sandbox.started_at,
            exit=sandbox.exit,
            usage=self.usage(sandbox),
        )

    def usage(self, sandbox: Sandbox) -> Usage:
        """CPU, memory and I/O from the control group, traffic from the rules' counters."""
        try:
            found = sandbox.group.usage()
        except OSError:
            found = Usage()
        traffic = self._gateway.traffic(sandbox.wire)
        return replace(
            found,
            net_tx_bytes=traffic["tx"][0],
            net_tx_packets=traffic["tx"][1],
            net_rx_bytes=traffic["rx"][0],
            net_rx_packets=traffic["rx"][1],
            denied_packets=traffic["deny"][1],
        )

    # -- ending --------------------------------------------------------------------------------------------------------

    def collect(self, sandbox: Sandbox) -> SandboxStatus:
        """End what is left of it and take everything away; its last status.

        Raises:
            WrongState: something in it would not die; nothing was taken away.
        """
        if sandbox.exit is None:
            sandbox.group.kill()
            self._note_end(sandbox, gone=True)
        last = self.status(sandbox)
        if sandbox.control is not None:
            try:
                packets.send(sandbox.control, {"op": "release"})
            except OSError:
                pass
        if not sandbox.group.remove():
            raise WrongState(
                f"cannot collect {sandbox.spec_id}: a process in it does not die",
                hint="look for one in state D: ps -eo pid,stat,wchan,cmd",
            )
        self._gateway.disconnect(sandbox.wire)
        del self.live[sandbox.spec_id]
        if sandbox.control is not None:
            sandbox.control.close()
        packets.close([fd for fd in (sandbox.pidfd, sandbox.namespace, *sandbox.pipes) if fd >= 0])
        shutil.rmtree(sandbox.directory, ignore_errors=True)
        return last

    def close(self) -> None:
        """End the zygote; sandboxes live on."""
        self._zygote.close()


def fcntl_setpipe(fd: int) -> None:
    """Make a pipe hold `PIPE_BYTES`, or leave it as it is where the kernel will not."""
    import fcntl

    try:
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    except OSError:
        pass


def check_limits(limits: Limits) -> None:
    """Refuse limits that this host cannot have.

    Raises:
        InvalidField: more than the host has.
    """
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if limits.memory_bytes > total:
        raise InvalidField(
            f"cannot limit memory to {limits.memory_bytes}: the host has {total} bytes", field="limits.memory_bytes"
        )
