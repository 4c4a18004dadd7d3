"""Finds the server: argument > environment > project file > user's file > the one running from the home directory; and
starts an embedded one there when nothing else is configured.

Used by the SDK and by every command. It talks to nobody but the server it has just started.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from jobsched.client import settings
from jobsched.client.remote import Endpoint, Remote
from jobsched.errors import ConfigError, NotFound, Unreachable

START_TIMEOUT_S = 60.0
HEALTH_S = 15.0
"""Longest wait for a server's word that it is well. One that is late is not started a second time."""
NO_SERVER_HINT = "start one with 'jobsched serve'; 'jobsched run' and 'jobsched submit' start one by themselves"


def find(server: str | None = None, token: str | None = None, token_file: str | None = None) -> Endpoint:
    """The server that is configured, or the one running from the home directory. Raises `Unreachable` if there is
    none."""
    chosen = settings.get("server", server)
    local = running(settings.home())
    if not chosen.value:
        if local is None:
            raise Unreachable("no jobsched server is configured, and none is running here", hint=NO_SERVER_HINT)
        return local
    if local is not None and local.url.rstrip("/") == chosen.value.rstrip("/"):
        return local
    if not re.match(r"https?://[^/]", chosen.value):
        raise ConfigError(f"{chosen.value!r} (from {chosen.source}) is not the URL of a server",
                          hint="write for example http://gpu-box:8080")
    return Endpoint(chosen.value, token or _token(token_file), chosen.source)


def find_or_start(
    server: str | None = None, token: str | None = None, token_file: str | None = None,
    say: Callable[[str], None] | None = None,
) -> Endpoint:
    """`find`, or an embedded server started in the home directory; `say` is told when one was. Raises `Unreachable`
    where somebody's own server has died: an embedded one, with other nodes and queues, would take its jobs for lost."""
    try:
        return find(server, token, token_file)
    except Unreachable:
        home = settings.home()
        if not _has_died(home):
            return start(home, say=say)
    raise Unreachable(
        f"the server that somebody started in {home} has died; its jobs are as they were",
        hint=f"start it again as before ('jobsched serve …'); to have an embedded one, remove {home / 'server.json'}",
    )


def _has_died(home: Path) -> bool:
    """Whether a server that no client started ran from `home`, and did not stop in good order."""
    try:
        said = json.loads((home / "server.json").read_text())
        return said["embedded"] is False and not alive(int(said["pid"]))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def connect(endpoint: Endpoint) -> Remote:
    """A connection that follows a local server through restarts."""
    return Remote(endpoint, relocate=(lambda: running(settings.home())) if endpoint.local else None)


def running(home: Path) -> Endpoint | None:
    """The server that says it runs from `home`; None if there is none or its process is gone (a stale file)."""
    address = home / "server.json"
    try:
        said = json.loads(address.read_text())
        url, pid = str(said["url"]), int(said["pid"])
        token = Path(said.get("token_file") or home / "token").read_text().strip()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Endpoint(url, token, str(address), local=True) if alive(pid) else None


def server_pid(home: Path) -> int:
    """Process id of the server running from `home`. Raises `NotFound`."""
    try:
        pid = int(json.loads((home / "server.json").read_text())["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        pid = 0
    if not pid or not alive(pid):
        raise NotFound(f"no server runs from {home}", hint=NO_SERVER_HINT)
    return pid


def start(
    home: Path, *, config: Path | None = None, say: Callable[[str], None] | None = None,
    timeout_s: float = START_TIMEOUT_S,
) -> Endpoint:
    """Start an embedded server in `home`, in a session of its own, and wait until it answers; if another client is just
    doing the same, wait for that one. Raises `Unreachable` with the end of its log when it does not come up."""
    from filelock import FileLock, Timeout  # only needed here

    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        with FileLock(home / "start.lock", timeout=timeout_s):
            there = running(home)
            if there is not None and _healthy(there):
                return there
            log = home / "server.log"
            command = [sys.executable, "-m", "jobsched.cli.main", "serve", "--embedded"]
            if config is not None:
                command += ["--config", str(config)]
            with log.open("ab") as out:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, cwd=home,
                    env=os.environ | {"JOBSCHED_HOME": str(home)},
                )
            endpoint = _await(home, process, log, timeout_s)
    except Timeout as exc:
        raise Unreachable(f"another client is starting a server in {home}, and it takes too long",
                          hint=f"see {home / 'server.log'}") from exc
    except OSError as exc:
        raise ConfigError(f"the home directory {home} cannot be used: {exc.strerror or exc}",
                          hint="choose another one with JOBSCHED_HOME") from exc
    if say is not None and server_pid(home) == process.pid:  # else somebody's own 'jobsched serve' was quicker
        say(f"started an embedded jobsched server (pid {process.pid}, home {home}); "
            "stop it with 'jobsched server stop'")
    return endpoint


def _await(home: Path, process: subprocess.Popen[bytes], log: Path, timeout_s: float) -> Endpoint:
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        there = running(home)
        if there is not None and _healthy(there):
            return there
        if process.poll() is not None:
            break
        time.sleep(0.05)
    else:
        process.terminate()
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    raise Unreachable(f"the embedded server did not start:\n{tail}", hint=f"its log is {log}")


def _healthy(endpoint: Endpoint) -> bool:
    import httpx2

    try:
        answer = httpx2.get(f"{endpoint.url}/v1/healthz", timeout=HEALTH_S, trust_env=False, verify=False)
    except httpx2.TransportError:
        return False
    return answer.status_code == 200


def alive(pid: int) -> bool:
    """Whether the process exists and has not ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not _defunct(pid)


def _defunct(pid: int) -> bool:
    """Dead but not yet reaped: the server of a client that is still running is that client's child."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (OSError, IndexError):
        return False


def _token(flag_file: str | None) -> str:
    """The configured token: that of the flag's file, else JOBSCHED_TOKEN, a configured token, or a token file."""
    direct = settings.get("token")
    if direct.value and not flag_file:
        return direct.value
    named = settings.get("token_file", flag_file)
    if not named.value:
        return ""
    try:
        return Path(named.value).expanduser().read_text().strip()
    except OSError as exc:
        raise ConfigError(f"the token file {named.value} (from {named.source}) cannot be read: {exc}") from exc
