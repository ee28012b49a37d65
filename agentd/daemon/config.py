"""`agentd.toml` and `agentd.toml.d/*.toml` as one value. Unknown keys are errors; every error names the file's key."""

from __future__ import annotations

import os
import tomllib
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec

from agentd.core.errors import InvalidField
from agentd.core.parse import convert
from agentd.core.places import Places
from agentd.core.units import parse_size
from agentd.llm.settings import LlmSettings, Routes


class TaskLog(StrEnum):
    """Where a task's output goes."""

    FILES = "files"
    JOURNALD = "journald"


class LogSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[log]`: `level` of the daemon's own lines; `tasks` and `task_limit` of tasks' output."""

    level: str = "info"
    tasks: TaskLog = TaskLog.FILES
    task_limit: int | str = "16M"


class TaskSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[tasks]`: how many at once (0: by the host's processors), and how many may wait."""

    max_running: int = 0
    max_queued: int = 100_000


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything an operator may set."""

    log: LogSettings = msgspec.field(default_factory=LogSettings)
    tasks: TaskSettings = msgspec.field(default_factory=TaskSettings)
    llm: LlmSettings = msgspec.field(default_factory=LlmSettings)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidField(f"cannot read {path}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise InvalidField(
            f"cannot read {path}: {error}", hint="the position is the line and column in that file"
        ) from error


def check(raw: dict[str, Any], what: str = "use the configuration") -> Config:
    """A valid configuration.

    Raises:
        InvalidField: names the key.
    """
    config = convert(raw, Config, what)
    if config.log.level not in ("debug", "info", "warning", "error"):
        raise InvalidField(
            f"cannot {what}: log.level: {config.log.level!r} is none",
            field="log.level",
            hint="permitted: debug, info, warning, error",
        )
    try:
        if parse_size(config.log.task_limit) < 1 << 17:
            raise ValueError("below 128K")
    except ValueError as error:
        raise InvalidField(
            f"cannot {what}: log.task_limit: {config.log.task_limit!r} is {error}",
            field="log.task_limit",
            hint="for example 16M",
        ) from error
    if config.tasks.max_running < 0 or config.tasks.max_queued < 1:
        raise InvalidField(f"cannot {what}: tasks: max_running is from 0 and max_queued from 1", field="tasks")
    Routes(config.llm)
    return config


def load(places: Places) -> Config:
    """The configuration in force: the main file, then the drop-ins by name, later ones winning key by key."""
    raw: dict[str, Any] = {}
    main = places.config / "agentd.toml"
    if main.exists():
        raw = _read(main)
    drop_ins = places.config / "agentd.toml.d"
    if drop_ins.is_dir():
        for path in sorted(drop_ins.glob("*.toml")):
            raw = _merge(raw, _read(path))
    return check(raw, f"use {main}")


def check_file(path: Path) -> Config:
    """The configuration in one file."""
    return check(_read(path), f"use {path}")


def credentials(places: Places) -> dict[str, str]:
    """Secrets by name: systemd's credentials directory, and files in `credentials/` that nobody else can read.

    Raises:
        InvalidField: a file can be read by others.
    """
    found: dict[str, str] = {}
    own = places.config / "credentials"
    if own.is_dir():
        for path in sorted(own.iterdir()):
            if path.is_file():
                if path.stat().st_mode & 0o077:
                    raise InvalidField(f"cannot use {path}: others can read it", hint=f"chmod 600 {path}")
                found[path.name] = path.read_text().strip()
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    if directory:
        for path in sorted(Path(directory).iterdir()):
            found[path.name] = path.read_text().strip()
    return found


def show(config: Config) -> dict[str, Any]:
    """As a JSON-able value. Secrets are not in the configuration, only their names."""
    found = msgspec.to_builtins(config)
    assert isinstance(found, dict)
    return found
