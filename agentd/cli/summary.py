"""One task in one line: the live status line, and the summary at its end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from agentd.cli.outcomes import exit_code_of, signal_number
from agentd.cli.terminal import Terminal, clip, cost, duration, harmless, size

SCRIPTED = "scripted provider, not a model"


def why(task: Mapping[str, Any]) -> str:
    """Why the task is in its state, in a few words; empty where there is nothing to say."""
    if task.get("state") == "queued":
        place = f"#{task['position']}" if task.get("position") else ""
        return " ".join(part for part in (place, harmless(task.get("waiting_for") or "")) if part)
    reason = task.get("reason")
    if reason == "exit":
        return f"exit {task.get('exit_code')}"
    number = signal_number(task.get("signal"))
    if reason == "signal" and number is not None:
        return f"signal {number}"
    return harmless(reason or "")


def progress_of(task: Mapping[str, Any]) -> str:
    """What the task last said of itself, with the percentage."""
    progress = task.get("progress") or {}
    fraction = progress.get("fraction")
    percent = f"{fraction * 100:.0f}%" if isinstance(fraction, int | float) else ""
    return " ".join(part for part in (percent, harmless(progress.get("text") or "")) if part)


def run_time_s(task: Mapping[str, Any], now: float | None = None) -> float | None:
    """Seconds from its start to its end, or until now."""
    started = task.get("started_at")
    if started is None:
        return None
    ended = task.get("ended_at") or (time.time() if now is None else now)
    return max(0.0, float(ended) - float(started))


def status_line(task: Mapping[str, Any], terminal: Terminal, now: float | None = None) -> str:
    """State, reason or progress, elapsed time and cost, in the terminal's width."""
    elapsed = run_time_s(task, now)
    if elapsed is None and task.get("submitted_at"):
        elapsed = max(0.0, (time.time() if now is None else now) - float(task["submitted_at"]))
    parts = [
        f"{task.get('id')} {task.get('state')}",
        why(task),
        progress_of(task),
        duration(elapsed),
        cost(task.get("llm")),
    ]
    text = terminal.dot.join(part for part in parts if part and part != "-")
    return terminal.paint(clip(harmless(text), max(10, terminal.columns() - 1), terminal.ellipsis), "dim")


class StatusLine:
    """A line on a terminal's stderr that is drawn over again and never scrolls. On anything else: nothing."""

    def __init__(self, terminal: Terminal):
        self._terminal = terminal
        self._shown = False
        self.enabled = terminal.is_tty and not terminal.dumb

    def show(self, text: str) -> None:
        """Puts `text` in place of what is shown."""
        if self.enabled:
            self._terminal.stream.write(f"\r\x1b[2K{text}")
            self._terminal.stream.flush()
            self._shown = True

    def clear(self) -> None:
        """Takes the line away, so that something else can be written."""
        if self._shown:
            self._terminal.stream.write("\r\x1b[2K")
            self._terminal.stream.flush()
            self._shown = False


def model_use(llm: Mapping[str, Any] | None) -> list[str]:
    """Tokens and cost; whether it was a model at all."""
    if not llm or not llm.get("requests"):
        return ["no model calls"]
    found = [
        f"tokens {llm.get('input_tokens', 0)} in, {llm.get('output_tokens', 0)} out",
        f"cost {cost(dict(llm))}",
    ]
    return [*found, SCRIPTED] if llm.get("scripted") else found


def summary_lines(task: Mapping[str, Any], terminal: Terminal) -> list[str]:
    """How the task ended and what it took."""
    usage = task.get("usage") or {}
    state = terminal.state(task.get("state"))
    reason = why(task)
    parts = [f"{task.get('id')} {state}" + (f" ({reason})" if reason else "")]
    wall = usage.get("wall_s")
    parts.append(f"wall {duration(run_time_s(task) if wall is None else wall)}")
    parts.append(f"cpu {duration(usage.get('cpu_s'))}")
    parts.append(f"memory peak {size(usage.get('memory_peak_bytes'))}")
    parts += model_use(task.get("llm"))
    if usage.get("denied_packets"):
        parts.append(f"{usage['denied_packets']} packets denied")
    found = [terminal.dot.join(parts)]
    if task.get("state") != "succeeded" and task.get("detail"):
        found.append(f"  {harmless(task['detail'])}")
    if task.get("state") != "succeeded" and task.get("reason") == "start_failed":
        found.append(f"  agentd could not start it (exit code {exit_code_of(task)}); `agentctl doctor` checks the host")
    if task.get("has_result"):
        found.append(f"  its result: agentctl result {task.get('id')}")
    return found
