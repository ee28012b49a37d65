"""`agentctl submit`: the task is on the daemon's disk when its id is printed."""

from __future__ import annotations

from typing import Any

from agentd.cli import taskspec
from agentd.cli.call import Call, Parser
from agentd.cli.connection import answered
from agentd.cli.failures import AnswerLost

EXAMPLES = """
agentctl submit -- python3 agent.py
agentctl submit task.toml
agentctl submit --class batch --timeout 2h --input notes.md task.toml
id=$(agentctl submit --env OPENAI_MODEL=gpt-4o-mini --memory 512M -- python3 agent.py)
generate-task | agentctl submit -
"""


def arguments(parser: Parser) -> None:
    """Those of a task."""
    taskspec.arguments(parser)


def run(call: Call) -> int:
    """Prints the id."""
    task = submit(call)
    if call.json:
        call.out.document(task)
    else:
        call.out.line(str(task["id"]))
    return 0


def submit(call: Call) -> dict[str, Any]:
    """The task as the daemon accepted it.

    Raises:
        Unreachable: there is no daemon.
        AnswerLost: not retried, since the task may have been accepted all the same.
    """
    body = taskspec.body_of(call.args, call.command)
    try:
        with call.client.open("POST", "/v1/tasks", body, timeout_s=60.0) as exchange:
            raw = exchange.read(60.0)
            return answered(exchange.status or 0, raw)
    except AnswerLost as failure:
        raise AnswerLost(
            f"{failure.message}; whether the task was accepted is not known",
            hint="`agentctl ps -a` shows whether it was",
        ) from failure
