"""Quotas, fair turns and making room, seen through the real controller on the simulated engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import log

import pytest

from jobsched.core import events as ev
from jobsched.core.explain import verdict
from jobsched.core.job import Binding, Job, Phase, Reason, RoleShape
from jobsched.core.launch import Launch
from jobsched.core.ledger import Ledger
from jobsched.core.passes import Policy
from jobsched.core.policies.fairness import FairShare
from jobsched.core.policies.ordering import Factors
from jobsched.core.policies.victims import Candidates, Preemption, Scope
from jobsched.core.rehearsal import picture_of
from jobsched.core.resources import JobId
from jobsched.core.story import story
from jobsched.sim.backend import Script
from jobsched.spec.queue import GPUS, QueueSpec
from tests.world import World, a_spec

LONG = 3_600_000


def a_queue(name: str, gpus: int, cohort: str = "lab", **more: object) -> QueueSpec:
    return QueueSpec.model_validate({"name": name, "cohort": cohort, "quota": {"gpus": gpus}, **more})


def a_world(
    *queues: QueueSpec,
    nodes: int = 1,
    gpus: int = 8,
    scripts: Callable[[Launch], Script] | None = None,
    how: Preemption | None = Preemption(min_runtime_ms=0),  # noqa: B008
) -> World:
    world = World(nodes, gpus, scripts or (lambda launch: Script(run_ms=LONG)), queues=queues)
    world.boot(Policy(fair=FairShare(), preemption=how))
    return world


def gang(replicas: object = 1, gpus: int = 1, **fields: object) -> Mapping[str, object]:
    worker = {"command": "w", "gpu": f"any:{gpus}", "replicas": replicas, "cpu": "100m"}
    return {"roles": {"worker": worker}, **fields}


def submit(world: World, queue: str, count: int = 1, **fields: object) -> list[JobId]:
    given = {**gang(), **fields, "queue": queue}
    return [world.submit(a_spec(**given)) for _ in range(count)]


def running(world: World, queue: str) -> list[Job]:
    return [j for j in world.cluster.jobs.values() if j.spec.queue == queue and j.phase is Phase.RUNNING]


def held(world: World, queue: str) -> int:
    return world.cluster.quotas.account(queue).held.get(GPUS, 0) // 1_000


def stops(world: World) -> list[ev.AttemptStopping]:
    return [s.event for s in world.store.read(0, 100_000) if isinstance(s.event, ev.AttemptStopping)]


def test_a_queue_borrows_what_its_cohort_does_not_use_and_no_more() -> None:
    none = {"lending_limit": {"gpus": 0}}
    world = a_world(a_queue("a", 2), a_queue("b", 4, borrowing_limit={"gpus": 1}), a_queue("c", 2, **none))
    submit(world, "b", 8)
    world.tick(5)
    assert held(world, "b") == 5
    submit(world, "a", 8)
    world.tick(5)
    assert (held(world, "a"), held(world, "b")) == (2, 4)  # a takes back one of its two; the rest of b's is b's own
    submit(world, "c", 8)
    world.tick(5)
    assert held(world, "c") == 2


def test_quota_of_one_kind_sends_a_job_to_another() -> None:
    from tests.world import a_gpu_node

    queue = QueueSpec.model_validate({"name": "a", "quota": {"h100": 1, "gpus": 8}})
    world = World(nodes=0, queues=(queue,), scripts=lambda launch: Script(run_ms=LONG))
    for name, kind in (("n1", "h100-80gb"), ("n2", "a100-40gb")):
        world.engine.put_node(a_gpu_node(name, 4, kind))
    worker = {"command": "w", "gpu": ["h100:1", "a100:1"], "cpu": 1}
    for _ in range(4):
        world.submit(a_spec(queue="a", roles={"worker": worker}))
    world.tick(4)
    account = world.cluster.quotas.account("a")
    assert (account.held["h100-80gb"], account.held["a100-40gb"]) == (1_000, 3_000)


def test_an_owner_takes_back_what_it_lent_and_the_victims_come_back_later() -> None:
    world = a_world(a_queue("a", 4), a_queue("b", 4))
    submit(world, "b", 8)
    world.tick(5)
    assert held(world, "b") == 8
    mine = submit(world, "a", 3)
    world.tick(6)
    assert all(world.job(j).phase is Phase.RUNNING for j in mine)
    assert (held(world, "a"), held(world, "b")) == (3, 5)
    assert [s.outcome.reason for s in stops(world)] == [Reason.PREEMPTED] * 3
    assert {s.outcome.for_job for s in stops(world)} == set(mine)
    seq = world.store.last_seq()
    world.tick(20, step_ms=1_000)
    assert world.store.last_seq() == seq, "nobody takes from the other in turn"


def test_the_latest_and_cheapest_borrower_leaves_first() -> None:
    world = a_world(a_queue("a", 4), a_queue("b", 4))
    old = submit(world, "b", 7)
    world.tick(3, step_ms=100_000)
    young = submit(world, "b", 1)
    world.tick(3, step_ms=1_000)
    submit(world, "a", 1)
    world.tick(5)
    assert [s.job_id for s in stops(world)] == young
    assert old


def test_priority_takes_from_lower_in_the_same_queue_only_what_it_needs() -> None:
    world = a_world(QueueSpec(), nodes=2, gpus=4)
    low = submit(world, "default", 8)
    world.tick(4)
    urgent = submit(world, "default", 1, **gang(1, 3, priority=10))
    world.tick(6)
    assert world.job(urgent[0]).phase is Phase.RUNNING
    assert len(stops(world)) == 3
    nodes = {b.node for r in world.job(urgent[0]).replicas.values() if (b := r.binding)}
    assert len(nodes) == 1
    assert sum(world.job(j).phase is Phase.RUNNING for j in low) == 5


def test_equal_priority_takes_nothing_and_off_means_off() -> None:
    for how, priority in ((Preemption(min_runtime_ms=0), 0), (Preemption(False, Scope.OFF, 0), 9), (None, 9)):
        world = a_world(QueueSpec(), how=how)
        submit(world, "default", 8)
        world.tick(3)
        submit(world, "default", 1, priority=priority)
        world.tick(5)
        assert not stops(world)


def test_who_stops_leaves_with_all_it_has() -> None:
    """The first job needs less than the elastic one holds, but not less than its minimum leaves it: the rest of what
    becomes free is the next one's, who asks nobody else."""
    world = a_world(QueueSpec(), gpus=3)
    worker = {"command": "w", "gpu": "any:1", "cpu": "100m", "restart": {"scope": "replica"},
              "replicas": {"min": 2, "max": 3, "prefer": 3}}  # fmt: skip
    elastic = world.submit(a_spec(roles={"worker": worker}))
    world.tick(4)
    urgent = [*submit(world, "default", 1, **gang(1, 2, priority=9)), *submit(world, "default", 1, priority=8)]
    world.tick(6)
    assert [s.job_id for s in stops(world)] == [elastic]
    assert not [s for s in world.store.read(0, 100_000) if isinstance(s.event, ev.ReplicasReleased)]
    assert all(world.job(j).phase is Phase.RUNNING for j in urgent)


def test_elastic_jobs_shrink_before_anybody_stops_and_grow_back() -> None:
    world = a_world(QueueSpec())
    worker = {"command": "w", "gpu": "any:1", "cpu": "100m", "restart": {"scope": "replica"},
              "replicas": {"min": 2, "max": 6, "prefer": 6}}  # fmt: skip
    elastic = world.submit(a_spec(roles={"worker": worker}))
    fixed = submit(world, "default", 2)
    world.tick(4)
    urgent = submit(world, "default", 1, **gang(3, 1, priority=5))
    world.run_to_phase(urgent[0], Phase.RUNNING)
    assert not stops(world)
    told = "\n".join(story(world.store.history(elastic)))
    assert f"(Preempted; job {urgent[0]} of queue default goes first: its priority is 5, this job's 0)" in told
    assert sum(r.binding is not None for r in world.job(elastic).replicas.values()) == 3
    assert world.job(fixed[0]).phase is Phase.RUNNING
    world.wish(ev.JobCancelRequested(world.clock.now_ms(), urgent[0], "me"))
    world.tick(6)
    assert sum(r.binding is not None for r in world.job(elastic).replicas.values()) == 6


def test_who_has_shown_to_restart_fast_stops_before_its_like() -> None:
    """Nothing shown, it would be the first."""
    world = a_world(a_queue("a", 8))
    elastic = gang({"min": 4, "max": 5, "prefer": 4}, restart={"scope": "job"})
    slow, fast = submit(world, "a", 2, **elastic)
    world.tick(3)
    for job_id, took_ms in ((fast, 1_000), (slow, 90_000)):
        for _ in range(8):
            world.cluster.pauses.note(world.job(job_id), False, took_ms)
    planned = picture_of(world.cluster).cluster()
    assert planned.pauses == world.cluster.pauses
    submit(world, "a", priority=5, **gang(gpus=4))
    world.tick(3)
    assert [stop.job_id for stop in stops(world)] == [fast]


def test_places_are_kept_while_victims_save() -> None:
    def script(launch: Launch) -> Script:
        return Script(run_ms=LONG, save_ms=20_000)

    world = a_world(a_queue("a", 4, weight=1), a_queue("b", 4), a_queue("c", 0, weight=1000), scripts=script)
    submit(world, "b", 8)
    world.tick(4)
    mine = submit(world, "a", 1, **gang(1, 4))
    world.tick(2)
    assert len(stops(world)) == 4
    rivals = submit(world, "c", 8)  # of a queue with a smaller share per weight
    world.tick(3, step_ms=5_000)
    assert len(stops(world)) == 4, "who waits for victims makes no further ones"
    world.run_to_phase(mine[0], Phase.RUNNING)
    assert not any(world.job(j).attempt for j in rivals)


def test_a_server_that_dies_meanwhile_remembers_for_whom_room_is_made() -> None:
    world = a_world(a_queue("a", 4), a_queue("b", 4), scripts=lambda launch: Script(run_ms=LONG, save_ms=20_000))
    submit(world, "b", 8)
    world.tick(4)
    mine = submit(world, "a", 1, **gang(1, 4))
    world.tick(2)
    world.boot(Policy(fair=FairShare(), preemption=Preemption(min_runtime_ms=0)))
    world.run_to_phase(mine[0], Phase.RUNNING)
    assert len(stops(world)) == 4


def test_nobody_stops_before_its_minimum_run_time() -> None:
    world = a_world(a_queue("a", 4), a_queue("b", 4), how=Preemption(min_runtime_ms=60_000))
    submit(world, "b", 8)
    world.tick(3)
    mine = submit(world, "a", 1)
    world.tick(3)
    assert not stops(world)
    said = verdict(world.cluster, world.job(mine[0]), world.clock.now_ms()).reasons[-1].message
    assert said.startswith("who might make room for it has only just started; nobody is asked to before ")
    world.run_to_phase(mine[0], Phase.RUNNING)
    assert 60_000 <= stops(world)[0].at_ms - world.job(stops(world)[0].job_id).submitted_at_ms <= 61_000


def test_what_preemption_may_cost_a_job_is_bounded_but_not_for_an_owner() -> None:
    how = Preemption(min_runtime_ms=0, lost_free_ms=0, lost_pct=10)
    world = a_world(a_queue("a", 4), a_queue("b", 4), how=how)
    victim = submit(world, "b", 1, **gang(1, 8))[0]
    world.tick(3, step_ms=50_000)
    submit(world, "b", 1, **gang(1, 8, priority=1))
    world.tick(4)
    assert world.job(victim).lost_ms >= 100_000
    first = next(j for j in world.cluster.jobs.values() if j.priority == 1)
    world.wish(ev.JobCancelRequested(world.clock.now_ms(), first.id, "me"))
    world.run_to_phase(victim, Phase.RUNNING)
    world.tick(2, step_ms=50_000)
    submit(world, "b", 1, **gang(1, 8, priority=1))
    world.tick(4)
    assert world.job(victim).phase is Phase.RUNNING, "it has lost its share already"
    submit(world, "a", 1)
    world.tick(4)
    assert world.job(victim).phase is Phase.QUEUED


def test_queues_take_turns_by_share_and_weight() -> None:
    world = a_world(QueueSpec(name="a", weight=3), QueueSpec(name="b", weight=1), how=None)
    submit(world, "a", 20)
    submit(world, "b", 20)
    world.tick(3)
    assert (held(world, "a"), held(world, "b")) == (6, 2)


def test_past_use_counts_and_fades_and_a_burst_pays_at_once() -> None:
    world = a_world(QueueSpec(name="a"), QueueSpec(name="b"), how=None, gpus=4,
                    scripts=lambda launch: Script(run_ms=3 * 3_600_000))  # fmt: skip
    world.boot(Policy(fair=FairShare(half_life_ms=3_600_000, entry_ms=60_000)))
    world.tick()
    submit(world, "a", 4)
    world.tick(2)
    entry = 4_000 * 60_000 * log(2) / 3_600_000
    account = world.cluster.quotas.account("a")
    assert account.average(GPUS, world.clock.now_ms(), 3_600_000) == pytest.approx(entry, rel=0.01)
    world.run_until(lambda: world.phases().get("SUCCEEDED", 0) == 4, 4 * 3_600_000)
    submit(world, "a", 4)
    submit(world, "b", 8)
    world.tick(4)
    assert held(world, "b") == 4, "b has used nothing yet"
    early = account.average(GPUS, world.clock.now_ms(), 3_600_000)
    assert early == pytest.approx(4_000 * 7 / 8 + entry / 8, rel=0.01)
    later = account.average(GPUS, world.clock.now_ms() + 3_600_000, 3_600_000)
    assert later == pytest.approx(early / 2, rel=0.01)


def test_factors_weigh_age_priority_size_and_fair_share() -> None:
    world = a_world(QueueSpec(name="a"), QueueSpec(name="b"), how=None, gpus=1,
                    scripts=lambda launch: Script(run_ms=1_000))  # fmt: skip

    def first(factors: Factors) -> JobId:
        world.boot(Policy(factors=factors))
        filler = submit(world, "a", 1)
        world.tick(2)
        old = submit(world, "a", 1)
        world.tick(2, step_ms=100)
        jobs = [*old, *submit(world, "b", 1), *submit(world, "a", 1, priority=1)]
        world.run_until(lambda: any(world.job(j).attempt for j in jobs))
        chosen = next(j for j in jobs if world.job(j).attempt)
        world.run_until(lambda: all(world.job(j).phase.terminal for j in (*filler, *jobs)))
        return JobId(("old", "b", "prior")[jobs.index(chosen)])

    day = 86_400_000
    assert first(Factors(priority=1, age=0, size=0, fair=0)) == "prior"
    assert first(Factors(priority=0, age=1_000, size=0, fair=0, age_full_ms=day)) == "old"


def test_the_fair_factor_prefers_who_holds_less() -> None:
    def script(launch: Launch) -> Script:
        return Script(run_ms=1_000 if launch.job_name == "filler" else LONG)

    for fair, winner in ((1_000, "b"), (0, "a")):
        world = a_world(QueueSpec(name="a"), QueueSpec(name="b"), how=None, gpus=2, scripts=script)
        world.boot(Policy(factors=Factors(0, 1, 0, fair)))
        submit(world, "a", 1)
        submit(world, "b", 1, name="filler")
        world.tick(3)
        a, b = submit(world, "a", 1)[0], submit(world, "b", 1)[0]
        world.tick(30, step_ms=100)
        assert [bool(world.job(j).attempt) for j in (a, b)] == [winner == "a", winner == "b"]


def test_a_cohort_does_not_gain_by_having_many_queues() -> None:
    many = [QueueSpec(name=f"m{i}", cohort="many") for i in range(3)]
    world = a_world(*many, QueueSpec(name="one"), how=None)
    for queue in (*many, QueueSpec(name="one")):
        submit(world, queue.name, 8)
    world.tick(3)
    assert held(world, "one") == 4
    assert sorted(held(world, q.name) for q in many) == [1, 1, 2]


def test_limit_per_user_and_paused_and_budget() -> None:
    hour = {"gpu_hours": 2, "window": "1h"}
    world = a_world(QueueSpec.model_validate({"name": "a", "max_gpus_per_user": 2}),
                    QueueSpec.model_validate({"name": "b", "budget": hour}),
                    scripts=lambda launch: Script(run_ms=40 * 60_000))  # fmt: skip
    submit(world, "a", 4)
    world.tick(3)
    assert held(world, "a") == 2
    spec = a_spec(**gang(), queue="a")
    world.store.append([ev.JobSubmitted(world.clock.now_ms(), JobId("other"), "other", "you", spec)])
    world.tick(3)
    assert held(world, "a") == 3, "another user's job is not held up"
    world.run_until(lambda: world.clock.now_ms() % 3_600_000 < 60_000)
    submit(world, "b", 4)
    world.tick(3)
    assert held(world, "b") == 4, "nothing is spent yet"
    world.run_until(lambda: world.clock.now_ms() % 3_600_000 > 50 * 60_000)
    late = submit(world, "b", 2)
    world.tick(3)
    assert not any(world.job(j).attempt for j in late), "2.67 of 2 GPU-hours are spent"
    start = world.clock.now_ms()
    world.run_to_phase(late[0], Phase.RUNNING)
    assert world.clock.now_ms() // 3_600_000 > start // 3_600_000


def test_a_pass_costs_what_it_decides_not_lines_times_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of many shapes look for room among twice as many that run: what leaves is lent about once for all of them,
    and each candidate is looked at once."""

    def cost(nodes: int) -> tuple[int, int]:
        world = a_world(QueueSpec(), nodes=nodes)
        low = submit(world, "default", 8 * nodes)
        world.tick(4)
        assert all(world.job(j).phase is Phase.RUNNING for j in low)
        counts = {"lent": 0, "looked at": 0}
        lend, affords = Ledger.lend, Candidates._affords

        def counting(ledger: Ledger, binding: Binding, role: RoleShape) -> None:
            counts["lent"] += 1
            lend(ledger, binding, role)

        def looking(candidates: Candidates, job: Job, lost_ms: int) -> bool:
            counts["looked at"] += 1
            return affords(candidates, job, lost_ms)

        for cpus in range(20):
            worker = {"command": "w", "gpu": "any:1", "cpu": f"{101 + cpus}m"}
            submit(world, "default", 1, roles={"worker": worker}, priority=1)
        with monkeypatch.context() as patched:
            patched.setattr(Ledger, "lend", counting)
            patched.setattr(Candidates, "_affords", looking)
            world.tick()
        assert len(stops(world)) == 20
        return counts["lent"], counts["looked at"]

    lent, looked = cost(8)
    assert lent < 2 * 20
    assert looked < 2 * 64
    assert cost(32)[0] < 1.5 * lent, "four times as many run"


def placed(job: Job) -> list[Binding]:
    return [r.binding for r in job.replicas.values() if r.binding is not None]


RIGID = {"min": 2, "max": 4, "prefer": 4}


def a_gang_of_range(replicas: object = RIGID, **fields: object) -> Mapping[str, object]:
    return gang(replicas, restart={"scope": "job"}, **fields)


def test_who_can_only_shrink_by_a_new_attempt_does_and_goes_on_at_once() -> None:
    """A rigid job beside it, younger, so cheaper, is left alone."""
    world = a_world(QueueSpec(), scripts=lambda launch: Script(run_ms=LONG, save_ms=5_000))
    (elastic,) = submit(world, "default", **a_gang_of_range())
    world.tick(3, step_ms=30_000)
    fixed = submit(world, "default", 4)
    world.tick(4)
    before = placed(world.job(elastic))
    (urgent,) = submit(world, "default", **gang(1, priority=5))
    world.run_to_phase(urgent, Phase.RUNNING)
    world.run_to_phase(elastic, Phase.RUNNING)
    assert all(world.job(j).attempt == 1 and world.job(j).phase is Phase.RUNNING for j in fixed)
    (stop,) = stops(world)
    assert (stop.job_id, stop.outcome.reason, stop.outcome.for_job) == (elastic, Reason.RESCALED, urgent)
    assert placed(world.job(elastic)) == before[:3], "as many as need be leave, the others come back where they were"
    assert world.job(elastic).attempt == 2
    told = "\n".join(story(world.store.history(elastic)))
    assert "shrinks from 4 to 3 workers to make room; " in told
    assert f"job {urgent} of queue default goes first: its priority is 5, this job's 0" in told
    assert not world.cluster.targets
    assert not world.cluster.nominated


def test_two_that_come_together_take_from_one_job_by_one_restart() -> None:
    world = a_world(QueueSpec(), scripts=lambda launch: Script(run_ms=LONG, save_ms=5_000))
    (elastic,) = submit(world, "default", **a_gang_of_range())
    world.tick(3, step_ms=30_000)
    fixed = submit(world, "default", 4)
    world.tick(4)
    urgent = submit(world, "default", 2, **gang(1, priority=5))
    world.tick(2)
    assert world.cluster.nominated.keys() == {*urgent, elastic}
    assert world.cluster.leaving == {elastic: tuple(urgent)}
    world.run_until(lambda: all(world.job(job_id).phase is Phase.RUNNING for job_id in (*urgent, elastic)))
    (stop,) = stops(world)
    assert (stop.job_id, stop.outcome.reason) == (elastic, Reason.RESCALED)
    assert (stop.outcome.for_job, *stop.outcome.also_for) == tuple(urgent)
    assert len(placed(world.job(elastic))) == 2
    assert all(world.job(j).attempt == 1 and world.job(j).phase is Phase.RUNNING for j in fixed)
    told = "\n".join(story(world.store.history(elastic)))
    assert "shrinks from 4 to 2 workers to make room; " in told
    assert all(f"job {job_id} of queue default goes first" in told for job_id in urgent)
    assert not world.cluster.nominated


def test_nobody_sits_down_where_it_will_go_on_and_its_minimum_is_its_own() -> None:
    """An elastic claimant, which would take more than its minimum, and a job that waits longer, get no place of its."""
    world = a_world(QueueSpec(), gpus=4, scripts=lambda launch: Script(run_ms=LONG, save_ms=20_000))
    (elastic,) = submit(world, "default", **a_gang_of_range())
    world.tick(3)
    (urgent,) = submit(world, "default", **a_gang_of_range({"min": 1, "max": 4, "prefer": 4}, priority=5))
    world.tick(2)
    (waits,) = submit(world, "default", priority=3)
    world.run_to_phase(urgent, Phase.RUNNING)
    assert len(placed(world.job(urgent))) == 1
    assert len(placed(world.job(elastic))) == 3, "it starts in the same pass"
    assert world.job(waits).phase is Phase.QUEUED
    world.run_to_phase(waits, Phase.RUNNING)
    assert len(placed(world.job(elastic))) == 2, "it may be made to give one more, and did"
    assert [s.outcome.reason for s in stops(world)] == [Reason.RESCALED] * 2


def test_who_takes_more_than_the_surplus_stops_the_whole_and_restarts_are_for_lower_priorities_alone() -> None:
    for gpus, priority, reasons in ((3, 5, [Reason.PREEMPTED]), (2, 5, [Reason.RESCALED]), (2, 0, [])):
        world = a_world(QueueSpec(), gpus=4)
        (elastic,) = submit(world, "default", **a_gang_of_range())
        world.tick(3)
        submit(world, "default", **gang(1, gpus, priority=priority))
        world.tick(8)
        assert [s.outcome.reason for s in stops(world)] == reasons
        assert world.job(elastic).phase is (Phase.QUEUED if gpus == 3 else Phase.RUNNING)


def test_it_shrinks_no_sooner_than_it_might_be_stopped() -> None:
    world = a_world(QueueSpec(), gpus=4, how=Preemption(min_runtime_ms=60_000))
    (elastic,) = submit(world, "default", **a_gang_of_range())
    world.tick(3)
    started = world.job(elastic).attempt_started_at_ms
    (urgent,) = submit(world, "default", **gang(1, 2, priority=5))
    world.tick(20, step_ms=1_000)
    assert not stops(world)
    world.run_to_phase(urgent, Phase.RUNNING)
    assert [s.outcome.reason for s in stops(world)] == [Reason.RESCALED]
    assert stops(world)[0].at_ms >= started + 60_000


def test_a_queue_takes_back_what_it_lent_by_a_restart_that_leaves_the_rest() -> None:
    world = a_world(a_queue("a", 4), a_queue("b", 4))
    (elastic,) = submit(world, "b", **a_gang_of_range({"min": 2, "max": 8, "prefer": 8}, priority=9))
    world.tick(3)
    mine = submit(world, "a", 3)
    world.tick(8)
    assert all(world.job(j).phase is Phase.RUNNING for j in mine)
    assert (held(world, "a"), held(world, "b")) == (3, 5)
    assert {s.outcome.reason for s in stops(world)} == {Reason.RESCALED}
    assert world.job(elastic).phase is Phase.RUNNING


def test_servers_of_a_parameter_server_job_stay_and_workers_leave_with_the_attempt() -> None:
    world = a_world(QueueSpec(), gpus=4)
    worker = {"command": "w", "gpu": "any:1", "cpu": "100m", "replicas": RIGID, "restart": {"scope": "job"}}
    job_id = world.submit(a_spec(roles={"ps": {"command": "p", "cpu": "100m", "replicas": 2}, "worker": worker}))
    world.tick(3)
    assert len(placed(world.job(job_id))) == 6
    (urgent,) = submit(world, "default", **gang(1, 2, priority=5))
    world.tick(8)
    assert world.job(urgent).phase is Phase.RUNNING
    roles = sorted(binding.id for binding in placed(world.job(job_id)))
    assert roles == ["ps/0", "ps/1", "worker/0", "worker/1"]


def test_a_server_that_dies_while_one_shrinks_still_makes_the_room() -> None:
    """Its places are forgotten, not the room."""
    world = a_world(QueueSpec(), gpus=4, scripts=lambda launch: Script(run_ms=LONG, save_ms=20_000))
    (elastic,) = submit(world, "default", **a_gang_of_range())
    world.tick(3)
    (urgent,) = submit(world, "default", **gang(1, 2, priority=5))
    world.tick(2)
    world.boot(Policy(fair=FairShare(), preemption=Preemption(min_runtime_ms=0)))
    world.run_to_phase(urgent, Phase.RUNNING)
    world.run_to_phase(elastic, Phase.RUNNING)
    assert len(placed(world.job(elastic))) == 2
    assert len(stops(world)) == 1


def test_workers_that_could_leave_in_place_leave_with_the_attempt_where_servers_do() -> None:
    """Servers have to go in any case: one stop, and no release beside it."""
    world = a_world(QueueSpec(), gpus=4)
    worker = {"command": "w", "gpu": "any:1", "cpu": "1", "replicas": RIGID, "restart": {"scope": "replica"}}
    server = {"command": "p", "cpu": "1", "replicas": {"min": 1, "max": 3, "prefer": 3}}
    job_id = world.submit(a_spec(roles={"ps": server, "worker": worker}))
    world.tick(3)
    assert len(placed(world.job(job_id))) == 7
    free = next(iter(world.cluster.ledger.spaces.values())).cpu_milli // 1_000
    needs = {"roles": {"worker": {"command": "w", "cpu": free + 4}}, "priority": 5}
    (urgent,) = submit(world, "default", **needs)
    world.tick(8)
    assert world.job(urgent).phase is Phase.RUNNING
    assert sorted(binding.id for binding in placed(world.job(job_id))) == ["ps/0", "worker/0", "worker/1"]
    (stop,) = stops(world)
    assert stop.outcome.cause is not None
    assert stop.outcome.cause.message.startswith("shrinks from 3 to 1 ps and from 4 to 2 workers to make room; ")
    assert not [s for s in world.store.read(0, 100_000) if isinstance(s.event, ev.ReplicasReleased)]


def test_who_starts_anew_fast_shrinks_before_its_like_and_costs_less_than_if_it_stopped() -> None:
    """Nothing shown, the younger would be the first."""
    world = a_world(QueueSpec())
    slow, fast = submit(world, "default", 2, **a_gang_of_range())
    world.tick(3)
    for job_id, took_ms in ((fast, 1_000), (slow, 90_000)):
        for _ in range(8):
            world.cluster.pauses.note(world.job(job_id), False, took_ms)
    (urgent,) = submit(world, "default", priority=5)
    now_ms = world.clock.now_ms()
    world.controller.tick()
    offers = Candidates(world.cluster, Preemption(min_runtime_ms=0), now_ms, {}, {}).offers(world.job(urgent))
    whole = {victim.job.id: victim.cost for victim in offers.stops}
    assert offers.shrinks
    assert all(victim.anew for victim in offers.shrinks)
    assert all(victim.cost < whole[victim.job.id] for victim in offers.shrinks)
    world.tick(5)
    assert [stop.job_id for stop in stops(world)] == [fast]
