"""Requests to Docker engines and what is read from their answers, without any engine."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import ValidationError

from jobsched.backends import docker_render as render
from jobsched.contract import ReplicaEnv, to_environ
from jobsched.core.job import Reason
from jobsched.core.launch import Launch, LaunchKey
from jobsched.core.node import Gpu
from jobsched.core.observation import ReplicaReport, Seen
from jobsched.core.resources import GpuId, GpuShare, NodeName, Resources
from jobsched.spec.backends import DockerBackend, DockerEngine
from tests.backends import golden

KEY = LaunchKey("01jobid/2/worker/1/0")
NOW = datetime(2026, 1, 1, 12, 0, 10, tzinfo=UTC)


def a_launch(**fields: Any) -> Launch:
    contract = ReplicaEnv(
        job_id="01jobid", job_name="bert", attempt=2, role="worker", index=1, rank=1, world_size=2, node="gpu-1",
        peers={"ps": ("ps-0:2222",), "worker": ("worker-0:2222", "worker-1:2222")}, coordinator="worker-0:2223",
        token="t", secret="s", checkpoint_dir="/var/lib/jobsched/checkpoints/01jobid", gpu_count=2, threads=4,
    )
    return Launch(**{
        "key": KEY, "job_name": "bert", "node": NodeName("gpu-1"), "command": ("python", "train.py"),
        "contract": contract, "env": {"LR": "0.1"}, "working_dir": "/home/me/bert", "image": "team/bert:3",
        "cpu_milli": 4_000, "memory_bytes": 32 * 2**30,
        "gpus": (GpuShare(GpuId("GPU-aaaa")), GpuShare(GpuId("GPU-bbbb"))), **fields,
    })


def a_site(engine: dict[str, Any] | None = None, *, several: bool = False, **config: Any) -> render.Site:
    fields = {"checkpoints": "/var/lib/jobsched/checkpoints", **config}
    made = DockerEngine.model_validate(engine or {})
    return render.Site(
        home_id="c0ffee", config=DockerBackend.model_validate(fields), engine=made, user="1000:1000",
        several=several, cpu_count=64, checkpoints="/var/lib/jobsched/checkpoints",
        reports="/var/lib/jobsched/run/docker" if made.shares_files else "",
    )


@pytest.mark.parametrize(("name", "launch", "site"), [
    ("docker_one_engine", a_launch(), a_site()),
    ("docker_several_engines", a_launch(
        gpus=(GpuShare(GpuId("GPU-aaaa"), 500),), ports=(20_001, 20_002)), a_site(
        {"url": "ssh://me@gpu-1"}, several=True)),
    ("docker_read_only", a_launch(gpus=(), memory_bytes=0, image=""), a_site(
        read_only=True, image="jobsched/train-cpu", volumes=["/data:/data:ro", "/srv/models:/models"])),
    ("docker_alone_on_a_virtual_gpu", replace(
        a_launch(gpus=(GpuShare(GpuId("gpu-1/sim-0")),)),
        contract=replace(a_launch().contract, peers={"worker": ("worker-1:2222",)})), a_site(working_dir="mount")),
])
def test_the_request_is_as_reviewed(name: str, launch: Launch, site: render.Site) -> None:
    request = render.create_request(launch, site)
    environ = dict(entry.split("=", 1) for entry in request["Env"])
    contract = to_environ(launch.contract, {})
    assert contract.keys() <= environ.keys()
    request["Env"] = [f"{name}={value}" for name, value in environ.items() if name not in contract]
    golden.check(name, request)


def test_the_network_is_the_attempts_own() -> None:
    golden.check("docker_network", render.network_request("c0ffee", KEY))


def test_limits_never_exceed_the_engine() -> None:
    request = render.create_request(a_launch(cpu_milli=100_000, memory_bytes=1), a_site())
    assert request["HostConfig"]["NanoCpus"] == 64 * 10**9
    assert request["HostConfig"]["Memory"] == render.LEAST_MEMORY


def test_a_replica_without_gpus_sees_none_even_if_its_image_asks_for_all() -> None:
    request = render.create_request(a_launch(gpus=()), a_site())
    assert "DeviceRequests" not in request["HostConfig"]
    assert {"NVIDIA_VISIBLE_DEVICES=void", "CUDA_VISIBLE_DEVICES="} <= set(request["Env"])


def test_no_image_is_told_with_the_remedy() -> None:
    with pytest.raises(render.CannotRender, match="image:"):
        render.create_request(a_launch(image=""), a_site())


@pytest.mark.parametrize(("wanted", "engine", "config", "mounted"), [
    ("", {}, {}, ""),
    ("s3://bucket/x", {}, {}, ""),
    ("/var/lib/jobsched/checkpoints/01jobid", {}, {}, "/var/lib/jobsched/checkpoints/01jobid"),
    ("/var/lib/jobsched/checkpoints/01jobid", {"url": "tcp://h:1"}, {}, "/var/lib/jobsched/checkpoints"),
    ("/home/me/bert/ckpt", {}, {}, "/home/me/bert/ckpt"),
    ("/home/me/bert/ckpt", {}, {"working_dir": "mount"}, ""),
    ("/models/x", {}, {"volumes": ["/srv/models:/models"]}, ""),
    ("/modelsx/x", {}, {"volumes": ["/srv/models:/models"]}, None),
    ("/home/me/bert/ckpt", {"url": "tcp://h:1"}, {}, None),
    ("/etc", {}, {}, None),
])
def test_checkpoints_are_kept_or_the_launch_is_refused(
    wanted: str, engine: dict[str, Any], config: dict[str, Any], mounted: str | None
) -> None:
    launch = a_launch()
    launch = replace(launch, contract=replace(launch.contract, checkpoint_dir=wanted))
    if mounted is None:
        with pytest.raises(render.CannotRender, match=r"checkpoint\.dir"):
            render.create_request(launch, a_site(engine, **config))
    else:
        assert render.checkpoint_mount(launch, a_site(engine, **config)) == mounted


@pytest.mark.parametrize(("working_dir", "config", "how"), [
    ("/home/me/bert", {}, "copy"),
    ("", {}, "there"),
    ("/home/me/bert", {"working_dir": "image"}, "there"),
    ("/home/me/bert", {"working_dir": "mount"}, "mount"),
    ("/data/me", {"volumes": ["/data"]}, "there"),
])
def test_how_the_working_directory_comes_in(working_dir: str, config: dict[str, Any], how: str) -> None:
    assert render.directory_by(a_launch(working_dir=working_dir), a_site(**config)) == how


def an_end(**state: Any) -> ReplicaReport:
    full = {"Status": "exited", "Running": False, "ExitCode": 0, "OOMKilled": False, "Error": "",
            "FinishedAt": "2026-01-01T12:00:08.123456789Z", **state}
    return render.ended(ReplicaReport(KEY, NodeName("gpu-1"), Seen.RUNNING), {"State": full}, NOW)


def test_ends() -> None:
    end = an_end()
    assert (end.state, end.exit_code, end.signal, end.failure, end.ended_age_ms) == (
        Seen.EXITED, 0, None, Reason.NONE, 1_876)
    assert (an_end(ExitCode=255).exit_code, an_end(ExitCode=255).signal) == (255, None)
    assert (an_end(ExitCode=137).exit_code, an_end(ExitCode=137).signal) == (None, 9)
    assert an_end(ExitCode=137, OOMKilled=True).failure is Reason.OOM
    assert an_end(ExitCode=0, OOMKilled=True).failure is Reason.NONE, "a child's death is not the replica's"
    failed = an_end(Status="created", Error=(
        'OCI runtime create failed: runc create failed: exec: "trian": executable file not found in $PATH: unknown'))
    assert (failed.failure, failed.exit_code) == (Reason.START_FAILED, 127)
    assert failed.message == 'exec: "trian": executable file not found in $PATH'


@pytest.mark.parametrize(("text", "wrong"), [
    ('exec: "trian": executable file not found in $PATH', True),
    ('invalid mount config for type "bind": bind source path does not exist: /data', True),
    ("failed to create endpoint x on network bridge: could not find bridge docker0", False),
    ('could not select device driver "nvidia" with capabilities: [[gpu]]', False),
])
def test_who_is_to_blame_for_a_start_that_failed(text: str, wrong: bool) -> None:
    assert render.wrong_order(text) is wrong


def test_what_the_init_process_says_of_a_missing_command() -> None:
    said = render.no_command(("x", "[FATAL tini (7)] exec trian failed: No such file or directory"))
    assert said == "trian: No such file or directory"
    assert render.no_command(("exec trian failed",)) == ""
    assert render.no_command(()) == ""


def test_the_token_is_read_back_from_the_container() -> None:
    request = render.create_request(a_launch(), a_site())
    assert render.token_of({"Config": {"Env": request["Env"]}}) == "t"
    assert render.token_of({"Config": {"Env": None}}) == ""


def a_container(env: tuple[str, ...] = (), **host: Any) -> dict[str, Any]:
    return {"HostConfig": host, "Config": {"Env": list(env)}}


def test_foreign_use() -> None:
    gpus = tuple(Gpu(GpuId(f"GPU-{name}"), "h100-80gb") for name in "abcd")
    used, taken = render.foreign_use([
        a_container(NanoCpus=1_500_000_000, Memory=2**30),
        a_container(CpuQuota=50_000, CpuPeriod=100_000, MemoryReservation=2**20, Memory=2**30),
        a_container(DeviceRequests=[{"DeviceIDs": ["GPU-b"]}]),
        a_container(DeviceRequests=[{"DeviceIDs": ["3"], "Count": 0}]),
        a_container(("NVIDIA_VISIBLE_DEVICES=GPU-x",), Runtime="nvidia"),
        a_container(("NVIDIA_VISIBLE_DEVICES=all",)),
    ], gpus)
    assert used == Resources(2_000, 2**30 + 2**20)
    assert [share.gpu for share in taken] == ["GPU-b", "GPU-d"]
    for everything in ({"DeviceRequests": [{"Count": -1}]}, {"Runtime": "nvidia"}):
        _, taken = render.foreign_use([a_container(("NVIDIA_VISIBLE_DEVICES=all",), **everything)], gpus)
        assert len(taken) == 4


def test_progress_of_a_pull() -> None:
    layers = {"": {"status": "Pulling"}, "a": {"progressDetail": {"current": 2**20, "total": 2**22}}, "b": {
        "progressDetail": {}}}
    assert render.pull_progress(layers, "x:1") == "pulling x:1: 1 of 4 MiB"
    assert render.pull_progress({}, "x:1") == "pulling x:1"


@pytest.mark.parametrize(("written", "problem"), [
    ({"engines": []}, "at least 1"),
    ({"engines": [{"url": "http://h"}]}, "pattern"),
    ({"engines": [{"gpus": "h100:8"}]}, "ids"),
    ({"engines": [{"url": "unix:///a", "tls": {"ca": "a", "cert": "b", "key": "c"}}]}, "tcp"),
    ({"engines": [{}, {}]}, "twice"),
    ({"engines": [{"url": "unix:///a"}, {"url": "tcp://h:1"}], "checkpoints": "/c"}, "address"),
    ({"engines": [{"url": "tcp://h:1"}]}, "checkpoints"),
    ({"checkpoints": "here"}, "absolute"),
    ({"user": "me"}, "pattern"),
    ({"volumes": ["data"]}, "mount"),
])
def test_nonsense_in_the_configuration(written: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        DockerBackend.model_validate(written)


def test_engines_are_reached_at_the_host_of_their_url() -> None:
    urls = {"ssh://me@gpu-1:22": "gpu-1", "tcp://10.0.0.1:2376": "10.0.0.1", "tcp://[fd00::1]:2376": "fd00::1",
            "unix:///var/run/docker.sock": ""}
    assert {url: DockerEngine(url=url).host for url in urls} == urls


def test_gpus_by_id_and_pretended_ones() -> None:
    engine = DockerEngine.model_validate({"gpus": ["sim-gpu:2", {"kind": "h100-80gb", "ids": ["GPU-a"]}]})
    assert [(gpu.id, gpu.kind) for gpu in render.listed_gpus(NodeName("n"), engine)] == [
        ("n/sim-0", "sim-gpu"), ("n/sim-1", "sim-gpu"), ("GPU-a", "h100-80gb")]


@pytest.mark.parametrize(("action", "more", "reason", "message", "warning"), [
    ("die", {"exitCode": "3"}, "Died", "exit code 3", False),
    ("oom", {}, "OutOfMemory", "a process was killed for want of memory", True),
    ("kill", {"signal": "15"}, "Killed", "signal 15", False),
    ("destroy", {}, "Removed", "its container was removed", False),
])  # fmt: skip
def test_events_of_containers_as_people_read_them(
    action: str, more: dict[str, str], reason: str, message: str, warning: bool
) -> None:
    event = {"Action": action, "timeNano": 5 * 10**9, "Actor": {"Attributes": {
        render.HOME: "me", render.KEY: "job/1/worker/0/0", **more}}}
    told = render.incident(event, "me")
    assert told is not None
    assert (told.at_ms, told.reason, told.message, told.warning) == (5_000, reason, message, warning)
    assert told.key == "job/1/worker/0/0"
    assert render.incident(event, "another") is None
    assert render.incident({**event, "Action": "exec_start: sh"}, "me") is None
    strange = {"Action": action, "Actor": {"Attributes": {render.HOME: "me", render.KEY: "?"}}}
    assert render.incident(strange, "me") is None
