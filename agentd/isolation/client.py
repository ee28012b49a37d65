"""The daemon's end of the warden's socket: requests as coroutines, events by callback, a new connection when the warden restarts."""

from __future__ import annotations

import array
import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from agentd.core import wire
from agentd.core.errors import (
    AgentdError,
    Broken,
    HostLacks,
    InvalidField,
    NotFound,
    RequestError,
    TooLarge,
    TryLater,
    WrongState,
)

ANSWER_S = 30.0
RECONNECT_S = (0.05, 1.0)

_BY_CODE: dict[str, type[AgentdError]] = {
    "invalid_field": InvalidField,
    "exec_failed": InvalidField,
    "not_found": NotFound,
    "no_such_sandbox": NotFound,
    "wrong_state": WrongState,
    "too_large": TooLarge,
    "invalid_request": RequestError,
    "not_ready": TryLater,
    "host_lacks": HostLacks,
    "start_failed": HostLacks,
}


class WardenClient:
    """One connection to the warden, made again whenever it breaks.

    `on_event` gets the warden's events; `on_connect` runs after every connection, before requests wait for it, to bring both sides in step.
    """

    def __init__(
        self, path: Path, on_event: Callable[[dict[str, Any]], None], on_connect: Callable[[], Awaitable[None]]
    ):
        self._path = path
        self._on_event = on_event
        self._on_connect = on_connect
        self._socket: socket.socket | None = None
        self._waiting: dict[int, asyncio.Future[tuple[dict[str, Any], list[int]]]] = {}
        self._seq = 0
        self._lost = asyncio.Event()
        self._sending = asyncio.Lock()
        self.connected = False
        self.ready = asyncio.Event()
        """Set while both sides are in step."""

    async def lost(self) -> None:
        """Return when the connection breaks."""
        await self._lost.wait()

    async def run(self) -> None:
        """Stay connected until cancelled."""
        pause = RECONNECT_S[0]
        while True:
            try:
                await self._connect()
            except OSError:
                await asyncio.sleep(pause)
                pause = min(pause * 2, RECONNECT_S[1])
                continue
            pause = RECONNECT_S[0]
            try:
                try:
                    await self._on_connect()
                    self.connected = True
                    self.ready.set()
                    await self._lost.wait()
                except AgentdError:
                    await asyncio.sleep(pause)  # both sides are not in step: begin again
            finally:
                self._disconnect()

    async def _connect(self) -> None:
        found = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            # Blocking, but local and accepted by the kernel at once. Through a descriptor: AGENTD_ROOT may be a long path.
            directory = os.open(self._path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                found.connect(f"/proc/self/fd/{directory}/{self._path.name}")
            finally:
                os.close(directory)
            found.setblocking(False)
        except OSError:
            found.close()
            raise
        self._socket = found
        self._lost.clear()
        asyncio.get_running_loop().add_reader(found.fileno(), self._readable)

    def _disconnect(self) -> None:
        self.connected = False
        self.ready.clear()
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(
                    TryLater("cannot reach the warden: it went away", hint="systemctl status agentd-warden")
                )

    def _readable(self) -> None:
        assert self._socket is not None
        while True:
            try:
                packet, ancillary, _, _ = self._socket.recvmsg(
                    wire.MAX_MESSAGE_BYTES * 2, socket.CMSG_SPACE(8 * 4), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            except OSError:
                self._lost.set()
                return
            fds: list[int] = []
            for level, kind, data in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    found = array.array("i")
                    found.frombytes(data[: len(data) - len(data) % found.itemsize])
                    fds.extend(found)
            if not packet:
                self._lost.set()
                return
            answer = wire.decode(packet)
            if "event" in answer:
                self._on_event(answer)
                continue
            future = self._waiting.pop(answer.get("seq") or 0, None)
            if future is None or future.done():
                for fd in fds:
                    os.close(fd)
            else:
                future.set_result((answer, fds))

    async def ask(
        self, op: str, fields: Mapping[str, Any] | None = None, fds: list[int] | None = None
    ) -> tuple[dict[str, Any], list[int]]:
        """Send one request and wait for its answer and the descriptors that come with it, which the caller owns.

        Raises:
            TryLater: the warden is away.
            AgentdError: what the warden answered.
        """
        if self._socket is None:
            raise TryLater("cannot reach the warden: it is not running", hint="systemctl start agentd-warden")
        self._seq += 1
        seq = self._seq
        packet = wire.encode({"seq": seq, "op": op, **(fields or {})})
        future: asyncio.Future[tuple[dict[str, Any], list[int]]] = asyncio.get_running_loop().create_future()
        self._waiting[seq] = future
        try:
            async with self._sending:
                await self._send(packet, fds or [])
            answer, given = await asyncio.wait_for(future, ANSWER_S)
        except TimeoutError:
            raise TryLater(f"cannot reach the warden: no answer to {op} within {ANSWER_S:.0f} s") from None
        except OSError as error:
            self._lost.set()
            raise TryLater(f"cannot reach the warden: {error.strerror}") from error
        finally:
            self._waiting.pop(seq, None)
        problem = answer.get("error")
        if problem:
            kind = _BY_CODE.get(problem["code"], Broken)
            raise kind(problem["message"], code=problem["code"], field=problem.get("field"), hint=problem.get("hint"))
        return answer, given

    async def _send(self, packet: bytes, fds: list[int]) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        while True:
            if self._socket is None:
                raise TryLater("cannot reach the warden: it went away")
            try:
                self._socket.sendmsg([packet], ancillary)
                return
            except BlockingIOError:
                await asyncio.sleep(0.002)

    # -- what can be asked ---------------------------------------------------------------------------------------------

    async def hello(self) -> dict[str, Any]:
        """Version, problems, facts about the host."""
        answer, _ = await self.ask("hello")
        return answer

    async def listen(self) -> list[socket.socket]:
        """The listening sockets of agentd.internal, made in the gateway's namespace."""
        _, fds = await self.ask("listen")
        return [socket.socket(fileno=fd) for fd in fds]

    async def make_workspace(self, name: str) -> tuple[str, tuple[str, str]]:
        """The host path of the workspace of `name`, made if there was none, and the addresses its sandbox will have."""
        answer, _ = await self.ask("workspace", {"id": name})
        return answer["path"], (answer["address4"], answer["address6"])

    async def put(self, name: str, path: str, mode: int, content: bytes) -> None:
        """Write a file into a workspace in which nothing runs."""
        fd = os.memfd_create("input", os.MFD_CLOEXEC)
        try:
            view = memoryview(content)
            while view:
                view = view[os.write(fd, view) :]
            await self.ask("put", {"id": name, "path": path, "mode": mode}, [fd])
        finally:
            os.close(fd)

    async def remove_workspace(self, name: str) -> None:
        """Take a workspace away; harmless if there is none."""
        await self.ask("remove_workspace", {"id": name})

    async def start(self, spec: wire.SandboxSpec) -> tuple[wire.SandboxStatus, list[int]]:
        """A running sandbox and the read ends of its standard output and error."""
        answer, fds = await self.ask("start", {"spec": spec.as_dict()})
        return wire.status_from(answer["status"]), fds

    async def attach(self, name: str, epoch: int) -> tuple[wire.SandboxStatus, list[int]]:
        """The status and output of a sandbox that runs already; no descriptors when its first process is gone."""
        answer, fds = await self.ask("attach", {"id": name, "epoch": epoch})
        return wire.status_from(answer["status"]), fds

    async def list(self) -> dict[str, int]:
        """Epoch by name of every sandbox there is."""
        answer, _ = await self.ask("list")
        return {one["id"]: one["epoch"] for one in answer["sandboxes"]}

    async def status(self, name: str, epoch: int) -> wire.SandboxStatus:
        """How it ended, if it did, and what the kernel counted."""
        answer, _ = await self.ask("status", {"id": name, "epoch": epoch})
        return wire.status_from(answer["status"])

    async def signal(self, name: str, epoch: int, number: int) -> None:
        """Send a signal to the main process; SIGKILL ends everything in the sandbox."""
        await self.ask("signal", {"id": name, "epoch": epoch, "signo": number})

    async def collect(self, name: str, epoch: int) -> wire.SandboxStatus:
        """End what is left and take the sandbox away."""
        answer, _ = await self.ask("collect", {"id": name, "epoch": epoch})
        return wire.status_from(answer["status"])

    async def rules(self, name: str, epoch: int) -> str:
        """The sandbox's network elements, as nft text."""
        answer, _ = await self.ask("rules", {"id": name, "epoch": epoch})
        return str(answer["text"])
