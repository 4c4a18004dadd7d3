"""What tells a server's replicas apart on an engine that several servers may share. Used by adapters."""

from __future__ import annotations

import secrets
from contextlib import suppress
from pathlib import Path


def own_id(path: Path, length: int = 12) -> str:
    """Hexadecimal digits, made once and kept in the file."""
    with suppress(FileNotFoundError):
        return path.read_text().strip()
    path.write_text(secrets.token_hex(length // 2))
    return path.read_text().strip()
