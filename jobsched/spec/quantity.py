"""Quantities people write ("80GiB", "500m", "2h") as integers, and back.

Used by the spec models and by the CLI. Every parser raises `ValueError` with a sentence that tells what is allowed;
every formatter writes text that its parser reads back to the same integer.
"""

from __future__ import annotations

import re

_DURATION_UNITS_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000}
_BYTE_UNITS = {
    "": 1, "b": 1,
    "k": 10**3, "kb": 10**3, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9, "t": 10**12, "tb": 10**12,
    "ki": 2**10, "kib": 2**10, "mi": 2**20, "mib": 2**20, "gi": 2**30, "gib": 2**30, "ti": 2**40, "tib": 2**40,
}
_NUMBER = r"(\d{1,15}(?:\.\d{1,9})?)"
_DURATION_PART = re.compile(rf"{_NUMBER}\s*(ms|s|m|h|d|w)")
_BYTES = re.compile(rf"^{_NUMBER}\s*([a-z]{{0,3}})$", re.IGNORECASE)
_CPU = re.compile(rf"^{_NUMBER}(m?)$")
MAX_MS = 10 * 365 * 86_400_000
MAX_BYTES = 2**60
MAX_CPU_MILLI = 10**9


def parse_duration_ms(value: object) -> int:
    """Milliseconds of "90s", "1h30m", "2d" or a bare number of seconds."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"{value!r} is not a duration; write for example 90s, 30m, 2h or 1h30m")
    if isinstance(value, (int, float)):
        result = _finite(value, 1_000, "a duration")
    else:
        text = value.strip().lower()
        if re.fullmatch(_NUMBER, text):
            result = _finite(float(text), 1_000, "a duration")
        else:
            result, end = 0, 0
            for part in _DURATION_PART.finditer(text):
                if text[end:part.start()].strip():
                    end = -1
                    break
                result += round(float(part[1]) * _DURATION_UNITS_MS[part[2]])
                end = part.end()
            if end <= 0 or text[end:].strip():
                raise ValueError(f"{value!r} is not a duration; write for example 90s, 30m, 2h or 1h30m")
    if not 0 <= result <= MAX_MS:
        raise ValueError(f"{value!r} is out of range for a duration (0 to 10 years)")
    return result


def format_duration(ms: int) -> str:
    """`5400000` -> "1h30m"; exact, so that `parse_duration_ms` gives the same number back."""
    if ms == 0:
        return "0s"
    parts = []
    for unit in ("d", "h", "m", "s", "ms"):
        size = _DURATION_UNITS_MS[unit]
        if ms >= size:
            parts.append(f"{ms // size}{unit}")
            ms %= size
    return "".join(parts)


def parse_bytes(value: object) -> int:
    """Bytes of "32Gi", "80GiB", "500M" (10^6) or a bare number of bytes."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"{value!r} is not a size; write for example 512Mi, 32Gi or 80GB")
    if isinstance(value, (int, float)):
        result = _finite(value, 1, "a size")
    else:
        match = _BYTES.match(value.strip())
        if match is None or match[2].lower() not in _BYTE_UNITS:
            raise ValueError(f"{value!r} is not a size; write for example 512Mi, 32Gi or 80GB")
        result = round(float(match[1]) * _BYTE_UNITS[match[2].lower()])
    if not 0 <= result <= MAX_BYTES:
        raise ValueError(f"{value!r} is out of range for a size (0 to 1024 PiB)")
    return result


def format_bytes(count: int) -> str:
    """`34359738368` -> "32Gi"; exact, falling back to plain bytes."""
    for unit in ("Ti", "Gi", "Mi", "Ki"):
        size = _BYTE_UNITS[unit.lower()]
        if count >= size and count % size == 0:
            return f"{count // size}{unit}"
    return str(count)


def parse_cpu_milli(value: object) -> int:
    """Thousandths of a CPU of 4, 0.5, "500m" or "2"."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"{value!r} is not a CPU count; write for example 4, 0.5 or 500m")
    if isinstance(value, (int, float)):
        result = _finite(value, 1_000, "a CPU count")
    else:
        match = _CPU.match(value.strip())
        if match is None:
            raise ValueError(f"{value!r} is not a CPU count; write for example 4, 0.5 or 500m")
        result = round(float(match[1]) * (1 if match[2] else 1_000))
    if not 0 <= result <= MAX_CPU_MILLI:
        raise ValueError(f"{value!r} is out of range for a CPU count (0 to 1,000,000)")
    return result


def format_cpu(milli: int) -> str:
    """`4000` -> "4", `500` -> "500m"."""
    return str(milli // 1_000) if milli % 1_000 == 0 else f"{milli}m"


def _finite(value: float, scale: int, what: str) -> int:
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError(f"{value!r} is not {what}: it must be finite")
    return round(value * scale)
