"""`agentctl rm`: an ended task, its output and its workspace are gone afterwards."""

from __future__ import annotations

from agentd.cli.call import Call, Parser, task_path
from agentd.cli.connection import target

EXAMPLES = """
agentctl rm k7m2
agentctl rm -f k7m2                    also if it still runs
agentctl rm $(agentctl ps -aq --state succeeded)
"""


def arguments(parser: Parser) -> None:
    """Ids and force."""
    parser.add_argument("ids", nargs="+", metavar="ID", help="tasks' ids or the beginnings of them")
    parser.add_argument("-f", "--force", action="store_true", help="kill it first if it has not ended")


def run(call: Call) -> int:
    """Prints the ids of those removed."""
    force = call.args.force
    removed, code = call.each(
        call.args.ids, lambda one: call.client.call("DELETE", target(task_path(one), force=force))
    )
    if call.json:
        call.out.document({"tasks": removed})
    else:
        for one in removed:
            call.out.line(str(one["id"]))
    return code
