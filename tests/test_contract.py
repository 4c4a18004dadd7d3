"""The contract: what replicas read, and what people's unmodified scripts read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from jobsched.contract import ReplicaEnv, from_environ, tf_config, to_environ
from tests.ports import held_ports
from tests.train.gang import ROOT

PEERS = {"chief": ("c0:1",), "ps": ("p0:1", "p1:2"), "worker": ("w0:3", "w1:4"), "evaluator": ("e0:5",)}


def a_replica(**changes: object) -> ReplicaEnv:
    base = ReplicaEnv(job_id="01J", job_name="bert", attempt=2, role="worker", index=1, rank=2, role_rank=1,
                      local_rank=1, world_size=3, local_world_size=2, role_world_size=2, node_rank=1,
                      coordinator="10.0.0.1:2223", peers=PEERS, ports={"tensorboard": 6006})
    return replace(base, **changes)


def test_the_record_survives_the_round_trip() -> None:
    replica = a_replica(in_place=True, checkpoint_dir="/ckpt", array_index=4, threads=2)
    assert from_environ(to_environ(replica, {})) == replica
    assert from_environ({}) is None


def test_a_record_of_a_newer_version_is_read_without_what_is_unknown() -> None:
    environ = to_environ(a_replica(), {})
    data = json.loads(environ["JOBSCHED_CONTRACT"]) | {"invented_later": 1}
    assert from_environ({"JOBSCHED_CONTRACT": json.dumps(data)}) == a_replica()


def test_the_users_own_values_win_only_where_the_contract_says_so() -> None:
    user = {"WANDB_RUN_ID": "mine", "OMP_NUM_THREADS": "7", "RANK": "99", "HOME": "/h"}
    environ = to_environ(a_replica(threads=2), user)
    assert (environ["WANDB_RUN_ID"], environ["OMP_NUM_THREADS"], environ["HOME"]) == ("mine", "7", "/h")
    assert environ["RANK"] == "2"
    assert to_environ(a_replica(threads=2), {})["OMP_NUM_THREADS"] == "2"
    assert "OMP_NUM_THREADS" not in to_environ(a_replica(), {})


def test_tracker_ids_stay_the_same_across_attempts() -> None:
    ids = {(e["WANDB_RUN_ID"], e["WANDB_RESUME"], e["MLFLOW_RUN_ID"])
           for attempt in (1, 2) for e in [to_environ(a_replica(attempt=attempt), {})]}
    assert ids == {("01J", "allow", "01J")}


def test_torch_variables() -> None:
    environ = to_environ(a_replica(), {})
    wanted = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "2223", "RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "1",
              "LOCAL_WORLD_SIZE": "2", "ROLE_RANK": "1", "ROLE_WORLD_SIZE": "2", "GROUP_RANK": "1",
              "PET_NNODES": "3", "PET_NODE_RANK": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "10.0.0.1",
              "PET_MASTER_PORT": "2223", "JOBSCHED_PORT_TENSORBOARD": "6006", "JOBSCHED_ATTEMPT": "2"}
    assert environ.items() >= wanted.items()
    assert "PET_RDZV_BACKEND" not in environ


def test_a_replica_with_pinned_gpus_is_a_node_of_its_own() -> None:
    """`torch.cuda.set_device(LOCAL_RANK)` must find a device although only this replica's own GPUs are visible."""
    environ = to_environ(a_replica(gpu_count=1), {})
    assert (environ["LOCAL_RANK"], environ["LOCAL_WORLD_SIZE"], environ["GROUP_RANK"]) == ("0", "1", "2")


def test_an_elastic_role_gets_torchruns_dynamic_rendezvous() -> None:
    environ = to_environ(a_replica(elastic=True, min_replicas=2, max_replicas=4), {})
    assert environ["PET_NNODES"] == "2:4"
    assert environ["PET_RDZV_BACKEND"] == "c10d"
    assert environ["PET_RDZV_ENDPOINT"] == "10.0.0.1:2223"
    assert "PET_MASTER_ADDR" not in environ


def test_servers_have_no_rank() -> None:
    environ = to_environ(a_replica(role="ps", index=0, rank=-1), {})
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "PET_NNODES"} & environ.keys()
    assert environ["MASTER_ADDR"] == "10.0.0.1"


def test_tf_config_dense_lists_every_declared_type() -> None:
    assert tf_config(a_replica()) == {
        "cluster": {"chief": ["c0:1"], "ps": ["p0:1", "p1:2"], "worker": ["w0:3", "w1:4"], "evaluator": ["e0:5"]},
        "task": {"type": "worker", "index": 1},
        "environment": "cloud",
    }


def test_tf_config_sparse_of_a_worker_and_of_a_server() -> None:
    assert tf_config(a_replica(sparse=True)) == {
        "cluster": {"ps": ["p0:1", "p1:2"], "worker": {"1": "w1:4"}},
        "sparseCluster": {"ps": ["p0:1", "p1:2"], "worker": {"1": "w1:4"}},
        "task": {"type": "worker", "index": 1},
        "environment": "cloud",
    }
    server = tf_config(a_replica(sparse=True, role="ps", index=1))
    assert server["cluster"] == {"ps": {"1": "p1:2"}}
    assert server["sparseCluster"] == {"ps": ["p1:2"], "worker": {}}


def test_ps_lite_variables() -> None:
    environ = to_environ(a_replica(role="ps", index=0, rank=-1), {})
    assert environ.items() >= {"DMLC_ROLE": "server", "DMLC_NUM_SERVER": "2", "DMLC_NUM_WORKER": "3",
                               "DMLC_PS_ROOT_URI": "10.0.0.1", "DMLC_PS_ROOT_PORT": "2223"}.items()
    assert to_environ(a_replica(), {})["DMLC_ROLE"] == "worker"
    assert "DMLC_ROLE" not in to_environ(a_replica(peers={"worker": ("a:1", "b:2")}), {})


@pytest.mark.e2e
def test_an_unmodified_torchrun_script_runs(tmp_path: Path) -> None:
    """Two replicas of jobs/torchrun_plain, each started as `torchrun train.py` with nothing but the environment."""
    with held_ports(1) as (port,):
        _two_with_torchrun(tmp_path, port)


def _two_with_torchrun(tmp_path: Path, port: int) -> None:
    replicas = []
    for rank in range(2):
        replica = ReplicaEnv(job_id="j", job_name="plain", attempt=1, role="worker", index=rank, rank=rank,
                             role_rank=rank, local_rank=rank, world_size=2, local_world_size=2, role_world_size=2,
                             coordinator=f"127.0.0.1:{port}", peers={"worker": ("127.0.0.1:1", "127.0.0.1:2")},
                             threads=1)
        with open(tmp_path / f"{rank}.log", "wb") as log:
            replicas.append(subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", "train.py"], cwd=ROOT / "jobs" / "torchrun_plain",
                env=to_environ(replica, dict(os.environ)), stdout=log, stderr=log))
    try:
        codes = [process.wait(300) for process in replicas]
    finally:
        for process in replicas:
            process.kill()
            process.wait()
    texts = [(tmp_path / f"{rank}.log").read_text() for rank in range(2)]
    assert codes == [0, 0], texts
    for rank, text in enumerate(texts):
        assert f"rank {rank} of 2: step 200" in text


def test_an_unmodified_tf_config_script_reads_its_place() -> None:
    script = ("import json, os; c = json.loads(os.environ['TF_CONFIG']); t = c['task'];"
              "print(c['cluster'][t['type']][t['index']], len(c['cluster']['ps']))")
    result = subprocess.run([sys.executable, "-S", "-c", script], env=to_environ(a_replica(), {}),
                            capture_output=True, text=True, check=True)
    assert result.stdout == "w1:4 2\n"
