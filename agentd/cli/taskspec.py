"""A task to submit, from flags, a TOML or JSON file, or both: the body of `POST /v1/tasks`.

What the daemon can judge is left to the daemon, so that there is one place that says what a valid task is.
Only what needs the caller's own files and environment is done here: inputs are read, mount sources become
absolute.

Flags go before the file: a scalar replaces the file's, `--env` and `--label` replace single entries,
`--input` and `--mount` are added, and a command behind `--` replaces the file's.
"""

from __future__ import annotations

import argparse
import base64
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agentd.cli.call import Parser
from agentd.cli.failures import Failure, UsageFailure

MAX_INPUT_BYTES = 24 * 1024 * 1024
"""All inputs together: base64 adds a third, and the daemon takes 32 MiB."""

_SCALARS = ("name", "class", "priority", "tenant", "memory", "cpus", "pids", "timeout", "grace")
_NUMBER = re.compile(r"\d+(\.\d+)?")


def arguments(parser: Parser) -> None:
    """The flags of `run` and `submit`: the names of a task's fields."""
    parser.set_defaults(verb=parser.verb)
    parser.usage = f"agentctl {parser.verb} [flags] [FILE.toml|FILE.json|-] [-- COMMAND...]"
    parser.add_argument("file", nargs="?", metavar="FILE", help="a task file, TOML or JSON; - reads standard input")
    parser.add_argument("-f", "--file", dest="file_flag", metavar="FILE", help="the same as a flag")
    task = parser.add_argument_group("the task (each goes before the file's value)")
    task.add_argument("--name", metavar="TEXT", help="a name for people")
    task.add_argument("--class", metavar="CLASS", help="interactive, normal or batch")
    task.add_argument("--priority", type=int, metavar="N", help="-100 to 100; higher starts earlier within its class")
    task.add_argument("--tenant", metavar="NAME", help="on whose account it runs")
    task.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="K[=V]",
        help="a variable; without =V, as it is set here (repeatable)",
    )
    task.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="SRC[:PATH]",
        help="a file to copy into the workspace (repeatable)",
    )
    task.add_argument(
        "--mount",
        action="append",
        default=[],
        metavar="SRC:TARGET[:ro|rw]",
        help="a host directory to show in the sandbox, read-only unless :rw (repeatable)",
    )
    task.add_argument("--memory", metavar="SIZE", help="such as 512M or 1.5G")
    task.add_argument("--cpus", type=float, metavar="N", help="processors, such as 0.5")
    task.add_argument("--pids", type=int, metavar="N", help="processes and threads")
    task.add_argument("--timeout", metavar="TIME", help="such as 90s or 1h30m: then the task is stopped")
    task.add_argument("--grace", metavar="TIME", help="between TERM and KILL")
    task.add_argument("--label", action="append", default=[], metavar="K=V", help="a label (repeatable)")


def body_of(args: argparse.Namespace, command: Sequence[str] | None) -> dict[str, Any]:
    """The request's body.

    Raises:
        UsageFailure: a flag or the file is wrong, or there is no command.
        Failure: a file cannot be read.
    """
    if args.file and args.file_flag:
        raise UsageFailure(f"cannot read two task files: {args.file} and {args.file_flag}", hint="name one")
    name = args.file_flag or args.file
    if args.verb == "run" and args.file and name != "-" and not name.endswith((".toml", ".json")):
        raise UsageFailure(
            f"cannot run {name!r} as a task file: it ends in neither .toml nor .json",
            hint="put a command behind `--`, or name the file with -f",
        )
    body = _from_file(name) if name else {}
    for field in _SCALARS:
        value = getattr(args, field)
        if value is not None:
            body[field] = _number(value) if field in ("memory", "timeout", "grace") else value
    if command is not None:
        body["command"] = list(command)
    if not body.get("command"):
        raise UsageFailure("cannot submit a task without a command", hint="put it behind `--`, or name a task file")
    for key, entries in (("env", map(_variable, args.env)), ("labels", map(_label, args.label))):
        found = dict(entries)
        if found:
            body[key] = _table(body.get(key), key) | found
    here = Path.cwd()
    inputs = [_input_flag(one) for one in args.input]
    mounts = [_mount_text(one, here) for one in args.mount]
    if inputs or mounts:
        for key, more in (("inputs", [(here, one) for one in inputs]), ("mounts", mounts)):
            if more:
                body[key] = [*_list(body.get(key), key), *more]
    if "inputs" in body:
        body["inputs"] = _read_inputs(_list(body["inputs"], "inputs"))
    return body


def parse_file(text: str, name: str) -> dict[str, Any]:
    """The table in a task file: JSON by its extension or first character, else TOML.

    Raises:
        UsageFailure: it is neither.
    """
    as_json = name.endswith(".json") or (not name.endswith(".toml") and text.lstrip()[:1] == "{")
    try:
        if as_json:
            import json

            found = json.loads(text)
        else:
            import tomllib

            found = tomllib.loads(text)
    except ValueError as error:  # JSONDecodeError and TOMLDecodeError, with line and column
        kind = "JSON" if as_json else "TOML"
        raise UsageFailure(
            f"cannot read the task file {name} as {kind}: {error}",
            hint="a command stands behind `--`: agentctl submit -- COMMAND...",
        ) from error
    if not isinstance(found, dict):
        raise UsageFailure(f"cannot read the task file {name}: it is a {type(found).__name__}, not an object")
    return found


def _from_file(name: str) -> dict[str, Any]:
    """The body that a task file describes; its inputs as pairs with the directory they are relative to."""
    try:
        raw = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise Failure(f"cannot read the task file {name}: {error.strerror}") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageFailure(f"cannot read the task file {name}: byte {error.start} is not UTF-8") from error
    body = parse_file(text, name)
    directory = Path.cwd() if name == "-" else Path(name).absolute().parent
    if "inputs" in body:
        body["inputs"] = [(directory, one) for one in _list(body["inputs"], "inputs")]
    if "mounts" in body:
        body["mounts"] = [_mount(one, directory) for one in _list(body["mounts"], "mounts")]
    return body


def _number(text: str) -> int | float | str:
    """`90` as the number that a task file would have; anything else as it is."""
    if not _NUMBER.fullmatch(text):
        return text
    return float(text) if "." in text else int(text)


def _list(value: object, field: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise UsageFailure(f"cannot read the task file: {field} is not a list")
    return value


def _table(value: object, field: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UsageFailure(f"cannot read the task file: {field} is not a table")
    return value


def _variable(text: str) -> tuple[str, str]:
    name, given, value = text.partition("=")
    if not name:
        raise UsageFailure(f"cannot read --env {text!r}: it has no name", hint="write --env NAME=VALUE or --env NAME")
    if given:
        return name, value
    here = os.environ.get(name)
    if here is None:
        raise UsageFailure(f"cannot pass {name} on: it is not set here", hint=f"write --env {name}=VALUE")
    return name, here


def _label(text: str) -> tuple[str, str]:
    name, given, value = text.partition("=")
    if not name or not given:
        raise UsageFailure(f"cannot read --label {text!r}", hint="write --label NAME=VALUE")
    return name, value


def _input_flag(text: str) -> dict[str, str]:
    source, _, path = text.partition(":")
    if not source:
        raise UsageFailure(
            f"cannot read --input {text!r}: it names no file",
            hint="write --input SOURCE or --input SOURCE:PATH",
        )
    return {"source": source, "path": path} if path else {"source": source}


def _mount_text(text: str, directory: Path) -> dict[str, Any]:
    source, _, rest = text.partition(":")
    target, _, mode = rest.partition(":")
    if not source or not target or mode not in ("", "ro", "rw"):
        raise UsageFailure(
            f"cannot read the mount {text!r}",
            hint="write SOURCE:TARGET, SOURCE:TARGET:ro or SOURCE:TARGET:rw",
        )
    return {"source": _absolute(source, directory), "target": target, "read_only": mode != "rw"}


def _mount(entry: object, directory: Path) -> object:
    if isinstance(entry, str):
        return _mount_text(entry, directory)
    if isinstance(entry, dict) and isinstance(entry.get("source"), str):
        return entry | {"source": _absolute(entry["source"], directory)}
    return entry  # the daemon says what is wrong with it


def _absolute(source: str, directory: Path) -> str:
    return os.path.abspath(directory / Path(source).expanduser())


def _read_inputs(entries: Sequence[tuple[Path, object]]) -> list[object]:
    """Every input as `{path, base64, mode}`; entries that are so already stay as they are."""
    found: list[object] = []
    sources: dict[str, str] = {}
    left = MAX_INPUT_BYTES
    for directory, entry in entries:
        if isinstance(entry, str):
            entry = {"source": entry}
        if not isinstance(entry, dict) or not isinstance(entry.get("source"), str):
            found.append(entry)
            continue
        unknown = set(entry) - {"source", "path", "mode"}
        if unknown:
            raise UsageFailure(
                f"cannot read the input {entry['source']}: there is no field {min(unknown)!r}",
                hint="an input has source, path and mode",
            )
        source = directory / Path(entry["source"]).expanduser()
        data, mode = _read_input(source, left)
        left -= len(data)
        path = str(entry.get("path") or source.name)
        if path in sources:
            raise UsageFailure(
                f"cannot send two inputs as {path!r}: {sources[path]} and {source}",
                hint="give one of them another path",
            )
        sources[path] = str(source)
        sent: dict[str, object] = {"path": path, "base64": base64.b64encode(data).decode("ascii")}
        if "mode" in entry:
            sent["mode"] = entry["mode"]
        elif mode & 0o111:
            sent["mode"] = 0o755  # a program stays one
        found.append(sent)
    return found


def _read_input(source: Path, limit: int) -> tuple[bytes, int]:
    """The content of a file of at most `limit` bytes, and its mode."""
    try:
        with open(source, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(limit + 1)
    except IsADirectoryError as error:
        raise Failure(
            f"cannot send the input {source}: it is a directory",
            hint="name its files, send a tar archive, or use --mount",
        ) from error
    except OSError as error:
        raise Failure(f"cannot send the input {source}: {error.strerror}") from error
    if len(data) > limit:
        raise Failure(
            f"cannot send the input {source}: all inputs together may have {MAX_INPUT_BYTES >> 20} MiB",
            hint="use --mount for large files",
        )
    return data, mode


def without_content(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A task's spec for reading: inputs by path and size."""
    found = dict(spec)
    if isinstance(found.get("inputs"), list):
        found["inputs"] = [
            {"path": one.get("path"), "bytes": len(one.get("base64") or "") * 3 // 4} if isinstance(one, dict) else one
            for one in found["inputs"]
        ]
    return found
