"""`agentctl doctor`: the daemon's own checks, or this program's where no daemon answers."""

from __future__ import annotations

from typing import Any

from agentd.cli.call import Call, Parser
from agentd.cli.failures import Refusal, Unreachable
from agentd.cli.terminal import harmless

EXAMPLES = """
agentctl doctor
agentctl doctor --json | jq '.checks[] | select(.ok | not)'
"""


def arguments(parser: Parser) -> None:
    """None of its own."""
    parser.epilog = "Exits with 0 when everything that is required is there, else with 1."


def run(call: Call) -> int:
    """Prints a line per check, and what to do about those that fail."""
    try:
        report = call.client.call("GET", "/v1/doctor", timeout_s=60.0) | {"source": "daemon"}
    except (Unreachable, Refusal) as failure:
        if isinstance(failure, Refusal) and failure.status not in (404, 503):
            raise
        call.note(f"{harmless(failure.message)}; checking the host without it")
        if failure.hint:
            call.err.line(f"  {call.err.paint('hint:', 'dim')} {harmless(failure.hint)}")
        from agentd.cli import hostcheck

        report = hostcheck.report()
    if call.json:
        call.out.document(report)
        return 0 if report.get("ok") else 1
    _print(call, report)
    return 0 if report.get("ok") else 1


def _print(call: Call, report: dict[str, Any]) -> None:
    out = call.out
    checks: list[dict[str, Any]] = report.get("checks") or []
    widest = max((len(str(check.get("name"))) for check in checks), default=0)
    for check in checks:
        ok, required = bool(check.get("ok")), bool(check.get("required", True))
        if ok:
            mark = out.paint("✓" if out.unicode else "ok  ", "green")
        elif required:
            mark = out.paint("✗" if out.unicode else "FAIL", "red")
        else:
            mark = out.paint("-" if out.unicode else "-   ", "yellow")
        out.line(f"{mark} {harmless(check.get('name')):<{widest}}  {harmless(check.get('detail') or '')}".rstrip())
        if not ok and check.get("remedy"):
            arrow = "→" if out.unicode else "->"
            out.line(f"  {'':<{widest}}  {arrow} {harmless(check['remedy'])}")
    facts = report.get("facts") or {}
    if facts:
        out.line()
    for key, value in facts.items():
        out.line(f"  {harmless(key)}: {harmless(value)}")
    failed = sum(1 for check in checks if not check.get("ok") and check.get("required", True))
    out.line()
    out.line("This host can run sandboxes." if report.get("ok") else f"{failed} of {len(checks)} checks failed.")
    if report.get("advice"):
        out.line(harmless(report["advice"]))
