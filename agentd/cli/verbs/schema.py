"""`agentctl schema task`: for editors and validators."""

from __future__ import annotations

import json

from agentd.cli.call import Call, Parser

EXAMPLES = """
agentctl schema task > task.schema.json
"""


def arguments(parser: Parser) -> None:
    """Of what."""
    parser.add_argument("what", choices=("task",), metavar="task", help="the only one so far")


def run(call: Call) -> int:
    """Prints the schema; it is JSON with and without `--json`."""
    schema = call.client.call("GET", f"/v1/schema/{call.args.what}")
    if call.json:
        call.out.document(schema)
    else:
        call.out.line(json.dumps(schema, indent=2))
    return 0
