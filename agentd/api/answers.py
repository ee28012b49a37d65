"""Answers and errors as HTTP: the one place where an `AgentdError` becomes a status."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import structlog
from aiohttp import web

from agentd.core.errors import AgentdError, RequestError, TooLarge
from agentd.core.parse import from_json

log = structlog.get_logger("agentd.api")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def ok(value: Any, status: int = 200) -> web.Response:
    """`value` as JSON."""
    return web.Response(status=status, body=msgspec.json.encode(value), content_type="application/json")


def refused(error: AgentdError) -> web.Response:
    """An error as JSON, with its status."""
    return ok({"error": error.as_dict()}, error.status)


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The edge of the API: every error becomes an answer."""
    try:
        return await handler(request)
    except AgentdError as error:
        if error.status >= 500:
            log.warning("request refused", path=request.path, error=error.message)
        return refused(error)
    except web.HTTPRequestEntityTooLarge:
        return refused(TooLarge(f"cannot read the request: the body is over {request.app._client_max_size} bytes"))
    except web.HTTPException as error:
        codes = {404: "not_found", 405: "method_not_allowed"}
        found = RequestError(
            f"cannot {request.method} {request.path}: {error.reason}", code=codes.get(error.status, "invalid_request")
        )
        return ok({"error": found.as_dict()}, error.status)
    except (ConnectionResetError, TimeoutError):
        raise
    except Exception:
        log.exception("a request met a bug", path=request.path, method=request.method)
        return ok(
            {"error": {"code": "internal", "message": "cannot answer: agentd met a bug; the journal has the details"}},
            500,
        )


async def body_of(request: web.Request, what: str) -> Any:
    """The JSON body; an empty one is an empty object."""
    raw = await request.read()
    return from_json(raw, what) if raw else {}


def number(request: web.Request, name: str, default: float, low: float, high: float) -> float:
    """A number in the query.

    Raises:
        RequestError: it is none, or out of range.
    """
    raw = request.query.get(name)
    if raw is None:
        return default
    try:
        found = float(raw)
    except ValueError:
        found = float("nan")
    if not low <= found <= high:
        raise RequestError(
            f"cannot read the request: {name}={raw[:40]!r} is not a number from {low:g} to {high:g}",
            code="invalid_field",
        )
    return found
