"""A Docker engine that is restarted, and a registry that lets nobody in, under a real server: what people are told, how
soon, and that nothing runs twice. The engine is one of the test's own (see `docker_stage.SecondEngine`).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from http.server import HTTPServer
from pathlib import Path

import pytest

from jobsched.client.client import Client, JobHandle
from jobsched.client.remote import Endpoint, Remote
from jobsched.core.job import Phase, Reason
from jobsched.spec.server import ServerConfig
from jobsched.wiring import Server
from tests.backends import docker_stage
from tests.backends.test_docker import Forbidding

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1_200), docker_stage.needs_docker]

PATIENCE_S = 120.0
TOLD_S = 60.0
"""How soon people must know why, on a machine that others use: it takes two or three seconds on a quiet one."""
ALONE = """
import fcntl, os, time
place = os.environ["JOBSCHED_CHECKPOINT_DIR"]
lock = open(f"{place}/lock-{os.environ['RANK']}", "w")
with open(f"{place}/starts", "a") as out:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        out.write("alone\\n")
    except OSError:
        out.write("TWICE\\n")
print("up", flush=True)
time.sleep(300)
"""


def wait(holds: Callable[[], object], patience_s: float = PATIENCE_S) -> float:
    """Seconds until it held."""
    begun = time.monotonic()
    while not holds():
        assert time.monotonic() - begun < patience_s, "waited too long"
        time.sleep(0.05)
    return time.monotonic() - begun


def serving(home: Path, url: str, image: str) -> Server:
    engine = {"url": url, "gpus": "sim-gpu:4", "same_files": True}
    docker = {"image": image, "engines": [engine], "checkpoints": str(home / "checkpoints")}
    return Server(ServerConfig.model_validate({"home": str(home), "backend": {"docker": docker}}))


def client_of(server: Server) -> Client:
    return Client(remote=Remote(Endpoint(server.url, server.token, "the test")))


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="an engine of its own needs root")
def test_an_engine_that_is_restarted(tmp_path: Path) -> None:
    with docker_stage.SecondEngine(tmp_path) as engine:
        image = docker_stage.put_image(engine._client())
        with serving(tmp_path / "home", engine.url, image) as server, client_of(server) as client:
            job = client.submit({"command": ["python", "-c", ALONE], "replicas": 2})
            job.wait("running", timeout=PATIENCE_S)
            wait(lambda: [line.text for line in job.logs()].count("up") == 2)
            begun = time.monotonic()
            engine.stop()
            wait(lambda: "engine" in job.why().headline)
            told_s = time.monotonic() - begun
            assert "left alone" in job.refresh().headline
            engine.start()
            back = time.monotonic()
            wait(lambda: job.refresh().attempts == 2 and job.state is Phase.RUNNING)
            again_s = time.monotonic() - back
            print(f"told {told_s:.1f} s after the engine was asked to stop; runs {again_s:.1f} s after it was back")
            assert told_s < TOLD_S
            assert "the engine was restarted while it ran" in "\n".join(job.why().story)
            assert (job.answer.job.failures, job.answer.job.attempt) == (0, 2), "nobody's fault, and not the job's"
            wait(lambda: [line.text for line in job.logs()].count("up") == 2)
            (starts,) = (tmp_path / "home" / "checkpoints").rglob("starts")
            assert starts.read_text().split() == ["alone"] * 4
            job.cancel().wait(timeout=PATIENCE_S)


@pytest.fixture
def registry() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Forbidding) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_registry_that_refuses_our_credentials(tmp_path: Path, registry: str) -> None:
    with serving(tmp_path / "home", docker_stage.url(), docker_stage.image()) as server, client_of(server) as client:
        begun = time.monotonic()
        job: JobHandle = client.submit({
            "command": "true", "image": f"{registry}/team/secret:1", "restart": {"max": 5},
        })  # fmt: skip
        wait(lambda: job.why().job.cause is not None)
        told_s = time.monotonic() - begun
        print(f"told {told_s:.1f} s after it was submitted")
        assert told_s < TOLD_S
        why = job.why()
        assert why.job.cause is not None
        assert why.job.cause.reason is Reason.IMAGE_ERROR
        assert "credentials" in why.job.cause.message
        assert registry in why.job.cause.message
        wait(lambda: job.refresh().attempts >= 2)
        assert not job.state.terminal, "it is tried again, ever more rarely"
        assert job.answer.job.failures == 0, "none of its own five restarts is burnt"
        job.cancel().wait(timeout=PATIENCE_S)
