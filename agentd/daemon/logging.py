"""structlog, set up once: to the journal with fields when systemd started us, readable on a terminal, JSON elsewhere."""

from __future__ import annotations

import logging
import sys
from typing import Any

import msgspec
import structlog

from agentd.daemon.journal import Journal, under_systemd

_PRIORITY = {"debug": 7, "info": 6, "warning": 4, "error": 3, "exception": 3, "critical": 2}


class _ToJournal:
    """The last processor: an entry with its fields in capitals, as journald wants them."""

    def __init__(self, journal: Journal):
        self._journal = journal

    def __call__(self, _: Any, method: str, event: dict[str, Any]) -> str:
        message = str(event.pop("event", ""))
        level = str(event.pop("level", method))
        fields: dict[str, str | bytes] = {}
        shown = []
        for key, value in event.items():
            if value is None:
                continue
            name = key.upper() if key.isupper() else f"AGENTD_{key.upper()}"
            fields[name] = value if isinstance(value, str) else msgspec.json.encode(value, enc_hook=str).decode()
            if not key.isupper():
                shown.append(f"{key}={value}")
            elif key == "AGENTD_TASK":
                message = f"{value}: {message}"
        self._journal.send(" ".join([message, *shown]), _PRIORITY.get(level, 6), fields)
        raise structlog.DropEvent


def set_up(level: str) -> None:
    """From now on `structlog.get_logger()` works."""
    processors: list[Any] = [structlog.contextvars.merge_contextvars, structlog.processors.add_log_level]
    if under_systemd() and Journal.present():
        processors += [structlog.processors.format_exc_info, _ToJournal(Journal())]
    elif sys.stderr.isatty():
        processors += [structlog.processors.TimeStamper(fmt="%H:%M:%S"), structlog.dev.ConsoleRenderer()]
    else:
        processors += [
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(name)s: %(message)s")
