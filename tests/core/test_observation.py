"""Sight: what observations add up to."""

from __future__ import annotations

from jobsched.core.launch import launch_key
from jobsched.core.observation import NO_NEWS, Observation, Progress, ReplicaReport, Seen, Sight
from jobsched.core.resources import JobId, NodeName

JOB = JobId("a")
KEY = launch_key(JOB, 1, "worker", 0, 0)


def ended(progress: Progress | None = None) -> ReplicaReport:
    return ReplicaReport(KEY, NodeName("n"), Seen.EXITED, exit_code=0, progress=progress)


def test_the_same_report_twice_is_news_once() -> None:
    sight = Sight()
    assert sight.fold(Observation(full=False, replicas=(ended(),)), 1)[0] == {JOB}
    assert sight.fold(Observation(full=False, replicas=(ended(),)), 2)[0] == set()
    assert sight.fold(NO_NEWS, 3) == (set(), set())
    assert sight.observed_at_ms == 3


def test_that_a_forgotten_replica_goes_is_no_news_and_nothing_is_remembered_of_it() -> None:
    sight = Sight()
    sight.fold(Observation(full=False, replicas=(ended(Progress(step=3)),)), 1)
    sight.forget((KEY,))
    assert sight.fold(Observation(full=False, gone=(KEY,)), 2)[0] == set()
    known = (sight.replicas, sight.by_job, sight.step_at_ms, sight.beat_at_ms, sight.absent_at_ms)
    assert not any(known)


def test_one_that_goes_unasked_is_news_and_absent() -> None:
    sight = Sight()
    sight.fold(Observation(full=False, replicas=(ended(),)), 1)
    assert sight.fold(Observation(full=True), 2)[0] == {JOB}
    assert sight.absent_at_ms == {KEY: 2}


def test_one_that_the_engine_has_kept_all_the_same_is_seen_again() -> None:
    sight = Sight()
    sight.fold(Observation(full=False, replicas=(ended(),)), 1)
    sight.forget((KEY,))
    assert sight.fold(Observation(full=True, replicas=(ended(),)), 2)[0] == {JOB}
    assert sight.by_job == {JOB: {KEY}}
