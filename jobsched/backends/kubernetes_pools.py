"""Nodes on demand in Kubernetes: what makes an autoscaler add them. Used by `kubernetes`; decides nothing.

Where the cluster serves ProvisioningRequests, one of them asks for all nodes that are missing of a pool, all or nothing
(class `atomic-scale-up.kubernetes.io` of Cluster Autoscaler). Elsewhere pods that do nothing wait for a node each (not
beside each other), which Cluster Autoscaler and Karpenter react to. They hold the nodes that come, as foreign use, and
all go at once when the last is there. Nodes that are to go are left to the autoscaler, which removes empty ones by
itself: nothing is bound there any more.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence

import structlog

from jobsched.backends.kubernetes_api import Api, Exists, Gone, Refused
from jobsched.backends.kubernetes_render import LABEL, Json, Site
from jobsched.core.node import Node
from jobsched.core.pools import Demand, NodePool
from jobsched.errors import BackendUnreachable

log = structlog.get_logger("jobsched.kubernetes")

OWNER, POOL = f"{LABEL}pools-of", f"{LABEL}pool"
"""Not `INSTANCE`, by which replicas are known."""
GROUP = "autoscaling.x-k8s.io"
CLASS = "atomic-scale-up.kubernetes.io"
PAUSE = "registry.k8s.io/pause:3.10"
"""It need not be there: a pod without a node pulls nothing."""
AGAIN_S = 3.0
SHARE = 2
"""A placeholder asks for the GPUs of a whole node and for this part of its CPUs and memory: some is the system's."""


def name_of(site: Site, pool: NodePool, what: object) -> str:
    plain = re.sub(r"[^a-z0-9-]+", "-", pool.name.lower()).strip("-")
    return f"js-{site.instance}-pool-{plain}-{what}"


def placeholder(site: Site, pool: NodePool, index: int) -> Json:
    """`POST …/pods`: waits for a node of the pool that is as good as empty."""
    return {"apiVersion": "v1", "kind": "Pod", **_pod(site, pool, name_of(site, pool, index))}


def template(site: Site, pool: NodePool, nodes: int) -> Json:
    """`POST …/podtemplates`: what the request's pods look like."""
    name = name_of(site, pool, nodes)
    pod = _pod(site, pool, name)
    return {
        "apiVersion": "v1", "kind": "PodTemplate", "metadata": pod["metadata"],
        "template": {"metadata": {"labels": pod["metadata"]["labels"]}, "spec": pod["spec"]},
    }  # fmt: skip


def provisioning_request(site: Site, pool: NodePool, nodes: int, missing: int, version: str) -> Json:
    """`POST …/provisioningrequests`: so many nodes at once or none."""
    name = name_of(site, pool, nodes)
    return {
        "apiVersion": f"{GROUP}/{version}", "kind": "ProvisioningRequest",
        "metadata": {"name": name, "namespace": site.namespace, "labels": _labels(site, pool)},
        "spec": {"provisioningClassName": CLASS, "podSets": [{"count": missing, "podTemplateRef": {"name": name}}]},
    }  # fmt: skip


def _labels(site: Site, pool: NodePool) -> dict[str, str]:
    return {OWNER: site.instance, POOL: pool.name, "app.kubernetes.io/managed-by": "jobsched"}


def _pod(site: Site, pool: NodePool, name: str) -> Json:
    asks: Json = {"cpu": f"{max(1, pool.cpu_milli // SHARE)}m", "memory": str(max(1, pool.memory_bytes // SHARE))}
    if pool.gpus:
        asks[_resource(site, pool)] = str(pool.gpus)
    labels = _labels(site, pool)
    apart = {"labelSelector": {"matchLabels": {OWNER: site.instance, POOL: pool.name}},
             "topologyKey": "kubernetes.io/hostname"}
    return {
        "metadata": {"name": name, "namespace": site.namespace, "labels": labels},
        "spec": {
            "restartPolicy": "Never", "automountServiceAccountToken": False, "enableServiceLinks": False,
            "terminationGracePeriodSeconds": 0,
            "nodeSelector": dict(pool.labels),
            "affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [apart]}},
            "tolerations": [_toleration(taint) for taint in pool.taints]
            + [{"key": key, "operator": "Exists"} for key in site.config.tolerations],
            "securityContext": {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{
                "name": "placeholder", "image": PAUSE, "resources": {"requests": asks, "limits": asks},
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
            }],
        },
    }  # fmt: skip


def _toleration(taint: str) -> Json:
    key, mark, value = taint.partition("=")
    return {"key": key, "operator": "Equal", "value": value} if mark else {"key": key, "operator": "Exists"}


def _resource(site: Site, pool: NodePool) -> str:
    listed = site.config.gpus
    kinds = [one for one in listed if one.kind == pool.gpu_kind]
    amd = [one for one in listed if one.resource.startswith("amd.com/")] if pool.gpu_kind.startswith("mi") else []
    return (kinds or amd or listed)[0].resource


class Pools:
    """Makes what is missing of each pool wanted, and removes what is not wanted any more. Not thread-safe: the pulse
    calls `step`."""

    def __init__(self, api: Api, site: Site) -> None:
        self.api, self.site = api, site
        self.demands: tuple[Demand, ...] = ()
        self._version: str | None = None
        """Of the API of ProvisioningRequests; "" where there is none; None: not asked yet."""
        self._done: dict[str, tuple[int, int]] = {}
        """Pool -> (nodes wanted, nodes missing) as last carried out."""
        self._again: dict[str, float] = {}
        """Pool -> when it is looked at again although nothing changed: a placeholder may have got a node that was there
        before."""

    def step(self, nodes: Iterable[Node]) -> None:
        """Cheap while nothing changes: then no request at all."""
        there = list(nodes)
        for demand in self.demands:
            pool = demand.pool
            have = sum(pool.has(node) and node.name not in demand.release for node in there)
            state = (demand.nodes, max(0, demand.nodes - have))
            settled = self._done.get(pool.name) == state
            if settled and (not state[1] or time.monotonic() < self._again[pool.name]):
                continue
            self._again[pool.name] = time.monotonic() + AGAIN_S
            try:
                self._carry_out(demand, state[1])
            except (BackendUnreachable, Refused, Gone) as error:
                log.warning("nodes cannot be asked for; tried again", pool=pool.name, error=str(error))
            else:
                self._done[pool.name] = state

    def _carry_out(self, demand: Demand, missing: int) -> None:
        if self._served():
            self._request(demand, missing)
        else:
            self._place_holders(demand.pool, missing)

    def _served(self) -> str:
        if self._version is None:
            try:
                found = self.api.get(f"/apis/{GROUP}")
            except Gone:
                self._version = ""
            else:
                self._version = str(found["preferredVersion"]["version"])
        return self._version

    def _request(self, demand: Demand, missing: int) -> None:
        pool, version = demand.pool, self._served()
        space = f"namespaces/{self.site.namespace}"
        requests = f"/apis/{GROUP}/{version}/{space}/provisioningrequests"
        templates = f"/api/v1/{space}/podtemplates"
        wanted = name_of(self.site, pool, demand.nodes) if missing else ""
        for path in (requests, templates):
            for one in self._ours(path, pool):
                if one["metadata"]["name"] != wanted:
                    self.api.delete(f"{path}/{one['metadata']['name']}")
        if wanted:
            self._make(templates, template(self.site, pool, demand.nodes))
            self._make(requests, provisioning_request(self.site, pool, demand.nodes, missing, version))

    def _place_holders(self, pool: NodePool, missing: int) -> None:
        """So many waiting ones as nodes are missing, beside those that got theirs; none when nothing is."""
        path = f"/api/v1/namespaces/{self.site.namespace}/pods"
        ours = self._ours(path, pool)
        bound = [one["metadata"]["name"] for one in ours if one["spec"].get("nodeName")]
        waiting = [one["metadata"]["name"] for one in ours if not one["spec"].get("nodeName")]
        for name in waiting[missing:] + ([] if missing else bound):
            self.api.delete(f"{path}/{name}", 0)
        taken = {one["metadata"]["name"] for one in ours}
        free = (index for index in range(pool.max + len(taken)) if name_of(self.site, pool, index) not in taken)
        for _, index in zip(range(missing - len(waiting)), free, strict=False):
            self._make(path, placeholder(self.site, pool, index))

    def _ours(self, path: str, pool: NodePool) -> Sequence[Json]:
        query = {"labelSelector": f"{OWNER}={self.site.instance},{POOL}={pool.name}"}
        return list(self.api.get(path, query).get("items") or ())

    def _make(self, path: str, body: Json) -> None:
        try:
            self.api.create(path, body)
        except Exists:
            pass
