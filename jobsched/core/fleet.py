"""The fleet: the nodes as the log has them, what is bound on each, what may be, and what is held against them.

A part of `Cluster`, which folds the events of nodes into it; it keeps the ledger's nodes true.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import assert_never

from jobsched.core import events as ev
from jobsched.core.job import Binding, Job, Phase, ReplicaId, RoleShape, Shape
from jobsched.core.ledger import ANY, GpuClass, Ledger
from jobsched.core.node import Cordon, Node
from jobsched.core.policies.parts import PoolKey, pool_key
from jobsched.core.policies.ranking import Pool
from jobsched.core.pools import BY as POOLS
from jobsched.core.resources import WHOLE_GPU, JobId, NodeName
from jobsched.core.suspicion import PREFLIGHT_LABEL, Accusation, Checked, Suspicion, against_node
from jobsched.spec.queue import CPU, GPUS, MEMORY

POOLS_KEPT = 1_000


@dataclass(slots=True)
class Fleet:
    ledger: Ledger
    """What is free on each of them."""
    nodes: dict[NodeName, Node] = field(default_factory=dict)
    """All that were ever seen."""
    lost: set[NodeName] = field(default_factory=set)
    cordoned: dict[NodeName, Cordon] = field(default_factory=dict)
    on_node: dict[NodeName, dict[tuple[JobId, ReplicaId], tuple[Binding, RoleShape]]] = field(default_factory=dict)
    """What is bound where."""
    suspicions: dict[NodeName, Suspicion] = field(default_factory=dict)
    accused: dict[NodeName, None] = field(default_factory=dict)
    """Nodes against which something was held since `policies.health` last looked."""
    checking: dict[NodeName, JobId] = field(default_factory=dict)
    """Nodes on probation -> their check under way."""
    checks: dict[NodeName, Checked] = field(default_factory=dict)
    """How the last check of each node on probation ended."""
    moved: int = 0
    """Rises when what may be bound where changes."""
    _pools: dict[tuple[object, ...], tuple[Shape, Pool]] = field(default_factory=dict)
    _gpus: dict[frozenset[PoolKey], dict[str, int]] = field(default_factory=dict)
    _capacity: dict[str, int] | None = None
    _widest: dict[GpuClass, int] = field(default_factory=dict)

    # ---- evolve ----

    def evolve(self, event: ev.NodeSeen | ev.NodeLost | ev.NodeCordoned | ev.NodeUncordoned) -> None:
        match event:
            case ev.NodeSeen(node=node):
                for held in against_node(self.nodes.get(node.name), event):
                    self.accuse(node.name, held)
                self.put(node)
            case ev.NodeLost(node=name):
                going = name in self.cordoned and self.cordoned[name].by == POOLS
                for held in () if going else against_node(None, event):
                    self.accuse(name, held)
                self.lose(name)
            case ev.NodeCordoned(node=name):
                self.cordoned[name] = cordon_of(event)
                self._reopen(name)
            case ev.NodeUncordoned(node=name):
                self.cordoned.pop(name, None)
                self.suspicions.pop(name, None)
                self.accused.pop(name, None)
                self.checks.pop(name, None)
                self._reopen(name)
            case _:
                assert_never(event)

    def put(self, node: Node) -> None:
        """A node is there, or is another than before."""
        self._capacity = None
        self.nodes[node.name] = node
        self.lost.discard(node.name)
        cordon = self.cordoned.get(node.name)
        if cordon is not None and cordon.gpus:
            gpus = tuple(replace(gpu, healthy=gpu.healthy and gpu.id not in cordon.gpus) for gpu in node.gpus)
            node = replace(node, gpus=gpus)
        self.ledger.put_node(node, self.on_node.get(node.name, {}).values())
        self._repool(node.name)

    def lose(self, name: NodeName) -> None:
        """A node is gone; what is bound on it stays noted until its jobs learn of it."""
        self._capacity = None
        self.lost.add(name)
        self.ledger.drop_node(name)
        self._repool(name)

    def accuse(self, name: NodeName, held: Accusation) -> None:
        self.suspicions.setdefault(name, Suspicion()).add(held)
        self.accused[name] = None

    def note_check(self, job: Job, at_ms: int) -> None:
        """Keep `checking` and `checks` true when something happens to a job of jobsched itself."""
        checked = job.labels.get(PREFLIGHT_LABEL)
        if checked is None:
            return
        name = NodeName(checked)
        if not job.phase.terminal:
            self.checking[name] = job.id
        elif self.checking.get(name) == job.id:
            del self.checking[name]
            before = self.checks.get(name)
            row = 0 if job.phase is Phase.SUCCEEDED else 1 + (before.in_a_row if before is not None else 0)
            self.checks[name] = Checked(at_ms, row)

    def _reopen(self, name: NodeName) -> None:
        """Its cordon has changed: everything is worth another try."""
        if name in self.nodes and name not in self.lost:
            self.put(self.nodes[name])
        else:
            self._repool(name)
        self.ledger.unblock()

    def _repool(self, name: NodeName) -> None:
        """A node changed: it may belong to other pools now."""
        self.moved += 1
        self._gpus.clear()
        for shape, pool in self._pools.values():
            if self._may_use(shape, name):
                pool[name] = None
            else:
                pool.pop(name, None)
        self.ledger.note_change(name)

    # ---- questions ----

    def is_up(self, name: NodeName) -> bool:
        """Whether the node is there and ready, cordoned or not."""
        node = self.nodes.get(name)
        return node is not None and node.ready and name not in self.lost

    def usable(self, name: NodeName) -> bool:
        """Whether something new may be bound on the node."""
        cordon = self.cordoned.get(name)
        return self.is_up(name) and (cordon is None or bool(cordon.gpus))

    def unwelcome(self, shape: Shape, name: NodeName) -> str:
        """What keeps a shape off a node whatever is free there, in words; "": nothing does."""
        node = self.nodes[name]
        if name in shape.avoid:
            return "to be avoided"
        for key, value in shape.node_labels:
            if node.label(key) != value:
                return f"without label {key}={value}"
        for taint in node.taints:
            if taint not in shape.tolerate and taint.split("=")[0] not in shape.tolerate:
                return f"with taint {taint}"
        return ""

    def _may_use(self, shape: Shape, name: NodeName) -> bool:
        return self.usable(name) and not self.unwelcome(shape, name)

    def pool(self, shape: Shape) -> Pool:
        """Nodes that something of this shape may be bound on at all: usable, with its labels, without taints or
        avoidance against it. Kept true from one question to the next."""
        key = pool_key(shape)
        found = self._pools.get(key)
        if found is None:
            if len(self._pools) >= POOLS_KEPT:
                self._pools.clear()
            found = self._pools[key] = (shape, Pool(name for name in self.nodes if self._may_use(shape, name)))
        return found[1]

    def gpus(self, shapes: Iterable[Shape]) -> Mapping[str, int]:
        """Kind -> thousandths of GPUs on the nodes that any of these may use. Kept until a node changes."""
        pools = {pool_key(shape): shape for shape in shapes}
        asked = frozenset(pools)
        found = self._gpus.get(asked)
        if found is None:
            if len(self._gpus) >= POOLS_KEPT:
                self._gpus.clear()
            found = self._gpus[asked] = {}
            for name in dict.fromkeys([name for shape in pools.values() for name in self.pool(shape)]):
                for kind, _ in self.ledger.spaces[name].gpu_class.values():
                    found[kind] = found.get(kind, 0) + WHOLE_GPU
        return found

    def jobs_on(self, name: NodeName) -> Iterator[JobId]:
        """Jobs with a replica bound on the node, each once, in order of binding."""
        yield from dict.fromkeys(job_id for job_id, _ in self.on_node.get(name, {}))

    def kind_of(self, binding: Binding) -> str:
        """The kind of a binding's GPUs; "" when it has none, or they are unknown."""
        if not binding.gpus:
            return ""
        space = self.ledger.spaces.get(binding.node)
        if space is not None and binding.gpus[0].gpu in space.gpu_class:
            return space.gpu_class[binding.gpus[0].gpu][0]
        node = self.nodes.get(binding.node)
        return next((g.kind.lower() for g in node.gpus if g.id == binding.gpus[0].gpu), "") if node else ""

    def capacity(self) -> Mapping[str, int]:
        """Resource -> how much all nodes that are there have: GPUs of any kind, of each kind, CPUs, memory. Kept until
        a node changes."""
        if self._capacity is None:
            found = {GPUS: 0, CPU: 0, MEMORY: 0}
            self._widest = {ANY: max((node.cpu_milli for node in self.nodes.values()), default=1)}
            for name, node in self.nodes.items():
                if name in self.lost:
                    continue
                found[CPU] += node.cpu_milli
                found[MEMORY] += node.memory_bytes
                for gpu in node.gpus:
                    found[GPUS] += WHOLE_GPU
                    found[gpu.kind.lower()] = found.get(gpu.kind.lower(), 0) + WHOLE_GPU
            for space in self.ledger.spaces.values():
                for gpu_class in dict.fromkeys(space.gpu_class.values()):
                    count = sum(each == gpu_class for each in space.gpu_class.values())
                    self._widest[gpu_class] = max(count, self._widest.get(gpu_class, 1))
            self._capacity = found
        return self._capacity

    def widest(self, gpu_class: GpuClass) -> int:
        """The most GPUs of a class that one node has, 1 when there are none; of `ANY`, CPUs in thousandths. Kept until
        a node changes."""
        self.capacity()
        return self._widest.get(gpu_class, 1)


def cordon_of(event: ev.NodeCordoned) -> Cordon:
    return Cordon(event.drain, event.by, event.why, event.at_ms, event.gpus)
