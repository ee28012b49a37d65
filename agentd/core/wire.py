"""What daemon and warden say to each other: one JSON object per SOCK_SEQPACKET packet.

A request is `{"seq": n, "op": name, …}`, its answer `{"seq": n, "ok": true, …}` or `{"seq": n, "error": {…}}`, with file
descriptors beside it by SCM_RIGHTS; an event from the warden is `{"event": name, …}`. The types here validate everything on
arrival: the warden treats the daemon as hostile, so a request that parses is a request that may be carried out.
Only the standard library, since the warden imports it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from agentd.core.errors import InvalidField, RequestError
from agentd.core.ids import is_name

MAX_MESSAGE_BYTES = 160 * 1024
"""Longest packet; below the default SO_SNDBUF limit of 212,992 bytes."""
MAX_FDS = 4
MAX_ARGV = 1024
MAX_ENV = 512
MAX_STRING = 128 * 1024
MAX_MOUNTS = 32
MEMORY_MIN_BYTES = 16 * 1024**2

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}\Z")
_UNFIT = re.compile("[\0\ud800-\udfff]")
"""What no path, argument or variable can hold: NUL, and surrogates, which JSON lets through and UTF-8 does not."""


@dataclass(frozen=True, slots=True)
class Mount:
    """A host directory or file shown inside the sandbox at `target`."""

    source: str
    target: str
    read_only: bool = True


@dataclass(frozen=True, slots=True)
class Limits:
    """What the kernel holds a sandbox to. `cpus` is a share of wall time: 1.5 is one and a half processors."""

    memory_bytes: int
    cpus: float
    pids: int


@dataclass(frozen=True, slots=True)
class SandboxSpec:
    """Everything that tells one sandbox from another. `epoch` only grows for one `id`; the workspace is named like the id."""

    id: str
    epoch: int
    tenant: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    cwd: str
    limits: Limits
    mounts: tuple[Mount, ...] = ()
    cpu_weight: int = 100

    def as_dict(self) -> dict[str, Any]:
        """As it travels."""
        return asdict(self) | {"env": dict(self.env)}


@dataclass(frozen=True, slots=True)
class Exit:
    """How a sandbox's main process ended: `code` or `signal` is set, unless it was lost (neither)."""

    code: int | None = None
    signal: int | None = None
    ended_at: float = 0.0
    oom: bool = False
    lost: str | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """What the kernel counted for one sandbox, in CPU seconds, bytes and packets."""

    cpu_s: float = 0.0
    memory_bytes: int = 0
    memory_peak_bytes: int = 0
    pids: int = 0
    io_read_bytes: int = 0
    io_write_bytes: int = 0
    net_tx_bytes: int = 0
    net_rx_bytes: int = 0
    net_tx_packets: int = 0
    net_rx_packets: int = 0
    denied_packets: int = 0


@dataclass(frozen=True, slots=True)
class SandboxStatus:
    """One sandbox as the warden knows it."""

    id: str
    epoch: int
    tenant: str
    address4: str
    address6: str
    started_at: float
    exit: Exit | None = None
    usage: Usage = field(default_factory=Usage)


class Fields:
    """Takes typed fields out of one untrusted JSON object and, at the end, refuses what is left over."""

    def __init__(self, raw: object, where: str = ""):
        if not isinstance(raw, dict):
            raise InvalidField(f"cannot read the request: {where or 'it'} is not an object", field=where)
        self._raw: dict[str, Any] = dict(raw)
        self._where = where

    def _name(self, key: str) -> str:
        return f"{self._where}.{key}" if self._where else key

    def _take(self, key: str, check: Callable[[Any], bool], wanted: str, default: object = ...) -> Any:
        if key not in self._raw:
            if default is not ...:
                return default
            raise InvalidField(f"cannot read the request: {self._name(key)} is missing", field=self._name(key))
        value = self._raw.pop(key)
        if not check(value):
            # str() of what nests deep meets the recursion limit.
            shown = type(value).__name__ if isinstance(value, list | dict) else str(value)[:80]
            raise InvalidField(
                f"cannot read the request: {self._name(key)}: {shown!r} is not {wanted}",
                field=self._name(key),
            )
        return value

    def text(self, key: str, *, longest: int = 4096, default: object = ...) -> str:
        """A string without NUL."""
        found: str = self._take(
            key,
            lambda v: isinstance(v, str) and len(v) <= longest and not _UNFIT.search(v),
            f"a string of at most {longest}",
            default,
        )
        return found

    def name(self, key: str) -> str:
        """A string that may name a task, tenant or workspace."""
        found: str = self._take(key, lambda v: isinstance(v, str) and is_name(v), "a name (a-z, 0-9, _.-; at most 40)")
        return found

    def integer(self, key: str, low: int, high: int, default: object = ...) -> int:
        """An integer in [low, high]."""
        found: int = self._take(
            key, lambda v: type(v) is int and low <= v <= high, f"an integer from {low} to {high}", default
        )
        return found

    def number(self, key: str, low: float, high: float, default: object = ...) -> float:
        """A finite number in [low, high]."""
        return float(
            self._take(
                key,
                lambda v: type(v) in (int, float) and low <= v <= high,
                f"a number from {low} to {high}",
                default,
            )
        )

    def flag(self, key: str, default: object = ...) -> bool:
        """True or false."""
        return bool(self._take(key, lambda v: isinstance(v, bool), "true or false", default))

    def items(self, key: str, longest: int, default: object = ...) -> list[Any]:
        """A list, its items unchecked."""
        found: list[Any] = self._take(
            key, lambda v: isinstance(v, list) and len(v) <= longest, f"a list of at most {longest}", default
        )
        return list(found)

    def strings(self, key: str, longest: int) -> tuple[str, ...]:
        """A list of strings without NUL."""
        found = self.items(key, longest)
        if not all(isinstance(v, str) and not _UNFIT.search(v) for v in found) or sum(map(len, found)) > MAX_STRING:
            raise InvalidField(
                f"cannot read the request: {self._name(key)} is not a list of strings", field=self._name(key)
            )
        return tuple(found)

    def table(self, key: str) -> Fields:
        """A nested object."""
        return Fields(self._raw.pop(key, None), self._name(key))

    def raw(self, key: str) -> Any:
        """A value as it came."""
        return self._raw.pop(key, None)

    def end(self) -> None:
        """Refuse what nobody asked for."""
        if self._raw:
            key = sorted(self._raw, key=str)[0]
            raise InvalidField(
                f"cannot read the request: {self._name(str(key)[:80])} is not known here",
                field=self._name(str(key)[:80]),
            )


def absolute_path(text: str, where: str) -> str:
    """`text`, if it is an absolute path without `.`, `..` or empty parts."""
    parts = text.split("/")
    if (
        not text.startswith("/")
        or any(part in ("", ".", "..") for part in parts[1:])
        or len(text) > 4000
        or _UNFIT.search(text)
    ):
        raise InvalidField(f"cannot read the request: {where}: {text[:80]!r} is not a plain absolute path", field=where)
    return text


def relative_path(text: str, where: str) -> str:
    """`text`, if it is a relative path that stays below where it starts."""
    parts = text.split("/")
    if (
        len(text) > 4000
        or _UNFIT.search(text)
        or any(part in ("", ".", "..") or len(part.encode()) > 255 for part in parts)
    ):
        raise InvalidField(
            f"cannot read the request: {where}: {text[:80]!r} is not a path below the workspace",
            field=where,
            hint="write it relative, without '..'",
        )
    return text


def spec_from(fields: Fields) -> SandboxSpec:
    """A valid `SandboxSpec` from an untrusted object.

    Raises:
        InvalidField: names the field.
    """
    limits = fields.table("limits")
    found_limits = Limits(
        memory_bytes=limits.integer("memory_bytes", MEMORY_MIN_BYTES, 1 << 50),
        cpus=limits.number("cpus", 0.01, 4096),
        pids=limits.integer("pids", 4, 1 << 22),
    )
    limits.end()
    env_raw = fields.raw("env")
    if not isinstance(env_raw, dict) or len(env_raw) > MAX_ENV:
        raise InvalidField("cannot read the request: env is not a table of strings", field="env")
    for key, value in env_raw.items():
        if not isinstance(value, str) or not _ENV_NAME.match(key) or _UNFIT.search(value):
            raise InvalidField(
                f"cannot read the request: env.{key[:80]} is not a variable with a string value",
                field=f"env.{key[:80]}",
            )
    mounts = []
    for index, raw in enumerate(fields.items("mounts", MAX_MOUNTS, default=[])):
        one = Fields(raw, f"mounts[{index}]")
        mounts.append(
            Mount(
                absolute_path(one.text("source"), f"mounts[{index}].source"),
                absolute_path(one.text("target"), f"mounts[{index}].target"),
                one.flag("read_only", True),
            )
        )
        one.end()
    spec = SandboxSpec(
        id=fields.name("id"),
        epoch=fields.integer("epoch", 1, 1 << 31),
        tenant=fields.name("tenant"),
        argv=fields.strings("argv", MAX_ARGV),
        env=dict(env_raw),
        cwd=absolute_path(fields.text("cwd"), "cwd"),
        limits=found_limits,
        mounts=tuple(mounts),
        cpu_weight=fields.integer("cpu_weight", 1, 10000, 100),
    )
    if not spec.argv or not spec.argv[0]:
        raise InvalidField("cannot read the request: argv is empty", field="argv")
    return spec


def status_from(raw: Mapping[str, Any]) -> SandboxStatus:
    """A `SandboxStatus` as the warden sent it (trusted: the warden is root)."""
    ended = raw.get("exit")
    return SandboxStatus(
        id=raw["id"],
        epoch=raw["epoch"],
        tenant=raw["tenant"],
        address4=raw["address4"],
        address6=raw["address6"],
        started_at=raw["started_at"],
        exit=Exit(**ended) if ended else None,
        usage=Usage(**raw.get("usage", {})),
    )


def encode(message: Mapping[str, Any]) -> bytes:
    """One packet.

    Raises:
        RequestError: it would be longer than `MAX_MESSAGE_BYTES`.
    """
    packet = json.dumps(message, separators=(",", ":")).encode()
    if len(packet) > MAX_MESSAGE_BYTES:
        raise RequestError(
            f"cannot send the request: it has {len(packet)} bytes, the limit is {MAX_MESSAGE_BYTES}",
            code="too_large",
            hint="shorten the command and its environment; put data into inputs",
        )
    return packet


def decode(packet: bytes) -> dict[str, Any]:
    """The object in one packet.

    Raises:
        RequestError: it is not one JSON object, or nests too deep.
    """
    try:
        found = json.loads(packet)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"cannot read the request: {type(error).__name__}", code="invalid_json") from error
    if not isinstance(found, dict):
        raise RequestError("cannot read the request: not a JSON object", code="invalid_json")
    return found
