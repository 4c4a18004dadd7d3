"""Commands that change jobs."""

from __future__ import annotations

import pytest

from jobsched import errors
from jobsched.client.documents import user
from jobsched.core.job import Phase
from tests.cli.conftest import Cli
from tests.client.fake_server import ID, FakeServer, an_answer, refusal, wire


@pytest.mark.parametrize(
    ("words", "route", "body"),
    [
        (["hold", "bert"], "hold", {"stop": False}),
        (["suspend", "bert"], "hold", {"stop": True}),
        (["release", "bert"], "release", {}),
        (["resume", "bert"], "release", {}),
        (["restart", "bert"], "restart", {}),
        (["scale", "bert", "worker=8", "ps=2"], "scale", {"wanted": {"worker": 8, "ps": 2}}),
    ],
)
def test_wishes(words: list[str], route: str, body: dict[str, object], cli: Cli, server: FakeServer) -> None:
    result = cli(*words, "-q")
    assert (result.code, result.out) == (0, f"{ID}\n")
    assert server.sent(f"POST jobs/bert/{route}") == {"by": user(), **body}


def test_a_wish_shows_the_job_once_the_server_has_acted(cli: Cli, server: FakeServer) -> None:
    server.replies["POST jobs/bert/cancel"] = (200, wire(an_answer(version=3)))
    server.jobs[ID] = an_answer(Phase.CANCELLED, version=4)
    assert cli("cancel", "bert", "-o", "json").json["jobs"][0]["phase"] == "CANCELLED"


def test_cancelling_several_goes_on_after_a_failure(cli: Cli, server: FakeServer) -> None:
    result = cli("cancel", "-y", "nobody", "bert", "-q")
    assert (result.code, result.out) == (3, f"{ID}\n")
    assert "there is no job 'nobody'" in result.err
    assert server.sent("POST jobs/bert/cancel")["by"]
    server.replies["POST jobs/bert/cancel"] = refusal(errors.Conflict("it has ended"))
    assert cli("cancel", "bert").code == 5
