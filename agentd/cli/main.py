"""The entry point: finds the verb, runs it, and turns what goes wrong into a sentence and an exit code.

A verb's module is imported only when that verb is asked for. This is the one place that catches everything.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from agentd.cli.call import Call, Parser, nearest, report
from agentd.cli.connection import Client, control_socket
from agentd.cli.failures import EXIT_BROKEN_PIPE, EXIT_INTERRUPTED, Failure, UsageFailure
from agentd.cli.terminal import Terminal, streams

COLORS = ("auto", "always", "never")


@dataclass(frozen=True, slots=True)
class Verb:
    """A verb as the list of verbs shows it; its module has the same name unless that is taken."""

    summary: str
    module: str
    command: bool = False  # takes a command behind `--`


VERBS = {
    "run": Verb("Run a task and follow it to its end.", "run", command=True),
    "submit": Verb("Queue a task and print its id.", "submit", command=True),
    "ps": Verb("List tasks.", "ps"),
    "show": Verb("Show everything about a task.", "show"),
    "logs": Verb("Print a task's output.", "logs"),
    "wait": Verb("Wait until tasks have ended.", "wait"),
    "result": Verb("Print the result that a task left.", "result"),
    "stop": Verb("Stop tasks: TERM, then KILL after the grace.", "stop"),
    "kill": Verb("Send a signal to tasks, KILL unless told otherwise.", "kill"),
    "rm": Verb("Forget ended tasks, their output and their workspaces.", "rm"),
    "events": Verb("Print what happened, and what happens.", "events"),
    "doctor": Verb("Check whether this host can run sandboxes, and say what is missing.", "doctor"),
    "config": Verb("Check or show the daemon's configuration.", "config"),
    "schema": Verb("Print the JSON Schema of a task.", "schema"),
    "version": Verb("Print the versions of agentctl and of the daemon.", "version"),
    "completion": Verb("Print the completion script of a shell.", "completion"),
    "help": Verb("Print the help of a verb.", "help"),
}
HIDDEN = {"_complete": Verb("Candidates for the shells' completion.", "complete")}

HELP = """\
agentctl runs agents in sandboxes and looks after them.

Examples:
  agentctl run -- python3 -c 'print("hello")'      run a command, see its output, exit with its code
  agentctl run examples/first_agent/task.toml      the same, from a file
  id=$(agentctl submit -- python3 agent.py)        queue a command
  agentctl ps -a                                   what runs, what waits and what has ended
  agentctl logs -f $id                             watch its output
  agentctl stop $id                                end it
  agentctl doctor                                  what this host lacks, if anything

Usage: agentctl [--json] [--color WHEN] VERB [arguments]
{verbs}
Every verb takes --json for programs, --color auto|always|never and --help.
A task is named by its id or any unique beginning of it.

Environment:
  AGENTD_ROOT     the directory below which the daemon runs (/ on an installed host)
  AGENTD_SOCKET   the control socket itself
  NO_COLOR, CLICOLOR_FORCE, TERM=dumb

Exit codes:
  run and wait exit as the task did: 0-119 its own, 120 lost, 122 cancelled, 124 expired,
  125 agentd could not start it, 128+n killed by signal n.
  1 error, 2 usage, 4 no such task, 69 daemon unreachable, 75 try again later,
  77 not permitted, 130 interrupted.
"""


def top_help() -> str:
    """The text of `agentctl --help`."""
    widest = max(map(len, VERBS))
    listed = "\n".join(f"  {name:<{widest}}  {verb.summary}" for name, verb in VERBS.items())
    return HELP.format(verbs=f"\nVerbs:\n{listed}\n")


def module_of(name: str) -> ModuleType:
    """The module of a verb."""
    return importlib.import_module(f"agentd.cli.verbs.{(VERBS | HIDDEN)[name].module}")


def parser_of(name: str) -> Parser:
    """The complete parser of a verb."""
    module = module_of(name)
    parser = Parser(name, (VERBS | HIDDEN)[name].summary, module.EXAMPLES)
    module.arguments(parser)
    parser.add_argument("--json", action="store_true", help="for programs: one JSON document, or one per line")
    parser.add_argument("--color", choices=COLORS, default="auto", metavar="WHEN", help="auto, always or never")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(argv)
    except BrokenPipeError:
        # Whoever read our output has enough (`agentctl logs | head`). Python would complain once more when
        # it flushes at exit, so stdout goes nowhere from here on.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)
        return EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _run(argv: list[str]) -> int:
    as_json = "--json" in (argv[: argv.index("--")] if "--" in argv else argv)
    try:
        return _dispatch(argv)
    except Failure as failure:
        report(failure, _stderr(argv), as_json=as_json)
        return failure.exit_code


def _dispatch(argv: list[str]) -> int:
    leading: list[str] = []
    while argv and argv[0].startswith("-"):
        first = argv.pop(0)
        if first in ("-h", "--help"):
            Terminal(sys.stdout).line(top_help().rstrip())
            return 0
        if first == "--version":
            argv = ["version", *argv]
        elif first == "--json" or first.startswith("--color="):
            leading.append(first)
        elif first == "--color" and argv:
            leading += [first, argv.pop(0)]
        else:
            known = ("--help", "--json", "--color", "--version")
            close = nearest(first, known)
            raise UsageFailure(
                f"cannot read the arguments: there is no flag {first} before the verb",
                hint=(f"did you mean {close}? " if close else "") + "`agentctl --help` shows what there is",
            )
    if not argv:
        Terminal(sys.stderr).line(top_help().rstrip())
        return UsageFailure.exit_code
    name, *rest = argv
    if name == "help" and not [word for word in rest if not word.startswith("-")]:
        Terminal(sys.stdout).line(top_help().rstrip())
        return 0
    verb = (VERBS | HIDDEN).get(name)
    if verb is None:
        close = nearest(name, VERBS)
        raise UsageFailure(
            f"cannot run {name!r}: there is no such verb",
            hint=f"did you mean `agentctl {close}`?" if close else "`agentctl --help` lists them",
        )
    command: tuple[str, ...] | None = None
    if verb.command and "--" in rest:
        at = rest.index("--")
        rest, command = rest[:at], tuple(rest[at + 1 :])
    try:
        args = parser_of(name).read(leading + rest)
    except SystemExit as asked:  # argparse has printed the help
        return asked.code if isinstance(asked.code, int) else 0
    out, err = streams(args.color)
    code: int = module_of(name).run(Call(args, Client(control_socket()), out, err, command))
    return code


def _stderr(argv: list[str]) -> Terminal:
    """stderr as it was asked for, even where the arguments did not parse."""
    for index, word in enumerate(argv):
        wanted = argv[index + 1] if word == "--color" and index + 1 < len(argv) else word.removeprefix("--color=")
        if word.startswith("--color") and wanted in COLORS:
            return Terminal(sys.stderr, wanted)
    return Terminal(sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
