"""Sizes and durations as people write them."""

from __future__ import annotations

import re

_SIZE = re.compile(r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*([kmgt]?)(?:i?b)?\s*\Z", re.IGNORECASE)
_DURATION_PART = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)(ms|s|m|h|d)")
LONGEST_S = 1e15
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_size(value: int | str) -> int:
    """Bytes of `512M`, `1.5G`, `4096`; the prefixes are powers of 1024.

    Raises:
        ValueError: it is not a size.
    """
    if isinstance(value, bool):
        raise ValueError("a size, not true or false")
    if isinstance(value, int):
        if value < 0:
            raise ValueError("below 0")
        return value
    found = _SIZE.match(value)
    if not found:
        raise ValueError("not a size: write bytes or a number with K, M, G or T")
    return int(float(found[1]) * 1024 ** "_kmgt".index((found[2] or "_").lower()))


def parse_duration(value: float | str) -> float:
    """Seconds of `90s`, `5m`, `1h30m`, `250ms`, or of a bare number.

    Raises:
        ValueError: it is not a duration.
    """
    if isinstance(value, bool):
        raise ValueError("a duration, not true or false")
    if isinstance(value, int | float):
        if not 0 <= value <= LONGEST_S:  # also NaN
            raise ValueError("not a duration")
        return float(value)
    text = value.strip().lower().replace(" ", "")
    if re.fullmatch(r"\d{1,15}(\.\d{1,15})?", text):
        return float(text)
    parts = _DURATION_PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError("not a duration: write seconds or 90s, 5m, 1h30m")
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)


def format_size(count: float) -> str:
    """`1536` as `1.5K`."""
    for unit in ("B", "K", "M", "G"):
        if count < 1024:
            return f"{count:.0f}{unit}" if unit == "B" or count >= 100 else f"{count:.1f}{unit}"
        count /= 1024
    return f"{count:.1f}T"


def format_duration(seconds: float) -> str:
    """`3700` as `1h1m`."""
    if seconds < 60:
        return f"{seconds:.1f}s" if seconds < 10 else f"{seconds:.0f}s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest}s" if rest else f"{minutes}m"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m" if minutes else f"{hours}h"
