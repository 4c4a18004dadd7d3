"""What happened, in words."""

from __future__ import annotations

from jobsched.core import events as ev
from jobsched.core.explain import headline
from jobsched.core.job import Phase
from jobsched.core.resources import JobId
from jobsched.core.story import sentence, story
from jobsched.sim.backend import Script
from tests.world import World


def test_the_story_tells_a_failure_and_its_cause() -> None:
    world = World(scripts=lambda launch: Script(run_ms=100, exit_code=3))
    job_id = world.submit()
    job = world.run_to_phase(job_id, Phase.FAILED)
    text = "\n".join(story(world.store.history(job_id)))
    for part in ("submitted by me", "placed on n1", "worker/0 ended with code 3", "FAILED"):
        assert part in text
    assert job.cause is not None
    assert (job.cause.message, job.cause.failure_class) == ("worker/0 exited with code 3", "user")
    assert headline(job) == "worker/0 exited with code 3"


def test_every_event_kind_has_a_sentence_or_is_known_to_need_none() -> None:
    silent = {"ReplicasStarted", "ReplicasGone", "FailuresForgiven", "DependencyMet"}
    world = World(scripts=lambda launch: Script(run_ms=100))
    job_id = world.submit()
    world.wish(ev.JobPriorityChanged(1, job_id, "me", 4))
    world.run_to_phase(job_id, Phase.SUCCEEDED)
    for stored in world.store.history(job_id):
        assert sentence(stored.event) or stored.event.kind in silent


def test_replicas_that_end_alike_share_a_line_and_no_time_is_before_the_first() -> None:
    job = JobId("j")
    ends = [ev.ReplicaExited(7, job, 1, "worker", i, exit_code=None, signal=15) for i in range(6)]
    told = [ev.JobHeld(5, job, "ada"), *ends, ev.JobReleased(1, job, "ada")]
    assert story([ev.Stored(seq, event) for seq, event in enumerate(told)]) == (
        "    +0.0s  held by ada",
        "    +0.0s  worker/0, worker/1, worker/2, worker/3 and 2 more ended with signal 15",
        "    +0.0s  released by ada",
    )
