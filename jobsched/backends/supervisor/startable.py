"""Whether a replica can be started where and as it was ordered; if not, what a shell would say, in words."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable, Sequence
from contextlib import closing

from jobsched.backends.supervisor.warm_pool import find_program

START_FAILED, PORT_CONFLICT = "StartFailed", "PortConflict"
"""Values of `core.job.Reason`."""


class StartError(Exception):
    """A replica cannot be started: the exit code a shell would give, the reason, and words for people."""

    def __init__(self, message: str, code: int = 126, reason: str = START_FAILED) -> None:
        super().__init__(message)
        self.code, self.reason = code, reason


def executable(argv: Sequence[str], path: str, cwd: str) -> str:
    """What to execute, or the error that a shell would give, in words."""
    if not os.path.isdir(cwd):
        raise StartError(f"working directory {cwd} does not exist")
    if not os.access(cwd, os.X_OK):
        raise StartError(f"working directory {cwd} may not be entered")
    program = find_program(argv[0], path, cwd)
    if program is not None:
        return program
    if "/" in argv[0] and os.path.exists(os.path.join(cwd, argv[0])):
        raise StartError(f"{argv[0]}: not executable (in {cwd}); run: chmod +x {argv[0]}")
    where = f"in {cwd}" if "/" in argv[0] else f"on PATH ({path})"
    raise StartError(f"{argv[0]}: command not found {where}", code=127)


def check_ports(ports: Iterable[int]) -> None:
    """StartError when another process listens on one of them already."""
    for port in ports:
        with closing(socket.socket()) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE and _somebody_listens(port):
                    raise StartError(
                        f"port {port} is in use by a process that is not jobsched's", reason=PORT_CONFLICT) from None


def _somebody_listens(port: int) -> bool:
    wanted, listening = f":{port:04X}", "0A"
    for path in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            with open(path, encoding="ascii") as file:
                if any(f[1].endswith(wanted) and f[3] == listening for f in map(str.split, file)):
                    return True
        except OSError:
            continue
    return False
