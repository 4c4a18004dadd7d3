"""Run times learned from the past: quantiles, the Gittins index, families and campaigns, reported progress."""

from __future__ import annotations

from itertools import pairwise

import pytest

from jobsched.core.job import Job, Phase
from jobsched.core.policies.estimate import Estimates
from jobsched.core.policies.families import family_of
from jobsched.core.policies.survival import EDGES_MS, bucket_of
from jobsched.core.resources import JobId
from jobsched.core.values import changed
from jobsched.spec.job import JobSpec

MINUTE_MS = 60_000
HOUR_MS = 60 * MINUTE_MS


def a_job(name: str = "", at_ms: int = 0, owner: str = "me", gpus: int = 1, **fields: object) -> Job:
    given = {"name": name} if name else {}
    spec = JobSpec.model_validate(
        {"roles": {"worker": {"command": "python train.py --lr 1", "gpu": f"any:{gpus}"}}, **given, **fields}
    )
    serial = next(_SERIAL)
    return Job(id=JobId(f"j{serial:05}"), name=name or "x", owner=owner, spec=spec, submitted_at_ms=at_ms, version=1)


_SERIAL = iter(range(1_000_000))


def taught(*runs_ms: int, owner: str = "me") -> Estimates:
    """Estimates that saw jobs of these run times, each of a campaign of its own."""
    estimates = Estimates()
    for n, run_ms in enumerate(runs_ms):
        end(estimates, a_job(owner=owner, at_ms=n * 10 * HOUR_MS), run_ms)
    return estimates


def end(estimates: Estimates, job: Job, run_ms: int) -> None:
    estimates.submitted(job)
    estimates.ended(_ran(job, run_ms, Phase.SUCCEEDED))


def _ran(job: Job, run_ms: int, phase: Phase) -> Job:
    return changed(job, ran_ms=run_ms, phase=phase)


def test_quantiles_come_near_what_was_seen() -> None:
    estimates = taught(*[50 * MINUTE_MS] * 50, *[10 * HOUR_MS] * 50)
    job = a_job(at_ms=10**9)
    estimates.submitted(job)
    curve = estimates.curve(job)
    assert curve.seen == 100
    assert curve.left_ms(0, 0.25) < 64 * MINUTE_MS
    assert 8 * HOUR_MS < curve.left_ms(0, 0.9) < 18 * HOUR_MS
    # one that has run for two hours is one of the long ones
    assert 5 * HOUR_MS < curve.left_ms(2 * HOUR_MS, 0.5) + 2 * HOUR_MS < 18 * HOUR_MS
    assert curve.left_ms(0, 0.1) <= curve.left_ms(0, 0.5) <= curve.left_ms(0, 0.9)


def test_without_any_past_the_time_limit_counts() -> None:
    estimates = Estimates()
    job = a_job(time_limit="2h")
    estimates.submitted(job)
    assert estimates.left_ms(job, 0) == 2 * HOUR_MS
    free = a_job()
    estimates.submitted(free)
    assert estimates.left_ms(free, 0) > 0


def test_an_estimate_never_exceeds_the_limit() -> None:
    estimates = taught(*[10 * HOUR_MS] * 20)
    job = a_job(time_limit="1h", at_ms=10**9)
    estimates.submitted(job)
    assert estimates.left_ms(job, 0, 0.9) == HOUR_MS


def test_the_index_falls_with_age_when_nothing_is_known() -> None:
    """Least attained service is what is left without knowledge."""
    estimates = Estimates()
    job = a_job()
    estimates.submitted(job)
    rate = estimates.curve(job).index[0]
    assert all(young >= old for young, old in pairwise(rate[1:]))
    assert rate[0] > 100 * rate[-1]


def test_a_job_near_the_usual_end_is_worth_more_than_a_fresh_one() -> None:
    estimates = taught(*[40 * HOUR_MS] * 50)
    job = a_job(at_ms=10**9)
    estimates.submitted(job)
    rate = estimates.curve(job).index[0]
    assert rate[bucket_of(35 * HOUR_MS)] > 2 * rate[0]


def test_siblings_that_still_run_teach_before_they_end() -> None:
    estimates = taught(*[5 * MINUTE_MS] * 30)
    siblings = [a_job(at_ms=10**9) for _ in range(10)]
    for job in siblings:
        estimates.submitted(job)
    before = estimates.curve(siblings[0]).index[0][0]
    for job in siblings[1:]:
        estimates.ran(job, 20 * HOUR_MS)
    assert estimates.curve(siblings[0]).index[0][0] < before / 2


def test_families_tell_users_and_programs_apart_but_not_a_sweeps_arguments() -> None:
    same = {"roles": {"worker": {"command": "python train.py --lr 2", "gpu": "any:1"}}}
    other = {"roles": {"worker": {"command": "python eval.py", "gpu": "any:1"}}}
    assert family_of(a_job()) == family_of(a_job(**same))
    assert family_of(a_job()) != family_of(a_job(**other))
    assert family_of(a_job()) != family_of(a_job(owner="you"))
    assert family_of(a_job()) != family_of(a_job(gpus=2))
    estimates = taught(*[MINUTE_MS // 2] * 40, owner="quick")
    for n in range(40):
        end(estimates, a_job(owner="slow", at_ms=n * 10 * HOUR_MS), 30 * HOUR_MS)
    quick, slow = a_job(owner="quick", at_ms=10**10), a_job(owner="slow", at_ms=10**10)
    for job in (quick, slow):
        estimates.submitted(job)
    assert estimates.left_ms(quick, 0) < 2 * MINUTE_MS < 10 * HOUR_MS < estimates.left_ms(slow, 0)


def test_reported_progress_replaces_the_family() -> None:
    estimates = taught(*[MINUTE_MS] * 20)
    job = changed(a_job(), phase=Phase.RUNNING, attempt=1, running_since_ms=0)
    estimates.submitted(job)
    estimates.reported(job, 0, 1_000, 0)
    estimates.reported(job, 1, 1_000, 10_000)
    assert estimates.reported_left_ms(job, 10_000) is None  # ten seconds say little
    estimates.reported(job, 100, 1_000, 100_000)
    assert estimates.left_ms(job, 100_000) == 900_000
    assert estimates.left_ms(job, 150_000) == 850_000
    again = changed(job, attempt=2)
    estimates.reported(again, 100, 1_000, 200_000)
    assert estimates.reported_left_ms(again, 200_000) == 900_000  # as fast as before, until it is known better
    estimates.reported(again, 200, 1_000, 400_000)
    assert estimates.reported_left_ms(again, 400_000) == 1_600_000


def test_what_never_ran_teaches_nothing() -> None:
    estimates = taught(*[HOUR_MS] * 5)
    job, probe = a_job(at_ms=10**9), a_job(at_ms=10**9)
    estimates.submitted(probe)
    before = estimates.curve(probe)
    estimates.submitted(job)
    estimates.ended(_ran(job, 0, Phase.CANCELLED))
    assert estimates.curve(probe) is before


@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.9])
def test_quantiles_are_positive_from_every_age(quantile: float) -> None:
    estimates = taught(*(edge + 1 for edge in EDGES_MS))
    job = a_job(at_ms=10**12)
    estimates.submitted(job)
    for edge in EDGES_MS:
        assert estimates.curve(job).left_ms(edge, quantile) >= 0
        assert estimates.curve(job).mean_left_ms(edge) > 0


def guessed(runs: list[tuple[int, int]], owner: str = "me") -> Estimates:
    """Estimates that saw jobs of these (guess, run time)."""
    estimates = Estimates()
    for n, (guess_ms, run_ms) in enumerate(runs):
        end(estimates, a_job(owner=owner, at_ms=n * 10 * HOUR_MS, expected=f"{guess_ms // 1_000}s"), run_ms)
    return estimates


def expecting(estimates: Estimates, guess_ms: int, owner: str = "me") -> Job:
    job = a_job(owner=owner, at_ms=10**10, expected=f"{guess_ms // 1_000}s")
    estimates.submitted(job)
    return job


@pytest.mark.parametrize("guess_ms", [5 * MINUTE_MS, HOUR_MS, 30 * HOUR_MS])
def test_a_guess_is_believed_before_anything_was_seen(guess_ms: int) -> None:
    estimates = Estimates()
    left = estimates.left_ms(expecting(estimates, guess_ms), 0)
    assert 0.7 * guess_ms < left < 1.4 * guess_ms


def test_who_always_guesses_ten_times_too_much_is_known_for_it() -> None:
    estimates = guessed([(10 * HOUR_MS << n % 4, HOUR_MS << n % 4) for n in range(60)])
    left = estimates.left_ms(expecting(estimates, 40 * HOUR_MS), 0)
    assert 2 * HOUR_MS < left < 8 * HOUR_MS


def test_a_wild_guess_does_not_hide_what_the_like_do() -> None:
    """Guesses of all kinds of jobs are off by any factor; jobs of this user always run for twenty hours."""
    estimates = guessed([(HOUR_MS << n % 9, HOUR_MS << 8 - n % 9) for n in range(90)], owner="others")
    for n in range(30):
        end(estimates, a_job(at_ms=n * 10 * HOUR_MS, expected="20h"), 20 * HOUR_MS)
    assert 10 * HOUR_MS < estimates.left_ms(expecting(estimates, 1_000 * HOUR_MS), 0) < 40 * HOUR_MS
    assert 10 * HOUR_MS < estimates.left_ms(expecting(estimates, HOUR_MS), 0) < 40 * HOUR_MS


def test_one_that_runs_on_past_its_guess_is_expected_to_run_longer() -> None:
    estimates = guessed([(HOUR_MS, HOUR_MS)] * 40 + [(HOUR_MS, 20 * HOUR_MS)] * 10)
    job = expecting(estimates, HOUR_MS)
    curve = estimates.curve(job)
    assert curve.left_ms(0, 0.5) < 2 * HOUR_MS
    assert curve.left_ms(5 * HOUR_MS, 0.5) > 5 * HOUR_MS
