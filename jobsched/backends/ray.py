"""The Ray backend: replicas run beside detached actors on a Ray cluster, which reserves what jobsched has planned.

Used by `wiring` through `registry`. The cluster knows everything: which actors there are, and each actor what it runs;
a new server sees all that the old one saw. Ray itself is spoken to by `ray_driver`, a process of its own that is
started anew after any trouble; one thread here listens to it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path

import structlog

from jobsched.backends import bundle, local_render
from jobsched.backends import ray_render as render
from jobsched.backends.followed_log import begin, chunks
from jobsched.backends.identity import own_id
from jobsched.backends.ray_pools import Pools
from jobsched.backends.ray_render import Bundle, CannotRender, Json, Place
from jobsched.backends.ray_sessions import Visit
from jobsched.backends.replica_table import Known, ReplicaTable
from jobsched.backends.supervisor import replica_log, secret_files
from jobsched.backends.supervisor.protocol import Layout, Settings
from jobsched.backends.supervisor.sweeper import Sweeper
from jobsched.core.job import Reason
from jobsched.core.launch import Launch, LaunchKey, own_key
from jobsched.core.node import Node
from jobsched.core.observation import Observation, ReplicaReport, Seen
from jobsched.core.pools import Demand
from jobsched.core.resources import NOTHING, GpuId, GpuShare, NodeName, Resources
from jobsched.errors import BackendUnreachable, Conflict
from jobsched.ports import Addressing, Capabilities, LogChunk, Session, Window
from jobsched.spec.backends import RayBackend as Config

ANSWER_S = 60.0
"""Longest wait for a driver's first listing: Ray takes its time to connect."""
SILENT_S = 9.0
"""A driver that has not polled the nodes for so long is stuck, and ended."""
RETRY_S, RETRY_MAX_S = 0.5, 5.0
CLOSE_S = 8.0
"""How long a driver may take to end what it was told."""
ASKED_S = 15.0
"""Longest wait for an actor's answer."""

log = structlog.get_logger("jobsched.ray")


@dataclass(slots=True)
class Replica(Known):
    """One actor, or what shall become one. Its progress is in its report."""

    node_id: str = ""
    gpus: tuple[GpuShare, ...] = ()
    keep_ms: int = 0
    made: bool = False
    """It has an actor."""
    drained: bool = False
    """Its log is here, to the last byte."""


@dataclass(slots=True)
class Nodes:
    """The cluster's nodes as last polled."""

    by_id: dict[str, Node] = field(default_factory=dict)
    foreign: dict[str, Resources] = field(default_factory=dict)
    """At the last poll, before it is believed: what Ray tells of a reservation comes a little late."""


class RayBackend:
    """A `Backend`. `home` keeps logs, secrets and (unless configured) checkpoints; nothing in it is needed to go on."""

    def __init__(self, home: Path, config: Config) -> None:
        self.layout = Layout(home.absolute())
        self.layout.make(sockets=False)
        self.config = config
        self.home_id = own_id(self.layout.state / "ray-id")
        self.table: ReplicaTable[Replica] = ReplicaTable()
        self._groups: dict[str, list[Bundle]] = {}
        self._pools = Pools()
        self._nodes: Nodes | None = None
        """None while the cluster does not answer."""
        self._problem = ""
        self._answers: dict[int, Json | None] = {}
        """Open questions to actors -> the answer, once it came."""
        self._next_question = 0
        self._closing = threading.Event()
        self._listed = threading.Event()
        """The first listing came, or failed to."""
        self.driver: subprocess.Popen[bytes] | None = None
        self._line: Connection | None = None
        self._sending = threading.Lock()
        self._sweeper = Sweeper(self.layout)
        self.capabilities = Capabilities(
            name="ray",
            addressing=Addressing.NODE,
            absence_is_final=True,
            stacks=True,
            warm_start=True,
            limits="cgroup or rlimit, as each node allows" if config.limits == "auto" else config.limits,
            checkpoint_root=config.checkpoints or str(self.layout.home / "checkpoints"),
        )
        self._listener = threading.Thread(target=self._listen, name="ray-driver", daemon=True)
        self._listener.start()

    # the port -----------------------------------------------------------------------------------------------------

    def observe(self, timeout_ms: int = 0) -> Observation:
        if not self.table.told:
            self._listed.wait(ANSWER_S)
        return self.table.observe(self._offered, timeout_ms)

    def start(self, launches: Sequence[Launch]) -> None:
        made = {}
        with self.table.changed:
            ids = {node.name: node_id for node_id, node in (self._nodes or Nodes()).by_id.items()}
            fresh = {  # nodes that are not there are not listed: the order comes again
                launch.key: launch for launch in launches
                if launch.node in ids and not self.table.started(launch.key)
            }  # fmt: skip
            for launch in fresh.values():
                report = ReplicaReport(launch.key, launch.node, Seen.STARTING)
                made[launch.key] = Replica(
                    report, node_id=ids[launch.node], gpus=launch.gpus, keep_ms=launch.keep_ms)
                self.table.add(made[launch.key])
        for job in dict.fromkeys(map(_attempt, fresh)):
            gang = [launch for launch in fresh.values() if _attempt(launch.key) == job]
            threading.Thread(target=self._start_gang, args=(gang, made), name="ray-start", daemon=True).start()

    def stop(self, keys: Sequence[LaunchKey], grace_ms: int) -> None:
        with self.table.changed:
            for replica in self.table.known(keys):
                if not replica.alive:
                    continue
                if replica.made:
                    self._order({"do": "stop", "key": replica.key, "grace_ms": grace_ms})
                else:
                    self._order({"do": "remove", "keys": [replica.key], "groups": [], "recorded": False})
                    text = "stopped before it ran"
                    self._finish(replica, replace(replica.report, signal=int(signal.SIGTERM), message=text))

    def ask_stacks(self, keys: Sequence[LaunchKey]) -> None:
        with self.table.lock:
            for replica in self.table.known(keys):
                if replica.alive and replica.made:
                    self._order({"do": "stacks", "key": replica.key})

    def forget(self, keys: Sequence[LaunchKey]) -> None:
        with self.table.changed:
            ended = [replica for replica in self.table.known(keys) if not replica.alive]
            for replica in ended:
                self.table.forget(replica)
            if gone := [replica.key for replica in ended]:
                self._order({"do": "remove", "keys": gone, "groups": self._leave(gone), "recorded": True})

    def logs(self, key: LaunchKey, offset: int = 0, follow: bool = False, timeout_ms: int = 0) -> Iterator[LogChunk]:
        return chunks(self.layout.log(key), offset, lambda: follow and self._writes(key), timeout_ms)

    def execute(
        self, key: LaunchKey, command: Sequence[str], window: Window | None = None, *, stdin: bool = True
    ) -> Session:
        return self._visit(key, list(command), (window.rows, window.columns) if window else None, stdin, 0)

    def connect(self, key: LaunchKey, port: int) -> Session:
        return self._visit(key, [], None, True, port)

    def ask_checkpoint(self, keys: Sequence[LaunchKey]) -> Sequence[LaunchKey]:
        answers = self._asked(keys, "ask_checkpoint")
        return [key for key, answer in answers.items() if answer is not None and answer.get("said")]

    def _visit(self, key: LaunchKey, *what: object) -> Session:
        """By a door that the replica's actor opens; see `ray_door`."""
        answers = self._asked([key], "visit", *what)
        if not answers:
            raise Conflict("the replica cannot be reached: it does not run")
        if (answer := answers[key]) is None:
            raise BackendUnreachable(f"the replica's actor did not answer within {ASKED_S:g} s")
        door = answer.get("said") or answer
        if why := door.get("why"):
            raise Conflict(f"the replica cannot be reached: {why}")
        return Visit(door["host"], door["port"], door["secret"])

    def _asked(self, keys: Sequence[LaunchKey], method: str, *args: object) -> dict[LaunchKey, Json | None]:
        """Answers of the actors of those that run; None of those that did not answer in time."""
        with self.table.changed:
            running = [one.key for one in self.table.known(keys) if one.report.state is Seen.RUNNING]
            questions = {}
            for key in running:
                number = self._next_question = self._next_question + 1
                questions[key], self._answers[number] = number, None
                self._order({"do": "ask", "question": number, "key": key, "method": method, "args": list(args)})
            self.table.changed.wait_for(lambda: all(self._answers[n] is not None for n in questions.values()), ASKED_S)
            return {key: self._answers.pop(number) for key, number in questions.items()}

    def provision(self, demands: Sequence[Demand]) -> None:
        """By a request to the cluster's autoscaler; see `ray_pools`."""
        with self.table.lock:
            self._pools.want(demands)
            self._ask_for_nodes()

    def close(self) -> None:
        self._closing.set()
        with self._sending:
            line, self._line = self._line, None
        if line is not None:
            with suppress(OSError):
                line.send(None)
        self._listener.join(CLOSE_S)

    # what is told -------------------------------------------------------------------------------------------------

    def _offered(self) -> dict[NodeName, Node]:
        if self._nodes is None:
            raise BackendUnreachable(
                f"the Ray cluster does not answer: {self._problem or 'no listing yet'}",
                hint="is it running (ray status), and is this machine a node of it?")
        return {node.name: node for node in self._nodes.by_id.values()}

    def _writes(self, key: LaunchKey) -> bool:
        replica = self.table.get(key)
        return replica is not None and not replica.drained

    def _finish(self, replica: Replica, report: ReplicaReport) -> None:
        """Its end, once and for all (under the lock)."""
        failed = report.exit_code != 0 or report.failure is not Reason.NONE
        tail = report.tail or (replica_log.tail(self.layout.log(replica.key)) if failed else ())
        self.table.end(replica, replace(report, tail=tail))

    def _end_unseen(self, replica: Replica, failure: Reason, text: str) -> None:
        """Nobody saw how its command ended."""
        replica.drained = True
        if replica.alive:
            self._finish(replica, replace(replica.report, failure=failure, message=text))

    def _never_ran(self, key: LaunchKey, text: str, failure: Reason, code: int | None = None) -> None:
        with self.table.changed:
            replica = self.table.get(key)
            if replica is None or not replica.alive:
                return
            replica.drained = True
            begin(self.layout.log(replica.key), replica.keep_ms)
            replica_log.append(self.layout.log(key), f"jobsched: {text}\n")
            self._finish(replica, replace(replica.report, exit_code=code, failure=failure, message=text))

    def _leave(self, keys: Sequence[LaunchKey]) -> list[str]:
        """Their bundles are idle; returns the groups of which nobody is left."""
        empty = []
        for name, bundles in self._groups.items():
            mine = [one for one in bundles if one.key in keys]
            for one in mine:
                one.key = ""
            if mine and not any(one.key for one in bundles):
                empty.append(name)
        for name in empty:
            del self._groups[name]
        return empty

    # starting -----------------------------------------------------------------------------------------------------

    def _start_gang(self, gang: Sequence[Launch], replicas: Mapping[LaunchKey, Replica]) -> None:
        """Reserve what is not reserved yet, and have the actors made."""
        with ExitStack() as open_files:
            ready: list[tuple[Launch, str]] = []
            packed: dict[str, str] = {}
            for launch in gang:
                try:
                    if self.layout.log(launch.key).exists():
                        raise CannotRender("")
                    secret = secret_files.resolved(launch.env, self.layout.secrets)
                    archive = self._packed(launch, packed, open_files)
                    render.order(launch, self.config, copied=bool(archive))
                except (CannotRender, bundle.BundleError, secret_files.SecretError, OSError) as error:
                    if str(error):
                        self._never_ran(launch.key, str(error), Reason.START_FAILED, 126)
                    else:
                        self._ran_before(launch.key)
                else:
                    ready.append((replace(launch, env=secret), archive))
            with self.table.changed:
                ready = [(launch, archive) for launch, archive in ready if self._wanted(replicas[launch.key])]
                order = self._reserved(ready, replicas)
            if order is not None:
                self._order(order)
                self._await_start([launch.key for launch, _ in ready])

    def _ran_before(self, key: LaunchKey) -> None:
        with self.table.changed:
            if (replica := self.table.get(key)) is not None:
                self._end_unseen(replica, Reason.NONE, "it ran before, and its actor is gone")

    def _wanted(self, replica: Replica) -> bool:
        return replica.alive and self.table.get(replica.key) is replica

    def _packed(self, launch: Launch, packed: dict[str, str], open_files: ExitStack) -> str:
        """The archive of its directory, made once for all who share it."""
        where = launch.working_dir
        if not where or self.config.working_dir == "shared":
            return ""
        if where not in packed:
            folder = open_files.enter_context(tempfile.TemporaryDirectory())
            packed[where] = os.path.join(folder, "working_dir.tar")
            with open(packed[where], "wb") as file:
                owner = bundle.Owner(os.getuid(), os.getgid())
                bundle.pack(Path(where), file, self.config.copy_limit, owner)
        return packed[where]

    def _reserved(
        self, ready: Sequence[tuple[Launch, str]], replicas: Mapping[LaunchKey, Replica]
    ) -> Json | None:
        """The order to the driver: idle bundles of the gang's groups are used again (under the lock)."""
        if self._nodes is None or not ready:
            for launch, _ in ready:  # the order comes again
                self.table.drop(replicas[launch.key])
            return None
        places = {
            launch.key: place for launch, _ in ready if (place := self._idle(launch, replicas[launch.key].node_id))
        }  # fmt: skip
        addresses = {node_id: node.address for node_id, node in self._nodes.by_id.items()}
        groups = []
        for gang in render.gangs([launch for launch, _ in ready if launch.key not in places]):
            name = render.prefix(self.home_id) + gang[0].key
            bundles = [Bundle(replicas[one.key].node_id, render.needs(one), one.key) for one in gang]
            self._groups[name] = bundles
            groups.append(render.group_request(name, bundles, addresses))
            places |= {one.key: Place(name, at) for at, one in enumerate(gang)}
        actors = [
            render.actor_request(
                launch, places[launch.key], addresses[replicas[launch.key].node_id], archive, self.config)
            for launch, archive in ready
        ]
        return {"do": "start", "groups": groups, "actors": actors}

    def _idle(self, launch: Launch, node_id: str) -> Place | None:
        """A bundle of an earlier restart, of the same size in the same place."""
        for name, bundles in self._groups.items():
            if _attempt(LaunchKey(name.removeprefix(render.prefix(self.home_id)))) == _attempt(launch.key):
                for at, one in enumerate(bundles):
                    if not one.key and (one.node_id, one.resources) == (node_id, render.needs(launch)):
                        one.key = launch.key
                        return Place(name, at)
        return None

    def _await_start(self, keys: Sequence[LaunchKey]) -> None:
        """Until each has its actor or its end: so long the packed directories must stay."""
        until = time.monotonic() + self.config.bind_timeout / 1000 + ANSWER_S
        with self.table.changed:
            while time.monotonic() < until and not self._closing.is_set() and self._nodes is not None and any(
                replica.alive and not replica.made for replica in self.table.known(keys)
            ):
                self.table.changed.wait(1.0)

    # the driver ---------------------------------------------------------------------------------------------------

    def _order(self, message: Json) -> None:
        """To the driver, if there is one: what gets lost with it is ordered again."""
        with self._sending, suppress(OSError):
            if self._line is not None:
                self._line.send(message)

    def _listen(self) -> None:
        """Start a driver and heed it; another one after any trouble."""
        pause = RETRY_S
        while not self._closing.is_set():
            ours, theirs = socket.socketpair()
            log = self.layout.state / "ray-driver.log"
            with theirs, open(log, "wb") as out:
                process = self.driver = subprocess.Popen(
                    [sys.executable, "-P", "-m", "jobsched.backends.ray_driver", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL, stdout=out, stderr=out, pass_fds=[theirs.fileno()], cwd="/",
                )
            line = Connection(ours.detach())
            try:
                line.send(self._settings())
                with self._sending:
                    self._line = line
                problem = self._heed(line)
            except (OSError, EOFError):
                last = replica_log.tail(log, 1)
                problem = f"its driver ended: {last[0] if last else 'somebody killed it'}"
            with self._sending:
                self._line = None
            process.kill()
            process.wait()
            line.close()
            pause = RETRY_S if self._nodes is not None else min(2 * pause, RETRY_MAX_S)
            self._lost_touch(problem)
            self._closing.wait(pause)

    def _settings(self) -> Json:
        config, limits = self.config, self.config.logs
        supervisor = Settings(log_bytes=limits.size * (limits.rotations + 1), limits=config.limits)
        return {
            "address": config.address, "start": config.start, "namespace": config.namespace,
            "prefix": render.prefix(self.home_id), "owner": self.home_id, "place": config.scratch,
            "bind_s": config.bind_timeout / 1000, "supervisor": supervisor.to_wire(),
        }

    def _heed(self, line: Connection) -> str:
        """Messages until there is trouble, which is returned."""
        patience = ANSWER_S
        while line.poll(patience):
            message = line.recv()
            patience = SILENT_S
            with self.table.changed:
                match message["is"]:
                    case "listing":
                        self._take_listing(message)
                    case "nodes":
                        self._take_nodes(message["nodes"], message["available"])
                        self._sweeper.step({"/".join(_attempt(one.key)) for one in self.table.all()})
                    case "made":
                        self._made(LaunchKey(message["key"]), message["actor"])
                    case "news":
                        self._take_news(LaunchKey(message["key"]), message)
                    case "dead":
                        self._died(LaunchKey(message["key"]), message["text"])
                    case "late":
                        self._late(message["keys"], message["groups"])
                    case "asked":
                        if message["problem"]:
                            log.warning("nodes on demand", problem=message["problem"])
                    case "failed":
                        text = f"Ray would not start it: {message['text']}"
                        self._never_ran(LaunchKey(message["key"]), text, Reason.REPLICA_LOST)
                    case "answer":
                        if message["question"] in self._answers:
                            self._answers[message["question"]] = message
                            self.table.hurry()
                    case "down":
                        return str(message["text"])
            if self._closing.is_set():
                break
        return f"its driver has said nothing for {patience:g} s"

    def _lost_touch(self, problem: str) -> None:
        with self.table.changed:
            self._nodes, self._problem = None, problem
            self._listed.set()
            self.table.start_over()

    def _take_listing(self, message: Json) -> None:
        """All that there is: adopt what is ours, and tell what is gone."""
        self._nodes = Nodes()
        self._pools.ask_anew()
        self._groups = {
            name: [Bundle(node_id, render.resources(raw), "") for node_id, raw in bundles]
            for name, bundles in message["groups"].items()
        }
        self._take_nodes(message["nodes"], message["available"])
        found = {key: one for one in message["actors"] if (key := own_key(one["key"])) is not None}
        for replica in self.table.all():
            if replica.key in found:
                continue
            if not replica.made:  # the order got lost with the driver, and comes again
                self.table.drop(replica)
            else:
                lives = replica.node_id in self._nodes.by_id
                text = "its actor was gone when the cluster answered again" if lives else "its Ray node died"
                self._end_unseen(replica, Reason.NONE if lives else Reason.NODE_LOST, text)
        for key, one in found.items():
            self._adopt(key, one)
        idle = [name for name, bundles in self._groups.items() if not any(bundle.key for bundle in bundles)]
        for name in idle:
            del self._groups[name]
        self._order({"do": "remove", "keys": [], "groups": idle, "recorded": True})
        self._listed.set()
        self.table.hurry()

    def _adopt(self, key: LaunchKey, one: Json) -> None:
        assert self._nodes is not None
        replica = self.table.get(key)
        if replica is None and self.table.started(key):  # forgotten: the order got lost
            self._order({"do": "remove", "keys": [key], "groups": [], "recorded": True})
            return
        node, note = self._nodes.by_id.get(one["node"]), one["note"]
        if replica is None:
            name = node.name if node else NodeName(one["node"][-12:])
            replica = Replica(ReplicaReport(key, name, Seen.RUNNING))
            self.table.add(replica)
        replica.node_id, replica.made = one["node"], True
        replica.gpus = tuple(GpuShare(GpuId(gpu), milli) for gpu, milli in note.get("gpus", ()))
        replica.keep_ms = note.get("keep_ms", 0)
        bundles = self._groups.get(note.get("group", ""), [])
        if note.get("bundle", 0) < len(bundles):
            bundles[note["bundle"]].key = key
        if one["report"] is not None:
            self._take_report(replica, one["report"], one["actor"])
        begin(self.layout.log(replica.key), replica.keep_ms)
        if not replica.drained:
            self._order({"do": "attend", "key": key, "offset": replica_log.size(self.layout.log(key))})

    def _take_nodes(self, raws: Sequence[Json], available: Mapping[str, Json]) -> None:
        """What there is and who holds it. Others' use is believed when two polls agree."""
        assert self._nodes is not None
        ours: dict[GpuId, int] = {}
        for replica in self.table.all():
            for share in replica.gpus if replica.alive else ():
                ours[share.gpu] = ours.get(share.gpu, 0) + share.milli
        seen, before = render.nodes(raws, self.config), self._nodes.foreign
        foreign = {}
        for raw in raws:
            node_id = raw["NodeID"]
            mine = [one for bundles in self._groups.values() for one in bundles if one.node_id == node_id]
            free = render.resources(available.get(node_id, raw["Resources"]))
            foreign[node_id] = render.foreign(render.resources(raw["Resources"]), free, mine)
            used = render.least(foreign[node_id], before.get(node_id, NOTHING))
            seen[node_id] = render.with_foreign(seen[node_id], used, ours)
        self._nodes = Nodes(seen, foreign)
        self._ask_for_nodes()
        self.table.hurry()

    def _ask_for_nodes(self) -> None:
        if self._nodes is not None and (request := self._pools.step(self._nodes.by_id.values())) is not None:
            self._order({"do": "provision", "request": request})

    def _made(self, key: LaunchKey, actor: str) -> None:
        replica = self.table.get(key)
        if replica is not None and replica.alive:
            replica.made = True
            begin(self.layout.log(replica.key), replica.keep_ms)
            self.table.report(replica, replace(replica.report, ident=actor))

    def _take_news(self, key: LaunchKey, news: Json) -> None:
        replica = self.table.get(key)
        if replica is None:
            return
        self._append(replica, news["begin"], news["data"])
        replica.drained = news["drained"]
        if news["report"] is not None:
            self._take_report(replica, news["report"], replica.report.ident)

    def _take_report(self, replica: Replica, data: Json, actor: str) -> None:
        report = replace(local_render.report(data), ident=actor)
        if report.state is Seen.EXITED:
            self._finish(replica, report)
        else:
            self.table.report(replica, report)

    def _append(self, replica: Replica, begin: int, data: bytes) -> None:
        """Log bytes from their place on; what the node has cut off meanwhile becomes a hole."""
        log = self.layout.log(replica.key)
        have = replica_log.size(log)
        if begin > have:
            with open(log, "ab") as out:
                out.truncate(begin)
        elif begin < have:
            data = data[have - begin:]
        if data:
            with open(replica_log.open_for_append(log), "ab") as out:
                out.write(data)

    def _died(self, key: LaunchKey, text: str) -> None:
        replica = self.table.get(key)
        if replica is None or self._nodes is None:
            return
        reason, words = render.death(text, node_lives=replica.node_id in self._nodes.by_id)
        if reason is Reason.NODE_LOST:  # the next poll would say so; both are to be seen at once
            self._nodes.by_id.pop(replica.node_id, None)
        self._end_unseen(replica, Reason.NONE if reason is Reason.REPLICA_LOST else reason, words)

    def _late(self, keys: Sequence[LaunchKey], groups: Sequence[str]) -> None:
        for name in groups:
            self._groups.pop(name, None)
        for key in keys:
            self._never_ran(key, render.late(keys, self.config.bind_timeout / 1000), Reason.START_TIMEOUT)


def _attempt(key: LaunchKey) -> tuple[str, str]:
    job, attempt, *_ = key.split("/")
    return job, attempt
