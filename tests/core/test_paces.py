"""What each kind of GPU is worth to a job, from the paces that it and others reported."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter

from jobsched.core.job import Job
from jobsched.core.policies.paces import FAMILIES_NOTED, Paces, PacesNote
from jobsched.core.resources import JobId
from tests.world import a_spec


def a_job(name: str, program: str) -> Job:
    spec = a_spec(roles={"worker": {"command": program, "gpu": "any:1"}})
    return Job(id=JobId(name), name=name, owner="me", spec=spec, submitted_at_ms=0)


def ratio(paces: Paces, job: Job, fast: str = "v100", slow: str = "k80") -> float:
    return paces.speed(job, fast) / paces.speed(job, slow)


def test_nothing_known_all_kinds_are_alike() -> None:
    assert ratio(Paces(), a_job("a", "x")) == 1.0


def test_what_a_family_showed_holds_for_the_next_of_it() -> None:
    paces = Paces()
    for n in range(20):
        paces.note(a_job(f"v{n}", "resnet"), "v100", 10.0)
        paces.note(a_job(f"k{n}", "resnet"), "k80", 80.0)
    assert ratio(paces, a_job("new", "resnet")) == pytest.approx(8.0, rel=0.1)


def test_another_family_leans_on_what_kinds_did_for_all_until_it_shows_its_own() -> None:
    paces = Paces()
    for n in range(20):
        paces.note(a_job(f"v{n}", "resnet"), "v100", 10.0)
        paces.note(a_job(f"k{n}", "resnet"), "k80", 40.0)
    other = a_job("o", "a3c")
    assert ratio(paces, other) == pytest.approx(4.0, rel=0.1)
    paces.note(other, "k80", 200.0)
    assert ratio(paces, other) == pytest.approx(4.0, rel=0.1)  # one kind alone says nothing of the other
    paces.note(other, "v100", 100.0)
    assert 2.0 <= ratio(paces, other) < 2.6
    assert paces.last(other.id) == "v100"


def test_a_job_that_ended_leaves_its_paces_to_its_family_and_copies_forget_alone() -> None:
    paces = Paces()
    one = a_job("a", "x")
    paces.note(one, "v100", 10.0)
    paces.note(one, "k80", 20.0)
    copy = paces.as_they_are()
    copy.ended(one.id)
    assert (copy.last(one.id), paces.last(one.id)) == ("", "k80")
    paces.ended(one.id)
    assert ratio(paces, a_job("b", "x")) > 1.3


def test_the_next_leader_knows_what_was_noted() -> None:
    paces, kept = Paces(), TypeAdapter(PacesNote)
    for n in range(FAMILIES_NOTED + 50):
        paces.note(a_job(f"v{n}", f"x{n}"), "v100", 10.0)
    one = a_job("a", "resnet")
    paces.note(one, "v100", 10.0)
    paces.note(one, "k80", 70.0)
    paces.note(a_job("o", "resnet"), "k80", 80.0)
    note = paces.noted()
    after = Paces.of(kept.validate_json(kept.dump_json(note)))
    assert after.noted() == note
    assert len(note.families) == FAMILIES_NOTED
    for job in (one, a_job("b", "resnet"), a_job("c", "a3c")):
        assert ratio(after, job) == ratio(paces, job) != 1.0
    assert after.last(one.id) == "k80"
    for each in (paces, after):  # said again, it counts once
        each.note(one, "k80", 60.0)
    assert ratio(after, a_job("b", "resnet")) == ratio(paces, a_job("b", "resnet"))
