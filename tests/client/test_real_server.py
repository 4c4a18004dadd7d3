"""SDK and CLI against a real embedded server with real processes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobsched import errors, task
from jobsched.cli.demo import clear_away
from jobsched.client import locate
from jobsched.client.client import Client
from jobsched.core.job import Phase
from tests.ports import port_range

pytestmark = pytest.mark.e2e

CONFIG = """\
backend:
  local:
    virtual_nodes:
      - {{count: 2, gpus: "sim-gpu:4"}}
    ports: {ports}
"""
PATIENCE_S = 120
"""Only a failing test waits as long."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("home")
    (place / "server.yaml").write_text(CONFIG.format(ports=port_range()))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("JOBSCHED_SERVER", "JOBSCHED_OUTPUT"):
            patch.delenv(name, raising=False)
        patch.setenv("JOBSCHED_HOME", str(place))
        patch.setenv("JOBSCHED_CONFIG", str(place / "none.toml"))
        locate.start(place)
        yield place
        assert clear_away(place) == []


@pytest.fixture
def client(home: Path) -> Iterator[Client]:
    with Client() as found:
        yield found


def cli(*words: str, code: int = 0) -> str:
    """stdout of a command that must end with `code`."""
    done = subprocess.run(
        [sys.executable, "-m", "jobsched.cli.main", *words], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == code, done.stderr
    return done.stdout


def test_a_function_of_a_notebook_runs_as_a_gang(client: Client) -> None:
    @task(replicas=2, gpus=1)
    def add(a: int, b: int) -> dict[str, int]:
        return {"sum": a + b, "rank": int(os.environ["RANK"]), "world": int(os.environ["WORLD_SIZE"])}

    assert client.submit(add, 2, 3).result(timeout=PATIENCE_S) == {"sum": 5, "rank": 0, "world": 2}
    squares = task()(lambda x: x * x).map([1, 2, 3], max_parallel=2, client=client)
    assert squares.results(timeout=PATIENCE_S) == [1, 4, 9]


def test_a_function_that_raises_shows_rank_code_and_traceback(client: Client) -> None:
    @task()
    def broken() -> None:
        raise ValueError("no such thing")

    with pytest.raises(errors.JobFailed) as caught:
        client.submit(broken).result(timeout=PATIENCE_S)
    for text in ("rank 0", "code 1", "ValueError: no such thing"):
        assert text in str(caught.value)


def test_run_ends_with_json_and_the_jobs_code(home: Path) -> None:
    script = "echo rank $RANK; exit $((RANK * 7))"
    out = cli("run", "-o", "json", "--role", "worker=2", "--", "sh", "-c", script, code=7)
    last = json.loads(out.splitlines()[-1])
    assert (last["phase"], last["exit_code"], last["attempts"]) == ("FAILED", 7, 1)
    assert last["cause"]["rank"] == 1
    why = cli("why", last["id"])
    assert "root cause: worker/1 exited with code 7" in why
    assert "rank 1" in cli("logs", last["id"], "--rank", "1")
    assert json.loads(cli("debug", "verify", "-o", "json"))["ok"]
    assert "FAILED" in cli("describe", last["name"])
    events = json.loads(cli("events", last["id"], "--json"))["events"]
    placed = next(e["seq"] for e in events if e["event"]["kind"] == "AttemptPlaced")
    assert json.loads(cli("debug", "replay", last["id"], "--at", str(placed), "--json"))["phase"] == "STARTING"


def test_ctrl_c_leaves_the_job_alone(client: Client) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "jobsched.cli.main", "run", "--name", "sleeper", "--", "sh", "-c",
         "echo up; exec sleep 600"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells ignore it in the background
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    job = client.job("sleeper")
    assert f"jobsched cancel {job.id}" in said
    assert job.state is Phase.RUNNING
    assert job.cancel().wait(timeout=PATIENCE_S).state is Phase.CANCELLED
    cli("wait", job.id, code=143)


def test_update_in_place_and_from_the_next_attempt(client: Client, tmp_path: Path) -> None:
    script = "echo colour $COLOUR; exec sleep 300"
    job = client.submit({"name": "changed", "command": script, "env": {"COLOUR": "red"}})
    job.wait("running", timeout=PATIENCE_S)
    shown = json.loads(cli("update", "changed", "--priority", "high", "-o", "json"))["jobs"][0]
    assert (shown["fields"], shown["restart"]) == (["priority", "priority_class"], False)
    assert shown["priority"] > 0
    assert job.update(priority=7).job.priority == 7
    assert job.update(dry_run=True, **{"env.COLOUR": "blue"}).restart
    assert (job.refresh().attempts, job.state) == (1, Phase.RUNNING)
    with pytest.raises(errors.Conflict):
        job.update(expected=0, **{"env.COLOUR": "blue"})
    file = tmp_path / "job.yaml"
    file.write_text(f"name: changed\npriority: 7\ncommand: {script}\nenv: {{COLOUR: green}}\nworking_dir: /\n")
    shown = json.loads(cli("update", "changed", "-f", str(file), "-e", "COLOUR=blue", "-o", "json"))["jobs"][0]
    assert "env" in shown["fields"]
    assert shown["restart"]
    deadline = time.monotonic() + PATIENCE_S
    while not (job.refresh().attempts == 2 and job.state is Phase.RUNNING):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    while "colour blue" not in [line.text for line in job.logs()]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    cli("update", "changed", code=2)
    cli("update", "changed", "--set", "name=other", code=2)
    cli("update", "nobody", "changed", "--priority", "1", code=3)
    assert job.refresh().answer.job.priority == 1, "what fails does not keep the others from being done"
    job.cancel().wait(timeout=PATIENCE_S)
    cli("update", "changed", "--priority", "2", code=5)


SAVES = """
import time
from jobsched.train.context import context
for step in range(100_000):
    context.report(step=step, loss=1.0)
    if context.should_checkpoint():
        context.checkpoint_saved(f"/ckpt/{step}")
    time.sleep(0.05)
"""


def test_a_running_job_saves_on_request_and_goes_on(client: Client, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SAVES)
    job = client.submit({"name": "saver", "command": f"{sys.executable} train.py", "working_dir": str(tmp_path),
                         "env": {"PYTHONPATH": str(Path(__file__).parents[2])}, "labels": {"team": "savers"}})
    job.wait(5, timeout=PATIENCE_S)
    assert cli("checkpoint", "saver").startswith("step ")
    first = job.refresh().answer.job.checkpoint
    assert first is not None
    job.wait(first.step + 3, timeout=PATIENCE_S)
    second = job.checkpoint(timeout=PATIENCE_S)
    assert second is not None
    assert second.step > first.step
    assert (job.refresh().state, job.attempts) == (Phase.RUNNING, 1)
    rows = cli("gpus", "--no-headers").splitlines()
    assert len(rows) == 8
    assert "free" in rows[0]
    watching = subprocess.Popen([sys.executable, "-m", "jobsched.cli.main", "metrics", "saver", "-w", "-o", "jsonl"],
                                stdout=subprocess.PIPE, text=True)
    attached = subprocess.Popen([sys.executable, "-m", "jobsched.cli.main", "attach", "saver"],
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert watching.stdout is not None
    assert json.loads(watching.stdout.readline())["metrics"]["loss"] == 1.0
    cli("cancel", "-y", "-l", "team=savers")
    assert watching.wait(PATIENCE_S) == 0
    assert attached.wait(PATIENCE_S) == 143
    cli("checkpoint", "saver", code=5)
    cli("cancel", "-y", code=2)


def test_a_job_that_does_not_listen_is_not_asked_to_save(client: Client, tmp_path: Path) -> None:
    job = client.submit({"name": "deaf", "command": "exec sleep 300", "replicas": 2, "gpu": "any:1"})
    job.wait("running", timeout=PATIENCE_S)
    with pytest.raises(errors.Conflict, match="listens for the checkpoint signal"):
        job.checkpoint()
    used = [row.split() for row in cli("gpus", "--no-headers").splitlines() if "deaf/" in row]
    assert sorted(row[-1] for row in used) == ["deaf/worker/0", "deaf/worker/1"]
    assert {row[4] for row in used} == {"used"}
    assert len(cli("gpus", "--free", "-q").split()) == 6
    file = tmp_path / "job.yaml"
    file.write_text("name: deaf\ncommand: exec sleep 300\nreplicas: 2\ngpu: any:1\nworking_dir: /\npriority: 3\n")
    out = cli("diff", str(file), code=1)
    assert "priority: 0 -> 3" in out
    cli("update", "deaf", "-f", str(file), "-y")
    assert cli("diff", str(file), "deaf") == ""
    cli("diff", str(file), "nobody", code=3)
    job.cancel().wait(timeout=PATIENCE_S)


def test_hold_release_and_what_can_never_run(client: Client) -> None:
    job_id = cli("submit", "-q", "--hold", "--", "true").strip()
    job = client.job(job_id)
    assert job.state is Phase.QUEUED
    assert job.why().verdict is not None
    assert "Held" in cli("why", job_id)
    job.release()
    assert job.wait("succeeded", timeout=PATIENCE_S).state is Phase.SUCCEEDED
    cli("submit", "--gpus", "64", "--", "true", code=8)
    assert json.loads(cli("plan", "-o", "json", "--gpus", "1", "--", "true"))["code"] == 0
    with pytest.raises(errors.NotFound):
        client.job("there-is-no-such-job")


def test_logs_and_waits_survive_a_killed_server(home: Path, client: Client, tmp_path: Path) -> None:
    script = f"i=0; while [ ! -e {tmp_path}/over ]; do echo line $i; i=$((i+1)); sleep 0.1; done"
    job = client.submit({"command": script, "name": "talker"})
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(line.text for line in job.logs(follow=True)), daemon=True)
    reader.start()
    job.wait("running", timeout=PATIENCE_S)

    def more_than(count: int) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while len(lines) <= count:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    more_than(2)
    os.kill(locate.server_pid(home), signal.SIGKILL)
    locate.start(home)
    more_than(len(lines) + 2)
    (tmp_path / "over").touch()
    assert job.wait("succeeded", timeout=PATIENCE_S).attempts == 1
    reader.join(PATIENCE_S)
    assert not reader.is_alive()
    assert lines == [f"line {n}" for n in range(len(lines))]
    assert lines == [line.text for line in job.logs()]
