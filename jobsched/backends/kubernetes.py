"""The Kubernetes backend: replicas are pods, nodes are the cluster's nodes.

Used by `wiring` through `registry`. The API server knows everything: what a pod is, its labels and annotations say; a
new server sees all that the old one saw. Informers follow nodes, their Leases, our pods, others' pods and warnings;
`kubernetes_logs` collects the logs of running pods and takes the reports in them; per stop one thread waits.
"""

from __future__ import annotations

import gzip
import io
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from jobsched.backends import bundle
from jobsched.backends import kubernetes_render as render
from jobsched.backends.containers import SEND
from jobsched.backends.followed_log import begin, chunks
from jobsched.backends.identity import own_id
from jobsched.backends.incidents import Incidents
from jobsched.backends.kubernetes_api import AT_ONCE, Api, Exists, Gone, Refused
from jobsched.backends.kubernetes_fleet import Fleet
from jobsched.backends.kubernetes_logs import MOST, OVERDUE_S, Heard, Readers
from jobsched.backends.kubernetes_pools import Pools
from jobsched.backends.kubernetes_render import CannotRender, Json, Site
from jobsched.backends.kubernetes_watch import Informer
from jobsched.backends.replica_table import ReplicaTable, Stop
from jobsched.backends.sessions import at_once
from jobsched.backends.supervisor import replica_log
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
from jobsched.errors import BackendUnreachable, Conflict
from jobsched.ports import Addressing, Capabilities, LogChunk, Session, Window
from jobsched.spec.backends import KubernetesBackend as Config
from jobsched.spec.pod import CONTAINER

log = structlog.get_logger("jobsched.kubernetes")

ANSWER_S = 25.0
"""Longest wait for the first listings."""
PULSE_S = 1.0
KILL_AFTER_S = 5.0
"""Least time between SIGTERM and SIGKILL."""
CROWDED_S = 3.0
"""How long the cluster's scheduler may say that a pod does not fit where it was to go, before it is taken back."""
REAP_AFTER_S = 30.0
"""What an earlier server left half-made is removed so long after the start."""


@dataclass(slots=True)
class Replica(Heard):
    """One pod, or what shall become one."""

    uid: str = ""
    gpus: tuple[str, ...] = ()
    keep_ms: int = 0
    made_at: float = 0.0
    """When the API server took it (monotonic seconds)."""
    bound: bool = False
    """The cluster's scheduler has bound it."""
    crowded_since: float = 0.0
    """Since when the cluster's scheduler says that others hold what it was to get; 0 while it does not."""


class KubernetesBackend:
    """A `Backend`. `home` keeps logs; nothing in it is needed to go on."""

    def __init__(self, home: Path, config: Config) -> None:
        self.layout = Layout(home.absolute())
        self.layout.make(sockets=False)
        self.config = config
        self.api = Api(config)
        instance = config.instance or own_id(self.layout.state / "kubernetes-instance", 6)
        self.site = Site(instance, self.api.namespace, config)
        self.table: ReplicaTable[Replica] = ReplicaTable()
        self.fleet = Fleet(config, self._held)
        self.pools = Pools(self.api, self.site)
        self._base = f"/api/v1/namespaces/{self.site.namespace}"
        self.readers = Readers(self.api, self._base, self.table, self.layout, config.logs, self._whole, MOST)
        self._closing = threading.Event()
        self._pool = ThreadPoolExecutor(AT_ONCE, "kubernetes")
        self._owners: dict[str, Json] = {}
        """Service -> the reference by which it owns things."""
        self._sweeper = Sweeper(self.layout)
        self.capabilities = Capabilities(
            name="kubernetes",
            addressing=Addressing.NAME,
            name_template=render.NAME_TEMPLATE.format(instance=instance),
            absence_is_final=True,
            limits="container",
            checkpoint_root=config.checkpoints.mount if config.checkpoints else "",
            report="",
        )
        ours = f"{render.INSTANCE}={instance}"
        watch = self._informer
        self._pods = watch(f"{self._base}/pods", {"labelSelector": ours}, self._list_pods, self._hear_pod)
        self._others = watch("/api/v1/pods", {
            "labelSelector": f"{render.INSTANCE}!={instance}",
            "fieldSelector": "spec.nodeName!=,status.phase!=Succeeded,status.phase!=Failed",
        }, self.fleet.list_others, self.fleet.hear_other)
        self._nodes = watch("/api/v1/nodes", {}, self._list_nodes, self._hear_node)
        self._leases = watch("/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases", {},
                             self.fleet.list_leases, self.fleet.hear_lease)
        # Of pods only what is out of order, and pulls of images: the rest, several Events a pod, is no news.
        events, pods = f"{self._base}/events", "involvedObject.kind=Pod"
        chronicle = [
            watch(events, {"fieldSelector": f"{pods},type=Warning"}, self._list_events, self._hear_warning),
            watch(events, {"fieldSelector": f"{pods},reason=Pulling"}, self._list_events, self._hear_event),
            watch("/api/v1/namespaces/default/events", {"fieldSelector": "involvedObject.kind=Node"},
                  self._list_events, self._hear_event),
        ]
        self._incidents = Incidents()
        self._informers = (self._nodes, self._others, self._pods, self._leases, *chronicle)
        self._thread = threading.Thread(target=self._feel_pulse, name="kubernetes-pulse", daemon=True)
        for informer in self._informers:
            informer.start()
        self._thread.start()

    def _informer(self, path: str, query: dict[str, str], listed: Callable[[list[Json]], None],
                  heard: Callable[[str, Json], None]) -> Informer:
        return Informer(self.api, path, query, listed, heard, self._touch_changed)

    # the port -----------------------------------------------------------------------------------------------------

    def observe(self, timeout_ms: int = 0) -> Observation:
        if not self.table.told:
            for informer in self._informers:
                informer.synced.wait(ANSWER_S)
        return self.table.observe(self._offered, timeout_ms)

    def start(self, launches: Sequence[Launch]) -> None:
        gangs: dict[str, list[tuple[Replica, Launch]]] = {}
        with self.table.changed:
            for launch in launches:
                if self.table.started(launch.key) or self.fleet.is_lost(launch.node) or not self._pods.since:
                    continue  # not there or not listed yet, node or pods: the order comes again or is withdrawn
                replica = Replica(
                    ReplicaReport(launch.key, launch.node, Seen.STARTING), launch.contract.token, launch.stop_signal,
                    gpus=tuple(share.gpu for share in launch.gpus), keep_ms=launch.keep_ms)
                self.table.add(replica)
                gangs.setdefault(self._attempt(launch.key), []).append((replica, launch))
        for gang in gangs.values():
            self._aside(self._start_gang, gang)

    def stop(self, keys: Sequence[LaunchKey], grace_ms: int) -> None:
        for replica, stop in self.table.stop(keys, grace_ms, lambda replica: bool(replica.pod)):
            self._aside(self._carry_out, replica, stop)

    def ask_stacks(self, keys: Sequence[LaunchKey]) -> None:
        for replica in self.table.known(keys):
            if replica.report.state is Seen.RUNNING:
                self._aside(self._take_stacks, replica)

    def forget(self, keys: Sequence[LaunchKey]) -> None:
        ended = [replica for replica in self.table.known(keys) if not replica.alive]
        for replica in ended:
            self.table.forget(replica)
            self.fleet.touch(replica.report.node)
        if ended:
            self._submit(self._remove, ended)

    def logs(self, key: LaunchKey, offset: int = 0, follow: bool = False, timeout_ms: int = 0) -> Iterator[LogChunk]:
        return chunks(self.layout.log(key), offset, lambda: follow and self._writes(key), timeout_ms)

    def execute(
        self, key: LaunchKey, command: Sequence[str], window: Window | None = None, *, stdin: bool = True
    ) -> Session:
        with _reaching():
            return self.api.execute(self._running_pod(key), command, CONTAINER, window, stdin)

    def ask_checkpoint(self, keys: Sequence[LaunchKey]) -> Sequence[LaunchKey]:
        def told(replica: Replica) -> bool:
            number = signal_number(replica.stop_signal)
            return bool(number) and self._signal(replica, number, "caught")

        running = [one for one in self.table.known(keys) if self._can_hear(one)]
        return [one.key for one, listens in zip(running, at_once(told, running), strict=True) if listens]

    def connect(self, key: LaunchKey, port: int) -> Session:
        with _reaching():
            return self.api.forward(self._running_pod(key), port)

    def _running_pod(self, key: LaunchKey) -> str:
        replica = self.table.get(key)
        if replica is None or not self._can_hear(replica):
            raise Conflict("the replica cannot be reached: it does not run")
        return f"{self._base}/pods/{replica.pod}"

    def provision(self, demands: Sequence[Demand]) -> None:
        """By what autoscalers react to; see `kubernetes_pools`."""
        self.pools.demands = tuple(demands)

    def close(self) -> None:
        self._closing.set()
        for informer in self._informers:
            informer.close()
        self.readers.close()
        self.table.hurry()
        for informer in self._informers:
            informer.join(2.0)
        self._thread.join(2.0)
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.api.close()

    # what is told -------------------------------------------------------------------------------------------------

    def _offered(self) -> dict[NodeName, Node]:
        for informer in (self._nodes, self._others, self._pods):
            if informer.problem:
                raise BackendUnreachable(f"{informer.problem} ({self.api.host})")
        return self.fleet.nodes()

    def _held(self) -> dict[str, frozenset[str]]:
        found: dict[str, frozenset[str]] = {}
        for replica in self.table.all():
            if replica.gpus:
                found[replica.report.node] = found.get(replica.report.node, frozenset()) | set(replica.gpus)
        return found

    def _touch_changed(self) -> None:
        """An informer lost touch or found it again: what is known of silence is told anew."""
        with self.table.changed:
            for replica in self.table.all():
                if replica.alive and replica.progress is not None:
                    self.table.mark(replica)
            self.readers.reopen(self.table.all())

    def _writes(self, key: LaunchKey) -> bool:
        replica = self.table.get(key)
        return replica is not None and (replica.alive or replica.attended)

    def _attempt(self, key: LaunchKey) -> str:
        return render.service_name(self.site.instance, key)

    def _finish(self, replica: Replica, report: ReplicaReport) -> None:
        """Its end, with the last lines of its log where it failed."""
        failed = report.exit_code != 0 or report.failure is not Reason.NONE
        tail = replica_log.tail(self.layout.log(replica.key)) if failed else ()
        self.table.end(replica, replace(report, tail=tail))

    def _whole(self, replica: Replica) -> None:
        """Its log is complete after its end."""
        if replica.end is not None:
            self._finish(replica, replica.end)

    def _never_ran(self, replica: Replica, text: str, failure: Reason, code: int | None = None) -> None:
        if replica.alive:
            begin(self.layout.log(replica.key), replica.keep_ms)
            replica_log.append(self.layout.log(replica.key), f"jobsched: {text}\n")
            self._finish(replica, replace(replica.report, exit_code=code, failure=failure, message=text))

    # starting -----------------------------------------------------------------------------------------------------

    def _start_gang(self, gang: list[tuple[Replica, Launch]]) -> None:
        """The attempt's Service, its directory, then the pods, several at once."""
        try:
            owner = self._owner(gang[0][1].key)
            packed: dict[str, list[str]] = {}
            ready: list[tuple[Replica, Launch, list[str]]] = []
            for replica, launch in gang:
                try:
                    ready.append((replica, launch, self._parts(launch, owner, packed)))
                except (bundle.BundleError, OSError) as error:
                    self._never_ran(replica, str(error), Reason.START_FAILED, 126)
        except (BackendUnreachable, Exists):  # the order comes again
            for replica, _ in gang:
                self._abandon(replica)
        except Refused as error:
            for replica, _ in gang:
                self._refused(replica, error.status, str(error))
        except Gone as error:
            for replica, _ in gang:
                self._refused(replica, 404, str(error))
        else:
            for one in ready:
                self._submit(self._start_one, *one, owner)

    def _owner(self, key: LaunchKey) -> Json:
        """The reference to the attempt's Service, which is made if need be."""
        name = self._attempt(key)
        if (known := self._owners.get(name)) is not None:
            return known
        try:
            found = self.api.create(f"{self._base}/services", render.service(self.site, key))
        except Exists:
            found = self.api.get(f"{self._base}/services/{name}")
        owner = self._owners[name] = render.owner_reference(name, found["metadata"]["uid"])
        return owner

    def _parts(self, launch: Launch, owner: Json, packed: dict[str, list[str]]) -> list[str]:
        """Names of the ConfigMaps with its directory, made once for all who share it."""
        where = launch.working_dir
        if not render.copied(launch, self.config):
            return []
        if where not in packed:
            out = io.BytesIO()
            bundle.pack(Path(where), out, self.config.copy_limit, self.site.owner, render.TOP)
            maps = render.config_maps(self.site, launch.key, gzip.compress(out.getvalue(), 6, mtime=0), owner)
            for one in maps:
                with suppress(Exists):
                    self.api.create(f"{self._base}/configmaps", one)
            packed[where] = [one["metadata"]["name"] for one in maps]
        return packed[where]

    def _start_one(self, replica: Replica, launch: Launch, parts: list[str], owner: Json) -> None:
        key, path = launch.key, f"{self._base}/pods"
        try:
            node = self.fleet.object(launch.node)
            if replica.withdrawn or not replica.alive:
                return
            if node is None:
                self._abandon(replica)
                return
            if self.layout.log(key).exists():
                self._finish(replica, replace(replica.report, message="it ran before, and its pod is gone"))
                return
            request = render.pod(launch, self.site, node, owner, parts)
            try:
                made = self.api.create(path, request)
            except Exists:
                made = self.api.get(f"{path}/{request['metadata']['name']}")
            begin(self.layout.log(replica.key), replica.keep_ms)
            with self.table.changed:
                replica.pod, replica.uid = made["metadata"]["name"], made["metadata"]["uid"]
                replica.made_at = replica.made_at or time.monotonic()
                withdrawn = replica.withdrawn
            if withdrawn:
                self.api.delete(f"{path}/{replica.pod}", 0)
        except CannotRender as error:
            self._never_ran(replica, str(error), Reason.START_FAILED, 126)
        except Refused as error:
            self._refused(replica, error.status, str(error))
        except Gone as error:
            self._refused(replica, 404, str(error))
        except BackendUnreachable:  # whether it was made, the informer tells; if not, the order comes again
            self._abandon(replica)

    def _refused(self, replica: Replica, status: int, text: str) -> None:
        if status == 404 and text.startswith("services"):  # the attempt's Service was deleted behind our back
            self._owners.pop(self._attempt(replica.key), None)
        failure = render.refusal(status, text)
        self._never_ran(replica, text, failure, 126 if failure is Reason.START_FAILED else None)

    def _abandon(self, replica: Replica) -> None:
        with self.table.changed:
            if replica.alive and not replica.pod:
                self.table.drop(replica)

    # pods ---------------------------------------------------------------------------------------------------------

    def _list_pods(self, found: list[Json]) -> None:
        listed = {one["metadata"]["uid"] for one in found}
        for one in found:
            self._hear_pod("ADDED", one)
        for replica in self.table.all():
            if replica.alive and replica.uid and replica.uid not in listed and replica.made_at < self._pods.begun:
                self._pod_gone(replica, None)
        ending = [replica for replica in self.table.all() if replica.end is not None]
        latest = time.monotonic() + ANSWER_S / 2
        self.table.wait(lambda: not any(replica.alive for replica in ending), lambda: latest)  # told as ends at once

    def _hear_pod(self, kind: str, found: Json) -> None:
        key = render.key_of(found)
        if key is None:
            return
        with self.table.changed:
            replica = self.table.get(key)
            if replica is None:
                if kind == "DELETED":
                    return
                if self.table.started(key):  # forgotten: it should not be there any more
                    self._submit(self._delete, found["metadata"]["name"], 0)
                    return
                replica = self._adopted(key, found)
            if replica.uid and replica.uid != found["metadata"]["uid"]:
                return
            if not replica.pod:
                replica.pod, replica.uid = found["metadata"]["name"], found["metadata"]["uid"]
                replica.made_at = time.monotonic()
            replica.bound = bool(found["spec"].get("nodeName"))
            if kind == "DELETED":
                self._pod_gone(replica, found)
            elif replica.alive and replica.end is None:
                self._take(replica, found)

    def _adopted(self, key: LaunchKey, found: Json) -> Replica:
        """A pod that an earlier server made."""
        report = ReplicaReport(key, NodeName(found["metadata"]["annotations"].get(render.NODE, "")), Seen.STARTING)
        replica = Replica(
            report, render.token_of(found), found["metadata"]["annotations"].get(render.SIGNAL, ""),
            gpus=render.gpus_of(found))
        self.table.add(replica)
        begin(self.layout.log(replica.key), replica.keep_ms)
        return replica

    def _take(self, replica: Replica, found: Json) -> None:
        """What a pod says of itself now (under the lock)."""
        report = render.report_of(found, wanted_away=replica.stop is not None)
        match report.state:
            case Seen.STARTING:
                if not render.crowded(found):
                    replica.crowded_since = 0.0
                elif not replica.crowded_since:
                    replica.crowded_since = time.monotonic()
                if report.message:
                    self.table.tell(replica, message=report.message, ident=report.ident)
            case Seen.RUNNING:
                self.table.tell(replica, state=Seen.RUNNING, ident=report.ident, message="")
                self.readers.attend(replica)
            case Seen.EXITED if report.exit_code is None and report.signal is None and not replica.attended:
                self._never_ran(replica, report.message, report.failure)  # it would go on trying
                self._submit(self._delete, replica.pod, 0 if not replica.bound else 1)
            case Seen.EXITED:
                self._ends(replica, report)

    def _ends(self, replica: Replica, report: ReplicaReport) -> None:
        """Its container ended: once its log is whole, so does the replica."""
        replica.end, replica.end_at = report, time.monotonic()
        self.table.stir(replica)
        self.readers.attend(replica)

    def _pod_gone(self, replica: Replica, found: Json | None) -> None:
        """There is no such pod any more."""
        with self.table.changed:
            if not replica.alive or replica.end is not None:
                return
            last = render.report_of(found, replica.stop is not None) if found is not None else replica.report
            if last.state is Seen.EXITED:
                self._ends(replica, last)
            elif replica.stop is not None:
                number = signal.SIGKILL if replica.stop.now and replica.report.state is Seen.RUNNING else signal.SIGTERM
                self._ends(replica, replace(replica.report, signal=int(number), message=""))
            else:
                self._ends(replica, replace(
                    replica.report, failure=Reason.REPLICA_LOST, message="its pod was deleted"))

    def incidents(self, job_id: JobId, nodes: Sequence[NodeName] = ()) -> Sequence[Incident]:
        return self._incidents.about(job_id, nodes)

    def _list_events(self, found: list[Json]) -> None:
        """What the API server remembers, an hour as a rule."""
        for one in found:
            self._hear_event("ADDED", one)

    def _hear_event(self, kind: str, found: Json) -> None:
        incident = render.incident(found, self.site.instance) if kind != "DELETED" else None
        if incident is not None:
            self._incidents.note(incident, total=True)

    def _hear_warning(self, kind: str, found: Json) -> None:
        """A warning about a pod; of one that does not run yet (volumes, sandboxes, quotas) it is why."""
        self._hear_event(kind, found)
        name = found.get("involvedObject", {}).get("name", "")
        if kind == "DELETED" or not name.startswith(f"js-{self.site.instance}-"):
            return
        for replica in self.table.all():
            if replica.pod == name and replica.report.state is Seen.STARTING:
                self.table.tell(replica, message=f"{found.get('reason', '')}: {found.get('message', '')}")

    # removing -----------------------------------------------------------------------------------------------------

    def _remove(self, ended: list[Replica]) -> None:
        """Pods of replicas that are over; with the last of an attempt its Service, which owns the rest."""
        for name in dict.fromkeys(self._attempt(replica.key) for replica in ended):
            mine = [replica for replica in ended if self._attempt(replica.key) == name]
            if any(self._attempt(other.key) == name for other in self.table.all()):
                for replica in mine:
                    if replica.pod:
                        self._delete(replica.pod, 0)
            else:
                self._remove_attempt(name)

    def _remove_attempt(self, service: str) -> None:
        try:
            self.api.delete(f"{self._base}/pods", 0, f"{render.ATTEMPT}={service}")
            self.api.delete(f"{self._base}/services/{service}")
            self._owners.pop(service, None)
        except (BackendUnreachable, Refused) as error:
            log.warning("not removed; a later server will", service=service, error=str(error))

    def _delete(self, pod: str, grace_s: int) -> None:
        with suppress(BackendUnreachable, Refused):
            self.api.delete(f"{self._base}/pods/{pod}", grace_s)

    def _reap(self) -> None:
        """Services of attempts that have no pod: left by a server that ended while it made or removed them."""
        with suppress(BackendUnreachable, Refused, Gone):
            ours = {"labelSelector": f"{render.INSTANCE}={self.site.instance}"}
            listing = self.api.get(f"{self._base}/services", ours)
            names = {one["metadata"]["name"] for one in listing.get("items") or ()}
            for name in sorted(names - {self._attempt(replica.key) for replica in self.table.all()}):
                if name not in self._owners:
                    self._remove_attempt(name)

    # stopping -----------------------------------------------------------------------------------------------------

    def _carry_out(self, replica: Replica, stop: Stop) -> None:
        """Ask, terminate, kill, as far as the grace allows."""
        wait = self.table.wait
        try:
            asked = False
            if self._can_hear(replica) and not stop.now and (number := signal_number(replica.stop_signal)):
                asked = self._signal(replica, number, "caught")
            if asked:
                wait(lambda: not replica.alive or stop.now or replica.acknowledged != stop.acknowledged_before,
                     lambda: stop.until, replica)
            if replica.alive and self._can_hear(replica) and not stop.now:
                answered = asked and replica.acknowledged != stop.acknowledged_before
                least = time.monotonic() + KILL_AFTER_S

                def until(least: float = least, answered: bool = answered) -> float:
                    return least if answered else max(least, stop.until)

                if not self._signal(replica, signal.SIGTERM, "all"):
                    self.api.delete(f"{self._base}/pods/{replica.pod}", max(int(until() - time.monotonic()), 1))
                wait(lambda: not replica.alive or replica.end is not None or stop.now, until, replica)
            if replica.alive and replica.end is None:
                self._kill(replica)
            begun = time.monotonic()
            wait(lambda: not replica.alive, lambda: begun + KILL_AFTER_S, replica)
        except (BackendUnreachable, Refused):
            pass  # the order comes again
        finally:
            with self.table.lock:
                replica.stop = None if replica.alive else stop

    def _kill(self, replica: Replica) -> None:
        """By the kubelet, a second after its SIGTERM; where there is none to ask, from the API server's books."""
        unasked = not replica.bound or self.fleet.is_lost(replica.report.node)
        self.api.delete(f"{self._base}/pods/{replica.pod}", 0 if unasked else 1)

    @staticmethod
    def _can_hear(replica: Replica) -> bool:
        return replica.report.state is Seen.RUNNING and replica.end is None

    def _signal(self, replica: Replica, number: int, whom: str) -> bool:
        """To processes in the container that catch it, or to all; whether there was one."""
        path = f"{self._base}/pods/{replica.pod}/exec"
        if self.readers.deaf(replica.report.node):
            return False
        try:
            return bool(self.api.exec(path, ["/bin/sh", "-c", SEND, "sh", str(int(number)), whom], CONTAINER))
        except BackendUnreachable:
            return False

    def _take_stacks(self, replica: Replica) -> None:
        """The training library answers SIGQUIT with the stacks of all threads, on stderr."""
        written = Written(self.layout.log(replica.key))
        if not self._signal(replica, signal.SIGQUIT, "caught"):
            self.table.tell(replica, stacks="no process in the container writes its stacks")
            return
        while not (written.over() or self._closing.wait(LOOK_S)):
            pass
        self.table.tell(replica, stacks=written.text)

    # nodes --------------------------------------------------------------------------------------------------------

    def _list_nodes(self, found: list[Json]) -> None:
        for name in self.fleet.list_nodes(found):
            self._node_removed(name)
        self.table.hurry()

    def _hear_node(self, kind: str, found: Json) -> None:
        self.fleet.hear_node(kind, found)
        if kind == "DELETED":
            self._node_removed(found["metadata"]["name"])
        self.table.hurry()

    def _node_removed(self, name: str) -> None:
        self._lose_replicas(name, f"node {name} was removed from the cluster")

    def _look_for_lost_nodes(self) -> None:
        """A Lease that is not renewed, and replicas that are silent: either alone proves nothing."""
        if self._leases.problem:
            return
        now = time.monotonic()
        for name, age_s, stamp in self.fleet.late(self.config.node_lost_after / 1000, self._leases.since):
            why = f"its kubelet has not renewed its Lease for {age_s:.0f} s"
            there = [one for one in self.table.all() if one.alive and one.report.node == name]
            if not there:
                self.fleet.silence(name, why)
            elif all(replica.silent(now) for replica in there) and self._still(name, stamp):
                log.warning("node lost", node=name, lease_age_s=round(age_s, 1), replicas=len(there))
                self.fleet.lose(name, stamp)
                self._lose_replicas(name, f"node {name} is lost: {why}, and its replicas are silent")
            else:
                self.readers.reopen([replica for replica in there if replica.blind_since])
        self.table.hurry()

    def _still(self, name: str, stamp: str) -> bool:
        """Whether the Lease really was not renewed, by the API server's newest state."""
        try:
            found = self.api.get(f"{self._leases.path}/{name}", timeout_s=3.0)
        except Gone:
            return True
        except (BackendUnreachable, Refused):
            return False
        return str(found.get("spec", {}).get("renewTime") or "") == stamp

    def _lose_replicas(self, name: str, why: str) -> None:
        """Nobody will tell their ends. Their pods go at once, names included; should the node come back, its kubelet
        ends what it does not find any more, and what they still save carries an old attempt or restart."""
        for replica in self.table.all():
            if replica.alive and replica.report.node == name:
                self._finish(replica, replace(replica.report, failure=Reason.NODE_LOST, message=why))
                if (stream := replica.stream) is not None:
                    stream.close()
                if replica.pod:
                    self._submit(self._delete, replica.pod, 0)

    # time ---------------------------------------------------------------------------------------------------------

    def _feel_pulse(self) -> None:
        reap_at = time.monotonic() + REAP_AFTER_S
        while not self._closing.wait(PULSE_S):
            try:
                self._look_for_lost_nodes()
                self._take_back_unbound()
                self._tend_streams()
                if self.pools.demands and not self._nodes.problem and self._nodes.synced.is_set():
                    self.pools.step(self.fleet.nodes().values())
                if time.monotonic() >= reap_at and not self._pods.problem:
                    reap_at = float("inf")
                    self._submit(self._reap)
                self._sweeper.step({"/".join(replica.key.split("/")[:2]) for replica in self.table.all()})
            except Exception:
                log.exception("a look at the cluster failed")

    def _take_back_unbound(self) -> None:
        """The first that is not bound in time ends, and with it the attempt: gangs start whole or not at all. One whose
        place others took meanwhile does not wait for that: it may fit elsewhere."""
        if self._pods.problem:
            return
        now, patience_s = time.monotonic(), self.config.bind_timeout / 1000
        for replica in self.table.all():
            if not replica.alive or not replica.made_at or replica.bound or replica.stop is not None:
                continue
            crowded = bool(replica.crowded_since) and now - replica.crowded_since >= CROWDED_S
            if crowded or now - replica.made_at >= patience_s:
                why = replica.report.message or "the cluster's scheduler has not looked at it"
                late = f"not bound to {replica.report.node} within {patience_s:g} s"
                taken = f"others took its place on {replica.report.node} meanwhile"
                self._never_ran(replica, f"{taken if crowded else late}: {why}", Reason.START_TIMEOUT)
                self._submit(self._delete, replica.pod, 0)

    def _tend_streams(self) -> None:
        self.readers.tend()
        now = time.monotonic()
        with self.table.changed:
            for replica in self.table.all():
                if not replica.alive:
                    continue
                if replica.blind_since and replica.progress is not None:
                    self.table.glance(replica)
                if replica.end is not None and now - replica.end_at > OVERDUE_S and replica.stream is not None:
                    replica.stream.close()

    def _submit(self, target: Callable[..., None], *args: object) -> None:
        with suppress(RuntimeError):  # we are closing
            self._pool.submit(_reported, target, *args)

    def _aside(self, target: Callable[..., None], *args: object) -> None:
        threading.Thread(target=_reported, args=(target, *args), name=f"kubernetes-{target.__name__}",
                         daemon=True).start()


@contextmanager
def _reaching() -> Iterator[None]:
    """Refusals to reach into a pod as ours."""
    try:
        yield
    except (Gone, Refused) as error:
        raise Conflict(f"the replica cannot be reached: {error}",
                       hint="does it still run, and may the server use pods/exec and pods/portforward?") from error


def _reported(target: Callable[..., None], *args: object) -> None:
    try:
        target(*args)
    except Exception:
        log.exception("unexpected", what=target.__name__)
