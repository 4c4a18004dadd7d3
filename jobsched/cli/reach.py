"""Commands that get at running replicas: run something beside them, copy files, reach their ports.

All of it goes through the server, so whoever can ask that can do this, wherever the replica runs.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import sys
import termios
import threading
import time
import tty
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from jobsched.cli.attach import LOST_TOUCH
from jobsched.cli.connection import connected, path_of
from jobsched.cli.render import count, talk
from jobsched.client.remote import Remote
from jobsched.errors import Conflict, JobschedError, NotFound, Unreachable, UsageError

CHUNK = 32 << 10
LOOK_S = 0.25
"""How often the size of the terminal is looked at."""
REPLICA = re.compile(r"([^/:]+)(?:/([a-z0-9][a-z0-9-]*)(?:/(\d+))?)?")
PORTS = re.compile(r"(?:(\d*):)?(\d+)")


def replica_of(text: str) -> tuple[str, dict[str, Any]]:
    """`JOB[/ROLE[/INDEX]]` -> the job, and the replica as an order has it."""
    match = REPLICA.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is not JOB or JOB/ROLE/INDEX", hint="for example: @last/worker/0")
    job, role, index = match.groups()
    return job, {name: value for name, value in (("role", role), ("index", index and int(index))) if value is not None}


@click.command("exec")
@click.argument("replica", metavar="JOB[/ROLE/INDEX]")
@click.argument("command", nargs=-1, required=True, metavar="-- COMMAND...")
@click.option("-i", "--stdin", "with_input", is_flag=True, help="Pass stdin on; a terminal is passed on by itself.")
@click.option("-t/-T", "--tty/--no-tty", default=None, help="Give it a terminal; default: if this is one.")
@click.pass_context
def exec_(ctx: click.Context, replica: str, command: Sequence[str], with_input: bool, tty: bool | None) -> int:
    """Run a command beside a running replica: in its environment, directory or container, with its GPUs. Without a role
    that is rank 0. Exits with the command's code; the replica goes on.

    \b
    Examples:
      jobsched exec @last -- nvidia-smi
      jobsched exec @last/worker/1 -- bash
      jobsched exec -i bert -- python - < look.py
    """
    from jobsched.client.channel import opened  # its library is only needed here

    both = sys.stdin.isatty() and sys.stdout.isatty()
    if tty and not sys.stdin.isatty():
        raise UsageError("stdin is no terminal, so there is none to give", hint="leave -t out")
    terminal = both if tty is None else tty
    job, order = replica_of(replica)
    if terminal:
        size = shutil.get_terminal_size()
        order |= {"rows": size.lines, "columns": size.columns}
    with connected(ctx) as remote:
        path = path_of(remote, job)
        try:
            order |= {"do": "exec", "command": command, "stdin": with_input or terminal}
            with opened(remote, path, order) as channel:
                return _attached(channel, terminal=terminal, with_input=order["stdin"])
        except KeyboardInterrupt:
            return 130


def _attached(channel: Any, *, terminal: bool, with_input: bool) -> int:
    """This process's streams are the command's until it ends."""
    with _raw() if terminal else contextlib.nullcontext():
        if with_input:
            threading.Thread(target=_pass_input, args=(channel,), daemon=True).start()
        if terminal:
            threading.Thread(target=_pass_size, args=(channel,), daemon=True).start()
        try:
            while (piece := channel.receive()) is not None:
                out = sys.stderr if piece[0] == "err" else sys.stdout
                out.buffer.write(piece[1])
                out.flush()
        except Unreachable as exc:
            talk(f"{exc.render()}\r")
            return LOST_TOUCH
    return int(channel.code)


@contextlib.contextmanager
def _raw() -> Iterator[None]:
    """Every key goes to the command, Ctrl-C too."""
    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setraw(sys.stdin)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _pass_input(channel: Any) -> None:
    with contextlib.suppress(JobschedError, OSError):
        while data := os.read(sys.stdin.fileno(), CHUNK):
            channel.send(data)
        channel.end_input()


def _pass_size(channel: Any) -> None:
    known = shutil.get_terminal_size()
    with contextlib.suppress(JobschedError, OSError):
        while channel.code is None:
            time.sleep(LOOK_S)
            if (size := os.get_terminal_size(sys.stdin.fileno())) != known:
                channel.resize(size.lines, size.columns)
                known = size


@click.command()
@click.argument("source", metavar="SOURCE")
@click.argument("target", metavar="TARGET")
@click.pass_context
def cp(ctx: click.Context, source: str, target: str) -> int:
    """Copy a file or directory from or to a running replica. One side is JOB:PATH or JOB/ROLE/INDEX:PATH, the other a
    path here; relative paths there begin where the replica is.

    \b
    Examples:
      jobsched cp @last/worker/0:profile.json .
      jobsched cp ./fixed.py bert:/tmp/fixed.py
    """
    from jobsched.client import copying

    there = [_place(text) for text in (source, target)]
    remote_side = there[0] or there[1]
    if remote_side is None or None not in there:
        raise UsageError("one side is a path in a replica, the other one here",
                         hint="for example: jobsched cp @last/worker/0:out.json .")
    replica, path = remote_side
    job, order = replica_of(replica)
    with connected(ctx) as remote:
        side = copying.Side(remote, path_of(remote, job), order, replica)
        if there[0]:
            copied = copying.download(side, path, Path(target))
        else:
            copied = copying.upload(Path(source), side, path)
    for line in copied.skipped:
        talk(f"left out: {line}")
    talk(f"copied {count(copied.files, 'file')}, {copied.bytes} bytes")
    return 1 if copied.skipped else 0


def _place(text: str) -> tuple[str, str] | None:
    """`JOB[/ROLE/INDEX]:PATH`; None for a path here."""
    replica, colon, path = text.partition(":")
    if not colon or text.startswith(("/", ".", "~")) or not REPLICA.fullmatch(replica):
        return None
    if not path:
        raise UsageError(f"{text!r} names no path in the replica", hint=f"{text}. is where it is")
    return replica, path


@click.command("port-forward")
@click.argument("replica", metavar="JOB[/ROLE/INDEX]")
@click.argument("ports", nargs=-1, required=True, metavar="[LOCAL:]PORT...")
@click.pass_context
def port_forward(ctx: click.Context, replica: str, ports: Sequence[str]) -> int:
    """Reach ports of a running replica at 127.0.0.1 until Ctrl-C. Each connection asks anew where the replica is, so it
    may be restarted meanwhile. An empty LOCAL takes any free port.

    \b
    Examples:
      jobsched port-forward @last 6006
      jobsched port-forward bert/worker/0 8080:80 :8265
    """
    job, order = replica_of(replica)
    pairs = [(match[1], int(match[2])) for text in ports if (match := PORTS.fullmatch(text))]
    if len(pairs) != len(ports) or any(not 0 < port < 1 << 16 for _, port in pairs):
        raise UsageError(f"{' '.join(ports)!r} are not all PORT or LOCAL:PORT", hint="for example: 8080:80")
    with connected(ctx) as remote, contextlib.ExitStack() as stack:
        path = path_of(remote, job)
        remote.get(path)  # there is such a job
        for local, port in pairs:
            listener = stack.enter_context(_listener(port if local is None else int(local or 0)))
            talk(f"127.0.0.1:{listener.getsockname()[1]} -> port {port} of {replica}")
            order_of = {"do": "forward", "port": port, **order}
            threading.Thread(target=_accept, args=(listener, remote, path, order_of), daemon=True).start()
        try:
            signal.pause()
        except KeyboardInterrupt:
            return 130
    return 0


def _listener(port: int) -> socket.socket:
    try:
        return socket.create_server(("127.0.0.1", port))
    except (OSError, OverflowError) as exc:
        why = getattr(exc, "strerror", None) or str(exc)
        raise Conflict(f"cannot listen on port {port} here: {why}",
                       hint="choose another one, as in 8081:80, or any free one, as in :80") from exc


def _accept(listener: socket.socket, remote: Remote, path: str, order: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # it was closed
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=_forward, args=(sock, remote, path, order), daemon=True).start()


def _forward(sock: socket.socket, remote: Remote, path: str, order: dict[str, Any]) -> None:
    """One connection, both ways, until both sides have ended it."""
    from jobsched.client.channel import opened

    with sock:
        try:
            with opened(remote, path, order) as channel:
                threading.Thread(target=_pass_socket, args=(sock, channel), daemon=True).start()
                while (piece := channel.receive()) is not None:
                    if piece[0] == "err":
                        talk(f"port {order['port']}: {piece[1].decode(errors='replace').strip()}")
                    elif piece[1]:
                        sock.sendall(piece[1])
        except (Conflict, NotFound, Unreachable) as exc:
            talk(exc.render())
        except JobschedError as exc:
            talk(f"port {order['port']}: {exc.message}")
        except OSError:
            pass  # whoever connected is gone
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


def _pass_socket(sock: socket.socket, channel: Any) -> None:
    with contextlib.suppress(JobschedError, OSError):
        while data := sock.recv(CHUNK):
            channel.send(data)
        channel.end_input()
