"""The warden's loop: one thread, one poll, one request at a time. A request that is wrong gets a reason; none ends the warden."""

from __future__ import annotations

import os
import platform
import select
import signal
import socket
import struct
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import prctl

import agentd
from agentd.core import addresses, wire
from agentd.core.errors import AgentdError, HostLacks, RequestError, WrongState
from agentd.core.places import Places
from agentd.warden import cgroups, packets
from agentd.warden.config import WardenConfig
from agentd.warden.gateway import Gateway, find_holder
from agentd.warden.sandboxes import Sandbox, Sandboxes, check_limits
from agentd.warden.workspaces import Workspaces

MOST_DAEMONS = 8
ANSWER_S = 5.0
"""How long a daemon may leave an answer unread before it is dropped."""


def say(level: int, message: str, **fields: object) -> None:
    """One line for the journal; `level` is syslog's (3 error, 4 warning, 6 information)."""
    extra = "".join(f" {key}={value}" for key, value in fields.items())
    print(f"<{level}>{message}{extra}", file=sys.stderr, flush=True)


class Server:
    """Listens for the daemon and carries out what it may ask."""

    def __init__(self, places: Places, config: WardenConfig):
        self._places = places
        self._config = config
        self._poll = select.poll()
        self._daemons: dict[int, socket.socket] = {}
        self._by_fd: dict[int, tuple[str, Sandbox]] = {}
        self._stop = False
        self._problems: list[dict[str, str]] = []
        run = places.warden_run
        run.mkdir(parents=True, exist_ok=True)
        os.chmod(run, 0o755)  # whoever may not talk to us learns that from the socket, not from the directory
        self._run = run
        self._workspaces = Workspaces(places.workspaces)
        self._roots: cgroups.Roots | None = None
        self._gateway: Gateway | None = None
        self._sandboxes: Sandboxes | None = None
        try:
            self._prepare()
        except HostLacks as error:
            say(3, error.message, remedy=error.hint or "")
            self._problems.append({"message": error.message, "hint": error.hint or ""})

    def _prepare(self) -> None:
        if os.geteuid() != 0:
            raise HostLacks(
                "cannot make sandboxes: the warden is not root", hint="start it through systemd or scripts/quickstart"
            )
        record = self._run / "cgroups.json"
        roots = None if self._config.cgroup else cgroups.recall(record)
        roots = roots or cgroups.find(f"agentd-{os.stat(self._run).st_ino:x}", self._config.cgroup)
        residents: list[int] = []
        if self._config.cgroup:
            for leaf in (roots.unified, roots.unified / "holder"):
                procs = leaf / "cgroup.procs"
                residents += [int(pid) for pid in procs.read_text().split()] if procs.exists() else []
            if not residents:
                raise HostLacks(
                    f"cannot use the control group {self._config.cgroup}: nothing holds it",
                    hint="systemctl start agentd-sandboxes.service",
                )
        try:
            cgroups.prepare(roots, delegated=bool(self._config.cgroup))
            cgroups.remember(roots, record)
        except OSError as error:
            raise HostLacks(
                f"cannot make control groups below {roots.unified}: {error.strerror}",
                hint="the control group must be delegated and writable",
            ) from error
        holder = find_holder(self._run, residents)
        namespace = os.open(f"/proc/{holder}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._gateway = Gateway(namespace, holder)
        self._roots = roots
        self._sandboxes = Sandboxes(self._config, self._run, self._workspaces, roots, self._gateway, self._watch)
        busy = any((self._run / "sandboxes").iterdir())
        self._gateway.set_up(skeleton_text(), self._run, busy)
        found = self._sandboxes.recover()
        say(6, "the warden is ready", sandboxes=found, cgroups="hybrid" if roots.v1 else "unified")

    # -- the loop ------------------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Until SIGTERM. Sandboxes live on."""
        path = self._places.warden_socket
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        path.unlink(missing_ok=True)
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        listener.bind(f"/proc/self/fd/{directory}/{path.name}")
        os.chmod(path, 0o666)  # who may talk is decided by SO_PEERCRED
        listener.listen(MOST_DAEMONS)
        self._poll.register(listener, select.POLLIN)
        wake_r, wake_w = os.pipe()
        os.set_blocking(wake_w, False)
        signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._on_term)
        signal.signal(signal.SIGINT, self._on_term)
        self._poll.register(wake_r, select.POLLIN)
        notify("READY=1\nSTATUS=waiting for the daemon")
        beat = watchdog_s()
        while not self._stop:
            ready = self._poll.poll(beat * 1000 if beat else None)
            if beat:
                notify("WATCHDOG=1")
            for fd, _ in ready:
                if fd == wake_r:
                    os.read(wake_r, 64)
                elif fd == listener.fileno():
                    self._accept(listener)
                elif fd in self._daemons:
                    self._serve_one(fd)
                elif fd in self._by_fd:
                    self._sandbox_event(fd)
        notify("STOPPING=1")
        listener.close()
        path.unlink(missing_ok=True)
        if self._sandboxes:
            self._sandboxes.close()

    def _on_term(self, *_: object) -> None:
        self._stop = True

    def _accept(self, listener: socket.socket) -> None:
        peer, _ = listener.accept()
        _, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid not in (0, self._config.daemon_uid) or len(self._daemons) >= MOST_DAEMONS:
            say(4, "refused a connection", uid=uid)
            peer.close()
            return
        peer.settimeout(ANSWER_S)
        self._daemons[peer.fileno()] = peer
        self._poll.register(peer, select.POLLIN)

    def _drop(self, fd: int) -> None:
        self._poll.unregister(fd)
        self._daemons.pop(fd).close()

    def _serve_one(self, fd: int) -> None:
        peer = self._daemons[fd]
        seq: object = None
        fds: list[int] = []
        give: list[int] = []
        keep_open: list[int] = []
        try:
            packet, fds, cut = packets.receive_raw(peer, wire.MAX_MESSAGE_BYTES, wire.MAX_FDS)
            if packet is None:
                self._drop(fd)
                return
            if cut:
                raise RequestError(
                    f"cannot read the request: over {wire.MAX_MESSAGE_BYTES} bytes or {wire.MAX_FDS} descriptors",
                    code="too_large",
                )
            request = wire.decode(packet)
            fields = wire.Fields(request)
            seq = fields.integer("seq", 0, 1 << 53)
            answer, give, keep_open = self._carry_out(fields.text("op", longest=40), fields, fds)
            answer = {"seq": seq, "ok": True} | answer
        except AgentdError as error:
            answer = {"seq": seq, "error": error.as_dict()}
        except OSError as error:
            if fd not in self._daemons:
                return
            say(3, "a request failed", error=error)
            answer = {"seq": seq, "error": {"code": "internal", "message": f"cannot carry out the request: {error}"}}
        except (
            Exception
        ) as error:  # the edge of the process: a bug in one request must not end the parent of all sandboxes
            say(3, "a request met a bug: " + traceback.format_exc().replace("\n", " | "))
            answer = {
                "seq": seq,
                "error": {"code": "internal", "message": f"cannot carry out the request: {type(error).__name__}"},
            }
        finally:
            packets.close(fds)
        try:
            if fd in self._daemons:
                packets.send(peer, answer, give)
        except OSError as error:
            say(4, "dropped a daemon that does not read", error=error)
            self._drop(fd)
        finally:
            packets.close([one for one in give if one not in keep_open])

    def _watch(self, sandbox: Sandbox) -> None:
        if sandbox.control is not None:
            self._by_fd[sandbox.control.fileno()] = ("control", sandbox)
            self._poll.register(sandbox.control, select.POLLIN)
        if sandbox.pidfd >= 0:
            self._by_fd[sandbox.pidfd] = ("pidfd", sandbox)
            self._poll.register(sandbox.pidfd, select.POLLIN)

    def _unwatch(self, fd: int) -> None:
        if self._by_fd.pop(fd, None):
            self._poll.unregister(fd)

    def _sandbox_event(self, fd: int) -> None:
        assert self._sandboxes is not None
        kind, sandbox = self._by_fd[fd]
        if kind == "control":
            ended = self._sandboxes.hear(sandbox)
            if sandbox.control is None:
                self._unwatch(fd)
        else:
            self._unwatch(fd)
            ended = self._sandboxes.died(sandbox)
        if ended:
            self._announce(sandbox)

    def _announce(self, sandbox: Sandbox) -> None:
        assert sandbox.exit is not None
        event = {"event": "exited", "id": sandbox.spec_id, "epoch": sandbox.epoch, "exit": asdict(sandbox.exit)}
        for fd, peer in list(self._daemons.items()):
            try:
                packets.send(peer, event)
            except OSError:
                self._drop(fd)

    # -- what may be asked ---------------------------------------------------------------------------------------------

    def remove_groups(self) -> None:
        """Take the empty control groups away."""
        if self._roots is not None:
            cgroups.remove_roots(self._roots)

    def parts(self) -> tuple[Sandboxes, Gateway]:
        """Sandboxes and gateway.

        Raises:
            HostLacks: the host cannot make sandboxes; the first problem says why.
        """
        return self._ready()

    def _ready(self) -> tuple[Sandboxes, Gateway]:
        if self._sandboxes is None or self._gateway is None or self._problems:
            first = self._problems[0] if self._problems else {"message": "the warden is not ready", "hint": ""}
            raise HostLacks(first["message"], hint=first["hint"] or None)
        return self._sandboxes, self._gateway

    def _carry_out(self, op: str, fields: wire.Fields, fds: list[int]) -> tuple[dict[str, Any], list[int], list[int]]:
        match op:
            case "hello":
                fields.end()
                return self._hello(), [], []
            case "listen":
                fields.end()
                _, gateway = self._ready()
                listening = [one.fileno() for one in gateway.listen(addresses.AGENT_API_PORT)]
                return {}, listening, listening
            case "workspace":
                name = fields.name("id")
                fields.end()
                slot = self._workspaces.create(name)
                found_at = {"address4": addresses.slot_address4(slot), "address6": addresses.slot_address6(slot)}
                return {"path": str(self._workspaces.path / name), **found_at}, [], []
            case "put":
                name = fields.name("id")
                path = wire.relative_path(fields.text("path"), "path")
                mode = fields.integer("mode", 0, 0o777, 0o644)
                fields.end()
                self._idle(name)
                if len(fds) != 1:
                    raise RequestError("cannot write an input: one descriptor must come with it")
                return {"size": self._workspaces.put(name, path, mode, fds[0])}, [], []
            case "remove_workspace":
                name = fields.name("id")
                fields.end()
                self._idle(name)
                self._workspaces.remove(name)
                return {}, [], []
            case "start":
                spec = wire.spec_from(fields.table("spec"))
                fields.end()
                sandboxes, _ = self._ready()
                check_limits(spec.limits)
                sandbox, pipes = sandboxes.start(spec)
                return {"status": asdict(sandboxes.status(sandbox))}, pipes, []
            case "list":
                fields.end()
                sandboxes, _ = self._ready()
                return (
                    {"sandboxes": [{"id": one.spec_id, "epoch": one.epoch} for one in sandboxes.live.values()]},
                    [],
                    [],
                )
        return self._about_one(op, fields)

    def _about_one(self, op: str, fields: wire.Fields) -> tuple[dict[str, Any], list[int], list[int]]:
        sandboxes, _ = self._ready()
        if op not in ("attach", "status", "signal", "collect", "rules"):
            raise RequestError(f"cannot carry out {op[:40]!r}: no such operation")
        sandbox = sandboxes.get(fields.name("id"), fields.integer("epoch", 1, 1 << 31))
        number = fields.integer("signo", 1, 64) if op == "signal" else 0
        fields.end()
        match op:
            case "attach":
                return {"status": asdict(sandboxes.status(sandbox))}, list(sandbox.pipes), list(sandbox.pipes)
            case "signal":
                before = sandbox.exit
                sandboxes.signal(sandbox, number)
                if before is None and sandbox.exit is not None:
                    self._announce(sandbox)
                return {}, [], []
            case "collect":
                if sandbox.control is not None:
                    self._unwatch(sandbox.control.fileno())
                self._unwatch(sandbox.pidfd)
                try:
                    last = sandboxes.collect(sandbox)
                except WrongState:
                    self._watch(sandbox)
                    raise
                return {"status": asdict(last)}, [], []
            case "rules":
                return {"text": sandbox.wire.as_text()}, [], []
        return {"status": asdict(sandboxes.status(sandbox))}, [], []

    def _idle(self, name: str) -> None:
        if self._sandboxes is not None and name in self._sandboxes.live:
            raise WrongState(f"cannot change workspace {name!r}: a sandbox uses it")

    def _hello(self) -> dict[str, Any]:
        v1 = sorted(self._roots.v1) if self._roots else []
        return {
            "version": agentd.__version__,
            "pid": os.getpid(),
            "problems": self._problems,
            "mount_roots": list(self._config.mount_roots),
            "workspaces": str(self._workspaces.path),
            "facts": {
                "kernel": platform.release(),
                "cgroups": "unknown" if self._roots is None else "hybrid" if v1 else "unified",
                "v1_controllers": ", ".join(v1),
                "cgroup": str(self._roots.unified) if self._roots else "",
            },
        }


def end(places: Places, config: WardenConfig) -> None:
    """End every sandbox and take away everything a warden has made in the kernel. No warden may be running."""
    server = Server(places, config)
    try:
        sandboxes, gateway = server.parts()
    except HostLacks as error:
        say(4, "nothing to end", reason=error.message)
        return
    for sandbox in list(sandboxes.live.values()):
        sandboxes.collect(sandbox)
    sandboxes.close()
    server.remove_groups()
    if not config.cgroup:
        holder = os.pidfd_open(gateway.holder_pid)
        signal.pidfd_send_signal(holder, signal.SIGTERM)
        select.select([holder], [], [], 5.0)
        os.close(holder)
        (places.warden_run / "holder").unlink(missing_ok=True)
    say(6, "everything has ended")


def skeleton_text() -> str:
    """The network rules that come with agentd: from the installed package, else from the checkout."""
    package = Path(agentd.__file__).parent
    for path in (package / "_data/agentd.nft", package.parent / "nft/agentd.nft"):
        if path.exists():
            return path.read_text()
    raise HostLacks("cannot find agentd.nft beside the package", hint="reinstall agentd")


def notify(state: str) -> None:
    """Tell systemd; sd_notify(3). Nothing happens without NOTIFY_SOCKET."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)


def watchdog_s() -> float | None:
    """How often to say that we live: half of what systemd allows."""
    allowed = os.environ.get("WATCHDOG_USEC")
    return int(allowed) / 2e6 if allowed else None


def run(places: Places, config: WardenConfig) -> None:
    """Be the warden until SIGTERM."""
    prctl.set_name("agentd-warden")
    prctl.set_dumpable(0)
    os.umask(0o077)
    started = time.monotonic()
    server = Server(places, config)
    say(6, "started", seconds=round(time.monotonic() - started, 3))
    server.serve()
