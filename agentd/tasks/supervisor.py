"""The driver of the task state machine: takes events, keeps them, carries out effects, and brings daemon and warden in step.

What is acknowledged is on disk. Per task one event is applied at a time. The driver turns every outcome, failure too, into an event.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec
import structlog

from agentd.compute.capacity import Capacity
from agentd.core import ids, wire
from agentd.core.errors import AgentdError, InvalidField, NotFound, NotPermitted, TryLater, WrongState
from agentd.isolation.client import WardenClient
from agentd.llm.proxy import Call
from agentd.network.identity import Caller, Callers
from agentd.runtime import environment
from agentd.storage.episodic import EpisodicStore, Scope
from agentd.tasks import queue, states
from agentd.tasks.output import FRAME, OutputLog, oldest_offset, size_on_disk, tail_offset
from agentd.tasks.spec import TaskSpec, content
from agentd.tasks.states import Cause, Event, State
from agentd.tasks.store import Progress, Record, Result, Store

DRAIN_S = 10.0
"""How long output may take to end after the last process did."""
DIE_S = 5.0
RESOLVE_S = 1.0
STORE_RETRY_S = 1.0
RESULT_LIMIT_BYTES = 1 << 20
CPU_WEIGHTS = {"interactive": 400, "normal": 200, "batch": 50}

log = structlog.get_logger("agentd.tasks")


class OutputSink(Protocol):
    """Where a task's output goes besides, or instead of, files."""

    def line(self, task: str, stream: str, text: bytes) -> None:
        """One line."""


class Principal(msgspec.Struct, frozen=True):
    """Who asks: from the kernel, by SO_PEERCRED."""

    uid: int
    name: str
    operator: bool


class Live:
    """What the daemon holds for a task that has a sandbox."""

    def __init__(self) -> None:
        self.reading: asyncio.Task[None] | None = None
        self.timers: list[asyncio.TimerHandle] = []
        self.ending = False


class Tasks:
    """Every task of this host."""

    def __init__(
        self,
        *,
        store: Store,
        memory: EpisodicStore,
        callers: Callers,
        warden_socket: Path,
        logs: Path,
        log_limit_bytes: int,
        capacity: Capacity,
        most_queued: int,
        journal: OutputSink | None,
        clock: Callable[[], float] = time.time,
    ):
        self._store = store
        self._memory = memory
        self._callers = callers
        self._logs = logs
        self._log_limit = log_limit_bytes
        self._capacity = capacity
        self._most_queued = most_queued
        self._journal = journal
        self._clock = clock
        self._records: dict[str, Record] = {record.id: record for record in store.records()}
        self._seq = max((record.seq for record in self._records.values()), default=0)
        self._locks: dict[str, asyncio.Lock] = {}
        self._live: dict[str, Live] = {}
        self._outputs: dict[str, OutputLog] = {}
        self._ended: dict[str, asyncio.Event] = {}
        self._launching: set[str] = set()
        self._holding: dict[str, int] = {}
        self._queue = queue.Queue()
        self._poke = asyncio.Event()
        self._group: asyncio.TaskGroup | None = None
        self._stopping = False
        self.blocked: str | None = "the warden has not answered yet"
        self._permitted = False
        self._refused: str | None = None
        self.warden = WardenClient(warden_socket, self._on_event, self._on_connect)
        self.hello: dict[str, Any] = {}
        for record in self._records.values():
            if record.life.state is State.QUEUED:
                self._enqueue(record)
            elif not record.ended:
                self._holding[record.id] = record.spec.memory_bytes

    # -- running -------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Supervise until cancelled. Tasks run on without us."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                group.create_task(self.warden.run(), name="warden")
                group.create_task(self._admit(), name="admission")
                group.create_task(self._sweep(), name="sweep")
        finally:
            self._stopping = True
            for live in self._live.values():
                for timer in live.timers:
                    timer.cancel()

    def permit(self) -> None:
        """The self-test has passed: tasks may start."""
        self._permitted, self._refused, self.blocked = True, None, None
        self._poke.set()

    def refuse(self, why: str) -> None:
        """The self-test has failed: tasks wait."""
        self._permitted, self._refused, self.blocked = False, why, why

    def _spawn(self, work: Any, name: str) -> asyncio.Task[None]:
        assert self._group is not None
        return self._group.create_task(self._guarded(work, name), name=name)

    async def _guarded(self, work: Any, name: str) -> None:
        """One task's trouble must not end the supervision of the others."""
        try:
            await work
        except AgentdError as error:
            log.error("supervision failed", work=name, error=error.message)
        except Exception:
            log.exception("supervision met a bug", work=name)

    async def _sweep(self) -> None:
        while True:
            while await self._memory.sweep():
                await asyncio.sleep(0)
            await asyncio.sleep(30)

    async def _admit(self) -> None:
        while True:
            await self._poke.wait()
            self._poke.clear()
            while self.blocked is None and self.warden.connected:
                task, _ = self._queue.next(len(self._holding), sum(self._holding.values()), self._capacity)
                if task is None:
                    break
                self._queue.remove(task)
                record = self._records[task]
                self._holding[task] = record.spec.memory_bytes
                await self._apply(record, states.Admitted())

    def _enqueue(self, record: Record) -> None:
        spec = record.spec
        self._queue.add(queue.waiting(record.id, spec.class_, spec.priority, record.seq, spec.memory_bytes))
        self._poke.set()

    # -- events and effects --------------------------------------------------------------------------------------------

    async def _apply(self, record: Record, event: Event, *, epoch: int | None = None) -> None:
        """Apply one event durably, then carry out what follows. An event of an older attempt is dropped."""
        async with self._locks.setdefault(record.id, asyncio.Lock()):
            if record.id not in self._records or (epoch is not None and epoch != record.life.epoch):
                return
            before = record.life
            record.life, effects = states.step(before, event)
            now = self._clock()
            if record.life.epoch != before.epoch:
                record.token = ids.new_token()
            if isinstance(event, states.Started):
                record.started_at = record.started_at or now
            if record.ended and before.state is not record.life.state:
                record.ended_at = now
                record.token = ""
            changed = record.life.state is not before.state
            name = (
                {State.RUNNING: "started", State.QUEUED: "requeued"}.get(record.life.state, record.life.state.value)
                if changed
                else None
            )
            fields: dict[str, Any] = {"attempt": record.life.epoch}
            if record.life.reason and changed:
                fields |= {
                    "reason": record.life.reason,
                    "detail": record.life.detail,
                    "exit_code": record.life.exit_code,
                }
            if changed or record.life != before:
                await self._keep(record, name, {key: value for key, value in fields.items() if value is not None})
            if changed:
                log.info(
                    f"task {name}",
                    AGENTD_TASK=record.id,
                    AGENTD_TENANT=record.spec.tenant,
                    AGENTD_EVENT=name,
                    AGENTD_ATTEMPT=record.life.epoch,
                    reason=record.life.reason,
                    detail=record.life.detail,
                )
            if record.ended and changed:
                self._queue.remove(record.id)
                self._ended.setdefault(record.id, asyncio.Event()).set()
                if record.id not in self._live:  # it never ran: whoever follows its output has seen all of it
                    self._output(record.id).finish()
                if not effects:
                    self._free(record)
        if record.life.state is State.QUEUED and changed:
            self._enqueue(record)
        for effect in effects:
            self._carry_out(record, effect)

    async def _keep(self, record: Record, event: str | None, fields: dict[str, Any]) -> None:
        """Put a transition on disk. What has happened cannot be refused: while the disk is full this waits, and the task with it."""
        while True:
            try:
                await self._store.save(record, event, **fields)
                return
            except TryLater as error:
                log.error("a transition waits for room on the disk", AGENTD_TASK=record.id, error=error.message)
                await asyncio.sleep(STORE_RETRY_S)

    def _carry_out(self, record: Record, effect: states.Effect) -> None:
        epoch = record.life.epoch
        match effect:
            case states.Launch():
                self._launching.add(record.id)
                self._spawn(self._launch(record, epoch), f"launch {record.id}")
            case states.Follow():
                self._watch_time(record)
            case states.Terminate():
                self._spawn(self._terminate(record, epoch), f"stop {record.id}")
            case states.Kill():
                self._spawn(self._kill(record, epoch), f"kill {record.id}")
            case states.Release():
                self._spawn(self._release(record, epoch), f"release {record.id}")

    def _watch_time(self, record: Record) -> None:
        live = self._live.setdefault(record.id, Live())
        due = (record.started_at or self._clock()) + record.spec.timeout_s - self._clock()

        def expire() -> None:
            self._spawn(
                self._apply(record, states.StopAsked(Cause.TIMEOUT), epoch=record.life.epoch), f"expire {record.id}"
            )

        live.timers.append(asyncio.get_running_loop().call_later(max(0.0, due), expire))

    async def _launch(self, record: Record, epoch: int) -> None:
        spec = record.spec
        try:
            record.workspace, addresses = await self.warden.make_workspace(record.id)
            for path, mode, data in self._store.inputs(record.id):
                await self.warden.put(record.id, path, mode, data)
            sandbox = wire.SandboxSpec(
                id=record.id,
                epoch=epoch,
                tenant=spec.tenant,
                argv=tuple(spec.command),
                env=environment.of(record.id, epoch, record.token, spec.env),
                cwd=environment.WORKSPACE,
                limits=spec.limits,
                mounts=tuple(wire.Mount(mount.source, mount.target, mount.read_only) for mount in spec.mounts),
                cpu_weight=CPU_WEIGHTS[spec.class_.value],
            )
            self._callers.dismiss(record.id)
            self._callers.admit(addresses, Caller(record.id, epoch, record.token))
            status, pipes = await self.warden.start(sandbox)
        except TryLater as error:
            # Whether the sandbox exists is known once both are in step again; a new connection sees to that by itself.
            self._launching.discard(record.id)
            log.warning("a start was interrupted", AGENTD_TASK=record.id, error=error.message)
            if self.warden.connected:
                self._spawn(self._resolve(record, epoch), f"resolve {record.id}")
            return
        except AgentdError as error:
            self._launching.discard(record.id)
            code = 127 if error.code == "exec_failed" else 126
            await self._apply(record, states.StartFailed("start_failed", error.message, code), epoch=epoch)
            return
        try:
            self._begin(record, status, pipes)
        except OSError as error:  # no room for its output: better not to run than to run unseen
            for pipe in pipes:
                os.close(pipe)
            self._live.pop(record.id, None)
            self._launching.discard(record.id)
            detail = f"cannot keep its output: {error.strerror}"
            await self._apply(record, states.StartFailed("start_failed", detail, 126), epoch=epoch)
            return
        self._launching.discard(record.id)
        await self._apply(record, states.Started(), epoch=epoch)

    async def _resolve(self, record: Record, epoch: int) -> None:
        """After a start without an answer: find out whether the sandbox was made."""
        await asyncio.sleep(RESOLVE_S)
        if self.warden.connected and record.life.state is State.STARTING and record.life.epoch == epoch:
            await self._adopt_one(record, await self.warden.list())

    def _begin(self, record: Record, status: wire.SandboxStatus, pipes: list[int]) -> None:
        """From now on its output is taken and its address is known."""
        self._callers.admit((status.address4, status.address6), Caller(record.id, record.life.epoch, record.token))
        live = self._live[record.id] = Live()
        output = self._output(record.id)
        output.complete = False
        output.open()
        if len(pipes) == 2:
            work = self._to_journal(record.id, output, pipes) if self._journal else output.take(pipes[0], pipes[1])
            live.reading = self._spawn(work, f"output {record.id}")
        else:
            output.finish()
        if status.exit is not None:
            self._spawn(self._ended_in_sandbox(record, record.life.epoch, status.exit), f"end {record.id}")

    async def _to_journal(self, task: str, output: OutputLog, pipes: list[int]) -> None:
        assert self._journal is not None
        try:
            async with asyncio.TaskGroup() as group:
                for name, pipe in zip(("stdout", "stderr"), pipes, strict=True):
                    group.create_task(self._lines(task, name, pipe))
        finally:
            output.finish()

    async def _lines(self, task: str, name: str, pipe: int) -> None:
        assert self._journal is not None
        reader = asyncio.StreamReader(limit=1 << 16)
        loop = asyncio.get_running_loop()
        os.set_blocking(pipe, False)
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(pipe, "rb", 0)
        )
        try:
            while True:
                try:
                    line = await reader.readuntil(b"\n")
                except asyncio.IncompleteReadError as end:
                    if end.partial:
                        self._journal.line(task, name, end.partial)
                    return
                except asyncio.LimitOverrunError as long:
                    line = await reader.read(long.consumed or 1)
                self._journal.line(task, name, line.rstrip(b"\n"))
        finally:
            transport.close()

    def _on_event(self, event: dict[str, Any]) -> None:
        if event.get("event") == "exited":
            record = self._records.get(event["id"])
            if record is not None and record.life.epoch == event["epoch"]:
                self._spawn(
                    self._ended_in_sandbox(record, event["epoch"], wire.Exit(**event["exit"])), f"end {record.id}"
                )

    async def _ended_in_sandbox(self, record: Record, epoch: int, end: wire.Exit) -> None:
        """Its main process has ended: let the output finish, count, and only then say so. Whatever is missing is found at the next start."""
        while record.id in self._launching:
            await asyncio.sleep(0.002)
        async with self._locks.setdefault(record.id, asyncio.Lock()):
            live = self._live.get(record.id)
            if live is None or live.ending or record.life.state not in (State.RUNNING, State.FINISHING, State.STARTING):
                return
            live.ending = True
        if live.reading is not None:
            await asyncio.wait({live.reading}, timeout=DRAIN_S)
        try:
            status = await self.warden.status(record.id, epoch)
            record.usage = status.usage
            end = status.exit or end
        except (TryLater, NotFound) as error:
            live.ending = False
            if isinstance(error, TryLater):
                return  # the next connection brings the end again
        await self._apply(record, states.Exited(end), epoch=epoch)

    async def _terminate(self, record: Record, epoch: int) -> None:
        if not await self._signal(record, epoch, signal.SIGTERM):
            return
        if await self._ends_within(record, record.spec.grace_s):
            return
        await self._kill(record, epoch)

    async def _kill(self, record: Record, epoch: int) -> None:
        if not await self._signal(record, epoch, signal.SIGKILL) or await self._ends_within(record, DIE_S):
            return
        log.warning("a task does not end", AGENTD_TASK=record.id)
        await self._apply(
            record, states.Exited(wire.Exit(signal=int(signal.SIGKILL), ended_at=self._clock())), epoch=epoch
        )

    async def _signal(self, record: Record, epoch: int, number: int) -> bool:
        """False if there is no such sandbox any more."""
        while record.life.epoch == epoch and not record.ended:
            try:
                await self.warden.signal(record.id, epoch, number)
                return True
            except TryLater:
                await asyncio.sleep(0.2)
            except NotFound:
                return False
        return False

    async def _ends_within(self, record: Record, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._ended.setdefault(record.id, asyncio.Event()).wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def _release(self, record: Record, epoch: int) -> None:
        """Take the sandbox away. If the warden is away, the next connection does it."""
        live = self._live.pop(record.id, None)
        if live is not None:
            for timer in live.timers:
                timer.cancel()
            if live.reading is not None and not live.reading.done():
                live.reading.cancel()
        self._callers.dismiss(record.id)
        try:
            await self.warden.collect(record.id, epoch)
        except (NotFound, TryLater):
            pass
        finally:
            if record.life.epoch == epoch:
                self._free(record)

    def _free(self, record: Record) -> None:
        """Its room may go to another."""
        self._holding.pop(record.id, None)
        self._poke.set()

    # -- in step with the warden ---------------------------------------------------------------------------------------

    async def _on_connect(self) -> None:
        self.hello = await self.warden.hello()
        problems = self.hello["problems"]
        if problems:
            self.blocked = problems[0]["message"]
            log.error("the host cannot run tasks", problem=self.blocked, remedy=problems[0]["hint"])
            return
        found = await self.warden.list()
        for name, epoch in found.items():
            record = self._records.get(name)
            if record is None or record.ended or record.life.epoch != epoch:
                try:
                    await self.warden.collect(name, epoch)
                except (NotFound, WrongState) as error:
                    log.warning("a leftover sandbox could not be collected", sandbox=name, error=error.message)
        for record in list(self._records.values()):
            if (
                record.life.state in (State.STARTING, State.RUNNING, State.FINISHING)
                and record.id not in self._launching
            ):
                try:
                    await self._adopt_one(record, found)
                except TryLater:
                    raise  # the warden went away: the next connection begins again
                except (AgentdError, OSError) as error:  # one that cannot be adopted must not keep the others waiting
                    log.error("a task could not be adopted", AGENTD_TASK=record.id, error=str(error))
        if self._permitted:
            self.blocked = None
        elif self._refused is None:
            self.blocked = "the self-test has not passed yet"
        asyncio.get_running_loop().call_soon(self._poke.set)  # after the client has noted that it is connected

    async def _adopt_one(self, record: Record, found: dict[str, int]) -> None:
        epoch = record.life.epoch
        if found.get(record.id) != epoch:
            await self._apply(
                record, states.NotStarted() if record.life.state is State.STARTING else states.Lost(), epoch=epoch
            )
            return
        record.workspace = record.workspace or f"{self.hello.get('workspaces', '')}/{record.id}"
        live = self._live.get(record.id)
        status, pipes = await self.warden.attach(record.id, epoch)
        if live is not None and live.reading is not None and not live.reading.done():
            for fd in pipes:  # only the warden restarted: we are reading already
                os.close(fd)
            if status.exit is not None:
                self._spawn(self._ended_in_sandbox(record, epoch, status.exit), f"end {record.id}")
            return
        self._begin(record, status, pipes)
        if record.life.state is State.STARTING:
            await self._apply(record, states.Started(), epoch=epoch)
            return
        await self._store.note(record.id, "adopted", attempt=epoch)
        log.info("task adopted", AGENTD_TASK=record.id, AGENTD_TENANT=record.spec.tenant, AGENTD_EVENT="adopted")
        self._watch_time(record)
        if record.life.state is State.FINISHING and status.exit is None:
            stop = self._kill if record.life.stopping is Cause.KILLED else self._terminate
            self._spawn(stop(record, epoch), f"stop {record.id}")

    # -- what can be asked ---------------------------------------------------------------------------------------------

    def find(self, name: str, who: Principal) -> Record:
        """The task whose id is or begins with `name`, if `who` may see it.

        Raises:
            NotFound, RequestError: none, or several.
        """
        found = self._records.get(name)
        if found is None:
            matches = (
                [record for key, record in self._records.items() if key.startswith(name) and self._sees(record, who)]
                if name
                else []
            )
            if len(matches) > 1:
                raise WrongState(
                    f"cannot tell which task {name!r} is: {len(matches)} begin so",
                    code="ambiguous_id",
                    hint="write more of the id",
                )
            found = matches[0] if matches else None
        if found is None or not self._sees(found, who):
            raise NotFound(f"cannot find task {name!r}", code="no_such_task", hint="agentctl ps -a lists them")
        return found

    @staticmethod
    def _sees(record: Record, who: Principal) -> bool:
        return who.operator or record.uid == who.uid

    def list(
        self,
        who: Principal,
        *,
        everything: bool = False,
        state: str | None = None,
        tenant: str | None = None,
        kind: str | None = None,
    ) -> list[Record]:
        """Tasks that `who` may see, oldest first; without `everything` or `state` only those that have not ended."""
        if state is not None and state not in {one.value for one in State}:
            raise InvalidField(
                f"cannot list tasks: state: {state!r} is none", field="state", hint=f"permitted: {', '.join(State)}"
            )
        found = [
            record
            for record in self._records.values()
            if self._sees(record, who)
            and (everything or state is not None or not record.ended)
            and (state is None or record.life.state == state)
            and (tenant is None or record.spec.tenant == tenant)
            and (kind is None or record.spec.class_ == kind)
        ]
        return sorted(found, key=lambda record: record.seq)

    async def submit(self, spec: TaskSpec, who: Principal) -> Record:
        """A queued task, on disk when this returns.

        Raises:
            InvalidField: it could never run here.
            TryLater: the queue is full.
        """
        never = self._capacity.refuses(spec.memory_bytes, spec.cpus)
        if never:
            raise InvalidField(
                f"cannot accept the task: {never}",
                field=never.split(":")[0],
                hint="ask for less; agentctl doctor shows what the host has",
            )
        roots = self.hello.get("mount_roots", [])
        for index, mount in enumerate(spec.mounts):
            if not any(mount.source == root or mount.source.startswith(root + "/") for root in roots):
                raise InvalidField(
                    f"cannot accept the task: mounts[{index}].source: {mount.source!r} is outside the allowed roots ({', '.join(roots) or 'none'})",
                    field=f"mounts[{index}].source",
                    hint="root can add it to mount_roots in warden.toml",
                )
        if len(self._queue) >= self._most_queued:
            raise TryLater(f"cannot accept the task: {self._most_queued} are queued already", code="queue_full")
        files = [(one.path, one.mode, content(one)) for one in spec.inputs]
        slim = msgspec.structs.replace(spec, inputs=[msgspec.structs.replace(one, base64="") for one in spec.inputs])
        task = ids.new_task_id()
        while task in self._records:
            task = ids.new_task_id()
        self._seq += 1
        record = Record(id=task, seq=self._seq, spec=slim, user=who.name, uid=who.uid, submitted_at=self._clock())
        await self._store.submit(record, files)
        self._records[task] = record
        log.info("task submitted", AGENTD_TASK=task, AGENTD_TENANT=spec.tenant, AGENTD_EVENT="submitted", user=who.name)
        self._enqueue(record)
        return record

    async def stop(self, record: Record, grace_s: float | None = None) -> None:
        """TERM, grace, KILL; a queued task is cancelled. Harmless when it has ended."""
        if grace_s is not None:
            record.spec = msgspec.structs.replace(record.spec, grace=grace_s)
        await self._apply(record, states.StopAsked(Cause.STOPPED))

    async def kill(self, record: Record, number: int) -> None:
        """Send a signal to the main process; SIGKILL ends the task.

        Raises:
            WrongState: there is nothing to signal.
        """
        if number == signal.SIGKILL:
            await self._apply(record, states.StopAsked(Cause.KILLED))
            return
        if record.life.state not in (State.RUNNING, State.FINISHING):
            raise WrongState(f"cannot signal task {record.id}: it is {record.life.state}")
        await self.warden.signal(record.id, record.life.epoch, number)

    async def remove(self, record: Record, *, force: bool = False) -> None:
        """Forget an ended task with its output and workspace.

        Raises:
            WrongState: it has not ended and `force` is not set.
        """
        if not record.ended:
            if not force:
                raise WrongState(
                    f"cannot remove task {record.id}: it is {record.life.state}",
                    hint="stop it first, or agentctl rm -f",
                )
            await self.kill(record, signal.SIGKILL)
            if not await self._ends_within(record, DIE_S + DRAIN_S):
                raise TryLater(f"cannot remove task {record.id}: it has not ended yet")
        deadline = self._clock() + DIE_S
        while record.id in self._holding and self._clock() < deadline:
            await asyncio.sleep(0.01)
        if record.life.epoch:
            await self.warden.remove_workspace(record.id)
        await self._store.remove(record.id)
        await self._memory.forget(Scope.TASK, record.id)
        await asyncio.to_thread(shutil.rmtree, self._logs / record.id, True)
        for book in (self._records, self._locks, self._outputs, self._ended):
            book.pop(record.id, None)

    async def wait(self, record: Record, seconds: float) -> None:
        """Return when it has ended, or after `seconds`."""
        if not record.ended:
            await self._ends_within(record, seconds)

    async def fresh_usage(self, record: Record) -> None:
        """Read the counters of a running task; harmless when that is not possible."""
        if record.life.state in (State.RUNNING, State.FINISHING):
            try:
                record.usage = (await self.warden.status(record.id, record.life.epoch)).usage
            except AgentdError:
                pass

    def _output(self, task: str) -> OutputLog:
        if task not in self._outputs:
            self._outputs[task] = OutputLog(self._logs / task, self._log_limit, self._clock)
        return self._outputs[task]

    def output_start(self, record: Record, offset: int, tail: int | None) -> int:
        """Where reading its output begins: `offset`, or so that `tail` lines are left; never before what is kept."""
        directory = self._logs / record.id
        return max(offset if tail is None else tail_offset(directory, tail), oldest_offset(directory))

    def output(self, record: Record, *, offset: int, follow: bool, streams: frozenset[int]) -> AsyncIterator[bytes]:
        """Frames of its output from `offset`."""
        log_of = self._output(record.id)
        if record.ended:
            log_of.complete = True
        elif record.life.state is State.QUEUED:
            log_of.complete = False
        return self._until_ended(record, log_of, offset, follow, streams)

    async def _until_ended(
        self, record: Record, log_of: OutputLog, offset: int, follow: bool, streams: frozenset[int]
    ) -> AsyncIterator[bytes]:
        ended = self._ended.setdefault(record.id, asyncio.Event())
        if record.ended:
            ended.set()
        async for frame in log_of.read(offset, follow=follow and not record.ended, streams=streams):
            yield frame
        if follow:
            while not record.ended:
                await ended.wait()

    @property
    def output_in_journal(self) -> bool:
        """Whether output goes to the journal instead of files."""
        return self._journal is not None

    def events(self, after: int, task: str | None, *, follow: bool) -> AsyncIterator[bytes]:
        """Events as JSON lines."""
        return self._store.events(after, task, follow=follow)

    def result(self, record: Record) -> Result:
        """What it left.

        Raises:
            NotFound: nothing yet.
        """
        found = self._store.result(record.id)
        if found is None:
            raise NotFound(f"cannot show the result of {record.id}: it left none", code="no_result")
        return found

    def describe(self, record: Record, *, with_spec: bool = True) -> dict[str, Any]:
        """The task object of the control API."""
        life = record.life
        now = self._clock()
        position = self._queue.position(record.id)
        _, waiting_for = (
            self._queue.next(len(self._holding), sum(self._holding.values()), self._capacity)
            if position
            else (None, None)
        )
        usage = msgspec.to_builtins(record.usage)
        usage["wall_s"] = round((record.ended_at or now) - record.started_at, 3) if record.started_at else 0.0
        found: dict[str, Any] = {
            "id": record.id,
            "name": record.spec.name,
            "class": record.spec.class_.value,
            "priority": record.spec.priority,
            "tenant": record.spec.tenant,
            "user": record.user,
            "state": life.state.value,
            "reason": life.reason,
            "detail": life.detail,
            "exit_code": life.exit_code,
            "signal": life.signal,
            "attempt": life.epoch,
            "submitted_at": record.submitted_at,
            "started_at": record.started_at,
            "ended_at": record.ended_at,
            "position": position,
            "waiting_for": (self.blocked or waiting_for) if position else None,
            "progress": msgspec.to_builtins(record.progress),
            "has_result": record.has_result,
            "command": record.spec.command,
            "usage": usage,
            "llm": msgspec.to_builtins(record.llm),
            "workspace": record.workspace,
            "log_bytes": size_on_disk(self._logs / record.id),
        }
        if with_spec:
            found["spec"] = msgspec.to_builtins(record.spec)
        return found

    # -- what an agent says of itself ----------------------------------------------------------------------------------

    def of_caller(self, caller: Caller) -> Record:
        """The record of the attempt that calls.

        Raises:
            NotPermitted: a newer attempt exists, or it has ended.
        """
        record = self._records.get(caller.task)
        if record is None or record.life.epoch != caller.epoch or record.ended:
            raise NotPermitted(
                f"cannot act for task {caller.task}: attempt {caller.epoch} is over", code="stale_attempt"
            )
        return record

    async def set_progress(self, record: Record, text: str, fraction: float | None) -> None:
        """Show where it stands."""
        record.progress = Progress(text, fraction, self._clock())
        await self._store.save(record, "progress", text=text, fraction=fraction)

    async def set_result(self, record: Record, value: bytes, text: str | None) -> None:
        """Keep its result; a later one replaces it."""
        record.has_result = True
        await self._store.save_result(record, Result(value, text, self._clock()))

    async def record_call(self, call: Call) -> None:
        """Enter a model call into the ledger."""
        record = self._records.get(call.task)
        if record is None:
            return
        totals = record.llm
        totals.requests += 1
        totals.input_tokens += call.usage.input_tokens
        totals.output_tokens += call.usage.output_tokens
        totals.cached_tokens += call.usage.cached_tokens
        totals.cost_usd += call.cost_usd or 0.0
        totals.cost_known = totals.cost_known and call.cost_usd is not None
        totals.models = totals.models | {call.model: totals.models.get(call.model, 0) + 1}
        totals.scripted = totals.scripted or call.scripted
        await self._store.save_call(record, call)


__all__ = ["FRAME", "OutputSink", "Principal", "Tasks"]
