"""From words to a job, and watching it: run, submit, plan, validate, init, schema."""

import io
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobsched import errors
from jobsched.core.answers import WhyAnswer
from jobsched.core.job import Phase
from tests.cli.conftest import Cli
from tests.client.fake_server import ID, FakeServer, a_failure, a_verdict, an_answer, cut, refusal, sse, wire

JOB = "name: bert\nroles:\n  worker: {replicas: 2, command: python train.py, gpu: 'any:1'}\n"


@pytest.fixture
def job_file(tmp_path: Path) -> str:
    (tmp_path / "job.yaml").write_text(JOB)
    return str(tmp_path / "job.yaml")


def test_submit_prints_the_id_alone(cli: Cli, server: FakeServer, job_file: str) -> None:
    result = cli("submit", job_file)
    assert (result.code, result.out) == (0, f"{ID}\n")
    assert "submitted bert" in result.err
    assert cli("submit", job_file, "-q").err == ""
    assert cli("submit", job_file, "--json").json["jobs"][0]["id"] == ID


def test_options_change_the_spec(cli: Cli, server: FakeServer, job_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROM_HERE", "yes: it is")
    cli(
        "submit",
        job_file,
        "--set",
        "roles.worker.cpu=3",
        "--role",
        "worker=5",
        "-e",
        "LR=0.10",
        "-e",
        "FROM_HERE",
        "--name",
        "other",
        "--queue",
        "research",
        "--priority",
        "7",
        "--time-limit",
        "2h",
        "--after",
        "a",
        "--after",
        "b",
        "--image",
        "img",
        "--hold",
        "--if-exists",
        "skip",
    )
    body = server.sent("POST jobs")
    spec = body["spec"]
    assert spec["roles"]["worker"]["replicas"]["prefer"] == 5
    assert spec["roles"]["worker"]["cpu"] == "3"
    assert spec["env"] == {"LR": "0.10", "FROM_HERE": "yes: it is"}  # text stays text
    assert (spec["name"], spec["queue"], spec["priority"], spec["time_limit"]) == ("other", "research", 7, "2h")
    assert spec["after"] == ["a", "b"]
    assert spec["image"] == "img"
    assert (body["hold"], body["if_exists"]) == (True, "skip")


def test_a_command_becomes_a_job(cli: Cli, server: FakeServer, tmp_path: Path) -> None:
    cli(
        "submit",
        "--gpus",
        "2",
        "--role",
        "ps=1",
        "--role",
        "worker=3",
        "--array",
        "0-3%2",
        "--",
        "python",
        "t.py",
        "-x",
        "--gpus",
        "9",
    )
    spec = server.sent("POST jobs")["spec"]
    assert {name: role["replicas"]["prefer"] for name, role in spec["roles"].items()} == {"ps": 1, "worker": 3}
    assert spec["roles"]["worker"]["command"] == ["python", "t.py", "-x", "--gpus", "9"]
    assert spec["roles"]["worker"]["gpu"]["milli"] == 2_000
    assert spec["working_dir"] == str(tmp_path)
    assert spec["array"] == "0-3%2"


def test_a_job_from_standard_input(cli: Cli, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(JOB.encode())))
    assert cli("submit", "-").code == 0
    assert server.sent("POST jobs")["spec"]["name"] == "bert"


def test_a_wrong_file_shows_every_problem_with_its_place(cli: Cli, server: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("name: bert\nroles:\n  worker:\n    comand: x\n    cpu: lots\n")
    for words in (["submit", "bad.yaml"], ["run", "bad.yaml"], ["validate", "bad.yaml"], ["plan", "bad.yaml"]):
        result = cli(*words)
        assert result.code == 7
        assert "bad.yaml:4:" in result.err
        assert "bad.yaml:5:" in result.err
        assert "command" in result.err
    assert server.requests == []
    problems = cli("validate", "bad.yaml", "-o", "json").json["files"][0]["problems"]
    assert {4, 5} <= {p["line"] for p in problems}


def test_validate_needs_neither_server_nor_environment(
    cli: Cli, server: FakeServer, tmp_path: Path, job_file: str
) -> None:
    (tmp_path / "open.yaml").write_text("command: x\nenv: {API_KEY: }\n")
    result = cli("validate", job_file, "open.yaml")
    assert result.code == 0
    assert result.out.count("ok") == 2
    assert server.requests == []


def test_init_writes_what_validates(cli: Cli, tmp_path: Path) -> None:
    for template in ("ps", "ddp", "elastic", "array"):
        assert cli("init", "--template", template, f"{template}.yaml").code == 0
        assert cli("validate", f"{template}.yaml").code == 0
    result = cli("init", "ps.yaml")
    assert result.code == 2
    assert "--force" in result.err


def test_schema_is_json_schema(cli: Cli) -> None:
    schema = json.loads(cli("schema").out)
    assert "roles" in json.dumps(schema)
    assert "$schema" in schema or "properties" in schema


def test_plan(cli: Cli, job_file: str) -> None:
    result = cli("plan", job_file)
    assert result.code == 0
    for text in ("worker", "n01", "Must wait.", "needs 2 GPUs, 1 is free"):
        assert text in result.out
    assert cli("plan", "--exit-code", job_file).code == 10


def test_run_shows_logs_and_ends_with_one_json_object(cli: Cli, server: FakeServer, job_file: str) -> None:
    updates = [wire(an_answer(step=n, attempt=1)) for n in (10, 90)]
    server.replies["GET progress"] = sse([("", u) for u in updates])
    server.jobs[ID] = an_answer(Phase.SUCCEEDED, attempt=1, restarts=2, ended_at_ms=1_767_225_700_000)
    result = cli("run", job_file, "-o", "json")
    assert result.code == 0
    assert len(result.out.splitlines()) == 1
    last = result.json
    assert (last["id"], last["name"], last["phase"], last["exit_code"]) == (ID, "bert", "SUCCEEDED", 0)
    assert (last["attempts"], last["restarts"], last["metrics"]) == (1, 2, {"accuracy": 0.97})
    assert last["schema_version"] == 1
    assert "line 2" in result.err
    assert "RUNNING · step 10/100 · loss 0.5 · replicas 2/2" in result.err
    plain = cli("run", job_file)
    assert "[worker/0] line 2\n" in plain.out
    assert "SUCCEEDED after 100s, 1 attempt, 2 restarts" in plain.err


def test_run_says_when_a_waiting_job_starts(
    cli: Cli, server: FakeServer, job_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = time.time()
    monkeypatch.setattr("jobsched.cli.attach.ASK_S", (0.0, 3_600.0))
    monkeypatch.setattr("jobsched.cli.attach.time", SimpleNamespace(time=lambda: now_s, monotonic=time.monotonic))
    waits = an_answer(Phase.QUEUED, verdict=a_verdict())
    starts = replace(a_verdict(), starts_before_ms=int(now_s * 1_000) + 600_500)
    server.replies[f"GET jobs/{ID}/why"] = wire(WhyAnswer(waits.job, "waits", starts))
    server.replies["GET progress"] = sse([("", wire(waits))])
    server.jobs[ID] = an_answer(Phase.SUCCEEDED)
    assert "place 2 · starts in about 10m" in cli("run", job_file).err
    assert sum(r.url.path.endswith("/why") for r in server.requests) == 1


@pytest.mark.parametrize(("phase", "code"), [(Phase.FAILED, 3), (Phase.CANCELLED, 143)])
def test_run_and_submit_wait_exit_with_the_jobs_code(
    phase: Phase, code: int, cli: Cli, server: FakeServer, job_file: str
) -> None:
    server.jobs[ID] = an_answer(phase, cause=a_failure() if phase is Phase.FAILED else None)
    result = cli("run", job_file)
    assert result.code == code
    assert phase is Phase.CANCELLED or "exited with code 3" in result.err
    assert cli("submit", "--wait", job_file).code == code


def test_ctrl_c_detaches_and_tells_how_to_go_on(
    cli: Cli, server: FakeServer, job_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr("jobsched.cli.attach.StatusLine.show", interrupted)
    server.jobs[ID] = an_answer(step=1)
    result = cli("run", job_file)
    assert result.code == 130
    assert f"jobsched logs -f {ID}" in result.err
    assert f"jobsched cancel {ID}" in result.err
    assert not any(r.url.path.endswith("/cancel") for r in server.requests)


def test_losing_the_server_while_attached_is_125(cli: Cli, server: FakeServer, job_file: str) -> None:
    server.replies["GET progress"] = cut([("", wire(an_answer(step=1)))])
    result = cli("run", job_file)
    assert result.code == 125
    assert "it goes on" in result.err


def test_a_refused_job_is_not_watched(cli: Cli, server: FakeServer, job_file: str) -> None:
    server.replies["POST jobs"] = refusal(
        errors.Unplaceable("no node can ever hold role 'worker'", hint="ask for less")
    )
    result = cli("run", job_file)
    assert result.code == 8
    assert "error[E217]" in result.err
    assert "jobsched help E217" in result.err


def test_run_with_a_time_out_leaves_the_job_alone(cli: Cli, server: FakeServer, job_file: str) -> None:
    server.replies["GET progress"] = sse([("", wire(an_answer(step=n))) for n in range(3)])
    result = cli("run", job_file, "--timeout", "0s")
    assert result.code == 124
    assert "it goes on" in result.err


def test_working_directory_of_a_file_is_its_own(cli: Cli, server: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "job.yaml").write_text(JOB)
    cli("submit", os.path.join("deep", "job.yaml"))
    assert server.sent("POST jobs")["spec"]["working_dir"] == str(tmp_path / "deep")


def test_an_error_in_a_stream_is_125_too(cli: Cli, server: FakeServer, job_file: str) -> None:
    server.replies["GET progress"] = sse([("", errors.Conflict("the log was removed").to_wire())], event="error")
    result = cli("run", job_file)
    assert result.code == 125
    assert "the log was removed" in result.err
    assert "it goes on" in result.err
