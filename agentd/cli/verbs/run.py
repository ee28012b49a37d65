"""`agentctl run`: submit, follow, exit as the task did.

On a terminal Ctrl-C does not end hours of work by accident: the first says what runs and how to stop it,
the second within five seconds stops it with its grace, the third kills it. Without a terminal a signal is
somebody's decision already: TERM and INT stop the task at once, a second one kills it. Ctrl-\\ leaves the
task running and returns.
"""

from __future__ import annotations

import signal
import sys
import time
from typing import Any

from agentd.cli import taskspec
from agentd.cli.call import Call, Parser, task_path
from agentd.cli.connection import target
from agentd.cli.failures import EXIT_INTERRUPTED, Failure, Refusal, Unreachable
from agentd.cli.following import PATIENCE_S, Output, Printer
from agentd.cli.outcomes import exit_code_of, has_ended
from agentd.cli.signals import Signals
from agentd.cli.summary import StatusLine, status_line, summary_lines
from agentd.cli.terminal import harmless
from agentd.cli.verbs.submit import submit

EXAMPLES = """
agentctl run -- python3 -c 'print("hello")'
agentctl run task.toml
agentctl run --input notes.md --env OPENAI_MODEL=gpt-4o-mini --timeout 10m -- python3 agent.py
agentctl run --mount ~/data:/data --memory 2G -- ./analyse /data
agentctl run --detach task.toml        print the id and return
"""

AGAIN_WITHIN_S = 5.0
_GLANCE_S = 1.0


def arguments(parser: Parser) -> None:
    """Those of a task, and `--detach`."""
    taskspec.arguments(parser)
    parser.add_argument("-d", "--detach", action="store_true", help="print the id and return; the task runs on")
    parser.epilog = (
        "Ctrl-C once tells what runs, twice within 5 s stops the task, a third time kills it; Ctrl-\\ leaves "
        "it running. Without a terminal INT and TERM stop it at once. The output is passed on as the task "
        "wrote it; --json gives it as lines of {stream, time, data} between two of {task}."
    )


def run(call: Call) -> int:
    """Follows the task to its end; the exit code is the task's."""
    task = submit(call)
    if call.args.detach:
        if call.json:
            call.out.document(task)
        else:
            call.out.line(str(task["id"]))
        return 0
    if call.json:
        call.out.record({"task": task})
    return _Run(call, task).follow()


class _Run:
    """One followed task: its output, its status line, and the person's signals."""

    def __init__(self, call: Call, task: dict[str, Any]):
        self._call = call
        self._task = task
        self._id = str(task["id"])
        self._status = StatusLine(call.err)
        self._printer = Printer(call.out, call.err, as_json=call.json)
        self._interactive = call.err.is_tty and _isatty_stdin()
        self._asked_at: float | None = None
        self._stopping = False
        self._killing = False
        self._looked_at = time.monotonic()
        self._away_since: float | None = None
        self._output = Output(call.client, self._id, follow=True, patient=True, notice=self._say)

    def follow(self) -> int:
        """The exit code once the task has ended, or 130 when the person left."""
        watched = [signal.SIGINT, signal.SIGTERM] + ([signal.SIGQUIT] if self._interactive else [])
        with Signals(watched) as signals:
            try:
                while True:
                    if any(self._leaves(one) for one in signals.take()):
                        return EXIT_INTERRUPTED
                    frames = self._output.poll(_GLANCE_S if self._status.enabled else 30.0, signals.fileno())
                    if frames is None:
                        if has_ended(self._task):
                            return self._end()
                        self._await_end()
                        continue
                    if frames:
                        self._status.clear()
                        for frame in frames:
                            self._printer.write(frame)
                    self._glance()
            except BrokenPipeError:
                raise
            except Failure as failure:
                self._status.clear()
                failure.hint = failure.hint or f"the task is not affected: agentctl logs -f {self._id}"
                raise
            finally:
                self._output.close()
                self._status.clear()

    def _await_end(self) -> None:
        """All output is there: the daemon is writing down how it ended."""
        try:
            where = target(task_path(self._id, "/wait"), timeout_s=1)
            self._task = self._call.client.call("GET", where)
            self._away_since = None
        except Refusal as refusal:
            if refusal.status != 503:
                raise
            self._bear(Unreachable(refusal.message))
        except Unreachable as failure:
            self._bear(failure)

    def _bear(self, failure: Unreachable) -> None:
        now = time.monotonic()
        self._away_since = self._away_since or now
        if now - self._away_since > PATIENCE_S:
            raise failure
        time.sleep(0.2)

    def _end(self) -> int:
        self._status.clear()
        if self._call.json:
            self._call.out.record({"task": self._task})
            return exit_code_of(self._task)
        err = self._call.err
        if self._printer.escaped and err.is_tty:
            err.stream.write("\x1b[0m")  # a colour that the task left switched on is not ours
        if not self._printer.ended_line and err.is_tty:
            err.line()
        for line in summary_lines(self._task, err):
            err.line(line)
        return exit_code_of(self._task)

    def _glance(self) -> None:
        """Draws the status line, with news of the task once a second."""
        if not self._status.enabled:
            return
        now = time.monotonic()
        if now - self._looked_at >= _GLANCE_S:
            self._looked_at = now
            try:
                self._task = self._call.client.call("GET", task_path(self._id), timeout_s=1.0)
            except (Unreachable, Refusal):
                pass  # the output's reader deals with a daemon that is away
        # Below an unfinished line of output there is no place for a line that is drawn over again.
        if self._printer.ended_line or not self._call.out.is_tty:
            self._status.show(status_line(self._task, self._call.err))

    def _say(self, text: str) -> None:
        self._status.clear()
        self._call.note(text)

    def _leaves(self, number: signal.Signals) -> bool:
        """Acts on a signal; True when the person wants to leave."""
        self._status.clear()
        if number == signal.SIGQUIT or self._killing:
            self._say(f"{self._id} runs on; agentctl logs -f {self._id} follows it again")
            return True
        if self._stopping:
            self._killing = self._ask("kill", {"signal": "KILL"}, f"killing {self._id}")
            return False
        now = time.monotonic()
        confirmed = self._asked_at is not None and now - self._asked_at <= AGAIN_WITHIN_S
        if not self._interactive or number == signal.SIGTERM or confirmed:
            self._stopping = self._ask("stop", {}, f"stopping {self._id}; once more kills it")
            return False
        self._asked_at = now
        try:
            self._task = self._call.client.call("GET", task_path(self._id), timeout_s=1.0)
        except (Unreachable, Refusal):
            pass  # what was known last will do
        self._say(
            f"{self._id} is {harmless(self._task.get('state'))}: "
            f"press again within {AGAIN_WITHIN_S:g} s to stop the task; "
            f"it runs on as {self._id} (Ctrl-\\ leaves it running)"
        )
        return False

    def _ask(self, what: str, body: dict[str, Any], said: str) -> bool:
        """Asks the daemon to end the task; False when it did not take it."""
        try:
            self._call.client.call("POST", task_path(self._id, "/" + what), body, timeout_s=5.0)
        except Failure as failure:
            self._say(f"cannot {what} {self._id}: {harmless(failure.message)}")
            return isinstance(failure, Refusal)
        self._say(said)
        return True


def _isatty_stdin() -> bool:
    try:
        return sys.stdin is not None and sys.stdin.isatty()
    except ValueError:
        return False
