"""`python -m jobsched.backends.supervisor HOME`: become the supervisor of a home directory, unless there is one.

Returns (exit code 0) as soon as the supervisor can be reached; it goes on in the background, in its own session. An
upgraded supervisor gets `--stay FD` from the one it was: the process stays, and so does its hold on the lock.
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys
from pathlib import Path

from jobsched.backends.supervisor.loop import Loop
from jobsched.backends.supervisor.protocol import Layout
from jobsched.backends.supervisor.server import Server


def main() -> int:
    layout = Layout(Path(sys.argv[1]))
    layout.make()
    upgraded = sys.argv[2:3] == ["--stay"]
    lock = int(sys.argv[3]) if upgraded else os.open(layout.lock, os.O_RDWR | os.O_CREAT, 0o600)
    os.set_inheritable(lock, False)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return 0  # somebody was faster
    layout.make()  # again: one that just ended may have taken its sockets' directory away
    listener = listen(layout.control_socket)
    if not upgraded:
        if os.fork():
            os._exit(0)
        os.setsid()
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    log = os.open(layout.own_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    loop = Loop()
    server = Server(layout, loop, listener)
    loop.run()
    server.flush_watchers()
    server.keeper.close()
    if server.upgrade_to:
        os.set_inheritable(lock, True)
        command = [*server.upgrade_to, "--stay", str(lock)]
        os.execv(command[0], command)  # same process: replicas stay our children
    layout.leave(layout.control_socket, layout.report_socket)
    return 0


def listen(path: Path) -> socket.socket:
    """Bind under the lock, so whatever is there is dead."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(64)
    listener.setblocking(False)
    return listener


if __name__ == "__main__":
    sys.exit(main())
