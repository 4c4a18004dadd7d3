"""Commands that list jobs, show one, or stay with it: formats, tables, waits."""

import csv
import io
import json

import pytest

from jobsched import __version__
from jobsched.cli.jobs import shortest
from jobsched.cli.render import fitted
from jobsched.core.job import Phase
from tests.cli.conftest import Cli
from tests.client.fake_server import ID, FakeServer, a_failure, a_history, a_verdict, an_answer, cut, sse, wire


def test_the_table_in_a_pipe_is_plain(cli: Cli, server: FakeServer) -> None:
    server.jobs[ID] = an_answer(step=7, restarts=1)
    head, row = cli("jobs").out.splitlines()
    assert head.split() == ["ID", "NAME", "QUEUE", "PHASE", "REASON", "STEP", "REPLICAS", "GPUS", "RESTARTS", "AGE"]
    assert row.split()[:6] == [ID[:10], "bert", "default", "RUNNING", "Submitted", "7/100"]
    assert "\x1b" not in row
    assert cli("jobs", "--no-headers", "--columns", "name,phase").out == "bert  RUNNING\n"
    assert cli("jobs", "-q").out == f"{ID}\n" == cli("ls", "-o", "name").out
    assert "HEADLINE" in cli("ps", "-o", "wide").out


def test_json_has_a_version_and_rfc_3339_times(cli: Cli, server: FakeServer) -> None:
    server.jobs[ID] = an_answer(step=7)
    document = cli("jobs", "--json").json
    assert document["schema_version"] == 1
    job = document["jobs"][0]
    assert (job["id"], job["phase"], job["metrics"]) == (ID, "RUNNING", {"loss": 0.5})
    assert job["submitted_at"] == "2026-01-01T00:00:00.000Z"
    assert job["ended_at"] is None
    assert job["spec"]["roles"]["worker"]["replicas"]["prefer"] == 2
    assert not [name for name in job if name.endswith("_at_ms")]
    assert cli("get", "bert", "-o", "json").json["id"] == ID


def test_other_formats(cli: Cli, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.jobs |= {ID[:-1] + "2": an_answer(Phase.FAILED, id=ID[:-1] + "2", name="zeta")}
    rows = list(csv.DictReader(io.StringIO(cli("jobs", "-o", "csv").out)))
    assert [r["NAME"] for r in rows] == ["bert", "zeta"]
    assert rows[0]["AGE"] == "2026-01-01T00:00:00.000Z"
    lines = cli("jobs", "-o", "jsonl").out.splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["bert", "zeta"]
    assert "name: bert" in cli("jobs", "-o", "yaml").out
    assert [r.split()[1] for r in cli("jobs", "--sort-by=-name", "--no-headers").out.splitlines()] == ["zeta", "bert"]
    monkeypatch.setenv("JOBSCHED_OUTPUT", "jsonl")
    assert cli("jobs").out.splitlines() == lines


def test_a_styled_table_has_glyph_colour_and_word(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    out = cli("jobs").out
    assert "▶ RUNNING" in out
    assert "\x1b[" in out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[" not in cli("jobs").out


def test_selection_goes_to_the_server(cli: Cli, server: FakeServer) -> None:
    cli("jobs", "-a", "-l", "team=nlp", "-u", "ann", "--queue", "research", "--state", "failed,running", "--limit", "5")
    assert dict(server.requests[-1].url.params) == {
        "all": "true",
        "label": "team=nlp",
        "owner": "ann",
        "queue": "research",
        "state": "FAILED,RUNNING",
        "limit": "5",
    }


def test_more_jobs_than_shown_are_told(cli: Cli, server: FakeServer) -> None:
    server.replies["GET jobs"] = {"jobs": [wire(an_answer())], "more": True}
    assert "more with --limit" in cli("jobs").err
    assert cli("jobs", "-q").err == ""


def test_short_ids_tell_jobs_apart() -> None:
    assert shortest(["abcdefghij1", "abcdefghij2"]) == 11
    assert shortest(["a" * 26]) == 10
    assert shortest([]) == 10


def test_changes_as_json_lines(cli: Cli, server: FakeServer) -> None:
    server.history = a_history()
    server.replies["GET events"] = cut(server.stored())
    result = cli("jobs", "-w", "-o", "jsonl")
    assert [json.loads(line)["event"]["kind"] for line in result.out.splitlines()] == [
        "JobSubmitted",
        "AttemptPlaced",
        "ReplicasStarted",
        "AttemptStarted",
    ]
    assert result.code == 6  # the stream never ends by itself: here the server went away


@pytest.mark.parametrize(
    ("words", "lines"),
    [(["--queue", "default"], 4), (["--queue", "other"], 0), (["-u", "ann"], 4), (["-u", "bob"], 0),
     (["--name", "bert"], 4), (["-l", "a=b"], 0), (["--state", "RUNNING"], 4), (["--state", "failed,queued"], 0)],
)
def test_changes_of_the_selected_jobs_only(words: list[str], lines: int, cli: Cli, server: FakeServer) -> None:
    server.history = a_history()
    server.replies["GET events"] = cut(server.stored())
    assert len(cli("jobs", "-w", "-o", "jsonl", *words).out.splitlines()) == lines


@pytest.mark.parametrize("ref", ["", " ", "a/b", "../nodes"])
def test_what_no_job_can_be_called_is_not_found(ref: str, cli: Cli, server: FakeServer) -> None:
    assert cli("get", ref).code == 3
    assert server.requests == []


def test_yaml_is_in_blocks_and_in_the_order_of_json(cli: Cli, server: FakeServer) -> None:
    assert cli("version", "-o", "yaml").out.splitlines()[:2] == ["schema_version: 1", f"client: {__version__}"]


@pytest.mark.parametrize(
    ("phase", "until", "code"),
    [
        (Phase.SUCCEEDED, "done", 0),
        (Phase.FAILED, "done", 3),
        (Phase.CANCELLED, "done", 143),
        (Phase.RUNNING, "running", 0),
        (Phase.RUNNING, "40", 0),
        (Phase.FAILED, "succeeded", 3),
        (Phase.FAILED, "running", 3),
        (Phase.SUCCEEDED, "running", 0),
    ],
)
def test_waiting(phase: Phase, until: str, code: int, cli: Cli, server: FakeServer) -> None:
    server.jobs[ID] = an_answer(phase, step=50, cause=a_failure() if phase is Phase.FAILED else None)
    assert cli("wait", "bert", "--for", until).code == code


def test_a_wait_that_runs_out_is_124(cli: Cli, server: FakeServer) -> None:
    server.replies["GET progress"] = [sse([("", wire(an_answer(step=1)))]) for _ in range(500)]
    result = cli("wait", "bert", "--for", "90", "--timeout", "50ms")
    assert result.code == 124
    assert "error[E700]" in result.err


def test_a_waiting_job_is_listed_with_what_it_waits_for(cli: Cli, server: FakeServer) -> None:
    server.jobs[ID] = an_answer(Phase.QUEUED, verdict=a_verdict())
    rows = cli("jobs", "--columns", "phase,reason").out.splitlines()
    assert rows[1].split() == ["QUEUED", "Resources"]


def test_a_narrow_terminal_keeps_the_first_columns_whole() -> None:
    assert fitted([10, 40, 8, 9], [False, True, True, False], 200) == [10, 40, 8, 9]
    assert fitted([10, 40, 8, 9], [False, True, True, False], 60) == [10, 25, 8, 9]
    assert fitted([10, 40, 8, 9], [False, True, True, False], 40) == [10, 16, 8]
    assert fitted([30], [False], 10) == [30]


def test_an_empty_list_says_where_the_others_are(cli: Cli, server: FakeServer) -> None:
    server.jobs.clear()
    assert "-a shows ended ones" in cli("jobs").err
    assert cli("jobs", "-q").err == ""


def test_last_is_the_newest_of_mine(cli: Cli, server: FakeServer) -> None:
    cli("cancel", "@last")
    assert server.requests[0].url.params["owner"]
    assert server.sent(f"POST jobs/{ID}/cancel")["by"]


def test_top_once(cli: Cli, server: FakeServer) -> None:
    server.jobs[ID] = an_answer(step=7)
    out = cli("top", "--once").out
    assert "sim-gpu:2" in out
    assert "loss 0.5" in out
