"""The warm interpreter: a process that has imported some modules and forks replicas from itself.

Run by the supervisor as `PYTHON warm.py MODULES PADDING` under the *user's* Python (3.9 or later), so it imports only
the standard library and nothing of jobsched. Control socket: stdin. It says `{"ready": …}` once, then gets one byte
with one descriptor per replica: a socket to that replica. The replica is forked twice, so that it becomes the
supervisor's own child (a child subreaper), reads its order from its socket, answers with its pid, and runs only after
`go`. If the supervisor goes away before that, it exits without having run anything.

What differs from a cold start, by nature: modules named by `preload` were imported before the replica's own
environment was in place (what they read from it at import is what the warm interpreter had; variables that Python, the
loader and torch read are part of the warm interpreter's identity, see `warm_pool`), the hash seed is shared by replicas
of one warm interpreter, and numpy's BLAS has one thread unless OPENBLAS_NUM_THREADS says otherwise.
"""

from __future__ import annotations

import builtins
import ctypes
import gc
import importlib
import importlib.machinery
import json
import os
import runpy
import signal
import socket
import sys
import time
import types

LAUNCH_VARIABLE = "JOBSCHED_LAUNCH"


def main() -> tuple[str, str, list[str]]:
    """Import, say so, and fork until the control socket closes. Returns only in a replica, with what it shall run."""
    control = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    del sys.path[0]
    for name in filter(None, sys.argv[1].split(",")):
        try:
            importlib.import_module(name)
        except Exception as error:
            sys.stderr.write(f"warm interpreter: cannot import {name}: {error!r}\n")
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:  # forking would copy locks held by threads that the copy does not have
        sys.stderr.write(f"warm interpreter: importing {sys.argv[1]} starts threads; replicas start cold\n")
        control.sendall(b'{"ready": false}')
        sys.exit(1)
    gc.collect()
    gc.freeze()
    control.sendall(b'{"ready": true}')
    while True:
        data, fds, _, _ = socket.recv_fds(control, 1, 1)
        if not data:
            os._exit(0)
        middle = os.fork()
        if middle:
            os.close(fds[0])
            os.waitpid(middle, 0)
            continue
        between = os.getpid()
        if os.fork():
            os._exit(0)
        while os.getppid() == between:  # how it ends is told to its parent alone: that must be the supervisor by then
            time.sleep(0.001)
        control.close()
        return become(socket.socket(fileno=fds[0]))


def become(supervisor: socket.socket) -> tuple[str, str, list[str]]:
    """Turn this fork into the replica that its order describes; returns (kind, target, arguments)."""
    order = json.loads(receive_line(supervisor))
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    start, end, env_start, env_end = memory_areas()
    overwrite(env_start, env_end, LAUNCH_VARIABLE + "=", order["env"][LAUNCH_VARIABLE])
    title = "\0".join(order["argv"]).encode()[: end - start - 1]
    ctypes.memmove(start, title.ljust(end - start, b"\0"), end - start)
    os.environ.clear()
    os.environ.update(order["env"])
    time.tzset()
    os.chdir(order["cwd"])
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    for path in order["enter"]:
        with open(path, "w", encoding="ascii") as file:
            file.write("0")
    supervisor.sendall(b"%d\n" % os.getpid())
    if supervisor.recv(1) != b"g":
        os._exit(0)
    supervisor.close()
    if "numpy.random.mtrand" in sys.modules:  # `random` reseeds itself after a fork, numpy does not
        sys.modules["numpy"].random.seed()
    if "torch" in sys.modules and order["env"].get("OMP_NUM_THREADS", "").isdigit():
        sys.modules["torch"].set_num_threads(max(int(order["env"]["OMP_NUM_THREADS"]), 1))
    if hasattr(sys, "orig_argv"):
        sys.orig_argv = order["argv"]
    return order["kind"], order["target"], order["arguments"]


def receive_line(sock: socket.socket) -> bytes:
    parts: list[bytes] = []
    while not parts or not parts[-1].endswith(b"\n"):
        data = sock.recv(1 << 20)
        if not data:
            os._exit(0)
        parts.append(data)
    return b"".join(parts)


def memory_areas() -> list[int]:
    """Begin and end of the argument strings and of the environment strings, as the kernel shows them in /proc."""
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    return [int(number) for number in fields[45:49]]


def overwrite(start: int, end: int, name: str, value: str) -> None:
    """Put `value` into the padded slot of variable `name` in the environment that others see in /proc/PID/environ."""
    area = ctypes.string_at(start, end - start)
    slot = area.find(name.encode()) + len(name)
    length = area.index(b"\0", slot) - slot
    ctypes.memmove(start + slot, value.encode()[:length].ljust(length), length)


def run(kind: str, target: str, arguments: list[str]) -> None:
    """What `python TARGET …`, `python -m TARGET …` or `python -c TARGET …` does, in a fresh `__main__`."""
    module = types.ModuleType("__main__")
    module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = module
    safe = getattr(sys.flags, "safe_path", False)
    if kind == "module":
        sys.argv = ["-m", *arguments]
        if not safe:
            sys.path.insert(0, os.getcwd())
        runpy._run_module_as_main(target)  # type: ignore[attr-defined]  # what `python -m` itself calls
        return
    if kind == "code":
        sys.argv = ["-c", *arguments]
        if not safe:
            sys.path.insert(0, "")
        module.__dict__["__loader__"] = importlib.machinery.BuiltinImporter
        exec(compile(target + "\n", "<string>", "exec"), module.__dict__)  # noqa: S102  # as `python -c` does
        return
    sys.argv = [target, *arguments]
    if not safe:
        sys.path.insert(0, os.path.dirname(os.path.realpath(target)))
    path = os.path.abspath(target)
    module.__dict__.update(__file__=path, __cached__=None)
    module.__loader__ = importlib.machinery.SourceFileLoader("__main__", path)
    with open(path, "rb") as file:
        source = file.read()
    exec(compile(source, path, "exec"), module.__dict__)  # noqa: S102  # as `python FILE` does


def own_frames_removed(traceback: types.TracebackType | None) -> types.TracebackType | None:
    while traceback is not None and traceback.tb_frame.f_code.co_filename == __file__:
        traceback = traceback.tb_next
    return traceback


if __name__ == "__main__":
    chosen = main()
    failed = False
    try:
        run(*chosen)
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:
        failed = True
        shown = own_frames_removed(error.__traceback__)
        sys.excepthook(type(error), error.with_traceback(shown), shown)
    if failed:
        sys.exit(1)
