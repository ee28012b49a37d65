"""What a task's end means to a shell: its states and the exit code of `run` and `wait`.

    0-119    the task's own
    120      lost: nobody knows how it ended
    122      cancelled: someone stopped it
    124      expired: its timeout passed (as coreutils' `timeout`)
    125      agentd could not start it (as `docker run`)
    128 + n  killed by signal n

A task may exit with one of these itself; a script that must tell them apart reads `state` and `reason` with
`--json`.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Any

STATES = (
    "queued",
    "starting",
    "running",
    "paused",
    "finishing",
    "succeeded",
    "failed",
    "cancelled",
    "expired",
)
ENDED = frozenset({"succeeded", "failed", "cancelled", "expired"})

EXIT_LOST = 120
EXIT_CANCELLED = 122
EXIT_EXPIRED = 124
EXIT_AGENTD = 125


def has_ended(task: Mapping[str, Any]) -> bool:
    """Whether nothing more will happen to it."""
    return task.get("state") in ENDED


def signal_number(found: int | str | None) -> int | None:
    """9 of `9`, `"KILL"` and `"SIGKILL"`; None of anything else."""
    if isinstance(found, int):
        return found
    if not found:
        return None
    if found.isdigit():
        return int(found)
    name = found.upper()
    member = signal.Signals.__members__.get(name if name.startswith("SIG") else "SIG" + name)
    return int(member) if member is not None else None


def exit_code_of(task: Mapping[str, Any]) -> int:
    """The exit code for an ended task; never 0 unless it succeeded."""
    match task.get("state"), task.get("reason"):
        case "succeeded", _:
            return 0
        case "cancelled", _:
            return EXIT_CANCELLED
        case "expired", _:
            return EXIT_EXPIRED
        case _, "lost":
            return EXIT_LOST
        case _, "start_failed":
            return EXIT_AGENTD
        case _, reason:
            number = signal_number(task.get("signal"))
            if number is None and reason == "oom":
                number = int(signal.SIGKILL)  # what the kernel's out-of-memory killer sends
            if number is not None:
                return 128 + number
            code = task.get("exit_code")
            return code if isinstance(code, int) and code != 0 else EXIT_AGENTD
