"""Launches as orders for the supervisor, and its reports as ours. Pure: values in, values out. Used by `local`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from jobsched.backends.gpus import is_real, visible_devices
from jobsched.backends.supervisor.protocol import Key, Layout, Message, Order
from jobsched.contract import to_environ
from jobsched.core.job import Reason
from jobsched.core.launch import Launch, LaunchKey
from jobsched.core.node import Node
from jobsched.core.observation import Observation, Progress, ReplicaReport, Seen
from jobsched.core.resources import NodeName


def order(launch: Launch, layout: Layout, base: Mapping[str, str]) -> Order:
    """What the supervisor needs to start it. `base` is the environment that every replica inherits."""
    contract = replace(
        launch.contract, report=f"unix:{layout.report_socket}", scratch_dir=str(layout.scratch_dir(launch.key)))
    simulated = [share.gpu for share in launch.gpus if not is_real(share.gpu)]
    pinned = {"CUDA_VISIBLE_DEVICES": visible_devices(launch.gpus), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    if simulated:
        pinned["JOBSCHED_SIM_GPUS"] = ",".join(simulated)
    return Order(
        key=Key(launch.key), argv=launch.command, env={**base, **to_environ(contract, launch.env), **pinned},
        node=launch.node, cwd=launch.working_dir, token=launch.contract.token, ports=launch.ports,
        cpu_milli=launch.cpu_milli, memory_bytes=launch.memory_bytes, stop_signal=launch.stop_signal,
        preload=launch.preload, keep_ms=launch.keep_ms, clean_up=launch.clean_up,
    )


def report(data: Message) -> ReplicaReport:
    """One replica as the supervisor tells it."""
    progress = data.get("progress")
    return ReplicaReport(
        key=LaunchKey(data["key"]),
        node=NodeName(data["node"]),
        state=Seen(data["state"]),
        exit_code=data.get("exit_code"),
        signal=data.get("signal"),
        failure=Reason(data.get("failure", "")),
        message=data.get("message", ""),
        progress=_progress(progress) if progress else None,
        tail=tuple(data.get("tail", ())),
        stacks=data.get("stacks", ""),
        ident=data.get("ident", ""),
        ended_age_ms=data.get("ended_age_ms", 0),
        idle_age_ms=data.get("idle_age_ms", -1),
    )


def _progress(data: Message) -> Progress:
    metrics = tuple((name, value) for name, value in data["metrics"])
    return Progress(**{**data, "metrics": metrics})


def observation(messages: list[Message], before: Mapping[NodeName, Node], nodes: tuple[Node, ...]) -> Observation:
    """Everything that came since the last look, newest state per replica. Only the first message may be a listing."""
    full = bool(messages) and messages[0].get("full", False)
    reports: dict[LaunchKey, ReplicaReport] = {}
    gone: dict[LaunchKey, None] = {}
    for message in messages:
        for data in message["replicas"]:
            found = report(data)
            reports[found.key] = found
        for key in message["gone"]:
            gone[LaunchKey(key)] = None
            reports.pop(LaunchKey(key), None)
    names = {node.name for node in nodes}
    return Observation(
        full=full,
        nodes=nodes if full else tuple(node for node in nodes if before.get(node.name) != node),
        replicas=tuple(reports.values()),
        gone=tuple(gone),
        gone_nodes=tuple(name for name in before if name not in names),
    )
