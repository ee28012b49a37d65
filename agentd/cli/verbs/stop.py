"""`agentctl stop`: TERM, then KILL after the grace. A queued task is cancelled."""

from __future__ import annotations

from agentd.cli.call import Call, Parser, task_path
from agentd.cli.failures import UsageFailure
from agentd.core.units import parse_duration

EXAMPLES = """
agentctl stop k7m2
agentctl stop --grace 1m k7m2 p3nd     let it save its work
agentctl stop k7m2 && agentctl wait k7m2
"""


def arguments(parser: Parser) -> None:
    """Ids and a grace."""
    parser.add_argument("ids", nargs="+", metavar="ID", help="tasks' ids or the beginnings of them")
    parser.add_argument("--grace", metavar="TIME", help="between TERM and KILL, instead of the task's own")


def run(call: Call) -> int:
    """Prints the ids of those that are being stopped; does not wait for their end."""
    body: dict[str, float] = {}
    if call.args.grace is not None:
        try:
            body["grace_s"] = parse_duration(call.args.grace)
        except ValueError as error:
            raise UsageFailure(f"cannot read --grace {call.args.grace!r}: {error}") from error
    tasks, code = call.each(call.args.ids, lambda one: call.client.call("POST", task_path(one, "/stop"), body))
    if call.json:
        call.out.document({"tasks": tasks})
    else:
        for task in tasks:
            call.out.line(str(task["id"]))
    return code
