"""The task state machine, the queue and the task file: decisions over values."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentd.compute.capacity import Capacity, of
from agentd.core.errors import AgentdError, Broken, InvalidField, TooLarge
from agentd.core.wire import Exit
from agentd.tasks import queue, spec, states
from agentd.tasks.spec import TaskClass
from agentd.tasks.states import Cause, Life, State

EVENTS: list[states.Event] = [
    states.Admitted(),
    states.Started(),
    states.StartFailed("start_failed", "why", 127),
    states.NotStarted(),
    states.StopAsked(Cause.STOPPED),
    states.StopAsked(Cause.KILLED),
    states.StopAsked(Cause.TIMEOUT),
    states.Exited(Exit(code=0)),
    states.Exited(Exit(code=3)),
    states.Exited(Exit(signal=9, oom=True)),
    states.Lost(),
]


def test_every_pair_of_state_and_event_is_placed_or_declared_impossible() -> None:
    for state in State:
        for kind in states.EVENTS:
            assert kind in states.TABLE[state], (state, kind)
        for event in (event for event in EVENTS if states.TABLE[state][type(event)] != states.IMPOSSIBLE):
            life, _ = states.step(Life(state=state, epoch=1), event)
            assert life.state in State
        for event in (event for event in EVENTS if states.TABLE[state][type(event)] == states.IMPOSSIBLE):
            with pytest.raises(Broken, match=type(event).__name__):
                states.step(Life(state=state, epoch=1), event)


@given(st.lists(st.sampled_from(EVENTS), max_size=40))
def test_whatever_happens_an_end_is_final_and_a_sandbox_is_released_once(events: list[states.Event]) -> None:
    life = Life()
    launched: set[int] = set()
    released: list[int] = []
    for event in events:
        if states.TABLE[life.state][type(event)] == states.IMPOSSIBLE:
            continue
        before = life
        life, effects = states.step(life, event)
        assert life.epoch >= before.epoch
        if before.state in states.ENDED:
            assert life == before and not effects
        for effect in effects:
            if isinstance(effect, states.Launch):
                launched.add(life.epoch)
            if isinstance(effect, states.Release):
                released.append(life.epoch)
    assert len(released) == len(set(released))
    assert set(released) <= launched
    if life.state in states.ENDED:
        assert set(released) == launched


@pytest.mark.parametrize(
    ("end", "state", "reason"),
    [
        (Exit(code=0), State.SUCCEEDED, None),
        (Exit(code=3), State.FAILED, "exit"),
        (Exit(signal=11), State.FAILED, "signal"),
        (Exit(signal=9, oom=True), State.FAILED, "oom"),
        (Exit(signal=9, lost="its first process was killed"), State.FAILED, "lost"),
    ],
)
def test_how_it_ended_decides_the_state(end: Exit, state: State, reason: str | None) -> None:
    life, effects = states.step(Life(state=State.RUNNING, epoch=1), states.Exited(end))
    assert (life.state, life.reason) == (state, reason)
    assert effects == (states.Release(),)


@pytest.mark.parametrize(
    ("cause", "state"),
    [(Cause.STOPPED, State.CANCELLED), (Cause.KILLED, State.CANCELLED), (Cause.TIMEOUT, State.EXPIRED)],
)
def test_a_stop_decides_the_state_even_where_the_exit_code_is_0(cause: Cause, state: State) -> None:
    life, _ = states.step(Life(state=State.RUNNING, epoch=1), states.StopAsked(cause))
    assert life.state is State.FINISHING
    life, _ = states.step(life, states.Exited(Exit(code=0)))
    assert (life.state, life.reason) == (state, cause.value)


def test_a_stop_while_it_starts_takes_effect_once_it_runs() -> None:
    life, effects = states.step(Life(state=State.STARTING, epoch=1), states.StopAsked(Cause.STOPPED))
    assert life.state is State.STARTING and not effects
    life, effects = states.step(life, states.Started())
    assert life.state is State.FINISHING and states.Terminate() in effects


def test_the_documented_table_is_the_table() -> None:
    page = Path(__file__).parents[2] / "docs/tasks.md"
    assert states.diagram() in page.read_text()


# -- the queue -------------------------------------------------------------------------------------------------------------


ROOM = Capacity(tasks=100, memory_bytes=1 << 40, cpus=8)


@given(st.lists(st.tuples(st.sampled_from(list(TaskClass)), st.integers(-100, 100), st.booleans()), max_size=30))
def test_tasks_start_by_class_then_priority_then_age(entries: list[tuple[TaskClass, int, bool]]) -> None:
    line = queue.Queue()
    model = []
    for seq, (kind, priority, removed) in enumerate(entries):
        line.add(queue.waiting(f"t{seq}", kind, priority, seq, 1))
        if removed:
            line.remove(f"t{seq}")
        else:
            model.append(((list(TaskClass).index(kind), -priority, seq), f"t{seq}"))
    expected = [name for _, name in sorted(model)]
    assert [line.position(name) for name in expected] == list(range(1, len(expected) + 1))
    order = []
    while (found := line.next(0, 0, ROOM)[0]) is not None:
        order.append(found)
        line.remove(found)
    assert order == expected


def test_a_large_task_at_the_head_is_not_starved_by_small_ones() -> None:
    line = queue.Queue()
    line.add(queue.waiting("large", TaskClass.NORMAL, 0, 1, 900))
    line.add(queue.waiting("small", TaskClass.NORMAL, 0, 2, 1))
    room = Capacity(tasks=4, memory_bytes=1000, cpus=2)
    assert line.next(1, 500, room)[0] is None
    assert "memory" in (line.next(1, 500, room)[1] or "")
    assert line.next(0, 0, room)[0] == "large"


def test_no_more_run_than_the_host_takes() -> None:
    line = queue.Queue()
    line.add(queue.waiting("a", TaskClass.NORMAL, 0, 1, 1))
    assert line.next(4, 0, Capacity(tasks=4, memory_bytes=1000, cpus=2)) == (
        None,
        "4 tasks run, as many as this host takes",
    )


def test_capacity_leaves_memory_for_the_host_and_names_what_never_fits() -> None:
    found = of(cpus=2, memory_bytes=8 << 30)
    assert found.tasks == 16 and found.memory_bytes < 8 << 30
    assert found.refuses(found.memory_bytes, 2) is None
    assert "memory" in (found.refuses(9 << 30, 1) or "")
    assert "cpus" in (found.refuses(1, 3) or "")


# -- the task file ---------------------------------------------------------------------------------------------------------


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def test_a_command_is_enough() -> None:
    found = spec.parse({"command": ["true"]})
    assert (found.class_, found.memory_bytes, found.timeout_s, found.grace_s) == (TaskClass.NORMAL, 1 << 30, 3600, 10)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"command": []}, "command"),
        ({"command": [""]}, "command"),
        ({"command": "true"}, "command"),
        ({"comand": ["true"]}, "comand"),
        ({"class": "urgent"}, "class"),
        ({"priority": 101}, "priority"),
        ({"priority": "high"}, "priority"),
        ({"tenant": "../etc"}, "tenant"),
        ({"name": "a\x1b[31m"}, "name"),
        ({"memory": "12X"}, "memory"),
        ({"memory": "1M"}, "memory"),
        ({"cpus": 0}, "cpus"),
        ({"pids": 1}, "pids"),
        ({"timeout": "soon"}, "timeout"),
        ({"timeout": 0}, "timeout"),
        ({"grace": "2h"}, "grace"),
        ({"env": {"OPENAI_API_KEY": "sk"}}, "env.OPENAI_API_KEY"),
        ({"env": {"1A": "b"}}, "env.1A"),
        ({"inputs": [{"path": "../x", "base64": ""}]}, "inputs[0].path"),
        ({"inputs": [{"path": "x", "base64": "%%"}]}, "inputs[0].base64"),
        ({"inputs": [{"pth": "x", "base64": ""}]}, "inputs[0].pth"),
        ({"mounts": [{"source": "relative", "target": "/mnt/x"}]}, "mounts[0].source"),
        ({"labels": {"k": 1}}, "labels[...]"),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidField) as caught:
        spec.parse({"command": ["true"]} | change)
    assert caught.value.field == field
    assert caught.value.message.startswith("cannot accept the task: ") or field.startswith(("inputs", "mounts"))


def test_an_unknown_field_names_the_nearest_known_one() -> None:
    with pytest.raises(InvalidField) as caught:
        spec.parse({"command": ["true"], "memmory": 1})
    assert caught.value.code == "unknown_field" and "'memory'" in (caught.value.hint or "")


def test_inputs_over_the_limit_are_refused() -> None:
    with pytest.raises(TooLarge):
        spec.parse(
            {"command": ["true"], "inputs": [{"path": "x", "base64": encoded(bytes(spec.INPUT_LIMIT_BYTES + 1))}]}
        )


def test_the_schema_has_every_field() -> None:
    text = msgspec.json.encode(spec.schema()).decode()
    assert all(f'"{name}"' in text for name in ("command", "class", "memory", "timeout", "inputs", "mounts"))


@given(
    st.dictionaries(
        st.sampled_from(["command", "env", "memory", "timeout", "inputs", "x", "cpus"]),
        st.none() | st.text() | st.integers() | st.lists(st.text()),
    )
)
def test_anything_is_a_task_or_a_refusal(raw: dict[str, Any]) -> None:
    try:
        found = spec.parse(raw)
    except AgentdError:
        return
    assert found.command and found.memory_bytes and found.timeout_s


@pytest.mark.parametrize("before", [None, Cause.STOPPED])
def test_a_kill_while_it_starts_does_not_wait_for_the_grace(before: Cause | None) -> None:
    life, effects = states.step(Life(state=State.STARTING, epoch=1, stopping=before), states.StopAsked(Cause.KILLED))
    assert not effects
    life, effects = states.step(life, states.Started())
    assert (life.state, life.stopping) == (State.FINISHING, Cause.KILLED)
    assert effects == (states.Follow(), states.Kill())
