"""A warden without a kernel: the real protocol over a real SEQPACKET socket; the test decides what happens in a sandbox."""

from __future__ import annotations

import array
import asyncio
import json
import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

USAGE = {"cpu_s": 1.5, "memory_peak_bytes": 1 << 20}


@dataclass
class FakeSandbox:
    id: str
    epoch: int
    spec: dict[str, Any]
    read: list[int]
    write: list[int]
    signals: list[int] = field(default_factory=list)
    exit: dict[str, Any] | None = None


class FakeWarden:
    def __init__(self, path: Path):
        self.path = path
        self.sandboxes: dict[str, FakeSandbox] = {}
        self.workspaces: dict[str, dict[str, bytes]] = {}
        self.started: list[str] = []
        self.refuse_start: dict[str, Any] | None = None
        self.lose_start = False
        self._listener: socket.socket | None = None
        self._peers: set[socket.socket] = set()

    def up(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(self.path))
        self._listener.listen(8)
        self._listener.setblocking(False)
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def down(self) -> None:
        loop = asyncio.get_running_loop()
        if self._listener is not None:
            loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        for peer in self._peers:
            loop.remove_reader(peer)
            peer.close()
        self._peers = set()

    def close(self) -> None:
        self.down()
        for sandbox in self.sandboxes.values():
            for fd in (*sandbox.read, *sandbox.write):
                os.close(fd)
        self.sandboxes = {}

    def _accept(self) -> None:
        assert self._listener is not None
        peer, _ = self._listener.accept()
        peer.setblocking(False)
        self._peers.add(peer)
        asyncio.get_running_loop().add_reader(peer, self._hear, peer)

    def _hear(self, peer: socket.socket) -> None:
        try:
            packet, ancillary, _, _ = peer.recvmsg(1 << 18, socket.CMSG_SPACE(64))
        except BlockingIOError:
            return
        except OSError:
            packet, ancillary = b"", []
        fds = array.array("i")
        for _, _, data in ancillary:
            fds.frombytes(data)
        if not packet:
            asyncio.get_running_loop().remove_reader(peer)
            self._peers.discard(peer)
            peer.close()
            return
        request = json.loads(packet)
        answer, give = self._answer(request, list(fds))
        for fd in fds:
            os.close(fd)
        if peer not in self._peers:
            return
        extra = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", give))] if give else []
        peer.sendmsg([json.dumps({"seq": request["seq"], **answer}).encode()], extra)

    def _answer(self, request: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], list[int]]:
        match request["op"]:
            case "hello":
                return {"ok": True, "pid": 1, "problems": [], "mount_roots": ["/srv/allowed"], "facts": {}}, []
            case "workspace":
                self.workspaces.setdefault(request["id"], {})
                return {"path": f"/w/{request['id']}", "address4": "10.200.0.2", "address6": "fd00::2"}, []
            case "put":
                self.workspaces[request["id"]][request["path"]] = os.pread(fds[0], 1 << 20, 0)
                return {"ok": True}, []
            case "remove_workspace":
                self.workspaces.pop(request["id"], None)
                return {"ok": True}, []
            case "list":
                return {
                    "ok": True,
                    "sandboxes": [{"id": one.id, "epoch": one.epoch} for one in self.sandboxes.values()],
                }, []
            case "start":
                return self._start(request["spec"])
        found = self.sandboxes.get(request["id"])
        if found is None or found.epoch != request["epoch"]:
            return {"error": {"code": "no_such_sandbox", "message": "none"}}, []
        match request["op"]:
            case "attach":
                return {"ok": True, "status": self._status(found)}, found.read
            case "signal":
                found.signals.append(request["signo"])
                if request["signo"] == 9:
                    self.end(found.id, signal=9)
            case "collect":
                if found.exit is None:
                    found.exit = {"code": None, "signal": 9}
                for fd in (*found.read, *found.write):
                    os.close(fd)
                del self.sandboxes[found.id]
        return {"ok": True, "status": self._status(found)}, []

    def _start(self, spec: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
        if self.refuse_start:
            return {"error": self.refuse_start}, []
        pairs = [os.pipe(), os.pipe()]
        sandbox = FakeSandbox(spec["id"], spec["epoch"], spec, [r for r, _ in pairs], [w for _, w in pairs])
        self.sandboxes[spec["id"]] = sandbox
        self.started.append(spec["id"])
        if self.lose_start:
            self.lose_start = False
            self.down()
        return {"ok": True, "status": self._status(sandbox)}, sandbox.read

    def _status(self, one: FakeSandbox) -> dict[str, Any]:
        where = {"address4": "10.200.0.2", "address6": "fd00::2", "started_at": time.time()}
        return {"id": one.id, "epoch": one.epoch, "tenant": "default", **where, "exit": one.exit, "usage": USAGE}

    def say(self, task: str, text: bytes, stream: int = 1) -> None:
        os.write(self.sandboxes[task].write[stream - 1], text)

    def end(self, task: str, code: int | None = None, signal: int | None = None, **more: Any) -> None:
        """The main process ends: the output ends, and whoever listens is told."""
        sandbox = self.sandboxes[task]
        if sandbox.exit is not None:
            return
        for fd in sandbox.write:
            os.close(fd)
        sandbox.write = []
        sandbox.exit = {"code": code, "signal": signal, "ended_at": time.time(), **more}
        event = {"event": "exited", "id": task, "epoch": sandbox.epoch, "exit": sandbox.exit}
        for peer in self._peers:
            peer.send(json.dumps(event).encode())
