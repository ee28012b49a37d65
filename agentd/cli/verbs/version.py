"""`agentctl version`: of both sides. A daemon that is away is not an error here."""

from __future__ import annotations

from typing import Any

import agentd
from agentd.cli.call import Call, Parser
from agentd.cli.failures import Failure
from agentd.cli.terminal import duration, harmless

EXAMPLES = """
agentctl version
agentctl version --json | jq -r .daemon.version
"""


def arguments(parser: Parser) -> None:
    """None of its own."""


def run(call: Call) -> int:
    """Prints both versions; why the daemon's is missing goes to stderr."""
    daemon: dict[str, Any] | None = None
    try:
        daemon = call.client.call("GET", "/v1/version", timeout_s=2.0)
    except Failure as failure:
        call.note(harmless(failure.message))
    if call.json:
        call.out.document({"agentctl": agentd.__version__, "daemon": daemon})
        return 0
    call.out.line(f"agentctl {agentd.__version__}")
    if daemon is not None:
        ready = "" if daemon.get("ready", True) else ", not ready yet"
        up = duration(daemon.get("uptime_s"))
        call.out.line(f"agentd   {harmless(daemon.get('version'))} (API v{daemon.get('api')}, up {up}{ready})")
    return 0
