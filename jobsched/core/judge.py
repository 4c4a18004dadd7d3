"""Judge: what happened out there, as events. Pure: reads the cluster, what was sighted, and now.

Called once a tick for the jobs that something may have happened to. Every rule about health stands here: exits, losses,
nodes, start-up, time limits, hangs, success, restart or end. No kill on one missed signal: a replica counts as hung
only after its lease (the timeout) expired and a second, independent sign agrees.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from jobsched.core import events as ev
from jobsched.core.cluster import Cluster
from jobsched.core.diagnose import odd_one_out
from jobsched.core.job import (
    Cause,
    FailureClass,
    Job,
    Outcome,
    Phase,
    Reason,
    Replica,
    ReplicaId,
    ReplicaState,
    replica_id,
)
from jobsched.core.launch import LaunchKey, launch_key
from jobsched.core.lifecycle import COUNTED, evolve_job
from jobsched.core.observation import ReplicaReport, Seen, Sight
from jobsched.core.resources import JobId, NodeName
from jobsched.core.values import dataclass
from jobsched.spec.job import SERVING_ROLES, RestartScope, resizes_in_place, restart_policy, training_roles

SUSPICION_MS = 1_000
"""A suspicion lasts at least this long before it becomes a verdict: time for a slow step to end."""
STACKS_WAIT_MS = 1_500
"""How long stacks are waited for at most."""
FORGIVE_AFTER_MS = 600_000
"""A failure this long ago does not count towards the restart budget."""
INFRA_BACKOFF_MAX_MS = 300_000
SETTLE_MS = 2_000
"""How long a start that was ordered but not seen may still be on its way."""
UNKNOWN_IDLE_FACTOR = 3
"""Where CPU use is not known, a lost heartbeat must last this many times its timeout."""


Seeing = dict[ReplicaId, ReplicaReport]
"""What was sighted of a job's replicas, of those of which something was."""
STARTS = (ev.ReplicasStarted, ev.AttemptStarted)
"""Events after which judge has nothing to add: every rule that reads what they change comes after theirs."""


@dataclass(frozen=True, slots=True)
class Senses:
    """What the backend promises about absence (from its capabilities)."""

    absence_is_final: bool = False
    lost_after_ms: int = 30_000
    blind: bool = False
    """The backend cannot be reached just now: silence says nothing about a replica."""


def judge(
    cluster: Cluster, sight: Sight, job_ids: Iterable[JobId], now_ms: int, senses: Senses
) -> list[ev.JobEvent]:
    """Events about these jobs, each job's in order. Cost: their replicas."""
    found: list[ev.JobEvent] = []
    for job_id in job_ids:
        job = cluster.jobs.get(job_id)
        if job is not None:
            court = _Court(cluster, sight, job, now_ms, senses)
            for event in court.rules():
                found.append(event)
                court.job = evolve_job(court.job, event)
    return found


def settled_by(events: Iterable[ev.JobEvent]) -> set[JobId]:
    """Jobs about which judge has nothing to add once these events, which it found, are applied."""
    found = {event.job_id for event in events}
    return found.difference([event.job_id for event in events if type(event) not in STARTS])


def judge_nodes(
    cluster: Cluster, sight: Sight, names: Iterable[NodeName], now_ms: int, senses: Senses
) -> list[ev.ClusterEvent]:
    """Nodes that joined, changed, or are gone for longer than their grace."""
    found: list[ev.ClusterEvent] = []
    for name in sorted(names):
        node = sight.nodes.get(name)
        if node is not None:
            if cluster.fleet.nodes.get(name) != node or name in cluster.fleet.lost:
                found.append(ev.NodeSeen(now_ms, node))
        elif name in cluster.fleet.nodes and name not in cluster.fleet.lost:
            absent = now_ms - sight.node_absent_at_ms.get(name, now_ms)
            if senses.absence_is_final or absent >= senses.lost_after_ms:
                found.append(ev.NodeLost(now_ms, name, "no longer reported by the backend"))
    return found


@dataclass(slots=True)
class _Court:
    """One job under judgement: events are folded as they are found, so that each rule sees the last one's result."""

    cluster: Cluster
    sight: Sight
    job: Job
    now_ms: int
    senses: Senses

    def rules(self) -> Iterator[ev.JobEvent]:
        """What each rule finds, in turn; whoever asks applies it to `job` before the next."""
        job = self.job
        if not job.phase.active:
            if job.cancel_by or job.waiting_for or job.spec.queue_deadline:
                yield from self._queued()
            return
        if job.cancel_by or job.stop_wish or job.wanted or self.cluster.fleet.cordoned:
            yield from self._wishes()
        seen = self._seen()
        if self.sight.beat_at_ms:
            yield from self._checkpoints(seen)
        if started := self._started(seen):
            yield started
        yield from self._ends(seen)
        if self.cluster.fleet.lost or len(seen) < len(self.job.replicas):
            yield from self._absent(seen)
        if self.job.phase.runs:
            yield from self._deadlines()
        job = self.job
        told = self.sight.step_at_ms or job.suspected_since_ms  # else nobody tells of steps
        if told and job.phase is Phase.RUNNING and not self.senses.blind:
            yield from self._hang()
        if released := self._released():
            yield released
        job = self.job
        if job.outcome is not None and all(map(self._gone, job.replicas.values())):
            yield ev.AttemptEnded(self.now_ms, job.id, job.attempt, job.outcome.phase)

    # ---- waiting ----

    def _queued(self) -> Iterator[ev.JobEvent]:
        job, now = self.job, self.now_ms
        if job.cancel_by:
            cause = Cause(Reason.CANCELLED, message=f"cancelled by {job.cancel_by}")
            yield ev.JobEnded(now, job.id, Phase.CANCELLED, cause)
            return
        for dependency in job.waiting_for:
            succeeded = self.cluster.ended.get(dependency)
            if succeeded:
                yield ev.DependencyMet(now, job.id, dependency)
            elif succeeded is False:
                cause = Cause(Reason.DEPENDENCY_FAILED, message=f"job {dependency} did not succeed")
                yield ev.JobEnded(now, job.id, Phase.FAILED, cause)
                return
        deadline = job.spec.queue_deadline
        if deadline and not job.attempt and now - job.submitted_at_ms >= deadline:
            cause = Cause(Reason.QUEUE_DEADLINE, message=f"not started within {deadline / 1000:g} s")
            yield ev.JobEnded(now, job.id, Phase.FAILED, cause)

    # ---- wishes ----

    def _wishes(self) -> Iterator[ev.JobEvent]:
        job, now = self.job, self.now_ms
        if job.cancel_by:
            if not (job.outcome and (job.outcome.phase is Phase.CANCELLED or job.outcome.phase.terminal)):
                cause = Cause(Reason.CANCELLED, message=f"cancelled by {job.cancel_by}")
                yield self._stopping(Phase.CANCELLED, cause)
            return
        if not job.phase.runs:
            return
        if job.stop_wish is not Reason.NONE:
            yield self._stopping(Phase.QUEUED, Cause(job.stop_wish))
            return
        if self.cluster.fleet.cordoned and (drained := self._drained()):
            cause = Cause(Reason.MOVED, FailureClass.PREEMPTED, f"node {min(drained)} is being drained")
            yield self._stopping(Phase.QUEUED, cause)
            return
        surplus = [rid for role in job.wanted for rid in self._surplus(role)]
        if surplus:
            yield ev.ReplicasReleased(now, job.id, job.attempt, tuple(surplus))

    def _drained(self) -> set[NodeName]:
        """Nodes of the job that are to be emptied."""
        draining = {name for name, cordon in self.cluster.fleet.cordoned.items() if cordon.drain}
        return draining & {r.binding.node for r in self.job.replicas.values() if r.binding}

    def _surplus(self, role: str) -> list[ReplicaId]:
        """Replicas above the wanted count, highest index first out; only of roles that shrink in place."""
        job = self.job
        if not resizes_in_place(job.spec, role):
            return []
        held = sorted(r.index for r in job.replicas.values() if r.role == role and r.state.desired)
        return [replica_id(role, index) for index in held[job.wanted_count(role) :]]

    # ---- facts ----

    def _key(self, replica: Replica) -> LaunchKey:
        return launch_key(self.job.id, self.job.attempt, replica.role, replica.index, replica.restart)

    def _report(self, replica: Replica) -> ReplicaReport | None:
        return self.sight.replicas.get(self._key(replica))

    def _seen(self) -> Seeing:
        found: Seeing = {}
        job, sighted = self.job, self.sight.replicas
        for rid, r in job.replicas.items():
            report = sighted.get(launch_key(job.id, job.attempt, r.role, r.index, r.restart))
            if report is not None:
                found[rid] = report
        return found

    def _checkpoints(self, seen: Seeing) -> Iterator[ev.JobEvent]:
        job = self.job
        best: tuple[int, str] | None = None
        for report in seen.values():
            progress = report.progress
            if progress and progress.saved_step >= 0 and (best is None or progress.saved_step > best[0]):
                best = (progress.saved_step, progress.saved_path)
        if best is None:
            return
        saved = (job.checkpoint.attempt, job.checkpoint.step) if job.checkpoint else (0, -1)
        if (job.attempt, best[0]) > saved:
            yield ev.CheckpointSaved(self.now_ms, job.id, job.attempt, *best)
            if job.failures or job.infra_failures:
                yield ev.FailuresForgiven(self.now_ms, job.id)

    def _started(self, seen: Seeing) -> ev.JobEvent | None:
        job = self.job
        bound = [rid for rid, r in job.replicas.items() if r.state is ReplicaState.BOUND]
        fresh = tuple([rid for rid in bound if rid in seen and self._ran(seen[rid])]) if bound else ()
        if job.phase is Phase.STARTING and len(fresh) == len(bound):
            return ev.AttemptStarted(self.now_ms, job.id, job.attempt, fresh)
        return ev.ReplicasStarted(self.now_ms, job.id, job.attempt, fresh) if fresh else None

    @staticmethod
    def _ran(report: ReplicaReport) -> bool:
        return report.state is Seen.RUNNING or (report.state is Seen.EXITED and report.failure is Reason.NONE)

    def _ends(self, seen: Seeing) -> Iterator[ev.JobEvent]:
        """Exits, the earliest first; the first failure decides."""
        replicas = self.job.replicas
        ended = [
            (report, replicas[rid])
            for rid, report in seen.items()
            if report.state is Seen.EXITED and replicas[rid].state.desired
        ]
        if len(ended) > 1:
            ended.sort(key=lambda pair: (-pair[0].ended_age_ms, pair[1].role, pair[1].index))
        for report, replica in ended:
            if report.exit_code is None and report.signal is None and report.failure is Reason.NONE:
                cause = self._cause(replica, Reason.REPLICA_LOST, FailureClass.INFRA, report)
                yield from self._lose((replica,), cause)
            else:
                yield from self._exit(replica, report)

    def _exit(self, replica: Replica, report: ReplicaReport) -> Iterator[ev.JobEvent]:
        job = self.job
        ok = report.exit_code == 0 and report.failure is Reason.NONE
        yield ev.ReplicaExited(
            self.now_ms, job.id, job.attempt, replica.role, replica.index, report.exit_code, report.signal,
            report.failure, () if ok else report.tail, report.message,
        )  # fmt: skip
        if not self.job.phase.runs:
            return
        if ok and replica.role != "ps":
            if self._succeeded():
                yield self._stopping(Phase.SUCCEEDED, None)
        else:
            yield from self._failed((replica,), self._exit_cause(replica, report))

    def _exit_cause(self, replica: Replica, report: ReplicaReport) -> Cause:
        if report.failure is Reason.OOM:
            return self._cause(replica, Reason.OOM, FailureClass.OOM, report)
        if report.failure is Reason.START_FAILED:
            return self._cause(replica, Reason.START_FAILED, FailureClass.USER, report)
        if report.failure is not Reason.NONE:
            return self._cause(replica, report.failure, FailureClass.INFRA, report)
        reason = Reason.SIGNAL if report.signal else Reason.EXIT_CODE
        return self._cause(replica, reason, FailureClass.USER, report)

    def _absent(self, seen: Seeing) -> Iterator[ev.JobEvent]:
        """Replicas that ran and are no longer there, or came and went unseen, or whose node is lost."""
        placed = [(rid, r) for rid, r in self.job.replicas.items() if r.state.desired and r.binding is not None]
        if not placed or (not self.cluster.fleet.lost and all(rid in seen for rid, _ in placed)):
            return
        on_lost_node: list[Replica] = []
        vanished: list[Replica] = []
        for rid, replica in placed:
            if replica.binding is not None and replica.binding.node in self.cluster.fleet.lost:
                on_lost_node.append(replica)
            elif rid not in seen and self._came(replica) and self._really_absent(replica):
                vanished.append(replica)
        for replicas, reason in ((on_lost_node, Reason.NODE_LOST), (vanished, Reason.REPLICA_LOST)):
            if replicas:
                first = replicas[0]
                cause = self._cause(first, reason, FailureClass.INFRA, self._report(first))
                yield from self._lose(tuple(replicas), cause)

    def _came(self, replica: Replica) -> bool:
        """Whether it was there once: it ran, or the engine says that it is gone."""
        return replica.state is ReplicaState.RUNNING or (
            replica.state is ReplicaState.BOUND and self._key(replica) in self.sight.absent_at_ms
        )

    def _really_absent(self, replica: Replica) -> bool:
        key = self._key(replica)
        if key in self.sight.replicas:
            return False
        if self.sight.observed_at_ms == 0:
            return False
        if self.senses.absence_is_final:
            ordered = self.sight.ordered_at_ms.get(key)
            return ordered is None or self.sight.observed_at_ms >= ordered + SETTLE_MS
        since = max(self.sight.absent_at_ms.get(key, 0), self.sight.ordered_at_ms.get(key, 0))
        return since > 0 and self.now_ms - since >= self.senses.lost_after_ms

    def _lose(self, replicas: Sequence[Replica], cause: Cause) -> Iterator[ev.JobEvent]:
        job = self.job
        yield ev.ReplicasLost(self.now_ms, job.id, job.attempt, tuple(r.id for r in replicas), cause.reason)
        if self.job.phase.runs:
            yield from self._failed(replicas, cause)

    # ---- decisions ----

    def _succeeded(self) -> bool:
        job = self.job
        rule = job.spec.success
        trains = training_roles(job.spec)
        if rule == "auto":
            rule = "chief" if "chief" in trains else "all_workers"
        match rule:
            case "chief":
                decisive = [r for r in job.replicas.values() if r.role == "chief"]
            case "worker0":
                decisive = [r for r in job.replicas.values() if r.role == "worker" and r.index == 0]
            case _:
                names = ("worker", "chief") if "worker" in trains else trains
                out = (ReplicaState.GONE, ReplicaState.UNBOUND, ReplicaState.STOPPING)
                decisive = [r for r in job.replicas.values() if r.role in names and r.state not in out]
        return bool(decisive) and all(r.state is ReplicaState.EXITED and r.exit_code == 0 for r in decisive)

    def _failed(self, replicas: Sequence[Replica], cause: Cause) -> Iterator[ev.JobEvent]:
        """What follows a failure: restart in place, of the role or of the gang, going on with fewer, or the end."""
        job, now = self.job, self.now_ms
        first = replicas[0]
        policy = restart_policy(job.spec, first.role)
        counted = cause.failure_class in COUNTED
        if counted and not self._retryable(cause):
            yield self._stopping(Phase.FAILED, cause)
            return
        if (job.failures or job.infra_failures) and now - job.failed_at_ms >= FORGIVE_AFTER_MS:
            yield ev.FailuresForgiven(now, job.id)
            job = self.job
        if counted and job.failures >= policy.max:
            if policy.max:
                text = f"{job.failures + 1} failures in a row, {policy.max} allowed; last: {cause.message}"
                cause = replace(cause, reason=Reason.CRASH_LOOP, message=text)
            yield self._stopping(Phase.FAILED, cause)
            return
        row = job.failures if counted else job.infra_failures
        if policy.scope is RestartScope.REPLICA:
            row = min(row, max(r.restart for r in replicas))
        longest = policy.backoff_max if counted else min(policy.backoff_max, INFRA_BACKOFF_MAX_MS)
        wait = 0 if row == 0 else min(policy.backoff * 2 ** min(row - 1, 30), longest)
        not_before = now + wait if wait else 0
        scopes = {name: restart_policy(job.spec, name).scope for name in dict.fromkeys(r.role for r in replicas)}
        homeless = any(r.binding is None or not self.cluster.fleet.is_up(r.binding.node) for r in replicas)
        if not homeless and RestartScope.JOB not in scopes.values():
            whole = [name for name, scope in scopes.items() if scope is RestartScope.ROLE]
            others = [r for r in job.replicas.values() if r.role in whole and r.binding is not None]
            ids = tuple(r.id for r in (*others, *(r for r in replicas if r.role not in whole)))
            yield ev.ReplicasRestarted(now, job.id, job.attempt, ids, cause, not_before)
        elif all(scope is RestartScope.REPLICA and self._may_move(name) for name, scope in scopes.items()):
            yield ev.ReplicasUnbound(now, job.id, job.attempt, tuple(r.id for r in replicas), cause)
        else:
            yield self._stopping(Phase.QUEUED, cause, not_before)

    def _retryable(self, cause: Cause) -> bool:
        """TFJob's ExitCode policy: 1-127 permanent, 128 and above (signals) retryable, unless the spec differs."""
        if cause.failure_class is FailureClass.HANG:
            return True
        if cause.reason is Reason.START_FAILED:
            return False
        policy = restart_policy(self.job.spec, cause.role)
        code = 128 + cause.signal if cause.signal else cause.exit_code
        if code is None:
            return True
        if code in policy.fail_on:
            return False
        if code in policy.retry_on or code == 0:
            return True
        return code >= 128

    def _may_move(self, role: str) -> bool:
        """Whether replicas of the role that have failed may come back elsewhere while the rest goes on: an elastic role
        that keeps its minimum, or workers of parameter servers (nobody connects to them), not the last of them. A ps
        keeps its address, so it may not."""
        job = self.job
        if role in SERVING_ROLES:
            return False
        staying = sum(r.role == role and r.state.desired for r in job.replicas.values())
        if "ps" in job.spec.roles:
            return staying >= 1
        return job.spec.roles[role].replicas.elastic and staying >= job.spec.roles[role].replicas.min

    # ---- time ----

    def _deadlines(self) -> Iterator[ev.JobEvent]:
        job, now = self.job, self.now_ms
        limit = job.spec.time_limit
        ran = job.ran_ms + (now - job.running_since_ms if job.running_since_ms else 0)
        if limit and ran >= limit:
            cause = Cause(Reason.TIME_LIMIT, FailureClass.NONE, f"ran for {ran / 1000:.0f} s, limit {limit / 1000:g} s")
            yield self._stopping(Phase.FAILED, cause)
            return
        timeout = job.spec.start_timeout
        if job.phase is Phase.STARTING and timeout and now - job.attempt_started_at_ms >= timeout:
            late = [r.id for r in job.replicas.values() if r.state is ReplicaState.BOUND]
            why = next((m.message for r in job.replicas.values() if (m := self._report(r)) and m.message), "")
            text = f"{', '.join(late)} not running within {timeout / 1000:g} s" + (f": {why}" if why else "")
            cause = Cause(Reason.START_TIMEOUT, FailureClass.INFRA, text)
            wait = min(1_000 * 2 ** min(job.infra_failures, 30), INFRA_BACKOFF_MAX_MS)
            yield self._stopping(Phase.QUEUED, cause, now + wait)

    def _hang(self) -> Iterator[ev.JobEvent]:
        job, now = self.job, self.now_ms
        stuck = [r for r in job.replicas.values() if self._stuck(r)]
        if job.suspected_since_ms:
            suspects = [job.replicas[rid] for rid in job.suspects if rid in job.replicas]
            if not any(self._stuck(r) for r in suspects):
                yield ev.HangCleared(now, job.id, job.attempt)
            elif now - job.suspected_since_ms >= (SUSPICION_MS if self._stacks_complete() else STACKS_WAIT_MS):
                yield from self._hung(suspects)
        elif stuck:
            text = f"no step from {', '.join(r.id for r in stuck)} for {self._silence(stuck[0]) / 1000:.1f} s"
            yield ev.HangSuspected(now, job.id, job.attempt, tuple(r.id for r in stuck), text)

    def _silence(self, replica: Replica) -> int:
        return self.now_ms - self.sight.step_at_ms.get(self._key(replica), self.now_ms)

    def _stuck(self, replica: Replica) -> bool:
        """Sign one. Without a hang timeout only a lost heartbeat counts, and only together with an idle process."""
        if replica.state is not ReplicaState.RUNNING or replica.role in SERVING_ROLES:
            return False
        key, spec = self._key(replica), self.job.spec
        stepped = self.sight.step_at_ms.get(key)
        if stepped is None:
            return False
        if spec.hang_timeout and self.now_ms - stepped >= spec.hang_timeout:
            return True
        beat = self.sight.beat_at_ms.get(key)
        if beat is None or not spec.heartbeat_timeout or self.now_ms - beat < spec.heartbeat_timeout:
            return False
        report = self.sight.replicas.get(key)
        idle = report.idle_age_ms if report is not None else -1
        if idle >= 0:
            return idle >= min(spec.heartbeat_timeout, 2_000) and self.now_ms - stepped >= spec.heartbeat_timeout
        return self.now_ms - beat >= UNKNOWN_IDLE_FACTOR * spec.heartbeat_timeout

    def _stacks_complete(self) -> bool:
        running = [r for r in self.job.replicas.values() if r.state is ReplicaState.RUNNING]
        return all((report := self._report(r)) is not None and report.stacks for r in running)

    def _hung(self, suspects: Sequence[Replica]) -> Iterator[ev.JobEvent]:
        """Sign two: still no step after the stacks were taken. Names the odd rank, then the restart policy applies."""
        steps: dict[ReplicaId, int] = {}
        stacks: dict[ReplicaId, str] = {}
        for replica in self.job.replicas.values():
            report = self._report(replica)
            if replica.role in SERVING_ROLES or report is None:
                continue
            steps[replica.id] = report.progress.step if report.progress else -1
            if report.stacks:
                stacks[replica.id] = report.stacks
        odd = self.job.replicas[odd_one_out(steps, stacks, [r.id for r in suspects])]
        lost = self.job.spec.hang_timeout == 0 or self._silence(odd) < self.job.spec.hang_timeout
        reason = Reason.HEARTBEAT_LOST if lost else Reason.HANG
        text = f"{odd.id} is stuck: no step for {self._silence(odd) / 1000:.1f} s"
        cause = replace(
            self._cause(odd, reason, FailureClass.HANG, self._report(odd)),
            message=text,
            stacks=tuple(sorted(stacks.items())),
        )
        yield from self._failed((odd,), cause)

    # ---- leaving ----

    def _released(self) -> ev.JobEvent | None:
        job = self.job
        left = [rid for rid, r in job.replicas.items() if r.state is ReplicaState.STOPPING and self._gone(r)]
        return ev.ReplicasGone(self.now_ms, job.id, job.attempt, tuple(left)) if left else None

    def _gone(self, replica: Replica) -> bool:
        """Whether nothing of the replica can be running any more, older restarts included."""
        if replica.binding is not None and replica.binding.node in self.cluster.fleet.lost:
            return True
        alive = [key for key in self.sight.by_job.get(self.job.id, ()) if self.sight.alive(key)]
        if alive and any(f"/{self.job.attempt}/{replica.role}/{replica.index}/" in key for key in alive):
            return False
        if replica.state in (ReplicaState.EXITED, ReplicaState.LOST, ReplicaState.UNBOUND, ReplicaState.GONE):
            return True
        report = self._report(replica)
        if report is not None:
            return report.state is Seen.EXITED
        if replica.state is ReplicaState.BOUND and self._key(replica) not in self.sight.ordered_at_ms:
            return True
        return self._really_absent(replica)

    # ---- words ----

    def _stopping(self, phase: Phase, cause: Cause | None, not_before_ms: int = 0) -> ev.AttemptStopping:
        reason = cause.reason if cause is not None else Reason.COMPLETED
        outcome = Outcome(phase, reason, cause, not_before_ms)
        return ev.AttemptStopping(self.now_ms, self.job.id, self.job.attempt, outcome)

    def _cause(
        self, replica: Replica, reason: Reason, failure_class: FailureClass, report: ReplicaReport | None
    ) -> Cause:
        node = str(replica.binding.node) if replica.binding else ""
        code = report.exit_code if report else None
        signal = report.signal if report else None
        return Cause(
            reason=reason,
            failure_class=failure_class,
            message=(report.message if report else "") or _sentence(replica.id, reason, code, signal, node),
            role=replica.role,
            index=replica.index,
            rank=ranks(self.job).get(replica.id, -1),
            node=node,
            exit_code=code,
            signal=signal,
            tail=report.tail if report else (),
        )


def _sentence(rid: ReplicaId, reason: Reason, code: int | None, signal: int | None, node: str) -> str:
    match reason:
        case Reason.SIGNAL:
            return f"{rid} was killed by signal {signal}"
        case Reason.EXIT_CODE:
            return f"{rid} exited with code {code}"
        case Reason.OOM:
            return f"{rid} ran out of memory"
        case Reason.NODE_LOST:
            return f"{rid} was on node {node}, which is lost"
        case Reason.REPLICA_LOST:
            return f"{rid} vanished; nobody saw how it ended"
        case _:
            return f"{rid}: {reason.value}"


def ranks(job: Job) -> dict[ReplicaId, int]:
    """Rank of every training replica that has a place: chief first, then roles in written order, then index."""
    order = {name: place for place, name in enumerate(training_roles(job.spec))}
    placed = [(rid, r) for rid, r in job.replicas.items() if r.role in order and r.binding is not None]
    if len(placed) > 1:
        placed.sort(key=lambda pair: (order[pair[1].role], pair[1].index))
    return {rid: rank for rank, (rid, _) in enumerate(placed)}
