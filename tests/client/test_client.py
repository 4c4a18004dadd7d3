"""The SDK against a server in memory: handles, waits, results, arrays, typed errors."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

import jobsched
from jobsched import errors
from jobsched.client.client import Client, JobArray
from jobsched.client.documents import user
from jobsched.client.function import Task
from jobsched.core.job import Phase
from tests.client.fake_server import ID, FakeServer, a_failure, a_history, a_spec, an_answer, sse, wire


def client_of(server: FakeServer) -> Client:
    return Client(remote=server.remote())


def test_submitting_a_file_a_dict_and_a_spec(tmp_path: Path) -> None:
    server = FakeServer()
    client = client_of(server)
    file = tmp_path / "job.yaml"
    file.write_text("name: bert\ncommand: python train.py\n")
    assert client.submit(str(file), queue="research").id == ID
    body = server.sent("POST jobs")
    assert body["spec"]["queue"] == "research"
    assert body["spec"]["working_dir"] == str(tmp_path)
    assert body["owner"]
    client.submit({"command": "true"}, **{"roles.worker.replicas": 3}, if_exists="skip", hold=True)
    second = server.sent("POST jobs")
    assert second["spec"]["roles"]["worker"]["replicas"]["prefer"] == 3
    assert (second["if_exists"], second["hold"]) == ("skip", True)
    assert second["request_id"] != body["request_id"]
    client.submit(a_spec(), priority=7)
    assert server.sent("POST jobs")["spec"]["priority"] == 7


def test_every_problem_of_a_spec_is_raised_before_anything_is_sent() -> None:
    server = FakeServer()
    with pytest.raises(errors.SpecError) as caught:
        client_of(server).submit({"comand": "true", "gpu": "-1"})
    assert len(caught.value.problems) >= 2
    assert server.requests == []


def test_an_array_gives_its_members_in_order() -> None:
    server = FakeServer(jobs={ID[:-1] + str(n): an_answer(array_index=n) for n in (1, 2, 3)})
    array = client_of(server).submit({"command": "true", "array": "1-3"})
    assert isinstance(array, JobArray)
    assert [h.answer.job.array_index for h in array] == [1, 2, 3]
    assert len(array) == 3


def test_a_handle_shows_what_the_server_said() -> None:
    server = FakeServer(jobs={ID: an_answer(step=7, attempt=2, restarts=1, headline="training")})
    job = client_of(server).job("bert")
    assert (job.id, job.name, job.state, job.attempts, job.headline) == (ID, "bert", Phase.RUNNING, 2, "training")
    assert [m.node for m in job.members] == ["n01", "n01"]
    assert job.progress is not None
    assert job.progress.step == 7
    assert repr(job) == f"<Job bert {ID} RUNNING (Submitted)>"
    with pytest.raises(errors.NotFound):
        client_of(server).job("nobody")


def test_waiting_follows_progress_until_it_is_there() -> None:
    steps = [wire(an_answer(step=n)) for n in (1, 5, 9)]
    server = FakeServer(jobs={ID: an_answer(step=0)}, replies={"GET progress": sse([("", s) for s in steps])})
    job = client_of(server).job(ID)
    assert job.wait(until=5, timeout=120).progress.step == 5  # type: ignore[union-attr]
    assert job.wait("running").state is Phase.RUNNING
    server.jobs[ID] = an_answer(Phase.SUCCEEDED)
    assert job.wait().state is Phase.SUCCEEDED


def test_a_wait_is_bounded() -> None:
    server = FakeServer(replies={"GET progress": [sse([], end=False)] * 200})
    with pytest.raises(errors.WaitTimeout) as caught:
        client_of(server).job(ID).wait(timeout=0.05)
    assert caught.value.exit_code == 124


def test_a_job_that_failed_raises_with_rank_code_and_last_lines() -> None:
    server = FakeServer(jobs={ID: an_answer(Phase.FAILED, cause=a_failure())})
    job = client_of(server).job(ID)
    assert job.wait().state is Phase.FAILED  # `done` is no judgement
    for call in (job.result, lambda: job.wait("running"), lambda: job.wait(50)):
        with pytest.raises(errors.JobFailed) as caught:
            call()
        text = str(caught.value)
        assert "rank 1" in text
        assert "code 3" in text
        assert "ValueError: no" in text
    with pytest.raises(ValueError, match="cannot wait"):
        job.wait("soon")  # type: ignore[arg-type]


def test_the_result_of_a_plain_job_are_its_last_metrics() -> None:
    server = FakeServer(jobs={ID: an_answer(Phase.SUCCEEDED)})
    assert client_of(server).job(ID).result() == {"accuracy": 0.97}


def test_wishes_carry_what_was_asked() -> None:
    server = FakeServer()
    job = client_of(server).job(ID)
    job.cancel()
    assert server.sent(f"POST jobs/{ID}/cancel")["by"]
    job.hold(stop=True)
    assert server.sent(f"POST jobs/{ID}/hold") == {"by": user(), "stop": True}
    job.scale(worker=8)
    assert server.sent(f"POST jobs/{ID}/scale") == {"by": user(), "wanted": {"worker": 8}}
    job.prioritize(3)
    assert server.sent(f"POST jobs/{ID}/priority") == {"by": user(), "priority": 3}
    job.release()
    job.restart()


def test_logs_events_metrics_why() -> None:
    server = FakeServer(history=a_history())
    job = client_of(server).job(ID)
    assert [str(line.text) for line in job.logs(follow=True, rank=0, tail=3)] == ["line 0", "line 1", "line 2"]
    query = dict(server.requests[-1].url.params)
    assert query == {"follow": "true", "rank": "0", "tail": "3"}
    assert [s.seq for s in job.events()] == [1, 2, 3, 4]
    assert job.metrics()[0].step == 90
    assert job.why().story[0] == "submitted by ann"


def test_watching_gives_typed_events() -> None:
    client = client_of(FakeServer(history=a_history()))
    watching = client.watch()
    assert [next(watching).event.kind for _ in range(4)] == [
        "JobSubmitted",
        "AttemptPlaced",
        "ReplicasStarted",
        "AttemptStarted",
    ]


def test_listings() -> None:
    client = client_of(FakeServer())
    assert [j.name for j in client.jobs(state="RUNNING")] == ["bert"]
    assert client.nodes()[0].node.name == "n01"
    assert client.queues()[0].waiting == 3
    assert client.doctor()[0].ok
    assert client.plan(a_spec()).code == 10


# ---- functions ----


def multiply(a: int, b: int = 2) -> int:
    return a * b


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JOBSCHED_HOME", str(tmp_path))
    return tmp_path


def call(spec: Any, **environ: str) -> int:
    """Run the job's command as its replica would."""
    import subprocess

    command = spec.roles["worker"].command
    return subprocess.run(command, env={"PATH": os.environ["PATH"], **environ}, cwd="/", timeout=300).returncode


@pytest.mark.e2e
def test_a_function_travels_and_its_result_comes_back(home: Path) -> None:
    task: Task[..., int] = jobsched.task(gpus=2, replicas=4, queue="research")(multiply)
    assert task(3) == task.local(3) == 6
    spec = task.spec((3,), {"b": 5}, {})
    assert (spec.name, spec.queue, spec.roles["worker"].replicas.prefer) == ("multiply", "research", 4)
    assert spec.roles["worker"].gpu is not None
    assert spec.roles["worker"].gpu.milli == 2_000
    assert call(spec, RANK="1") == 0
    server = FakeServer(jobs={ID: an_answer(Phase.SUCCEEDED, spec=spec)})
    job = client_of(server).submit(task, 3)
    with pytest.raises(errors.NotFound):
        job.result()  # only rank 0 hands over
    assert call(spec, RANK="0") == 0
    assert job.result() == 15


@pytest.mark.e2e
def test_map_runs_one_call_per_item(home: Path) -> None:
    server = FakeServer()
    jobsched.task(name="sweep")(multiply).map([4, 5], max_parallel=1, client=client_of(server))
    sent = server.sent("POST jobs")["spec"]
    assert sent["array"] == "0-1%1"
    spec = jobsched.JobSpec.model_validate(sent)
    assert call(spec, JOBSCHED_ARRAY_INDEX="1") == 0
    member = client_of(FakeServer(jobs={ID: an_answer(Phase.SUCCEEDED, spec=spec, array_index=1)})).job(ID)
    assert member.result() == 10


@pytest.mark.e2e
def test_another_python_is_refused_before_unpickling(home: Path) -> None:
    spec = Task(multiply, {}).spec((1,), {}, {})
    folder = Path(str(spec.env["JOBSCHED_CALL_DIR"]))
    (folder / "python").write_text("2.7")
    assert call(spec) == 64
    assert f"{sys.version_info.major}.{sys.version_info.minor}" != "2.7"


def test_an_error_in_a_task_option_is_a_spec_error(home: Path) -> None:
    with pytest.raises(errors.SpecError):
        Task(multiply, {"gpus": "-1"}).spec((1,), {}, {})
