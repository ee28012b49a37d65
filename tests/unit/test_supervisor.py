"""Tasks from submission to their end, through restarts of either side, against a warden whose sandboxes the test plays."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agentd.compute.capacity import Capacity
from agentd.core.errors import AgentdError, InvalidField, NotFound, NotPermitted, TryLater, WrongState
from agentd.network.identity import Caller, Callers
from agentd.storage.episodic import EpisodicStore, Scope
from agentd.tasks import spec
from agentd.tasks import store as store_module
from agentd.tasks.output import FRAME
from agentd.tasks.states import Cause, State
from agentd.tasks.store import Record, Store
from agentd.tasks.supervisor import Principal, Tasks

_found = importlib.util.spec_from_file_location("fake_warden", Path(__file__).with_name("fake_warden.py"))
assert _found is not None and _found.loader is not None
fake = importlib.util.module_from_spec(_found)
sys.modules["fake_warden"] = fake
_found.loader.exec_module(fake)

ROOT = Principal(0, "root", True)
EVE = Principal(1234, "eve", False)


class Daemon:
    """One life of the daemon's task layer."""

    def __init__(self, directory: Path, tasks: int):
        self.store = Store(directory / "state", time.time)
        self.memory = EpisodicStore(directory / "memory", time.time)
        self.callers = Callers()
        self.tasks = Tasks(
            store=self.store,
            memory=self.memory,
            callers=self.callers,
            warden_socket=directory / "w.sock",
            logs=directory / "logs",
            log_limit_bytes=1 << 20,
            capacity=Capacity(tasks=tasks, memory_bytes=1 << 40, cpus=8),
            most_queued=50,
            journal=None,
        )
        self._running = asyncio.create_task(self.tasks.run())

    async def close(self) -> None:
        self._running.cancel()
        await asyncio.wait({self._running})
        self.store.close()
        self.memory.close()


class World:
    def __init__(self, directory: Path):
        self.directory = directory
        self.warden = fake.FakeWarden(directory / "w.sock")
        self.daemon: Daemon | None = None

    async def start(self, tasks: int = 8) -> Tasks:
        self.daemon = Daemon(self.directory, tasks)
        await until(lambda: self.daemon is not None and self.daemon.tasks.warden.connected)
        self.daemon.tasks.permit()
        return self.daemon.tasks

    async def stop(self) -> None:
        """Like kill -9: nothing is said to anyone."""
        if self.daemon is not None:
            await self.daemon.close()
            self.daemon = None


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    found = World(tmp_path)
    found.warden.up()
    yield found
    await found.stop()
    found.warden.close()


async def until(condition: Callable[[], Any], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)


async def submit(tasks: Tasks, who: Principal = ROOT, **fields: Any) -> Record:
    return await tasks.submit(spec.parse({"command": ["agent"]} | fields), who)


async def running(world: World, record: Record) -> None:
    await until(lambda: record.life.state is State.RUNNING)
    await on_disk(world, record)


async def ended(world: World, record: Record) -> Record:
    await until(lambda: record.ended)
    await on_disk(world, record)
    return record


async def on_disk(world: World, record: Record) -> None:
    """A state is seen as soon as it is decided; the lock is held until it is also kept."""
    assert world.daemon is not None
    async with asyncio.timeout(10), world.daemon.tasks._locks[record.id]:
        pass


async def output(tasks: Tasks, record: Record) -> bytes:
    text = b""
    async for frame in tasks.output(record, offset=0, follow=True, streams=frozenset({1, 2})):
        text += frame[FRAME.size :]
    return text


async def test_a_task_runs_and_succeeds_with_output_and_usage(world: World) -> None:
    tasks = await world.start()
    record = await submit(tasks, inputs=[{"path": "a/b.txt", "base64": "aGk="}], env={"X": "1"})
    await running(world, record)
    world.warden.say(record.id, b"hello\n")
    world.warden.end(record.id, code=0)
    assert (await ended(world, record)).life.state is State.SUCCEEDED
    assert await output(tasks, record) == b"hello\n"
    assert record.usage.cpu_s == 1.5
    assert world.warden.workspaces[record.id] == {"a/b.txt": b"hi"}
    await until(lambda: not world.warden.sandboxes)


async def test_the_agent_finds_the_standard_environment(world: World) -> None:
    tasks = await world.start()
    record = await submit(tasks, env={"MINE": "1", "PATH": "/mine"})
    await running(world, record)
    env = world.warden.sandboxes[record.id].spec["env"]
    assert env["OPENAI_BASE_URL"] == "http://agentd.internal/openai/v1"
    assert env["OPENAI_API_KEY"] == env["AGENTD_TOKEN"] == record.token
    assert (env["AGENTD_TASK_ID"], env["AGENTD_ATTEMPT"], env["MINE"], env["PATH"]) == (record.id, "1", "1", "/mine")


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ({"code": 3}, "exit"),
        ({"signal": 11}, "signal"),
        ({"signal": 9, "oom": True}, "oom"),
        ({"signal": 9, "lost": "x"}, "lost"),
    ],
)
async def test_a_failure_has_its_reason(world: World, end: dict[str, Any], reason: str) -> None:
    tasks = await world.start()
    record = await submit(tasks)
    await running(world, record)
    world.warden.end(record.id, **end)
    await ended(world, record)
    assert (record.life.state, record.life.reason) == (State.FAILED, reason)


async def test_time_over_gives_term_then_kill_and_expired(world: World) -> None:
    tasks = await world.start()
    record = await submit(tasks, timeout=0.1, grace=0.1)
    await until(lambda: record.id in world.warden.sandboxes)
    sandbox = world.warden.sandboxes[record.id]
    assert (await ended(world, record)).life.state is State.EXPIRED
    assert sandbox.signals == [signal.SIGTERM, signal.SIGKILL]


async def test_a_stop_that_is_heeded_needs_no_kill(world: World) -> None:
    tasks = await world.start()
    record = await submit(tasks, grace=60)
    await running(world, record)
    sandbox = world.warden.sandboxes[record.id]
    await tasks.stop(record)
    await tasks.stop(record)
    await until(lambda: sandbox.signals)
    world.warden.end(record.id, code=0)
    assert (await ended(world, record)).life.state is State.CANCELLED
    assert sandbox.signals == [signal.SIGTERM]


async def test_a_queued_task_is_cancelled_and_its_followers_end(world: World) -> None:
    tasks = await world.start(tasks=1)
    first, second = await submit(tasks), await submit(tasks)
    await running(world, first)
    following = asyncio.create_task(output(tasks, second))
    assert tasks.describe(second)["position"] == 1 and "1 tasks run" in tasks.describe(second)["waiting_for"]
    await tasks.stop(second)
    assert second.life.state is State.CANCELLED
    assert await asyncio.wait_for(following, 5) == b""
    assert world.warden.started == [first.id]


async def test_no_more_run_than_there_is_room_and_priority_decides(world: World) -> None:
    tasks = await world.start(tasks=1)
    first = await submit(tasks)
    await running(world, first)
    low = await submit(tasks, priority=-5)
    high = await submit(tasks, priority=5)
    urgent = await submit(tasks, **{"class": "interactive"})
    for record in (first, urgent, high, low):
        await running(world, record)
        assert len(world.warden.sandboxes) == 1
        world.warden.end(record.id, code=0)
        await ended(world, record)
    assert world.warden.started == [record.id for record in (first, urgent, high, low)]


async def test_nothing_starts_before_the_self_test_has_passed(world: World) -> None:
    tasks = await world.start()
    tasks.refuse("the probe failed")
    record = await submit(tasks)
    await asyncio.sleep(0)
    assert tasks.describe(record)["waiting_for"] == "the probe failed"
    assert record.life.state is State.QUEUED
    tasks.permit()
    await running(world, record)


async def test_a_start_that_is_refused_fails_with_the_reason(world: World) -> None:
    tasks = await world.start()
    world.warden.refuse_start = {"code": "exec_failed", "message": "no program 'agent' on PATH", "field": "command"}
    record = await ended(world, await submit(tasks))
    assert (record.life.reason, record.life.exit_code) == ("start_failed", 127)
    assert "no program" in (record.life.detail or "")
    assert await asyncio.wait_for(output(tasks, record), 5) == b""


async def test_a_new_daemon_adopts_what_runs_with_its_output_whole(world: World) -> None:
    record = await submit(await world.start())
    await running(world, record)
    world.warden.say(record.id, b"before ")
    await world.stop()
    world.warden.say(record.id, b"while away ")
    tasks = await world.start()
    again = tasks.find(record.id, ROOT)
    world.warden.say(record.id, b"after")
    world.warden.end(record.id, code=0)
    assert (await ended(world, again)).life.state is State.SUCCEEDED
    assert await output(tasks, again) == b"before while away after"


async def test_an_exit_while_the_daemon_was_away_is_collected(world: World) -> None:
    record = await submit(await world.start())
    await running(world, record)
    await world.stop()
    world.warden.say(record.id, b"last words")
    world.warden.end(record.id, code=42)
    tasks = await world.start()
    again = await ended(world, tasks.find(record.id, ROOT))
    assert again.life.exit_code == 42
    assert await output(tasks, again) == b"last words"
    await until(lambda: not world.warden.sandboxes)


async def test_a_task_whose_sandbox_is_gone_is_lost_and_a_stranger_is_collected(world: World) -> None:
    record = await submit(await world.start())
    await running(world, record)
    await world.stop()
    sandbox = world.warden.sandboxes.pop(record.id)
    world.warden.sandboxes["stranger"] = fake.FakeSandbox("stranger", 1, {}, sandbox.read, sandbox.write)
    tasks = await world.start()
    again = await ended(world, tasks.find(record.id, ROOT))
    assert (again.life.state, again.life.reason) == (State.FAILED, "lost")
    await until(lambda: "stranger" not in world.warden.sandboxes)


async def test_what_was_acknowledged_is_queued_after_a_crash_before_it_started(world: World) -> None:
    tasks = await world.start(tasks=1)
    first, second = await submit(tasks), await submit(tasks)
    await running(world, first)
    await world.stop()
    tasks = await world.start(tasks=1)
    world.warden.end(first.id, code=0)
    again = tasks.find(second.id, ROOT)
    await running(world, again)
    assert world.warden.started.count(second.id) == 1


async def test_a_warden_that_restarts_leaves_tasks_running(world: World) -> None:
    tasks = await world.start()
    record = await submit(tasks)
    await running(world, record)
    world.warden.down()
    world.warden.say(record.id, b"meanwhile")
    world.warden.end(record.id, code=7)
    world.warden.up()
    await ended(world, record)
    assert record.life.exit_code == 7 and await output(tasks, record) == b"meanwhile"


async def test_a_start_whose_answer_was_lost_runs_once(world: World) -> None:
    tasks = await world.start()
    world.warden.lose_start = True
    record = await submit(tasks)
    await until(lambda: world.warden.started == [record.id])
    world.warden.up()
    await running(world, record)
    world.warden.end(record.id, code=0)
    await ended(world, record)
    assert world.warden.started == [record.id] and record.life.epoch == 1


async def test_tasks_wait_while_the_warden_is_away(world: World) -> None:
    tasks = await world.start()
    world.warden.down()
    await until(lambda: not tasks.warden.connected)
    record = await submit(tasks)
    with pytest.raises(TryLater):
        await tasks.warden.hello()
    world.warden.up()
    await running(world, record)


async def test_removal_forgets_everything_of_an_ended_task(world: World) -> None:
    tasks = await world.start()
    record = await submit(tasks)
    await running(world, record)
    with pytest.raises(WrongState):
        await tasks.remove(record)
    assert world.daemon is not None
    await world.daemon.memory.put(Scope.TASK, record.id, "k", b"v", "", None, record.id)
    await tasks.remove(record, force=True)
    with pytest.raises(NotFound):
        tasks.find(record.id, ROOT)
    assert not world.warden.workspaces and not (world.directory / "logs" / record.id).exists()
    assert world.daemon.memory.get(Scope.TASK, record.id, "k") is None
    await world.stop()
    assert not list(Store(world.directory / "state", time.time).records())


async def test_an_attempt_that_is_over_may_do_nothing(world: World) -> None:
    tasks = await world.start()
    record = await submit(tasks)
    await running(world, record)
    assert world.daemon is not None
    caller = world.daemon.callers.identify("10.200.0.2", record.token)
    assert caller == Caller(record.id, 1, record.token)
    assert tasks.of_caller(caller) is record
    for stale in (
        Caller(record.id, 0, record.token),
        Caller(record.id, 2, record.token),
        Caller("other", 1, record.token),
    ):
        with pytest.raises(NotPermitted):
            tasks.of_caller(stale)
    assert world.daemon.callers.identify("10.200.0.3", record.token) is None
    assert world.daemon.callers.identify("10.200.0.2", "guess") is None
    world.warden.end(record.id, code=0)
    await ended(world, record)
    with pytest.raises(NotPermitted):
        tasks.of_caller(caller)
    await until(lambda: world.daemon is not None and world.daemon.callers.identify("10.200.0.2", caller.token) is None)


async def test_people_see_their_own_tasks_and_root_sees_all(world: World) -> None:
    tasks = await world.start()
    mine, theirs = await submit(tasks, EVE), await submit(tasks, ROOT)
    assert [record.id for record in tasks.list(EVE, everything=True)] == [mine.id]
    assert len(tasks.list(ROOT, everything=True)) == 2
    with pytest.raises(NotFound):
        tasks.find(theirs.id, EVE)
    assert tasks.find(mine.id[:6], EVE) is mine


async def test_what_could_never_run_is_refused_at_once(world: World) -> None:
    tasks = await world.start()
    for fields, name in (
        ({"cpus": 99}, "cpus"),
        ({"memory": "2000G"}, "memory"),
        ({"mounts": [{"source": "/etc", "target": "/mnt/x"}]}, "mounts[0].source"),
    ):
        with pytest.raises(InvalidField) as caught:
            await submit(tasks, **fields)
        assert caught.value.field == name
    assert tasks.list(ROOT, everything=True) == []


async def test_a_full_queue_says_try_later(world: World) -> None:
    tasks = await world.start()
    tasks.refuse("hold")
    for _ in range(50):
        await submit(tasks)
    with pytest.raises(AgentdError) as caught:
        await submit(tasks)
    assert caught.value.code == "queue_full" and caught.value.status == 503


async def test_events_are_in_order_and_can_be_taken_up_again(world: World) -> None:
    tasks = await world.start()
    record = await submit(tasks)
    await running(world, record)
    await tasks.set_progress(record, "half", 0.5)
    await tasks.set_result(record, b'{"a":1}', None)
    world.warden.end(record.id, code=0)
    await ended(world, record)
    found = [msgspec.json.decode(line) async for line in tasks.events(0, record.id, follow=False)]
    assert [event["event"] for event in found] == [
        "submitted",
        "starting",
        "started",
        "progress",
        "result",
        "succeeded",
    ]
    assert [event["seq"] for event in found] == sorted(event["seq"] for event in found)
    rest = [msgspec.json.decode(line)["event"] async for line in tasks.events(found[2]["seq"], record.id, follow=False)]
    assert rest == ["progress", "result", "succeeded"]
    assert tasks.result(record).json == b'{"a":1}'


async def test_a_follower_with_a_tail_of_zero_sees_only_what_comes(world: World) -> None:
    tasks = await world.start()
    record = await submit(tasks)
    await running(world, record)
    world.warden.say(record.id, b"old")
    await until(lambda: tasks.describe(record)["log_bytes"] == 3)
    start = tasks.output_start(record, 0, 0)
    frames = tasks.output(record, offset=start, follow=True, streams=frozenset({1, 2}))
    frames = tasks.output(record, offset=start, follow=True, streams=frozenset({1, 2}))
    world.warden.say(record.id, b"new")
    world.warden.end(record.id, code=0)
    async with asyncio.timeout(5):
        assert b"".join([frame[FRAME.size :] async for frame in frames]) == b"new"


async def test_a_kill_that_was_asked_before_a_restart_is_not_softened(world: World) -> None:
    record = await submit(await world.start(), grace=3600)
    await running(world, record)
    await world.stop()
    store = Store(world.directory / "state", time.time)
    (kept,) = store.records()
    kept.life = msgspec.structs.replace(kept.life, state=State.FINISHING, stopping=Cause.KILLED)
    await store.save(kept)
    store.close()
    sandbox = world.warden.sandboxes[record.id]
    tasks = await world.start()
    again = await ended(world, tasks.find(record.id, ROOT))
    assert (again.life.state, again.life.reason, sandbox.signals) == (State.CANCELLED, "killed", [signal.SIGKILL])


async def test_events_are_trimmed_and_what_is_left_stays_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "EVENTS_KEPT", 60)
    monkeypatch.setattr(store_module, "TRIM_SLICE", 20)
    store = Store(tmp_path / "state", time.time)
    await asyncio.gather(*(store.note(None, "denied", n=n) for n in range(200)))
    seen = [msgspec.json.decode(line)["seq"] async for line in store.events(0)]
    store.close()
    assert seen == list(range(141, 201))


async def test_a_task_whose_output_cannot_be_kept_does_not_run_and_its_room_is_free_again(world: World) -> None:
    tasks = await world.start(tasks=1)
    (world.directory / "logs").write_text("in the way")
    descriptors = len(os.listdir("/proc/self/fd"))
    record = await ended(world, await submit(tasks))
    assert (record.life.state, record.life.reason) == (State.FAILED, "start_failed")
    assert "output" in (record.life.detail or "")
    await until(lambda: not world.warden.sandboxes)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    (world.directory / "logs").unlink()
    await running(world, await submit(tasks))


async def test_a_life_of_tasks_leaves_no_descriptor_and_no_thread(world: World) -> None:
    tasks = await world.start()
    first = await submit(tasks)
    await running(world, first)
    world.warden.end(first.id, code=0)
    await ended(world, first)
    await until(lambda: not world.warden.sandboxes)
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for record in [await submit(tasks, inputs=[{"path": "x", "base64": "aGk="}]) for _ in range(6)]:
        await running(world, record)
        world.warden.say(record.id, b"hello")
        world.warden.end(record.id, code=1)
        await ended(world, record)
    await until(lambda: not world.warden.sandboxes)
    await until(lambda: (len(os.listdir("/proc/self/fd")), threading.active_count()) == before)


async def test_a_full_disk_delays_a_transition_and_loses_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from agentd.tasks import supervisor

    monkeypatch.setattr(supervisor, "STORE_RETRY_S", 0.01)
    tasks = await world.start()
    record = await submit(tasks)
    await running(world, record)
    assert world.daemon is not None
    save, refusals = world.daemon.store.save, []

    async def full_twice(*arguments: Any, **fields: Any) -> None:
        if len(refusals) < 2:
            refusals.append(arguments)
            raise TryLater("cannot write to the store: no space", code="store_full")
        await save(*arguments, **fields)

    monkeypatch.setattr(world.daemon.store, "save", full_twice)
    world.warden.end(record.id, code=4)
    await until(lambda: not world.warden.sandboxes)
    assert len(refusals) == 2
    await world.stop()
    (kept,) = Store(world.directory / "state", time.time).records()
    assert (kept.life.state, kept.life.exit_code) == (State.FAILED, 4)
