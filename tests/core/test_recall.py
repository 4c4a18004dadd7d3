"""A restarted server knows what the one before knew: past use, budgets, run times, the usual requests; same plan."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from pydantic import TypeAdapter

from jobsched.controller.loop import Controller
from jobsched.core.cluster import Cluster
from jobsched.core.job import Phase
from jobsched.core.passes import Policy
from jobsched.core.policies.backfill import Backfill
from jobsched.core.policies.estimate import Estimates
from jobsched.core.policies.fairness import FairShare, share
from jobsched.core.recall import Recall, note
from jobsched.core.schedule import schedule
from jobsched.sim.backend import Script
from jobsched.spec.job import JobSpec
from jobsched.spec.queue import QueueSpec
from tests.benchmarks.test_limits import unit_s
from tests.world import World, a_gpu_node, a_spec

POLICY = Policy(fair=FairShare(3_600_000), backfill=Backfill())
QUEUES = (
    QueueSpec(name="both", quota={"gpus": 16}),
    QueueSpec(name="busy", cohort="both"),
    QueueSpec(name="calm", cohort="both"),
    QueueSpec(name="paid", budget={"gpu_hours": 4, "window": "1d"}),
)
EVERY_MS, DAY_MS = 1_800_000, 86_400_000


def a_world() -> World:
    """Jobs of `busy` run 20 minutes, those of `calm` 5, those of `paid` 50."""
    minutes = {"busy": 20, "calm": 5, "paid": 50}
    world = World(nodes=2, gpus=4, queues=QUEUES, scripts=lambda launch: Script(
        run_ms=60_000 * minutes.get(launch.job_name.split("-")[0], 50)
    ))  # fmt: skip
    world.engine.put_node(a_gpu_node("h", 4, kind="h100-80gb", port_lo=30_000, port_hi=30_999))
    restart(world)
    return world


def restart(world: World) -> None:
    world.boot(POLICY)
    world.controller = Controller(
        world.store, world.backend, world.clock, POLICY, queues=QUEUES, recall_every_ms=EVERY_MS
    )


def a_worker(queue: str, gpu: str = "any:2", **fields: object) -> JobSpec:
    return a_spec(queue=queue, roles={"worker": {"command": f"{queue}.py", "cpu": 2, "gpu": gpu}}, **fields)


def play(world: World, until_ms: int) -> None:
    """A job every two minutes."""
    while world.clock.now_ms() < until_ms:
        serial = world.serial
        queue = ("busy", "busy", "calm", "paid")[serial % 4]
        gpu = ("any:2", "h100:1", "any:1", "any:0.5")[serial // 2 % 4]
        world.submit(a_worker(queue, gpu, name=f"{queue}-{serial}"))
        pause(world, 120_000)


def pause(world: World, for_ms: int) -> None:
    end = world.clock.now_ms() + for_ms
    world.run_until(lambda: world.clock.now_ms() >= end)


def known(cluster: Cluster, now_ms: int) -> dict[str, object]:
    """What the next leader should know, as numbers."""
    quotas, capacity = cluster.quotas, cluster.fleet.capacity()
    found: dict[str, object] = {}
    for name, account in quotas.accounts.items():
        found[f"share {name}"] = share(account, capacity, FairShare(3_600_000), now_ms)
        found[f"spent {name}"] = account.spent(now_ms)
    cluster.estimates = Estimates.of(cluster.estimates.noted(now_ms))  # whose curves are as fresh as can be
    for job_id, job in cluster.jobs.items():
        cluster.estimates.submitted(job)
        curve = cluster.estimates.curve(job)
        found[f"curve {job_id}"] = [round(1e9 * part) for part in curve.hazard]
        found[f"left {job_id}"] = cluster.estimates.left_ms(job, now_ms)
    found["mix"] = cluster.mix.noted()
    return found


@pytest.mark.parametrize("stopped", [True, False])
def test_a_restarted_server_gives_the_same_plan(stopped: bool) -> None:
    """Whether it was stopped, or died so long after it last noted anything that much has happened since."""
    world = a_world()
    start = world.clock.now_ms()
    play(world, start + 4 * 3_600_000 + EVERY_MS * 2 // 3)
    now_ms, before = world.clock.now_ms(), world.cluster
    assert before.waiting_count() > 5
    assert before.quotas.account("paid").spent(now_ms) > 0
    noted = world.store.recall()
    assert noted is not None
    assert world.store.last_seq() - noted.seq > 20
    if stopped:
        world.controller.stop()
        assert world.store.recall().seq == world.store.last_seq()  # type: ignore[union-attr]
    expected = known(before, now_ms)
    restart(world)
    after = world.controller._load().cluster
    found = known(after, now_ms)
    assert found["mix"] == expected["mix"]
    for name, value in expected.items():
        if name.startswith("share"):
            assert found[name] == pytest.approx(value, rel=1e-6), name
        else:
            assert found[name] == value, name
    for cluster in (before, after):
        cluster.ledger.unblock()
    later = now_ms + 20 * 60_000  # something has to be decided
    plans = [schedule(cluster, later, POLICY) for cluster in (before, after)]
    assert plans[0].decisions == plans[1].decisions


def test_without_a_note_past_use_is_forgotten() -> None:
    """What the test above would see if nothing were kept."""
    world = a_world()
    play(world, world.clock.now_ms() + 2 * 3_600_000)
    now_ms, expected = world.clock.now_ms(), known(world.cluster, world.clock.now_ms())
    world.boot(POLICY)
    world.controller.tick()
    found = known(world.cluster, now_ms)
    assert found["spent paid"] != expected["spent paid"]
    assert found["share busy"] != expected["share busy"]


def test_a_spent_budget_stays_spent() -> None:
    world = a_world()
    world.clock.advance_to((world.clock.now_ms() // DAY_MS + 1) * DAY_MS)
    spec = a_spec(queue="paid", roles={"worker": {"command": "x", "cpu": 1, "gpu": "any:4"}})
    for _ in range(2):  # 2 × 4 GPUs × 50 minutes is more than 4 GPU-hours
        world.run_to_phase(world.submit(spec), Phase.SUCCEEDED)
    waits = world.submit(spec)
    world.tick(3)
    assert world.job(waits).phase is Phase.QUEUED
    restart(world)
    pause(world, 600_000)
    assert world.job(waits).phase is Phase.QUEUED
    world.clock.advance_to((world.clock.now_ms() // DAY_MS + 1) * DAY_MS)
    world.run_to_phase(waits, Phase.RUNNING)


def test_after_many_jobs_a_note_is_bounded() -> None:
    """A hundred thousand jobs of ten thousand families: what is kept is small and quick."""
    world = a_world()
    world.submit(a_worker("busy"))
    world.tick(3)
    (job,) = world.cluster.jobs.values()
    estimates = world.cluster.estimates
    for number in range(10_000):
        one = replace(job, id=f"x{number}", owner=f"u{number}", ran_ms=60_000 * (number % 90), submitted_at_ms=number)  # type: ignore[arg-type]
        estimates.learn([one] * 10)
    began = time.process_time()
    text = TypeAdapter(Recall).dump_json(note(world.cluster, world.clock.now_ms()))
    assert len(text) < 4_000_000
    noted = TypeAdapter(Recall).validate_json(text)
    again = Estimates.of(noted.estimates)
    took = time.process_time() - began
    assert took < 100 * unit_s()  # about eight
    again.submitted(job)
    left = estimates.curve(job).left_ms(0, 0.5)
    assert again.curve(job).left_ms(0, 0.5) == pytest.approx(left, rel=0.05)
