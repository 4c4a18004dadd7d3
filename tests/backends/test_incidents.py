"""What engines say: kept once each, bounded, found by job and node."""

from __future__ import annotations

from jobsched.backends import incidents
from jobsched.backends.incidents import Incidents
from jobsched.core.observation import Incident
from jobsched.core.resources import JobId, NodeName
from tests.contracts.backend import a_key

JOB = JobId("job-1")


def test_the_same_thing_is_kept_once_with_how_often() -> None:
    kept = Incidents()
    for at_ms in (5, 3, 9):
        kept.note(Incident(at_ms, "Killed", "signal 9", a_key()))
    kept.note(Incident(7, "Killed", "signal 15", a_key()))
    assert [(one.at_ms, one.message, one.count) for one in kept.about(JOB, ())] == [
        (7, "signal 15", 1), (9, "signal 9", 3),
    ]  # fmt: skip


def test_a_total_replaces_what_was_counted() -> None:
    kept = Incidents()
    for count in (1, 4, 4, 2):  # an informer lists the same object again
        kept.note(Incident(1, "BackOff", "x", a_key(), count=count), total=True)
    assert [one.count for one in kept.about(JOB, ())] == [4]


def test_others_jobs_and_nodes_are_not_told() -> None:
    kept = Incidents()
    kept.note(Incident(1, "A", key=a_key("other")))
    kept.note(Incident(2, "B", node=NodeName("n1")))
    kept.note(Incident(3, "C", node=NodeName("n2")))
    kept.note(Incident(4, "D", key=a_key(), node=NodeName("n2")))
    assert [one.reason for one in kept.about(JOB, [NodeName("n1")])] == ["B", "D"]


def test_there_are_never_too_many() -> None:
    kept = Incidents()
    for at_ms in range(incidents.MOST + 10):
        kept.note(Incident(at_ms, "Told", f"{at_ms:5}" * 1_000, a_key()))
    assert len(kept._found) == incidents.MOST
    shown = kept.about(JOB, ())
    assert len(shown) == incidents.MOST_SHOWN
    assert shown[-1].at_ms == incidents.MOST + 9
    assert len(shown[-1].message) == incidents.LONGEST
