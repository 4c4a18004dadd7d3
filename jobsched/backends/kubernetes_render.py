"""Launches as Kubernetes objects, and pods as our reports. Pure: values in, values out.

Used by `kubernetes`. Of an attempt there is one headless Service, which gives its pods their DNS names and owns them
and the ConfigMaps with their directory: with it everything goes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from pydantic import JsonValue

from jobsched.backends import kubernetes_nodes as nodes
from jobsched.backends.bundle import Owner
from jobsched.backends.containers import exit_of, instant
from jobsched.contract import from_environ, to_environ
from jobsched.core.job import Reason
from jobsched.core.launch import Launch, LaunchKey, own_key, parse_key
from jobsched.core.observation import NO_LAUNCH, NO_NODE, Incident, ReplicaReport, Seen
from jobsched.core.resources import GpuShare, NodeName
from jobsched.spec.backends import KubernetesBackend, KubernetesVolume
from jobsched.spec.pod import CONTAINER, merge, powerful

Json = dict[str, Any]

LABEL = "jobsched.dev/"
INSTANCE, JOB, ATTEMPT, ROLE, INDEX = (LABEL + name for name in ("instance", "job", "attempt", "role", "index"))
"""Labels of everything that jobsched makes. ATTEMPT is the name of the attempt's Service."""
KEY, NODE, GPUS, SIGNAL = (LABEL + name for name in ("key", "node", "gpus", "stop-signal"))
"""Annotations of pods."""
NAME_TEMPLATE = "{{role}}-{{index}}.js-{instance}-{{job}}-{{attempt}}"
"""DNS name of a replica within the namespace."""
SCRATCH = "/scratch"
PARTS = "/run/jobsched/parts"
"""Where the pieces of a packed directory are mounted while it is unpacked."""
UNPACK = "unpack"
"""The init container that does so."""
UNPACKS = """set -e; cd "$0"; if command -v tar >/dev/null && command -v gzip >/dev/null; then
  cat "$1"/* | gzip -dc | tar xf -
else
  cat "$1"/* | "$(command -v python3 || command -v python)" -c 'import sys, tarfile
tarfile.open(fileobj=sys.stdin.buffer, mode="r|gz").extractall(".")'
fi"""
"""`/bin/sh -c UNPACKS DIRECTORY PARTS`: with tar and gzip, or with Python, whichever the image has."""
TOP = "directory"
"""What the packed directory is called in the archive, which may not write the top of a volume: that is root's."""
PART = 700 << 10
"""Bytes of a packed directory in one ConfigMap; an object may have a mebibyte, in base64."""
PULL = {"missing": "IfNotPresent", "always": "Always", "never": "Never"}
SECRET = "secret://"
IMAGE_REASONS = frozenset({"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull",
                           "RegistryUnavailable", "ImageInspectError", "SignatureValidationFailed"})
CONFIG_REASONS = frozenset({"CreateContainerConfigError", "CreateContainerError", "RunContainerError"})


@dataclass(frozen=True, slots=True)
class Site:
    """What all requests have in common."""

    instance: str
    namespace: str
    config: KubernetesBackend

    @property
    def owner(self) -> Owner:
        uid, gid = self.config.user.split(":")
        return Owner(int(uid), int(gid))


class CannotRender(Exception):
    """The launch cannot be carried out in this cluster; the text is for people."""


# names ----------------------------------------------------------------------------------------------------------------


def pod_name(instance: str, key: LaunchKey) -> str:
    """One key, one name: the API server itself refuses a second pod."""
    return f"js-{instance}-{key.replace('/', '-')}"


def service_name(instance: str, key: LaunchKey) -> str:
    """The attempt's Service, subdomain of its pods."""
    parts = parse_key(key)
    return f"js-{instance}-{parts.job_id}-{parts.attempt}"


def labels(instance: str, key: LaunchKey) -> dict[str, str]:
    """Of everything that belongs to the key's attempt."""
    return {INSTANCE: instance, JOB: parse_key(key).job_id, ATTEMPT: service_name(instance, key),
            "app.kubernetes.io/managed-by": "jobsched"}


# objects --------------------------------------------------------------------------------------------------------------


def service(site: Site, key: LaunchKey) -> Json:
    """`POST …/services`: no address of its own, only names; peers are found before they are ready."""
    name = service_name(site.instance, key)
    return {
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name, "namespace": site.namespace, "labels": labels(site.instance, key)},
        "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {ATTEMPT: name}},
    }


def owner_reference(name: str, uid: str) -> Json:
    """What makes the garbage collector remove an object with the attempt's Service."""
    return {"apiVersion": "v1", "kind": "Service", "name": name, "uid": uid}


def config_maps(site: Site, key: LaunchKey, archive: bytes, owner: Json) -> list[Json]:
    """`POST …/configmaps`: a packed directory in pieces. Named by what they hold, so that replicas share them."""
    name = f"{service_name(site.instance, key)}-{digest(archive)}"
    return [
        {
            "apiVersion": "v1", "kind": "ConfigMap", "immutable": True,
            "metadata": {
                "name": f"{name}-{index}", "namespace": site.namespace, "labels": labels(site.instance, key),
                "ownerReferences": [owner],
            },
            "binaryData": {f"part-{index:03}": base64.b64encode(archive[at : at + PART]).decode()},
        }
        for index, at in enumerate(range(0, len(archive), PART))
    ]


def digest(archive: bytes) -> str:
    return hashlib.sha256(archive).hexdigest()[:8]


def pod(launch: Launch, site: Site, node: Json, owner: Json, parts: Sequence[str] = ()) -> Json:
    """`POST …/pods`. `node` is the node object that it is for, `parts` names the ConfigMaps with its directory.
    CannotRender for what no cluster could do."""
    config, key = site.config, launch.key
    image = launch.image or config.image
    if not image:
        raise CannotRender("the job names no image; write image: in the job, or backend.kubernetes.image in the"
                           " server's configuration")
    parsed = parse_key(key)
    volumes, mounts = _volumes(launch, site, parts)
    container: Json = {
        "name": CONTAINER, "image": image, "imagePullPolicy": PULL[config.pull],
        "command": [plain(word) for word in launch.command], "workingDir": launch.working_dir or SCRATCH,
        "env": _environment(launch, site),
        "resources": _resources(launch, site, node), "securityContext": _confined(config),
        "volumeMounts": mounts, "terminationMessagePolicy": "File",
    }
    spec: Json = {
        "restartPolicy": "Never", "enableServiceLinks": False, "automountServiceAccountToken": False,
        "shareProcessNamespace": True,  # process 1 is not the replica's own, so signals do what they do elsewhere
        "hostname": f"{parsed.role}-{parsed.index}", "subdomain": service_name(site.instance, key),
        "terminationGracePeriodSeconds": 30,
        "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
            {"matchFields": [{"key": "metadata.name", "operator": "In", "values": [launch.node]}]}]}}},
        "tolerations": _tolerations(node, config),
        "securityContext": _user(site.owner),
        "containers": [container], "volumes": volumes,
    }
    if parts:
        spec["initContainers"] = [_unpacking(launch, config, image)]
    for name, value in (
        ("serviceAccountName", config.service_account), ("schedulerName", config.scheduler),
        ("priorityClassName", config.priority_class),
        ("imagePullSecrets", [{"name": secret} for secret in config.pull_secrets]),
    ):
        if value:
            spec[name] = value
    rendered: Json = {
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": pod_name(site.instance, key), "namespace": site.namespace,
            "labels": labels(site.instance, key) | {ROLE: parsed.role, INDEX: str(parsed.index)},
            "annotations": {**config.annotations, KEY: key, NODE: launch.node, SIGNAL: launch.stop_signal,
                            GPUS: ",".join(share.gpu for share in launch.gpus), LABEL + "job-name": launch.job_name},
            "ownerReferences": [owner],
        },
        "spec": spec,
    }
    return _laid_over(rendered, launch, config)


def _laid_over(rendered: Json, launch: Launch, config: KubernetesBackend) -> Json:
    if not launch.pod:
        return rendered
    if config.overlay == "none":
        raise CannotRender("this server lets no job write kubernetes.pod")
    if config.overlay == "restricted" and (forbidden := powerful(launch.pod)):
        raise CannotRender(f"this server lets no job write kubernetes.pod.{forbidden[0]} (backend.kubernetes.overlay)")
    return cast("Json", merge(cast("JsonValue", rendered), cast("JsonValue", dict(launch.pod))))


def _environment(launch: Launch, site: Site) -> list[Json]:
    """Secrets stay references, which the kubelet resolves. Which devices a GPU replica sees is the device plugin's."""
    contract = replace(launch.contract, scratch_dir=SCRATCH, report="log:")
    own = {"HOME": SCRATCH, "USER": "jobsched"}
    if not launch.gpus:
        own |= {"CUDA_VISIBLE_DEVICES": "", "NVIDIA_VISIBLE_DEVICES": "void"}
    secret = {name: text for name, text in launch.env.items() if text.startswith(SECRET)}
    public = {name: text for name, text in launch.env.items() if name not in secret}
    found: list[Json] = [{"name": name, "value": plain(value)}
                         for name, value in sorted({**own, **to_environ(contract, public)}.items())]
    for name, text in sorted(secret.items()):
        named, _, inner = text.removeprefix(SECRET).rpartition("/")
        reference = {"name": named or site.config.secrets, "key": inner}
        found.append({"name": name, "valueFrom": {"secretKeyRef": reference}})
    return found


def plain(text: str) -> str:
    """As it is: Kubernetes takes `$(NAME)` for a variable and `$$` for a dollar."""
    return text.replace("$", "$$")


def _resources(launch: Launch, site: Site, node: Json) -> Json:
    amounts: Json = {}
    if launch.cpu_milli:
        amounts["cpu"] = f"{launch.cpu_milli}m"
    if launch.memory_bytes:
        amounts["memory"] = str(launch.memory_bytes)
    by_resource: dict[str, tuple[nodes.Stock, list[GpuShare]]] = {}
    for share in launch.gpus:
        stock = nodes.resource_of(share.gpu, node, site.config)
        if stock is None:
            raise CannotRender(f"node {launch.node} no longer offers {share.gpu}")
        by_resource.setdefault(stock.resource, (stock, []))[1].append(share)
    for stock, shares in by_resource.values():
        units = nodes.units_for(shares, stock)
        if units is None:
            raise CannotRender(
                f"{stock.resource} on {launch.node} is handed out in {stock.per_gpu} parts of a GPU each on its own;"
                f" ask for 1/{stock.per_gpu} of a GPU, or whole ones of another kind")
        amounts[stock.resource] = str(units)
    return {"requests": dict(amounts), "limits": dict(amounts)}


def _confined(config: KubernetesBackend) -> Json:
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": config.read_only}


def _user(owner: Owner) -> Json:
    return {"runAsNonRoot": True, "runAsUser": owner.uid, "runAsGroup": owner.gid, "fsGroup": owner.gid,
            "fsGroupChangePolicy": "OnRootMismatch", "seccompProfile": {"type": "RuntimeDefault"}}


def _tolerations(node: Json, config: KubernetesBackend) -> list[Json]:
    """The scheduler chose this node although it has these taints: its own, and those that no job minds."""
    found: list[Json] = []
    for taint in node.get("spec", {}).get("taints") or ():
        if taint["effect"] == "PreferNoSchedule" or taint["key"].startswith(nodes.OWN_TAINTS):
            continue
        one = {"key": taint["key"], "operator": "Equal" if taint.get("value") else "Exists", "effect": taint["effect"]}
        found.append(one | ({"value": taint["value"]} if taint.get("value") else {}))
    return found


def _volumes(launch: Launch, site: Site, parts: Sequence[str]) -> tuple[list[Json], list[Json]]:
    config = site.config
    volumes: list[Json] = [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": str(config.shm_size)}},
        {"name": "scratch", "emptyDir": {}},
    ]
    mounts: list[Json] = [{"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108  # inside the container
                          {"name": "scratch", "mountPath": SCRATCH}]
    if config.read_only:
        volumes.append({"name": "tmp", "emptyDir": {}})
        mounts.append({"name": "tmp", "mountPath": "/tmp"})  # noqa: S108  # inside the container
    if parts:
        volumes += [
            {"name": "parts", "projected": {"sources": [{"configMap": {"name": name}} for name in parts]}},
            {"name": "working-dir", "emptyDir": {}},
        ]
        mounts.append({"name": "working-dir", "mountPath": launch.working_dir, "subPath": TOP})
    for index, volume in enumerate(shared_volumes(config)):
        volumes.append({"name": f"volume-{index}"} | _source(volume))
        mounts.append({"name": f"volume-{index}", "mountPath": volume.mount}
                      | ({"readOnly": True} if volume.read_only else {}))
    _check_checkpoints(launch, config)
    return volumes, mounts


def shared_volumes(config: KubernetesBackend) -> list[KubernetesVolume]:
    return [*config.volumes, *([config.checkpoints] if config.checkpoints else [])]


def _check_checkpoints(launch: Launch, config: KubernetesBackend) -> None:
    wanted = launch.contract.checkpoint_dir
    overlaid = launch.pod.get("spec") if launch.pod else None
    mounted = [volume.mount for volume in shared_volumes(config)]
    if isinstance(overlaid, dict):
        for container in cast("list[Json]", overlaid.get("containers") or []):
            mounted += [str(mount.get("mountPath")) for mount in container.get("volumeMounts") or ()]
    if wanted.startswith("/") and not any(within(wanted, place) for place in mounted):
        raise CannotRender(
            f"checkpoint.dir {wanted} would be lost with the pod; name a volume for it under backend.kubernetes"
            " (checkpoints: or volumes:) in the server's configuration")


def within(path: str, directory: str) -> bool:
    return bool(directory) and (path + "/").startswith(directory.rstrip("/") + "/")


def copied(launch: Launch, config: KubernetesBackend) -> bool:
    """Whether the job's directory must be brought into the pod; else it is in the image or a volume."""
    there = any(within(launch.working_dir, volume.mount) for volume in shared_volumes(config))
    return bool(launch.working_dir) and config.working_dir == "copy" and not there


def _source(volume: KubernetesVolume) -> Json:
    if volume.claim:
        return {"persistentVolumeClaim": {"claimName": volume.claim, "readOnly": volume.read_only}}
    if volume.config_map:
        return {"configMap": {"name": volume.config_map}}
    if volume.secret:
        return {"secret": {"secretName": volume.secret}}
    return {"hostPath": {"path": volume.host_path}}


def _unpacking(launch: Launch, config: KubernetesBackend, image: str) -> Json:
    return {
        "name": UNPACK, "image": image, "imagePullPolicy": PULL[config.pull],
        "command": ["/bin/sh", "-c", plain(UNPACKS), plain(launch.working_dir), PARTS],
        "securityContext": _confined(config) | {"readOnlyRootFilesystem": True},
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "resources": {"requests": {"cpu": "10m", "memory": "32Mi"}, "limits": {"memory": "256Mi"}},
        "volumeMounts": [{"name": "parts", "mountPath": PARTS, "readOnly": True},
                         {"name": "working-dir", "mountPath": launch.working_dir}],
    }


# answers --------------------------------------------------------------------------------------------------------------


def key_of(found: Json) -> LaunchKey | None:
    """None for a pod that is none of ours."""
    return own_key((found["metadata"].get("annotations") or {}).get(KEY, ""))


def token_of(found: Json) -> str:
    """The token of its reports, from its own environment."""
    container = _main(found["spec"].get("containers") or ())
    environ = {one["name"]: one.get("value", "").replace("$$", "$") for one in container.get("env") or ()}
    contract = from_environ(environ)
    return contract.token if contract is not None else ""


def gpus_of(found: Json) -> tuple[str, ...]:
    """The GPUs that it was given, by jobsched's names."""
    text = (found["metadata"].get("annotations") or {}).get(GPUS, "")
    return tuple(text.split(",")) if text else ()


def _main(containers: Sequence[Json]) -> Json:
    return next((one for one in containers if one["name"] == CONTAINER), {})


def report_of(found: Json, wanted_away: bool = False) -> ReplicaReport:
    """A pod as the replica it is. `wanted_away`: jobsched itself is ending it, so its end needs no other cause."""
    key = key_of(found)
    assert key is not None
    metadata, status = found["metadata"], found.get("status", {})
    node = NodeName(found["spec"].get("nodeName") or metadata["annotations"].get(NODE, ""))
    report = ReplicaReport(key, node, Seen.STARTING, ident=metadata["name"])
    main = _main(status.get("containerStatuses") or ())
    state = main.get("state") or {}
    if ended := state.get("terminated"):
        return _ended(report, ended, found, wanted_away)
    for init in status.get("initContainerStatuses") or ():
        end = (init.get("state") or {}).get("terminated")
        if end and end["exitCode"] and init["name"] == UNPACK:
            why = str(end.get("message") or end.get("reason") or f"code {end['exitCode']}").strip()
            return replace(report, state=Seen.EXITED, exit_code=126, failure=Reason.START_FAILED,
                           message=f"its directory could not be unpacked (the image needs tar or Python): {why}")
        if waiting := (init.get("state") or {}).get("waiting"):
            state = {"waiting": waiting}
    if status.get("phase") in ("Failed", "Succeeded"):  # turned away or evicted before its container said anything
        return replace(report, state=Seen.EXITED, failure=Reason.REPLICA_LOST,
                       message=_disrupted(found) or _words(status))
    if "running" in state:
        return replace(report, state=Seen.RUNNING)
    return _waiting(report, state.get("waiting") or {}, found)


def _waiting(report: ReplicaReport, waiting: Mapping[str, str], found: Json) -> ReplicaReport:
    reason, text = waiting.get("reason", ""), waiting.get("message", "")
    if reason in IMAGE_REASONS:
        return replace(report, state=Seen.EXITED, failure=Reason.IMAGE_ERROR, message=image_words(text, reason))
    if reason in CONFIG_REASONS:
        return replace(report, state=Seen.EXITED, failure=Reason.START_FAILED, exit_code=126,
                       message=f"{reason}: {text}")
    return replace(report, message=unbound(found) or text)


def image_words(text: str, reason: str) -> str:
    """The useful part of a kubelet's words about an image."""
    plain = text.replace("\\", "")
    if plain.startswith("Back-off"):
        _, _, after = plain.partition("ErrImagePull: ")
        plain = after or plain
    for wrapper in ("rpc error: code = ", "failed to pull and unpack image ", "failed to resolve image: "):
        plain = plain.replace(wrapper, "")
    return f"{reason}: {plain}" if plain else reason


def unbound(found: Json) -> str:
    """Why the cluster's scheduler has not bound it; empty when it has, or has not tried."""
    for condition in found.get("status", {}).get("conditions") or ():
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return str(condition.get("message") or condition.get("reason") or "not scheduled")
    return ""


def crowded(found: Json) -> bool:
    """Whether the cluster's scheduler finds no room for it on its node, and makes none either."""
    return "Insufficient " in unbound(found) and not found.get("status", {}).get("nominatedNodeName")


def _ended(report: ReplicaReport, ended: Json, found: Json, wanted_away: bool) -> ReplicaReport:
    status, reason, text = int(ended["exitCode"]), ended.get("reason", ""), str(ended.get("message") or "").strip()
    if reason in ("StartError", "ContainerCannotRun"):
        missing = "not found" in text or "no such file" in text
        return replace(report, state=Seen.EXITED, exit_code=127 if missing else 126, failure=Reason.START_FAILED,
                       message=text.partition("unable to start container process: ")[2] or text or reason)
    code, number = exit_of(status)
    report = replace(report, state=Seen.EXITED, exit_code=code, signal=number)
    if reason == "OOMKilled" and status:
        return replace(report, failure=Reason.OOM, message="the kernel killed it: out of memory")
    if reason == "ContainerStatusUnknown" or (status and not wanted_away and (_disrupted(found) or _leaving(found))):
        why = _disrupted(found) or ("its pod was deleted" if _leaving(found) else text or reason)
        return replace(report, failure=Reason.REPLICA_LOST, message=why)
    return replace(report, message=text)


def _leaving(found: Json) -> bool:
    return bool(found["metadata"].get("deletionTimestamp"))


def _disrupted(found: Json) -> str:
    """Who ended it, when the cluster did (eviction, preemption, taint, kubelet)."""
    status = found.get("status", {})
    for condition in status.get("conditions") or ():
        if condition["type"] == "DisruptionTarget" and condition["status"] == "True":
            return f"evicted ({condition.get('reason', '')}): {condition.get('message', '')}"
    return _words(status) if status.get("reason") in ("Evicted", "NodeShutdown", "Terminated", "NodeLost") else ""


def _words(status: Json) -> str:
    return f"{status.get('reason', 'failed')}: {status.get('message', 'the pod ended without a word')}"


def refusal(status: int, text: str) -> Reason:
    """Whose fault it is that the API server refuses a pod: quotas and namespaces that go are not the job's."""
    passing = status == 403 and any(word in text for word in ("exceeded quota", "being terminated", "not yet accepted"))
    return Reason.REPLICA_LOST if passing or status == 404 else Reason.START_FAILED


def message_of(body: bytes) -> str:
    """What an API server says in a Status; else the beginning of whatever it is."""
    try:
        return str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:500].strip()


def incident(event: Json, instance: str) -> Incident | None:
    """An Event object as people read it; None for what is neither about a pod of ours nor about a node."""
    about = event.get("involvedObject") or {}
    name, kind = str(about.get("name", "")), about.get("kind")
    key = key_of_name(instance, name) if kind == "Pod" else NO_LAUNCH
    if key is None or kind not in ("Pod", "Node"):
        return None
    series = event.get("series") or {}
    times = (series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime"),
             event["metadata"].get("creationTimestamp"))
    stamp = next((text for text in times if text), "1970-01-01T00:00:00Z")
    return Incident(
        at_ms=int(instant(stamp).timestamp() * 1000), reason=str(event.get("reason", "")),
        message=str(event.get("message", "")), key=key, node=NodeName(name) if kind == "Node" else NO_NODE,
        warning=event.get("type") == "Warning", count=int(series.get("count") or event.get("count") or 1),
    )  # fmt: skip


def key_of_name(instance: str, pod: str) -> LaunchKey | None:
    """Inverse of `pod_name`; None for pods of others."""
    rest = pod.removeprefix(f"js-{instance}-")
    match = re.fullmatch(r"([^-]+)-(\d+)-(.+)-(\d+)-(\d+)", rest)
    return None if match is None or rest == pod else LaunchKey("/".join(match.groups()))
