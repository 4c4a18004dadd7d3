"""Ends of running jobs, kept in order: the same as asking about everybody each time."""

from __future__ import annotations

from random import Random

import pytest

from jobsched.core.job import Job, Phase
from jobsched.core.policies import ends as module
from jobsched.core.policies.ends import Ends
from jobsched.core.policies.estimate import Estimates
from jobsched.core.resources import JobId
from jobsched.core.values import changed
from tests.core.test_estimate import a_job


class Told(Estimates):
    """A job is taken to end a while after it began, and later and later once it is overdue."""

    asked = 0

    def left_ms(self, job: Job, now_ms: int, quantile: float = 0.5) -> int:
        self.asked += 1
        ran = now_ms - job.running_since_ms
        return max(1_000 * int(job.name) - ran, ran // 2, 1)


class All:
    """The same, slowly: every running job is looked at."""

    def __init__(self) -> None:
        self._known: dict[JobId, tuple[int, int, int]] = {}

    def soonest(self, most: int, jobs: dict[JobId, Job], estimates: Estimates, now_ms: int) -> list[tuple[int, JobId]]:
        found = []
        for job in jobs.values():
            if not job.phase.runs:
                continue
            known = self._known.get(job.id)
            if known is None or known[0] != job.attempt or now_ms >= known[2]:
                left = estimates.left_ms(job, now_ms)
                known = self._known[job.id] = (job.attempt, now_ms + left, now_ms + max(1, left // 8))
            found.append((known[1], job.id))
        return sorted(found)[:most]


def running(job: Job, at_ms: int) -> Job:
    return changed(job, phase=Phase.RUNNING, attempt=job.attempt + 1, running_since_ms=at_ms)


@pytest.mark.parametrize("seed", range(5))
def test_it_knows_what_asking_everybody_tells(seed: int) -> None:
    random, ends, slow = Random(seed), Ends(), All()
    jobs: dict[JobId, Job] = {}
    now_ms = 0
    for _ in range(300):
        now_ms += random.randrange(1, 3_000)
        for _ in range(random.randrange(3)):
            job = running(a_job(name=str(random.randrange(1, 60))), now_ms)
            jobs[job.id] = job
            ends.begins(job.id)
        for job in random.sample(list(jobs.values()), min(len(jobs), random.randrange(3))):
            fate = random.random()
            if fate < 0.4:
                del jobs[job.id]
            elif fate < 0.7:  # preempted; it may start again
                jobs[job.id] = changed(job, phase=Phase.QUEUED)
            elif not job.phase.runs:
                jobs[job.id] = running(job, now_ms)
                ends.begins(job.id)
            else:
                ends.begins(job.id)  # from starting to running: no other attempt
        if random.random() < 0.6:
            most = random.randrange(1, 20)
            found = [(end.at_ms, end.job_id) for end in ends.soonest(most, jobs, Told(), now_ms)]
            assert found == slow.soonest(most, jobs, Told(), now_ms)


def test_a_question_costs_what_is_due_and_no_more_than_so_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REVISED", 7)
    ends, estimates = Ends(), Told()
    jobs = {job.id: running(job, 0) for job in (a_job(name="800") for _ in range(50))}
    for job_id in jobs:
        ends.begins(job_id)
    ends.soonest(5, jobs, estimates, 0)
    assert estimates.asked == 50
    ends.soonest(5, jobs, estimates, 99_000)
    assert estimates.asked == 50, "an eighth of the time is not over"
    for questions in range(1, 8):
        ends.soonest(5, jobs, estimates, 100_000)
        assert estimates.asked == 50 + 7 * questions
    ends.soonest(5, jobs, estimates, 100_000)
    assert estimates.asked == 100, "everybody's turn comes"


def test_what_is_out_of_date_does_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STALE", 10)
    ends, jobs = Ends(), {}
    for at_ms in range(0, 100_000, 100):
        job = running(a_job(name="1000"), at_ms)
        jobs = {job.id: job}
        ends.begins(job.id)
        assert [end.job_id for end in ends.soonest(5, jobs, Told(), at_ms)] == [job.id]
    assert len(ends._first) < 20
    assert len(ends._due) < 20
