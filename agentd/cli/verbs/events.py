"""`agentctl events`: the daemon's journal of what happened to tasks."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

from agentd.cli.call import Call, Parser
from agentd.cli.connection import Exchange, answered, target
from agentd.cli.failures import Failure, Refusal, Unreachable
from agentd.cli.following import PATIENCE_S
from agentd.cli.terminal import STATE_COLORS, Terminal, harmless

EXAMPLES = """
agentctl events
agentctl events -f k7m2
agentctl events -f --json --after 1200 | my-notifier
"""


def arguments(parser: Parser) -> None:
    """Which, and whether to stay."""
    parser.add_argument("id", nargs="?", metavar="ID", help="only those of this task")
    parser.add_argument("-f", "--follow", action="store_true", help="stay for what happens next; Ctrl-C ends it")
    parser.add_argument("--after", type=int, metavar="N", help="only those with a sequence number above N")


def run(call: Call) -> int:
    """Prints a line per event; with `--json` as the daemon sent it."""
    for event in stream(call, follow=call.args.follow, after=call.args.after, task=call.args.id):
        if call.json:
            call.out.record(event)
        else:
            call.out.line(line_of(event, call.out))
    return 0


def line_of(event: dict[str, Any], out: Terminal) -> str:
    """Time, task, event, and what else is in it."""
    name = str(event.get("event"))
    rest = " ".join(
        f"{harmless(key)}={harmless(value if isinstance(value, str) else json.dumps(value))}"
        for key, value in event.items()
        if key not in ("seq", "time", "task", "event") and value is not None
    )
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(event.get("time") or 0)))
    painted = out.paint(f"{harmless(name):<10}", STATE_COLORS.get(name))
    task = harmless(event.get("task") or "-")
    return f"{when}  {event.get('seq', '-'):>6}  {task:<10}  {painted}  {rest}".rstrip()


def stream(call: Call, *, follow: bool, after: int | None, task: str | None) -> Iterator[dict[str, Any]]:
    """The events; while following, from the last one on after the daemon was away.

    Raises:
        Unreachable: it was never there, or has been away for too long.
    """
    away_since: float | None = None
    known = False
    while True:
        try:
            with call.client.open("GET", target("/v1/events", follow=follow, after=after, task=task)) as exchange:
                for event in _events(exchange):
                    if known and away_since is not None:
                        call.note("the daemon is back")
                    known, away_since = True, None
                    if event:
                        after = event.get("seq", after)
                        yield event
            if not follow:
                return
            time.sleep(0.2)
        except (Unreachable, Refusal) as failure:
            if not follow or not known or (isinstance(failure, Refusal) and failure.status != 503):
                raise
            now = time.monotonic()
            if away_since is None:
                away_since = now
                call.note(f"the daemon is away; waiting up to {PATIENCE_S:g} s for it to come back")
            elif now - away_since > PATIENCE_S:
                raise
            time.sleep(0.2)


def _events(exchange: Exchange) -> Iterator[dict[str, Any]]:
    """The events of one answer; first an empty one once the daemon has answered at all."""
    raw = b""
    greeted = False
    while (data := exchange.receive(60.0)) != b"":
        if exchange.status is not None and exchange.status != 200:
            answered(exchange.status, (data or b"") + exchange.read(10.0))
        if not greeted and exchange.status == 200:
            greeted = True
            yield {}
        if data is None:
            continue
        *lines, raw = (raw + data).split(b"\n")
        for line in lines:
            if line.strip():
                yield _event(line)
    if exchange.status != 200:
        answered(exchange.status or 0, b"")
    if raw.strip():
        yield _event(raw)


def _event(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise Failure(f"cannot read an event: {line[:60]!r} is not a JSON object")
    return found
