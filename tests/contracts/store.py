"""What every `Store` promises. A test class inherits `StoreContract` and gives the fixture `store`.

`story` makes random legal lives of jobs; `replay` folds a log the way the leader does.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from jobsched.core import events as ev
from jobsched.core.cluster import Cluster
from jobsched.core.job import Binding, Cause, FailureClass, Job, Outcome, Phase, Reason, ReplicaId
from jobsched.core.lifecycle import evolve_job
from jobsched.core.node import Cordon, Gpu, Node
from jobsched.core.policies.estimate import Estimates, Noted
from jobsched.core.policies.fragmentation import Demand, MixNote
from jobsched.core.policies.quota import AccountNote
from jobsched.core.recall import Held, Recall
from jobsched.core.resources import GpuId, GpuShare, JobId, NodeName
from jobsched.errors import StaleFence
from jobsched.ports import Appended, JobQuery, Rejected, Sample, Store, Usage
from jobsched.spec.job import JobSpec
from jobsched.spec.queue import QueueSpec

NODE = Node(NodeName("n1"), 8_000, 2**34, (Gpu(GpuId("g1"), "sim-gpu", 2**30),), labels=(("rack", "a"),))
REPLICAS = (ReplicaId("worker/0"), ReplicaId("worker/1"))


def a_spec(name: str = "digits", **fields: object) -> JobSpec:
    roles = {"worker": {"replicas": 2, "gpu": "any:1", "command": "python train.py", "env": {"A": "ü\n"}}}
    return JobSpec.model_validate({"name": name, "roles": roles, **fields})


def submitted(
    job_id: str, at_ms: int = 1_000, *, owner: str = "ada", request_id: str = "", array_id: str = "", **fields: object
) -> ev.JobSubmitted:
    spec = a_spec(**fields)  # type: ignore[arg-type]
    index = 0 if array_id else -1
    return ev.JobSubmitted(at_ms, JobId(job_id), str(spec.name), owner, spec, request_id, (), array_id, index)


def held(job_id: str, at_ms: int = 2_000) -> ev.JobHeld:
    return ev.JobHeld(at_ms, JobId(job_id), "ada")


def cancelled(job_id: str, at_ms: int = 3_000) -> ev.JobEnded:
    return ev.JobEnded(at_ms, JobId(job_id), Phase.CANCELLED, Cause(Reason.CANCELLED))


def placed(job_id: str, at_ms: int) -> ev.AttemptPlaced:
    """On three quarters of a GPU."""
    binding = Binding("worker", 0, NODE.name, (GpuShare(GpuId("g1"), 750),), (4_000,))
    return ev.AttemptPlaced(at_ms, JobId(job_id), 1, (binding,))


def story(rng: random.Random, job_id: str, length: int) -> Iterator[ev.JobEvent]:
    """A random legal life, `length` events long or until the job has ended."""
    job: Job | None = None
    for at_ms in range(1_000, 1_000 + length):
        event = _next_event(rng, job, JobId(job_id), at_ms)
        job = evolve_job(job, event)
        yield event
        if job.phase.terminal:
            return


def _next_event(rng: random.Random, job: Job | None, job_id: JobId, at_ms: int) -> ev.JobEvent:
    if job is None:
        return submitted(job_id, at_ms, name=f"job-{rng.randrange(9)}", labels={"team": rng.choice("ab")})
    n = job.attempt
    cause = Cause(Reason.EXIT_CODE, FailureClass.USER, "boom", "worker", 1, 1, "n1", 3, None, ("last", "lines"))
    wishes: list[ev.JobEvent] = [
        ev.JobHeld(at_ms, job_id, "ada", stop=rng.random() < 0.5),
        ev.JobReleased(at_ms, job_id, "ada"),
        ev.JobPriorityChanged(at_ms, job_id, "ada", rng.randrange(100)),
        ev.JobScaled(at_ms, job_id, "ada", {"worker": rng.randrange(1, 5)}),
        ev.JobCancelRequested(at_ms, job_id, "ada"),
        ev.JobEdited(at_ms, job_id, "ada", edited(rng, job), ("labels", "queue"), restart=rng.random() < 0.5),
    ]
    if rng.random() < 0.2:
        return rng.choice(wishes)
    bindings = tuple(
        Binding("worker", i, NODE.name, (GpuShare(GpuId("g1"), 500),), (4_000 + i,)) for i in range(len(REPLICAS))
    )
    ends = [Phase.QUEUED, Phase.QUEUED, Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED]
    stopping = ev.AttemptStopping(at_ms, job_id, n, Outcome(rng.choice(ends), Reason.EXIT_CODE, cause))
    match job.phase:
        case Phase.QUEUED:
            if rng.random() < 0.1:
                return cancelled(job_id, at_ms)
            return ev.AttemptPlaced(at_ms, job_id, n + 1, bindings, 5_000)
        case Phase.STARTING:
            started = ev.AttemptStarted(at_ms, job_id, n)
            return rng.choice([ev.ReplicasStarted(at_ms, job_id, n, REPLICAS), started, started, stopping])
        case Phase.RUNNING:
            return rng.choice([
                ev.CheckpointSaved(at_ms, job_id, n, at_ms, "/ckpt/ü"),
                ev.ReplicaExited(at_ms, job_id, n, "worker", 1, exit_code=3, tail=("a", "b")),
                ev.ReplicasLost(at_ms, job_id, n, REPLICAS[:1]),
                ev.ReplicasRestarted(at_ms, job_id, n, REPLICAS[:1], cause, at_ms + 5),
                ev.HangSuspected(at_ms, job_id, n, REPLICAS, "no step"),
                ev.FailuresForgiven(at_ms, job_id),
                stopping,
            ])  # fmt: skip
        case _:
            assert job.outcome is not None
            return ev.AttemptEnded(at_ms, job_id, n, job.outcome.phase)


def edited(rng: random.Random, job: Job) -> JobSpec:
    return job.spec.model_copy(update={"labels": {"team": rng.choice("abc")}, "priority": rng.randrange(9),
                                       "queue": rng.choice(("default", "other"))})


def interleaved(rng: random.Random, stories: Sequence[Iterator[ev.JobEvent]]) -> Iterator[ev.JobEvent]:
    """The events of all stories, each story in its own order."""
    running = list(stories)
    while running:
        one = rng.choice(running)
        event = next(one, None)
        if event is None:
            running.remove(one)
        else:
            yield event


def append(store: Store, events: Sequence[ev.Event], expected: Mapping[JobId, int] | None = None) -> Appended:
    """Append as whoever may: decisions as the leader."""
    if all(map(ev.is_wish, events)):
        return store.append(events, expected)
    lease = store.lease("test", 10**12, now_ms=0)
    assert lease is not None
    return store.append(events, expected, lease.fence)


def replay(log: Iterable[ev.Stored]) -> dict[JobId, Job]:
    jobs: dict[JobId, Job] = {}
    for stored in log:
        job_id = stored.event.job_id
        if job_id is not None:
            jobs[job_id] = evolve_job(jobs.get(job_id), stored.event)  # type: ignore[arg-type]
    return jobs


def assert_consistent(store: Store) -> None:
    """The log has no gaps, and every projection equals the log replayed."""
    log = store.read(0, 10**9)
    assert [s.seq for s in log] == list(range(1, len(log) + 1))
    assert store.last_seq() == len(log)
    jobs = replay(log)
    assert {job_id: store.job(job_id) for job_id in jobs} == jobs
    listed = store.jobs(JobQuery(limit=10**6))
    assert list(listed) == sorted(jobs.values(), key=lambda j: (j.submitted_at_ms, j.id), reverse=True)
    for job_id in jobs:
        assert list(store.history(job_id)) == [s for s in log if s.event.job_id == job_id]
    folded = Cluster()
    for stored in log:
        folded.evolve(stored.event, stored.seq)
    loaded = store.load()
    assert loaded.seq == len(log)
    assert {j.id: j for j in loaded.jobs} == folded.jobs
    assert [j.id for j in loaded.jobs] == [j.id for j in reversed(listed) if not j.phase.terminal]
    assert {n.name: n for n in loaded.nodes} == folded.fleet.nodes
    assert set(loaded.lost_nodes) == folded.fleet.lost
    assert dict(loaded.cordoned) == folded.fleet.cordoned
    assert {q.name: q for q in loaded.queues} == folded.queues
    assert store.count("phase") == _tally(j.phase.value for j in jobs.values())
    assert store.count("queue") == _tally(j.spec.queue for j in folded.jobs.values())


def _tally(names: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return counts


class StoreContract:
    @pytest.fixture
    def store(self) -> Iterator[Store]:
        raise AssertionError("a subclass gives the store")

    # ---- the log ----

    def test_empty(self, store: Store) -> None:
        assert (store.last_seq(), store.read(0), store.jobs(JobQuery())) == (0, (), ())
        assert store.job(JobId("none")) is None
        assert store.history(JobId("none")) == ()
        assert append(store, []).stored == ()
        assert (store.count("phase"), store.count("queue")) == ({}, {})
        assert_consistent(store)

    def test_events_come_back_as_they_were_numbered_from_1_without_gaps(self, store: Store) -> None:
        first = append(store, [submitted("a"), held("a")])
        second = append(store, [ev.NodeSeen(1, NODE), submitted("b"), cancelled("a")])
        assert [s.seq for s in first.stored + second.stored] == [1, 2, 3, 4, 5]
        assert store.read(0) == first.stored + second.stored
        assert store.read(2, 2) == second.stored[:2]
        assert store.read(5) == ()
        assert store.history(JobId("a")) == (*first.stored, second.stored[2])
        assert store.history(JobId("a"), after=1, limit=1) == first.stored[1:]
        assert_consistent(store)

    @pytest.mark.parametrize(
        "fields",
        [{"name": None}, {"array": "0-3%2"}, {"name": "x", "array": 1, "time_limit": "90s", "labels": {"a/b": "é'\""}}],
        ids=str,
    )
    def test_specs_come_back_equal(self, store: Store, fields: dict[str, object]) -> None:
        event = submitted("a", **fields)  # type: ignore[arg-type]
        store.append([submitted("other"), event])
        store.append([held("a")])
        job = store.job(JobId("a"))
        assert job is not None
        assert job.spec == event.spec
        assert job.spec.model_dump_json() == event.spec.model_dump_json()
        assert store.history(JobId("a"))[0].event == event
        assert_consistent(store)

    def test_random_lives_leave_projections_equal_to_the_replayed_log(self, store: Store) -> None:
        rng = random.Random(7)
        events = list(interleaved(rng, [story(rng, f"j{i:02}", 30) for i in range(25)]))
        while events:
            size = rng.choice([1, 2, 30])
            appended = append(store, events[:size])
            assert not appended.rejected
            assert [s.event for s in appended.stored] == events[:size]
            del events[:size]
        assert_consistent(store)
        assert any(j.phase is Phase.SUCCEEDED for j in store.jobs(JobQuery()))

    # ---- compare and set ----

    def test_a_moved_job_is_rejected_alone_with_all_its_events(self, store: Store) -> None:
        append(store, [submitted("a"), submitted("b")])
        append(store, [held("a")])
        appended = append(store,
            [held("a", 5), held("b", 5), cancelled("a", 6), ev.NodeSeen(7, NODE)],
            expected={JobId("a"): 1, JobId("b"): 1},
        )
        assert appended.rejected == (Rejected(JobId("a"), expected=1, actual=2),)
        assert [s.event for s in appended.stored] == [held("b", 5), ev.NodeSeen(7, NODE)]
        assert [s.seq for s in appended.stored] == [4, 5]
        assert_consistent(store)

    def test_the_right_version_goes_through_and_rises_by_one_per_event(self, store: Store) -> None:
        append(store, [submitted("a")], expected={JobId("a"): 0})
        appended = append(store, [held("a"), held("a")], expected={JobId("a"): 1})
        assert not appended.rejected
        job = store.job(JobId("a"))
        assert job is not None
        assert job.version == 3
        assert append(store, [held("a")], expected={JobId("a"): 2}).rejected == (Rejected(JobId("a"), 2, 3),)

    def test_an_illegal_event_rejects_its_job_and_writes_none_of_its_events(self, store: Store) -> None:
        append(store, [submitted("a"), submitted("b")])
        appended = append(store, [held("a"), ev.AttemptStarted(5, JobId("a"), 1), held("b"), held("unknown")])
        assert appended.rejected == (Rejected(JobId("a"), 1, 1), Rejected(JobId("unknown"), 0, 0))
        assert [s.event for s in appended.stored] == [held("b")]
        assert append(store, [submitted("a")]).rejected == (Rejected(JobId("a"), 1, 1),)
        assert_consistent(store)

    def test_of_two_writers_with_the_same_version_one_wins(self, store: Store) -> None:
        append(store, [submitted("a")])
        start = threading.Barrier(4)

        def write(at_ms: int) -> bool:
            start.wait(120)
            return not append(store, [held("a", at_ms)], expected={JobId("a"): 1}).rejected

        with ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(write, range(4))) == 1
        assert_consistent(store)

    # ---- idempotent submission ----

    def test_a_submission_sent_twice_is_written_once(self, store: Store) -> None:
        first = append(store, [submitted("a", request_id="r1")]).stored
        again = append(store, [submitted("b", 9_000, request_id="r1"), submitted("c", request_id="r2")])
        assert again.stored[0] == first[0]
        assert [s.seq for s in again.stored] == [1, 2]
        assert not again.rejected
        assert store.job(JobId("b")) is None
        assert_consistent(store)

    def test_request_ids_belong_to_their_owner_and_may_be_absent(self, store: Store) -> None:
        append(store, [submitted("a", request_id="r1"), submitted("b", request_id="r1", owner="bob")])
        append(store, [submitted("c"), submitted("d")])
        assert store.last_seq() == 4

    def test_twice_within_one_append(self, store: Store) -> None:
        appended = append(store, [submitted("a", request_id="r1"), submitted("b", request_id="r1"), held("b")])
        assert [s.seq for s in appended.stored] == [1, 1]
        assert appended.rejected == (Rejected(JobId("b"), 0, 0),)
        assert_consistent(store)

    def test_a_rejected_submission_can_be_sent_again(self, store: Store) -> None:
        assert append(store, [submitted("a", request_id="r1")], expected={JobId("a"): 3}).rejected
        assert append(store, [submitted("a", request_id="r1")]).stored[0].seq == 1

    def test_threads_sending_the_same_submission_get_the_same_answer(self, store: Store) -> None:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda i: append(store, [submitted(f"j{i}", request_id="r")]).stored, range(16)))
        assert len({stored[0].event.job_id for stored in answers}) == 1  # type: ignore[union-attr]
        assert store.last_seq() == 1

    # ---- leading ----

    def test_a_lease_is_held_renewed_expires_and_is_released(self, store: Store) -> None:
        first = store.lease("a", 10, now_ms=100)
        assert first is not None
        assert (first.holder, first.expires_ms) == ("a", 110)
        assert store.lease("b", 10, now_ms=109) is None
        assert store.lease("a", 10, now_ms=105) == replace(first, expires_ms=115)
        assert store.lease("b", 10, now_ms=114) is None
        second = store.lease("b", 10, now_ms=115)
        assert second is not None
        assert second.fence > first.fence
        store.release("a")
        assert store.lease("a", 10, now_ms=116) is None
        store.release("b")
        third = store.lease("a", 10, now_ms=117)
        assert third is not None
        assert third.fence > second.fence

    def test_what_a_leader_knows_is_kept_for_the_next(self, store: Store) -> None:
        key = (("default", "me", "", (("worker", "", "python x.py"),), 1_000), "name")
        noted = Noted(((key, (2,) * 18, (1,) * 18),), (((1,) * 18, (0,) * 18),), ((key, 5, 0),),
                      ((JobId("a"), 3, 0),))  # fmt: skip
        demand = Demand(500, 1_000, ("h100",), 10, 20)
        recall = Recall(
            3, (QueueSpec(name="x", cohort="y"),), (AccountNote("x", 5, 6, (("gpus", 1.5),), 7),),
            (Held(JobId("a"), ReplicaId("worker/0"), "x", "me", (("gpus", 1_000), ("cpu", 500))),),
            10, 20, noted, MixNote(((demand, 2, 3),), ((demand, 1, 2),), 4, True, 5),
        )  # fmt: skip
        assert store.recall() is None
        lease = store.lease("a", 10, now_ms=0)
        assert lease is not None
        store.keep_recall(replace(recall, seq=1), lease.fence)
        store.keep_recall(recall, lease.fence)
        found = store.recall()
        assert found is not None
        assert replace(found, estimates=noted) == recall
        assert repr(Estimates.of(found.estimates)) == repr(Estimates.of(noted))
        later = store.lease("b", 10, now_ms=10)
        assert later is not None
        with pytest.raises(StaleFence):
            store.keep_recall(replace(recall, seq=9), lease.fence)
        assert store.recall() == found

    def test_its_own_expired_lease_keeps_the_fence_if_nobody_led_since(self, store: Store) -> None:
        first, later = store.lease("a", 10, now_ms=0), store.lease("a", 10, now_ms=500)
        assert first is not None
        assert later == replace(first, expires_ms=510)

    def test_an_outdated_leader_cannot_write_and_wishes_need_no_fence(self, store: Store) -> None:
        store.append([submitted("a")])
        old, new = store.lease("a", 10, now_ms=0), store.lease("b", 10, now_ms=10)
        assert old is not None
        assert new is not None
        placed = ev.AttemptPlaced(20, JobId("a"), 1, (Binding("worker", 0, NODE.name),))
        with pytest.raises(StaleFence):
            store.append([placed], fence=old.fence)
        with pytest.raises(StaleFence):
            store.append([], fence=old.fence)
        assert store.last_seq() == 1
        assert store.append([placed], {JobId("a"): 1}, new.fence).stored[0].seq == 2
        assert store.append([held("a")]).stored[0].seq == 3
        assert_consistent(store)

    def test_a_decision_without_a_fence_is_a_programmers_error(self, store: Store) -> None:
        store.append([submitted("a")])
        for decision in (cancelled("a"), ev.NodeSeen(1, NODE)):
            with pytest.raises(AssertionError, match="fence"):
                store.append([held("a"), decision])
        assert store.last_seq() == 1

    # ---- nodes and queues ----

    def test_nodes_and_queues(self, store: Store) -> None:
        other = replace(NODE, name=NodeName("n0"), ready=False)
        append(store, [ev.NodeSeen(1, NODE), ev.NodeSeen(1, other), ev.NodeCordoned(2, NodeName("new"), "ada")])
        append(store, [ev.NodeLost(3, NODE.name), ev.NodeCordoned(3, other.name, "ada", drain=True)])
        append(store, [ev.QueueDefined(4, QueueSpec(name="q", weight=3)), ev.QueueDefined(4, QueueSpec(name="a"))])
        append(store, [ev.QueueDefined(5, QueueSpec(name="q", paused=True, max_gpus=4))])
        loaded = store.load()
        assert loaded.nodes == (other, NODE)
        assert loaded.lost_nodes == ("n1",)
        assert loaded.cordoned == (("n0", Cordon(True, "ada", since_ms=3)), ("new", Cordon(by="ada", since_ms=2)))
        assert loaded.queues == (QueueSpec(name="a"), QueueSpec(name="q", paused=True, max_gpus=4))
        assert_consistent(store)
        append(store, [ev.NodeSeen(6, replace(NODE, cpu_milli=1)), ev.NodeUncordoned(6, other.name, "ada")])
        assert store.load().lost_nodes == ()
        assert store.load().cordoned == (("new", Cordon(by="ada", since_ms=2)),)
        assert_consistent(store)

    # ---- listings ----

    def test_filters(self, store: Store) -> None:
        append(store, [
            submitted("a1", 1_000, queue="q1", labels={"team": "x", "tier": "1"}),
            submitted("a2", 2_000, name="other", owner="bob", labels={"team": "x"}),
            submitted("b1", 3_000, queue="q1", array_id="arr", labels={"team": "y"}),
            submitted("B_", 3_000, array_id="arr"),
            cancelled("a1"),
        ])  # fmt: skip

        def ids(**query: object) -> str:
            return " ".join(j.id for j in store.jobs(JobQuery(**query)))  # type: ignore[arg-type]

        assert ids() == "b1 B_ a2 a1"
        assert ids(phases=(Phase.CANCELLED,)) == "a1"
        assert ids(phases=(Phase.CANCELLED, Phase.QUEUED, Phase.QUEUED)) == "b1 B_ a2 a1"
        assert ids(phases=(Phase.RUNNING,)) == ""
        assert ids(queue="q1") == "b1 a1"
        assert ids(owner="bob") == "a2"
        assert ids(name="other") == "a2"
        assert ids(array_id="arr") == "b1 B_"
        assert ids(labels=(("team", "x"),)) == "a2 a1"
        assert ids(labels=(("team", "x"), ("tier", "1"))) == "a1"
        assert ids(labels=(("team", "z"),)) == ""
        assert ids(id_prefix="a") == "a2 a1"
        assert ids(id_prefix="B_") == "B_"
        assert ids(id_prefix="b_") == ""
        assert ids(submitted_after_ms=1_000) == "b1 B_ a2"
        assert ids(submitted_after_ms=3_000) == ""
        assert ids(queue="q1", labels=(("team", "x"),), owner="ada", phases=(Phase.CANCELLED,), id_prefix="a") == "a1"
        assert ids(limit=2) == "b1 B_"

    @pytest.mark.parametrize(
        "query",
        [
            JobQuery(),
            JobQuery(phases=(Phase.QUEUED, Phase.CANCELLED)),
            JobQuery(labels=(("team", "x"),)),
            JobQuery(owner="ada", id_prefix="j"),
            JobQuery(submitted_after_ms=1_003),
        ],
        ids=lambda q: str(q).partition("(")[2][:30],
    )
    def test_pages_are_newest_first_and_join_up_to_the_whole(self, store: Store, query: JobQuery) -> None:
        append(store, [submitted(f"j{i:02}", 1_000 + i // 3, labels={"team": "xy"[i % 2]}) for i in range(40)])
        append(store, [cancelled(f"j{i:02}") for i in range(0, 40, 4)])
        whole = store.jobs(query)
        assert len(whole) >= 20
        assert list(whole) == sorted(whole, key=lambda j: (j.submitted_at_ms, j.id), reverse=True)
        pages: list[Job] = []
        while page := store.jobs(replace(query, limit=7, before=pages[-1].id if pages else None)):
            assert len(page) <= 7
            pages += page
        assert pages == list(whole)

    def test_nothing_comes_before_a_job_that_is_not_there(self, store: Store) -> None:
        append(store, [submitted("a")])
        assert store.jobs(JobQuery(before=JobId("zzz"))) == ()

    def test_an_edited_job_is_found_by_what_it_is_now(self, store: Store) -> None:
        append(store, [submitted("a", labels={"team": "a"})])
        spec = a_spec(labels={"team": "b"}, queue="other")
        append(store, [ev.JobEdited(5, JobId("a"), "ada", spec, ("labels", "queue"))])
        assert not store.jobs(JobQuery(labels=(("team", "a"),)))
        [job] = store.jobs(JobQuery(labels=(("team", "b"),), queue="other"))
        assert job.spec == spec
        assert_consistent(store)

    def test_counts(self, store: Store) -> None:
        append(store, [submitted("a", queue="q1"), submitted("b", queue="q1"), submitted("c"), cancelled("a")])
        assert store.count("phase") == {"QUEUED": 2, "CANCELLED": 1}
        assert store.count("queue") == {"q1": 1, "default": 1}

    def test_usage_sums_gpu_time_and_waits_by_queue_and_user(self, store: Store) -> None:
        append(store, [submitted("a", queue="q1"), submitted("b", queue="q1"), submitted("c", owner="bob")])
        append(store, [placed("a", 3_000), placed("b", 6_000)])
        outcome = Outcome(Phase.SUCCEEDED, Reason.COMPLETED)
        append(store, [ev.AttemptStopping(8_000, JobId("a"), 1, outcome)])
        append(store, [ev.AttemptEnded(9_000, JobId("a"), 1, Phase.SUCCEEDED)])
        assert list(store.usage(0, 10_000)) == [
            Usage("default", "bob", 1),
            Usage("q1", "ada", 2, 1, 0, 0, 750 * (6_000 + 4_000), 2, 2_000 + 5_000, 5_000),
        ]
        assert [(u.jobs, u.gpu_milli_ms) for u in store.usage(9_001, 11_000)] == [(1, 0), (1, 750 * 5_000)]

    # ---- samples ----

    def test_samples_are_kept_newest_last_and_bounded(self, store: Store) -> None:
        append(store, [submitted("a"), submitted("b")])
        made = [Sample(JobId("a"), i, 1, i, 9_999, 2, (("loss", 0.5), ("lr", float(i)))) for i in range(2_500)]
        for at in range(0, len(made), 100):
            store.add_samples(made[at : at + 100])
        other = Sample(JobId("b"), 1, 1, 2, 3, 4, (("loss", float("inf")),))
        store.add_samples([other, replace(other, job_id=JobId("unknown"))])
        store.add_samples([])
        kept = store.samples(JobId("a"), limit=10_000)
        assert list(kept) == made[-len(kept) :]
        assert 900 <= len(kept) <= 1_100
        assert list(store.samples(JobId("a"), limit=3)) == made[-3:]
        assert store.samples(JobId("b")) == (other,)
        assert store.samples(JobId("unknown")) == ()
        assert store.last_seq() == 2

    # ---- many threads ----

    def test_concurrent_appends_are_neither_lost_nor_doubled(self, store: Store) -> None:
        append(store, [submitted(f"j{i}") for i in range(8)])

        def work(thread: int) -> list[ev.Stored]:
            stored: list[ev.Stored] = []
            for i in range(20):
                stored += append(store, [held(f"j{thread}", i), held(f"j{(thread + 1) % 8}", i)]).stored
                stored += append(store, [submitted(f"t{thread}-{i}", i)]).stored
            return stored

        with ThreadPoolExecutor(8) as pool:
            acknowledged = [s for stored in pool.map(work, range(8)) for s in stored]
        assert len(acknowledged) == 8 * 20 * 3
        assert sorted(acknowledged, key=lambda s: s.seq) == list(store.read(8))
        assert_consistent(store)

    def test_a_refused_append_does_not_harm_those_beside_it(self, store: Store) -> None:
        store.append([submitted("a")])
        leader = store.lease("a", 10, now_ms=0)
        assert leader is not None

        def work(i: int) -> str:
            try:
                if i % 3 == 0:
                    store.append([held("a", i)], fence=leader.fence + 1)
                elif i % 3 == 1:
                    return "rejected" if store.append([held("nobody", i)]).rejected else "stored"
                store.append([held("a", i)], fence=leader.fence)
            except StaleFence:
                return "stale"
            return "stored"

        with ThreadPoolExecutor(6) as pool:
            outcomes = list(pool.map(work, range(60)))
        assert outcomes == ["stale", "rejected", "stored"] * 20
        assert store.last_seq() == 21
        assert_consistent(store)

    def test_readers_beside_a_writer_see_the_log_grow_only_at_its_end(self, store: Store) -> None:
        append(store, [submitted("a")])
        done = threading.Event()

        def follow() -> list[int]:
            seen: list[int] = []
            while not done.is_set():
                seen += [s.seq for s in store.read(len(seen))]
                loaded = store.load()
                assert [j.version for j in loaded.jobs] == [loaded.seq]
            return seen + [s.seq for s in store.read(len(seen))]

        with ThreadPoolExecutor(2) as pool:
            readers = [pool.submit(follow) for _ in range(2)]
            try:
                for i in range(60):
                    append(store, [held("a", i)])
            finally:
                done.set()
            assert [r.result(120) for r in readers] == [list(range(1, 62))] * 2
