"""The errors a reader of agentd meets, as one tree whose branches say what to do next.

    AgentdError
    ├── RequestError            mend the request
    │   ├── InvalidField        one field's value is wrong: `field`, `hint`
    │   ├── NotFound            no such task, result, file
    │   ├── NotPermitted        the caller may not
    │   ├── WrongState          not while it is in this state
    │   └── TooLarge            over a limit that the message names
    ├── TryLater                nothing is wrong with the request: the same one may pass later
    ├── HostLacks               the host cannot enforce what is configured: see `agentctl doctor`
    └── Broken                  an invariant does not hold: report it

A message reads `cannot <verb> <object>: <cause>`, with the offending value in it.
"""

from __future__ import annotations


class AgentdError(Exception):
    """Every error that agentd raises on purpose.

    `code` is for programs, `message` for people, `field` names the part of a request or file that is
    meant, `hint` is the remedy.
    """

    status = 500
    default_code = "internal"

    def __init__(self, message: str, *, code: str | None = None, field: str | None = None, hint: str | None = None):
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.field = field
        self.hint = hint

    def as_dict(self) -> dict[str, str]:
        """The `error` object of the HTTP APIs and of the warden's answers."""
        found = {"code": self.code, "message": self.message, "field": self.field, "hint": self.hint}
        return {key: value for key, value in found.items() if value is not None}


class RequestError(AgentdError):
    """Mend the request."""

    status = 400
    default_code = "invalid_request"


class InvalidField(RequestError):
    """One field's value is wrong."""

    default_code = "invalid_field"


class NotFound(RequestError):
    """Nothing of that name."""

    status = 404
    default_code = "not_found"


class NotPermitted(RequestError):
    """The caller may not do this."""

    status = 403
    default_code = "not_permitted"


class WrongState(RequestError):
    """Not while it is in this state."""

    status = 409
    default_code = "wrong_state"


class TooLarge(RequestError):
    """Over a limit that the message names."""

    status = 413
    default_code = "too_large"


class TryLater(AgentdError):
    """The same request may pass later."""

    status = 503
    default_code = "not_ready"


class HostLacks(AgentdError):
    """The host cannot enforce what is configured."""

    status = 503
    default_code = "host_lacks"


class Broken(AgentdError):
    """An invariant does not hold."""
