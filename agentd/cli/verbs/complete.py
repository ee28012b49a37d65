"""`agentctl _complete`: candidates for the last of the words that it is given, one a line, a tab and a
description behind it.

It says nothing where a file name is wanted, and never fails: a shell at a prompt has no place for errors.
The daemon has 200 ms in all to name its tasks.
"""

from __future__ import annotations

import argparse

from agentd.cli.call import Call, Parser
from agentd.cli.failures import Failure
from agentd.cli.outcomes import STATES
from agentd.cli.terminal import harmless

EXAMPLES = """
agentctl _complete -- logs --t
"""
LIMIT_S = 0.2

_TAKES_ID = frozenset({"show", "logs", "wait", "stop", "kill", "rm", "events", "result"})
_LIVE_ONLY = frozenset({"wait", "stop", "kill"})
_WORDS = {
    "--color": ("auto", "always", "never"),
    "--class": ("interactive", "normal", "batch"),
    "--state": STATES,
    "--stream": ("all", "stdout", "stderr"),
    "--signal": ("HUP", "INT", "KILL", "QUIT", "TERM", "USR1", "USR2"),
}
_WORDS["-s"] = _WORDS["--signal"]


def arguments(parser: Parser) -> None:
    """The words of the command line behind `agentctl`, the one to complete last."""
    parser.add_argument("words", nargs=argparse.REMAINDER)


def run(call: Call) -> int:
    """Prints the candidates."""
    words = call.args.words
    if words[:1] == ["--"]:
        words = words[1:]
    *before, current = words or [""]
    for word, description in candidates(call, before, current):
        if word.startswith(current):
            call.out.line(f"{word}\t{harmless(description)}")
    return 0


def candidates(call: Call, before: list[str], current: str) -> list[tuple[str, str]]:
    """Words that may stand behind `before`, with descriptions."""
    from agentd.cli.main import VERBS, parser_of

    verb = next((word for word in before if not word.startswith("-") and word not in _WORDS["--color"]), None)
    if verb is None:
        if before[-1:] == ["--color"]:
            return [(word, "") for word in _WORDS["--color"]]
        if current.startswith("-"):
            return [("--help", ""), ("--version", ""), ("--json", ""), ("--color", "")]
        return [(name, one.summary) for name, one in VERBS.items()]
    if verb not in VERBS or "--" in before:
        return []
    parser = parser_of(verb)
    actions = {flag: action for action in parser._actions for flag in action.option_strings}
    previous = actions.get(before[-1])
    if previous is not None and previous.nargs is None:  # that flag takes a value, and this is it
        return [(word, "") for word in _WORDS.get(before[-1], ())]
    if current.startswith("-"):
        return [(flag, action.help or "") for flag, action in sorted(actions.items())]
    if verb in _TAKES_ID:
        return [one for one in _ids(call, live=verb in _LIVE_ONLY) if one[0] not in before]
    if verb == "help":
        return [(name, one.summary) for name, one in VERBS.items()]
    fixed = {"config": ("check", "show"), "schema": ("task",), "completion": ("bash", "zsh", "fish")}.get(verb, ())
    return [] if any(word in before for word in fixed) else [(word, "") for word in fixed]


def _ids(call: Call, *, live: bool) -> list[tuple[str, str]]:
    try:
        answer = call.client.call("GET", "/v1/tasks" if live else "/v1/tasks?all=1", timeout_s=LIMIT_S)
    except Failure:
        return []
    return [
        (harmless(task["id"]), f"{task.get('state')} {task.get('name') or ''}".strip())
        for task in answer.get("tasks", [])
    ]
