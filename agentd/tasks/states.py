"""The life of a task as a state machine without I/O: `step(life, event) -> (life, effects)`.

The table is total: every pair of state and event is placed or declared impossible, and a test goes through all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import TypeAlias

import msgspec

from agentd.core.errors import Broken
from agentd.core.wire import Exit


class State(StrEnum):
    """Where a task is. The last four are ends."""

    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    FINISHING = "finishing"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


ENDED = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED, State.EXPIRED})


class Cause(StrEnum):
    """Why a task is being stopped."""

    STOPPED = "stopped"
    KILLED = "killed"
    TIMEOUT = "timeout"


class Life(msgspec.Struct, frozen=True):
    """What decides what may happen next."""

    state: State = State.QUEUED
    epoch: int = 0
    stopping: Cause | None = None
    reason: str | None = None
    detail: str | None = None
    exit_code: int | None = None
    signal: int | None = None


# -- events: what happened -------------------------------------------------------------------------------------------------


class Admitted(msgspec.Struct, frozen=True):
    """There is room for it."""


class Started(msgspec.Struct, frozen=True):
    """Its sandbox runs."""


class StartFailed(msgspec.Struct, frozen=True):
    """Its sandbox could not be made, and nothing is left of it."""

    reason: str
    detail: str
    exit_code: int | None = None


class NotStarted(msgspec.Struct, frozen=True):
    """The daemon or warden went away while it started, and there is no sandbox: nothing has run."""


class StopAsked(msgspec.Struct, frozen=True):
    """Somebody, or the clock, wants it to end."""

    cause: Cause


class Exited(msgspec.Struct, frozen=True):
    """Its main process has ended, and its output is complete."""

    exit: Exit


class Lost(msgspec.Struct, frozen=True):
    """There should be a sandbox and there is none (the host restarted, or it was removed behind our back)."""


Event: TypeAlias = Admitted | Started | StartFailed | NotStarted | StopAsked | Exited | Lost
EVENTS: tuple[type, ...] = (Admitted, Started, StartFailed, NotStarted, StopAsked, Exited, Lost)

# -- effects: what is to be done -------------------------------------------------------------------------------------------


class Launch(msgspec.Struct, frozen=True):
    """Make the sandbox of this epoch."""


class Follow(msgspec.Struct, frozen=True):
    """Take its output, watch its time."""


class Terminate(msgspec.Struct, frozen=True):
    """TERM, grace, KILL."""


class Kill(msgspec.Struct, frozen=True):
    """KILL at once."""


class Release(msgspec.Struct, frozen=True):
    """Take away what is left of its sandbox; its room is free."""


Effect: TypeAlias = Launch | Follow | Terminate | Kill | Release
Step: TypeAlias = Callable[[Life, Event], tuple[Life, tuple[Effect, ...]]]

_change = msgspec.structs.replace


def _admit(life: Life, _: Event) -> tuple[Life, tuple[Effect, ...]]:
    return _change(life, state=State.STARTING, epoch=life.epoch + 1), (Launch(),)


def _started(life: Life, _: Event) -> tuple[Life, tuple[Effect, ...]]:
    if life.stopping:
        stop: Effect = Kill() if life.stopping is Cause.KILLED else Terminate()
        return _change(life, state=State.FINISHING), (Follow(), stop)
    return _change(life, state=State.RUNNING), (Follow(),)


def _start_failed(life: Life, event: Event) -> tuple[Life, tuple[Effect, ...]]:
    assert isinstance(event, StartFailed)
    if life.stopping:
        return _change(life, state=_stopped_state(life.stopping), reason=life.stopping.value), (Release(),)
    return _change(life, state=State.FAILED, reason=event.reason, detail=event.detail, exit_code=event.exit_code), (
        Release(),
    )


def _not_started(life: Life, _: Event) -> tuple[Life, tuple[Effect, ...]]:
    if life.stopping:
        return _change(life, state=_stopped_state(life.stopping), reason=life.stopping.value), (Release(),)
    return _change(life, state=State.QUEUED), (Release(),)


def _cancel(life: Life, event: Event) -> tuple[Life, tuple[Effect, ...]]:
    assert isinstance(event, StopAsked)
    return _change(life, state=_stopped_state(event.cause), stopping=event.cause, reason=event.cause.value), ()


def _remember_stop(life: Life, event: Event) -> tuple[Life, tuple[Effect, ...]]:
    assert isinstance(event, StopAsked)
    harder = event.cause is Cause.KILLED
    return _change(life, stopping=event.cause if harder else life.stopping or event.cause), ()


def _stop(life: Life, event: Event) -> tuple[Life, tuple[Effect, ...]]:
    assert isinstance(event, StopAsked)
    effect: Effect = Kill() if event.cause is Cause.KILLED else Terminate()
    return _change(life, state=State.FINISHING, stopping=event.cause), (effect,)


def _stop_harder(life: Life, event: Event) -> tuple[Life, tuple[Effect, ...]]:
    assert isinstance(event, StopAsked)
    if event.cause is Cause.KILLED:
        return life, (Kill(),)
    return life, ()


def _exited(life: Life, event: Event) -> tuple[Life, tuple[Effect, ...]]:
    assert isinstance(event, Exited)
    end = event.exit
    life = _change(life, exit_code=end.code, signal=end.signal)
    if life.stopping:
        return _change(life, state=_stopped_state(life.stopping), reason=life.stopping.value), (Release(),)
    if end.code == 0:
        return _change(life, state=State.SUCCEEDED), (Release(),)
    if end.oom:
        reason, detail = "oom", "the memory limit was reached and the kernel ended a process"
    elif end.lost:
        reason, detail = "lost", end.lost
    elif end.signal is not None:
        reason, detail = "signal", f"ended by signal {end.signal}"
    else:
        reason, detail = "exit", f"exit code {end.code}"
    return _change(life, state=State.FAILED, reason=reason, detail=detail), (Release(),)


def _lost(life: Life, _: Event) -> tuple[Life, tuple[Effect, ...]]:
    if life.stopping:
        return _change(life, state=_stopped_state(life.stopping), reason=life.stopping.value), (Release(),)
    return _change(life, state=State.FAILED, reason="lost", detail="its sandbox was gone when agentd looked for it"), (
        Release(),
    )


def _same(life: Life, _: Event) -> tuple[Life, tuple[Effect, ...]]:
    return life, ()


def _stopped_state(cause: Cause) -> State:
    return State.EXPIRED if cause is Cause.TIMEOUT else State.CANCELLED


IMPOSSIBLE = "impossible"

_NEVER_RAN: dict[type, Step | str] = {
    Started: IMPOSSIBLE,
    StartFailed: IMPOSSIBLE,
    NotStarted: IMPOSSIBLE,
    Exited: IMPOSSIBLE,
    Lost: IMPOSSIBLE,
}
_ENDED: dict[type, Step | str] = {**_NEVER_RAN, Admitted: IMPOSSIBLE, StopAsked: _same}

TABLE: dict[State, dict[type, Step | str]] = {
    State.QUEUED: {**_NEVER_RAN, Admitted: _admit, StopAsked: _cancel},
    State.STARTING: {
        Admitted: IMPOSSIBLE,
        Started: _started,
        StartFailed: _start_failed,
        NotStarted: _not_started,
        StopAsked: _remember_stop,
        Exited: IMPOSSIBLE,
        Lost: IMPOSSIBLE,
    },
    State.RUNNING: {
        Admitted: IMPOSSIBLE,
        Started: IMPOSSIBLE,
        StartFailed: IMPOSSIBLE,
        NotStarted: IMPOSSIBLE,
        StopAsked: _stop,
        Exited: _exited,
        Lost: _lost,
    },
    State.FINISHING: {
        Admitted: IMPOSSIBLE,
        Started: IMPOSSIBLE,
        StartFailed: IMPOSSIBLE,
        NotStarted: IMPOSSIBLE,
        StopAsked: _stop_harder,
        Exited: _exited,
        Lost: _lost,
    },
    State.SUCCEEDED: _ENDED,
    State.FAILED: _ENDED,
    State.CANCELLED: _ENDED,
    State.EXPIRED: _ENDED,
}


def step(life: Life, event: Event) -> tuple[Life, tuple[Effect, ...]]:
    """The life after `event`, and what is to be done.

    Raises:
        Broken: the pair was declared impossible.
    """
    found = TABLE[life.state][type(event)]
    if isinstance(found, str):
        raise Broken(f"cannot apply {type(event).__name__} to a task that is {life.state}: {life!r}")
    return found(life, event)


def diagram() -> str:
    """The table as Markdown, for docs/tasks.md."""
    names = [event.__name__ for event in EVENTS]
    lines = ["| | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
    for state in State:
        cells = []
        for event in EVENTS:
            found = TABLE[state][event]
            cells.append("—" if isinstance(found, str) else "`" + found.__name__.strip("_") + "`")
        lines.append(f"| **{state}** | " + " | ".join(cells) + " |")
    return "\n".join(lines)
