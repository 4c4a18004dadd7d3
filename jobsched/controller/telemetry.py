"""Telemetry: progress of running jobs from what was sighted, and its sampling into the store's side table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from jobsched.core.answers import JobProgress, ReplicaProgress
from jobsched.core.cluster import Cluster
from jobsched.core.job import Job, Phase, ReplicaState
from jobsched.core.judge import ranks
from jobsched.core.launch import launch_key
from jobsched.core.observation import Progress, Seen, Sight
from jobsched.core.policies.goodput import Report, SpeedModel
from jobsched.core.resources import JobId
from jobsched.core.shape import sized_roles
from jobsched.ports import OWN_METRICS, Sample

SAMPLE_EVERY_MS = 1_000


def progress_of(job: Job, sight: Sight, now_ms: int) -> JobProgress:
    """The job's progress now. O(its replicas)."""
    rank = ranks(job)
    rows: list[ReplicaProgress] = []
    best: tuple[int, int, Progress] | None = None
    for replica in sorted(job.replicas.values(), key=lambda r: (r.role, r.index)):
        key = launch_key(job.id, job.attempt, replica.role, replica.index, replica.restart)
        report = sight.replicas.get(key)
        progress = report.progress if report else None
        stepped, beat = sight.step_at_ms.get(key), sight.beat_at_ms.get(key)
        rows.append(
            ReplicaProgress(
                role=replica.role,
                index=replica.index,
                rank=rank.get(replica.id, -1),
                node=str(replica.binding.node) if replica.binding else "",
                state=str(report.state) if report else str(replica.state),
                restart=replica.restart,
                ident=report.ident if report else "",
                step=progress.step if progress else -1,
                step_age_ms=now_ms - stepped if stepped is not None else -1,
                beat_age_ms=now_ms - beat if beat is not None else -1,
                metrics=progress.metrics if progress else (),
            )
        )
        if progress is not None and progress.step >= 0 and replica.id in rank:
            mine = (progress.step, -rank[replica.id], progress)
            if best is None or mine[:2] > best[:2]:
                best = mine
    if best is None:
        return JobProgress(world_size=len(rank), replicas=tuple(rows))
    newest = best[2]
    return JobProgress(newest.step, newest.total, newest.world_size or len(rank), newest.metrics, tuple(rows))


NODES, SERVERS = f"{OWN_METRICS}nodes", f"{OWN_METRICS}servers"
"""Metrics that samples of elastic jobs carry: on how many nodes the gang was, and how many parameter servers it had, so
that speeds can be learned again."""


def learn_speed(cluster: Cluster, job: Job, progress: JobProgress, now_ms: int) -> tuple[tuple[str, float], ...]:
    """Take a report of a running elastic job into its speed model, once the whole gang trains at its present size.
    Returns what `learn_again` needs besides; nothing when nothing was learned."""
    name, servers = sized_roles(job.spec)
    if not name or job.phase is not Phase.RUNNING:
        return ()
    bound = [r for r in job.replicas.values() if r.role in (name, servers) and r.binding is not None]
    trains = sum(r.role == name for r in bound)
    settled = all(r.state is ReplicaState.RUNNING for r in bound)
    if not settled or progress.world_size not in (trains, len(ranks(job))):
        return ()
    metrics = dict(progress.metrics)
    if metrics.get("asynchronous", 0.0) > 0.0:
        metrics |= _together(progress, name, trains)
    nodes = len({r.binding.node for r in bound if r.role == name and r.binding is not None})
    report = Report.of(metrics, nodes, trains, len(bound) - trains)
    if report is None:
        return ()
    model = cluster.speeds.setdefault(job.id, SpeedModel())
    model.note(report)
    pause = model.passed(job.attempt, (trains, len(bound) - trains), progress.step, progress.total, now_ms)
    if pause is not None and job.failed_at_ms < pause.since_ms:
        took_ms = pause.took_ms if pause.in_place else max(0, pause.took_ms - job.waited_ms)
        cluster.pauses.note(job, pause.in_place, took_ms)
    return ((NODES, float(nodes)), (SERVERS, float(len(bound) - trains)))


def _together(progress: JobProgress, role: str, count: int) -> dict[str, float]:
    """Of replicas that each step for themselves: the time of a step at which all together make as many as they do, and
    the mean time of it with the servers. Nothing to be learned (0) until all have told."""
    told = [dict(r.metrics) for r in progress.replicas if r.role == role]
    paces = [report.step_s for m in told if (report := Report.of({**m, "samples_per_s": 0.0}, 1, 1)) is not None]
    if len(paces) < count:
        return {"step_s": 0.0, "samples_per_s": 0.0, "local_samples_per_s": 0.0}
    step_s = len(paces) / sum(1.0 / pace for pace in paces)
    return {"step_s": step_s, "sync_s": min(step_s, sum(m.get("sync_s", 0.0) for m in told) / len(told))}


def learn_again(cluster: Cluster, job_id: JobId, samples: Iterable[Sample]) -> None:
    """What `learn_speed` had learned of a job, from its samples; a leader does this when it begins."""
    for sample in samples:
        metrics = dict(sample.metrics)
        nodes = int(metrics.get(NODES, 0))
        servers = int(metrics.get(SERVERS, 0))
        report = Report.of(metrics, nodes, sample.world_size, servers) if nodes and sample.world_size else None
        if report is not None:
            cluster.speeds.setdefault(job_id, SpeedModel()).note(report)


class Sampler:
    """At most one sample a second and job, and always the last one of an attempt."""

    def __init__(self) -> None:
        self._last: dict[JobId, Sample] = {}

    def forget(self, job_id: JobId) -> None:
        """The attempt is over."""
        self._last.pop(job_id, None)

    def samples(self, cluster: Cluster, sight: Sight, job_ids: Iterable[JobId], now_ms: int) -> list[Sample]:
        found: list[Sample] = []
        for job_id in job_ids:
            job = cluster.jobs.get(job_id)
            if job is None or not job.phase.active:
                continue
            if not any(r.progress for key in sight.by_job.get(job_id, ()) if (r := sight.replicas.get(key))):
                continue
            progress = progress_of(job, sight, now_ms)
            if progress.step < 0:
                continue
            last = self._last.get(job_id)
            sample = Sample(
                job_id, now_ms, job.attempt, progress.step, progress.total, progress.world_size, progress.metrics
            )
            if last is not None and (last.attempt, last.step, last.metrics) == (
                sample.attempt, sample.step, sample.metrics,
            ):  # fmt: skip
                continue
            ending = job.outcome is not None or any(r.state == Seen.EXITED for r in progress.replicas)
            if last is None or ending or now_ms - last.at_ms >= SAMPLE_EVERY_MS:
                self._last[job_id] = sample
                found.append(replace(sample, metrics=(*sample.metrics, *learn_speed(cluster, job, progress, now_ms))))
        return found
