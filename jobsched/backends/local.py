"""The local backend: replicas are processes of this machine, kept by a supervisor that outlives the server.

Used by `wiring` through `registry`. It decides nothing and keeps nothing that the supervisor does not know better: a
new one sees everything the old one saw. Two connections, so that a long `observe` never delays an order.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from jobsched.backends import local_render
from jobsched.backends.followed_log import chunks
from jobsched.backends.local_nodes import NodeSource, overlaid
from jobsched.backends.sessions import TERMINAL, Local
from jobsched.backends.supervisor import processes
from jobsched.backends.supervisor.beside import Beside, Joined
from jobsched.backends.supervisor.client import Line, command, dial, inherited
from jobsched.backends.supervisor.protocol import VERSION, Layout, Message, Settings
from jobsched.backends.supervisor.stacks import find_py_spy
from jobsched.core.launch import Launch, LaunchKey
from jobsched.core.node import Node
from jobsched.core.observation import Observation
from jobsched.core.resources import NodeName
from jobsched.errors import BackendUnreachable, Conflict
from jobsched.ports import Addressing, Capabilities, LogChunk, Session, Window

NODE_LOOK_S = 0.25


class LocalBackend:
    """A `Backend`. `home` holds all state; `nodes` says what there is; `environ` is what replicas inherit.

    `warm` names modules for which a warm interpreter is kept ready from the beginning. BackendUnreachable when the
    supervisor can neither be reached nor started.
    """

    def __init__(
        self,
        home: Path,
        nodes: NodeSource,
        *,
        settings: Settings | None = None,
        warm: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.layout = Layout(home.absolute())
        self._nodes = nodes
        self._settings = settings or Settings()
        self._warm = tuple(warm)
        self._base = inherited(os.environ if environ is None else environ, sys.executable)
        self._orders = threading.Lock()
        self._watching = threading.Lock()
        self._control: Line | None = None
        self._watch: Line | None = None
        self._known_nodes: dict[NodeName, Node] = {}
        with self._orders:
            hello = self._connect_control()
        self.capabilities = Capabilities(
            name="local",
            addressing=Addressing.NODE,
            absence_is_final=True,
            warm_start=True,
            stacks=find_py_spy() is not None,
            limits=hello["limits"],
            checkpoint_root=str(self.layout.home / "checkpoints"),
            report=f"unix:{self.layout.report_socket}",
        )

    # the port -----------------------------------------------------------------------------------------------------

    def observe(self, timeout_ms: int = 0) -> Observation:
        deadline = time.monotonic() + timeout_ms / 1000
        with self._watching:
            while True:
                wait = min(max(deadline - time.monotonic(), 0.0), NODE_LOOK_S)
                messages = self._news(wait)
                nodes = overlaid(self._nodes(self._is_ours), self.layout.nodes)
                seen = local_render.observation(messages, self._known_nodes, nodes)
                if messages or seen.nodes or seen.gone_nodes or time.monotonic() >= deadline:
                    self._known_nodes = {node.name: node for node in nodes}
                    return seen

    def start(self, launches: Sequence[Launch]) -> None:
        orders = [local_render.order(launch, self.layout, self._base).to_wire() for launch in launches]
        if orders:
            self._ask({"do": "start", "orders": orders})

    def stop(self, keys: Sequence[LaunchKey], grace_ms: int) -> None:
        if keys:
            self._ask({"do": "stop", "keys": list(keys), "grace_ms": grace_ms})

    def ask_stacks(self, keys: Sequence[LaunchKey]) -> None:
        if keys:
            self._ask({"do": "stacks", "keys": list(keys)})

    def forget(self, keys: Sequence[LaunchKey]) -> None:
        if keys:
            self._ask({"do": "forget", "keys": list(keys)})

    def logs(self, key: LaunchKey, offset: int = 0, follow: bool = False, timeout_ms: int = 0) -> Iterator[LogChunk]:
        return chunks(self.layout.log(key), offset, lambda: follow and self._runs(key), timeout_ms)

    def execute(
        self, key: LaunchKey, command: Sequence[str], window: Window | None = None, *, stdin: bool = True
    ) -> Session:
        found = self._ask({"do": "beside", "key": key})
        if not found["ok"]:
            raise Conflict(f"nothing can run beside the replica: {found['why']}")
        size = (window.rows, window.columns) if window else None
        env = found["env"] | (TERMINAL if window else {})
        try:
            session = Local(Beside(found["pid"], env, found["enter"], command, size))
        except OSError as error:  # it has just ended, or the machine is full
            raise Conflict(f"nothing can run beside the replica: {error.strerror or error}") from error
        if not stdin:
            session.end_input()
        return session

    def ask_checkpoint(self, keys: Sequence[LaunchKey]) -> Sequence[LaunchKey]:
        return list(map(LaunchKey, self._ask({"do": "checkpoint", "keys": list(keys)})["keys"]))

    def connect(self, key: LaunchKey, port: int) -> Session:
        if not self._runs(key):
            raise Conflict("nothing can be reached in the replica: it does not run")
        try:
            return Local(Joined(port))
        except OSError as error:
            raise Conflict(f"nothing listens on port {port} there: {error.strerror or error}",
                           hint="is the program up, and is that its port?") from error

    def close(self) -> None:
        for line in (self._control, self._watch):
            if line is not None:
                line.close()
        self._control = self._watch = None

    # beyond the port ----------------------------------------------------------------------------------------------

    @property
    def supervisor_pid(self) -> int:
        """For `doctor`, and for tests that kill it."""
        return int(self._ask(self._hello())["pid"])

    def quit_supervisor(self, kill: bool = False) -> bool:
        """End the supervisor of this home and wait for that; False if it refuses because replicas run and `kill` is
        not given. BackendUnreachable when it does not end in time."""
        if not self._ask({"do": "quit", "kill": kill})["ok"]:
            return False
        with self._orders:
            line, self._control = self._control, None
        try:
            if line is not None:
                line.wait_for_end()
        except OSError as error:
            raise BackendUnreachable("the supervisor does not end") from error
        return True

    # talking ------------------------------------------------------------------------------------------------------

    def _is_ours(self, pid: int) -> bool:
        """Whether a process is a replica of this home or was started by one: all carry its mark."""
        return processes.marker(pid).startswith(f"{self.layout.home_id}:")

    def _runs(self, key: LaunchKey) -> bool:
        found = self._ask({"do": "state", "keys": [key]})["replicas"]
        return bool(found) and found[0]["state"] != "exited"

    def _ask(self, message: Message) -> Message:
        """One request and its answer. Requests are idempotent, so one is repeated after a lost connection."""
        with self._orders:
            if self._control is not None:
                try:
                    return self._control.ask(message)
                except OSError:
                    self._control.close()
                    self._control = None
            self._connect_control()
            assert self._control is not None
            try:
                return self._control.ask(message)
            except OSError as error:
                raise BackendUnreachable(f"the supervisor does not answer: {error}") from error

    def _connect_control(self) -> Message:
        line, hello = self._dial(self._hello())
        try:
            if hello["version"] != VERSION:
                line, hello = self._upgraded(line, hello)
            if self._warm:
                line.ask({"do": "warm", "interpreter": "python", "preload": self._warm,
                          "env": self._base | {"PYTHONUNBUFFERED": "1"}})
        except OSError as error:
            line.close()
            raise BackendUnreachable(f"the supervisor does not answer: {error}") from error
        self._control = line
        return hello

    def _hello(self) -> Message:
        return {"do": "hello", "version": VERSION, "settings": self._settings.to_wire()}

    def _upgraded(self, line: Line, hello: Message) -> tuple[Line, Message]:
        """The supervisor is of another version: let it become ours, with its replicas."""
        answer = line.ask({"do": "upgrade", "argv": command(self.layout)})
        if not answer["ok"]:
            raise BackendUnreachable(
                f"a supervisor of another version ({hello['version']}) is at work: {answer['why']}", hint="try again")
        line.wait_for_end()
        return self._dial(self._hello())

    def _news(self, wait_s: float) -> list[Message]:
        """What a watcher is told, waiting for the first message at most `wait_s`. After any trouble: a full listing."""
        if self._watch is not None:
            try:
                return self._watch.receive(wait_s)
            except OSError:
                self._watch.close()
                self._watch = None
        self._watch, listing = self._dial({"do": "watch"})
        return [listing]

    def _dial(self, first: Message) -> tuple[Line, Message]:
        return dial(self.layout, first, self._base)
