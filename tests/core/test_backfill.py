"""Reservations: a big gang never starves, backfill never delays whom it passes."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from jobsched.core.policies.backfill import RESERVATIONS
from jobsched.core.resources import JobId
from jobsched.sim.run import POLICIES, START_MS, Simulation
from jobsched.sim.throughput import Steady
from jobsched.sim.workload import Arrival, Workload, make_nodes, synthetic
from jobsched.spec.job import JobSpec
from jobsched.spec.queue import QueueSpec


def an_arrival(place: int, at_s: float, run_s: int, gpus: int, per_node: int = 4) -> Arrival:
    """Its time limit is its run time and a second; each is a family of its own, so the limit is what is known."""
    whole, rest = divmod(gpus, per_node)
    count, size = (whole, per_node) if whole and not rest else (1, gpus)
    spec = JobSpec.model_validate({
        "roles": {"worker": {"command": f"job{place}", "cpu": "1m", "replicas": count, "gpu": f"any:{size}"}},
        "time_limit": f"{run_s + 1}s", "start_timeout": 0, "checkpoint": {"grace": 0},
    })  # fmt: skip
    return Arrival(round(at_s * 1_000), JobId(f"{place:04}"), spec, Steady(run_s * 1_000), owner=f"u{place}")


def play(workload: Workload, policy: str) -> tuple[Simulation, dict[JobId, int]]:
    """To the end; and each reservation's instant when it was first made."""
    simulation = Simulation(workload, POLICIES[policy], policy)
    promised: dict[JobId, int] = {}
    going = True
    while going:
        going = simulation.step()
        with simulation.controller.view() as (cluster, _):
            for job_id, claim in cluster.reservations.items():
                promised.setdefault(job_id, claim.at_ms)
    return simulation, promised


def started_ms(simulation: Simulation) -> dict[JobId, int]:
    return {job_id: job.first_placed_ms for job_id, job in simulation.result().accounts.jobs.items()}


def test_a_big_gang_starts_at_its_reservation_although_small_jobs_keep_coming() -> None:
    small = [an_arrival(n, n * 25, 100, 1) for n in range(100)]  # always four of them on four GPUs
    big = an_arrival(500, 210, 100, 4)
    workload = Workload("stream", tuple(sorted([*small, big], key=lambda a: a.at_ms)), make_nodes("1x4"))
    greedy, _ = play(replace(workload, arrivals=tuple(workload.arrivals)), "fifo")
    fair, promised = play(workload, "easy")
    waited_s = [(started_ms(each)[big.job_id] - START_MS) / 1_000 - 210 for each in (greedy, fair)]
    assert waited_s[1] <= 101
    assert waited_s[0] > 1_000
    assert started_ms(fair)[big.job_id] <= promised[big.job_id]


def test_there_are_only_so_many_reservations_in_the_whole_cluster() -> None:
    """On twenty kinds of GPUs, of each one node, a gang waits for another."""
    kinds = [f"k{n:02}" for n in range(20)]
    arrivals = []
    for place, kind in enumerate(2 * kinds):
        arrival = an_arrival(place, place, 1_000, 4)
        worker = {**arrival.spec.roles["worker"].model_dump(mode="json", exclude_unset=True), "gpu": f"{kind}:4"}
        spec = JobSpec.model_validate({**arrival.spec.model_dump(mode="json", exclude_unset=True), "roles": {
            "worker": worker}})  # fmt: skip
        arrivals.append(replace(arrival, spec=spec))
    workload = Workload("kinds", tuple(arrivals), make_nodes("+".join(f"1x4:{kind}" for kind in kinds)))
    simulation, most = Simulation(workload, POLICIES["easy"], "easy"), 0
    while simulation.step():
        with simulation.controller.view() as (cluster, _):
            most = max(most, len(cluster.reservations))
    assert most == RESERVATIONS
    assert simulation.ended() == 40


@pytest.mark.parametrize("by", ["kind", "label"])
def test_a_gang_that_waits_elsewhere_does_not_keep_another_from_its_reservation(by: str) -> None:
    """Two parts of a cluster, on each a big gang behind small jobs that keep coming."""
    nodes = make_nodes("1x4:a+1x4:b")
    nodes = tuple(replace(node, labels=(("part", node.gpus[0].kind),)) for node in nodes)

    def bound_to(part: str, arrival: Arrival) -> Arrival:
        spec = arrival.spec.model_dump(mode="json", exclude_unset=True)
        if by == "kind":
            worker = spec["roles"]["worker"]
            worker["gpu"] = f"{part}:{arrival.spec.roles['worker'].gpu.milli // 1_000}"
        else:
            spec["placement"] = {"nodes": {"part": part}}
        return replace(arrival, spec=JobSpec.model_validate(spec))

    small = [bound_to(part, an_arrival(2 * n + (part == "b"), n * 25, 100, 1)) for n in range(100) for part in "ab"]
    first = bound_to("a", an_arrival(500, 205, 100, 4))
    endless = bound_to("a", an_arrival(502, 206, 9_000, 4))  # is promised the end of the other, and then runs on
    third = bound_to("a", an_arrival(503, 207, 9_000, 4))  # waits for that
    other = bound_to("b", an_arrival(501, 210, 100, 4))
    arrivals = tuple(sorted([*small, first, endless, third, other], key=lambda a: a.at_ms))
    simulation, _ = play(Workload("parts", arrivals, nodes), "easy")
    assert (started_ms(simulation)[other.job_id] - START_MS) / 1_000 - 210 <= 101


def test_a_short_job_uses_the_hole_before_a_reservation_and_a_long_one_does_not() -> None:
    jobs = [
        an_arrival(0, 0, 1_000, 3),
        an_arrival(1, 1, 500, 4),  # reserved for 1001 s
        an_arrival(2, 2, 5_000, 1),  # would still run then
        an_arrival(3, 3, 300, 1),
    ]
    simulation, _ = play(Workload("hole", tuple(jobs), make_nodes("1x4")), "easy")
    started = [(at - START_MS) // 1_000 for at in started_ms(simulation).values()]
    assert started == [0, 1_000, 1_500, 3]


@pytest.mark.parametrize("policy", ["easy", "conservative"])
@pytest.mark.parametrize("seed", range(4))
def test_backfill_never_delays_a_reservation(policy: str, seed: int) -> None:
    """When no job runs longer than its estimate, each starts no later than was promised when it was first blocked."""
    random = Random(seed)
    arrivals, at_s = [], 0.0
    for place in range(60):
        at_s += random.expovariate(1 / 40)
        arrivals.append(an_arrival(place, at_s, random.randint(5, 900), random.choice((1, 1, 1, 2, 4, 8))))
    simulation, promised = play(Workload("random", tuple(arrivals), make_nodes("2x4")), policy)
    started = started_ms(simulation)
    assert promised
    late = {job_id: started[job_id] - at for job_id, at in promised.items() if started[job_id] > at}
    assert not late
    assert simulation.ended() == 60


def test_while_something_runs_longer_than_expected_the_kept_seats_are_used() -> None:
    """Nobody gives limits; what a job takes is known from its like. One takes a day instead of ten minutes: the gang
    that was promised its GPU cannot start, but the short jobs behind it can, and it starts soon after all the same."""

    def a_like(place: int, at_s: int, run_s: int, gpus: int, name: str) -> Arrival:
        known = an_arrival(place, at_s, run_s, gpus)
        worker = {"command": name, "cpu": "1m", "gpu": f"any:{gpus}"}
        spec = {"roles": {"worker": worker}, "start_timeout": 0, "checkpoint": {"grace": 0}}
        return replace(known, spec=JobSpec.model_validate(spec), owner="me")

    day_s = 86_400
    past = [a_like(n, n, 600 if n % 2 else 100, 1, "train" if n % 2 else "test") for n in range(60)]
    long = a_like(100, 20_000, day_s, 1, "train")
    gang = a_like(101, 20_001, 1_000, 4, "gang")
    short = [a_like(200 + n, 20_010 + n * 400, 100, 1, "test") for n in range(200)]
    workload = Workload("late", (*past, long, gang, *short), make_nodes("1x4"))
    simulation, _ = play(workload, "easy")
    started = started_ms(simulation)
    waited_s = sorted((started[each.job_id] - START_MS) / 1_000 - each.at_ms / 1_000 for each in short)
    assert waited_s[len(short) // 2] <= 120
    assert waited_s[-1] <= 2_500, "the gang's own time, and what was expected of the long job at first"
    assert (started[gang.job_id] - START_MS) / 1_000 - (20_000 + day_s) <= 300


def test_promises_do_not_keep_each_other_waiting_for_ever() -> None:
    """Jobs are expected to run longer the more is learned: a job that would then reach into the time of a later promise
    still takes its own seats, or both would leave the empty cluster to the other."""
    for seed in (4, 5):
        simulation = Simulation(synthetic(150, seed, "2x8"), POLICIES["conservative"], "conservative", seed)
        simulation.run()
        assert simulation.ended() == 150


@pytest.mark.parametrize("limit", [{"max_gpus": 4}, {"quota": {"gpus": 4}}, {"max_gpus_per_user": 4}], ids=str)
def test_a_big_gang_passes_its_queues_limit_although_small_jobs_keep_coming(limit: dict[str, object]) -> None:
    """Nodes have room; the queue's limit has not, because small jobs of the queue use it up for ever."""
    small = [replace(an_arrival(n, n * 25, 100, 1), owner="me") for n in range(100)]
    big = replace(an_arrival(500, 210, 100, 4), owner="me")
    queues = (QueueSpec.model_validate({"name": "default", **limit}),)
    arrivals = tuple(sorted([*small, big], key=lambda a: a.at_ms))
    workload = Workload("stream", arrivals, make_nodes("3x4"), queues=queues)
    greedy, _ = play(workload, "fifo")
    fair, promised = play(workload, "easy")
    waited_s = [(started_ms(each)[big.job_id] - START_MS) / 1_000 - 210 for each in (greedy, fair)]
    assert waited_s[0] > 1_000
    assert waited_s[1] <= 60 + 25 + 101, "patience, the next end, and a small job's limit"
    assert started_ms(fair)[big.job_id] <= promised[big.job_id]
    assert fair.ended() == 101
