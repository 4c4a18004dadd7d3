"""A small world for tests of the core and the controller: memory store, simulated engine, virtual clock, real loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from jobsched.controller.loop import Controller
from jobsched.core import events as ev
from jobsched.core import invariants
from jobsched.core.cluster import Cluster
from jobsched.core.job import Job, Phase
from jobsched.core.launch import Launch, LaunchKey
from jobsched.core.node import Gpu, Node
from jobsched.core.passes import Policy
from jobsched.core.pools import NodePool
from jobsched.core.resources import GpuId, JobId, NodeName
from jobsched.ports import Backend, Store
from jobsched.sim.backend import Script, SimBackend
from jobsched.sim.clock import SimClock
from jobsched.spec.job import JobSpec
from jobsched.spec.queue import QueueSpec
from jobsched.store.memory import MemoryStore

GIB = 2**30


def a_gpu_node(name: str = "n1", gpus: int = 8, kind: str = "sim-gpu", cpus: int = 64, **fields: object) -> Node:
    """A node with like GPUs; ports 20000-20999."""
    devices = tuple(Gpu(GpuId(f"{name}-g{i}"), kind, 16 * GIB) for i in range(gpus))
    given: dict[str, object] = {"port_lo": 20_000, "port_hi": 20_999, **fields}
    return Node(NodeName(name), cpus * 1_000, 256 * GIB, devices, **given)  # type: ignore[arg-type]


def numbered_node(index: int, gpus: int) -> Node:
    """Node n1, n2, …: all on one machine, each with ports of its own."""
    low = 20_000 + 100 * index
    return a_gpu_node(f"n{index + 1}", gpus, port_lo=low, port_hi=low + 99)


def a_spec(**fields: object) -> JobSpec:
    """One worker with one GPU unless told otherwise."""
    fields.setdefault("roles", {"worker": {"command": "true", "gpu": "any:1", "cpu": 1}})
    return JobSpec.model_validate(fields)


def a_ps_spec(ps: int = 2, workers: int = 3, **fields: object) -> JobSpec:
    roles = {
        "ps": {"command": "ps", "replicas": ps, "cpu": 1},
        "worker": {"command": "worker", "replicas": workers, "gpu": "any:1", "cpu": 1},
    }
    return a_spec(roles=roles, **fields)


class World:
    """Everything real but the engine and the time."""

    def __init__(
        self,
        nodes: int = 4,
        gpus: int = 8,
        scripts: Callable[[Launch], Script] | None = None,
        store: Store | None = None,
        queues: tuple[QueueSpec, ...] = (QueueSpec(),),
        wrap: Callable[[Backend], Backend] | None = None,
        takes_ms: Callable[[NodePool], int] = lambda pool: pool.delay_ms,
    ) -> None:
        self.clock = SimClock()
        self.store = store or MemoryStore()
        self.engine = SimBackend(self.clock, [numbered_node(i, gpus) for i in range(nodes)], scripts, takes_ms)
        self.backend: Backend = wrap(self.engine) if wrap else self.engine
        self.queues = queues
        self.serial = 0
        self.policy = Policy()
        self.controller = self.boot()

    def boot(self, policy: Policy | None = None) -> Controller:
        """A new server process: nothing survives but store and engine, and its policy unless another is given."""
        self.engine.close()
        self.policy = policy or self.policy
        self.controller = Controller(
            self.store, self.backend, self.clock, self.policy, queues=self.queues, secret=b"of this world",
            sole_definer=True,
        )
        return self.controller

    def submit(self, spec: JobSpec | None = None, **fields: object) -> JobId:
        self.serial += 1
        job_id = JobId(f"j{self.serial:05}")
        spec = spec or a_spec()
        event = ev.JobSubmitted(self.clock.now_ms(), job_id, spec.name or job_id, "me", spec, **fields)  # type: ignore[arg-type]
        self.store.append([event])
        return job_id

    def wish(self, event: ev.Event) -> None:
        self.store.append([event])

    @property
    def cluster(self) -> Cluster:
        with self.controller.view() as (cluster, _):
            return cluster

    def job(self, job_id: JobId) -> Job:
        job = self.store.job(job_id)
        assert job is not None
        return job

    def tick(self, times: int = 1, step_ms: int = 10) -> None:
        """Tick, checking the invariants after each and that no GPU runs two replicas."""
        for _ in range(times):
            self.controller.tick()
            problems = invariants.check(self.cluster)
            assert not problems, problems
            self.check_engine()
            self.clock.advance_to(self.clock.now_ms() + step_ms)

    def check_engine(self) -> None:
        held: dict[tuple[NodeName, GpuId], LaunchKey] = {}
        for key, launch in self.engine.alive().items():
            for share in launch.gpus:
                other = held.setdefault((launch.node, share.gpu), key)
                assert other == key or share.milli < 1_000, f"GPU {share.gpu} runs {other} and {key}"

    def run_until(self, done: Callable[[], bool], limit_ms: int = 3_600_000) -> None:
        """Tick, jumping to whatever comes next, until `done()`; fails after `limit_ms` of virtual time."""
        end = self.clock.now_ms() + limit_ms
        while not done():
            before = self.store.last_seq()
            pause = self.controller.tick()
            problems = invariants.check(self.cluster)
            assert not problems, problems
            self.check_engine()
            if self.store.last_seq() != before:
                pause = min(pause, 1)
            wake = self.engine.next_event_ms()
            instant = self.clock.now_ms() + max(1, pause)
            self.clock.advance_to(instant if wake is None else max(self.clock.now_ms() + 1, min(instant, wake)))
            assert self.clock.now_ms() < end, f"not done: {self.phases()}"

    def run_to_phase(self, job_id: JobId, *phases: Phase, limit_ms: int = 3_600_000) -> Job:
        self.run_until(lambda: self.job(job_id).phase in phases, limit_ms)
        return self.job(job_id)

    def phases(self) -> Mapping[str, int]:
        return self.store.count("phase")

    def key(self, job_id: JobId, role: str, index: int) -> LaunchKey:
        """The newest living launch of a replica."""
        found = [k for k in self.engine.alive() if k.startswith(f"{job_id}/") and f"/{role}/{index}/" in k]
        return max(found, key=lambda k: [int(part) for part in (k.split("/")[1], k.split("/")[4])])

    def events(self, job_id: JobId, kind: type | None = None) -> list[ev.Event]:
        return [s.event for s in self.store.history(job_id) if kind is None or isinstance(s.event, kind)]
