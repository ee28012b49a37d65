"""How things look: colour, alignment, ages, and text from tasks made harmless.

Names, progress texts and messages come from untrusted programs. In tables, status lines and messages every
control character of theirs is shown as an escape, so that none reaches the terminal. The *output* of a task
is another matter: `logs` and `run` pass its bytes as they are, like docker and journalctl -o cat, since
colours and progress bars are what people expect of it. Who reads the output of a program they do not trust
at all pipes it through `less` or uses `--json`.
"""

from __future__ import annotations

import io
import os
import re
import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

from agentd.core.units import format_duration, format_size

# C0, DEL, C1; marks that reorder text (UAX #9); line separators; lone surrogates, which no encoding takes.
_HARMFUL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_COLORS = {"red": "31", "green": "32", "yellow": "33", "blue": "34", "cyan": "36", "dim": "2", "bold": "1"}
STATE_COLORS = {
    "queued": "yellow",
    "starting": "cyan",
    "running": "cyan",
    "paused": "yellow",
    "finishing": "cyan",
    "succeeded": "green",
    "failed": "red",
    "cancelled": "yellow",
    "expired": "red",
}


def harmless(text: object) -> str:
    r"""`text` with its control characters written out: ESC becomes `\x1b`."""

    def written(found: re.Match[str]) -> str:
        code = ord(found[0])
        return {9: "\\t", 10: "\\n", 13: "\\r"}.get(code) or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")

    return _HARMFUL.sub(written, str(text))


def width(text: str) -> int:
    """The columns that `text` takes."""
    if text.isascii():
        return len(text)
    import unicodedata

    return sum(
        0 if unicodedata.combining(one) else 2 if unicodedata.east_asian_width(one) in "WF" else 1 for one in text
    )


def clip(text: str, columns: int, ellipsis: str = "…") -> str:
    """`text` in at most `columns` columns."""
    if width(text) <= columns:
        return text
    while text and width(text) > columns - len(ellipsis):
        text = text[:-1]
    return text + ellipsis


class Terminal:
    """One of the two output streams, and what may be written to it. `color` is auto, always or never."""

    def __init__(self, stream: TextIO, color: str = "auto"):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        self.stream = stream
        try:
            self.is_tty = stream.isatty()
        except ValueError:  # closed by whoever started us
            self.is_tty = False
        self.dumb = os.environ.get("TERM") in (None, "", "dumb")
        self.colored = color == "always" or (color == "auto" and self._wants_color())
        encoding = (getattr(stream, "encoding", None) or "ascii").lower().replace("-", "")
        self.unicode = encoding.startswith("utf")

    def _wants_color(self) -> bool:
        if os.environ.get("NO_COLOR"):  # https://no-color.org
            return False
        if os.environ.get("CLICOLOR_FORCE", "0") not in ("", "0"):  # https://bixense.com/clicolors
            return True
        return self.is_tty and not self.dumb

    @property
    def dot(self) -> str:
        """Between the parts of a summary."""
        return " · " if self.unicode else ", "

    @property
    def ellipsis(self) -> str:
        """For what was cut off."""
        return "…" if self.unicode else "~"

    def columns(self) -> int:
        """The width of the terminal, 80 where there is none."""
        try:
            return os.get_terminal_size(self.stream.fileno()).columns or 80
        except (OSError, ValueError):
            return 80

    def paint(self, text: str, color: str | None) -> str:
        """`text` in a colour, where colours are wanted."""
        return f"\x1b[{_COLORS[color]}m{text}\x1b[0m" if color and self.colored else text

    def state(self, name: object) -> str:
        """A state's name in its colour."""
        return self.paint(harmless(name), STATE_COLORS.get(str(name)))

    def line(self, text: str = "") -> None:
        """Writes a line and flushes."""
        self.stream.write(text + "\n")
        self.stream.flush()

    def raw(self, data: bytes) -> None:
        """Writes bytes as they are and flushes."""
        self.stream.flush()
        buffer = getattr(self.stream, "buffer", None)
        if buffer is None:  # a stream that somebody put in place of the real one
            self.stream.write(data.decode("utf-8", "replace"))
        else:
            buffer.write(data)
            buffer.flush()

    def document(self, value: Any) -> None:
        """Writes one JSON document: indented for people, in one line for programs."""
        import json

        self.line(json.dumps(value, indent=2 if self.is_tty else None, ensure_ascii=not self.unicode))

    def record(self, value: Any) -> None:
        """Writes one JSON value in one line, as streams do."""
        import json

        self.line(json.dumps(value, ensure_ascii=not self.unicode))

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], *, state_column: int | None = None) -> None:
        """Writes aligned columns; the cells are harmless already."""
        sizes = [max(width(row[index]) for row in (header, *rows)) for index in range(len(header))]
        for number, row in enumerate((header, *rows)):
            cells = []
            for index, cell in enumerate(row):
                gap = " " * (sizes[index] - width(cell)) if index < len(row) - 1 else ""
                if number == 0:
                    cell = self.paint(cell, "bold")
                elif index == state_column:
                    cell = self.state(cell)
                cells.append(cell + gap)
            self.line("  ".join(cells).rstrip())


def age(since: float | None, now: float | None = None) -> str:
    """How long ago `since` was."""
    if since is None:
        return "-"
    return format_duration(max(0.0, (time.time() if now is None else now) - since))


def moment(when: float | None) -> str:
    """A Unix time as local date and time with its age."""
    if when is None:
        return "-"
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(when))} ({age(when)} ago)"


def timestamp(when: float) -> str:
    """RFC 3339 in UTC with milliseconds."""
    whole = int(when)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{int((when - whole) * 1000):03d}Z"


def size(count: object) -> str:
    """Bytes for people."""
    return format_size(float(count)) if isinstance(count, int | float) else "-"


def duration(seconds: object) -> str:
    """Seconds for people."""
    return format_duration(float(seconds)) if isinstance(seconds, int | float) else "-"


def cost(llm: dict[str, Any] | None) -> str:
    """Dollars for people; `-` when no model was asked, `>=` when some price is not known."""
    if not llm or not llm.get("requests"):
        return "-"
    dollars = float(llm.get("cost_usd") or 0.0)
    text = f"${dollars:.2f}" if dollars >= 1 or dollars == 0 else f"${dollars:.4f}"
    return text if llm.get("cost_known", True) else f">={text}"


def streams(color: str) -> tuple[Terminal, Terminal]:
    """stdout and stderr."""
    return Terminal(sys.stdout, color), Terminal(sys.stderr, color)
