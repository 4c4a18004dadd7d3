"""A real GPU under a real server: inventory by NVML against what CUDA sees, pinning by UUID, and training on it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from jobsched.backends.gpus import read_inventory
from jobsched.cli.demo import clear_away
from jobsched.client import locate
from jobsched.client.client import Client
from jobsched.core.job import Phase
from jobsched.load import load_job_file

GPUS = read_inventory().gpus
JOBS = Path(__file__).parents[2] / "jobs"
PATIENCE_S = 110.0

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(not GPUS, reason="no GPU that NVML knows of")]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("JOBSCHED_SERVER", "JOBSCHED_OUTPUT"):
            patch.delenv(name, raising=False)
        patch.setenv("JOBSCHED_HOME", str(home))
        patch.setenv("JOBSCHED_CONFIG", str(home / "none.toml"))
        locate.start(home)
        with Client() as found:
            yield found
        assert clear_away(home) == []


def python(code: str, **role: object) -> dict[str, object]:
    return {"command": [sys.executable, "-c", code], **role}


def said(client: Client, spec: dict[str, object]) -> list[str]:
    """What the job's replicas printed; it must succeed."""
    job = client.submit(spec)
    job.wait(timeout=PATIENCE_S)
    lines = sorted(line.text for line in job.logs())
    assert job.state is Phase.SUCCEEDED, lines
    return lines


SEES = (
    "import torch; n = torch.cuda.device_count()"
    "; print(n, *(torch.cuda.get_device_properties(i).uuid for i in range(n)))"
    "; x = torch.ones(64, 64, device='cuda') if n else None; assert n == 0 or float((x @ x).sum()) == 64.0 ** 3"
)


def test_the_node_offers_what_cuda_sees(client: Client) -> None:
    import torch

    (node,) = client.nodes()
    assert [gpu.id for gpu in node.node.gpus] == [gpu.id for gpu in GPUS]
    whole = [gpu for gpu in GPUS if ":" not in gpu.kind]
    assert len(whole) == torch.cuda.device_count()
    for index, gpu in enumerate(whole):
        seen = torch.cuda.get_device_properties(index)
        assert gpu.kind.split("-")[0] in seen.name.lower()
        assert abs(gpu.memory_bytes - seen.total_memory) < 0.03 * seen.total_memory


def test_a_replica_sees_its_gpu_and_no_other(client: Client) -> None:
    (line,) = said(client, python(SEES, gpu="any:1"))
    count, uuid = line.split()
    assert count == "1"
    assert f"GPU-{uuid}" in {gpu.id for gpu in GPUS}


def test_a_replica_without_a_gpu_sees_none(client: Client) -> None:
    assert said(client, python(SEES)) == ["0"]


def test_two_replicas_share_one_gpu(client: Client) -> None:
    first, second = said(client, python(SEES, gpu="any:0.5", replicas=2))
    assert first == second
    assert first.startswith("1 ")


def test_a_gpu_is_never_given_to_two(client: Client) -> None:
    """More jobs than GPUs: their times on the device never overlap."""
    code = "import time; a = time.time(); time.sleep(0.5); print(a, time.time())"
    jobs = [client.submit(python(code, gpu="any:1")) for _ in range(len(GPUS) + 2)]
    spans: dict[str, list[tuple[float, float]]] = {}
    for job in jobs:
        job.wait(timeout=PATIENCE_S)
        begin, end = (float(word) for word in next(iter(job.logs())).text.split())
        placed = next(e.event for e in job.events() if e.event.kind == "AttemptPlaced")
        spans.setdefault(placed.bindings[0].gpus[0].gpu, []).append((begin, end))
    for times in spans.values():
        times.sort()
        assert all(before[1] <= after[0] for before, after in pairwise(times))


@pytest.mark.parametrize("name", ["digits_ps", "digits_ddp"])
def test_examples_train_on_the_gpu(client: Client, name: str) -> None:
    """The same files; only the share of the device is smaller, so that one GPU is enough for the gang."""
    spec = load_job_file(str(JOBS / name / "job.yaml"), environ=dict(os.environ))
    roles = {
        key: role.model_copy(update={"gpu": role.gpu.model_copy(update={"milli": 250})}) if role.gpu else role
        for key, role in spec.roles.items()
    }
    job = client.submit(spec.model_copy(update={"roles": roles}))
    job.wait(timeout=PATIENCE_S)
    assert job.state is Phase.SUCCEEDED, [line.text for line in job.logs()][-20:]
    assert job.result()["accuracy"] >= 0.95
