"""The use cases, over a memory store and a live view that folds on demand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from jobsched.core import events as ev
from jobsched.core.job import Phase, Reason
from jobsched.core.launch import launch_key
from jobsched.core.observation import Incident
from jobsched.core.resources import JobId, NodeName
from jobsched.errors import Conflict, NotFound, SpecError, Unplaceable, UsageError
from jobsched.ports import OWN_METRICS, JobQuery, Sample
from jobsched.service import LATELY_MS, MAX_ARRAY
from tests.stage import Stage, a_spec


@pytest.fixture
def stage() -> Stage:
    return Stage()


# ---- submitting ----


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


def test_a_plan_changes_nothing(stage: Stage) -> None:
    before = stage.store.last_seq()
    assert stage.service.plan(a_spec()).code == 0
    assert stage.service.plan(a_spec(roles={"worker": {"command": "x", "gpu": "any:64"}})).code == 8
    assert stage.store.last_seq() == before


# ---- finding ----


def test_references(stage: Stage) -> None:
    old, new = stage.submit(), stage.submit()
    other = stage.service.submit(a_spec(name="gpt"), owner="bob").jobs[0].job
    resolve = stage.service.resolve
    assert resolve(old.id).id == resolve(old.id.upper()).id == old.id
    assert resolve("bert").id == new.id
    assert resolve("@last").id == other.id
    assert resolve("@last", owner="ann").id == new.id
    unique = next(n for n in range(4, 27) if not new.id.startswith(old.id[:n]) and not other.id.startswith(old.id[:n]))
    assert resolve(old.id[:unique]).id == old.id
    with pytest.raises(Conflict) as caught:
        resolve(old.id[:6])
    assert old.id in caught.value.hint
    with pytest.raises(NotFound, match="bret") as missing:
        resolve("bret")
    assert "bert" in missing.value.hint


@pytest.mark.parametrize("ref", ["", "@last", "nothing", "01k", "0" * 26, "../..", "é\0"])
def test_a_reference_to_nothing_is_not_found(stage: Stage, ref: str) -> None:
    with pytest.raises(NotFound):
        stage.service.get(ref)


def test_pages_follow_one_another(stage: Stage) -> None:
    ids = [stage.submit().id for _ in range(5)]
    page = stage.service.jobs(JobQuery(limit=2))
    assert ([a.job.id for a in page.jobs], page.more) == (ids[:2:-1], True)
    rest = stage.service.jobs(JobQuery(limit=3, before=page.jobs[-1].job.id))
    assert ([a.job.id for a in rest.jobs], rest.more) == (ids[2::-1], False)


def test_a_waiting_job_says_why(stage: Stage) -> None:
    whole = {"worker": {"command": "x", "gpu": "any:4"}}
    stage.run(stage.submit(name="first", roles=whole))
    waiting = stage.submit(name="second", roles=whole)
    answer = stage.service.why(waiting.id)
    assert answer.verdict is not None
    assert answer.verdict.reasons[0].reason is Reason.RESOURCES
    assert "0 of 4" in answer.headline
    assert "submitted by ann" in answer.story[0]
    listed = {a.job.id: a for a in stage.service.jobs(JobQuery()).jobs}
    assert listed[waiting.id].headline == answer.headline


def test_why_and_plan_say_when_a_job_starts(stage: Stage) -> None:
    """Half an hour is left of the limit of the one that runs; nothing is known of one without."""
    whole = {"worker": {"command": "x", "gpu": "any:4"}}
    began = stage.clock.now_ms()
    stage.run(stage.submit(name="first", roles=whole, time_limit="30m"))
    waiting = stage.submit(name="second", roles=whole)
    verdict = stage.service.why(waiting.id).verdict
    assert verdict is not None
    assert verdict.starts_before_ms == pytest.approx(began + 1_800_000, abs=2_000)
    assert verdict.starts.endswith("if those before it use up their time limits")
    third = stage.service.plan(a_spec(roles=whole)).verdict
    assert third is not None
    assert (third.starts_after_ms, third.starts_before_ms) == (0, 0)
    assert third.starts.startswith("nobody can tell: second may run for ever")
    assert stage.service.get(waiting.id).verdict.starts == ""  # type: ignore[union-attr]


def test_why_and_plan_say_whether_a_deadline_is_kept(stage: Stage) -> None:
    whole = {"worker": {"command": "x", "gpu": "any:4"}}
    first = stage.run(stage.submit(name="first", roles=whole, time_limit="30m", deadline="1h"))
    due = stage.service.why(first.id).deadline
    assert "UTC, likely kept: it ends by " in due
    assert due.endswith("when its time limit runs out")

    def outlook(**fields: object) -> str:
        planned = stage.service.plan(a_spec(roles=whole, **fields)).deadline
        waiting = stage.submit(roles=whole, **fields)
        told = stage.service.why(waiting.id).deadline
        stage.service.cancel(waiting.id)
        assert planned[5:] == told[5:]
        return told

    assert "likely missed by 20 min: it ends about " in outlook(deadline="20m", expected="10m", time_limit="10m")
    assert "likely kept" in outlook(deadline="90m", expected="10m", time_limit="10m")
    assert "at risk: it ends by " in outlook(deadline="35m", time_limit="10m")
    assert "nobody can tell how long it runs" in outlook(deadline="35m")
    assert outlook() == ""
    ended = stage.end(first)
    assert stage.service.why(ended.id).deadline.endswith("UTC, kept")


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


# ---- wishing ----


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


def test_why_as_it_was_then(stage: Stage) -> None:
    began = stage.clock.time_ms
    first = stage.run(stage.submit(roles={"worker": {"command": "x", "gpu": "any:4"}}))
    stage.clock.time_ms += 10_000
    second = stage.submit(roles={"worker": {"command": "x", "gpu": "any:2"}})
    stage.clock.time_ms += 10_000
    stage.end(first)
    stage.run(second)
    then = stage.service.why(second.id, at_ms=began + 15_000)
    assert then.job.phase is Phase.QUEUED
    assert then.verdict is not None
    assert then.verdict.reasons[0].message.startswith("role worker needs 1 × (2 any GPU, 1 CPU); 0 of 4")
    assert len(then.story) == 1
    assert stage.service.why(second.id).job.phase is Phase.RUNNING
    with pytest.raises(NotFound, match="not there yet"):
        stage.service.why(second.id, at_ms=began + 5_000)


# ---- nodes, queues, inside ----


def test_usage_in_gpu_hours(stage: Stage) -> None:
    stage.clock.time_ms += 1
    job = stage.submit(roles={"worker": {"command": "x", "gpu": "any:2"}})
    stage.clock.time_ms += 60_000
    stage.run(job)
    stage.clock.time_ms += 1_800_000
    (used,) = stage.service.usage()
    assert (used.queue, used.owner, used.jobs, used.gpu_hours) == ("default", "ann", 1, 1.0)
    assert (used.mean_wait_s, used.longest_wait_s) == (60.0, 60.0)


def test_nodes_tell_what_is_free_and_who_is_there(stage: Stage) -> None:
    job = stage.run(stage.submit())
    node = stage.service.nodes()[0]
    assert (node.free_gpus, node.free.gpu_milli, node.jobs) == (3, 3_000, (job.id,))
    cordoned = stage.service.cordon("n1", drain=True, by="ann")
    assert cordoned.state == "draining"
    seq = stage.store.last_seq()
    stage.service.cordon("n1", drain=True)
    assert stage.store.last_seq() == seq
    assert stage.service.nodes()[0].state == "draining"
    assert stage.service.uncordon("n1").state == "ready"
    with pytest.raises(NotFound, match="n9"):
        stage.service.cordon("n9")


def test_queues_count_waiting_and_active(stage: Stage) -> None:
    stage.run(stage.submit())
    stage.submit()
    queue = stage.service.queues()[0]
    assert (queue.waiting, queue.active, queue.gpus_in_use) == (1, 1, 1.0)


def test_doctor_finds_lost_nodes(stage: Stage) -> None:
    assert all(check.ok for check in stage.service.checkup.doctor())
    stage.decide(ev.NodeLost(0, NodeName("n1")))
    assert [check.name for check in stage.service.checkup.doctor() if not check.ok] == ["nodes"]


def test_a_snapshot_is_plain_json(stage: Stage) -> None:
    import json

    job = stage.run(stage.submit())
    snapshot = json.loads(json.dumps(stage.service.checkup.snapshot()))
    assert snapshot["jobs"][0]["id"] == job.id
    assert snapshot["nodes"][0]["name"] == "n1"


def test_verify_replays_the_log_and_finds_a_damaged_projection(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.end(stage.run(stage.submit()))
    job = stage.run(stage.submit())
    verification = stage.service.checkup.verify()
    assert (verification.ok, verification.jobs, verification.events) == (True, 2, stage.store.last_seq())
    from dataclasses import replace

    known = stage.store.job
    monkeypatch.setattr(stage.store, "job", lambda i: replace(known(i), restarts=9) if i == job.id else known(i))
    verification = stage.service.checkup.verify()
    assert not verification.ok
    assert "restarts" in verification.problems[0]


def test_verify_allows_for_events_that_arrive_meanwhile(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    job = stage.submit()
    known = stage.store.job

    def later(job_id: JobId) -> object:
        monkeypatch.undo()
        stage.service.set_priority(job.id, 5)
        return known(job_id)

    monkeypatch.setattr(stage.store, "job", later)
    assert stage.service.checkup.verify().ok


def test_an_ended_job_still_says_how_far_it_came(stage: Stage) -> None:
    job = stage.run(stage.submit())
    stage.store.add_samples([Sample(job.id, 5, 1, 40, 50, 2, (("loss", 0.25), (f"{OWN_METRICS}nodes", 1.0)))])
    assert stage.service.samples(job.id)[0].metrics == (("loss", 0.25),), "our own are nobody's business"
    stage.end(job)
    progress = stage.service.get(job.id).progress
    assert progress is not None
    assert (progress.step, progress.total, progress.metrics) == (40, 50, (("loss", 0.25),))
    silent = stage.run(stage.submit())
    stage.end(silent)
    assert stage.service.get(silent.id).progress is None


# ---- editing ----


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


def test_while_the_engine_is_away_every_live_job_says_so(stage: Stage) -> None:
    job, ended = stage.run(stage.submit()), stage.end(stage.run(stage.submit()))
    stage.live.health.backend_error = "the engine does not answer"
    for headline in (stage.service.get(job.id).headline, stage.service.jobs(JobQuery()).jobs[1].headline):
        assert headline == "the engine does not answer; until it answers nothing starts, and what runs is left alone"
    assert "does not answer" in stage.service.why(job.id).headline
    assert "does not answer" not in stage.service.get(ended.id).headline


def test_what_the_engine_says_stands_beside_events_and_explains(stage: Stage) -> None:
    job = stage.run(stage.submit())
    now, key, node = stage.clock.now_ms(), stage.key(job), NodeName("n1")
    said = [
        Incident(now, "Pulling", "pulling x", key),
        Incident(now, "BackOff", "again", launch_key(job.id, job.attempt + 1, "worker", 0, 0), warning=True),
        Incident(now, "FailedMount", "no volume", key, warning=True),
        Incident(now - LATELY_MS - 1, "DiskPressure", "long ago", node=node, warning=True),
        Incident(now, "NodeNotReady", "", node=node, warning=True),
        Incident(job.submitted_at_ms - 1, "Rebooted", "before it was there", node=node, warning=True),
    ]  # fmt: skip
    assert stage.service.incidents(job.id) == ()
    asked = []

    def incidents(job_id: JobId, nodes: Sequence[NodeName] = ()) -> list[Incident]:
        asked.append((job_id, nodes))
        return said

    stage.backend.incidents = incidents  # type: ignore[attr-defined]
    found = [one.reason for one in stage.service.incidents(job.id)]
    assert "Rebooted" not in found
    assert found[:3] == ["Pulling", "BackOff", "FailedMount"]
    assert asked[0] == (job.id, [node])
    assert [one.reason for one in stage.service.why(job.id).warnings] == ["FailedMount", "NodeNotReady"]
    stage.end(job)
    assert stage.service.why(job.id).warnings == ()
