"""Secrets by reference: `secret://NAME` is the content of the file NAME in a private directory. Standard library only.

Used by whoever starts a replica, at the last moment; what it returns is never stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

SECRET = "secret://"


class SecretError(Exception):
    """A reference cannot be resolved; the text is for people and never holds the secret."""


def resolved(environ: Mapping[str, str], directory: Path) -> dict[str, str]:
    """`environ` with every reference replaced."""
    return {
        name: read(directory, name, value) if value.startswith(SECRET) else value for name, value in environ.items()
    }


def read(directory: Path, variable: str, reference: str) -> str:
    """The secret that `variable` refers to, without the newline at its end."""
    name = reference.removeprefix(SECRET)
    path = directory / name
    if "/" in name or name.startswith("."):
        raise SecretError(f"{variable}: {reference} is not the name of a secret")
    try:
        if path.stat().st_mode & 0o077:
            raise SecretError(f"{variable}: secret {name!r} is readable by others; run: chmod 600 {path}")
        return path.read_text().removesuffix("\n")
    except (OSError, UnicodeDecodeError):
        raise SecretError(
            f"{variable}: there is no secret {name!r}; write it to {path} with mode 0600") from None
