"""`agentctl show`: everything about one task, for people."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

from agentd.cli.call import Call, Parser, task_path
from agentd.cli.outcomes import signal_number
from agentd.cli.summary import SCRIPTED, progress_of, run_time_s, why
from agentd.cli.taskspec import without_content
from agentd.cli.terminal import Terminal, age, cost, duration, harmless, moment, size

EXAMPLES = """
agentctl show k7m2
agentctl show --json k7m2 | jq .usage
"""


def arguments(parser: Parser) -> None:
    """One id."""
    parser.add_argument("id", metavar="ID", help="a task's id or the beginning of it")


def run(call: Call) -> int:
    """Prints names and values, or the task object."""
    task = call.client.call("GET", task_path(call.args.id))
    if call.json:
        call.out.document(task)
        return 0
    for name, value in lines_of(task, call.out):
        call.out.line(f"{call.out.paint(f'{name:<10}', 'bold')} {value}")
    return 0


def lines_of(task: dict[str, Any], out: Terminal) -> Iterator[tuple[str, str]]:
    """Names and values, those without a value left out; the values are harmless."""
    yield "Task", harmless(task["id"])
    if task.get("name"):
        yield "Name", harmless(task["name"])
    reason = why(task)
    yield "State", out.state(task["state"]) + (f" ({reason})" if reason else "")
    if task.get("detail"):
        yield "Detail", harmless(task["detail"])
    yield "Command", harmless(shlex.join(map(str, task.get("command") or [])))
    yield "Class", f"{harmless(task.get('class'))}, priority {task.get('priority', 0)}"
    yield "Owner", f"{harmless(task.get('user'))}, tenant {harmless(task.get('tenant'))}"
    yield "Submitted", moment(task.get("submitted_at"))
    if task.get("started_at"):
        attempt = task.get("attempt") or 1
        yield "Started", moment(task["started_at"]) + (f", attempt {attempt}" if attempt > 1 else "")
    if task.get("ended_at"):
        yield "Ended", f"{moment(task['ended_at'])}, after {duration(run_time_s(task))}"
    number = signal_number(task.get("signal"))
    if task.get("exit_code") is not None or number is not None:
        yield "Exit", f"code {task['exit_code']}" if number is None else f"signal {number}"
    progress = progress_of(task)
    if progress:
        yield "Progress", f"{progress} ({age((task.get('progress') or {}).get('time'))} ago)"
    yield "Used", out.dot.join(_used(task.get("usage") or {}))
    yield "Models", out.dot.join(_models(task.get("llm") or {}))
    spec = without_content(task.get("spec") or {})
    limits = [
        f"{name} {_limit(name, spec[name])}" for name in ("memory", "cpus", "pids", "timeout", "grace") if name in spec
    ]
    if limits:
        yield "Limits", out.dot.join(limits)
    for mount in spec.get("mounts") or []:
        mode = "read-only" if mount.get("read_only", True) else "read-write"
        yield "Mount", f"{harmless(mount.get('source'))} at {harmless(mount.get('target'))}, {mode}"
    for one in spec.get("inputs") or []:
        count = one.get("bytes") if isinstance(one, dict) else None
        yield (
            "Input",
            harmless(one.get("path") if isinstance(one, dict) else one) + (f", {size(count)}" if count else ""),
        )
    for key, value in (spec.get("labels") or {}).items():
        yield "Label", f"{harmless(key)}={harmless(value)}"
    if task.get("workspace"):
        yield "Workspace", harmless(task["workspace"])
    if task.get("has_result"):
        yield "Result", f"agentctl result {harmless(task['id'])}"


def _limit(name: str, value: object) -> str:
    if name == "memory":
        return size(value) if isinstance(value, int) else harmless(value)
    if name in ("timeout", "grace"):
        return duration(value) if isinstance(value, int | float) else harmless(value)
    return harmless(value)


def _used(usage: dict[str, Any]) -> Iterator[str]:
    yield f"cpu {duration(usage.get('cpu_s'))}"
    yield f"memory peak {size(usage.get('memory_peak_bytes'))}"
    yield f"read {size(usage.get('io_read_bytes'))}"
    yield f"written {size(usage.get('io_write_bytes'))}"
    yield f"received {size(usage.get('net_rx_bytes'))}"
    yield f"sent {size(usage.get('net_tx_bytes'))}"
    if usage.get("denied_packets"):
        yield f"{usage['denied_packets']} packets denied"


def _models(llm: dict[str, Any]) -> Iterator[str]:
    if not llm.get("requests"):
        yield "none asked"
        return
    yield f"{llm['requests']} requests"
    cached = f" ({llm['cached_tokens']} cached)" if llm.get("cached_tokens") else ""
    yield f"{llm.get('input_tokens', 0)} tokens in{cached}, {llm.get('output_tokens', 0)} out"
    yield f"cost {cost(llm)}"
    for name, count in (llm.get("models") or {}).items():
        yield f"{harmless(name)} x{count}"
    if llm.get("scripted"):
        yield SCRIPTED
