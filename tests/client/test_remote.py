"""The transport: tokens, typed errors, bounded retries, streams that resume."""

import httpx2
import pytest

from jobsched import errors
from jobsched.client import remote as module
from jobsched.client.remote import Endpoint, Remote, from_wire
from tests.client.fake_server import ID, FakeServer, refusal, sse


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.time, "sleep", lambda _: None)


def test_sends_the_token_and_gets_documents() -> None:
    server = FakeServer()
    with server.remote() as remote:
        assert remote.documents("jobs/bert")["job"]["id"] == ID
    assert server.requests[0].headers["authorization"] == "Bearer right-token"


def test_wrong_token_is_an_auth_error() -> None:
    with FakeServer().remote(token="wrong") as remote, pytest.raises(errors.AuthError) as caught:
        remote.get("jobs")
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("cls", [c for c in errors.all_errors().values() if not issubclass(c, errors.SpecError)])
def test_every_error_comes_back_as_itself(cls: type[errors.JobschedError]) -> None:
    back = from_wire(cls("what", hint="do this").to_wire())
    assert type(back) is cls
    assert (back.message, back.hint) == ("what", "do this")


def test_spec_errors_keep_their_places() -> None:
    problems = [errors.Problem("bad", "roles.ps", "a.yaml", 3, 7, "fix it"), errors.Problem("worse")]
    back = from_wire(errors.SpecError(problems).to_wire())
    assert isinstance(back, errors.SpecError)
    assert back.problems == tuple(problems)


@pytest.mark.parametrize(
    ("status", "cls"),
    [
        (404, errors.NotFound),
        (401, errors.AuthError),
        (500, errors.JobschedError),
        (409, errors.Conflict),
        (418, errors.JobschedError),
    ],
)
def test_foreign_bodies_go_by_status(status: int, cls: type[errors.JobschedError]) -> None:
    server = FakeServer(replies={"GET jobs": httpx2.Response(status, text="<html>proxy says no</html>")})
    with server.remote() as remote, pytest.raises(errors.JobschedError) as caught:
        remote.get("jobs")
    assert type(caught.value) is cls


def test_safe_requests_are_tried_again_and_then_give_up() -> None:
    server = FakeServer(
        replies={
            "GET jobs": [
                httpx2.ConnectError("refused"),
                refusal(errors.StoreUnavailable("busy")),
                {"jobs": [], "more": False},
            ]
        }
    )
    with server.remote() as remote:
        assert remote.documents("jobs") == {"jobs": [], "more": False}
    server.replies["GET jobs"] = [httpx2.ReadError("cut")] * 10
    with server.remote() as remote, pytest.raises(errors.Unreachable, match="does not answer"):
        remote.get("jobs")
    assert len(server.requests) == 3 + module.TRIES


def test_unsafe_requests_are_sent_once_unless_nothing_was_sent() -> None:
    server = FakeServer(replies={f"POST jobs/{ID}/restart": [httpx2.ReadError("cut")] * 10})
    with server.remote() as remote, pytest.raises(errors.Unreachable):
        remote.post(f"jobs/{ID}/restart", safe=False)
    assert len(server.requests) == 1
    server.replies[f"POST jobs/{ID}/restart"] = [httpx2.ConnectError("refused"), {"fine": True}]
    with server.remote() as remote:
        remote.post(f"jobs/{ID}/restart", safe=False)


def test_a_request_follows_a_server_that_moved() -> None:
    seen = []

    def handle(request: httpx2.Request) -> httpx2.Response:
        seen.append(request.url.port)
        if request.url.port == 1:
            raise httpx2.ConnectError("refused")
        return httpx2.Response(200, json={})

    moved = Endpoint("http://127.0.0.1:2", "new", "test", local=True)
    remote = Remote(
        Endpoint("http://127.0.0.1:1", "old", "test", local=True),
        relocate=lambda: moved,
        transport=httpx2.MockTransport(handle),
    )
    assert remote.documents("jobs") == {}
    assert seen == [1, 2]


def test_a_broken_stream_resumes_after_the_last_id() -> None:
    server = FakeServer(
        replies={
            "GET events": [
                sse([("1", {"n": 1}), ("2", {"n": 2})], end=False),
                httpx2.ConnectError("away"),
                sse([("3", {"n": 3})]),
            ]
        }
    )
    with server.remote() as remote:
        got = [(e.event, e.data) for e in remote.stream("events")]
    assert got == [("message", '{"n": 1}'), ("message", '{"n": 2}'), ("reconnected", ""), ("message", '{"n": 3}')]
    assert "last-event-id" not in server.requests[0].headers
    assert server.requests[2].headers["last-event-id"] == "2"


def test_a_stream_gives_up_when_its_server_stays_away() -> None:
    server = FakeServer(replies={"GET events": [httpx2.ConnectError("away")] * 5})
    with server.remote(patience_s=0.0) as remote, pytest.raises(errors.Unreachable):
        list(remote.stream("events"))


def test_errors_in_and_before_a_stream_are_typed() -> None:
    server = FakeServer(
        replies={"GET events": sse([("", errors.BackendUnreachable("engine").to_wire())], event="error")}
    )
    with server.remote(patience_s=0.0) as remote, pytest.raises(errors.Unreachable, match="engine"):
        list(remote.stream("events"))
    with server.remote() as remote, pytest.raises(errors.NotFound):
        list(remote.stream("jobs/nothing/logs"))
