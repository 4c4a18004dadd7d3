"""Properties of the core over random lives: whatever users wish and engines suffer, the invariants hold."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from jobsched.core import events as ev
from jobsched.core import explain, invariants
from jobsched.core.cluster import Cluster
from jobsched.core.job import Job, Phase
from jobsched.core.lifecycle import LEGAL, Illegal, evolve_job
from jobsched.core.observation import Progress
from jobsched.core.passes import Policy
from jobsched.core.policies.elasticity import Elasticity
from jobsched.core.policies.fairness import FairShare
from jobsched.core.policies.victims import Preemption
from jobsched.core.resources import JobId
from jobsched.core.schedule import schedule
from jobsched.sim.backend import Script
from jobsched.spec.job import JobSpec
from jobsched.spec.queue import GPUS, QueueSpec
from tests.world import World, a_gpu_node, a_spec

EXAMPLES = int(os.environ.get("EXAMPLES", 10_000 if os.environ.get("BENCH") == "full" else 20))
POLICY = Policy(
    fair=FairShare(3_600_000), preemption=Preemption(min_runtime_ms=500),
    elastic=Elasticity(every_ms=1_000, restart_ms=100, in_place_ms=10),
)  # fmt: skip
QUEUES = (
    QueueSpec.model_validate({"name": "default", "cohort": "lab", "quota": {"gpus": 8}}),
    QueueSpec.model_validate({"name": "small", "cohort": "lab", "quota": {"gpus": 2}, "max_gpus": 3}),
    QueueSpec.model_validate({"name": "spare", "cohort": "lab", "quota": {"gpus": 6}}),
)
WISHES = ("cancel", "hold", "release", "restart", "suspend", "scale", "serve")
QUIET = settings(
    max_examples=EXAMPLES, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


def specs() -> st.SearchStrategy[JobSpec]:
    gpu = st.sampled_from([None, "any:1", "any:2", "any:4", "any:0.5", "any:0.25", "h100:1", "[sim-gpu:1, h100:1]"])
    count = st.one_of(
        st.integers(1, 4),
        st.tuples(st.integers(1, 2), st.integers(2, 4)).map(lambda t: {"min": t[0], "max": t[1], "prefer": t[1]}),
    )

    def build(
        n: object, g: str | None, ps: int | str, scope: str, prio: int, queue: str, within: str, spread: str
    ) -> JobSpec:
        restart = {"scope": scope, "max": 2}
        worker: dict[str, object] = {"command": "w", "replicas": n, "cpu": "500m", "restart": restart}
        if g:
            worker["gpu"] = ["sim-gpu:1", "h100:1"] if g.startswith("[") else g
        roles: dict[str, object] = {"worker": worker}
        if ps:
            roles["ps"] = {"command": "p", "replicas": ps, "cpu": "500m"}
        placement = {"within": within, "spread": spread if not within else ""}
        return a_spec(roles=roles, priority=prio, queue=queue, placement=placement)

    return st.builds(
        build, count, gpu, st.sampled_from([0, 0, 1, 2, "1..2", "1..3"]),
        st.sampled_from(["replica", "role", "job"]), st.integers(0, 2), st.sampled_from(["default", "small"]),
        st.sampled_from(["", "", "node", "rack"]), st.sampled_from(["", "", "node"]),
    )  # fmt: skip


class Life(RuleBasedStateMachine):
    """Users and faults at random; the world checks invariants and GPU exclusivity after every tick."""

    @initialize()
    def begin(self) -> None:
        self.serial = 0
        self.world = World(nodes=0, queues=QUEUES, scripts=self.script)
        self.world.boot(POLICY)
        for index in range(3):
            kind = "h100-80gb" if index == 2 else "sim-gpu"
            node = a_gpu_node(f"n{index}", 4, kind, cpus=6, labels=(("rack", f"r{index % 2}"),))
            self.world.engine.put_node(node)
        self.nodes = {f"n{i}": a_gpu_node(f"n{i}", 4, "h100-80gb" if i == 2 else "sim-gpu", cpus=6,
                                          labels=(("rack", f"r{i % 2}"),)) for i in range(3)}  # fmt: skip
        for index in range(6):
            worker = {"command": "w", "gpu": "any:1", "replicas": 3 + index % 3, "cpu": "250m"}
            self.world.submit(a_spec(roles={"worker": worker}))
        self.world.tick()

    def script(self, launch: object) -> Script:
        self.serial += 1
        code = (0, 0, 0, 1, 137, 143)[self.serial % 6]
        return Script(run_ms=200 + 370 * (self.serial % 7), exit_code=code, step_ms=100, save_ms=20 * (self.serial % 2))

    def some(self, pick: int) -> JobId | None:
        live = sorted(self.world.cluster.jobs)
        return live[pick % len(live)] if live else None

    @rule(spec=specs(), held=st.booleans())
    def submit(self, spec: JobSpec, held: bool) -> None:
        self.world.submit(spec, held=held and spec.priority == 2)

    @rule(times=st.integers(1, 5), step=st.sampled_from([1, 50, 400, 3_000]))
    def pass_time(self, times: int, step: int) -> None:
        self.world.tick(times, step)

    @rule(pick=st.integers(0, 50), what=st.sampled_from(WISHES))
    def wish(self, pick: int, what: str) -> None:
        job_id = self.some(pick)
        if job_id is None:
            return
        now = self.world.clock.now_ms()
        job = self.world.job(job_id)
        bounds = {name: job.spec.roles[name].replicas for name in ("worker", "ps") if name in job.spec.roles}
        wanted = {name: each.min + pick % (each.max - each.min + 1) for name, each in bounds.items()}
        if what == "serve" and "ps" not in wanted:
            return
        event: ev.JobEvent = {
            "cancel": ev.JobCancelRequested(now, job_id, "u"),
            "hold": ev.JobHeld(now, job_id, "u"),
            "suspend": ev.JobHeld(now, job_id, "u", stop=True),
            "release": ev.JobReleased(now, job_id, "u"),
            "restart": ev.JobRestartRequested(now, job_id, "u"),
            "scale": ev.JobScaled(now, job_id, "u", {"worker": wanted["worker"]}),
            "serve": ev.JobScaled(now, job_id, "u", {"ps": wanted.get("ps", 0)}),
        }[what]
        self.world.wish(event)

    @rule(step_s=st.sampled_from([0.1, 0.5]), part=st.sampled_from([0.0, 0.1, 0.5, 0.9]), apart=st.booleans())
    def report(self, step_s: float, part: float, apart: bool) -> None:
        """Everybody who trains says how fast it goes, which may make no sense at all."""
        self.serial += 1
        for key in sorted(self.world.engine.alive()):
            job_id, _, role, *_ = key.split("/")
            if role == "worker":
                bound = [r for r in self.world.job(JobId(job_id)).replicas.values() if r.binding is not None]
                metrics = (("asynchronous", float(apart)), ("step_s", step_s), ("sync_s", part * step_s))
                workers = sum(r.role == "worker" for r in bound)
                self.world.engine.tell(key, Progress(self.serial, 1_000, world_size=workers, metrics=metrics))
        self.world.tick(2, 500)

    @rule(pick=st.integers(0, 50), how=st.sampled_from(["kill", "remove", "hang"]))
    def fault(self, pick: int, how: str) -> None:
        alive = sorted(self.world.engine.alive())
        if alive:
            getattr(self.world.engine, how)(alive[pick % len(alive)])

    @rule(name=st.sampled_from(["n0", "n1", "n2"]), lose=st.booleans())
    def node(self, name: str, lose: bool) -> None:
        present = name in self.world.engine._nodes
        if lose and present:
            self.world.engine.lose_node(self.nodes[name].name)
        elif not lose and not present:
            self.world.engine.put_node(self.nodes[name])

    @rule(name=st.sampled_from(["n0", "n1", "n2"]), how=st.sampled_from(["cordon", "drain", "uncordon"]))
    def cordon(self, name: str, how: str) -> None:
        now, node = self.world.clock.now_ms(), self.nodes[name].name
        if how == "uncordon":
            self.world.wish(ev.NodeUncordoned(now, node, "ops"))
        else:
            self.world.wish(ev.NodeCordoned(now, node, "ops", drain=how == "drain"))

    @rule()
    def server_dies(self) -> None:
        self.world.boot()
        self.world.tick()

    @invariant()
    def same_snapshot_same_plan_and_nothing_taken(self) -> None:
        if not hasattr(self, "world"):
            return
        cluster, now = self.world.cluster, self.world.clock.now_ms()
        nominated = {job_id: dict(victims) for job_id, victims in cluster.nominated.items()}
        plans, scratch = [], (dict(cluster.targets), cluster.resize_ms)
        for forgets in ("nothing", "the last look", "all", "all"):
            if forgets != "nothing":
                cluster.looked = None
            for line in cluster.lines.values() if forgets == "all" else ():
                line.blocked_at = line.refused_at = -1
            for job_id in cluster.growing if forgets == "all" else ():
                cluster.growing[job_id] = -1
            cluster.nominated = {job_id: dict(victims) for job_id, victims in nominated.items()}
            plans.append(schedule(cluster, now, POLICY).decisions)
            cluster.targets, cluster.resize_ms = dict(scratch[0]), scratch[1]
        assert plans[0] == plans[1], "a line was left out that was worth a try"
        assert plans[2] == plans[3]
        assert not invariants.check(cluster)

    @invariant()
    def replayed_log_equals_memory_and_projections(self) -> None:
        if not hasattr(self, "world"):
            return
        self.world.controller.tick()
        replayed = Cluster()
        jobs: dict[JobId, Job] = {}
        for stored in self.world.store.read(0, 1_000_000):
            replayed.evolve(stored.event, stored.seq)
            job_id = stored.event.job_id
            if job_id is not None:
                jobs[job_id] = evolve_job(jobs.get(job_id), stored.event)  # type: ignore[arg-type]
        live = self.world.cluster
        assert replayed.jobs == live.jobs
        assert replayed.fleet.nodes == live.fleet.nodes
        assert (replayed.fleet.lost, replayed.fleet.cordoned) == (live.fleet.lost, live.fleet.cordoned)
        assert not invariants.check(replayed)
        assert {n: a.held.get(GPUS, 0) for n, a in replayed.quotas.accounts.items()} == {
            n: a.held.get(GPUS, 0) for n, a in live.quotas.accounts.items()
        }
        for job_id, job in jobs.items():
            assert self.world.store.job(job_id) == job

    @invariant()
    def quota_holds(self) -> None:
        if hasattr(self, "world"):
            assert self.world.cluster.quotas.account("small").held.get(GPUS, 0) <= 3_000

    def teardown(self) -> None:
        """Left alone, with every node back, all that is not held ends."""
        world = self.world
        for name, node in self.nodes.items():
            world.engine.put_node(node)
            world.wish(ev.NodeUncordoned(world.clock.now_ms(), node.name, name))
        for job_id in list(world.cluster.jobs):
            world.wish(ev.JobReleased(world.clock.now_ms(), job_id, "u"))
        world.tick(2)
        for job_id, job in list(world.cluster.jobs.items()):
            if explain.could_ever_fit(world.cluster, job.spec):  # the service would have refused it
                world.wish(ev.JobCancelRequested(world.clock.now_ms(), job_id, "u"))
        world.run_until(lambda: not world.cluster.jobs, limit_ms=24 * 3_600_000)
        world.tick(3)
        assert not world.engine.alive()
        assert all(space.bound == 0 for space in world.cluster.ledger.spaces.values())


TestLife = Life.TestCase
TestLife.settings = QUIET


def test_terminal_jobs_never_change() -> None:
    for phases in LEGAL.values():
        assert not {Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED} & set(phases)


def test_an_event_of_another_attempt_is_refused() -> None:
    job = evolve_job(None, ev.JobSubmitted(1, JobId("a"), "a", "me", a_spec()))
    for event in (ev.AttemptStarted(2, job.id, 0), ev.AttemptPlaced(2, job.id, 2, ())):
        try:
            evolve_job(job, event)
        except Illegal:
            continue
        raise AssertionError(f"{event} was accepted")
