"""Wire documents: log lines once each, causes in words, exit codes."""

import httpx2
import pytest

from jobsched.client import remote as module
from jobsched.client.documents import cause_sentence, exit_code, log_lines, submission
from jobsched.core.job import Cause, FailureClass, Phase, Reason
from tests.client.fake_server import ID, FakeServer, a_failure, a_job, a_line, sse, wire


def test_log_lines_come_once_across_a_reconnect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.time, "sleep", lambda _: None)
    server = FakeServer(
        replies={
            f"GET jobs/{ID}/logs": [
                sse([("", a_line(0)), ("", a_line(1))], end=False),
                httpx2.ReadError("cut"),
                sse([("", a_line(0)), ("", a_line(1)), ("", a_line(2)), ("", a_line(0, index=1, text="other"))]),
            ]
        }
    )
    with server.remote() as remote:
        texts = [line["text"] for line in log_lines(remote, ID, follow=True)]
    assert texts == ["line 0", "line 1", "line 2", "other"]


@pytest.mark.parametrize(
    ("phase", "cause", "code"),
    [
        (Phase.SUCCEEDED, None, 0),
        (Phase.CANCELLED, None, 143),
        (Phase.FAILED, a_failure(), 3),
        (Phase.FAILED, Cause(Reason.SIGNAL, FailureClass.USER, signal=9), 137),
        (Phase.FAILED, Cause(Reason.TIME_LIMIT), 124),
        (Phase.FAILED, Cause(Reason.NODE_LOST, FailureClass.INFRA), 125),
        (Phase.FAILED, None, 125),
    ],
)
def test_exit_codes(phase: Phase, cause: Cause | None, code: int) -> None:
    assert exit_code(wire(a_job(phase=phase, cause=cause))) == code


def test_causes_in_words() -> None:
    assert cause_sentence(wire(a_failure())) == "worker/1 exited with code 3 (rank 1, node n01, fault: user)"
    killed = Cause(Reason.SIGNAL, signal=9, role="ps", index=0)
    assert cause_sentence(wire(killed)) == "ps/0: ended: Signal 9"
    assert cause_sentence(wire(Cause(Reason.QUEUE_DEADLINE, message="waited 2h"))) == "waited 2h"
    assert cause_sentence(wire(Cause(Reason.CANCELLED))) == "ended: Cancelled"


def test_every_submission_has_its_own_request_id() -> None:
    ids = {submission({})["request_id"] for _ in range(10)}
    assert len(ids) == 10
