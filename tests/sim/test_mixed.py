"""Workloads of every sort, and what a simulated job makes of replicas that come while it runs."""

from __future__ import annotations

from jobsched.core import events as ev
from jobsched.core.resources import JobId
from jobsched.core.shape import sized_roles
from jobsched.sim.mixed import LENDER, URGENT, mixed
from jobsched.sim.run import POLICIES, Simulation
from jobsched.sim.throughput import Served, Steady
from jobsched.sim.workload import Arrival, Rules, Workload, make_nodes
from jobsched.spec.job import JobSpec, resizes_in_place
from jobsched.spec.server import PolicyConfig
from jobsched.wiring import _policy


def test_the_same_seed_makes_the_same_jobs_and_there_are_all_sorts() -> None:
    workload = mixed(200, 3)
    assert workload == mixed(200, 3)
    specs = [arrival.spec for arrival in workload.arrivals]
    roles = [role for spec in specs for role in spec.roles.values()]
    elastic = [(spec, name) for spec in specs if (name := sized_roles(spec)[0])]
    assert {resizes_in_place(spec, name) for spec, name in elastic} == {True, False}
    assert any("ps" in spec.roles for spec, _ in elastic)
    assert any(role.gpu is not None and role.gpu.milli < 1_000 for role in roles)
    assert {spec.priority for spec in specs} == {0, URGENT}
    assert any(spec.queue == LENDER for spec in specs)
    assert workload.pools


def test_the_servers_policy_is_what_a_server_does_by_default() -> None:
    simulation = Simulation(Workload("none", (), make_nodes("1x1")), POLICIES["server"], "server")
    assert simulation.policy == _policy(PolicyConfig(), ())


def test_a_job_that_grows_in_place_ends_sooner() -> None:
    """Alone on a node, it may have four replicas once another job has ended, but only starts with two."""
    worker = {"command": "w", "gpu": "any:1", "replicas": {"min": 2, "max": 4, "prefer": 4},
              "restart": {"scope": "replica"}}  # fmt: skip
    never = {"start_timeout": 0, "heartbeat_timeout": 0}
    spec = JobSpec.model_validate({"roles": {"worker": worker}, **never})
    other = JobSpec.model_validate({"roles": {"worker": {"command": "o", "gpu": "any:2"}}, **never})
    arrivals = (
        Arrival(0, JobId("other"), other, Steady(600_000)),
        Arrival(1_000, JobId("grows"), spec, Served(8_000, (1.0, 0.0, 0.0, 0.0, 0.0), start_ms=0)),
    )
    workload = Workload("grows", arrivals, make_nodes("1x4"), rules=Rules(report_every_ms=30_000))
    simulation = Simulation(workload, POLICIES["server"], "server")
    result = simulation.run()
    events = [stored.event for stored in simulation.store.history(JobId("grows"))]
    assert [len(e.bindings) for e in events if isinstance(e, ev.AttemptPlaced | ev.ReplicasBound)] == [2, 2]
    account = result.accounts.jobs[JobId("grows")]
    assert abs(account.jct_ms - (600_000 + 6_800_000 // 4)) <= 31_000, "two a second for 599 s, then four"
