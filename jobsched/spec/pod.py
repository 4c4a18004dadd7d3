"""A job's own wishes about its pods (`kubernetes: {pod: …}`): a partial Pod, checked here, merged by the renderer.

Only the Kubernetes backend reads it. What jobsched itself decides (place, name, command, restarts) cannot be written;
unknown fields further down are refused by the API server, which is asked to be strict.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated

from pydantic import AfterValidator, Field, JsonValue

from jobsched.spec.quantity import show

CONTAINER = "replica"
"""Name of the container in which a replica's command runs."""
METADATA = frozenset({"labels", "annotations"})
OWNED = frozenset({
    "activeDeadlineSeconds", "hostname", "nodeName", "nodeSelector", "restartPolicy", "shareProcessNamespace",
    "subdomain", "ephemeralContainers", "setHostnameAsFQDN", "hostnameOverride", "os",
})
"""Fields of a pod's spec that jobsched writes, or could not work with."""
HARMLESS = frozenset({
    "affinity", "containers", "dnsConfig", "dnsPolicy", "enableServiceLinks", "hostAliases", "imagePullSecrets",
    "overhead", "preemptionPolicy", "priorityClassName", "readinessGates", "resourceClaims", "resources",
    "runtimeClassName", "schedulingGates", "schedulingGroup", "terminationGracePeriodSeconds", "tolerations",
    "topologySpreadConstraints", "volumes",
})
"""Those that give a pod no rights that its namespace does not give to everybody."""
POWERFUL = frozenset({
    "automountServiceAccountToken", "hostIPC", "hostNetwork", "hostPID", "hostUsers", "initContainers", "priority",
    "schedulerName", "securityContext", "serviceAccount", "serviceAccountName",
})
CONTAINER_OWNED = frozenset({"args", "command", "image", "stdin", "stdinOnce", "terminationMessagePath", "tty",
                             "workingDir", "restartPolicy", "restartPolicyRules"})
CONTAINER_POWERFUL = frozenset({"securityContext"})
LABEL_PREFIX = "jobsched.dev/"


def _pod(value: Mapping[str, JsonValue]) -> Mapping[str, JsonValue]:
    for problem in _problems(value):
        raise ValueError(problem)
    return value


PodOverlay = Annotated[Mapping[str, JsonValue], Field(max_length=2), AfterValidator(_pod)]
"""`{metadata: {labels, annotations}, spec: {…}}`."""


def _problems(pod: Mapping[str, JsonValue]) -> Iterator[str]:
    for name in pod:
        if name not in ("metadata", "spec"):
            yield f"{show(name)} is no part of a pod that a job may write; write metadata or spec"
    metadata, spec = pod.get("metadata", {}), pod.get("spec", {})
    for name, part in (("metadata", metadata), ("spec", spec)):
        if not isinstance(part, dict):
            yield f"{name} holds fields, not {show(part)}"
            return
    assert isinstance(metadata, dict)
    assert isinstance(spec, dict)
    for name, labels in metadata.items():
        if name not in METADATA:
            yield f"metadata.{name} is not for a job to write; labels and annotations are"
        elif not isinstance(labels, dict) or not all(isinstance(text, str) for text in labels.values()):
            yield f"metadata.{name} holds texts by name"
        elif own := [label for label in labels if label.startswith(LABEL_PREFIX)]:
            yield f"metadata.{name}: {own[0]} is one of jobsched's own"
    for name in spec:
        if name in OWNED:
            yield f"spec.{name} is decided by jobsched"
        elif name not in HARMLESS | POWERFUL:
            yield f"spec.{name}: there is no such field in a pod's spec"
    yield from _containers(spec.get("containers", []))
    affinity = spec.get("affinity", {})
    node = affinity.get("nodeAffinity", {}) if isinstance(affinity, dict) else {}
    if node:
        yield "spec.affinity.nodeAffinity is decided by jobsched; see placement: in the job"


def _containers(containers: JsonValue) -> Iterator[str]:
    if not isinstance(containers, list) or len(containers) > 1:
        yield f"spec.containers is a list of one container, {CONTAINER!r}"
        return
    for container in containers:
        if not isinstance(container, dict) or container.get("name", CONTAINER) != CONTAINER:
            yield f"spec.containers: the one container is called {CONTAINER!r}"
            return
        for name in container:
            if name in CONTAINER_OWNED:
                yield f"spec.containers[0].{name} is decided by jobsched; see command, image and working_dir in the job"


def powerful(pod: Mapping[str, JsonValue]) -> tuple[str, ...]:
    """Fields in it that could give a pod more rights than others have; a server's policy may forbid them."""
    spec = pod.get("spec", {})
    assert isinstance(spec, dict)
    found = [f"spec.{name}" for name in spec if name in POWERFUL]
    for container in _dicts(spec.get("containers", [])):
        found += [f"spec.containers[0].{name}" for name in container if name in CONTAINER_POWERFUL]
    for index, volume in enumerate(_dicts(spec.get("volumes", []))):
        found += [f"spec.volumes[{index}].hostPath"] if "hostPath" in volume else []
    return tuple(found)


def _dicts(value: JsonValue) -> list[dict[str, JsonValue]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


_KEYS = {"volumeMounts": "mountPath", "tolerations": "", "ports": "containerPort", "topologySpreadConstraints": ""}
"""What tells the members of a list apart, as in Kubernetes' strategic merge; elsewhere their name. Empty: appended."""


def merge(below: JsonValue, above: JsonValue, field: str = "") -> JsonValue:
    """`above` laid over `below`: objects field by field, lists member by member, anything else replaced."""
    if isinstance(below, dict) and isinstance(above, dict):
        return below | {name: merge(below[name], value, name) if name in below else value
                        for name, value in above.items()}
    if not isinstance(below, list) or not isinstance(above, list):
        return above
    key = _KEYS.get(field, "name")
    merged: list[JsonValue] = list(below)
    for member in above:
        at = next((i for i, old in enumerate(merged) if key and isinstance(old, dict) and isinstance(member, dict)
                   and key in old and old[key] == member.get(key)), -1)
        if at < 0:
            merged.append(member)
        else:
            merged[at] = merge(merged[at], member)
    return merged


def both(job: Mapping[str, JsonValue], role: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """A role's overlay over its job's."""
    if not job and not role:
        return {}
    merged = merge(_named(dict(job)), _named(dict(role)))
    assert isinstance(merged, dict)
    return merged


def _named(pod: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """With the name of its container, which may be left out."""
    spec = pod.get("spec")
    if not isinstance(spec, dict) or "containers" not in spec:
        return pod
    containers: list[JsonValue] = [{"name": CONTAINER, **container} for container in _dicts(spec["containers"])]
    return pod | {"spec": spec | {"containers": containers}}
