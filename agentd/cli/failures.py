"""What ends a command early, as one tree whose branches are exit codes.

    Failure                 1    the daemon said no, a file cannot be written
    ├── UsageFailure        2    mend the command line or the task file
    ├── Unreachable         69   the daemon does not answer
    │   └── AnswerLost           it began to, so it was there a moment ago
    └── Refusal             by status and code of the daemon's error object

The numbers are those of sysexits.h, systemctl and docker, where these have one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_NO_SUCH_TASK = 4
EXIT_UNREACHABLE = 69
EXIT_TRY_LATER = 75
EXIT_NOT_PERMITTED = 77
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


class Failure(Exception):
    """A command that ends with a sentence, a hint and an exit code."""

    exit_code = EXIT_ERROR
    code = "error"

    def __init__(self, message: str, *, hint: str | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def as_dict(self) -> dict[str, Any]:
        """The `error` object that `--json` prints on stderr: the same shape as the API's."""
        found = {"code": self.code, "message": self.message, "hint": self.hint}
        return {key: value for key, value in found.items() if value is not None}


class UsageFailure(Failure):
    """The command line or the task file is wrong."""

    exit_code = EXIT_USAGE
    code = "usage"


class Unreachable(Failure):
    """The daemon does not answer."""

    exit_code = EXIT_UNREACHABLE
    code = "unreachable"


class AnswerLost(Unreachable):
    """The connection ended before the answer did."""

    code = "answer_lost"


class Refusal(Failure):
    """An answer outside 2xx."""

    def __init__(self, status: int, error: Mapping[str, Any]):
        super().__init__(str(error.get("message") or f"the daemon answered {status}"), hint=error.get("hint"))
        self.status = status
        self.code = str(error.get("code") or f"http_{status}")
        self.field = error.get("field")
        if status == 400:
            self.exit_code = EXIT_USAGE
        elif status == 403:
            self.exit_code = EXIT_NOT_PERMITTED
        elif status == 404 and self.code == "no_such_task":
            self.exit_code = EXIT_NO_SUCH_TASK
        elif status == 503:
            self.exit_code = EXIT_TRY_LATER

    def as_dict(self) -> dict[str, Any]:
        """As the daemon sent it, and the status."""
        found = super().as_dict() | {"status": self.status}
        return found | {"field": self.field} if self.field else found
