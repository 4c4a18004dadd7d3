"""Wishes about jobs that are there."""

from __future__ import annotations

import pytest

from jobsched.core.job import Phase, Reason
from jobsched.errors import Conflict, NotFound, SpecError, Unplaceable, UsageError
from tests.stage import Stage, a_spec


def test_priority_classes(stage: Stage) -> None:
    high = stage.submit(priority="high")
    assert (high.priority, high.spec.priority, high.spec.priority_class) == (100, 100, "high")
    assert stage.service.set_priority(high.id, "low").job.priority == -100
    with pytest.raises(SpecError) as refused:
        stage.submit(priority="hihg")
    (problem,) = refused.value.problems
    assert (problem.message, problem.field) == ("there is no priority class 'hihg'", "priority")
    assert problem.hint.startswith("did you mean high? classes of this server: low (-100), normal (0), high (100)")
    with pytest.raises(SpecError):
        stage.service.set_priority(high.id, "urgent")
    with pytest.raises(SpecError):
        stage.service.plan(a_spec(priority="urgent"))


def test_cancel_is_idempotent_until_the_job_ends_otherwise(stage: Stage) -> None:
    job = stage.submit()
    assert stage.service.cancel(job.id, by="bob").job.cancel_by == "bob"
    seq = stage.store.last_seq()
    assert stage.service.cancel(job.id, by="eve").job.cancel_by == "bob"
    assert stage.store.last_seq() == seq
    done = stage.end(stage.run(stage.submit(name="done")))
    with pytest.raises(Conflict, match="SUCCEEDED"):
        stage.service.cancel(done.id)


def test_every_wish_on_an_ended_job_is_a_conflict_that_names_its_phase(stage: Stage) -> None:
    job = stage.end(stage.run(stage.submit()), Phase.FAILED, 1)
    service, seq = stage.service, stage.store.last_seq()
    for wish in (
        service.hold, service.release, service.restart,
        lambda ref: service.scale(ref, {"worker": 1}), lambda ref: service.set_priority(ref, 3),
    ):  # fmt: skip
        with pytest.raises(Conflict, match="FAILED"):
            wish(job.id)
    assert stage.store.last_seq() == seq


def test_hold_and_release(stage: Stage) -> None:
    job = stage.submit()
    assert stage.service.hold(job.id).job.held
    seq = stage.store.last_seq()
    stage.service.hold(job.id)
    assert stage.store.last_seq() == seq
    assert not stage.service.release(job.id).job.held
    stage.service.release(job.id)
    assert stage.store.last_seq() == seq + 1
    running = stage.run(job)
    assert stage.service.hold(running.id).job.stop_wish is Reason.NONE
    assert stage.service.hold(running.id, stop=True).job.stop_wish is Reason.HELD


def test_scale_stays_within_the_bounds_of_elastic_roles(stage: Stage) -> None:
    roles = {"worker": {"command": "x", "replicas": "1..3"}, "ps": {"command": "y", "replicas": 2}}
    job = stage.submit(roles=roles)
    assert stage.service.scale(job.id, {"worker": 2}).job.wanted == {"worker": 2}
    for wanted, words in (({"worker": 4}, "1 to 3"), ({"ps": 3}, "fixed"), ({"chief": 1}, "no role"), ({}, "needs")):
        with pytest.raises(UsageError, match=words):
            stage.service.scale(job.id, wanted)
    assert stage.job(job.id).wanted == {"worker": 2}


def test_priority_and_restart(stage: Stage) -> None:
    job = stage.run(stage.submit())
    assert stage.service.set_priority(job.id, 7).job.priority == 7
    assert stage.service.restart(job.id).job.stop_wish is Reason.RESTART_REQUESTED


def test_a_wish_is_tried_again_when_the_job_moves_meanwhile(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    job = stage.submit()
    append = stage.store.append

    def overtaken(*args: object, **kwargs: object) -> object:
        monkeypatch.undo()
        stage.run(job)
        return append(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(stage.store, "append", overtaken)
    assert stage.service.cancel(job.id).job.phase is Phase.RUNNING
    assert stage.job(job.id).cancel_by


def test_an_edit_lays_changes_over_the_spec_and_says_what_they_take(stage: Stage) -> None:
    job = stage.run(stage.submit())
    told = stage.service.edit(job.id, {"priority": "7", "time_limit": "2h"}, by="ann")
    assert (told.fields, told.restart, told.job.priority) == (("priority", "time_limit"), False, 7)
    assert stage.job(job.id).phase is Phase.RUNNING
    told = stage.service.edit(job.id, {"env.LR": "0.1", "roles.worker.command": "new"}, by="ann")
    assert set(told.fields) == {"env", "roles.worker.command"}
    assert told.restart
    assert told.job.next_spec is not None
    assert told.job.next_spec.env["LR"] == "0.1"


def test_the_same_edit_again_changes_nothing(stage: Stage) -> None:
    job = stage.submit()
    stage.service.edit(job.id, {"labels.team": "vision"})
    before = stage.job(job.id)
    again = stage.service.edit(job.id, {"labels.team": "vision"}, expected=0)
    assert (again.fields, again.job.version, again.job.edits) == ((), before.version, 1)


def test_a_dry_run_only_says(stage: Stage) -> None:
    job = stage.run(stage.submit())
    told = stage.service.edit(job.id, {"roles.worker.command": "new"}, dry_run=True)
    assert told.restart
    assert stage.job(job.id).version == told.job.version == job.version


def test_an_edit_of_what_was_edited_since_is_refused(stage: Stage) -> None:
    job = stage.submit()
    stage.service.edit(job.id, {"priority": "1"}, expected=0)
    with pytest.raises(Conflict, match="edited since: 1 edits, not 0"):
        stage.service.edit(job.id, {"priority": "2"}, expected=0)
    stage.service.edit(job.id, {"priority": "2"}, expected=1)


def test_a_priority_is_set_even_where_the_spec_says_it_already(stage: Stage) -> None:
    job = stage.submit(priority=5)
    stage.service.set_priority(job.id, 9)
    told = stage.service.edit(job.id, {"priority": "5"})
    assert told.fields == ("priority",)
    assert stage.job(job.id).priority == 5
    stage.service.set_priority(job.id, 9)
    stage.service.edit(job.id, {"labels.a": "b"})
    assert stage.job(job.id).priority == 9, "nobody asked for another one"


@pytest.mark.parametrize(("changes", "error", "says"), [
    ({"name": "other"}, UsageError, "name cannot be changed"),
    ({"array": "0-3"}, UsageError, "array cannot be changed"),
    ({"after": "[x]"}, UsageError, "after cannot be changed"),
    ({"queue": "defualt"}, NotFound, "there is no queue"),
    ({"roles.worker.gpu": "any:64"}, Unplaceable, "64"),
    ({"roles.worker.gpus": "1"}, SpecError, "gpus"),
    ({"priority": "urgentest"}, SpecError, "no priority class"),
    ({"": "1"}, SpecError, "FIELD=VALUE"),
])  # fmt: skip
def test_what_cannot_be_edited_is_refused(
    stage: Stage, changes: dict[str, object], error: type[Exception], says: str
) -> None:
    job = stage.submit()
    with pytest.raises(error, match=says):
        stage.service.edit(job.id, changes)
    assert stage.job(job.id).version == job.version


def test_an_ended_job_is_not_edited(stage: Stage) -> None:
    job = stage.end(stage.run(stage.submit()))
    with pytest.raises(Conflict, match="cannot be edited"):
        stage.service.edit(job.id, {"priority": "7"})
