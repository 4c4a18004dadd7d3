"""Quantities people write ("80GiB", "500m", "2h") as integers, and back.

Used by the spec models and by the CLI. Every parser raises `ValueError` with a sentence that tells what is allowed;
every formatter writes text that its parser reads back to the same integer. The bounds keep every sum over the 10,000
replicas that a job may have within a signed 64-bit integer, which is what the store can hold. Texts are
remembered, because a store that loads 100,000 specs meets the same few again and again.
"""

from __future__ import annotations

import re
from functools import lru_cache

MAX_MS = 10 * 365 * 86_400_000
MAX_BYTES = 2**49
MAX_CPU_MILLI = 10**9
MAX_TEXT = 64
"""Longest text that is looked at; no quantity needs more."""

_DURATION_UNITS_MS = {"w": 604_800_000, "d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1_000, "ms": 1}
_BYTE_UNITS = {
    "Ti": 2**40, "TB": 10**12, "Gi": 2**30, "GB": 10**9, "Mi": 2**20, "MB": 10**6, "Ki": 2**10, "KB": 10**3, "": 1,
}
_BYTE_SPELLINGS = {"b": 1} | {
    spelling.lower(): size
    for unit, size in _BYTE_UNITS.items()
    for spelling in (unit, f"{unit[:1]}iB" if unit.endswith("i") else unit[:1])
}
_NUMBER = r"([0-9]{1,15}(?:\.[0-9]{1,9})?)"
_NUMBER_ONLY = re.compile(_NUMBER)
_DURATION_PART = re.compile(rf"\s*{_NUMBER}\s*(ms|s|m|h|d|w)\s*")
_CLOCK = re.compile(r"(?:([0-9]{1,4})-)?([0-9]{1,4}):([0-5][0-9]):([0-5][0-9])")
_BYTES = re.compile(rf"{_NUMBER}\s*([a-z]{{0,3}})", re.IGNORECASE)
_CPU = re.compile(rf"{_NUMBER}(m?)")

DURATION = (r"^\s*(([0-9]+(\.[0-9]+)?\s*([mM]?[sS]|[mMhHdDwW])\s*)+|[0-9]+(\.[0-9]+)?|"
            r"([0-9]+-)?[0-9]+:[0-5][0-9]:[0-5][0-9])\s*$")
SIZE = r"^\s*[0-9]+(\.[0-9]+)?\s*([kKmMgGtT]([iI][bB]?|[bB])?|[bB])?\s*$"
CPUS = r"^\s*[0-9]+(\.[0-9]+)?m?\s*$"
"""What the texts look like, for schemas; in the part of regular expressions that ECMA-262 and RE2 share."""


def parse_duration_ms(value: object) -> int:
    """Milliseconds of "90s", "1h30m", "2d", of "1:30:00" or "2-12:00:00" (Slurm), or of a bare number of seconds."""
    number = _number_or_text(value, "a duration; write for example 90s, 30m, 2h or 1h30m")
    ms = _duration_text(number) if isinstance(number, str) else number * 1_000
    if ms is None:
        raise ValueError(f"{show(value)} is not a duration; write for example 90s, 30m, 2h or 1h30m")
    return _within(ms, MAX_MS, value, "a duration (0 to 10 years)")


@lru_cache(1_024)
def _duration_text(text: str) -> float | None:
    text = text.lower()
    if _NUMBER_ONLY.fullmatch(text):
        return float(text) * 1_000
    if clock := _CLOCK.fullmatch(text):
        days, hours, minutes, seconds = (int(part or 0) for part in clock.groups())
        return (((days * 24 + hours) * 60 + minutes) * 60 + seconds) * 1_000
    total, end = 0.0, 0
    while part := _DURATION_PART.match(text, end):
        total += float(part[1]) * _DURATION_UNITS_MS[part[2]]
        end = part.end()
    return total if end and end == len(text) else None


@lru_cache(maxsize=1_024)  # the same few defaults are written with every job
def format_duration(ms: int) -> str:
    """`5400000` -> "1h30m"; exact, so that `parse_duration_ms` gives the same number back."""
    parts = []
    for unit, size in _DURATION_UNITS_MS.items():
        if ms >= size and unit != "w":
            parts.append(f"{ms // size}{unit}")
            ms %= size
    return "".join(parts) or "0s"


def parse_bytes(value: object) -> int:
    """Bytes of "32Gi", "80GiB" (2^30), "24GB", "500M" (10^6), or of a bare number of bytes."""
    number = _number_or_text(value, "a size; write for example 512Mi, 32Gi or 80GB")
    count = _bytes_text(number) if isinstance(number, str) else number
    if count is None:
        raise ValueError(f"{show(value)} is not a size; write for example 512Mi, 32Gi or 80GB")
    return _within(count, MAX_BYTES, value, "a size (0 to 512Ti)")


@lru_cache(1_024)
def _bytes_text(text: str) -> float | None:
    match = _BYTES.fullmatch(text)
    unit = _BYTE_SPELLINGS.get(match[2].lower()) if match else None
    return None if match is None or unit is None else float(match[1]) * unit


@lru_cache(maxsize=1_024)  # the same few defaults are written with every job
def format_bytes(count: int) -> str:
    """`34359738368` -> "32Gi", `24000000000` -> "24GB": the unit that needs the smallest whole number; always exact."""
    exact = (unit for unit, size in _BYTE_UNITS.items() if count and count % size == 0)
    unit = min(exact, key=lambda u: count // _BYTE_UNITS[u], default="")
    return f"{count // _BYTE_UNITS[unit]}{unit}"


def parse_cpu_milli(value: object) -> int:
    """Thousandths of a CPU of 4, 0.5, "500m" or "2"."""
    number = _number_or_text(value, "a CPU count; write for example 4, 0.5 or 500m")
    milli = _cpu_text(number) if isinstance(number, str) else number * 1_000
    if milli is None:
        raise ValueError(f"{show(value)} is not a CPU count; write for example 4, 0.5 or 500m")
    return _within(milli, MAX_CPU_MILLI, value, "a CPU count (0 to 1,000,000)")


@lru_cache(1_024)
def _cpu_text(text: str) -> float | None:
    match = _CPU.fullmatch(text)
    return float(match[1]) * (1 if match[2] else 1_000) if match else None


def format_cpu(milli: int) -> str:
    """`4000` -> "4", `500` -> "500m"."""
    return str(milli // 1_000) if milli % 1_000 == 0 else f"{milli}m"


def show(value: object) -> str:
    """A value as an error message quotes it: short, on one line, and safe for integers of any length."""
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case dict():
            return "a mapping"
        case list() | tuple():
            return "a list"
        case int() if abs(value) >= 10**24:
            return "a number of more than 24 digits"
        case str() if len(value) > MAX_TEXT:
            return f"{value[:MAX_TEXT - 4]!r}…"
        case str() | int() | float():
            return repr(value)
        case _:
            return f"a Python {type(value).__name__}"


def _number_or_text(value: object, what: str) -> int | float | str:
    if isinstance(value, str) and len(value) <= MAX_TEXT:
        return value.strip()
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:
        return value
    raise ValueError(f"{show(value)} is not {what}")


def _within(number: float, most: int, value: object, what: str) -> int:
    if not 0 <= number <= most:
        raise ValueError(f"{show(value)} is out of range for {what}")
    return round(number)
