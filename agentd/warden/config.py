"""The warden's own configuration: `warden.toml`, owned by root, so that no daemon can widen what it may ask for."""

from __future__ import annotations

import difflib
import os
import pwd
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentd.core.errors import InvalidField
from agentd.core.places import Places

KEYS = {"daemon_user": str, "mount_roots": list, "cgroup": str, "tmp_bytes": int, "shm_bytes": int}


@dataclass(frozen=True, slots=True)
class WardenConfig:
    """What the warden was told by root."""

    daemon_uid: int
    mount_roots: tuple[str, ...]
    """Host directories below which a task's `mounts` may lie."""
    cgroup: str | None
    """A delegated v2 group, from the root of the hierarchy; None: a group of our own below the warden's."""
    tmp_bytes: int
    shm_bytes: int


def load(places: Places) -> WardenConfig:
    """Read `warden.toml`; a missing file means the defaults.

    Raises:
        InvalidField: it is writable by others, has an unknown key or a value of the wrong kind.
    """
    path = places.config / "warden.toml"
    raw: dict[str, Any] = {}
    if path.exists():
        info = path.stat()
        if info.st_uid != 0 or info.st_mode & 0o022:
            raise InvalidField(
                f"cannot trust {path}: it must be owned by root and writable by nobody else",
                hint=f"chown root {path}; chmod 644 {path}",
            )
        try:
            raw = tomllib.loads(path.read_text())
        except tomllib.TOMLDecodeError as error:
            raise InvalidField(f"cannot read {path}: {error}") from error
    for key, value in raw.items():
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, 1)
            raise InvalidField(
                f"cannot use {path}: unknown key {key!r}",
                field=key,
                hint=f"did you mean {near[0]!r}?" if near else f"known: {', '.join(KEYS)}",
            )
        if not isinstance(value, KEYS[key]):
            raise InvalidField(f"cannot use {path}: {key} = {value!r} is not a {KEYS[key].__name__}", field=key)
    return WardenConfig(
        daemon_uid=_uid(raw.get("daemon_user", "agentd"), path),
        mount_roots=tuple(_root(entry, path) for entry in raw.get("mount_roots", [])),
        cgroup=raw.get("cgroup"),
        tmp_bytes=raw.get("tmp_bytes", 1 << 30),
        shm_bytes=raw.get("shm_bytes", 256 << 20),
    )


def _uid(name: str, path: Path) -> int:
    if name.isdigit():
        return int(name)
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        raise InvalidField(
            f"cannot use {path}: daemon_user: no user {name!r}",
            field="daemon_user",
            hint=f"useradd --system {name}, or give a number",
        ) from None


def _root(entry: object, path: Path) -> str:
    if not isinstance(entry, str) or not entry.startswith("/") or os.path.normpath(entry) != entry or entry == "/":
        raise InvalidField(
            f"cannot use {path}: mount_roots: {entry!r} is not a plain absolute directory below /", field="mount_roots"
        )
    return entry
