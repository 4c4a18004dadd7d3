"""Submitting: ids, names, arrays, dependencies; what is refused."""

from __future__ import annotations

import pytest

from jobsched.core.job import Phase
from jobsched.errors import Conflict, NotFound, SpecError, Unplaceable
from jobsched.ports import JobQuery
from jobsched.service import MAX_ARRAY
from tests.stage import Stage, a_spec


def test_a_submitted_job_waits_and_the_controller_is_woken(stage: Stage) -> None:
    job = stage.submit()
    assert (job.phase, job.name, job.owner) == (Phase.QUEUED, "bert", "ann")
    assert stage.live.woken == 1
    assert stage.job(job.id) == job


def test_a_job_without_a_name_gets_one(stage: Stage) -> None:
    name = stage.submit(name=None).name
    adjective, noun, tag = name.split("-")
    assert adjective
    assert noun
    assert int(tag, 16) >= 0
    assert len(tag) == 4


def test_ids_sort_in_the_order_of_submission_even_within_a_millisecond(stage: Stage) -> None:
    ids = [stage.submit().id for _ in range(50)]
    assert ids == sorted(set(ids))


def test_the_same_request_gives_the_same_job_once(stage: Stage) -> None:
    first = stage.service.submit(a_spec(name=None), owner="ann", request_id="r1")
    again = stage.service.submit(a_spec(name=None), owner="ann", request_id="r1")
    other = stage.service.submit(a_spec(name=None), owner="bob", request_id="r1")
    assert again.jobs[0].job.id == first.jobs[0].job.id != other.jobs[0].job.id
    assert len(stage.store.jobs(JobQuery())) == 2


def test_an_unknown_queue_is_refused_with_a_suggestion(stage: Stage) -> None:
    with pytest.raises(NotFound) as caught:
        stage.submit(queue="defualt")
    assert "did you mean default?" in caught.value.hint


def test_what_can_never_fit_is_refused_unless_held(stage: Stage) -> None:
    roles = {"worker": {"command": "true", "gpu": "any:64"}}
    with pytest.raises(Unplaceable):
        stage.submit(roles=roles)
    assert stage.service.submit(a_spec(roles=roles), hold=True).jobs[0].job.held
    assert Stage(nodes=0).submit(roles=roles).phase is Phase.QUEUED  # nothing is known of the cluster yet


def test_a_variable_without_a_value_is_refused_with_its_place(stage: Stage) -> None:
    with pytest.raises(SpecError) as caught:
        stage.submit(env={"A": None}, roles={"worker": {"command": "true", "env": {"B": None}}})
    assert [p.field for p in caught.value.problems] == ["env.A", "roles.worker.env.B"]


def test_an_array_is_one_job_per_index(stage: Stage) -> None:
    spec = a_spec(array="0-4%2")
    page = stage.service.submit(spec, owner="ann", request_id="sweep")
    jobs = [answer.job for answer in page.jobs]
    assert [j.name for j in jobs] == [f"bert-{i}" for i in range(5)]
    assert [j.array_index for j in jobs] == list(range(5))
    assert len({j.array_id for j in jobs}) == 1
    assert jobs[3].spec.array is not None
    assert (jobs[3].spec.array.indices, jobs[3].spec.array.max_parallel) == ((3,), 2)
    assert [a.job.id for a in stage.service.submit(spec, owner="ann", request_id="sweep").jobs] == [j.id for j in jobs]


@pytest.mark.parametrize(("name", "array"), [("x" * 52, "0-9"), ("big", f"0-{MAX_ARRAY}")])
def test_an_array_that_cannot_be_is_refused(stage: Stage, name: str, array: str) -> None:
    with pytest.raises(SpecError):
        stage.submit(name=name, array=array)
    assert not stage.store.jobs(JobQuery())


def test_dependencies_wait_are_met_or_refuse(stage: Stage) -> None:
    first = stage.submit(name="first")
    assert stage.submit(name="second", after=["first"]).waiting_for == (first.id,)
    done = stage.end(stage.run(first))
    assert stage.submit(name="third", after=[done.id]).waiting_for == ()
    failed = stage.end(stage.run(stage.submit(name="bad")), Phase.FAILED, 1)
    with pytest.raises(Conflict, match="failed"):
        stage.submit(after=[failed.id])
    with pytest.raises(NotFound) as caught:
        stage.submit(after=["frist"])
    assert "first" in caught.value.hint
    array = [a.job for a in stage.service.submit(a_spec(name="sweep", array="0-2")).jobs]
    assert set(stage.submit(after=[array[0].array_id]).waiting_for) == {j.id for j in array}


def test_a_taken_name_fails_is_skipped_or_replaced(stage: Stage) -> None:
    first = stage.submit()
    submit = stage.service.submit
    with pytest.raises(Conflict):
        submit(a_spec(), owner="ann", if_exists="fail")
    assert submit(a_spec(), owner="ann", if_exists="skip").jobs[0].job.id == first.id
    assert submit(a_spec(), owner="bob", if_exists="fail").jobs[0].job.id != first.id  # names belong to their owner
    newer = submit(a_spec(), owner="ann", request_id="again", if_exists="replace").jobs[0].job
    assert stage.job(first.id).cancel_by == "ann"
    assert stage.service.submit(
        a_spec(), owner="ann", request_id="again", if_exists="replace"
    ).jobs[0].job.id == newer.id  # asked twice by a client that lost the first answer
    assert not stage.job(newer.id).cancel_by


def test_an_array_is_replaced_as_a_whole(stage: Stage) -> None:
    old = [a.job for a in stage.service.submit(a_spec(array="0-2"), owner="ann").jobs]
    stage.service.submit(a_spec(array="0-1"), owner="ann", if_exists="replace")
    assert all(stage.job(job.id).cancel_by for job in old)
