"""What is submitted: a task as a value that is valid once it exists."""

from __future__ import annotations

import base64
import binascii
import json
from enum import StrEnum
from typing import Any

import msgspec

from agentd.core import ids, wire
from agentd.core.errors import InvalidField, TooLarge
from agentd.core.parse import convert
from agentd.core.units import parse_duration, parse_size
from agentd.runtime.environment import RESERVED, WORKSPACE

INPUT_LIMIT_BYTES = 24 << 20
DOING = "accept the task"


class TaskClass(StrEnum):
    """How urgent: `interactive` before `normal` before `batch`."""

    INTERACTIVE = "interactive"
    NORMAL = "normal"
    BATCH = "batch"


class Input(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file put into the workspace before the start; `base64` is its content."""

    path: str
    base64: str
    mode: int = 0o644


class Mount(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A host directory shown inside the sandbox."""

    source: str
    target: str
    read_only: bool = True


class TaskSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One task. Sizes are bytes or `512M`; durations seconds or `5m`."""

    command: list[str]
    name: str = ""
    class_: TaskClass = msgspec.field(default=TaskClass.NORMAL, name="class")
    priority: int = 0
    tenant: str = "default"
    env: dict[str, str] = {}
    inputs: list[Input] = []
    mounts: list[Mount] = []
    memory: int | str = "1G"
    cpus: float = 1.0
    pids: int = 512
    timeout: float | str = "1h"
    grace: float | str = "10s"
    labels: dict[str, str] = {}

    @property
    def memory_bytes(self) -> int:
        """The memory limit in bytes."""
        return parse_size(self.memory)

    @property
    def timeout_s(self) -> float:
        """The time limit in seconds."""
        return parse_duration(self.timeout)

    @property
    def grace_s(self) -> float:
        """Seconds between TERM and KILL."""
        return parse_duration(self.grace)

    @property
    def limits(self) -> wire.Limits:
        """As the warden wants them."""
        return wire.Limits(self.memory_bytes, self.cpus, self.pids)


def parse(raw: object) -> TaskSpec:
    """A task from what came in.

    Raises:
        InvalidField: names the field, the value and what is permitted.
    """
    spec = convert(raw, TaskSpec, DOING)
    if not spec.command or not spec.command[0] or len(spec.command) > wire.MAX_ARGV:
        raise _wrong("command", spec.command[:1], "an argv of 1 to 1,024 strings, the first not empty")
    if any("\0" in part for part in spec.command) or sum(map(len, spec.command)) > 100_000:
        raise _wrong("command", "…", "strings without NUL, 100,000 characters together")
    if not ids.is_name(spec.tenant):
        raise _wrong("tenant", spec.tenant, "a name: a-z, 0-9, '_', '.', '-', at most 40")
    if len(spec.name) > 100 or not spec.name.isprintable():
        raise _wrong("name", spec.name[:100], "at most 100 printable characters")
    if not -100 <= spec.priority <= 100:
        raise _wrong("priority", spec.priority, "from -100 to 100")
    if not 0.01 <= spec.cpus <= 4096:
        raise _wrong("cpus", spec.cpus, "a number of processors from 0.01")
    if not 4 <= spec.pids <= 1 << 22:
        raise _wrong("pids", spec.pids, "from 4 to 4194304")
    if _size("memory", spec.memory) < wire.MEMORY_MIN_BYTES:
        raise _wrong("memory", spec.memory, "at least 16M")
    if not 0 < _duration("timeout", spec.timeout) <= 366 * 86400:
        raise _wrong("timeout", spec.timeout, "above 0 and at most 366d")
    if not 0 <= _duration("grace", spec.grace) <= 3600:
        raise _wrong("grace", spec.grace, "at most 1h")
    _check_env(spec)
    _check_inputs(spec)
    if len(spec.mounts) > wire.MAX_MOUNTS:
        raise _wrong("mounts", len(spec.mounts), f"at most {wire.MAX_MOUNTS}")
    for index, mount in enumerate(spec.mounts):
        wire.absolute_path(mount.source, f"mounts[{index}].source")
        wire.absolute_path(mount.target, f"mounts[{index}].target")
    if len(spec.labels) > 32 or any(len(key) > 63 or len(value) > 255 for key, value in spec.labels.items()):
        raise _wrong("labels", len(spec.labels), "at most 32, keys to 63 and values to 255 characters")
    return spec


def _check_env(spec: TaskSpec) -> None:
    if len(spec.env) > wire.MAX_ENV - 64 or sum(len(key) + len(value) for key, value in spec.env.items()) > 40_000:
        raise _wrong("env", f"{len(spec.env)} variables", "at most 448, 40,000 characters together")
    if len(json.dumps([spec.command, spec.env])) > wire.MAX_MESSAGE_BYTES - 16_384:
        raise _wrong("command", "…", "with env at most 144 KiB as JSON; put data into inputs")
    for key, value in spec.env.items():
        if (
            not key.replace("_", "a").isalnum()
            or not key.isascii()
            or key[0].isdigit()
            or len(key) > 128
            or "\0" in value
        ):
            raise _wrong(f"env.{key[:80]}", value[:80], "a variable: letters, digits, '_'")
        if key in RESERVED:
            raise InvalidField(f"cannot {DOING}: env.{key} is set by agentd", field=f"env.{key}", hint="leave it out")


def _check_inputs(spec: TaskSpec) -> None:
    total = 0
    for index, one in enumerate(spec.inputs):
        wire.relative_path(one.path, f"inputs[{index}].path")
        if not 0 <= one.mode <= 0o777:
            raise _wrong(f"inputs[{index}].mode", one.mode, "from 0 to 0o777")
        total += len(content(one, index))
    if total > INPUT_LIMIT_BYTES:
        raise TooLarge(
            f"cannot {DOING}: inputs have {total} bytes, the limit is {INPUT_LIMIT_BYTES}",
            field="inputs",
            hint="mount the data instead",
        )


def content(one: Input, index: int = 0) -> bytes:
    """The bytes of an input."""
    try:
        return base64.b64decode(one.base64, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _wrong(f"inputs[{index}].base64", one.base64[:20], "base64") from error


def _size(field: str, value: int | str) -> int:
    try:
        return parse_size(value)
    except ValueError as error:
        raise InvalidField(
            f"cannot {DOING}: {field}: {value!r} is {error}", field=field, hint="for example 512M or 2G"
        ) from error


def _duration(field: str, value: float | str) -> float:
    try:
        return parse_duration(value)
    except ValueError as error:
        raise InvalidField(
            f"cannot {DOING}: {field}: {value!r} is {error}", field=field, hint="for example 90s, 5m or 1h30m"
        ) from error


def _wrong(field: str, value: object, permitted: str) -> InvalidField:
    return InvalidField(
        f"cannot {DOING}: {field}: {value!r} is not permitted", field=field, hint=f"permitted: {permitted}"
    )


def schema() -> dict[str, Any]:
    """The JSON Schema of a task."""
    found = msgspec.json.schema(TaskSpec)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "agentd task", **found}


__all__ = ["WORKSPACE", "Input", "Mount", "TaskClass", "TaskSpec", "content", "parse", "schema"]
