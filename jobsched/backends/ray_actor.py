"""The actor that stands for one replica on a Ray cluster: has the node's supervisor run the command, and tells of it.

Made by `ray_driver`, lives on the node that jobsched picked. Ray gives it the resources and the GPUs, the supervisor
does the rest: process group, stop, limits, log, reports. The actor holds the replica: when it ends, however that
comes, the supervisor kills the replica. One supervisor serves all replicas of a server on a node. Standard library
only, like the supervisor: it must start in a blink, many times.
"""

from __future__ import annotations

import io
import os
import shutil
import signal
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from jobsched.backends.ray_door import Talk, open_door
from jobsched.backends.supervisor import client, replica_log
from jobsched.backends.supervisor.beside import Beside, Joined
from jobsched.backends.supervisor.client import Line
from jobsched.backends.supervisor.protocol import VERSION, Layout, Message, Order
from jobsched.backends.supervisor.sweeper import KEEP_FILE
from jobsched.contract import from_environ, to_environ
from jobsched.errors import BackendUnreachable

CHUNK = 256 << 10
"""Most bytes of a log that one answer holds."""
LOOK_S = 0.1
"""How often the log is looked at while somebody waits for news."""
RETRY_S = 0.2
AGES = ("ended_age_ms", "idle_age_ms")


class Host:
    """`ray.remote(Host)`. `order` is a rendered `Order` without what only the node knows: its own environment, its
    paths (below `place`, else the system's temporary directory; `owner` is the server's id), and the GPUs Ray gave.
    `archive`: the working directory, packed. `note` is the server's own, for its successor."""

    def __init__(
        self, place: str, owner: str, settings: Message, order: Message, archive: bytes | None, ray_gpus: bool,
        note: Message,
    ) -> None:
        self._note = note
        self._order = Order.from_wire(order)
        self._settings = settings
        self._archive = archive
        self._ray_gpus = ray_gpus
        gcs_address, node_id, self._gpus = _given()
        home = Path(place or tempfile.gettempdir()) / f"jobsched-ray-{os.getuid()}" / owner / node_id[-12:]
        self._layout = Layout(home)
        environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self._base = client.inherited(environ | {"RAY_ADDRESS": gcs_address}, sys.executable)
        self._changed = threading.Condition()
        self._control = threading.Lock()
        self._line: Line | None = None
        self._report: Message = {"key": self._order.key, "node": self._order.node, "state": "starting"}
        self._version = 1
        self._told_at = time.monotonic()
        self._stopped = self._forgotten = False
        threading.Thread(target=self._attend, name="supervisor", daemon=True).start()

    # what the driver asks -----------------------------------------------------------------------------------------

    def news(self, version: int, offset: int, wait_s: float) -> Message:
        """What is new since `version` and the log's byte `offset` (negative: no log is wanted), waiting up to `wait_s`
        for something. An end is told after the last byte of the log; `drained` says that nothing will follow."""
        deadline = time.monotonic() + wait_s
        log = self._layout.log(self._order.key)
        while True:
            with self._changed:
                now, report, told_at = self._version, self._report, self._told_at
            ended = report["state"] == "exited"  # looked at before the log, so that nothing is missed
            begin, data = _read(log, offset) if offset >= 0 else (offset, b"")
            more = offset >= 0 and begin + len(data) < replica_log.size(log)
            left = deadline - time.monotonic()
            if data or now != version or ended or left <= 0:
                break
            with self._changed:
                self._changed.wait(min(left, LOOK_S))
        withheld = ended and more
        aged = _aged(report, int((time.monotonic() - told_at) * 1000))
        return {
            "version": version if withheld else now, "report": None if withheld else aged, "begin": begin, "data": data,
            "drained": ended and not more, "note": self._note,
        }

    def stop(self, grace_ms: int) -> None:
        """As the port's; a stop that comes before the start leaves nothing to start."""
        self._stopped = True
        self._ask({"do": "stop", "keys": [self._order.key], "grace_ms": grace_ms})

    def visit(self, command: Sequence[str], window: tuple[int, int] | None, stdin: bool, port: int) -> Message:
        """Open a door (`ray_door`) to a command beside the replica, or to a port of this node if one is given; where it
        is, or why there is none."""
        found: Message = {"ok": False, "why": "it does not run"}
        with self._control, suppress(OSError):
            if self._line is not None:
                found = self._line.ask({"do": "beside", "key": self._order.key})
        if not found["ok"]:
            return {"why": found["why"]}
        try:
            if port:
                talk: Talk = Joined(port)
            else:
                env = found["env"] | ({"TERM": "xterm-256color"} if window else {})
                talk = Beside(found["pid"], env, found["enter"], command, window)
                if not stdin:
                    talk.end_input()
        except OSError as error:
            where = f"nothing listens on port {port} there: " if port else ""
            return {"why": f"{where}{error.strerror or error}"}
        host = _own_address()
        return dict(zip(("host", "port", "secret"), (host, *open_door(host, talk)), strict=True))

    def ask_checkpoint(self) -> bool:
        """Whether there was a process to ask."""
        with self._control, suppress(OSError):
            if self._line is not None:
                return bool(self._line.ask({"do": "checkpoint", "keys": [self._order.key]}).get("keys"))
        return False

    def ask_stacks(self) -> None:
        self._ask({"do": "stacks", "keys": [self._order.key]})

    def forget(self) -> None:
        """The end is recorded and the log is at the server: nothing of it stays here. The actor is about to go, too."""
        self._forgotten = True
        self._ask({"do": "forget", "keys": [self._order.key]})
        log = self._layout.log(self._order.key)
        log.unlink(missing_ok=True)
        if log.parent.is_dir() and os.listdir(log.parent) == [KEEP_FILE]:  # it was the last of its attempt
            shutil.rmtree(log.parent, ignore_errors=True)

    # the supervisor -----------------------------------------------------------------------------------------------

    def _attend(self) -> None:
        """Order the replica, then hear of it; again when the supervisor died: the next one adopts what still runs."""
        try:
            order = self._prepared()
        except (OSError, tarfile.TarError) as error:
            self._never_ran(f"the working directory cannot be unpacked on this node: {error}")
            return
        self._archive = None
        hello = {"do": "hello", "version": VERSION, "settings": self._settings}
        while not self._forgotten:
            watch = None
            try:
                line, _ = client.dial(self._layout, hello, self._base)
                line.ask({"do": "hold", "keys": [order.key]})
                with self._control:
                    self._line = line
                    if self._stopped and self._report["state"] == "starting":
                        end = {"state": "exited", "signal": int(signal.SIGTERM), "message": "stopped before it ran"}
                        self._tell({**self._report, **end})
                        return
                    line.ask({"do": "start", "orders": [order.to_wire()]})
                watch, listing = client.dial(self._layout, {"do": "watch"}, self._base)
                self._take(listing)
                while not self._forgotten:
                    for message in watch.receive(1.0):
                        self._take(message)
            except (OSError, BackendUnreachable) as error:
                self._tell({**self._report, "message": f"the node's supervisor does not answer: {error}"})
                time.sleep(RETRY_S)
            finally:
                if watch is not None:
                    watch.close()

    def _prepared(self) -> Order:
        """The order with what only this node knows."""
        order, key = self._order, self._order.key
        self._layout.make()
        scratch = self._layout.scratch_dir(key)
        scratch.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self._archive is not None:
            work = scratch / "work"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(mode=0o700)
            with tarfile.open(fileobj=io.BytesIO(self._archive)) as tar:
                tar.extractall(work, filter="tar")
            order = replace(order, cwd=str(work))
        contract = from_environ(order.env)
        assert contract is not None
        contract = replace(contract, report=f"unix:{self._layout.report_socket}", scratch_dir=str(scratch))
        pinned = {"CUDA_VISIBLE_DEVICES": ",".join(self._gpus)} if self._ray_gpus else {}
        return replace(order, env={**self._base, **to_environ(contract, order.env), **pinned})

    def _take(self, message: Message) -> None:
        """A listing or a change; the supervisor tells of all replicas of the node."""
        key = self._order.key
        for report in message["replicas"]:
            if report["key"] == key:
                self._tell(report)
        gone = key in message["gone"] or (message.get("full") and all(r["key"] != key for r in message["replicas"]))
        if gone and not self._forgotten and self._report["state"] != "exited":
            self._tell({**self._report, "state": "exited", "message": "the node's supervisor no longer knows it"})

    def _never_ran(self, text: str) -> None:
        replica_log.append(self._layout.log(self._order.key), f"jobsched: {text}\n")
        self._tell({**self._report, "state": "exited", "exit_code": 126, "failure": "StartFailed", "message": text})

    def _tell(self, report: Message) -> None:
        with self._changed:
            self._report, self._told_at = report, time.monotonic()
            self._version += 1
            self._changed.notify_all()

    def _ask(self, message: Message) -> None:
        """Best effort: an order that gets lost with the supervisor comes again."""
        with self._control, suppress(OSError):
            if self._line is not None:
                self._line.ask(message)


def _given() -> tuple[str, str, Sequence[str]]:
    """Ray's own address, this node's id, and the GPUs of this actor."""
    import ray

    context = ray.get_runtime_context()
    return context.gcs_address, context.get_node_id(), context.get_accelerator_ids().get("GPU", [])


def _own_address() -> str:
    import ray.util

    return str(ray.util.get_node_ip_address())


def _read(log: Path, offset: int) -> tuple[int, bytes]:
    try:
        return replica_log.read(log, offset, CHUNK)
    except FileNotFoundError:
        return offset, b""


def _aged(report: Message, ms: int) -> Message:
    """The report `ms` later: what it says are ages, because the clocks of other machines are not trusted."""
    older = {name: report[name] + ms for name in AGES if report.get(name, -1) >= 0}
    progress = report.get("progress")
    if progress:
        ages = {name: progress[name] + ms for name in ("step_age_ms", "beat_age_ms")}
        older["progress"] = {**progress, **ages}
    return {**report, **older}
