"""What a server and its supervisor say to each other, and where things lie in a home directory. Used by both sides.

One JSON object per line over a unix stream socket. A connection is either a *control* connection (each request is
answered by one line, in order) or, after `{"do": "watch"}`, a *watch* connection: a full listing, then changes as they
happen, newest state per replica. `hello`, `upgrade` and `quit` keep their meaning in every version.

    -> {"do": "hello", "settings": {…}}        <- {"version": 2, "pid": 12, "limits": "cgroup v2", "running": 3, …}
    -> {"do": "start", "orders": [Order, …]}   <- {"ok": true}
    -> {"do": "hold", "keys": [k, …]}          these are killed when this connection ends, however it does; if the
                                               supervisor ends first, by the next one, unless they are held again
    -> {"do": "stop", "keys": [k, …], "grace_ms": 30000}
    -> {"do": "stacks" | "forget" | "state", "keys": [k, …]}
    -> {"do": "checkpoint", "keys": [k, …]}    <- {"ok": true, "keys": [k, …]}   those that listen
    -> {"do": "beside", "key": k}              <- {"ok": true, "pid": 34, "env": {…}, "enter": […]}   for `beside`
    -> {"do": "warm", "interpreter": …, "preload": […], "env": {…}}
    -> {"do": "upgrade", "argv": […]}          the supervisor becomes this command; its children stay its children
    -> {"do": "quit", "kill": false}           refused while replicas run, unless told to kill them

Never imports more than the standard library.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NewType

VERSION = 2
LAUNCH_VARIABLE = "JOBSCHED_LAUNCH"
"""`<home id>:<launch key>` in the environment of every process of a replica: how strays are told apart."""
MARKER_SIZE = 512
MAX_LINE = 64 << 20
SUN_PATH = 100
"""Longest path that surely fits a unix socket address (108 bytes on Linux, less a margin for replicas' sockets)."""

Key = NewType("Key", str)
Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Order:
    """One launch as the supervisor needs it. `env` is complete but for `secret://NAME` values; it is never stored."""

    key: Key
    argv: tuple[str, ...]
    env: Mapping[str, str]
    node: str
    cwd: str = ""
    token: str = ""
    ports: tuple[int, ...] = ()
    cpu_milli: int = 0
    memory_bytes: int = 0
    stop_signal: str = "USR1"
    preload: tuple[str, ...] = ()
    keep_ms: int = 0
    clean_up: str = "all"

    @staticmethod
    def from_wire(data: Message) -> Order:
        known = {f.name for f in fields(Order)}
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k in known}
        return Order(**values)

    def to_wire(self) -> Message:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Settings:
    """What a server tells its supervisor to go by; the newest server wins. Times in seconds."""

    log_bytes: int = 64 << 20
    """Newest bytes of a replica's log that are kept."""
    kill_after_s: float = 5.0
    """Least time between SIGTERM and SIGKILL."""
    idle_exit_s: float = 60.0
    """The supervisor ends this long after its last replica and its last server have gone."""
    hold_again_s: float = 20.0
    """How long a new supervisor waits for those who held replicas of the one before it; then these are killed."""
    warm_idle_s: float = 600.0
    """A warm interpreter ends after this long without a start; one asked for in advance stays."""
    warm_wait_s: float = 2.0
    """Longest wait for an answer of a warm interpreter before the replica is started cold."""
    limits: str = "auto"
    """`auto`, `cgroup`, `rlimit` or `none`."""

    @staticmethod
    def from_wire(data: Message) -> Settings:
        known = {f.name for f in fields(Settings)}
        return Settings(**{k: v for k, v in data.items() if k in known})

    def to_wire(self) -> Message:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things lie in (or, for sockets with long paths, near) a home directory."""

    home: Path
    sockets: Path = field(init=False)

    def __post_init__(self) -> None:
        near = self.home / "run"
        if len(os.fsencode(near / "replicas.sock")) > SUN_PATH:
            near = Path(tempfile.gettempdir()) / f"jobsched-{os.getuid()}-{self.home_id}"
        object.__setattr__(self, "sockets", near)

    @property
    def home_id(self) -> str:
        return hashlib.sha256(os.fsencode(os.path.realpath(self.home))).hexdigest()[:12]

    @property
    def state(self) -> Path:
        return self.home / "supervisor"

    @property
    def lock(self) -> Path:
        return self.state / "lock"

    @property
    def journal(self) -> Path:
        return self.state / "journal.jsonl"

    @property
    def own_log(self) -> Path:
        return self.state / "supervisor.log"

    @property
    def control_socket(self) -> Path:
        return self.sockets / "supervisor.sock"

    @property
    def report_socket(self) -> Path:
        return self.sockets / "replicas.sock"

    @property
    def secrets(self) -> Path:
        return self.home / "secrets"

    @property
    def logs(self) -> Path:
        return self.home / "logs"

    @property
    def scratch(self) -> Path:
        return self.home / "scratch"

    @property
    def nodes(self) -> Path:
        return self.home / "nodes"

    def log(self, key: str) -> Path:
        job, attempt, role, index, restart = key.split("/")
        return self.logs / job / attempt / f"{role}-{index}-{restart}.log"

    def scratch_dir(self, key: str) -> Path:
        """Shared by the restarts of a replica within its attempt."""
        job, attempt, role, index, _ = key.split("/")
        return self.scratch / job / attempt / f"{role}-{index}"

    def make(self, *, sockets: bool = True) -> None:
        """Create the directories, private to this user; `sockets` False where nobody will listen. PermissionError if
        somebody else owns the socket directory."""
        for path in (self.home, self.state, self.logs, self.scratch, self.secrets, self.nodes):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not sockets:
            return
        self.sockets.mkdir(mode=0o700, exist_ok=True)
        if self.sockets.stat().st_uid != os.getuid():
            raise PermissionError(f"{self.sockets} belongs to another user")
        self.sockets.chmod(0o700)


    def leave(self, *sockets: Path) -> None:
        """Nobody listens on these any more: what may lie outside of the home goes, unless others listen there."""
        for path in sockets:
            path.unlink(missing_ok=True)
        for folder in dict.fromkeys((*(path.parent for path in sockets), self.sockets)):
            with suppress(OSError):  # not empty, or gone already
                folder.rmdir()


def encode(message: Message) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


class Lines:
    """Splits received bytes into messages. Feed it, then iterate; an incomplete line waits for more."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> Iterator[Message]:
        """Messages that `data` completes. ValueError for a line that is no JSON object or is too long."""
        head, newline, rest = data.partition(b"\n")
        while newline:
            line = b"".join((*self._parts, head))
            self._parts.clear()
            self._size = 0
            message = json.loads(line)
            if not isinstance(message, dict):
                raise ValueError("a message is a JSON object")
            yield message
            head, newline, rest = rest.partition(b"\n")
        if head:
            self._parts.append(head)
            self._size += len(head)
            if self._size > MAX_LINE:
                raise ValueError("a message is too long")
