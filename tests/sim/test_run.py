"""The simulator runs the real controller: papers' own figures come out, policies do what their names say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from random import Random

import pytest

from jobsched.core.cluster import Cluster
from jobsched.core.events import EVENT, AttemptPlaced, AttemptStopping, JobSubmitted
from jobsched.core.job import Job, Phase, Reason
from jobsched.core.policies.kinds import where_alike
from jobsched.core.policies.ordering import LEASE_MS
from jobsched.core.policies.preemption import Heads, Turn, first
from jobsched.core.resources import JobId
from jobsched.core.schedule import Policy
from jobsched.sim import traces
from jobsched.sim.run import POLICIES, START_MS, Result, Simulation
from jobsched.sim.throughput import Seats, Steady
from jobsched.sim.workload import RATIOS, Arrival, Rules, Workload, gang_spec, make_nodes, served, synthetic

KEYS = [
    "jobs", "avg_jct_s", "p50_jct_s", "p99_jct_s", "avg_queue_s", "p99_queue_s", "makespan_s", "gpu_allocation_pct",
    "unallocated_gpu_pct", "fragmentation_pct", "preemptions", "rescales", "restarts", "ticks", "cpu_s", "policy",
    "seed",
]  # fmt: skip


def a_workload(*jobs: tuple[float, float, int], nodes: str = "1x4") -> Workload:
    """(arrives, runs, GPUs) per job, in seconds."""
    arrivals = tuple(
        Arrival(round(at * 1_000), JobId(f"{place:03}"), gang_spec(gpus, 4), Steady(run * 1_000))
        for place, (at, run, gpus) in enumerate(jobs)
    )
    return Workload("test", arrivals, make_nodes(nodes))


def run(workload: Workload, policy: str) -> Result:
    return Simulation(workload, POLICIES[policy], policy).run()


def ends(result: Result) -> list[float]:
    """When each job ended, seconds after the start."""
    accounts = result.accounts
    return [(accounts.jobs[j].ended_ms - accounts.start_ms) / 1_000 for j in sorted(accounts.jobs)]


def test_every_policy_finishes_every_job_and_gives_the_promised_keys() -> None:
    workload = synthetic(60, seed=3, nodes="2x8", load=1.5, longest_s=20_000)
    for policy in POLICIES:
        result = run(workload, policy)
        assert result.summary.ended == 60, policy
        assert list(result.row()) == KEYS
        assert {job.phase for job in result.accounts.jobs.values()} == {Phase.SUCCEEDED}


def test_a_free_gpu_is_used_at_once_and_time_is_exact() -> None:
    result = run(a_workload((0, 100, 4), (10, 50, 4), (10, 5, 4)), "fifo")
    assert ends(result) == pytest.approx([100, 150, 155])
    assert result.summary.avg_queue_s == pytest.approx((0 + 90 + 140) / 3, abs=0.01)
    assert result.summary.gpu_allocation_pct == pytest.approx(100, abs=0.01)


def test_shortest_job_first_and_its_preemptive_sibling() -> None:
    jobs = ((0, 100, 4), (10, 50, 4), (20, 5, 4))
    assert ends(run(a_workload(*jobs), "sjf")) == pytest.approx([100, 155, 105])
    assert ends(run(a_workload(*jobs), "srtf")) == pytest.approx([155, 65, 25], abs=0.1)


def test_preemption_keeps_the_work_done_and_the_place_of_those_who_stay() -> None:
    result = run(a_workload((0, 100, 1), (10, 100, 3), (20, 5, 4)), "srsf")
    assert ends(result) == pytest.approx([105, 115, 25], abs=0.1)
    assert result.summary.preemptions == 2
    kept = run(a_workload((0, 100, 1), (10, 300, 3), (20, 5, 3)), "srsf")
    assert kept.accounts.jobs[JobId("000")].attempts == 1


@dataclass(frozen=True, slots=True)
class ByKind:
    """Slower on old GPUs, and apart; told run times are those on new ones."""

    old: float

    def __call__(self, seats: Seats) -> float:
        return min(self.old if kind == "old" else 1.0 for kind, _ in seats) / (1 if len(seats) == 1 else 1.5)


def on_unlike_nodes(seed: int, count: int = 40) -> Workload:
    """A crowd of jobs on few GPUs of two kinds, new ones preferred; being stopped costs half a minute."""
    random, at_s, arrivals = Random(seed), 0.0, []
    for place in range(count):
        at_s += random.expovariate(1 / 100)
        spec = gang_spec(random.choice((1, 1, 2, 4)), 4, kinds="new|old", single=True)
        work = Steady(1_000 * random.randint(50, 3_000), speed=ByKind(random.choice((0.2, 0.5, 0.9))))
        arrivals.append(Arrival(round(1_000 * at_s), JobId(f"{place:03}"), spec, work))
    return Workload("unlike", tuple(arrivals), make_nodes("2x4:new+2x4:old"), rules=Rules(restart_ms=30_000))


def in_turns(result: Result) -> list[JobId]:
    """Who was preempted again although no job came or ended since it last was."""
    found, since = [], set()
    for event in [stored.event for stored in result.store.read(0, 1 << 30)]:
        if isinstance(event, JobSubmitted):
            since.clear()
        elif isinstance(event, AttemptStopping):
            if event.outcome.reason is not Reason.PREEMPTED:
                since.clear()
            elif event.job_id in since:
                found.append(event.job_id)
            else:
                since.add(event.job_id)
    return found


@pytest.mark.parametrize("policy", ["srtf", "srsf", "knapsack", "in-time", "edf-preempting", "kinds", "blind"])
def test_nobody_is_preempted_for_one_that_it_would_preempt_again(policy: str) -> None:
    for seed in range(5):
        simulation = Simulation(on_unlike_nodes(seed), POLICIES[policy], policy)
        for _ in range(2_000):
            if not simulation.step():
                break
        assert (in_turns(simulation.result()), simulation.ended()) == ([], 40), (policy, seed)


def test_least_attained_service_lets_a_newcomer_pass_a_job_that_had_its_share() -> None:
    result = run(a_workload((0, 5_000, 4), (3_000, 100, 4)), "las")
    assert ends(result) == pytest.approx([5_100, 3_100], abs=0.1)


def test_a_turn_that_ends_by_itself_needs_no_other_event() -> None:
    """Four GPUs sink a level after 812.5 seconds; nothing else happens then."""
    result = run(a_workload((0, 5_000, 4), (1, 5_000, 4)), "las")
    placed = [s.event.at_ms for s in result.store.history(JobId("001")) if isinstance(s.event, AttemptPlaced)]
    assert placed[0] - START_MS == pytest.approx(812_500, abs=100)


def test_where_all_gpus_are_alike_kinds_need_not_look_at_everybody() -> None:
    looked: list[int] = []

    def asked(sim: Simulation, heads: Heads | None) -> Policy:
        policy = POLICIES["kinds"](sim)
        assert policy.replan is not None
        how = policy.replan.order

        def order(cluster: Cluster, runnable: Sequence[Job], now_ms: int) -> list[Turn]:
            looked.append(len(runnable))
            return how(cluster, runnable, now_ms)

        return replace(policy, replan=replace(policy.replan, order=order, heads=heads))

    workload = synthetic(120, seed=2, nodes="1x8", load=3.0)
    found = []
    for heads in (where_alike(first), None):
        looked.clear()
        found.append((ends(Simulation(workload, partial(asked, heads=heads)).run()), max(looked)))
    assert found[0][0] == found[1][0]
    assert found[0][1] < found[1][1]


def test_knapsack_fills_the_cluster_where_the_greedy_order_leaves_a_hole() -> None:
    """Three GPUs first by service, then no room for the four; two pairs end more jobs per second."""
    jobs = ((0, 100, 3), (0, 160, 2), (0, 160, 2))
    assert ends(run(a_workload(*jobs), "srsf")) == pytest.approx([100, 260, 260], abs=0.1)
    assert ends(run(a_workload(*jobs), "knapsack")) == pytest.approx([260, 160, 160], abs=0.1)


def test_knapsack_counts_the_gpus_that_its_jobs_may_use() -> None:
    """The same beside a node that takes other jobs only."""
    nodes = tuple(replace(node, labels=(("pool", name),)) for node, name in zip(make_nodes("2x4"), "ab", strict=True))
    arrivals = tuple(
        replace(arrival, spec=gang_spec(arrival.spec.roles["worker"].gpu.milli // 1_000, 4, node_label=("pool", "a")))
        for arrival in a_workload((0, 100, 3), (0, 160, 2), (0, 160, 2)).arrivals
    )
    assert ends(run(Workload("test", arrivals, nodes), "knapsack")) == pytest.approx([260, 160, 160], abs=0.1)


def test_learned_lets_a_newcomer_pass_and_keeps_the_seats_of_who_runs() -> None:
    result = run(a_workload((0, 5_000, 1), (0, 5_000, 3), (3_000, 50, 2)), "learned")
    assert ends(result)[2] == pytest.approx(3_050, abs=0.1)
    assert result.accounts.jobs[JobId("000")].attempts == 1
    assert result.accounts.jobs[JobId("001")].attempts == 2


def test_learned_knows_long_siblings_from_short_ones() -> None:
    """After some long and some short jobs of two sizes, the short kind passes a waiting job of the long kind."""
    taught = [(n * 2_000, 1_500, 4) for n in range(12)] + [(30_000 + n * 2_000, 30, 2) for n in range(12)]
    result = run(a_workload(*taught, (60_000, 600, 4), (60_001, 1_500, 4), (60_002, 30, 2)), "learned")
    assert ends(result)[26] < ends(result)[25]


def test_a_change_in_one_pool_leaves_the_others_alone() -> None:
    """Two pools by label: the same ends as each alone."""
    spec = {name: gang_spec(1, 4, node_label=("pool", name)) for name in "ab"}
    nodes = tuple(
        replace(node, labels=(("pool", "ab"[i]),)) for i, node in enumerate(make_nodes("2x2"))
    )
    arrivals = tuple(
        Arrival(n * 1_000, JobId(f"{n:03}"), spec["ab"[n % 2]], Steady(60_000 * (1 + n % 7))) for n in range(40)
    )
    for policy in ("learned", "srtf", "las"):
        both = run(Workload("both", arrivals, nodes), policy)
        for part in (0, 1):
            alone = run(Workload("one", arrivals[part::2], nodes[part : part + 1]), policy)
            if policy != "learned":  # what one pool teaches helps the other
                assert ends(alone) == ends(both)[part::2], policy
        assert both.summary.ended == 40


def test_backfill_fills_what_a_strict_queue_leaves_idle() -> None:
    """Small jobs have shown how short their kind is; another may run while the whole node is waited for."""
    known = ((0, 20, 1), (30, 20, 1), (60, 20, 1), (90, 20, 1))
    workload = replace(a_workload(*known, (200, 1_000, 3), (201, 50, 4), (202, 20, 1)), rules=Rules(strict=True))
    assert ends(run(workload, "fifo"))[4:] == pytest.approx([1_200, 1_250, 1_270], abs=0.1)
    for policy in ("easy", "conservative"):
        whole_node, small = ends(run(workload, policy))[5:]
        assert whole_node == pytest.approx(1_250, abs=0.1)
        assert small < 400


def test_who_looks_again_from_time_to_time_does_not_pause_anybody() -> None:
    """Muri's rule: jobs stand still for their start cost when something happens; a look at the clock is nothing."""
    jobs = tuple(
        replace(arrival, work=Steady(arrival.work.work_ms, start_ms=10_000))
        for arrival in a_workload((0, 5_000, 3), (1, 1_000, 4), (2, 1_000, 4)).arrivals
        if isinstance(arrival.work, Steady)
    )
    workload = replace(a_workload(), arrivals=jobs, rules=Rules(pause_everyone=True))
    for policy in ("server", "easy", "conservative"):
        assert ends(run(workload, policy)) == pytest.approx(ends(run(workload, "fifo")), abs=0.1), policy


def test_deadlines_first() -> None:
    late, urgent = a_workload((0, 50, 4), (1, 10, 4), (2, 10, 4)).arrivals[1:]
    first = a_workload((0, 50, 4)).arrivals[0]
    workload = replace(
        a_workload(), arrivals=(first, replace(late, deadline_ms=500_000), replace(urgent, deadline_ms=80_000))
    )
    assert ends(run(workload, "edf")) == pytest.approx([50, 70, 60])
    assert ends(run(workload, "edf-preempting")) == pytest.approx([70, 21, 12], abs=0.1)


def test_the_same_seed_gives_the_same_log() -> None:
    def log() -> list[bytes]:
        result = run(synthetic(50, seed=5, nodes="1x8", longest_s=7_200), "las")
        return [EVENT.dump_json(stored.event) for stored in result.store.read(0, 1 << 30)]

    assert log() == log()


def needs(fmt: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(fmt in traces.missing(), reason=f"no traces of {fmt} under {traces.root()}")


@needs("pollux")
def test_pollux_tiresias_equals_the_published_figure() -> None:
    result = run(traces.pollux("workload-1.0_6"), "las")
    assert result.summary.avg_jct_s == pytest.approx(3_469.69, rel=1e-3)


@pytest.mark.parametrize("fmt", list(traces.FORMATS))
def test_every_format_reads_and_runs(fmt: str) -> None:
    if fmt in traces.missing():
        pytest.skip(f"no traces of {fmt} under {traces.root()}")
    reader, first = traces.FORMATS[fmt]
    workload = reader(first, "fifo")
    few = replace(workload, arrivals=workload.arrivals[:30])
    result = run(few, "fifo")
    assert result.summary.ended == 30, result.store.count("phase")
    json.dumps(result.row())


@needs("pollux")
def test_elastic_jobs_share_what_there_is_and_finish_sooner_than_at_their_tuned_sizes() -> None:
    """Half a morning of Pollux's own workload: sizes follow measured goodput, every change of size is a restart."""
    fixed, elastic = (replace(w, arrivals=w.arrivals[:24]) for w in (traces.pollux(), traces.pollux(elastic=True)))
    ours, theirs = run(elastic, "elastic"), run(fixed, "las")
    assert ours.summary.avg_jct_s < theirs.summary.avg_jct_s
    assert 24 < ours.summary.rescales < 24 * 15
    assert ours.summary.preemptions == 0
    assert all(job.phase is Phase.SUCCEEDED for job in ours.accounts.jobs.values())


@needs("pollux")
def test_an_elastic_run_is_the_same_twice() -> None:
    workload = replace(traces.pollux(elastic=True), arrivals=traces.pollux(elastic=True).arrivals[:8])

    def log() -> list[bytes]:
        return [EVENT.dump_json(s.event) for s in run(workload, "elastic").store.read(0, 1 << 30)]

    assert log() == log()


def test_free_numbers_of_workers_and_servers_beat_fixed_ones() -> None:
    """Speeds follow Optimus' formula, which nobody is told; every change of either number costs half a minute."""
    jct = {}
    for ratio in RATIOS:
        result = run(served(15, 1, ratio, nodes=1, median_s=2_400), "elastic")
        assert all(job.phase is Phase.SUCCEEDED for job in result.accounts.jobs.values())
        jct[ratio] = result.summary.avg_jct_s
        assert (result.summary.rescales > 0) is (ratio in ("free", "workers"))
        assert result.summary.rescales < 15 * 12
    assert jct["free"] < 0.9 * min(jct["workers"], jct["1:4"], jct["1:1"]), jct


def test_a_run_with_servers_is_the_same_twice() -> None:
    def log() -> list[bytes]:
        result = run(served(5, nodes=1, median_s=1_800), "elastic")
        return [EVENT.dump_json(s.event) for s in result.store.read(0, 1 << 30)]

    assert log() == log()


def test_finish_time_fairness_keeps_whoever_runs_for_a_lease() -> None:
    """Whom it is fairest to serve changes with every start and end: without leases an overloaded cluster does nothing
    but stop and start (460 jobs on 128 GPUs: 400 ticks a second)."""
    result = run(a_workload(*[(n * 7, 2_000 + 100 * n, (1, 2, 4, 3)[n % 4]) for n in range(12)]), "themis")
    assert result.summary.preemptions > 0
    cut_short = [until - since for job in result.accounts.jobs.values() for since, until, _ in job.spells[:-1]]
    assert min(cut_short) >= LEASE_MS
