"""logs and metrics."""

from __future__ import annotations

import json

from jobsched.core.job import Phase
from tests.cli.conftest import Cli
from tests.client.fake_server import ID, FakeServer, a_failure, an_answer, sse


def test_an_empty_log_is_said_to_be_empty(cli: Cli, server: FakeServer) -> None:
    server.replies[f"GET jobs/{ID}/logs"] = sse([])
    result = cli("logs", "bert")
    assert (result.code, result.out) == (0, "")
    assert "nothing is written yet" in result.err
    assert cli("logs", "bert", "-q").err == ""


def test_logs(cli: Cli, server: FakeServer) -> None:
    assert cli("logs", "bert").out == "".join(f"[worker/0] line {n}\n" for n in range(3))
    assert cli("logs", "bert", "--no-prefix", "--role", "worker", "--tail", "5").out == "line 0\nline 1\nline 2\n"
    assert dict(server.requests[-1].url.params) == {"role": "worker", "tail": "5"}
    assert json.loads(cli("logs", "bert", "-o", "jsonl").out.splitlines()[2])["text"] == "line 2"
    server.jobs[ID] = an_answer(Phase.FAILED, cause=a_failure())
    assert cli("logs", "-f", "--exit-status", "bert").code == 3


def test_metrics(cli: Cli) -> None:
    assert "accuracy=0.97" in cli("metrics", "bert").out
    assert cli("metrics", "bert", "-o", "csv").out.splitlines()[0] == "TIME,ATTEMPT,STEP,WORLD,ACCURACY"
