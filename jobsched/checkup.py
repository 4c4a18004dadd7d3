"""Looking a server over: what works (`doctor`), all that it holds (`snapshot`), and whether its log, its projections
and its live cluster agree (`verify`). Called by `api`; changes nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from pydantic import TypeAdapter

from jobsched.core import events as ev
from jobsched.core import invariants
from jobsched.core.answers import Check, Verification
from jobsched.core.job import Job
from jobsched.core.lifecycle import Illegal, evolve_job
from jobsched.core.resources import JobId
from jobsched.errors import JobschedError
from jobsched.live import LiveView
from jobsched.ports import Backend, Clock, Store


class Checkup:
    """One per server. Thread-safe."""

    def __init__(
        self, store: Store, live: LiveView, backend: Backend, clock: Clock, checks: Callable[[], Iterable[Check]]
    ) -> None:
        """`checks` adds what only the composition root knows (home directory, versions) to `doctor`."""
        self._store, self._live, self._backend, self._clock, self._checks = store, live, backend, clock, checks
        self._verifying = threading.Lock()

    def doctor(self) -> tuple[Check, ...]:
        """What works and what does not, with what would help."""
        can = self._backend.capabilities
        with self._live.view() as (cluster, _):
            nodes = [n for name, n in cluster.fleet.nodes.items() if name not in cluster.fleet.lost]
            lost, queues = sorted(cluster.fleet.lost), len(cluster.queues)
        gpus = sum(len(n.gpus) for n in nodes)
        sick = [f"{n.name}/{g.id}" for n in nodes for g in n.gpus if not g.healthy]
        health = self._live.health
        try:
            store = Check("store", not health.store_error, health.store_error or f"{self._store.last_seq()} events")
        except JobschedError as exc:
            store = Check("store", False, exc.message, exc.hint)
        return (
            store,
            Check("controller", health.ticks > 0, f"{health.ticks} ticks, the last took {health.last_tick_ms:.0f} ms"),
            Check("leader", self._live.leading, "this server leads" if self._live.leading else "another server leads"),
            Check("backend", not health.backend_error, health.backend_error
                  or f"{can.name}; peers by {can.addressing}; warm start: {_yes(can.warm_start)}"),
            Check("limits", can.limits != "none", f"CPU and memory limits by {can.limits}",
                  "" if can.limits != "none" else "replicas can take more CPU and memory than they asked for"),
            Check("stacks", can.stacks, f"stacks of hung replicas: {_yes(can.stacks)}",
                  "" if can.stacks else "pip install 'jobsched[stacks]'"),
            Check("nodes", bool(nodes) and not lost,
                  f"{len(nodes)} ready" + (f", lost: {', '.join(lost)}" if lost else ""),
                  "" if nodes else "no node has been seen; is the backend configured?"),
            Check("gpus", not sick, f"{gpus} GPUs" + (f", unhealthy: {', '.join(sick)}" if sick else "")),
            Check("queues", queues > 0, f"{queues} defined"),
            *self._checks(),
        )  # fmt: skip

    def snapshot(self) -> dict[str, object]:
        """The live cluster and what was last seen, as plain JSON values, for bug reports and replay. O(jobs)."""
        with self._live.view() as (cluster, sight):
            jobs, nodes = list(cluster.jobs.values()), list(cluster.fleet.nodes.values())
            lines = [
                {"key": line.key, "jobs": [place.job_id for place in line.places]} for line in cluster.lines.values()
            ]
            whole: dict[str, object] = {
                "seq": cluster.seq, "now_ms": self._clock.now_ms(), "leading": self._live.leading, "jobs": jobs,
                "nodes": nodes, "lost": sorted(cluster.fleet.lost), "cordoned": dict(cluster.fleet.cordoned),
                "queues": list(cluster.queues.values()),
                "held": {name: dict(a.held) for name, a in cluster.quotas.accounts.items()},
                "lines": lines, "replicas": list(sight.replicas.values()),
            }  # fmt: skip
        plain: dict[str, object] = TypeAdapter(dict[str, object]).dump_python(whole, mode="json")
        return plain

    def verify(self) -> Verification:
        """Replay the whole log and compare: sequence without gaps, every event legal, projections equal to the fold,
        and the live cluster sound. O(events); ended jobs are compared as they end and then forgotten. One at a time."""
        with self._verifying:
            return self._verify()

    def _verify(self) -> Verification:
        problems: list[str] = []
        live: dict[JobId, Job] = {}
        seq, ended = 0, 0
        while page := self._store.read(seq, 5_000):
            for item in page:
                if item.seq != seq + 1:
                    problems.append(f"event {seq} is followed by event {item.seq}")
                seq = item.seq
                job_id = item.event.job_id
                if job_id is None:
                    continue
                try:
                    job = evolve_job(live.get(job_id), ev.of_job(item.event))
                except Illegal as exc:
                    problems.append(f"event {seq}: {exc}")
                    continue
                live[job_id] = job
                if job.phase.terminal:
                    ended += 1
                    problems += self._compare(live.pop(job_id), seq)
        for job in live.values():
            problems += self._compare(job, seq)
        with self._live.view() as (cluster, _):
            problems += invariants.check(cluster)
        return Verification(not problems, seq, ended + len(live), tuple(problems[:100]))

    def _compare(self, job: Job, seq: int) -> Iterable[str]:
        """Differences between a folded job and its projection, which may have moved on since the log was read."""
        projected = self._store.job(job.id)
        if projected is not None and projected.version > job.version:
            for item in self._store.history(job.id, after=seq):
                if job.version < projected.version:
                    job = evolve_job(job, ev.of_job(item.event))
        if projected is None:
            return (f"job {job.id} is in the log but has no projection",)
        different = [name for name in Job.__dataclass_fields__ if getattr(job, name) != getattr(projected, name)]
        return (f"job {job.id}: projection differs from the log in {', '.join(different)}",) if different else ()


def _yes(value: bool) -> str:
    return "yes" if value else "no"
