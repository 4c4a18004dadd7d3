"""A small API server with a scheduler and kubelets, for tests where no Kubernetes is: pods run as local processes.

Faithful in what the backend relies on: resource versions, listings in pages, watches with bookmarks and selectors, 404,
409, 410, owners and their garbage, graceful and forced deletion, log streams, commands run in pods (websocket), binding
by node affinity, taints and free resources. It isolates nothing, and it runs nothing as another user.
"""

from __future__ import annotations

import base64
import copy
import fcntl
import hashlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from jobsched.backends import kubernetes_nodes as nodes
from jobsched.backends.containers import SEND

Json = dict[str, Any]
Key = tuple[str, str]
ROOT = Path(__file__).parents[2]
MARK = "JOBSCHED_FAKE_POD"


class Problem(Exception):
    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def stamp() -> str:
    at = time.time_ns()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at // 10**9)) + f".{at % 10**9:09d}Z"


@dataclass
class Change:
    version: int
    kind: str
    resource: str
    before: Json | None
    after: Json | None


@dataclass
class Process:
    """A pod on its kubelet."""

    uid: str
    popen: subprocess.Popen[bytes] | None = None
    lines: list[tuple[str, bytes]] = field(default_factory=list)
    ended: bool = False
    whole: bool = False
    """Its log is complete."""
    env: dict[str, str] = field(default_factory=dict)
    directory: str = ""


class FakeCluster:
    """`url` answers without any credentials."""

    def __init__(self, node_count: int = 2, gpus: int = 4, images: tuple[str, ...] = ("test/tiny:1",)) -> None:
        self.images = set(images)
        self.requests: Counter[str] = Counter()
        self.down = False
        self.news = threading.Condition(threading.RLock())
        self.objects: dict[str, dict[Key, Json]] = {}
        self.version = 100
        self.oldest = 100
        """Versions before it are forgotten."""
        self.history: list[Change] = []
        self.dead: set[str] = set()
        """Nodes whose kubelet does nothing."""
        self.processes: dict[str, Process] = {}
        self.cut = 0
        """Rises when all streams are to break off."""
        self._closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        for name in ("default", "kube-node-lease", "other"):
            self.put("namespaces", "", name, {"metadata": {"name": name}})
        for index in range(node_count):
            self.add_node(f"node-{index}", gpus)
        for target in (self._server.serve_forever, self._keep_alive):
            threading.Thread(target=target, daemon=True).start()

    def close(self) -> None:
        self._closing.set()
        self.break_off()
        self._server.shutdown()
        self._server.server_close()
        for process in list(self.processes.values()):
            self._kill_all(process)

    def kubeconfig(self, path: Path) -> str:
        path.write_text(json.dumps({
            "apiVersion": "v1", "kind": "Config", "current-context": "fake", "users": [{"name": "me", "user": {}}],
            "clusters": [{"name": "fake", "cluster": {"server": self.url}}],
            "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "me"}}],
        }))
        return str(path)

    # what tests do to it ------------------------------------------------------------------------------------------

    def serve_group(self, group: str, version: str) -> None:
        """Objects of a group that is not there by itself."""
        self.put("apis", "", group, {"metadata": {"name": group}, "preferredVersion": {"version": version}})

    def add_node(self, name: str, gpus: int = 4, **fields: Any) -> None:
        capacity = {"cpu": "8", "memory": "32Gi", "pods": "110"} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
        self.put("nodes", "", name, {
            "metadata": {"name": name, "labels": {
                "nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3", "nvidia.com/gpu.memory": "81559",
                "topology.kubernetes.io/zone": "z1"}},
            "spec": fields,
            "status": {"capacity": capacity, "allocatable": capacity,
                       "conditions": [{"type": "Ready", "status": "True"}],
                       "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}]},
        })
        self.put("leases", "kube-node-lease", name, {"metadata": {"name": name}, "spec": {"renewTime": stamp()}})

    def kill_kubelet(self, name: str) -> None:
        """It stops; its containers go on."""
        self.dead.add(name)
        self.break_off()

    def start_kubelet(self, name: str) -> None:
        """It ends containers whose pods are gone."""
        self.dead.discard(name)
        with self.news:
            for uid, process in list(self.processes.items()):
                if not any(pod["metadata"]["uid"] == uid for pod in self.objects.get("pods", {}).values()):
                    self._kill_all(process)

    def break_off(self) -> None:
        """All open streams end at once."""
        with self.news:
            self.cut += 1
            self.news.notify_all()

    def forget_history(self) -> None:
        """As after a compaction: who asks for an older version is told 410."""
        with self.news:
            self.version += 1
            self.oldest = self.version
            self.history.clear()
        self.break_off()

    def pods(self) -> list[Json]:
        with self.news:
            return [copy.deepcopy(pod) for pod in self.objects.get("pods", {}).values()]

    def everything(self) -> list[str]:
        """What is left in namespaces: `pods/NAME`, …"""
        with self.news:
            return sorted(f"{resource}/{name}" for resource in ("pods", "services", "configmaps")
                          for _, name in self.objects.get(resource, {}))

    def pid_of(self, pod: str) -> int:
        process = self._process(pod)
        assert process is not None
        assert process.popen is not None
        return process.popen.pid

    def _process(self, pod: str) -> Process | None:
        with self.news:
            found = next((one for (_, name), one in self.objects["pods"].items() if name == pod), None)
            return self.processes.get(found["metadata"]["uid"]) if found else None

    # the store ----------------------------------------------------------------------------------------------------

    def put(self, resource: str, namespace: str, name: str, found: Json) -> Json:
        """Make or replace an object."""
        with self.news:
            table = self.objects.setdefault(resource, {})
            before = table.get((namespace, name))
            self.version += 1
            fresh = copy.deepcopy(found)
            metadata = fresh["metadata"]
            metadata |= {"name": name, "resourceVersion": str(self.version)}
            metadata.setdefault("uid", str(uuid.uuid4()))
            metadata.setdefault("creationTimestamp", now())
            if namespace:
                metadata["namespace"] = namespace
            table[(namespace, name)] = fresh
            self._note("MODIFIED" if before else "ADDED", resource, before, fresh)
            return fresh

    def remove(self, resource: str, namespace: str, name: str) -> None:
        with self.news:
            before = self.objects[resource].pop((namespace, name))
            self.version += 1
            last = copy.deepcopy(before)
            last["metadata"]["resourceVersion"] = str(self.version)
            self._note("DELETED", resource, last, None)
            uid = before["metadata"]["uid"]
            for other, table in list(self.objects.items()):
                for (space, owned), one in list(table.items()):
                    if any(ref["uid"] == uid for ref in one["metadata"].get("ownerReferences") or ()):
                        if other == "pods":
                            self.delete_pod(space, owned, 1)
                        else:
                            self.remove(other, space, owned)

    def _note(self, kind: str, resource: str, before: Json | None, after: Json | None) -> None:
        self.history.append(Change(self.version, kind, resource, before, after))
        self.news.notify_all()

    def change(self, resource: str, namespace: str, name: str, edit: Callable[[Json], None]) -> Json:
        with self.news:
            found = self.objects.get(resource, {}).get((namespace, name))
            if found is None:
                raise Problem(404, f'{resource} "{name}" not found')
            fresh = copy.deepcopy(found)
            edit(fresh)
            return self.put(resource, namespace, name, fresh)

    def patch(self, resource: str, namespace: str, name: str, sub: str, body: Json) -> Json:
        """RFC 7396. `status` is reached by the sub-resource of that name only; a new spec is a new generation; what is
        being deleted goes with its last finalizer."""
        version = body.get("metadata", {}).get("resourceVersion")

        def edit(found: Json) -> None:
            if version is not None and version != found["metadata"]["resourceVersion"]:
                raise Problem(409, "the object has been modified")
            spec, status = copy.deepcopy(found.get("spec")), copy.deepcopy(found.get("status"))
            _merge(found, {"status": body.get("status")} if sub == "status" else body)
            if sub != "status" and status is not None:
                found["status"] = status
            if found.get("spec") != spec:
                found["metadata"]["generation"] = found["metadata"].get("generation", 1) + 1

        with self.news:
            made = self.change(resource, namespace, name, edit)
            if made["metadata"].get("deletionTimestamp") and not made["metadata"].get("finalizers"):
                self.remove(resource, namespace, name)
            return made

    # pods ---------------------------------------------------------------------------------------------------------

    def create(self, resource: str, namespace: str, body: Json) -> Json:
        name = body["metadata"].get("name", "")
        with self.news:
            if namespace and ("", namespace) not in self.objects["namespaces"]:
                raise Problem(404, f'namespaces "{namespace}" not found')
            if not name:
                raise Problem(422, "metadata.name: Required value")
            if (namespace, name) in self.objects.get(resource, {}):
                raise Problem(409, f'{resource} "{name}" already exists')
            if len(json.dumps(body)) > 1 << 20 and resource == "configmaps":
                raise Problem(413, "Request entity too large")
            if resource == "pods":
                body = body | {"status": {"phase": "Pending"}}
            body["metadata"].setdefault("generation", 1)
            made = self.put(resource, namespace, name, body)
        if resource == "pods":
            threading.Thread(target=self._schedule, args=(namespace, name), daemon=True).start()
        return made

    def _schedule(self, namespace: str, name: str) -> None:
        """Until it is bound or gone."""
        while not self._closing.is_set():
            with self.news:
                pod = self.objects["pods"].get((namespace, name))
                if pod is None or pod["spec"].get("nodeName"):
                    return
                node, why = self._choose(pod)
                if node:
                    uid = pod["metadata"]["uid"]
                    self.processes[uid] = Process(uid)
                    self.change("pods", namespace, name, lambda p, node=node: p["spec"].update(nodeName=node))
                    threading.Thread(target=self._run, args=(namespace, name, uid, node), daemon=True).start()
                    return
                condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": why}
                if (pod["status"].get("conditions") or [None])[0] != condition:
                    self.change("pods", namespace, name, lambda p, c=condition: p["status"].update(conditions=[c]))
                self.news.wait(0.2)

    def _choose(self, pod: Json) -> tuple[str, str]:
        affinity = pod["spec"].get("affinity", {}).get("nodeAffinity", {}).get(
            "requiredDuringSchedulingIgnoredDuringExecution")
        wanted = affinity["nodeSelectorTerms"][0]["matchFields"][0]["values"] if affinity else None
        reasons = Counter[str]()
        asked = nodes.use_of({"spec": pod["spec"] | {"nodeName": "x"}, "status": {}})
        assert asked is not None
        for (_, name), node in sorted(self.objects["nodes"].items()):
            if wanted is not None and name not in wanted:
                reasons["node(s) didn't match Pod's node affinity/selector"] += 1
            elif self._untolerated(pod, node):
                reasons["node(s) had untolerated taint(s)"] += 1
            elif node["spec"].get("unschedulable"):
                reasons["node(s) were unschedulable"] += 1
            elif lacking := self._lacking(name, node, asked):
                reasons[f"Insufficient {lacking}"] += 1
            else:
                return name, ""
        total = len(self.objects["nodes"])
        return "", f"0/{total} nodes are available: " + ", ".join(f"{n} {text}" for text, n in reasons.items()) + "."

    @staticmethod
    def _untolerated(pod: Json, node: Json) -> bool:
        def tolerated(taint: Json) -> bool:
            return any(t.get("key") == taint["key"] and t.get("value", "") in ("", taint.get("value", ""))
                       for t in pod["spec"].get("tolerations") or ())

        return any(t["effect"] != "PreferNoSchedule" and not tolerated(t) for t in node["spec"].get("taints") or ())

    def _lacking(self, name: str, node: Json, asked: nodes.Use) -> str:
        free = {r: nodes.milli(q) if r == "cpu" else int(nodes.amount(q)) for r, q in
                node["status"]["allocatable"].items()}
        uses = [use for pod in self.objects["pods"].values() if (use := nodes.use_of(pod)) and use.node == name]
        for use in [*uses, asked]:
            for resource, count in (("cpu", use.cpu_milli), ("memory", use.memory_bytes), *use.devices):
                free[resource] = free.get(resource, 0) - count
        return next((resource for resource, left in free.items() if left < 0), "")

    def _status(self, namespace: str, name: str, phase: str, state: Json, **more: Any) -> None:
        status = {"phase": phase, "containerStatuses": [{"name": "replica", "state": state, "restartCount": 0}], **more}
        with suppress(Problem):
            self.change("pods", namespace, name, lambda p: p["status"].update(status))

    def _run(self, namespace: str, name: str, uid: str, node: str) -> None:
        """The kubelet's part."""
        process = self.processes[uid]
        pod = self.objects["pods"].get((namespace, name))
        if pod is None or node in self.dead:
            return
        container = pod["spec"]["containers"][0]
        if container["image"] not in self.images:
            text = f'failed to pull and unpack image "{container["image"]}": failed to resolve image: not found'
            self._status(namespace, name, "Pending", {"waiting": {"reason": "ErrImagePull", "message": text}})
            return
        process.directory = tempfile.mkdtemp(prefix="fake-pod-")
        if not self._initialise(namespace, name, pod, process):
            return
        if node in self.dead or process.ended:
            return
        try:
            process.env = self._environment(namespace, pod, container, uid)
            process.popen = self._spawn(container, process)
        except KeyError as error:
            text = f"couldn't find key {error} in Secret"
            self._status(namespace, name, "Pending",
                         {"waiting": {"reason": "CreateContainerConfigError", "message": text}})
            return
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            text = (f'failed to create containerd task: runc create failed: unable to start container process: exec: '
                    f'"{container["command"][0]}": executable file not found in $PATH ({error})')
            process.whole = True
            self._status(namespace, name, "Failed", {"terminated": {
                "exitCode": 128, "reason": "StartError", "message": text}})
            return
        self._status(namespace, name, "Running", {"running": {"startedAt": now()}})
        reader = threading.Thread(target=self._read, args=(process,), daemon=True)
        reader.start()
        code = process.popen.wait()
        self._kill_all(process)
        reader.join(120)
        process.ended = process.whole = True
        status = 128 - code if code < 0 else code
        while node in self.dead and not self._closing.is_set():  # nobody tells
            time.sleep(0.05)
        self._status(namespace, name, "Failed" if code else "Succeeded", {"terminated": {
            "exitCode": status, "reason": "Error" if code else "Completed", "finishedAt": now()}})
        with self.news:
            self.news.notify_all()

    def _initialise(self, namespace: str, name: str, pod: Json, process: Process) -> bool:
        """Init containers run in a directory of their own, in which paths that are mounted are looked up."""
        for init in pod["spec"].get("initContainers") or ():
            inside = {mount["mountPath"]: f"{process.directory}{mount['mountPath']}" for mount in init["volumeMounts"]}
            for place in inside.values():
                os.makedirs(place, exist_ok=True)
            for mount in init["volumeMounts"]:
                volume = next(v for v in pod["spec"]["volumes"] if v["name"] == mount["name"])
                for source in (volume.get("projected") or {}).get("sources") or ():
                    found = self.objects["configmaps"][(namespace, source["configMap"]["name"])]
                    for key, data in found["binaryData"].items():
                        Path(inside[mount["mountPath"]], key).write_bytes(base64.b64decode(data))
            command = [inside.get(word, word) for word in map(expanded, init["command"])]
            done = subprocess.run(command, capture_output=True, check=False, env={"PATH": os.environ["PATH"]})
            if done.returncode:
                state = {"terminated": {"exitCode": done.returncode, "message": done.stderr.decode()}}
                with suppress(Problem):
                    self.change("pods", namespace, name, lambda p, init=init, state=state: p["status"].update(
                        phase="Failed", initContainerStatuses=[{"name": init["name"], "state": state}]))
                return False
        return True

    def _environment(self, namespace: str, pod: Json, container: Json, uid: str) -> dict[str, str]:
        env = {"PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin", "PYTHONPATH": str(ROOT),
               MARK: uid, "HOSTNAME": pod["spec"].get("hostname", "")}
        for one in container.get("env") or ():
            if "value" in one:
                env[one["name"]] = expanded(one["value"])
            else:
                reference = one["valueFrom"]["secretKeyRef"]
                secret = self.objects.get("secrets", {})[(namespace, reference["name"])]
                env[one["name"]] = base64.b64decode(secret["data"][reference["key"]]).decode()
        return env

    @staticmethod
    def _spawn(container: Json, process: Process) -> subprocess.Popen[bytes]:
        cwd = container.get("workingDir", "")
        places = (cwd, f"{process.directory}{cwd}/directory", "/tmp")
        return subprocess.Popen(
            [expanded(word) for word in container["command"]], cwd=next(filter(os.path.isdir, places)),
            env=process.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            start_new_session=True)

    def _read(self, process: Process) -> None:
        assert process.popen is not None
        assert process.popen.stdout is not None
        for line in process.popen.stdout:
            with self.news:
                process.lines.append((stamp(), line))
                self.news.notify_all()

    @staticmethod
    def _members(process: Process) -> list[int]:
        """Processes of the pod."""
        mark, found = f"{MARK}={process.uid}".encode(), []
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with suppress(OSError):
                    if mark in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                        found.append(int(entry))
        return found

    def _kill_all(self, process: Process, number: int = signal.SIGKILL) -> None:
        process.ended = process.ended or number == signal.SIGKILL
        for pid in self._members(process):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def delete_pod(self, namespace: str, name: str, grace_s: int) -> None:
        with self.news:
            pod = self.objects["pods"].get((namespace, name))
            if pod is None:
                raise Problem(404, f'pods "{name}" not found')
            process = self.processes.get(pod["metadata"]["uid"])
            over = pod["status"].get("phase") in ("Failed", "Succeeded")
            node = pod["spec"].get("nodeName", "")
            if grace_s == 0 or not node or over:
                self.remove("pods", namespace, name)
                if process is not None and node not in self.dead:
                    threading.Thread(target=self._kill_all, args=(process,), daemon=True).start()
                return
            first = "deletionTimestamp" not in pod["metadata"]
            self.change("pods", namespace, name, lambda p: p["metadata"].update(
                deletionTimestamp=p["metadata"].get("deletionTimestamp", now()), deletionGracePeriodSeconds=grace_s))
        if first or grace_s <= 1:
            arguments = (namespace, name, node, process, grace_s)
            threading.Thread(target=self._terminate, args=arguments, daemon=True).start()

    def _terminate(self, namespace: str, name: str, node: str, process: Process | None, grace_s: int) -> None:
        """SIGTERM to the first process, SIGKILL after the grace, then it is gone."""
        if process is None:
            return
        while node in self.dead and not self._closing.is_set():
            time.sleep(0.05)
        if process.popen is not None:
            with suppress(ProcessLookupError):
                process.popen.terminate()
            deadline = time.monotonic() + grace_s
            while not process.ended and time.monotonic() < deadline:
                time.sleep(0.02)
            self._kill_all(process)
            while not process.whole:
                time.sleep(0.02)
            time.sleep(0.05)  # the status first
        process.ended = True
        with suppress(KeyError), self.news:
            self.remove("pods", namespace, name)

    def _keep_alive(self) -> None:
        """Kubelets renew their Leases."""
        while not self._closing.wait(0.5):
            if self.down:
                continue
            with self.news:
                for (_, name) in list(self.objects.get("nodes", {})):
                    if name not in self.dead and ("kube-node-lease", name) in self.objects["leases"]:
                        self.change("leases", "kube-node-lease", name,
                                    lambda one: one["spec"].update(renewTime=stamp()))


def expanded(text: str) -> str:
    """`$$` is a dollar; variables are none of a test's."""
    return text.replace("$$", "$")


# HTTP -----------------------------------------------------------------------------------------------------------------


def matches(found: Json, query: dict[str, str]) -> bool:
    labels = found["metadata"].get("labels") or {}
    for term in filter(None, query.get("labelSelector", "").split(",")):
        name, negated, text = (*term.partition("!="),) if "!=" in term else (*term.partition("="),)
        if (labels.get(name) == text) is (negated == "!="):
            return False
    for term in filter(None, query.get("fieldSelector", "").split(",")):
        path, operator, text = term.partition("!=") if "!=" in term else term.partition("=")
        value: Any = found
        for step in path.split("."):
            value = (value or {}).get(step) or ""
        if (value == text) is (operator == "!="):
            return False
    return True


def _merge(below: Json, above: Json) -> None:
    for name, value in above.items():
        if value is None:
            below.pop(name, None)
        elif isinstance(value, dict):
            if not isinstance(below.get(name), dict):
                below[name] = {}
            _merge(below[name], value)
        else:
            below[name] = value


def _handler(cluster: FakeCluster) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def _route(self) -> tuple[str, str, str, str, dict[str, str]]:
            parts = urlsplit(self.path)
            words = parts.path.strip("/").split("/")
            if words[0] == "apis" and len(words) == 2:  # whether a group is served, and in which versions
                return "apis", "", words[1], "", {}
            words = words[2:] if words[0] == "api" else words[3:]
            query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
            namespace = ""
            if words[0] == "namespaces" and len(words) > 2:
                namespace, words = words[1], words[2:]
            words += [""] * 3
            return words[0], namespace, words[1], words[2], query

        def _serve(self, method: str) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else {}
            if cluster.down:
                self.close_connection = True
                return
            resource, namespace, name, sub, query = self._route()
            cluster.requests[f"{method} {resource}{'/' + sub if sub else ''}"] += 1
            try:
                self._answer(method, resource, namespace, name, sub, query, body)
            except Problem as problem:
                self._json(problem.code, {"kind": "Status", "code": problem.code, "message": str(problem)})
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def _answer(self, method: str, resource: str, namespace: str, name: str, sub: str, query: dict[str, str],
                    body: Json) -> None:
            match method:
                case "GET" if sub == "log":
                    self._log(namespace, name, query)
                case "GET" if sub == "exec":
                    self._exec(namespace, name)
                case "GET" if sub == "portforward":
                    self._forward(namespace, name, int(query["ports"]))
                case "GET" if name:
                    found = cluster.objects.get(resource, {}).get((namespace, name))
                    if found is None:
                        raise Problem(404, f'{resource} "{name}" not found')
                    self._json(200, found)
                case "GET" if query.get("watch"):
                    self._watch(resource, namespace, query)
                case "GET":
                    self._list(resource, namespace, query)
                case "POST":
                    self._json(201, cluster.create(resource, namespace, body))
                case "PATCH":
                    self._json(200, cluster.patch(resource, namespace, name, sub, body))
                case "DELETE":
                    self._delete(resource, namespace, name, query, body)
                    self._json(200, {"kind": "Status", "status": "Success"})

        def _delete(self, resource: str, namespace: str, name: str, query: dict[str, str], body: Json) -> None:
            with cluster.news:
                table = cluster.objects.get(resource, {})
                if name and (namespace, name) not in table:
                    raise Problem(404, f'{resource} "{name}" not found')
                chosen = [name] if name else [n for (space, n), one in table.items()
                                              if space == namespace and matches(one, query)]
            for one in chosen:
                if resource == "pods":
                    cluster.delete_pod(namespace, one, int(body.get("gracePeriodSeconds", 30)))
                elif cluster.objects[resource][(namespace, one)]["metadata"].get("finalizers"):
                    cluster.change(resource, namespace, one,
                                   lambda found: found["metadata"].setdefault("deletionTimestamp", now()))
                else:
                    cluster.remove(resource, namespace, one)

        def _list(self, resource: str, namespace: str, query: dict[str, str]) -> None:
            with cluster.news:
                table = cluster.objects.get(resource, {})
                found = sorted((key, one) for key, one in table.items()
                               if namespace in ("", key[0]) and matches(one, query))
                version = str(cluster.version)
                after: list[str] = []
                if token := query.get("continue"):
                    version, *after = json.loads(base64.b64decode(token))
                    if int(version) < cluster.oldest:
                        raise Problem(410, "The provided continue parameter is too old")
                rest = [(key, one) for key, one in found if list(key) > after]
                page = rest[: int(query.get("limit") or len(rest) or 1)]
                metadata = {"resourceVersion": version}
                if len(page) < len(rest):
                    token = base64.b64encode(json.dumps([version, *page[-1][0]]).encode()).decode()
                    metadata["continue"] = token
            self._json(200, {"kind": "List", "metadata": metadata, "items": [one for _, one in page]})

        def _watch(self, resource: str, namespace: str, query: dict[str, str]) -> None:
            version, cut = int(query.get("resourceVersion") or cluster.version), cluster.cut
            self._begin_stream()
            if version < cluster.oldest:
                status = {"kind": "Status", "code": 410, "message": f"too old resource version: {version}"}
                self._event("ERROR", status)
                self._end_stream()
                return
            end = time.monotonic() + float(query.get("timeoutSeconds") or 60)
            told = time.monotonic()
            while time.monotonic() < end and cluster.cut == cut and not cluster.down:
                with cluster.news:
                    fresh = [c for c in cluster.history if c.version > version] if cluster.version > version else []
                    if not fresh:
                        cluster.news.wait(0.2)
                    version = max([version, *(c.version for c in fresh)])
                for change in fresh:
                    if change.resource == resource and (event := _seen(change, namespace, query)):
                        self._event(*event)
                if time.monotonic() - told > 1.0 and query.get("allowWatchBookmarks"):
                    told = time.monotonic()
                    self._event("BOOKMARK", {"kind": "X", "metadata": {"resourceVersion": str(version)}})
            if cluster.cut != cut:
                self.close_connection = True
                with suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)
                return
            self._end_stream()

        def _log(self, namespace: str, name: str, query: dict[str, str]) -> None:
            with cluster.news:
                pod = cluster.objects["pods"].get((namespace, name))
                if pod is None:
                    raise Problem(404, f'pods "{name}" not found')
                if pod["spec"].get("nodeName") in cluster.dead:
                    raise Problem(500, "dial tcp: connect: connection refused")
                process, cut = cluster.processes.get(pod["metadata"]["uid"]), cluster.cut
                if process is None or (process.popen is None and not process.whole):
                    raise Problem(400, "container is waiting to start: ContainerCreating")
            self._begin_stream()
            at, follow = 0, query.get("follow") == "true"
            while cluster.cut == cut and not cluster.down:
                with cluster.news:
                    fresh, whole = process.lines[at:], process.whole
                    at += len(fresh)
                    if not fresh and follow and not whole:
                        cluster.news.wait(0.2)
                for moment, line in fresh:
                    if moment[:19] >= query.get("sinceTime", "")[:19]:
                        self._piece(moment.encode() + b" " + line)
                if not fresh and (whole or not follow):
                    self._end_stream()
                    return
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

        def _exec(self, namespace: str, name: str) -> None:
            asked = parse_qs(urlsplit(self.path).query)
            process = self._running(namespace, name)
            if asked["command"][:3] == ["/bin/sh", "-c", SEND]:
                self._upgrade()
                output, code = self._in_pod(process, asked["command"]), 0
                self._frame(2, b"\1" + output)
            else:
                version = self._upgrade()
                code = self._run(process, asked, version)
            status: Json = {"status": "Success" if not code else "Failure", "metadata": {}}
            if code:
                cause = {"reason": "ExitCode", "message": str(code)}
                status |= {"reason": "NonZeroExitCode", "details": {"causes": [cause]}}
            with suppress(OSError):
                self._frame(2, b"\3" + json.dumps(status).encode())
                self._frame(8, struct.pack(">H", 1000))
            self.close_connection = True

        def _running(self, namespace: str, name: str) -> Process:
            pod = cluster.objects["pods"].get((namespace, name))
            process = cluster.processes.get(pod["metadata"]["uid"]) if pod else None
            if pod is None or process is None or process.popen is None or pod["spec"]["nodeName"] in cluster.dead:
                raise Problem(500, "container not found")
            return process

        def _upgrade(self) -> str:
            """The newest version that was offered."""
            offered = self.headers.get("Sec-WebSocket-Protocol", "")
            version = ("v5" if "v5" in offered else "v4") + ".channel.k8s.io"
            nonce = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
            accept = base64.b64encode(hashlib.sha1(nonce.encode()).digest()).decode()
            self.send_response(101)
            for header, text in (("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Accept", accept),
                                 ("Sec-WebSocket-Protocol", version)):
                self.send_header(header, text)
            self.end_headers()
            self.sending = threading.Lock()
            return version

        def _run(self, process: Process, asked: dict[str, list[str]], version: str) -> int:
            """A command beside a pod's own, in its environment and directory, as a kubelet does it: one whose
            connection is lost goes on. Its code."""
            assert process.popen is not None
            with suppress(OSError):
                cwd = os.readlink(f"/proc/{process.popen.pid}/cwd")
            master = slave = -1
            streams: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            if asked.get("tty") == ["true"]:
                master, slave = os.openpty()
                streams = dict.fromkeys(streams, slave)
            command = asked["command"] if master < 0 else ["setsid", "-c", *asked["command"]]
            started = subprocess.Popen(command, cwd=cwd, env=process.env | {"TERM": "xterm"},
                                       start_new_session=master < 0, **streams)
            if master >= 0:
                os.close(slave)
            elif asked.get("stdin") != ["true"]:
                started.stdin.close()
            sources = {master: 1} if master >= 0 else {started.stdout.fileno(): 1, started.stderr.fileno(): 2}

            def take() -> None:
                while (frame := self._next_frame()) is not None:
                    channel, data = frame
                    with suppress(OSError, ValueError):
                        if channel == 0 and master >= 0:
                            os.write(master, data)
                        elif channel == 0:
                            started.stdin.write(data)
                            started.stdin.flush()
                        elif channel == 255 and data == b"\0" and version.startswith("v5"):
                            started.stdin.close()
                        elif channel == 4:
                            size = json.loads(data)
                            fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack(
                                "HHHH", size["Height"], size["Width"], 0, 0))

            def give(fd: int, channel: int) -> None:
                with suppress(OSError):
                    while data := os.read(fd, 32_768):
                        self._frame(2, bytes([channel]) + data)

            threading.Thread(target=take, daemon=True).start()
            givers = [threading.Thread(target=give, args=source, daemon=True) for source in sources.items()]
            for giver in givers:
                giver.start()
            code = started.wait()
            for giver in givers:
                giver.join(60.0)
            return code if code >= 0 else 128 - code

        def _forward(self, namespace: str, name: str, port: int) -> None:
            self._running(namespace, name)
            self._upgrade()
            number = struct.pack("<H", port)
            self._frame(2, b"\0" + number)
            self._frame(2, b"\1" + number)
            try:
                sock = socket.create_connection(("127.0.0.1", port), 5.0)
            except OSError as error:
                self._frame(2, f"\1error forwarding port {port} to pod {name}: {error}".encode())
                self.close_connection = True
                return
            sock.settimeout(None)

            def take() -> None:
                with suppress(OSError):
                    while (frame := self._next_frame()) is not None:
                        if frame[0] == 0:
                            sock.sendall(frame[1])
                    sock.shutdown(socket.SHUT_RDWR)

            threading.Thread(target=take, daemon=True).start()
            with sock, suppress(OSError):
                while data := sock.recv(32_768):
                    self._frame(2, b"\0" + data)
            with suppress(OSError):
                self._frame(8, struct.pack(">H", 1000))
            self.close_connection = True

        def _in_pod(self, process: Process, command: list[str]) -> bytes:
            """The script that sends signals would reach the whole machine, so it is played."""
            number, whom, sent = int(command[4]), command[5], []
            for pid in cluster._members(process):
                with suppress(OSError):
                    caught = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines()
                                  if line.startswith("SigCgt"))
                    if whom == "all" or int(caught.split()[1], 16) >> (number - 1) & 1:
                        os.kill(pid, number)
                        sent.append(f"{pid}\n")
            return "".join(sent).encode()

        # bytes ----------------------------------------------------------------------------------------------------

        def _frame(self, opcode: int, data: bytes) -> None:
            length = bytes([len(data)]) if len(data) < 126 else b"\x7e" + struct.pack(">H", len(data))
            with self.sending:
                self.wfile.write(bytes([0x80 | opcode]) + length + data)
                self.wfile.flush()

        def _next_frame(self) -> tuple[int, bytes] | None:
            """Channel and data of the next message from the other side; None when there will be none."""
            while True:
                try:
                    first, second = self.rfile.read(2)
                    length = second & 0x7F
                    if length > 125:
                        (length,) = struct.unpack(*((">H", self.rfile.read(2)) if length == 126 else
                                                    (">Q", self.rfile.read(8))))
                    mask = self.rfile.read(4)
                    data = self.rfile.read(length)
                except (ValueError, OSError, struct.error):
                    return None
                plain = int.from_bytes(data, "big") ^ int.from_bytes((mask * (length // 4 + 1))[:length], "big")
                data = plain.to_bytes(length, "big")
                if first & 0x0F == 8:
                    return None
                if first & 0x0F in (1, 2) and data:
                    return data[0], data[1:]

        def _json(self, code: int, found: Json) -> None:
            data = json.dumps(found).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _begin_stream(self) -> None:
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()

        def _event(self, kind: str, found: Json) -> None:
            self._piece(json.dumps({"type": kind, "object": found}).encode() + b"\n")

        def _piece(self, data: bytes) -> None:
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()

        def _end_stream(self) -> None:
            self.wfile.write(b"0\r\n\r\n")
            self.wfile.flush()

        def do_GET(self) -> None:
            self._serve("GET")

        def do_POST(self) -> None:
            self._serve("POST")

        def do_PATCH(self) -> None:
            self._serve("PATCH")

        def do_DELETE(self) -> None:
            self._serve("DELETE")

    return Handler


def _seen(change: Change, namespace: str, query: dict[str, str]) -> tuple[str, Json] | None:
    """A change as a watch with these selectors sees it: what no longer matches is deleted for it."""
    def of(found: Json | None) -> bool:
        return found is not None and namespace in ("", found["metadata"].get("namespace", "")) and matches(found, query)

    was, holds = of(change.before), of(change.after)
    if holds:
        assert change.after is not None
        return ("MODIFIED" if was else "ADDED"), change.after
    if was:
        assert change.before is not None
        last = change.after or change.before
        return "DELETED", last
    return None


def until(holds: Callable[[], object], patience_s: float = 120.0) -> None:
    deadline = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)



