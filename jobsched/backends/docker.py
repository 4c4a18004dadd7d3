"""The Docker backend: replicas are containers on one or several engines, each engine a node.

Used by `wiring` through `registry`. The engines know everything: what a container is, its labels say; a new server sees
all that the old one saw. Per engine one thread watches (listing, then events) and one feels its pulse; per running
container one thread collects its log, takes the reports in it, and tells its end; per stop one thread waits.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobsched.backends import bundle, reports
from jobsched.backends import docker_render as render
from jobsched.backends.container_log import collect
from jobsched.backends.containers import exit_of, instant, relay
from jobsched.backends.docker_engine import Engine, Gone, ImageError, Refused
from jobsched.backends.docker_pools import MadeEngine, Maker
from jobsched.backends.docker_render import CannotRender, Json, Site
from jobsched.backends.docker_station import Replica, Station, event_stamp, key_of, stamp
from jobsched.backends.followed_log import begin, chunks
from jobsched.backends.identity import own_id
from jobsched.backends.incidents import Incidents
from jobsched.backends.replica_table import ReplicaTable, Stop
from jobsched.backends.sessions import at_once
from jobsched.backends.supervisor import replica_log, secret_files
from jobsched.backends.supervisor.processes import signal_number
from jobsched.backends.supervisor.protocol import Layout
from jobsched.backends.supervisor.stacks import LOOK_S, Written
from jobsched.backends.supervisor.sweeper import Sweeper
from jobsched.core.job import Reason
from jobsched.core.launch import Launch, LaunchKey
from jobsched.core.node import Node
from jobsched.core.observation import Incident, Observation, ReplicaReport, Seen
from jobsched.core.pools import Demand
from jobsched.core.resources import JobId, NodeName
from jobsched.errors import BackendUnreachable, Conflict, JobschedError
from jobsched.ports import Addressing, Capabilities, LogChunk, Session, Window
from jobsched.spec.backends import DockerBackend as Config
from jobsched.spec.backends import DockerEngine

ANSWER_S = 25.0
"""Longest wait for an engine's first listing."""
RETRY_S = 0.5
PULSE_S = 2.0
KILL_AFTER_S = 5.0
"""Least time between SIGTERM and SIGKILL."""
WORD_S = 3.0
"""Longest wait for the event of an end, once it is known otherwise."""
STREAM_PAUSE_S = 0.2
"""Pause before a log stream that broke off is opened again."""
OVERDUE_S = 2.0
"""A log stream that goes on this long after its container's end is cut off."""
NEVER = "0001-"
"""How the engine begins an instant that has not come yet."""
AT_ONCE = 8
"""Containers that one engine makes at the same time."""


class DockerBackend:
    """A `Backend`. `home` keeps logs, secrets and (unless configured) checkpoints; nothing in it is needed to go on."""

    def __init__(self, home: Path, config: Config) -> None:
        self.layout = Layout(home.absolute())
        self.layout.make()
        self.config = config
        self.home_id = own_id(self.layout.state / "docker-id")
        several = len(config.engines) > 1 or bool(config.provision)
        self._checkpoints = config.checkpoints or str(self.layout.home / "checkpoints")
        self.table: ReplicaTable[Replica] = ReplicaTable()
        self._incidents = Incidents()
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
        for replica in self.table.all():
            if replica.engine is station:
                self.table.drop(replica)
        self.table.hurry()
        station.pool.shutdown(wait=False, cancel_futures=True)
        station.engine.close()

    # the port -----------------------------------------------------------------------------------------------------

    def observe(self, timeout_ms: int = 0) -> Observation:
        if not self.table.told:
            for station in self._stations:
                station.listed.wait(ANSWER_S)
        return self.table.observe(self._offered, timeout_ms)

    def start(self, launches: Sequence[Launch]) -> None:
        gangs: dict[int, tuple[Station, list[tuple[Replica, Launch]]]] = {}
        with self.table.changed:
            for launch in launches:
                station = next((s for s in self._stations if s.node and s.node.name == launch.node), None)
                if self.table.started(launch.key) or station is None:
                    continue  # unknown nodes are not listed: the order comes again or is withdrawn
                report = ReplicaReport(launch.key, launch.node, Seen.STARTING)
                replica = Replica(report, launch.contract.token, launch.stop_signal, engine=station)
                self.table.add(replica)
                gangs.setdefault(id(station), (station, []))[1].append((replica, launch))
        for station, gang in gangs.values():
            self._aside(self._start_gang, station, gang)

    def stop(self, keys: Sequence[LaunchKey], grace_ms: int) -> None:
        for replica, stop in self.table.stop(keys, grace_ms, lambda replica: bool(replica.container)):
            self._aside(self._carry_out, replica, stop)

    def ask_stacks(self, keys: Sequence[LaunchKey]) -> None:
        for replica in self.table.known(keys):
            if replica.report.state is Seen.RUNNING:
                self._aside(self._take_stacks, replica)

    def forget(self, keys: Sequence[LaunchKey]) -> None:
        for replica in self.table.known(keys):
            if not replica.alive:
                self.table.forget(replica)
                replica.engine.pool.submit(self._remove, replica)

    def logs(self, key: LaunchKey, offset: int = 0, follow: bool = False, timeout_ms: int = 0) -> Iterator[LogChunk]:
        return chunks(self.layout.log(key), offset, lambda: follow and self._writes(key), timeout_ms)

    def execute(
        self, key: LaunchKey, command: Sequence[str], window: Window | None = None, *, stdin: bool = True
    ) -> Session:
        replica = self.table.get(key)
        if replica is None or replica.report.state is not Seen.RUNNING:
            raise Conflict("nothing can run beside the replica: it does not run")
        try:
            return replica.engine.engine.execute(replica.container, command, window, stdin)
        except (Gone, Refused) as error:
            raise Conflict(f"nothing can run beside the replica: {error}") from error

    def ask_checkpoint(self, keys: Sequence[LaunchKey]) -> Sequence[LaunchKey]:
        def told(replica: Replica) -> bool:
            number = signal_number(replica.stop_signal)
            return bool(number and replica.engine.engine.signal(replica.container, number, "caught"))

        running = [one for one in self.table.known(keys) if one.report.state is Seen.RUNNING]
        return [one.key for one, listens in zip(running, at_once(told, running), strict=True) if listens]

    def connect(self, key: LaunchKey, port: int) -> Session:
        return self.execute(key, relay(port))

    def close(self) -> None:
        self._closing.set()
        self._maker.close()
        self._socket.close()
        streams = [replica.log for replica in self.table.all() if replica.log is not None]
        for station in self._stations:
            station.engine.leave()
        for stream in streams:
            with suppress(Exception):
                stream.close()
        if not self.table.all():  # containers that run have the directory mounted, and it must stay the same one
            self.layout.leave(self._socket.path)
        for thread in self._threads:
            thread.join(2.0)
        for station in self._stations:
            station.pool.shutdown(wait=False, cancel_futures=True)
            station.engine.close()

    # what is told -------------------------------------------------------------------------------------------------

    def _offered(self) -> dict[NodeName, Node]:
        """Engines as nodes; BackendUnreachable when none answers."""
        nodes = {station.node.name: station.node for station in self._stations if station.node is not None}
        if not nodes:
            problems = [station.problem for station in self._stations if station.problem]
            raise BackendUnreachable(problems[0] if problems else "the Docker engine does not answer")
        return nodes

    def _writes(self, key: LaunchKey) -> bool:
        replica = self.table.get(key)
        return replica is not None and (replica.alive or replica.attended)

    def _finish(self, replica: Replica, report: ReplicaReport) -> None:
        """Its end, once and for all."""
        if not replica.alive:
            return
        failed = report.exit_code != 0 or report.failure is not Reason.NONE
        tail = replica_log.tail(self.layout.log(replica.key)) if failed else ()
        if text := render.no_command(tail):
            report = replace(report, failure=Reason.START_FAILED, message=text)
        self.table.end(replica, replace(report, tail=tail))

    def _never_ran(self, replica: Replica, text: str, failure: Reason, code: int | None = None) -> None:
        with self.table.lock:
            if replica.alive:
                begin(self.layout.log(replica.key), 0)
                replica_log.append(self.layout.log(replica.key), f"jobsched: {text}\n")
                self._finish(replica, replace(replica.report, exit_code=code, failure=failure, message=text))

    def incidents(self, job_id: JobId, nodes: Sequence[NodeName] = ()) -> Sequence[Incident]:
        return self._incidents.about(job_id, nodes)

    def _took(self, data: Json) -> None:
        """A report came through the socket or a log."""
        self.table.take(data)

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
                        self.table.tell(replica, message=text)

            try:
                if self.config.pull == "always" or not station.engine.has_image(image):
                    if self.config.pull == "never":
                        raise ImageError(f"image {image} is not on {users[0].report.node}, and is not to be pulled")
                    told(f"pulling {image}")
                    self._note_image(users, "Pulling", f"pulling {image}")
                    station.engine.pull(image, told)
                told("")
            except ImageError as error:
                failed[image] = str(error)
                self._note_image(users, "ImageError", str(error), warning=True)
                for replica in users:
                    self._never_ran(replica, str(error), Reason.IMAGE_ERROR)
        return [one for one in ready if one[1]["Image"] not in failed]

    def _note_image(self, users: Sequence[Replica], reason: str, message: str, *, warning: bool = False) -> None:
        at_ms = int(time.time() * 1000)
        for replica in users:
            node = replica.report.node
            self._incidents.note(Incident(at_ms, reason, message, replica.key, node, warning))

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
            with self.table.changed:
                if replica.withdrawn:
                    station.pool.submit(self._remove, replace(replica, container=container))
                    return
                replica.container = container  # from here on a stop goes to the container
            begin(self.layout.log(key), launch.keep_ms)
            engine.start(container)
        except ImageError as error:
            self._never_ran(replica, str(error), Reason.IMAGE_ERROR)
        except Refused as error:
            self._refused(replica, str(error))
        except (BackendUnreachable, Gone):  # whether it runs, the next listing tells; if not, the order comes again
            self._abandon([replica])
        else:
            self.table.tell(replica, state=Seen.RUNNING, ident=container[:12])
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
        with self.table.changed:
            for replica in replicas:
                if replica.alive:
                    self.table.drop(replica)

    # running and ending -------------------------------------------------------------------------------------------

    def _attend(self, replica: Replica) -> None:
        """Collect its log and tell its end, on a thread of its own."""
        if self._claim(replica):
            self._aside(self._collect_and_end, replica)

    def _claim(self, replica: Replica) -> bool:
        """Whether nobody attends it yet; from now on the caller does."""
        with self.table.lock:
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
            with self.table.changed:
                replica.attended = False
                if not replica.alive:
                    self.table.mark(replica)

    def _collected(self, replica: Replica) -> Json | None:
        """Its log up to the end, and then its last state; None when we are closing."""
        engine, follow = replica.engine.engine, True

        def opened(since_s: int) -> Any:
            replica.log = engine.log(replica.container, since_s, follow)
            if self._closing.is_set():  # it came too late for `close` to see it
                replica.log.close()
            return replica.log

        while not self._closing.is_set():
            with suppress(Refused):  # it is just being removed, or its logs go elsewhere
                collect(self.layout.log(replica.key), opened, self._took, self.config.logs, self._closing.is_set)
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
                others = any(other.key.split("/")[:2] == attempt for other in self.table.all())
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
            with self.table.lock:
                replica.stop = None if replica.alive else stop

    def _wait(self, holds: Callable[[], bool], until: Callable[[], float]) -> None:
        """Until it holds, or an instant that others may bring nearer."""
        self.table.wait(lambda: holds() or self._closing.is_set(), until)

    def _take_stacks(self, replica: Replica) -> None:
        """The training library answers SIGQUIT with the stacks of all threads, on stderr."""
        written = Written(self.layout.log(replica.key))
        try:
            caught = replica.engine.engine.signal(replica.container, signal.SIGQUIT, "caught")
        except BackendUnreachable:
            return
        if not caught:
            self.table.tell(replica, stacks="no process in the container writes its stacks")
            return
        while not (written.over() or self._closing.wait(LOOK_S)):
            pass
        self.table.tell(replica, stacks=written.text)

    # watching -----------------------------------------------------------------------------------------------------

    def _watch(self, station: Station) -> None:
        """List, then follow the events; from the beginning again after any trouble."""
        while not (self._closing.is_set() or station.left.is_set()):
            try:
                info = station.engine.info()
                events = station.engine.events(stamp(info["SystemTime"]))
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
        if station.node is not None:
            self._tell_of_engine(station.node.name, "EngineLost", problem)
        with self.table.changed:
            station.node, station.problem, station.touch = None, problem, station.touch + 1
            station.listed.set()
            self.table.changed.notify_all()

    def _take_listing(self, station: Station, info: Json) -> None:
        """Everything of ours on the engine: adopt it, and tell what is gone."""
        engine, first = station.engine, not station.listed.is_set()
        restarted = self._began_anew(station, info)
        if restarted:
            name = NodeName(engine.config.name or str(info["Name"]).lower())
            self._tell_of_engine(name, "EngineRestarted", "what it ran has ended")
        station.clock = (instant(info["SystemTime"]), time.monotonic())
        station.site = replace(station.site, cpu_count=int(info["NCPU"]))
        name = NodeName(engine.config.name or str(info["Name"]).lower())
        found = {key: one for one in engine.ours(f"{render.HOME}={self.home_id}") if (key := key_of(one)) is not None}
        for key, inspected in found.items():
            self._adopt(station, name, key, inspected, restarted)
        ours = [replica for replica in self.table.all() if replica.engine is station and replica.alive]
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
        past = station.engine.past_events(stamp(info["SystemTime"]))
        known = [event_stamp(event) for event in past]
        restarted = bool(station.last_event) and station.last_event not in known
        for event, at in zip(past, known, strict=True):
            if at > station.last_event:
                self._note(event)
        station.last_event = known[-1] if known else ""
        return restarted

    def _adopt(self, station: Station, name: NodeName, key: LaunchKey, inspected: Json, restarted: bool) -> None:
        state, container = inspected["State"], str(inspected["Id"])
        with self.table.changed:
            replica = self.table.get(key)
            if replica is not None and not replica.alive:
                return
            if replica is not None and not replica.container:
                return  # being started right now
            half_made = state["StartedAt"].startswith(NEVER) and not state.get("Error")
            if half_made and replica is not None:
                return
            if replica is None and not half_made:
                if self.table.started(key):  # and forgotten
                    station.pool.submit(station.engine.remove, container)
                    return
                report = ReplicaReport(key, name, Seen.RUNNING, ident=container[:12])
                stop_signal = inspected["Config"]["Labels"].get(render.SIGNAL, "")
                replica = Replica(report, render.token_of(inspected), stop_signal, engine=station)
                self.table.add(replica)
            if replica is not None:
                replica.container = container
                if not state["Running"]:
                    replica.died_at, replica.died_with = time.monotonic(), int(state["ExitCode"])
                    replica.died_in, replica.killed_by_engine = station.touch, restarted
                self.table.mark(replica)
        if half_made:  # by a server that ended; gone before the listing is told, as the order comes again
            station.engine.remove(container)
        else:
            begin(self.layout.log(key), 0)

    def _drop_networks(self, station: Station, found: dict[LaunchKey, Json]) -> None:
        """Those whose attempt has no container any more."""
        kept = {render.network_name(self.home_id, key) for key in found}
        with station.networks:
            kept |= {render.network_name(self.home_id, replica.key) for replica in self.table.all()}
        for network in station.engine.networks(f"{render.HOME}={self.home_id}"):
            if network["Name"] not in kept:
                station.engine.remove_network(network["Name"])

    def _note(self, event: Json) -> None:
        """What befell a container of ours, for people."""
        if (incident := render.incident(event, self.home_id)) is not None:
            self._incidents.note(incident)

    def _tell_of_engine(self, name: NodeName, reason: str, message: str) -> None:
        self._incidents.note(Incident(int(time.time() * 1000), reason, message, node=name, warning=True))

    def _heed(self, station: Station, event: Json) -> None:
        station.last_event = event_stamp(event)
        self._note(event)
        actor = event.get("Actor", {})
        labels = actor.get("Attributes", {})
        action = event.get("Action", "")
        if labels.get(render.HOME) != self.home_id:
            if action in ("start", "die", "destroy", "update"):
                self._look_around(station)
            return
        with self.table.changed:
            replica = self.table.get(LaunchKey(labels.get(render.KEY, "")))
            if replica is None or replica.container != actor.get("ID"):
                return
            if action == "die":
                replica.died_at, replica.died_in = time.monotonic(), station.touch
                replica.died_with = int(labels.get("exitCode", -1))
                self.table.changed.notify_all()

    def _look_around(self, station: Station, info: Json | None = None, name: str = "") -> None:
        """The engine as a node: what it has, and what others use of it."""
        ours = [r.container for r in self.table.all() if r.engine is station and r.alive and r.container]
        node = station.look_around(self.home_id, ours, info, name)
        with self.table.changed:
            twin = any(s.node is not None and s.node.name == node.name for s in self._stations if s is not station)
            station.node = None if twin else node
            station.problem = f"two engines call themselves {node.name}; give them names" if twin else ""
            self.table.changed.notify_all()

    def _feel_pulse(self, station: Station) -> None:
        """An engine that is cut off says nothing at all, so it is asked; so is what silent replicas do."""
        while not self._closing.wait(PULSE_S) and not station.left.is_set():
            if station.node is None:
                continue
            try:
                station.engine.ping()
                self._attend_to_all(station)
                self._sample_silent(station)
                if station.gpus and station.gpus_old:
                    self._look_around(station)
            except (BackendUnreachable, Refused):
                station.engine.interrupt()
            self._cut_overdue(station)
            if station is self._stations[0]:
                self._sweeper.step({"/".join(replica.key.split("/")[:2]) for replica in self.table.all()})

    def _attend_to_all(self, station: Station) -> None:
        """Whoever collected a log and lost touch just after a listing has left it to nobody."""
        with self.table.lock:
            alone = [r for r in self.table.all() if r.engine is station and r.alive and not r.attended
                     and (r.report.state is Seen.RUNNING or r.died_at)]
        for replica in alone:
            self._attend(replica)

    def _sample_silent(self, station: Station) -> None:
        """Whether replicas that have stopped reporting still use the CPU: the sign that tells hung from busy."""
        now = time.monotonic()
        with self.table.lock:
            silent = [r for r in self.table.all()
                      if r.engine is station and r.report.state is Seen.RUNNING and r.progress is not None
                      and now - r.progress.beat_at > reports.SILENT_S]
        for replica in silent:
            used = station.engine.cpu_ns(replica.container)
            with self.table.changed:
                replica.take_look(used, time.monotonic())
                self.table.mark(replica)

    def _cut_overdue(self, station: Station) -> None:
        with self.table.lock:
            overdue = [r.log for r in self.table.all() if r.engine is station and r.alive and r.log is not None
                       and r.died_at and time.monotonic() - r.died_at > OVERDUE_S]
        for stream in overdue:
            with suppress(Exception):
                stream.close()

    def _aside(self, target: Callable[..., None], *args: object) -> None:
        threading.Thread(target=target, args=args, name=f"docker-{target.__name__}", daemon=True).start()


def _own_user() -> str:
    return f"{os.getuid()}:{os.getgid()}" if os.getuid() else render.ROOT_SHALL_NOT
