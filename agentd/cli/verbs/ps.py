"""`agentctl ps`: one line per task."""

from __future__ import annotations

import time
from typing import Any

from agentd.cli.call import Call, Parser
from agentd.cli.connection import target
from agentd.cli.outcomes import STATES
from agentd.cli.summary import progress_of, run_time_s, why
from agentd.cli.terminal import age, clip, cost, duration, harmless

EXAMPLES = """
agentctl ps                            what runs and what waits
agentctl ps -a                         what has ended, too
agentctl ps -a --state failed
agentctl stop $(agentctl ps -q --class batch)
"""
HEADER = ("ID", "NAME", "CLASS", "STATE", "AGE", "RUN", "REASON", "PROGRESS", "COST")


def arguments(parser: Parser) -> None:
    """Which tasks, and how."""
    parser.add_argument("-a", "--all", action="store_true", help="also those that have ended")
    parser.add_argument("-q", "--quiet", action="store_true", help="ids only")
    parser.add_argument("--state", choices=STATES, metavar="STATE", help=", ".join(STATES))
    parser.add_argument("--class", metavar="CLASS", help="only this class")
    parser.add_argument("--tenant", metavar="NAME", help="only this tenant")


def run(call: Call) -> int:
    """Prints the table."""
    args = call.args
    where = target("/v1/tasks", all=args.all, state=args.state, tenant=args.tenant, **{"class": getattr(args, "class")})
    answer = call.client.call("GET", where)
    tasks: list[dict[str, Any]] = answer.get("tasks", [])
    if args.quiet:
        for task in tasks:
            call.out.line(str(task["id"]))
        return 0
    if call.json:
        call.out.document(answer)
        return 0
    now = time.time()
    call.out.table(HEADER, [row_of(task, now, call.out.ellipsis) for task in tasks], state_column=HEADER.index("STATE"))
    return 0


def row_of(task: dict[str, Any], now: float, ellipsis: str = "…") -> list[str]:
    """The cells of one task. A task without a name is shown by its command."""
    name = harmless(task.get("name") or " ".join(map(str, task.get("command") or [])))
    return [
        harmless(task["id"]),
        clip(name, 24, ellipsis) or "-",
        harmless(task.get("class", "-")),
        harmless(task["state"]),
        age(task.get("submitted_at"), now),
        duration(run_time_s(task, now)),
        clip(why(task), 28, ellipsis) or "-",
        clip(progress_of(task), 36, ellipsis) or "-",
        cost(task.get("llm")),
    ]
