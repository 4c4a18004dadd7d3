"""What is asked of a Ray cluster, reviewed as files; and what it answers, as nodes and ends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobsched.backends import ray_render as render
from jobsched.backends import registry
from jobsched.backends.ray_render import Bundle, CannotRender, Place
from jobsched.contract import ReplicaEnv
from jobsched.core.job import Reason
from jobsched.core.launch import Launch, LaunchKey
from jobsched.core.resources import GpuId, GpuShare, NodeName, Resources
from jobsched.errors import MissingExtra
from jobsched.spec.backends import RayBackend as Config
from tests.backends import golden

GIB = 1 << 30
CONFIG = Config()
KEY = LaunchKey("01j/2/worker/1/0")


def a_launch(**fields: Any) -> Launch:
    contract = ReplicaEnv(
        "01j", "digits", 2, "worker", 1, rank=1, world_size=2, node="gpu-a", token="t-1", checkpoint_dir="/shared/01j",
        peers={"worker": ("10.0.0.1:20000", "10.0.0.2:20000")}, coordinator="10.0.0.1:20001", gpu_count=1,
    )
    given: dict[str, Any] = {
        "command": ("python", "train.py"), "env": {"COLOUR": "blue"}, "working_dir": "/home/ann/digits",
        "cpu_milli": 1_500, "memory_bytes": 4 * GIB, "gpus": (GpuShare(GpuId("gpu-a/gpu-0"), 500),),
        "ports": (20_000, 20_001), "keep_ms": 60_000,
    }
    return Launch(KEY, "digits", NodeName("gpu-a"), contract=contract, **(given | fields))


def raw_node(node_id: str = "aa11" * 14, **fields: Any) -> dict[str, Any]:
    return {
        "NodeID": node_id, "Alive": True, "NodeManagerAddress": "10.0.0.1", "NodeManagerHostname": "Gpu_A.example.org",
        "NodeName": "10.0.0.1", "Labels": {render.NODE_ID: node_id, "rack": "r1"},
        "Resources": {
            "CPU": 16.0, "memory": 64.0 * GIB, "GPU": 2.0, "accelerator_type:H100": 1.0, "node:10.0.0.1": 1.0,
        },
    } | fields


def test_an_actor_and_its_group() -> None:
    launch = a_launch()
    bundles = [Bundle("aa11", render.needs(launch), KEY), Bundle("bb22", Resources(), "01j/2/ps/0/0")]
    addresses = {"aa11": "10.0.0.1", "bb22": "10.0.0.2"}
    golden.check("ray_group", render.group_request("jobsched:h:" + KEY, bundles, addresses))
    place = Place("jobsched:h:" + KEY, 0)
    golden.check("ray_actor", render.actor_request(launch, place, "10.0.0.1", "/tmp/x/working_dir.tar", CONFIG))


def test_pretended_gpus_are_not_asked_of_ray() -> None:
    launch = a_launch(gpus=(GpuShare(GpuId("gpu-a/sim-0")), GpuShare(GpuId("gpu-a/sim-1"))))
    request = render.actor_request(launch, Place("g", 0), "10.0.0.1", "", CONFIG)
    assert not request["ray_gpus"]
    assert request["demand"]["num_gpus"] == 2, "reserved all the same"
    assert request["order"]["env"]["JOBSCHED_SIM_GPUS"] == "gpu-a/sim-0,gpu-a/sim-1"
    assert request["order"]["cwd"] == "/home/ann/digits"


def test_who_may_leave_early_has_a_group_of_its_own() -> None:
    fixed = [replace(a_launch(), key=LaunchKey(f"01j/2/ps/{i}/0")) for i in range(2)]
    elastic = [replace(one, contract=replace(one.contract, elastic=True)) for one in fixed]
    assert render.gangs([fixed[0], elastic[0], fixed[1], elastic[1]]) == [fixed, [elastic[0]], [elastic[1]]]
    assert render.gangs([]) == []


def test_checkpoints_in_a_copied_directory_are_refused() -> None:
    launch = a_launch()
    lost = replace(launch, contract=replace(launch.contract, checkpoint_dir="/home/ann/digits/ckpt"))
    assert render.order(lost, CONFIG, copied=False).cwd == "/home/ann/digits"
    with pytest.raises(CannotRender, match="all nodes share"):
        render.order(lost, CONFIG, copied=True)


def test_a_node_as_ray_tells_it() -> None:
    node = render.nodes([raw_node()], CONFIG)["aa11" * 14]
    assert (node.name, node.cpu_milli, node.memory_bytes) == ("gpu-a-11aa11", 16_000, 64 * GIB)
    assert [(gpu.id, gpu.kind, gpu.memory_bytes // GIB) for gpu in node.gpus] == [
        ("gpu-a-11aa11/gpu-0", "h100-80gb", 80), ("gpu-a-11aa11/gpu-1", "h100-80gb", 80)]
    assert (node.address, node.labels) == ("10.0.0.1", (("rack", "r1"),))


def test_names_given_at_the_start_are_kept_and_distinct() -> None:
    raws = [raw_node(NodeName="one"), raw_node("bb22" * 14, NodeName="one"), raw_node("cc33" * 14)]
    found = render.nodes(raws, CONFIG)
    assert [node.name for node in found.values()] == ["one", "one-22bb22", "gpu-a-33cc33"]


def test_kinds_come_from_the_configuration_the_label_or_the_resource() -> None:
    config = Config(gpu_kinds={"H100": "h100-94gb", "SIM": "sim-gpu"})
    label = raw_node(Labels={"ray.io/accelerator-type": "SIM"})
    kinds = [next(iter(render.nodes([raw], config).values())).gpus[0].kind for raw in (raw_node(), label)]
    assert kinds == ["h100-94gb", "sim-gpu"]
    unknown = raw_node(Resources={"GPU": 1.0})
    assert render.nodes([unknown], CONFIG)["aa11" * 14].gpus[0].kind == "gpu"


def test_foreign_use_is_what_is_left_unexplained() -> None:
    total, free = Resources(16_000, 64 * GIB, 2_000), Resources(9_000, 60 * GIB, 500)
    ours = [Bundle("a", Resources(4_000, GIB, 1_000), KEY), Bundle("a", Resources(1_000, GIB, 0), "")]
    assert render.foreign(total, free, ours) == Resources(3_000, 3 * GIB, 500)
    assert render.foreign(total, total, ours) == Resources(), "not reserved yet"


def test_others_gpus_are_the_last_that_are_not_ours() -> None:
    node = render.nodes([raw_node(Resources={"GPU": 3.0})], CONFIG)["aa11" * 14]
    last = node.gpus[2].id
    shown = render.with_foreign(node, Resources(1_000, GIB, 1_500), {last: 1_000, node.gpus[1].id: 250})
    assert shown.foreign == Resources(1_000, GIB, 0)
    assert shown.foreign_gpus == (GpuShare(node.gpus[0].id, 750), GpuShare(node.gpus[1].id, 750))


DEATHS = {
    "The actor is dead because it was killed by `ray.kill`.": (Reason.REPLICA_LOST, "ray.kill"),
    "The actor died because its node has died. Node Id: 5a2d": (Reason.NODE_LOST, "node died"),
    "The actor is dead because its worker process has died. Worker exit type: NODE_OUT_OF_MEMORY Worker exit detail:"
    " Task was killed due to the node running low on memory.": (Reason.OOM, "memory monitor"),
    "Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a connection error code 2.":
        (Reason.REPLICA_LOST, "SYSTEM_ERROR"),
    "The actor is dead because its placement group was removed.": (Reason.REPLICA_LOST, "placement group"),
    "ModuleNotFoundError: No module named 'jobsched'": (Reason.START_FAILED, "pip install"),
}


@pytest.mark.parametrize("text", DEATHS)
def test_a_death_in_rays_words(text: str) -> None:
    reason, words = DEATHS[text]
    found, said = render.death(text, node_lives=True)
    assert found is reason
    assert words in said
    assert render.death(text, node_lives=False)[0] is (Reason.OOM if reason is Reason.OOM else Reason.NODE_LOST)


def test_what_was_not_reserved_in_time() -> None:
    assert render.late([KEY], 20.0).startswith("Ray did not reserve what 1 replica needs within 20 s")


def test_without_the_package_the_line_that_installs_it_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra) as caught:
        registry.make_ray(CONFIG, tmp_path)
    assert caught.value.hint == 'pip install "jobsched[ray]"'
