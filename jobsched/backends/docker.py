"""The Docker backend: replicas are containers on one or several engines, each engine a node.

Used by `wiring` through `registry`. The engines know everything: what a container is, its labels say; a new server sees
all that the old one saw. Per engine one thread watches (listing, then events) and one feels its pulse; per running
container one thread collects its log, takes the reports in it, and tells its end; per stop one thread waits.
"""

from __future__ import annotations

import os
import secrets
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from jobsched.backends import bundle, reports
from jobsched.backends import docker_render as render
from jobsched.backends.container_log import collect
from jobsched.backends.containers import exit_of, instant, relay
from jobsched.backends.docker_engine import Engine, Gone, ImageError, Refused
from jobsched.backends.docker_pools import MadeEngine, Maker
from jobsched.backends.docker_render import CannotRender, Json, Site
from jobsched.backends.followed_log import chunks
from jobsched.backends.gpus import read_inventory
from jobsched.backends.supervisor import replica_log, secret_files
from jobsched.backends.supervisor.processes import signal_number
from jobsched.backends.supervisor.protocol import Layout
from jobsched.backends.supervisor.replica import Progress
from jobsched.backends.supervisor.sweeper import Sweeper, mark_kept
from jobsched.core.job import Reason
from jobsched.core.launch import Launch, LaunchKey, parse_key
from jobsched.core.node import Gpu, Node
from jobsched.core.observation import Observation, ReplicaReport, Seen
from jobsched.core.pools import Demand
from jobsched.core.resources import NOTHING, GpuShare, NodeName
from jobsched.errors import BackendUnreachable, Conflict, JobschedError
from jobsched.ports import Addressing, Capabilities, LogChunk, Session, Window
from jobsched.spec.server import DockerBackend as Config
from jobsched.spec.server import DockerEngine

ANSWER_S = 25.0
"""Longest wait for an engine's first listing."""
RETRY_S = 0.5
PULSE_S = 2.0
GLANCE_S = 0.1
"""How long news of mere progress may wait."""
GPU_REFRESH_S = 10.0
KILL_AFTER_S = 5.0
"""Least time between SIGTERM and SIGKILL."""
STACKS_AFTER_S = 0.4
"""How long a process may take to write its stacks."""
WORD_S = 3.0
"""Longest wait for the event of an end, once it is known otherwise."""
STREAM_PAUSE_S = 0.2
"""Pause before a log stream that broke off is opened again."""
OVERDUE_S = 2.0
"""A log stream that goes on this long after its container's end is cut off."""
IDLE_PER_MILLE = 5
"""A container that uses less of one CPU than this is idle: its init process and the kernel's accounts of interrupts are
never quite still (0.03 measured)."""
NEVER = "0001-"
"""How the engine begins an instant that has not come yet."""
AT_ONCE = 8
"""Containers that one engine makes at the same time."""


@dataclass(slots=True)
class Stop:
    """A stop under way. Instants are monotonic seconds."""

    until: float
    """End of the grace."""
    acknowledged_before: object
    now: bool = False
    """No grace at all."""


@dataclass(slots=True)
class Replica:
    """One container, or what shall become one."""

    report: ReplicaReport
    engine: Station
    token: str = ""
    stop_signal: str = "USR1"
    container: str = ""
    progress: Progress | None = None
    stop: Stop | None = None
    withdrawn: bool = False
    died_at: float = 0.0
    """When the engine told its end; its log may still be on its way."""
    died_with: int | None = None
    died_in: int = 0
    """The touch (see `Station`) in which the engine told it."""
    killed_by_engine: bool = False
    """It ended when the engine was restarted."""
    ended_at: float = 0.0
    attended: bool = False
    log: Any = None
    """The stream that is being read, to be closed by others."""
    cpu_ns: int = -1
    """CPU time used up to `looked_at`."""
    looked_at: float = 0.0
    cpu_at: float = 0.0
    """When it was last found to use the CPU."""

    @property
    def key(self) -> LaunchKey:
        return self.report.key

    @property
    def alive(self) -> bool:
        return self.report.state is not Seen.EXITED

    @property
    def acknowledged(self) -> object:
        return self.progress.acknowledged if self.progress is not None else None

    def take_look(self, cpu_ns: int, now: float) -> None:
        """Its CPU time used so far (-1: not known). By share, not by change: see `IDLE_PER_MILLE`."""
        if cpu_ns < 0:
            return
        if self.cpu_ns < 0 or cpu_ns - self.cpu_ns > (now - self.looked_at) * IDLE_PER_MILLE * 10**6:
            self.cpu_at = now
        self.cpu_ns, self.looked_at = cpu_ns, now


@dataclass(slots=True)
class Station:
    """One engine as the backend keeps it."""

    engine: Engine
    site: Site
    pool: ThreadPoolExecutor
    node: Node | None = None
    """None while it does not answer."""
    problem: str = ""
    touch: int = 0
    """How often it was lost. What was heard in an earlier touch may have been the last words of an engine that has been
    restarted since."""
    last_event: str = ""
    """`seconds.nanoseconds` of the newest event seen, by its own clock."""
    gpus: tuple[Gpu, ...] = ()
    gpus_at: float = 0.0
    foreign_gpus: tuple[GpuShare, ...] = ()
    """GPUs that processes outside of any container use."""
    listed: threading.Event = field(default_factory=threading.Event)
    """Its first listing came, or failed to."""
    clock: tuple[datetime, float] = (datetime.min, 0.0)
    """The engine's own time at a monotonic instant of ours."""
    networks: threading.Lock = field(default_factory=threading.Lock)
    left: threading.Event = field(default_factory=threading.Event)
    """It was taken away."""

    def now(self) -> datetime:
        """The engine's own time."""
        return self.clock[0] + timedelta(seconds=time.monotonic() - self.clock[1])


class DockerBackend:
    """A `Backend`. `home` keeps logs, secrets and (unless configured) checkpoints; nothing in it is needed to go on."""

    def __init__(self, home: Path, config: Config) -> None:
        self.layout = Layout(home.absolute())
        self.layout.make()
        self.config = config
        self.home_id = _home_id(self.layout.state / "docker-id")
        several = len(config.engines) > 1 or bool(config.provision)
        self._checkpoints = config.checkpoints or str(self.layout.home / "checkpoints")
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        """Told on every end, acknowledgement, and change of a stop or a node."""
        self._replicas: dict[LaunchKey, Replica] = {}
        self._past: dict[str, int] = {}
        """`job/attempt/role/index` -> the highest restart that was forgotten."""
        self._dirty: dict[LaunchKey, None] = {}
        self._gone: dict[LaunchKey, None] = {}
        self._urgent = False
        self._told_nodes: dict[NodeName, Node] | None = None
        self._closing = threading.Event()
        self._sweeper = Sweeper(self.layout)
        self._socket = reports.ReportSocket(self.layout.sockets / "docker", self._took)
        self._maker = Maker(config.provision, self.layout.state / "docker-engines.json", self._take_engines)
        self._stations = [self._station(engine, several) for engine in (*config.engines, *self._maker.engines)]
        self.capabilities = Capabilities(
            name="docker",
            addressing=Addressing.NODE if several else Addressing.NAME,
            name_template="" if several else render.NAME_TEMPLATE,
            absence_is_final=not several,
            limits="container",
            checkpoint_root=self._checkpoints,
            report="",
        )
        self._threads: list[threading.Thread] = []
        for station in self._stations:
            self._look_after(station)

    def _station(self, engine: DockerEngine, several: bool) -> Station:
        site = Site(
            home_id=self.home_id, config=self.config, engine=engine, user=self.config.user or _own_user(),
            several=several, cpu_count=1, checkpoints=self._checkpoints,
            reports=str(self._socket.path.parent) if engine.shares_files else "",
        )
        return Station(Engine(engine), site, ThreadPoolExecutor(AT_ONCE, "docker-start"))

    def _look_after(self, station: Station) -> None:
        for name, target in (("watch", self._watch), ("pulse", self._feel_pulse)):
            thread = threading.Thread(target=target, args=(station,), name=f"docker-{name}", daemon=True)
            self._threads.append(thread)
            thread.start()

    # nodes on demand ----------------------------------------------------------------------------------------------

    def provision(self, demands: Sequence[Demand]) -> None:
        """By the configured command; see `docker_pools`."""
        self._maker.want(demands)

    def _take_engines(self, engines: tuple[MadeEngine, ...]) -> None:
        """The command made some engines, or took some away."""
        before = {station.engine.config.url: station for station in self._stations}
        fixed = {engine.url for engine in self.config.engines}
        there = {engine.url for engine in engines}
        for engine in engines:
            if engine.url not in before:
                station = self._station(engine, several=True)
                self._stations = [*self._stations, station]
                self._look_after(station)
        for url, station in before.items():
            if url not in fixed | there:
                self._stations = [other for other in self._stations if other is not station]
                self._leave(station)

    def _leave(self, station: Station) -> None:
        station.left.set()
        station.engine.leave()
        with self._changed:
            for replica in [r for r in self._replicas.values() if r.engine is station]:
                self._drop(replica)
            self._changed.notify_all()
        station.pool.shutdown(wait=False, cancel_futures=True)
        station.engine.close()

    # the port -----------------------------------------------------------------------------------------------------

    def observe(self, timeout_ms: int = 0) -> Observation:
        deadline = time.monotonic() + timeout_ms / 1000
        if self._told_nodes is None:
            for station in self._stations:
                station.listed.wait(ANSWER_S)
        with self._changed:
            while True:
                if all(station.node is None for station in self._stations):
                    raise BackendUnreachable(self._stations[0].problem or "the Docker engine does not answer")
                left = deadline - time.monotonic()
                if self._told_nodes is None or self._urgent or self._news_of_nodes() or left <= 0:
                    return self._observation()
                self._changed.wait(min(left, GLANCE_S))
                self._urgent = self._urgent or bool(self._dirty)

    def start(self, launches: Sequence[Launch]) -> None:
        gangs: dict[int, tuple[Station, list[tuple[Replica, Launch]]]] = {}
        with self._changed:
            for launch in launches:
                parts = parse_key(launch.key)
                known = launch.key in self._replicas or parts.restart <= self._past.get(_place(launch.key), -1)
                station = next((s for s in self._stations if s.node and s.node.name == launch.node), None)
                if known or station is None:  # unknown nodes are not listed: the order comes again or is withdrawn
                    continue
                report = ReplicaReport(launch.key, launch.node, Seen.STARTING)
                replica = Replica(report, station, launch.contract.token, launch.stop_signal)
                self._replicas[launch.key] = replica
                self._dirty[launch.key] = None
                gangs.setdefault(id(station), (station, []))[1].append((replica, launch))
        for station, gang in gangs.values():
            self._aside(self._start_gang, station, gang)

    def stop(self, keys: Sequence[LaunchKey], grace_ms: int) -> None:
        now = time.monotonic()
        until = now + grace_ms / 1000
        with self._changed:
            for key in keys:
                replica = self._replicas.get(key)
                if replica is None or not replica.alive:
                    continue
                if not replica.container:
                    replica.withdrawn = True
                    self._finish(replica, replace(
                        replica.report, signal=int(signal.SIGTERM), message="stopped before it ran"))
                elif replica.stop is None:
                    replica.stop = Stop(until, replica.acknowledged, now=grace_ms <= 0)
                    self._aside(self._carry_out, replica, replica.stop)
                elif until < replica.stop.until:
                    replica.stop.until, replica.stop.now = until, grace_ms <= 0
            self._changed.notify_all()

    def ask_stacks(self, keys: Sequence[LaunchKey]) -> None:
        for replica in self._known(keys):
            if replica.report.state is Seen.RUNNING:
                self._aside(self._take_stacks, replica)

    def forget(self, keys: Sequence[LaunchKey]) -> None:
        with self._changed:
            for replica in self._known(keys):
                if not replica.alive:
                    self._drop(replica)
                    place = _place(replica.key)
                    self._past[place] = max(self._past.get(place, 0), parse_key(replica.key).restart)
                    replica.engine.pool.submit(self._remove, replica)

    def logs(self, key: LaunchKey, offset: int = 0, follow: bool = False, timeout_ms: int = 0) -> Iterator[LogChunk]:
        return chunks(self.layout.log(key), offset, lambda: follow and self._writes(key), timeout_ms)

    def execute(
        self, key: LaunchKey, command: Sequence[str], window: Window | None = None, *, stdin: bool = True
    ) -> Session:
        (replica,) = self._known([key]) or (None,)
        if replica is None or replica.report.state is not Seen.RUNNING:
            raise Conflict("nothing can run beside the replica: it does not run")
        try:
            return replica.engine.engine.execute(replica.container, command, window, stdin)
        except (Gone, Refused) as error:
            raise Conflict(f"nothing can run beside the replica: {error}") from error

    def connect(self, key: LaunchKey, port: int) -> Session:
        return self.execute(key, relay(port))

    def close(self) -> None:
        self._closing.set()
        self._maker.close()
        self._socket.close()
        with self._lock:
            streams = [replica.log for replica in self._replicas.values() if replica.log is not None]
        for station in self._stations:
            station.engine.leave()
        for stream in streams:
            with suppress(Exception):
                stream.close()
        if not self._replicas:  # containers that run have the directory mounted, and it must stay the same one
            self.layout.leave(self._socket.path)
        for thread in self._threads:
            thread.join(2.0)
        for station in self._stations:
            station.pool.shutdown(wait=False, cancel_futures=True)
            station.engine.close()

    # what is told -------------------------------------------------------------------------------------------------

    def _nodes(self) -> dict[NodeName, Node]:
        return {station.node.name: station.node for station in self._stations if station.node is not None}

    def _news_of_nodes(self) -> bool:
        return self._nodes() != self._told_nodes

    def _observation(self) -> Observation:
        nodes, before = self._nodes(), self._told_nodes
        full = before is None
        keys = list(self._replicas) if full else [key for key in self._dirty if key in self._replicas]
        found = Observation(
            full=full,
            nodes=tuple(node for node in nodes.values() if before is None or before.get(node.name) != node),
            replicas=tuple(self._told(self._replicas[key]) for key in keys),
            gone=() if full else tuple(key for key in self._gone if key not in self._replicas),
            gone_nodes=tuple(name for name in before or () if name not in nodes),
        )
        self._told_nodes, self._urgent = nodes, False
        self._dirty.clear()
        self._gone.clear()
        return found

    @staticmethod
    def _told(replica: Replica) -> ReplicaReport:
        now = time.monotonic()
        report, progress = replica.report, replica.progress
        if progress is not None:
            report = replace(report, progress=reports.seen(progress))
            if replica.cpu_ns >= 0 and progress.beat_at < replica.cpu_at:
                report = replace(report, idle_age_ms=int((now - replica.cpu_at) * 1000))
        return replace(report, ended_age_ms=int((now - replica.ended_at) * 1000)) if replica.ended_at else report

    def _known(self, keys: Sequence[LaunchKey]) -> list[Replica]:
        with self._lock:
            return [self._replicas[key] for key in keys if key in self._replicas]

    def _writes(self, key: LaunchKey) -> bool:
        with self._lock:
            replica = self._replicas.get(key)
            return replica is not None and (replica.alive or replica.attended)

    def _tell(self, replica: Replica, **changes: Any) -> None:
        """Change the report of a replica that has not ended."""
        with self._changed:
            if replica.alive:
                replica.report = replace(replica.report, **changes)
                self._mark(replica)

    def _mark(self, replica: Replica) -> None:
        """Its report changed (under the lock)."""
        if self._replicas.get(replica.key) is replica:
            self._dirty[replica.key] = None
            self._urgent = True
            self._changed.notify_all()

    def _finish(self, replica: Replica, report: ReplicaReport) -> None:
        """Its end, once and for all."""
        with self._changed:
            if not replica.alive:
                return
            failed = report.exit_code != 0 or report.failure is not Reason.NONE
            tail = replica_log.tail(self.layout.log(replica.key)) if failed else ()
            if text := render.no_command(tail):
                report = replace(report, failure=Reason.START_FAILED, message=text)
            replica.report = replace(report, state=Seen.EXITED, tail=tail)
            replica.ended_at = time.monotonic() - report.ended_age_ms / 1000
            self._mark(replica)

    def _never_ran(self, replica: Replica, text: str, failure: Reason, code: int | None = None) -> None:
        with self._lock:
            if replica.alive:
                self._make_log(replica.key, 0)
                replica_log.append(self.layout.log(replica.key), f"jobsched: {text}\n")
                self._finish(replica, replace(replica.report, exit_code=code, failure=failure, message=text))

    def _drop(self, replica: Replica) -> None:
        """As if it had never been (under the lock)."""
        if self._replicas.get(replica.key) is replica:
            del self._replicas[replica.key]
            self._gone[replica.key] = None
            self._urgent = True
            self._changed.notify_all()

    def _took(self, data: Json) -> None:
        """A report came through the socket or a log."""
        with self._changed:
            replica = self._replicas.get(LaunchKey(data["key"]))
            if replica is None or not replica.alive:
                return
            before, first = replica.acknowledged, replica.progress is None
            progress = reports.take(replica.progress, data, replica.token)
            if progress is None:
                return
            replica.progress = progress
            self._dirty[replica.key] = None
            if first or progress.acknowledged != before:
                self._mark(replica)

    # starting -----------------------------------------------------------------------------------------------------

    def _start_gang(self, station: Station, gang: list[tuple[Replica, Launch]]) -> None:
        """Images, directories, then the containers, several at once."""
        with ExitStack() as open_files:
            ready: list[tuple[Replica, Json, Launch, Path | None]] = []
            packed: dict[str, Path] = {}
            for replica, launch in gang:
                try:
                    request = self._request(launch, station.site)
                    archive = self._packed(launch, station.site, packed, open_files)
                except (CannotRender, bundle.BundleError, secret_files.SecretError, OSError) as error:
                    self._never_ran(replica, str(error), Reason.START_FAILED, 126)
                else:
                    ready.append((replica, request, launch, archive))
            try:
                able = self._with_images(station, ready)
            except BackendUnreachable:
                self._abandon([replica for replica, *_ in ready])
                return
            with suppress(RuntimeError):  # we are closing
                for done in [station.pool.submit(self._start_one, station, *one) for one in able]:
                    done.result()

    def _request(self, launch: Launch, site: Site) -> Json:
        secret = secret_files.resolved(launch.env, self.layout.secrets)
        request = render.create_request(replace(launch, env=secret), site)
        if site.engine.shares_files:
            self._make_places(launch, site)
        return request

    def _make_places(self, launch: Launch, site: Site) -> None:
        """Directories that are mounted must be there, and be the user's."""
        if place := render.checkpoint_mount(launch, site):
            path = Path(place)
            fresh = not path.exists()
            path.mkdir(parents=True, exist_ok=True)
            if fresh and os.getuid() == 0:
                os.chown(path, site.owner.uid, site.owner.gid)
        if render.directory_by(launch, site) == "mount" and not Path(launch.working_dir).is_dir():
            raise CannotRender(f"working directory {launch.working_dir} does not exist")

    def _packed(
        self, launch: Launch, site: Site, packed: dict[str, Path], open_files: ExitStack
    ) -> Path | None:
        """The archive of its directory, made once for all who share it."""
        where = launch.working_dir
        if render.directory_by(launch, site) != "copy":
            return None
        if where not in packed:
            folder = open_files.enter_context(tempfile.TemporaryDirectory())
            packed[where] = Path(folder, "working_dir.tar")
            with open(packed[where], "wb") as file:
                prefix = "" if self.config.read_only else where
                bundle.pack(Path(where), file, self.config.copy_limit, site.owner, prefix)
        return packed[where]

    def _with_images(
        self, station: Station, ready: list[tuple[Replica, Json, Launch, Path | None]]
    ) -> list[tuple[Replica, Json, Launch, Path | None]]:
        """Those whose image is there, pulled if need be; the others are told why not."""
        failed: dict[str, str] = {}
        for image in dict.fromkeys(request["Image"] for _, request, _, _ in ready):
            users = [replica for replica, request, _, _ in ready if request["Image"] == image]

            def told(text: str, users: list[Replica] = users) -> None:
                for replica in users:
                    if replica.report.message != text:
                        self._tell(replica, message=text)

            try:
                if self.config.pull == "always" or not station.engine.has_image(image):
                    if self.config.pull == "never":
                        raise ImageError(f"image {image} is not on {users[0].report.node}, and is not to be pulled")
                    told(f"pulling {image}")
                    station.engine.pull(image, told)
                told("")
            except ImageError as error:
                failed[image] = str(error)
                for replica in users:
                    self._never_ran(replica, str(error), Reason.IMAGE_ERROR)
        return [one for one in ready if one[1]["Image"] not in failed]

    def _start_one(
        self, station: Station, replica: Replica, request: Json, launch: Launch, archive: Path | None
    ) -> None:
        engine, key = station.engine, replica.key
        try:
            with station.networks:
                if replica.withdrawn:
                    return
                if not station.site.several and render.needs_network(launch):
                    engine.make_network(render.network_request(self.home_id, key))
            name = render.container_name(self.home_id, key)
            if self.layout.log(key).exists() and engine.find(name) is None:
                self._finish(replica, replace(replica.report, message="it ran before, and its container is gone"))
                return
            container = engine.create(request, name)
            if not self.config.read_only:
                engine.put(container, "/", bundle.folders({render.SCRATCH: 0o700}, station.site.owner))
            if archive is not None:
                with open(archive, "rb") as file:
                    engine.put(container, launch.working_dir if self.config.read_only else "/", file)
            with self._changed:
                if replica.withdrawn:
                    station.pool.submit(self._remove, replace(replica, container=container))
                    return
                replica.container = container  # from here on a stop goes to the container
            self._make_log(key, launch.keep_ms)
            engine.start(container)
        except ImageError as error:
            self._never_ran(replica, str(error), Reason.IMAGE_ERROR)
        except Refused as error:
            self._refused(replica, str(error))
        except (BackendUnreachable, Gone):  # whether it runs, the next listing tells; if not, the order comes again
            self._abandon([replica])
        else:
            self._tell(replica, state=Seen.RUNNING, ident=container[:12])
            self._attend(replica)

    def _refused(self, replica: Replica, text: str) -> None:
        """The engine would not make or start it: the order's fault, or else the engine's."""
        if "address pool" in text:
            text = f"the engine has no addresses left for networks; give it more default-address-pools ({text})"
        said = render.start_error(text)
        missing = "not found" in said or "no such file" in said
        ours = render.wrong_order(text)
        self._never_ran(replica, said, Reason.START_FAILED if ours else Reason.REPLICA_LOST,
                        (127 if missing else 126) if ours else None)

    def _abandon(self, replicas: Sequence[Replica]) -> None:
        with self._changed:
            for replica in replicas:
                if replica.alive:
                    self._drop(replica)

    def _make_log(self, key: LaunchKey, keep_ms: int) -> None:
        """Its log file, which also says that the key was started."""
        log = self.layout.log(key)
        if not log.parent.exists():
            log.parent.mkdir(parents=True, mode=0o700, exist_ok=True)
            mark_kept(log.parent, keep_ms)
        os.close(replica_log.open_for_append(log))

    # running and ending -------------------------------------------------------------------------------------------

    def _attend(self, replica: Replica) -> None:
        """Collect its log and tell its end, on a thread of its own."""
        if self._claim(replica):
            self._aside(self._collect_and_end, replica)

    def _claim(self, replica: Replica) -> bool:
        """Whether nobody attends it yet; from now on the caller does."""
        with self._lock:
            free, replica.attended = not replica.attended, True
            return free

    def _collect_and_end(self, replica: Replica) -> None:
        try:
            inspected = self._collected(replica)
            if inspected is not None:
                self._finish(replica, self._end_of(replica, inspected))
        except Gone:
            self._finish(replica, self._unseen(replica))
        except BackendUnreachable:
            pass  # the next listing finds it again
        finally:
            with self._changed:
                replica.attended = False
                if not replica.alive:
                    self._mark(replica)

    def _collected(self, replica: Replica) -> Json | None:
        """Its log up to the end, and then its last state; None when we are closing."""
        engine, follow = replica.engine.engine, True

        def opened(since_s: int) -> Any:
            replica.log = engine.log(replica.container, since_s, follow)
            return replica.log

        while not self._closing.is_set():
            with suppress(Refused):  # it is just being removed, or its logs go elsewhere
                collect(self.layout.log(replica.key), opened, self._took, self.config.logs)
            replica.log = None
            inspected = engine.inspect(replica.container)
            if not inspected["State"]["Running"] and not follow:
                return inspected
            follow = inspected["State"]["Running"]  # once more at the end: a stream that is followed may lack the last
            self._closing.wait(0.0 if not follow else STREAM_PAUSE_S)
        return None

    def _end_of(self, replica: Replica, inspected: Json) -> ReplicaReport:
        """Waits for the engine's word on it: an end that is no event was the engine's own. Raises BackendUnreachable
        where only another listing can tell why it ended."""
        station, latest = replica.engine, time.monotonic() + WORD_S
        self._wait(lambda: replica.died_at > 0, lambda: latest)
        if not replica.died_at:
            station.engine.interrupt()
            raise BackendUnreachable("the engine has not told the end of a container that has ended")
        if replica.stop is None:
            station.engine.knock()  # one that is shutting down ends its containers
            if replica.died_in != station.touch:
                raise BackendUnreachable("the engine may have been restarted meanwhile")
        report = render.ended(replace(replica.report, message=""), inspected, station.now())
        if replica.killed_by_engine and report.failure is Reason.NONE and replica.stop is None:
            text = f"the engine was restarted while it ran (status {inspected['State']['ExitCode']})"
            return replace(report, failure=Reason.REPLICA_LOST, message=text)
        return report

    def _unseen(self, replica: Replica) -> ReplicaReport:
        """Its container was removed behind our back; the engine may have told its end before."""
        report = replace(replica.report, message="its container was removed")
        if replica.died_with is None:
            return report
        code, number = exit_of(replica.died_with)
        return replace(report, exit_code=code, signal=number)

    def _remove(self, replica: Replica) -> None:
        """The container, and the network of its attempt after the last one."""
        station, key = replica.engine, replica.key
        try:
            if replica.container:
                station.engine.remove(replica.container)
            attempt = key.split("/")[:2]
            with station.networks:
                with self._lock:
                    others = any(k.split("/")[:2] == attempt for k in self._replicas)
                if not others and not station.site.several:
                    station.engine.remove_network(render.network_name(self.home_id, key))
        except BackendUnreachable:
            pass  # the next listing shows it, and it is forgotten again

    # stopping -----------------------------------------------------------------------------------------------------

    def _carry_out(self, replica: Replica, stop: Stop) -> None:
        """Ask, terminate, kill, as far as the grace allows."""
        engine, container = replica.engine.engine, replica.container
        try:
            begun = time.monotonic()
            self._wait(lambda: replica.report.state is not Seen.STARTING, lambda: begun + ANSWER_S)
            asked = False
            if not stop.now and (number := signal_number(replica.stop_signal)):
                asked = bool(engine.signal(container, number, "caught"))
            if asked:
                self._wait(lambda: not replica.alive or stop.now or replica.acknowledged != stop.acknowledged_before,
                           lambda: stop.until)
            if replica.alive and not stop.now:
                answered = asked and replica.acknowledged != stop.acknowledged_before
                if not engine.signal(container, signal.SIGTERM, "all"):
                    engine.kill(container, "SIGTERM")
                least = time.monotonic() + KILL_AFTER_S
                self._wait(lambda: not replica.alive or stop.now, lambda: least if answered else max(least, stop.until))
            if replica.alive:
                engine.kill(container)
                begun = time.monotonic()
                self._wait(lambda: not replica.alive, lambda: begun + KILL_AFTER_S)
        except BackendUnreachable:
            pass  # the order comes again
        finally:
            with self._lock:
                replica.stop = None if replica.alive else stop

    def _wait(self, holds: Callable[[], bool], until: Callable[[], float]) -> None:
        """Until it holds, or an instant that others may bring nearer."""
        with self._changed:
            while not holds() and not self._closing.is_set() and (left := until() - time.monotonic()) > 0:
                self._changed.wait(min(left, 1.0))

    def _take_stacks(self, replica: Replica) -> None:
        """The training library answers SIGQUIT with the stacks of all threads, on stderr."""
        log = self.layout.log(replica.key)
        before = replica_log.size(log)
        try:
            caught = replica.engine.engine.signal(replica.container, signal.SIGQUIT, "caught")
        except BackendUnreachable:
            return
        if not caught:
            self._tell(replica, stacks="no process in the container writes its stacks")
            return
        self._closing.wait(STACKS_AFTER_S)
        with suppress(FileNotFoundError):
            self._tell(replica, stacks=replica_log.read(log, before)[1].decode(errors="replace"))

    # watching -----------------------------------------------------------------------------------------------------

    def _watch(self, station: Station) -> None:
        """List, then follow the events; from the beginning again after any trouble."""
        while not (self._closing.is_set() or station.left.is_set()):
            try:
                info = station.engine.info()
                events = station.engine.events(_stamp(info["SystemTime"]))
                self._take_listing(station, info)
                for event in events:
                    self._heed(station, event)
                    if self._closing.is_set() or station.left.is_set():
                        return
                problem = "the Docker engine closed the connection"
            except JobschedError as error:
                problem = error.message
            except (Gone, Refused) as error:
                problem = str(error)
            self._lost_touch(station, problem)
            self._closing.wait(RETRY_S)

    def _lost_touch(self, station: Station, problem: str) -> None:
        with self._changed:
            station.node, station.problem, station.touch = None, problem, station.touch + 1
            station.listed.set()
            self._changed.notify_all()

    def _take_listing(self, station: Station, info: Json) -> None:
        """Everything of ours on the engine: adopt it, and tell what is gone."""
        engine, first = station.engine, not station.listed.is_set()
        restarted = self._began_anew(station, info)
        station.clock = (instant(info["SystemTime"]), time.monotonic())
        station.site = replace(station.site, cpu_count=int(info["NCPU"]))
        name = NodeName(engine.config.name or str(info["Name"]).lower())
        found = {key: one for one in engine.ours(f"{render.HOME}={self.home_id}") if (key := _key_of(one)) is not None}
        for key, inspected in found.items():
            self._adopt(station, name, key, inspected, restarted)
        with self._lock:
            ours = [replica for replica in self._replicas.values() if replica.engine is station and replica.alive]
        for replica in ours:
            if replica.container and replica.key not in found and not replica.attended:
                self._finish(replica, self._unseen(replica))
        running = [replica for replica in ours if replica.container and not replica.died_at]
        ended = [replica for replica in ours if replica.died_at and self._claim(replica)]
        list(station.pool.map(self._collect_and_end, ended))  # before anybody is told: ends are told as ends
        for replica in running:
            self._attend(replica)
        if first:
            self._drop_networks(station, found)
        self._look_around(station, info, name)
        station.listed.set()

    def _began_anew(self, station: Station, info: Json) -> bool:
        """Whether the engine was restarted since its last event: then it does not remember that one."""
        known = [_event_stamp(event) for event in station.engine.past_events(_stamp(info["SystemTime"]))]
        restarted = bool(station.last_event) and station.last_event not in known
        station.last_event = known[-1] if known else ""
        return restarted

    def _adopt(self, station: Station, name: NodeName, key: LaunchKey, inspected: Json, restarted: bool) -> None:
        state, container = inspected["State"], str(inspected["Id"])
        with self._changed:
            replica = self._replicas.get(key)
            if replica is not None and not replica.alive:
                return
            if replica is not None and not replica.container:
                return  # being started right now
            half_made = state["StartedAt"].startswith(NEVER) and not state.get("Error")
            if half_made and replica is not None:
                return
            if replica is None and not half_made:
                if parse_key(key).restart <= self._past.get(_place(key), -1):
                    station.pool.submit(station.engine.remove, container)
                    return
                report = ReplicaReport(key, name, Seen.RUNNING, ident=container[:12])
                replica = Replica(
                    report, station, render.token_of(inspected), inspected["Config"]["Labels"].get(render.SIGNAL, ""))
                self._replicas[key] = replica
            if replica is not None:
                replica.container = container
                if not state["Running"]:
                    replica.died_at, replica.died_with = time.monotonic(), int(state["ExitCode"])
                    replica.died_in, replica.killed_by_engine = station.touch, restarted
                self._mark(replica)
        if half_made:  # by a server that ended; gone before the listing is told, as the order comes again
            station.engine.remove(container)
        else:
            self._make_log(key, 0)

    def _drop_networks(self, station: Station, found: dict[LaunchKey, Json]) -> None:
        """Those whose attempt has no container any more."""
        kept = {render.network_name(self.home_id, key) for key in found}
        with station.networks, self._lock:
            kept |= {render.network_name(self.home_id, key) for key in self._replicas}
        for network in station.engine.networks(f"{render.HOME}={self.home_id}"):
            if network["Name"] not in kept:
                station.engine.remove_network(network["Name"])

    def _heed(self, station: Station, event: Json) -> None:
        station.last_event = _event_stamp(event)
        actor = event.get("Actor", {})
        labels = actor.get("Attributes", {})
        action = event.get("Action", "")
        if labels.get(render.HOME) != self.home_id:
            if action in ("start", "die", "destroy", "update"):
                self._look_around(station)
            return
        with self._changed:
            replica = self._replicas.get(LaunchKey(labels.get(render.KEY, "")))
            if replica is None or replica.container != actor.get("ID"):
                return
            if action == "die":
                replica.died_at, replica.died_in = time.monotonic(), station.touch
                replica.died_with = int(labels.get("exitCode", -1))
                self._changed.notify_all()

    def _look_around(self, station: Station, info: Json | None = None, name: NodeName | None = None) -> None:
        """The engine as a node: what it has, and what others use of it."""
        engine = station.engine
        info = info or engine.info()
        name = name or (station.node.name if station.node else NodeName(str(info["Name"]).lower()))
        others = engine.others(render.HOME, self.home_id)
        gpus = render.listed_gpus(name, engine.config)
        if engine.config.gpus is None and engine.config.shares_files:
            gpus = self._own_gpus(station)
        used, taken = render.foreign_use(others, gpus) if others else (NOTHING, ())
        taken = tuple(dict.fromkeys((*taken, *station.foreign_gpus)))
        node = render.node(name, info, engine.config, self.config, station.site.several, gpus, (used, taken))
        with self._changed:
            twin = any(s.node is not None and s.node.name == name for s in self._stations if s is not station)
            station.node = None if twin else node
            station.problem = f"two engines call themselves {name}; give them names" if twin else ""
            self._changed.notify_all()

    def _own_gpus(self, station: Station) -> tuple[Gpu, ...]:
        """From NVML, not oftener than every ten seconds."""
        if station.gpus_at and time.monotonic() - station.gpus_at < GPU_REFRESH_S:
            return station.gpus
        with self._lock:
            ours = [r.container for r in self._replicas.values() if r.engine is station and r.alive and r.container]
        inventory = read_inventory()
        if inventory.foreign:
            pids = set[int]().union(*(station.engine.pids(container) for container in ours))
            inventory = read_inventory(pids.__contains__)
        station.gpus, station.foreign_gpus, station.gpus_at = inventory.gpus, inventory.foreign, time.monotonic()
        return station.gpus

    def _feel_pulse(self, station: Station) -> None:
        """An engine that is cut off says nothing at all, so it is asked; so is what silent replicas do."""
        while not self._closing.wait(PULSE_S) and not station.left.is_set():
            if station.node is None:
                continue
            try:
                station.engine.ping()
                self._attend_to_all(station)
                self._sample_silent(station)
                if station.gpus and time.monotonic() - station.gpus_at >= GPU_REFRESH_S:
                    self._look_around(station)
            except (BackendUnreachable, Refused):
                station.engine.interrupt()
            self._cut_overdue(station)
            if station is self._stations[0]:
                with self._lock:
                    live = {"/".join(key.split("/")[:2]) for key in self._replicas}
                self._sweeper.step(live)

    def _attend_to_all(self, station: Station) -> None:
        """Whoever collected a log and lost touch just after a listing has left it to nobody."""
        with self._lock:
            alone = [r for r in self._replicas.values() if r.engine is station and r.alive and not r.attended
                     and (r.report.state is Seen.RUNNING or r.died_at)]
        for replica in alone:
            self._attend(replica)

    def _sample_silent(self, station: Station) -> None:
        """Whether replicas that have stopped reporting still use the CPU: the sign that tells hung from busy."""
        now = time.monotonic()
        with self._lock:
            silent = [r for r in self._replicas.values()
                      if r.engine is station and r.report.state is Seen.RUNNING and r.progress is not None
                      and now - r.progress.beat_at > reports.SILENT_S]
        for replica in silent:
            used = station.engine.cpu_ns(replica.container)
            with self._changed:
                replica.take_look(used, time.monotonic())
                self._mark(replica)

    def _cut_overdue(self, station: Station) -> None:
        with self._lock:
            overdue = [r.log for r in self._replicas.values() if r.engine is station and r.alive and r.log is not None
                       and r.died_at and time.monotonic() - r.died_at > OVERDUE_S]
        for stream in overdue:
            with suppress(Exception):
                stream.close()

    def _aside(self, target: Callable[..., None], *args: object) -> None:
        threading.Thread(target=target, args=args, name=f"docker-{target.__name__}", daemon=True).start()


def _place(key: LaunchKey) -> str:
    return key.rpartition("/")[0]


def _key_of(inspected: Json) -> LaunchKey | None:
    """None for a label that is none of ours."""
    key = LaunchKey(inspected["Config"]["Labels"].get(render.KEY, ""))
    try:
        parse_key(key)
    except ValueError:
        return None
    return key


def _stamp(text: str) -> str:
    """RFC 3339 -> `seconds.nanoseconds`, as events are asked for."""
    return f"{instant(text).timestamp():.6f}000"


def _event_stamp(event: Json) -> str:
    nanos = int(event.get("timeNano", 0))
    return f"{nanos // 10**9}.{nanos % 10**9:09d}"


def _home_id(path: Path) -> str:
    """Names this server's containers on engines that several servers may share; made once."""
    with suppress(FileNotFoundError):
        return path.read_text().strip()
    path.write_text(secrets.token_hex(6))
    return path.read_text().strip()


def _own_user() -> str:
    return f"{os.getuid()}:{os.getgid()}" if os.getuid() else render.ROOT_SHALL_NOT
