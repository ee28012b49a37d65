"""`agentctl config`: passed on to `agentd.daemon`, which alone knows what a valid configuration is."""

from __future__ import annotations

import subprocess
import sys

from agentd.cli.call import Call, Parser
from agentd.cli.failures import Failure, UsageFailure

EXAMPLES = """
agentctl config check                  is what is installed valid?
agentctl config check ./agentd.toml
agentctl config show                   what the files come to, with defaults
agentctl config show --json            what the running daemon uses
"""


def arguments(parser: Parser) -> None:
    """What to do, and with which file."""
    parser.add_argument(
        "what", choices=("check", "show"), metavar="check|show", help="check a file, or show what is in force"
    )
    parser.add_argument("file", nargs="?", metavar="FILE", help="for check: this file instead of the installed one")


def run(call: Call) -> int:
    """The output and exit code of the daemon's own command; with `--json` as one document."""
    args = call.args
    if args.what == "show":
        if args.file:
            raise UsageFailure(
                f"cannot show {args.file}: show takes no file", hint=f"agentctl config check {args.file}"
            )
        if call.json:
            call.out.document(call.client.call("GET", "/v1/config"))
            return 0
    argv = [sys.executable, "-m", "agentd.daemon", "config", args.what, *([args.file] if args.file else [])]
    try:
        if not call.json:
            return _as_shell(subprocess.run(argv, check=False).returncode)
        done = subprocess.run(argv, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError as error:
        raise Failure(f"cannot start {sys.executable}: {error.strerror}") from error
    code = _as_shell(done.returncode)
    call.out.document({"ok": code == 0, "exit_code": code, "output": done.stdout.decode("utf-8", "replace")})
    return code


def _as_shell(code: int) -> int:
    return 128 - code if code < 0 else code
