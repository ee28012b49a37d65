"""Untrusted values into typed ones: msgspec does the work, this puts its answer into our words and finds the nearest known key."""

from __future__ import annotations

import difflib
import re
from typing import Any, TypeVar

import msgspec

from agentd.core.errors import InvalidField, RequestError

T = TypeVar("T")

_WHERE = re.compile(r" - at `\$\.?([^`]*)`")
_UNKNOWN = re.compile(r"unknown field `([^`]*)`")


def _known(kind: Any, path: str) -> list[str]:
    """The keys that a struct takes at `path`, for hints."""
    for part in [part for part in re.split(r"[.\[\]]+", path) if part and part != "..."]:
        found = {field.encode_name: field.type for field in msgspec.structs.fields(kind)} if _is_struct(kind) else {}
        kind = _inner(found.get(part, kind))
    return [field.encode_name for field in msgspec.structs.fields(kind)] if _is_struct(kind) else []


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _inner(kind: Any) -> Any:
    arguments = getattr(kind, "__args__", ())
    return next((one for one in arguments if _is_struct(one)), kind)


def convert(raw: object, kind: type[T], what: str) -> T:
    """`raw` as a `kind`; `what` is said in the message: `cannot <what>: …`.

    Raises:
        InvalidField: names the field, its value's fault and, for an unknown key, the nearest known one.
    """
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        text = str(error)
        where = _WHERE.search(text)
        path = where[1] if where else ""
        cause = _WHERE.sub("", text)
        unknown = _UNKNOWN.search(text)
        if unknown:
            known = _known(kind, path)
            near = difflib.get_close_matches(unknown[1], known, 1)
            field = f"{path}.{unknown[1]}" if path else unknown[1]
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(known))}"
            raise InvalidField(
                f"cannot {what}: unknown field {field!r}", code="unknown_field", field=field, hint=hint
            ) from error
        missing = re.search(r"missing required field `([^`]*)`", text)
        if missing:
            field = f"{path}.{missing[1]}" if path else missing[1]
            raise InvalidField(f"cannot {what}: {field} is missing", field=field) from error
        raise InvalidField(
            f"cannot {what}: {path + ': ' if path else ''}{cause[:1].lower() + cause[1:]}", field=path or None
        ) from error


def from_json(body: bytes, what: str) -> Any:
    """The value in `body`.

    Raises:
        RequestError: it is not JSON; the message says where.
    """
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot {what}: the body is not JSON: {error}", code="invalid_json") from error
