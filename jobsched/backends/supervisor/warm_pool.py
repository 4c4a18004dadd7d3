"""The supervisor's side of warm interpreters: which commands can be forked, from which parent, and the parents' lives.

A parent is named by (interpreter, preloaded modules, the environment that is read before a script can change it). The
first start with a new name sets the parent going; starts that want it are told when it is ready or will never be.
Nothing here ever blocks.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jobsched.backends.supervisor.loop import Callback, Loop
from jobsched.backends.supervisor.protocol import LAUNCH_VARIABLE, MARKER_SIZE, encode

PROGRAM = Path(__file__).with_name("warm.py")
MAX_PARENTS = 4
RETRY_S = 600.0
_PYTHON = re.compile(r"python(3(\.\d+)?)?")
_SHELL_MEANING = set("|&;<>()$`*?[]{}~!#\\\n")
_READ_EARLY = re.compile(r"(PYTHON|LD_|TORCH_|PYTORCH_|KMP_|MKL_|GOMP_|OPENBLAS_|LC_|OMP_(?!NUM_THREADS$)).*|LANG")
_ALSO_PASSED = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "TMPDIR", "TZ", "VIRTUAL_ENV", "CONDA_PREFIX")


@dataclass(frozen=True, slots=True)
class PythonRun:
    """A command that a warm interpreter can run: `kind` is script, module or code."""

    interpreter: str
    kind: str
    target: str
    arguments: tuple[str, ...]

    @property
    def argv(self) -> tuple[str, ...]:
        option = {"module": ("-m",), "code": ("-c",), "script": ()}[self.kind]
        return (self.interpreter, *option, self.target, *self.arguments)


def as_python_run(argv: Sequence[str], path: str, cwd: str) -> PythonRun | None:
    """Recognise `python [-u] X.py …`, `python [-u] -m X …` and `python [-u] -c X …`, also inside a plain `/bin/sh -c`.
    None for everything else, which is started cold; `path` is the replica's PATH."""
    words = list(argv)
    if len(words) == 3 and words[:2] == ["/bin/sh", "-c"]:
        if _SHELL_MEANING & set(words[2]):
            return None
        try:
            words = shlex.split(words[2])
        except ValueError:
            return None
        words = words[1:] if words[:1] == ["exec"] else words
    if len(words) < 2 or not _PYTHON.fullmatch(os.path.basename(words[0])):
        return None
    interpreter = find_program(words[0], path, cwd)
    rest = words[2:] if words[1] == "-u" else words[1:]
    if interpreter is None or not rest:
        return None
    if rest[0] in ("-m", "-c") and len(rest) > 1:
        return PythonRun(interpreter, {"-m": "module", "-c": "code"}[rest[0]], rest[1], tuple(rest[2:]))
    if rest[0].endswith(".py") and os.path.isfile(os.path.join(cwd, rest[0])):
        return PythonRun(interpreter, "script", rest[0], tuple(rest[1:]))
    return None


def find_program(name: str, path: str, cwd: str) -> str | None:
    """Absolute path of an executable as a shell in `cwd` would find it; None when there is none."""
    if "/" in name:
        full = os.path.normpath(os.path.join(cwd, name))
        return full if os.access(full, os.X_OK) and not os.path.isdir(full) else None
    return shutil.which(name, path=path or os.defpath)


ParentName = tuple[str, tuple[str, ...], tuple[tuple[str, str], ...]]


@dataclass(slots=True)
class Parent:
    """One warm interpreter. `usable`: None while it imports, False when it said it cannot be forked."""

    process: subprocess.Popen[bytes]
    control: socket.socket
    pinned: bool
    used_at: float
    usable: bool | None = None
    waiting: list[Callback] = field(default_factory=list)
    """Called once it is ready, or dropped."""


@dataclass(slots=True)
class WarmPool:
    """All warm interpreters of one supervisor. The file `log` receives what they print."""

    loop: Loop
    log: Path
    parents: dict[ParentName, Parent] = field(default_factory=dict)
    refused: dict[ParentName, float] = field(default_factory=dict)
    """Parents that could not be forked or died, and when: not tried again for a while."""

    def pids(self) -> set[int]:
        return {parent.process.pid for parent in self.parents.values()}

    def prepare(
        self, interpreter: str, preload: Sequence[str], env: Mapping[str, str], pinned: bool = False
    ) -> Parent | None:
        """The parent for this kind of start, set going if need be; `usable` is None while it imports. None: cold."""
        if any(part and not part.startswith("/") for part in env.get("PYTHONPATH", "").split(":")):
            return None  # relative to a directory that the parent is not in
        early = tuple(sorted((k, v) for k, v in env.items() if _READ_EARLY.fullmatch(k)))
        name: ParentName = (interpreter, tuple(sorted(set(preload))), early)
        parent = self.parents.get(name)
        if parent is None:
            if time.monotonic() - self.refused.get(name, -RETRY_S) >= RETRY_S:
                self._set_going(name, env, pinned)
            return self.parents.get(name)
        parent.pinned |= pinned
        parent.used_at = time.monotonic()
        return parent

    def fork(self, parent: Parent, run: PythonRun, order: Mapping[str, object]) -> socket.socket | None:
        """Ask for a replica; its end of the talk: it answers with its pid, and runs after `go`. None: start it cold."""
        ours, theirs = socket.socketpair()
        with theirs:
            ours.setblocking(False)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
            what = {"kind": run.kind, "target": run.target, "arguments": run.arguments}
            body = encode({**order, **what})
            try:
                sent = ours.send(body)
                if sent == len(body):
                    socket.send_fds(parent.control, [b"f"], [theirs.fileno()])
                    return ours
            except OSError:
                pass
        ours.close()
        return None

    def retire_idle(self, idle_s: float) -> None:
        now = time.monotonic()
        for name, parent in list(self.parents.items()):
            if not parent.pinned and parent.usable is not None and now - parent.used_at > idle_s:
                self._drop(name)

    def close(self) -> None:
        """Let all parents go: they end when their control socket closes."""
        for name in list(self.parents):
            self._drop(name)

    def _set_going(self, name: ParentName, env: Mapping[str, str], pinned: bool) -> None:
        interpreter, preload, early = name
        if len(self.parents) >= MAX_PARENTS:
            self._drop(min(self.parents, key=lambda n: (self.parents[n].pinned, self.parents[n].used_at)))
        ours, theirs = socket.socketpair()
        passed = {k: env[k] for k in _ALSO_PASSED if k in env} | {"OPENBLAS_NUM_THREADS": "1"} | dict(early)
        try:
            with theirs, open(self.log, "ab") as log:
                process = subprocess.Popen(
                    [interpreter, str(PROGRAM), ",".join(preload), " " * MARKER_SIZE],
                    env={**passed, LAUNCH_VARIABLE: " " * MARKER_SIZE}, cwd="/", stdin=theirs.fileno(), stdout=log,
                    stderr=log, start_new_session=True, close_fds=False,
                )
        except OSError:
            ours.close()
            self.refused[name] = time.monotonic()
            return
        process.returncode = 0  # the keeper reaps it; Popen shall not
        ours.setblocking(False)
        self.parents[name] = Parent(process, ours, pinned, time.monotonic())
        self.loop.watch(ours, self._hearer(name))

    def _hearer(self, name: ParentName) -> Callable[[], None]:
        def hear() -> None:
            parent = self.parents[name]
            try:
                data = parent.control.recv(4096)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if data and json.loads(data)["ready"]:
                parent.usable = True
                self._tell(parent)
            else:
                self.refused[name] = time.monotonic()
                self._drop(name)

        return hear

    def _drop(self, name: ParentName) -> None:
        parent = self.parents.pop(name)
        parent.usable = False
        self.loop.unwatch(parent.control)
        parent.control.close()
        self._tell(parent)

    def _tell(self, parent: Parent) -> None:
        for callback in parent.waiting:
            self.loop.soon(callback)
        parent.waiting.clear()
