"""Commands about jobs: formats, tables, explanations, wishes, waits."""

import csv
import io
import json

import pytest

from jobsched import __version__, errors
from jobsched.cli.jobs import shortest
from jobsched.cli.render import fitted
from jobsched.client.documents import user
from jobsched.core.job import Cause, Phase, Reason
from jobsched.core.launch import launch_key
from jobsched.core.observation import Incident
from jobsched.core.resources import JobId, NodeName
from tests.cli.conftest import Cli
from tests.client.fake_server import ID, FakeServer, a_failure, a_history, a_verdict, an_answer, cut, refusal, sse, wire


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


def test_an_empty_log_is_said_to_be_empty(cli: Cli, server: FakeServer) -> None:
    server.replies[f"GET jobs/{ID}/logs"] = sse([])
    result = cli("logs", "bert")
    assert (result.code, result.out) == (0, "")
    assert "nothing is written yet" in result.err
    assert cli("logs", "bert", "-q").err == ""


def test_yaml_is_in_blocks_and_in_the_order_of_json(cli: Cli, server: FakeServer) -> None:
    assert cli("version", "-o", "yaml").out.splitlines()[:2] == ["schema_version: 1", f"client: {__version__}"]


def test_why_a_job_waits(cli: Cli, server: FakeServer) -> None:
    server.jobs[ID] = an_answer(Phase.QUEUED, verdict=a_verdict(), headline="waits for 2 GPUs")
    out = cli("why", "bert").out
    for text in (
        "waits for 2 GPUs",
        "Resources: needs 2 GPUs, 1 is free",
        "fix: wait, or ask for 1",
        "place in line: 2",
        "story:",
        "submitted by ann",
    ):
        assert text in out
    assert cli("why", "@last", "--json").json["verdict"]["position"] == 2


def test_why_at_a_time(cli: Cli, server: FakeServer) -> None:
    assert cli("why", "bert", "--at", "2026-01-01T00:00:05Z").code == 0
    assert server.requests[-1].url.params["at_ms"] == "1767225605000"
    assert cli("why", "bert", "--at", "yesterday").code == 2


def test_why_a_job_failed(cli: Cli, server: FakeServer) -> None:
    cause = Cause(
        Reason.HANG, role="worker", index=1, rank=1, stacks=(("worker/1", "File train.py, line 3"),), tail=("step 9",)
    )
    server.jobs[ID] = an_answer(Phase.FAILED, cause=cause)
    out = cli("why", "bert").out
    for text in (
        "root cause: worker/1: ended: Hang (rank 1)",
        "| step 9",
        "stack of worker/1",
        "File train.py, line 3",
    ):
        assert text in out


def test_describe_shows_everything(cli: Cli, server: FakeServer) -> None:
    server.jobs[ID] = an_answer(Phase.FAILED, cause=a_failure(), headline="exit code 3")
    server.history = a_history()
    out = cli("describe", "bert").out
    for text in (
        ID,
        "ann",
        "FAILED",
        "exit code 3",
        "python train.py",
        "sim-gpu:1",
        "ValueError: no",
        "AttemptPlaced",
        "worker/0→n01",
        "Submitted:   2026-01-01T00:00:00.000Z",
    ):
        assert text in out
    assert len(cli("describe", "bert", "-o", "json").json["events"]) == 4


def test_events(cli: Cli, server: FakeServer) -> None:
    server.history = a_history()
    assert [line.split()[2] for line in cli("events", "bert", "--no-headers").out.splitlines()] == [
        "JobSubmitted",
        "AttemptPlaced",
        "ReplicasStarted",
        "AttemptStarted",
    ]
    assert cli("events", "bert", "--json").json["events"][0]["event"]["at"] == "2026-01-01T00:00:00.000Z"


def test_what_the_engine_says_stands_between_events_and_under_why(cli: Cli, server: FakeServer) -> None:
    server.history = a_history()
    between = server.stored()[1][1]["event"]["at_ms"]  # type: ignore[index]
    server.incidents = [
        Incident(between, "BackOff", "pull refused", launch_key(JobId(ID), 1, "worker", 0, 0), warning=True, count=3),
        Incident(between + 10**9, "NodeNotReady", node=NodeName("n01")),
    ]
    lines = cli("events", "bert", "--no-headers").out.splitlines()
    assert len(lines) == 6
    assert lines[2].split()[-1] == "(×3)"
    assert "BackOff" in lines[2]
    assert "worker/0: pull refused" in lines[2]
    assert lines[-1].endswith("node n01: NodeNotReady")
    assert cli("events", "bert", "--after", "1", "--no-headers").out.count("BackOff") == 0
    assert cli("events", "bert", "-q").out.split() == ["1", "2", "3", "4"]
    shown = cli("events", "bert", "--json").json["events"]
    assert [item["seq"] for item in shown] == [1, 2, None, 3, 4, None]
    out = cli("why", "bert").out
    assert "the engine says:\n  worker/0: pull refused (×3)" in out
    assert "NodeNotReady" not in out


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


def test_cancelling_several_goes_on_after_a_failure(cli: Cli, server: FakeServer) -> None:
    result = cli("cancel", "-y", "nobody", "bert", "-q")
    assert (result.code, result.out) == (3, f"{ID}\n")
    assert "there is no job 'nobody'" in result.err
    assert server.sent("POST jobs/bert/cancel")["by"]
    server.replies["POST jobs/bert/cancel"] = refusal(errors.Conflict("it has ended"))
    assert cli("cancel", "bert").code == 5


def test_last_is_the_newest_of_mine(cli: Cli, server: FakeServer) -> None:
    cli("cancel", "@last")
    assert server.requests[0].url.params["owner"]
    assert server.sent(f"POST jobs/{ID}/cancel")["by"]


def test_top_once(cli: Cli, server: FakeServer) -> None:
    server.jobs[ID] = an_answer(step=7)
    out = cli("top", "--once").out
    assert "sim-gpu:2" in out
    assert "loss 0.5" in out
