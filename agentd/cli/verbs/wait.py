"""`agentctl wait`: returns when all the tasks have ended, with the exit code of the first one that failed."""

from __future__ import annotations

import time
from typing import Any

from agentd.cli.call import Call, Parser, task_path
from agentd.cli.connection import target
from agentd.cli.failures import EXIT_TRY_LATER, AnswerLost, Refusal, Unreachable, UsageFailure
from agentd.cli.following import PATIENCE_S
from agentd.cli.outcomes import exit_code_of, has_ended
from agentd.core.units import parse_duration

EXAMPLES = """
agentctl wait k7m2
agentctl wait --timeout 10m k7m2 p3nd || echo "exit code $?"
"""
_SLICE_S = 30.0


def arguments(parser: Parser) -> None:
    """Ids and how long."""
    parser.add_argument("ids", nargs="+", metavar="ID", help="tasks' ids or the beginnings of them")
    parser.add_argument("--timeout", metavar="TIME", help="wait no longer than this; then the exit code is 75")


def run(call: Call) -> int:
    """Prints each id with the state it ended in."""
    deadline = None
    if call.args.timeout is not None:
        try:
            deadline = time.monotonic() + parse_duration(call.args.timeout)
        except ValueError as error:
            raise UsageFailure(f"cannot read --timeout {call.args.timeout!r}: {error}") from error
    try:
        tasks, missing = call.each(call.args.ids, lambda one: await_end(call, one, deadline))
    except KeyboardInterrupt:
        call.note("no longer waiting; the tasks are not affected")
        raise
    codes = [exit_code_of(task) for task in tasks if has_ended(task)]
    waiting = [task for task in tasks if not has_ended(task)]
    if call.json:
        call.out.document({"tasks": tasks})
    else:
        for task in tasks:
            call.out.line(f"{task['id']} {task['state']}")
    if waiting:
        call.note(f"{len(waiting)} of {len(call.args.ids)} have not ended in time")
    failed = next((code for code in codes if code), 0)
    return failed or missing or (EXIT_TRY_LATER if waiting else 0)


def await_end(call: Call, task: str, deadline: float | None) -> dict[str, Any]:
    """The task once it has ended, or as it is at the deadline. A daemon that restarts meanwhile is waited
    for.

    Raises:
        Unreachable: it was not there to begin with, or has been away for too long.
    """
    known = False
    away_since: float | None = None
    while True:
        left = _SLICE_S if deadline is None else min(_SLICE_S, max(0.0, deadline - time.monotonic()))
        try:
            where = target(task_path(task, "/wait"), timeout_s=round(left, 3))
            found = call.client.call("GET", where, timeout_s=left + 15.0)
            if known and away_since is not None:
                call.note("the daemon is back")
            known, away_since = True, None
            if has_ended(found) or (deadline is not None and time.monotonic() >= deadline):
                return found
        except (Unreachable, Refusal) as failure:
            if isinstance(failure, Refusal) and failure.status != 503:
                raise
            if not known and not isinstance(failure, AnswerLost):
                raise
            now = time.monotonic()
            if away_since is None:
                known, away_since = True, now
                call.note(f"the daemon is away; waiting up to {PATIENCE_S:g} s for it to come back")
            elif now - away_since > PATIENCE_S:
                raise
            time.sleep(0.2)
