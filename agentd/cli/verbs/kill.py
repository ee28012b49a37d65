"""`agentctl kill`: a signal to the task's main process; KILL ends everything in the sandbox."""

from __future__ import annotations

import signal

from agentd.cli.call import Call, Parser, nearest, task_path
from agentd.cli.failures import UsageFailure
from agentd.cli.outcomes import signal_number

EXAMPLES = """
agentctl kill k7m2
agentctl kill -s USR1 k7m2
"""


def arguments(parser: Parser) -> None:
    """Ids and a signal."""
    parser.add_argument("ids", nargs="+", metavar="ID", help="tasks' ids or the beginnings of them")
    parser.add_argument(
        "-s", "--signal", default="KILL", metavar="SIG", help="a name or number, such as HUP (default: KILL)"
    )


def run(call: Call) -> int:
    """Prints the ids of those that got it."""
    body = {"signal": signal_name(call.args.signal)}
    tasks, code = call.each(call.args.ids, lambda one: call.client.call("POST", task_path(one, "/kill"), body))
    if call.json:
        call.out.document({"tasks": tasks})
    else:
        for task in tasks:
            call.out.line(str(task["id"]))
    return code


def signal_name(text: str) -> str:
    """`TERM` of `15`, `term`, `SIGTERM`.

    Raises:
        UsageFailure: there is no such signal.
    """
    try:
        return signal.Signals(signal_number(text) or -1).name.removeprefix("SIG")
    except ValueError:
        close = nearest(text.upper().removeprefix("SIG"), [one.name.removeprefix("SIG") for one in signal.Signals])
        raise UsageFailure(
            f"cannot send {text!r}: there is no such signal",
            hint=f"did you mean {close}?" if close else "`kill -l` lists them",
        ) from None
