"""One invocation of `agentctl`: what a verb is given, and a parser that makes suggestions."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from agentd.cli.connection import Client, quote
from agentd.cli.failures import Failure, Unreachable, UsageFailure
from agentd.cli.terminal import Terminal


@dataclass(frozen=True, slots=True)
class Call:
    """The parsed arguments, the daemon, and where to write: data to `out`, everything else to `err`.

    `command` is what stood behind `--`, for the verbs that take one.
    """

    args: argparse.Namespace
    client: Client
    out: Terminal
    err: Terminal
    command: tuple[str, ...] | None = None

    @property
    def json(self) -> bool:
        """Whether a program reads the output."""
        return bool(self.args.json)

    def note(self, text: str) -> None:
        """A remark on stderr."""
        self.err.line(f"agentctl: {text}")

    def each(self, ids: Iterable[str], act: Callable[[str], dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
        """What `act` found for every id, and the exit code: that of the first failure, whose cause is on
        stderr.

        A failure with one task does not keep the others from being dealt with; a daemon that is away does.
        """
        found: list[dict[str, Any]] = []
        code = 0
        for one in ids:
            try:
                found.append(act(one))
            except Failure as failure:
                if isinstance(failure, Unreachable):
                    raise
                report(failure, self.err, as_json=self.json)
                code = code or failure.exit_code
        return found, code


def report(failure: Failure, err: Terminal, *, as_json: bool) -> None:
    """Writes a failure: a sentence and a hint for people, the API's error object for programs."""
    from agentd.cli.terminal import harmless

    if as_json:
        err.record({"error": failure.as_dict()})
        return
    err.line(f"{err.paint('agentctl:', 'red')} {harmless(failure.message)}")
    if failure.hint:
        err.line(f"  {err.paint('hint:', 'dim')} {harmless(failure.hint)}")


def task_path(task: str, rest: str = "") -> str:
    """The API path of a task named by its id or the beginning of it.

    Raises:
        UsageFailure: the name is empty.
    """
    if not task.strip():
        raise UsageFailure("cannot name a task: the id is empty", hint="`agentctl ps` lists them")
    return f"/v1/tasks/{quote(task)}{rest}"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` was probably meant to be."""
    import difflib

    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return found[0] if found else None


def _formatter(prog: str) -> argparse.HelpFormatter:
    """With a width: argparse would ask shutil, which imports compressors, whenever an argument is added."""
    try:
        columns = os.get_terminal_size(1).columns
    except OSError:
        columns = 0
    return argparse.HelpFormatter(prog, width=(columns or 100) - 2)


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `UsageFailure` with a suggestion and whose help begins with examples."""

    def __init__(self, verb: str, summary: str, examples: str):
        super().__init__(prog=f"agentctl {verb}", description=summary, allow_abbrev=False, formatter_class=_formatter)
        self.verb = verb
        self.examples = examples

    def error(self, message: str) -> NoReturn:
        """Instead of exiting from in here."""
        raise UsageFailure(
            f"cannot read the arguments of {self.verb}: {message}", hint=f"see `agentctl {self.verb} --help`"
        )

    def flags(self) -> list[str]:
        """Every flag it takes."""
        return sorted(self._option_string_actions)

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """The arguments.

        Raises:
            UsageFailure: they do not fit; an unknown flag is answered with the nearest known one.
        """
        if any(action.nargs == argparse.REMAINDER for action in self._actions):
            found, left = self.parse_known_args(argv)
        else:  # flags may stand between ids
            found, left = self.parse_known_intermixed_args(argv)
        if not left:
            return found
        flags = [one for one in left if one.startswith("-") and one != "-"]
        if flags:
            flag = flags[0].partition("=")[0]
            close = nearest(flag, [known for known in self.flags() if known.startswith("--")])
            hint = f"did you mean {close}? " if close else ""
            raise UsageFailure(
                f"cannot read the arguments of {self.verb}: there is no flag {flag}",
                hint=f"{hint}`agentctl {self.verb} --help` lists them",
            )
        hint = f"see `agentctl {self.verb} --help`"
        if self.verb in ("run", "submit"):
            hint = "put the command behind `--`: agentctl " + self.verb + " [flags] -- COMMAND..."
        raise UsageFailure(f"cannot read the arguments of {self.verb}: {left[0]!r} is one too many", hint=hint)

    def format_help(self) -> str:
        """What it is, examples, then the reference."""
        indented = "".join(f"  {line}\n" if line else "\n" for line in self.examples.strip("\n").splitlines())
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        for group in self._action_groups:
            formatter.start_section(group.title)
            formatter.add_text(group.description)
            formatter.add_arguments(group._group_actions)
            formatter.end_section()
        formatter.add_text(self.epilog)
        return f"{self.description}\n\nExamples:\n{indented}\n{formatter.format_help()}"
