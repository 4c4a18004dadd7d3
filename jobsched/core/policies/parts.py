"""The cluster in parts that do not compete: what changes in one need not be planned anew in another.

Jobs that may be bound on the same nodes form a crowd; crowds whose nodes overlap, or whose queues share a limit, belong
to one part. Kept by `Cluster`, used by `preemption.replan`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from jobsched.core.job import Shape
from jobsched.core.node import Node
from jobsched.core.resources import WHOLE_GPU, JobId, NodeName
from jobsched.spec.queue import QueueSpec

PoolKey = tuple[tuple[tuple[str, str], ...], tuple[str, ...], tuple[str, ...]]
"""Labels, tolerations and avoidance of a shape: where it may be bound at all."""


def pool_key(shape: Shape) -> PoolKey:
    return (shape.node_labels, shape.tolerate, shape.avoid)


@dataclass(slots=True)
class Crowd:
    """Live jobs that may be bound on the same nodes; `shape` is one of theirs."""

    shape: Shape
    jobs: dict[JobId, None] = field(default_factory=dict)
    active: dict[JobId, None] = field(default_factory=dict)
    """Those that start, run or stop."""


@dataclass(slots=True)
class Parts:
    """Which part each crowd belongs to, and when each part is planned anew; scratch kept between re-plans."""

    part_of: dict[PoolKey, int] = field(default_factory=dict)
    due_ms: dict[int, int] = field(default_factory=dict)
    """Part -> when its order changes by itself."""
    gpus: dict[int, int] = field(default_factory=dict)
    """Part -> GPUs of its nodes, in thousandths: no more of like jobs can run there at once."""
    _made_for: tuple[object, ...] = ()

    def gpu_milli(self, shape: Shape) -> int:
        """GPUs for a shape and all that compete with it, in thousandths."""
        return self.gpus[self.part_of[pool_key(shape)]]

    def renew(
        self,
        state: tuple[int, ...],
        queues: Collection[QueueSpec],
        crowds: Mapping[PoolKey, Crowd],
        pool: Callable[[Shape], Iterable[NodeName]],
        nodes: Mapping[NodeName, Node],
    ) -> bool:
        """Divide anew if who competes has changed (`state` stands for nodes and limits), and whether that was so.
        O(pools * nodes) then."""
        coupled = any(_limits(queue) for queue in queues)
        made_for = (*state, coupled, len(queues))
        if made_for == self._made_for and crowds.keys() <= self.part_of.keys():
            return False
        self._made_for, self.due_ms = made_for, {}
        self.part_of = dict.fromkeys(crowds, 0)
        if coupled:
            self.gpus = {0: sum(len(node.gpus) for node in nodes.values()) * WHOLE_GPU}
            return True
        owner: dict[NodeName, int] = {}
        for number, (key, crowd) in enumerate(crowds.items()):
            names = list(pool(crowd.shape))
            met = {owner[name] for name in names if name in owner}
            part = self.part_of[key] = min(met, default=number)
            for name in names:
                owner[name] = part
            if len(met) > 1:
                self.part_of = {other: part if old in met else old for other, old in self.part_of.items()}
                owner = {name: part if old in met else old for name, old in owner.items()}
        self.gpus = dict.fromkeys(self.part_of.values(), 0)
        for name, part in owner.items():
            self.gpus[part] += len(nodes[name].gpus) * WHOLE_GPU
        return True


def _limits(queue: QueueSpec) -> bool:
    """Whether what one of its jobs holds may keep another from starting."""
    return bool(queue.cohort or queue.quota or queue.borrowing_limit or queue.lending_limit or queue.budget) or (
        queue.max_gpus is not None or queue.max_gpus_per_user is not None
    )
