"""`agentctl logs`: a task's output, byte for byte; what it wrote to stderr goes to stderr."""

from __future__ import annotations

import argparse

from agentd.cli.call import Call, Parser
from agentd.cli.following import Output, Printer

EXAMPLES = """
agentctl logs k7m2
agentctl logs -f --tail 20 k7m2
agentctl logs --stream stderr -t k7m2
agentctl logs k7m2 | less              escape sequences of a program you do not trust stay harmless there
"""


def _lines(text: str) -> int:
    count = int(text)
    if count < 0:
        raise argparse.ArgumentTypeError("below 0")
    return count


def arguments(parser: Parser) -> None:
    """Which part of it, and whether to stay."""
    parser.add_argument("id", metavar="ID", help="a task's id or the beginning of it")
    parser.add_argument(
        "-f", "--follow", action="store_true", help="until the task has ended; Ctrl-C only stops looking"
    )
    parser.add_argument("-n", "--tail", type=_lines, metavar="N", help="begin with the last N lines")
    parser.add_argument(
        "--stream",
        choices=("all", "stdout", "stderr"),
        default="all",
        metavar="STREAM",
        help="stdout, stderr or all",
    )
    parser.add_argument("-t", "--timestamps", action="store_true", help="put the time (UTC) before every line")


def run(call: Call) -> int:
    """Writes the output."""
    args = call.args
    output = Output(
        call.client,
        args.id,
        follow=args.follow,
        streams=("stdout", "stderr") if args.stream == "all" else (args.stream,),
        tail=args.tail,
        notice=call.note,
    )
    printer = Printer(call.out, call.err, as_json=call.json, timestamps=args.timestamps)
    try:
        while (frames := output.poll(30.0)) is not None:
            for frame in frames:
                printer.write(frame)
    finally:
        output.close()
    return 0
