"""Values: a changed copy is what `dataclasses.replace` makes, and the original stays as it was."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from jobsched.core.job import Job, Phase, Replica
from jobsched.core.resources import JobId
from jobsched.core.values import changed
from tests.world import a_spec


def test_a_changed_copy_differs_in_what_was_given_and_nothing_else() -> None:
    job = Job(JobId("a"), "a", "me", a_spec(), 1, labels={"team": "x"})
    before = replace(job)
    assert changed(job) == job
    assert changed(job) is not job
    assert changed(job, {"phase": Phase.RUNNING, "version": 7}) == replace(job, phase=Phase.RUNNING, version=7)
    assert changed(job, version=7, phase=Phase.RUNNING) == replace(job, phase=Phase.RUNNING, version=7)
    assert job == before
    copy = changed(job, attempt=2)
    assert all(getattr(copy, f.name) is getattr(job, f.name) for f in fields(Job) if f.name != "attempt")


def test_types_with_fields_of_the_same_names_are_told_apart() -> None:
    replica = changed(Replica("worker", 0, None), index=3)
    assert (type(replica), replica.index) == (Replica, 3)


def test_a_field_that_is_not_there_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="has no field"):
        changed(Replica("worker", 0, None), place=3)
