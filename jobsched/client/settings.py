"""What the client is told by its surroundings, and who said it: flag > environment > `jobsched.toml` of the project
(nearest parent) > user's file > machine's file > default.

Read by `client.locate` and by `jobsched config view|explain|set`. Reads small TOML files and nothing else; the server
has a configuration of its own.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jobsched.errors import ConfigError, UsageError

PROJECT_FILE = "jobsched.toml"

NAMES: Mapping[str, str] = {
    "server": "URL of the server; empty: the one that runs from the home directory",
    "token": "access token; better kept in a file or in the environment",
    "token_file": "file that holds the access token",
    "home": "directory of the local server: its database, token, logs and address",
    "output": "output format of commands: table, wide, json, jsonl, yaml, name or csv",
}
"""Setting -> what it is. The variable of each is JOBSCHED_<NAME>."""


@dataclass(frozen=True, slots=True)
class Setting:
    name: str
    value: str
    source: str
    """The flag, variable or file that said so, or `default`."""


def user_file() -> Path:
    """The user's file: $JOBSCHED_CONFIG, else `jobsched/config.toml` below the XDG configuration directory."""
    import platformdirs  # only where the variable does not say, to keep the usual command light

    named = os.environ.get("JOBSCHED_CONFIG")
    return Path(named) if named else platformdirs.user_config_path("jobsched") / "config.toml"


def files() -> Iterator[Path]:
    """Existing configuration files, strongest first."""
    here = Path.cwd()
    project = next((d / PROJECT_FILE for d in (here, *here.parents) if (d / PROJECT_FILE).is_file()), None)
    if project is not None:
        yield project
    for path in (user_file(), Path("/etc/jobsched/config.toml")):
        if path.is_file():
            yield path


def get(name: str, flag: str | None = None) -> Setting:
    """The value that holds for a setting and its source. Raises `ConfigError` for a file that cannot be read."""
    if flag:
        return Setting(name, flag, f"--{name.replace('_', '-')}")
    variable = f"JOBSCHED_{name.upper()}"
    if os.environ.get(variable):
        return Setting(name, os.environ[variable], f"environment {variable}")
    for path in files():
        values = _read(path)
        if name in values:
            value = values[name]
            if name in ("token_file", "home"):  # relative to the file that names it, not to whoever runs the command
                value = str((path.parent / Path(value).expanduser()).resolve())
            return Setting(name, value, str(path))
    return Setting(name, _default(name), "default")


def everything() -> tuple[Setting, ...]:
    """Every setting, for `jobsched config view` and `explain`."""
    return tuple(get(name) for name in NAMES)


def home(flag: str | None = None) -> Path:
    """The directory of the local server."""
    return Path(get("home", flag).value).expanduser()


def write(name: str, value: str) -> Path:
    """Set one name in the user's file, leaving every other line as it is; returns the file. The file is private (0600)
    because it may hold a token."""
    if name not in NAMES:
        raise UsageError(f"there is no setting {name!r}", hint=f"settings: {', '.join(NAMES)}")
    path = user_file()
    lines = path.read_text().splitlines() if path.is_file() else []
    entry = f"{name} = {json.dumps(value)}"  # a JSON string is a TOML basic string
    for at, line in enumerate(lines):
        if re.match(rf"\s*{name}\s*=", line):
            lines[at] = entry
            break
    else:
        lines.insert(0, entry)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".new")
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
        out.write("\n".join(lines) + "\n")
    draft.replace(path)
    return path


@cache
def _read(path: Path) -> Mapping[str, str]:
    try:
        data = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise ConfigError(f"{path} cannot be read: {exc}") from exc
    for name, value in data.items():
        if name not in NAMES or not isinstance(value, str):
            raise ConfigError(
                f"{path}: {name!r} is not a setting" if name not in NAMES else f"{path}: {name!r} must be a string",
                hint=f"settings: {', '.join(NAMES)}",
            )
    return data


def _default(name: str) -> str:
    if name == "home":
        import platformdirs

        return platformdirs.user_data_dir("jobsched")
    return "table" if name == "output" else ""
