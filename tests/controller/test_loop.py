"""The loop end to end over memory store and simulated engine: every way a job can live."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest

from jobsched.controller.leader import DEFAULT_TTL_MS
from jobsched.controller.loop import Controller
from jobsched.core import events as ev
from jobsched.core.job import FailureClass, Phase, Reason, ReplicaState
from jobsched.core.launch import Launch, LaunchKey, launch_key
from jobsched.core.observation import Observation
from jobsched.core.resources import JobId
from jobsched.errors import StaleFence
from jobsched.sim.backend import Script, SimBackend
from jobsched.spec.queue import QueueSpec
from jobsched.store.memory import MemoryStore
from jobsched.wiring import SystemClock
from tests.world import World, a_ps_spec, a_spec, numbered_node


def runs(ms: int, code: int = 0, **more: int) -> Script:
    return Script(run_ms=ms, exit_code=code, **more)  # type: ignore[arg-type]


def ps_never_ends(launch: Launch) -> Script:
    return Script() if "/ps/" in launch.key else runs(5_000, step_ms=100)


def test_a_job_runs_and_succeeds() -> None:
    world = World(scripts=lambda launch: runs(1_000))
    job_id = world.submit()
    job = world.run_to_phase(job_id, Phase.SUCCEEDED)
    assert [type(e).__name__ for e in world.events(job_id)] == [
        "JobSubmitted", "AttemptPlaced", "AttemptStarted", "ReplicaExited", "AttemptStopping", "AttemptEnded",
    ]  # fmt: skip
    assert (job.attempt, job.restarts, job.reason) == (1, 0, Reason.COMPLETED)
    world.tick(3)
    assert not world.engine.alive()
    assert all(space.whole_total == 8 for space in world.cluster.ledger.spaces.values())


def test_parameter_servers_are_stopped_when_the_workers_are_done() -> None:
    world = World(scripts=ps_never_ends)
    job_id = world.submit(a_ps_spec())
    world.run_to_phase(job_id, Phase.RUNNING)
    assert len(world.engine.alive()) == 5
    world.run_to_phase(job_id, Phase.SUCCEEDED)
    assert not world.engine.alive()


def test_a_gang_waits_until_all_of_it_fits() -> None:
    world = World(nodes=1, gpus=4, scripts=lambda launch: runs(10_000))
    first = world.submit()
    world.tick(2)
    gang = world.submit(a_spec(roles={"worker": {"command": "x", "gpu": "any:2", "replicas": 2, "cpu": 1}}))
    world.tick(3)
    assert world.job(gang).phase is Phase.QUEUED
    assert world.job(first).phase is Phase.RUNNING
    world.run_to_phase(gang, Phase.RUNNING)
    assert world.job(first).phase is Phase.SUCCEEDED


@pytest.mark.parametrize(
    ("code", "retry_on", "fail_on", "phase"),
    [
        (1, (), (), Phase.FAILED),
        (33, (33,), (), Phase.QUEUED),
        (143, (), (143,), Phase.FAILED),
        (137, (), (), Phase.QUEUED),
    ],
)
def test_exit_codes_decide_between_restart_and_end(
    code: int, retry_on: tuple[int, ...], fail_on: tuple[int, ...], phase: Phase
) -> None:
    world = World(scripts=lambda launch: runs(100, code))
    job_id = world.submit(a_spec(restart={"retry_on": list(retry_on), "fail_on": list(fail_on)}))
    world.run_until(lambda: bool(world.events(job_id, ev.AttemptStopping)))
    stopping = world.events(job_id, ev.AttemptStopping)[0]
    assert isinstance(stopping, ev.AttemptStopping)
    assert stopping.outcome.phase is phase
    assert stopping.outcome.cause is not None
    assert stopping.outcome.cause.exit_code == code
    assert stopping.outcome.cause.failure_class is FailureClass.USER


def test_a_crash_loop_backs_off_and_ends() -> None:
    world = World(scripts=lambda launch: runs(100, 139))
    job_id = world.submit(a_spec(restart={"max": 3, "backoff": "2s"}))
    job = world.run_to_phase(job_id, Phase.FAILED)
    assert (job.attempt, job.restarts, job.reason) == (4, 3, Reason.CRASH_LOOP)
    placed = [e.at_ms for e in world.events(job_id, ev.AttemptPlaced)]
    gaps = [b - a for a, b in pairwise(placed)]
    assert gaps[0] < 1_000 <= 2_000 <= gaps[1] < 4_000 <= gaps[2]
    assert job.cause is not None
    assert "4 failures in a row, 3 allowed" in job.cause.message


def test_a_killed_parameter_server_and_worker_come_back_in_place() -> None:
    world = World(scripts=ps_never_ends)
    job_id = world.submit(a_ps_spec())
    world.run_to_phase(job_id, Phase.RUNNING)
    before = {rid: r.binding for rid, r in world.job(job_id).replicas.items()}
    world.engine.kill(world.key(job_id, "ps", 0))
    world.engine.kill(world.key(job_id, "worker", 1))
    world.tick(4)
    job = world.job(job_id)
    assert (job.phase, job.attempt) == (Phase.RUNNING, 1)
    assert {rid: r.binding for rid, r in job.replicas.items()} == before
    assert {rid for rid, r in job.replicas.items() if r.restart == 1} == {"ps/0", "worker/1"}
    assert all(r.state is ReplicaState.RUNNING for r in job.replicas.values())
    assert world.run_to_phase(job_id, Phase.SUCCEEDED).restarts == 2


def test_a_gang_restarts_as_a_whole_by_default() -> None:
    world = World(scripts=lambda launch: runs(1_000))
    job_id = world.submit(a_spec(roles={"worker": {"command": "x", "gpu": "any:1", "replicas": 3}}))
    world.run_to_phase(job_id, Phase.RUNNING)
    world.engine.kill(world.key(job_id, "worker", 2))
    job = world.run_to_phase(job_id, Phase.SUCCEEDED)
    assert (job.attempt, job.restarts) == (2, 1)


def elastic(**more: object) -> dict[str, object]:
    return {
        "worker": {"command": "x", "gpu": "any:1", "replicas": {"min": 2, "max": 4, "prefer": 3},
                   "restart": {"scope": "replica"}, **more}
    }  # fmt: skip


def test_an_elastic_role_goes_on_with_fewer_when_a_node_is_lost_and_grows_back() -> None:
    world = World(nodes=3, gpus=1, scripts=lambda launch: runs(60_000, step_ms=100))
    job_id = world.submit(a_spec(roles=elastic()))
    world.run_to_phase(job_id, Phase.RUNNING)
    node = world.job(job_id).replicas["worker/2"].binding
    assert node is not None
    lost = world.cluster.fleet.nodes[node.node]
    world.engine.lose_node(lost.name)
    world.tick(3)
    job = world.job(job_id)
    assert (job.phase, job.attempt, job.replicas["worker/2"].state) == (Phase.RUNNING, 1, ReplicaState.UNBOUND)
    world.engine.put_node(lost)
    world.tick(3)
    job = world.job(job_id)
    assert (job.replicas["worker/2"].state, job.replicas["worker/2"].restart) == (ReplicaState.RUNNING, 1)
    assert world.run_to_phase(job_id, Phase.SUCCEEDED).attempt == 1


def test_a_worker_that_is_lost_with_its_server_restarts_the_job() -> None:
    """The worker might be bound anew while the rest goes on, but nobody would ever bind the server."""
    world = World(nodes=2, gpus=1, scripts=ps_never_ends)
    job_id = world.submit(a_ps_spec(ps=1, workers=2))
    bound = world.run_to_phase(job_id, Phase.RUNNING).replicas["ps/0"].binding
    assert bound is not None
    node = world.cluster.fleet.nodes[bound.node]
    world.engine.lose_node(node.name)
    world.tick(3)
    assert not world.events(job_id, ev.ReplicasUnbound)
    world.engine.put_node(node)
    assert world.run_to_phase(job_id, Phase.SUCCEEDED).attempt == 2


def test_the_last_worker_that_stays_restarts_the_job_when_it_is_lost() -> None:
    """The others have ended or are leaving: nothing would go on until it is bound anew, which nobody would do."""
    def script(launch: Launch) -> Script:
        return Script() if "/ps/" in launch.key else runs(60_000, save_ms=20_000)

    world = World(nodes=3, gpus=1, scripts=script)
    worker = {"command": "w", "gpu": "any:1", "replicas": {"min": 1, "max": 3, "prefer": 3}}
    job_id = world.submit(a_spec(roles={"ps": {"command": "p", "cpu": 40}, "worker": worker}))
    job = world.run_to_phase(job_id, Phase.RUNNING)
    first = next(r for r in job.replicas.values() if r.role == "worker")
    world.engine.end_at(world.key(job_id, "worker", first.index), world.clock.now_ms() + 10)
    world.tick(3)
    world.wish(ev.JobScaled(world.clock.now_ms(), job_id, "me", {"worker": 1}))
    world.tick(3)
    states = [r.state for r in world.job(job_id).replicas.values() if r.role == "worker"]
    assert sorted(states) == [ReplicaState.EXITED, ReplicaState.RUNNING, ReplicaState.STOPPING]
    stays = next(r for r in world.job(job_id).replicas.values() if r.role == "worker" and r.state.desired)
    assert stays.binding is not None
    world.engine.lose_node(stays.binding.node)
    world.tick(3)
    assert not world.events(job_id, ev.ReplicasUnbound)
    assert world.run_to_phase(job_id, Phase.SUCCEEDED).attempt == 2


def test_scaling_an_elastic_role_in_place() -> None:
    world = World(scripts=lambda launch: runs(60_000, step_ms=100, save_ms=50))
    job_id = world.submit(a_spec(roles=elastic()))
    world.run_to_phase(job_id, Phase.RUNNING)
    world.wish(ev.JobScaled(world.clock.now_ms(), job_id, "me", {"worker": 4}))
    world.tick(4)
    assert len(world.engine.alive()) == 4
    world.wish(ev.JobScaled(world.clock.now_ms(), job_id, "me", {"worker": 2}))
    world.run_until(lambda: len(world.engine.alive()) == 2)
    world.tick(3)
    job = world.job(job_id)
    assert (job.phase, job.attempt) == (Phase.RUNNING, 1)
    assert sum(r.binding is not None for r in job.replicas.values()) == 2
    world.wish(ev.JobScaled(world.clock.now_ms(), job_id, "me", {"worker": 4}))
    world.tick(4)
    assert len(world.engine.alive()) == 4
    assert {r.restart for r in world.job(job_id).replicas.values()} == {0, 1}


def test_losing_the_node_of_a_fixed_gang_restarts_it_elsewhere_without_counting() -> None:
    world = World(nodes=2, gpus=2, scripts=lambda launch: runs(60_000))
    job_id = world.submit(a_spec(restart={"max": 0}, roles={"worker": {"command": "x", "gpu": "any:2"}}))
    job = world.run_to_phase(job_id, Phase.RUNNING)
    binding = job.replicas["worker/0"].binding
    assert binding is not None
    world.engine.lose_node(binding.node)
    world.run_until(lambda: world.job(job_id).attempt == 2)
    job = world.run_to_phase(job_id, Phase.SUCCEEDED)
    assert (job.failures, job.infra_failures) == (0, 1)


@pytest.mark.parametrize("dies", [False, True])
def test_a_replica_that_came_and_went_before_anybody_saw_it_is_lost(dies: bool) -> None:
    """The same launch never starts twice: without this its job would wait for it for ever."""
    world = World(scripts=lambda launch: runs(60_000))
    restart = {"scope": "role", "max": 2}
    job_id = world.submit(a_spec(roles={"worker": {"command": "w", "replicas": 2, "restart": restart}}))
    world.run_to_phase(job_id, Phase.RUNNING)
    world.engine.kill(world.key(job_id, "worker", 0))
    while (again := f"{job_id}/1/worker/0/1") not in world.engine.alive():
        world.tick()
    assert world.job(job_id).replicas["worker/0"].state is ReplicaState.BOUND
    world.engine.remove(LaunchKey(again))
    if dies:
        world.boot()
    job = world.run_to_phase(job_id, Phase.SUCCEEDED)
    assert (job.attempt, job.infra_failures) == (1, 1)


def test_a_replica_removed_behind_our_back_is_lost_not_counted() -> None:
    world = World(scripts=lambda launch: runs(60_000))
    job_id = world.submit(a_spec(restart={"max": 0}))
    world.run_to_phase(job_id, Phase.RUNNING)
    world.engine.remove(world.key(job_id, "worker", 0))
    world.run_until(lambda: world.job(job_id).attempt == 2)
    assert world.events(job_id, ev.ReplicasLost)
    assert world.run_to_phase(job_id, Phase.SUCCEEDED).failures == 0


def test_cancel_of_a_waiting_and_of_a_running_job() -> None:
    world = World(nodes=1, gpus=1, scripts=lambda launch: runs(60_000))
    running, waiting = world.submit(), world.submit()
    world.run_to_phase(running, Phase.RUNNING)
    for job_id in (running, waiting):
        world.wish(ev.JobCancelRequested(world.clock.now_ms(), job_id, "me"))
    for job_id in (running, waiting):
        assert world.run_to_phase(job_id, Phase.CANCELLED).reason is Reason.CANCELLED
    world.tick(2)
    assert not world.engine.alive()


def test_hold_suspend_release_and_restart() -> None:
    world = World(scripts=lambda launch: runs(60_000))
    job_id = world.submit(held=True)
    world.tick(3)
    assert world.job(job_id).phase is Phase.QUEUED
    world.wish(ev.JobReleased(world.clock.now_ms(), job_id, "me"))
    world.run_to_phase(job_id, Phase.RUNNING)
    world.wish(ev.JobHeld(world.clock.now_ms(), job_id, "me", stop=True))
    job = world.run_to_phase(job_id, Phase.QUEUED)
    assert (job.reason, job.held) == (Reason.HELD, True)
    world.tick(3)
    assert world.job(job_id).attempt == 1
    world.wish(ev.JobReleased(world.clock.now_ms(), job_id, "me"))
    world.run_to_phase(job_id, Phase.RUNNING)
    world.wish(ev.JobRestartRequested(world.clock.now_ms(), job_id, "me"))
    world.run_until(lambda: world.job(job_id).attempt == 3)
    assert world.job(job_id).failures == 0


def test_a_hang_is_found_in_time_and_names_the_odd_rank() -> None:
    world = World(scripts=lambda launch: runs(120_000, step_ms=100))
    roles = {"worker": {"command": "x", "gpu": "any:1", "replicas": 3}}
    job_id = world.submit(a_spec(hang_timeout="5s", roles=roles))
    world.run_to_phase(job_id, Phase.RUNNING)
    world.tick(5, step_ms=500)
    hung_at = world.clock.now_ms()
    for index in range(3):
        world.engine.hang(world.key(job_id, "worker", index))
    world.run_until(lambda: bool(world.events(job_id, ev.AttemptStopping)))
    stopping = world.events(job_id, ev.AttemptStopping)[0]
    assert isinstance(stopping, ev.AttemptStopping)
    assert stopping.at_ms - hung_at <= 7_000
    cause = stopping.outcome.cause
    assert cause is not None
    assert (cause.reason, cause.failure_class, len(cause.stacks)) == (Reason.HANG, FailureClass.HANG, 3)
    assert world.run_to_phase(job_id, Phase.SUCCEEDED).attempt == 2


def test_a_slow_step_clears_the_suspicion() -> None:
    world = World(scripts=lambda launch: runs(60_000, step_ms=10_000))
    job_id = world.submit(a_spec(hang_timeout="9500ms"))
    assert world.run_to_phase(job_id, Phase.SUCCEEDED).attempt == 1
    assert world.events(job_id, ev.HangCleared)


def test_time_limit_queue_deadline_and_start_timeout() -> None:
    def scripts(launch: Launch) -> Script:
        return runs(600_000, start_ms=0 if "j00001" in launch.key else 900_000)

    world = World(nodes=1, gpus=1, scripts=scripts)
    limited = world.submit(a_spec(time_limit="10s"))
    late = world.submit(a_spec(queue_deadline="5s"))
    assert world.run_to_phase(late, Phase.FAILED).reason is Reason.QUEUE_DEADLINE
    job = world.run_to_phase(limited, Phase.FAILED)
    assert job.reason is Reason.TIME_LIMIT
    assert 10_000 <= job.ran_ms < 11_000
    slow = world.submit(a_spec(start_timeout="30s"))
    world.run_until(lambda: bool(world.events(slow, ev.AttemptStopping)))
    assert world.job(slow).reason is Reason.START_TIMEOUT


def test_dependencies_met_and_failed() -> None:
    world = World(scripts=lambda launch: runs(1_000, 1 if "j00002" in launch.key else 0))
    good, bad = world.submit(), world.submit()
    after_good, after_bad = world.submit(waiting_for=(good,)), world.submit(waiting_for=(good, bad))
    assert world.run_to_phase(after_bad, Phase.FAILED).reason is Reason.DEPENDENCY_FAILED
    world.run_to_phase(after_good, Phase.SUCCEEDED)


def test_array_limit_and_queue_quota_hold() -> None:
    world = World(scripts=lambda launch: runs(1_000), queues=(QueueSpec(), QueueSpec(name="small", max_gpus=3)))
    array = a_spec(array="0-9%2")
    members = [world.submit(array, array_id="a", array_index=i) for i in range(10)]
    others = [world.submit(a_spec(queue="small")) for _ in range(8)]
    most = {"array": 0, "small": 0}

    def done() -> bool:
        alive = list(world.engine.alive())
        most["array"] = max(most["array"], sum(k.split("/")[0] in members for k in alive))
        most["small"] = max(most["small"], sum(k.split("/")[0] in others for k in alive))
        return world.phases().get("SUCCEEDED", 0) == 18

    world.run_until(done)
    assert most == {"array": 2, "small": 3}


def test_priority_goes_first_then_age() -> None:
    world = World(nodes=1, gpus=1, scripts=lambda launch: runs(1_000))
    ids = [world.submit(a_spec(priority=p)) for p in (0, 5, 0, 9)]
    world.run_until(lambda: world.phases().get("SUCCEEDED", 0) == 4)
    started = sorted(ids, key=lambda i: world.job(i).first_started_at_ms)
    assert started == [ids[3], ids[1], ids[0], ids[2]]


def test_drain_moves_jobs_and_cordon_keeps_new_ones_away() -> None:
    world = World(nodes=2, gpus=1, scripts=lambda launch: runs(60_000))
    job_id = world.submit()
    job = world.run_to_phase(job_id, Phase.RUNNING)
    binding = job.replicas["worker/0"].binding
    assert binding is not None
    world.wish(ev.NodeCordoned(world.clock.now_ms(), binding.node, "ops", drain=True))
    world.run_until(lambda: world.job(job_id).attempt == 2 and world.job(job_id).phase is Phase.RUNNING)
    moved = world.job(job_id).replicas["worker/0"].binding
    assert moved is not None
    assert moved.node != binding.node
    assert world.job(job_id).failures == 0


def test_a_new_server_goes_on_with_what_runs() -> None:
    world = World(scripts=ps_never_ends)
    job_id = world.submit(a_ps_spec())
    world.run_to_phase(job_id, Phase.RUNNING)
    before = set(world.engine.alive())
    world.boot()
    world.tick(3)
    assert set(world.engine.alive()) == before
    job = world.run_to_phase(job_id, Phase.SUCCEEDED)
    assert (job.attempt, job.restarts) == (1, 0)


def test_an_orphan_is_reaped() -> None:
    world = World(scripts=lambda launch: runs(60_000))
    job_id = world.submit()
    world.run_to_phase(job_id, Phase.RUNNING)
    launch = world.engine.alive()[world.key(job_id, "worker", 0)]
    world.engine.start([replace(launch, key=launch_key(JobId("gone"), 1, "worker", 0, 0), gpus=())])
    world.boot()
    world.tick(3)
    assert set(world.engine.alive()) == {launch.key}


def test_an_unreachable_engine_changes_nothing() -> None:
    world = World(scripts=lambda launch: runs(60_000))
    job_id = world.submit()
    world.run_to_phase(job_id, Phase.RUNNING)
    world.engine.unreachable = True
    seq = world.store.last_seq()
    world.tick(20, step_ms=1_000)
    assert world.store.last_seq() == seq
    waiting = world.submit()
    world.tick(2)
    world.engine.unreachable = False
    world.run_to_phase(job_id, Phase.SUCCEEDED)
    world.run_to_phase(waiting, Phase.SUCCEEDED)


def test_nothing_starts_on_a_gpu_until_its_last_replica_is_gone() -> None:
    world = World(nodes=1, gpus=2, scripts=lambda launch: runs(60_000, save_ms=5_000))
    roles = {"worker": {"command": "x", "gpu": "any:1", "replicas": 2}}
    first, second = world.submit(a_spec(roles=roles)), world.submit(a_spec(roles=roles))
    world.run_to_phase(first, Phase.RUNNING)
    world.engine.kill(world.key(first, "worker", 0))
    world.wish(ev.JobHeld(world.clock.now_ms(), first, "me"))
    world.tick(5, step_ms=500)
    assert world.job(first).phase is Phase.STOPPING
    assert world.job(second).phase is Phase.QUEUED
    world.run_to_phase(second, Phase.RUNNING)
    assert world.job(first).phase is Phase.QUEUED


def test_a_queue_that_is_no_longer_configured_drains_and_gives_its_quota_back() -> None:
    """What runs and waits in it goes on as it would have; once it is empty, its quota counts no longer."""
    kept = QueueSpec(name="kept", cohort="c", quota={"gpus": 4})
    gone = QueueSpec(name="gone", cohort="c", quota={"gpus": 4}, max_gpus=4)
    queues = (kept, gone, QueueSpec(name="c", weight=3))
    world = World(nodes=1, gpus=8, scripts=lambda launch: runs(10_000), queues=queues)
    roles = {"worker": {"command": "x", "gpu": "any:4"}}
    first, second = (world.submit(a_spec(queue="gone", roles=roles)) for _ in "ab")
    world.run_to_phase(first, Phase.RUNNING)
    assert world.job(second).phase is Phase.QUEUED
    world.queues = (kept,)
    world.boot()
    world.tick(3)
    assert world.cluster.queues["gone"] == gone.model_copy(update={"draining": True})
    assert world.cluster.queues["c"] == QueueSpec(name="c")
    assert world.job(first).phase is Phase.RUNNING
    world.run_to_phase(first, Phase.SUCCEEDED)
    world.run_to_phase(second, Phase.SUCCEEDED)
    seq = world.cluster.seq
    world.tick(3)
    assert world.cluster.seq == seq, "retired once"
    world.boot()
    world.tick(3)
    assert world.cluster.queues["gone"] == QueueSpec(name="gone", draining=True)
    assert world.cluster.quotas.account("c").nominal == {"gpus": 4_000}
    world.queues = (kept, gone)
    world.boot()
    world.tick(3)
    assert world.cluster.queues["gone"] == gone


class Unhurried(SimBackend):
    """Waits for news as engines do."""

    def observe(self, timeout_ms: int = 0) -> Observation:
        time.sleep(timeout_ms / 100_000)
        return super().observe(timeout_ms)


def test_whoever_asks_can_wait_until_what_it_wrote_is_known_to_leader_and_follower() -> None:
    store, clock = MemoryStore(), SystemClock()
    servers = [
        Controller(store, Unhurried(clock, [numbered_node(0, 8)]), clock, queues=[QueueSpec()], holder=holder,
                   lease_ttl_ms=600_000)
        for holder in ("one", "two")
    ]
    assert not servers[0].caught_up(store.last_seq(), 0.01), "nothing runs yet"
    try:
        for server in servers:
            server.start()
        assert servers[0].caught_up(1, 60)
        submitted = ev.JobSubmitted(clock.now_ms(), JobId("j1"), "j1", "me", a_spec())
        (stored,) = store.append([submitted]).stored
        for server in servers:
            assert server.caught_up(stored.seq, 60)
            with server.view() as (cluster, _):
                assert cluster.jobs[JobId("j1")].phase is not Phase.QUEUED or not server.leading
        assert [server.leading for server in servers].count(True) == 1
        assert not servers[0].caught_up(store.last_seq() + 1_000, 0.05), "that has not happened yet"
    finally:
        for server in servers:
            server.stop()


def test_a_leader_whose_engine_took_too_long_to_stop_somebody_starts_nobody_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another may lead by then, and have given away the places."""
    world = World()
    ends = world.submit()
    world.run_to_phase(ends, Phase.RUNNING)
    world.wish(ev.JobCancelRequested(world.clock.now_ms(), ends, "me"))
    starts, stop = world.submit(), world.engine.stop

    def slowly(keys: Sequence[LaunchKey], grace_ms: int) -> None:
        stop(keys, grace_ms)
        world.clock.advance_to(world.clock.now_ms() + DEFAULT_TTL_MS)

    monkeypatch.setattr(world.engine, "stop", slowly)
    with pytest.raises(StaleFence):
        world.controller.tick()
    assert world.job(starts).phase is Phase.STARTING
    assert not [key for key in world.engine.alive() if key.startswith(starts)]
