"""`agentctl result`: what the task handed in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from agentd.cli.call import Call, Parser, task_path
from agentd.cli.failures import Failure
from agentd.cli.terminal import harmless

EXAMPLES = """
agentctl result k7m2
agentctl result -o report.md k7m2
agentctl result --json k7m2 | jq .result
"""


def arguments(parser: Parser) -> None:
    """One id and where to."""
    parser.add_argument("id", metavar="ID", help="a task's id or the beginning of it")
    parser.add_argument("-o", "--output", metavar="FILE", help="write it there instead of to stdout")


def run(call: Call) -> int:
    """Writes the result: its text if it has one, else its JSON; with `--json` the whole answer."""
    answer = call.client.call("GET", task_path(call.args.id, "/result"))
    where = call.args.output
    if where is not None and where != "-":
        text = json.dumps(answer, indent=2) + "\n" if call.json else text_of(answer)
        try:
            Path(where).write_text(text, encoding="utf-8", errors="surrogatepass")
        except OSError as error:
            raise Failure(f"cannot write the result to {where}: {error.strerror}") from error
        return 0
    if call.json:
        call.out.document(answer)
        return 0
    text = text_of(answer)
    if call.out.is_tty:  # what a terminal acts on is shown, but line ends and tabs stay what they are
        text = "\n".join("\t".join(map(harmless, line.split("\t"))) for line in text.split("\n"))
    call.out.stream.write(text)
    call.out.stream.flush()
    return 0


def text_of(answer: dict[str, Any]) -> str:
    """The result as a file would hold it, with a newline at its end."""
    text = answer.get("text")
    if text is None:
        result = answer.get("result")
        text = result if isinstance(result, str) else json.dumps(result, indent=2, ensure_ascii=False)
    return text if text.endswith("\n") else text + "\n"
