"""`agentctl help VERB` is `agentctl VERB --help`."""

from __future__ import annotations

from agentd.cli.call import Call, Parser, nearest
from agentd.cli.failures import UsageFailure

EXAMPLES = """
agentctl help run
"""


def arguments(parser: Parser) -> None:
    """One verb."""
    parser.add_argument("verb", metavar="VERB", help="the verb to explain")


def run(call: Call) -> int:
    """Prints its help."""
    from agentd.cli.main import VERBS, parser_of

    verb = call.args.verb
    if verb not in VERBS:
        close = nearest(verb, VERBS)
        raise UsageFailure(
            f"cannot explain {verb!r}: there is no such verb",
            hint=f"did you mean {close!r}?" if close else "`agentctl --help` lists them",
        )
    call.out.stream.write(parser_of(verb).format_help())
    call.out.stream.flush()
    return 0
