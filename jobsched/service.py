"""Use cases: everything a user can ask of jobsched, with typed errors; the one door behind REST, CLI and SDK.

Called by `api` and by the embedded client. A wish becomes one event, appended without a fence, and the controller is
woken; questions are answered from the store's projections and the controller's live view. Never decides where or when a
job runs and never touches a replica.
"""

from __future__ import annotations

import difflib
import re
import secrets
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

from ulid import ULIDGenerator

from jobsched.checkup import Checkup
from jobsched.core import events as ev
from jobsched.core import explain
from jobsched.core.alternatives import later, sooner
from jobsched.core.answers import (
    Check,
    CheckpointAnswer,
    EditAnswer,
    JobAnswer,
    JobPage,
    JobProgress,
    LogLine,
    NodeAnswer,
    NodeState,
    PlanAnswer,
    QueueAnswer,
    UsageAnswer,
    Verdict,
    WhyAnswer,
)
from jobsched.core.cluster import Cluster, cordon_of
from jobsched.core.edit import FIXED, Edit, compare
from jobsched.core.events import Stored
from jobsched.core.forecast import expected, picture_for, sooner_with, time_left
from jobsched.core.job import Job, Phase, Reason, Replica, ReplicaState
from jobsched.core.launch import LaunchKey, launch_key, parse_key
from jobsched.core.lifecycle import evolve_job
from jobsched.core.node import Cordon
from jobsched.core.observation import Incident
from jobsched.core.plan import Forecast
from jobsched.core.policies.quota import HOUR_MS
from jobsched.core.rehearsal import PROBE, Picture, picture_of, plan
from jobsched.core.resources import JobId, NodeName, Resources
from jobsched.core.shares import queue_answers
from jobsched.core.story import story
from jobsched.core.suspicion import BY
from jobsched.errors import Conflict, JobschedError, NotFound, Problem, SpecError, Unplaceable, Unreachable, UsageError
from jobsched.live import LiveView
from jobsched.load import load_job_dict
from jobsched.logs import LogReader, Selection
from jobsched.ports import OWN_METRICS, Backend, Chronicle, Clock, JobQuery, Reach, Sample, Session, Store, Window
from jobsched.spec.job import ArraySpec, JobSpec, training_roles
from jobsched.spec.queue import QueueSpec, distinct_queues

LIVE = tuple(p for p in Phase if not p.terminal)
MAX_ARRAY = 10_000
"""Members of one array submission; more would keep the store's one writer busy for seconds."""
MAX_PAGE = 1_000
MAX_VERDICTS = 16
MAX_IMAGINED = 2_000
"""Among more jobs than this, changes of a request are not played through."""
MAX_WARNINGS = 5
LATELY_MS = 15 * 60_000
"""How long a warning of the engine may explain what is so now."""
CHUNK = 500
"""Submissions per append, so that the leader gets its turn during a large array."""
WISH_TRIES = 20
"""How often a wish is tried anew when the job changes between look and append."""
ID = re.compile(r"[0-9a-hjkmnp-tv-z]{26}")
ID_PREFIX = re.compile(r"[0-9a-hjkmnp-tv-z]{4,25}")

IfExists = Literal["", "fail", "skip", "replace"]


@dataclass(frozen=True, slots=True)
class Where:
    """The replica that somebody wants to get at: of the job `ref`; without a role that of rank 0, without an index the
    first."""

    ref: str
    role: str = ""
    index: int | None = None
    owner: str = ""


class Service:
    """One per server. Thread-safe."""

    def __init__(
        self, store: Store, live: LiveView, backend: Backend, clock: Clock,
        checks: Callable[[], Iterable[Check]] = tuple, priority_classes: Mapping[str, int] | None = None,
    ) -> None:  # fmt: skip
        """`checks`: as `Checkup`; `priority_classes`: names that may stand for a priority."""
        self.live = live
        self._store = store
        self._backend = backend
        self._clock = clock
        self.checkup = Checkup(store, live, backend, clock, checks)
        self._priority_classes = dict(priority_classes or {})
        self._logs = LogReader(store, backend, live.subscribe)
        self._new_id = ULIDGenerator(clock=clock.now_ms)
        self._naming = threading.Lock()

    # ---- submitting ----

    def submit(
        self, spec: JobSpec, *, owner: str = "", request_id: str = "", hold: bool = False, if_exists: IfExists = ""
    ) -> JobPage:
        """Queue a job, or every member of its array. Doing it again with the same owner and request id changes nothing
        and gives the same jobs.

        Raises `SpecError` (incomplete spec), `NotFound` (queue, dependency), `Unplaceable` (no node can ever hold it;
        not with `hold`), `Conflict` (a dependency did not succeed; the name is taken and `if_exists` is "fail")."""
        _refuse_incomplete(spec)
        spec = self._prioritised(spec)
        with self.live.view() as (cluster, _):
            queues = tuple(cluster.queues)
            closed = _closed(cluster, spec.queue)
            never = explain.could_ever_fit(cluster, spec) if cluster.nodes and not hold else ""
        _refuse_early(queues)
        if spec.queue not in queues:
            raise NotFound(f"there is no queue {spec.queue!r}", hint=_suggest(spec.queue, queues, "queues"))
        if closed:
            raise closed
        if never:
            raise Unplaceable(never, hint="change the request, or submit it with --hold until such nodes exist")
        waiting_for = self._dependencies(spec, owner)
        wishes = self._submissions(spec, owner, request_id, hold, waiting_for)
        if not if_exists:
            return self._append(wishes)
        with self._naming:  # between the look and the append nobody else may take the name
            taken = self._holders(wishes[0].name, owner)
            again = (request_id, wishes[0].request_id)
            if not taken or any(self._request_of(job) in again for job in taken[:20]):
                return self._append(wishes)
            if if_exists == "skip":
                return JobPage(tuple(self._answer(job) for job in taken))
            if if_exists == "fail":
                raise Conflict(
                    f"job {taken[0].name!r} ({taken[0].id}) is {taken[0].phase} under that name",
                    hint="choose another name, or --if-exists=skip or replace",
                )
            for job in taken:
                with suppress(Conflict):  # it has just ended by itself
                    self.cancel(job.id, by=owner)
            return self._append(wishes)

    def plan(self, spec: JobSpec, *, owner: str = "") -> PlanAnswer:
        """Where and when the job would run if it were submitted now, and who would give way; changes nothing."""
        _refuse_incomplete(spec)
        spec = self._prioritised(spec)
        with self.live.view() as (cluster, _):
            _refuse_early(cluster.queues)
            if spec.queue not in cluster.queues:
                raise NotFound(f"there is no queue {spec.queue!r}", hint=_suggest(spec.queue, cluster.queues, "queues"))
            policy, now_ms = self.live.policy, self._clock.now_ms()
            twin = picture_of(cluster)
            probe = evolve_job(None, ev.JobSubmitted(now_ms, PROBE, spec.name or str(PROBE), owner, spec))
            picture = picture_for(cluster, probe, now_ms, policy)
            others, left = later(cluster, probe), time_left(cluster, probe, now_ms)
        answer = plan(twin.cluster(), spec, owner, now_ms, policy)
        starts = Forecast(now_ms, now_ms) if answer.code != 8 else Forecast()
        if answer.code == 10 and answer.verdict is not None and not answer.victims:
            waits = self._expecting(answer.verdict, probe, picture, now_ms, others)
            answer, starts = replace(answer, verdict=waits), Forecast(waits.starts_after_ms, waits.starts_before_ms)
        return replace(answer, deadline=explain.punctual(probe, starts, left, now_ms))

    def _prioritised(self, spec: JobSpec) -> JobSpec:
        """With the number of its priority class."""
        if not spec.priority_class:
            return spec
        return spec.model_copy(update={"priority": self._priority(spec.priority_class)})

    def _priority(self, name: str) -> int:
        known = self._priority_classes.get(name)
        if known is None:
            listed = ", ".join(f"{each} ({value})" for each, value in self._priority_classes.items()) or "none"
            close = difflib.get_close_matches(name, self._priority_classes, n=1, cutoff=0.6)
            guess = f"did you mean {close[0]}? " if close else ""
            hint = f"{guess}classes of this server: {listed}; a number is fine, too"
            raise SpecError([Problem(f"there is no priority class {name!r}", field="priority", hint=hint)])
        return known

    def _submissions(
        self, spec: JobSpec, owner: str, request_id: str, hold: bool, waiting_for: tuple[JobId, ...]
    ) -> list[ev.JobSubmitted]:
        at_ms = self._clock.now_ms()
        name = spec.name or made_up_name()
        if spec.array is None:
            spec, job_id = spec.model_copy(update={"name": name}), self._next_id()
            return [ev.JobSubmitted(at_ms, job_id, name, owner, spec, request_id or job_id, waiting_for, held=hold)]
        indices = spec.array.indices
        if not indices or len(indices) > MAX_ARRAY or len(f"{name}-{indices[-1]}") > 52:
            raise SpecError([Problem(
                "an array needs a member" if not indices
                else f"an array of {len(indices)} members is too large; at most {MAX_ARRAY}" if len(indices) > MAX_ARRAY
                else f"{name!r} leaves no room for the member's number in a name of at most 52 characters",
                field="array",
            )])  # fmt: skip
        array_id = self._next_id()
        wishes = []
        for index in indices:
            only = ArraySpec(indices=(index,), max_parallel=spec.array.max_parallel)
            member = spec.model_copy(update={"name": f"{name}-{index}", "array": only})
            wishes.append(ev.JobSubmitted(
                at_ms, self._next_id(), f"{name}-{index}", owner, member, f"{request_id or array_id}/{index}",
                waiting_for, array_id, index, hold,
            ))  # fmt: skip
        return wishes

    def _append(self, wishes: Sequence[ev.JobSubmitted]) -> JobPage:
        jobs = []
        for at in range(0, len(wishes), CHUNK):
            stored = self._store.append(wishes[at : at + CHUNK]).stored
            self.live.wake()
            for wish, item in zip(wishes[at : at + CHUNK], stored, strict=True):
                assert isinstance(item.event, ev.JobSubmitted)
                known = self._store.job(item.event.job_id) if item.event.job_id != wish.job_id else None
                jobs.append(known or evolve_job(None, item.event))
        return JobPage(tuple(map(_receipt, jobs[:MAX_PAGE])), more=len(jobs) > MAX_PAGE)

    def _next_id(self) -> JobId:
        return JobId(str(self._new_id.generate()).lower())

    def _dependencies(self, spec: JobSpec, owner: str) -> tuple[JobId, ...]:
        """Ids of the jobs in `after` that have yet to succeed. The id of an array stands for all its members."""
        waiting: dict[JobId, None] = {}
        for ref in spec.after:
            array = JobQuery(array_id=ref.lower(), limit=MAX_ARRAY)
            members = self._store.jobs(array) if ID.fullmatch(array.array_id) else ()
            for job in members or (self.resolve(ref, owner=owner),):
                if job.phase in (Phase.FAILED, Phase.CANCELLED):
                    raise Conflict(
                        f"the job must come after {job.name!r} ({job.id}), which {job.phase.lower()}",
                        hint="submit that one again first, or leave it out of 'after'",
                    )
                if job.phase is not Phase.SUCCEEDED:
                    waiting[job.id] = None
        return tuple(waiting)

    def _holders(self, name: str, owner: str) -> Sequence[Job]:
        """Live jobs of the owner that hold a name; the whole array where it is a member's. Newest first."""
        taken = self._store.jobs(JobQuery(name=name, owner=owner, phases=LIVE))
        arrays = dict.fromkeys(job.array_id for job in taken if job.array_id)
        return [job for job in taken if not job.array_id] + [
            job for array in arrays for job in self._store.jobs(JobQuery(array_id=array, phases=LIVE, limit=MAX_ARRAY))
        ]

    def _request_of(self, job: Job) -> str:
        """The request id that a job was submitted with."""
        first = self._store.history(job.id, limit=1)[0].event
        assert isinstance(first, ev.JobSubmitted)
        return first.request_id.removesuffix(f"/{job.array_index}")

    # ---- finding ----

    def resolve(self, ref: str, *, owner: str = "") -> Job:
        """The job that a reference means: full id, name (the newest so called), unique id prefix, or "@last" (the
        newest, of `owner` if given). Raises `NotFound` with a suggestion, `Conflict` when a prefix means several."""
        if ref == "@last":
            newest = self._store.jobs(JobQuery(owner=owner, limit=1))
            if not newest:
                raise NotFound("there is no job yet", hint="submit one with 'jobsched submit FILE'")
            return newest[0]
        lower = ref.lower()
        if ID.fullmatch(lower) and (job := self._store.job(JobId(lower))):
            return job
        if named := self._store.jobs(JobQuery(name=ref, limit=1)) if ref else ():
            return named[0]
        found = self._store.jobs(JobQuery(id_prefix=lower, limit=6)) if ID_PREFIX.fullmatch(lower) else ()
        if len(found) == 1:
            return found[0]
        if found:
            listed = ", ".join(f"{job.id} ({job.name})" for job in found[:5]) + (", …" if len(found) > 5 else "")
            raise Conflict(f"{ref!r} is the beginning of several job ids", hint=f"one of {listed}")
        names = [job.name for job in self._store.jobs(JobQuery(limit=500))]
        raise NotFound(f"there is no job {ref!r}", hint=_suggest(ref, names, ""))

    def get(self, ref: str, *, owner: str = "") -> JobAnswer:
        return self._answer(self.resolve(ref, owner=owner))

    def jobs(self, query: JobQuery) -> JobPage:
        """Newest first. At most `MAX_PAGE` of them; `more` tells whether the next page has any."""
        limit = max(1, min(query.limit, MAX_PAGE))
        jobs = self._store.jobs(replace(query, limit=limit + 1))
        return JobPage(self._answers(jobs[:limit]), more=len(jobs) > limit)

    def lively(self, also: Iterable[JobId] = ()) -> tuple[JobAnswer, ...]:
        """Every job that holds resources, and those named, for live views; at most `MAX_PAGE`."""
        with self.live.view() as (cluster, _):
            holders = (job_id for node in cluster.on_node.values() for job_id, _ in node)
            ids = list(dict.fromkeys((*also, *holders)))[:MAX_PAGE]
            known = {job_id: cluster.jobs.get(job_id) for job_id in ids}
        return self._answers([job for job_id in ids if (job := known[job_id] or self._store.job(job_id))])

    def why(self, ref: str, *, owner: str = "", at_ms: int = 0) -> WhyAnswer:
        """The present in a sentence, the verdict, and the story so far. `at_ms`: as it was at that instant, computed
        again from the log: O(events until then). Raises `NotFound` when the job was not there yet."""
        if at_ms:
            return self._why_then(self.resolve(ref, owner=owner), at_ms)
        answer = self.get(ref, owner=owner)
        verdict, now_ms = answer.verdict, self._clock.now_ms()
        starts, left = Forecast(now_ms, now_ms) if answer.job.phase.runs else Forecast(), None
        with self.live.view() as (cluster, _):
            known = cluster.jobs.get(answer.job.id)
            if known is not None:
                left = time_left(cluster, known, now_ms)
            if verdict is not None and answer.job.phase is Phase.QUEUED:
                if known is None or known.phase is not Phase.QUEUED:
                    return WhyAnswer(answer.job, answer.headline, None, story(self.events(answer.job.id)))
                ways = sooner(cluster, known, now_ms) if cluster.waits(known.id) else ()
                others = later(cluster, known)
                picture = picture_for(cluster, known, now_ms, self.live.policy)
        if verdict is not None and known is not None and known.phase is Phase.QUEUED:
            verdict = self._expecting(replace(verdict, sooner=ways), known, picture, now_ms, others)
            starts = Forecast(verdict.starts_after_ms, verdict.starts_before_ms)
        told, due = story(self.events(answer.job.id)), explain.punctual(answer.job, starts, left, now_ms)
        return WhyAnswer(answer.job, answer.headline, verdict, told, self._warnings(answer.job), due)

    def incidents(self, ref: str, *, owner: str = "") -> Sequence[Incident]:
        """What the engine says of a job's replicas, and of their nodes since it was submitted: oldest first, only what
        it still remembers. Empty where engines say nothing."""
        job = self.resolve(ref, owner=owner)
        if not isinstance(self._backend, Chronicle):
            return ()
        nodes = [replica.binding.node for replica in job.replicas.values() if replica.binding is not None]
        nodes += [NodeName(job.cause.node)] if job.cause is not None and job.cause.node else []
        found = self._backend.incidents(job.id, list(dict.fromkeys(nodes)))
        return [one for one in found if one.key or one.at_ms >= job.submitted_at_ms]

    def _warnings(self, job: Job) -> tuple[Incident, ...]:
        """Those that may explain where the job is now: of its last attempt, lately if it runs."""
        if job.phase in (Phase.SUCCEEDED, Phase.CANCELLED):
            return ()
        since_ms = self._clock.now_ms() - LATELY_MS
        return tuple(
            one for one in self.incidents(job.id)
            if one.warning and (not one.key or parse_key(one.key).attempt == job.attempt)
            and (one.at_ms >= since_ms or (one.key and job.phase is not Phase.RUNNING))
        )[-MAX_WARNINGS:]

    def _expecting(
        self, verdict: Verdict, job: Job, picture: Picture | None, now_ms: int, others: Sequence[tuple[str, Job]] = ()
    ) -> Verdict:
        """The verdict with the expected start, and what else would help and when. Nobody waits for it but who asks."""
        if any(why.reason in (Reason.UNPLACEABLE, Reason.QUEUE_PAUSED) for why in verdict.reasons):
            return verdict
        policy = self.live.policy
        when = expected(picture, job, now_ms, policy)
        ways = verdict.sooner
        if picture is not None and len(picture.jobs) <= MAX_IMAGINED and not job.held:
            # Whatever helps at once in one way need not be told of for later in the same way.
            at_once = {_kind_of_way(way) for way in ways}
            others = [(text, changed) for text, changed in others if _kind_of_way(text) not in at_once]
            ways += tuple(
                f"{text}: {explain.moment(at_ms, now_ms)}"
                for text, at_ms in sooner_with(picture, job, others, now_ms, policy, when)
            )
        return replace(
            verdict, starts_after_ms=when.after_ms, starts_before_ms=when.before_ms,
            starts=explain.starting(when, now_ms), sooner=ways,
        )  # fmt: skip

    def _why_then(self, job: Job, at_ms: int) -> WhyAnswer:
        policy = self.live.policy
        cluster, seq = Cluster(rank=policy.rank, alike=policy.alike), 0
        while page := self._store.read(seq, 5_000):
            for item in page:
                if item.event.at_ms > at_ms:
                    break
                cluster.evolve(item.event, item.seq)
            if cluster.seq != page[-1].seq:
                break
            seq = cluster.seq
        told = [item for item in self.events(job.id) if item.seq <= cluster.seq]
        if not told:
            raise NotFound(f"job {job.name!r} ({job.id}) was not there yet", hint="give a later time")
        then: Job | None = None
        for item in told:
            then = evolve_job(then, ev.of_job(item.event))
        assert then is not None
        cluster.unpark(at_ms)
        waits, order = then.phase is Phase.QUEUED, policy.order(cluster, at_ms)
        verdict = explain.verdict(cluster, then, at_ms, order) if waits else None
        return WhyAnswer(then, explain.headline(then, verdict), verdict, story(told))

    def events(self, ref: str, *, after: int = 0, limit: int = 10_000, owner: str = "") -> Sequence[Stored]:
        return self._store.history(self.resolve(ref, owner=owner).id, after, max(1, min(limit, 10_000)))

    def samples(self, ref: str, *, limit: int = 1_000, owner: str = "") -> Sequence[Sample]:
        found = self._store.samples(self.resolve(ref, owner=owner).id, max(1, min(limit, 10_000)))
        return [replace(sample, metrics=_shown(sample)) for sample in found]

    def logs(
        self, ref: str, selection: Selection, *, follow: bool = False, tail: int | None = None, owner: str = ""
    ) -> Iterator[tuple[LogLine, ...]]:
        """Batches of log lines; see `LogReader.read`. The reference is resolved at once, not at the first batch."""
        job = self.resolve(ref, owner=owner)
        if selection.role and selection.role not in job.spec.roles:
            hint = _suggest(selection.role, job.spec.roles, "roles")
            raise NotFound(f"job {job.name!r} has no role {selection.role!r}", hint=hint)
        _refuse_absent(job, selection)
        return self._logs.read(job.id, selection, follow=follow, tail=tail)

    # ---- reaching into replicas ----

    def execute(
        self, where: Where, command: Sequence[str], window: Window | None = None, *, stdin: bool = True
    ) -> Session:
        """Run a command beside a replica's own. Raises `NotFound` for a role or index that the job has not, `Conflict`
        when that replica does not run."""
        if not command or not command[0]:
            raise UsageError("there is no command to run", hint="for example: jobsched exec JOB -- nvidia-smi")
        reach, key = self._reached(where)
        return reach.execute(key, command, window, stdin=stdin)

    def forward(self, where: Where, port: int) -> Session:
        """A connection to a port of a replica; as `execute` otherwise."""
        if not 0 < port < 1 << 16:
            raise UsageError(f"{port} is no port")
        reach, key = self._reached(where)
        return reach.connect(key, port)

    def checkpoint(self, ref: str, *, owner: str = "") -> CheckpointAnswer:
        """Ask the replicas that run to save now, and go on. `Conflict` when the job does not run, or when none of its
        processes listens."""
        job, reach = self.resolve(ref, owner=owner), self._reach()
        sent = job.spec.checkpoint.signal
        if sent not in ("USR1", "USR2"):
            what = "has no checkpoint signal" if sent == "none" else f"saves at SIG{sent}, which also ends it"
            raise Conflict(f"job {job.name!r} {what}", hint="'jobsched suspend' lets it save and stop")
        running = {launch_key(job.id, job.attempt, r.role, r.index, r.restart): r.id
                   for r in job.replicas.values() if r.state is ReplicaState.RUNNING}
        if job.phase is not Phase.RUNNING or not running:
            raise Conflict(f"job {job.name!r} ({job.id}) does not run: {job.phase.lower()}")
        told = [running[key] for key in reach.ask_checkpoint(list(running)) if key in running]
        if not told:
            raise Conflict(f"no process of job {job.name!r} listens for the checkpoint signal (SIG{sent})",
                           hint="scripts do so by jobsched.train.context.should_checkpoint(), or by a handler")
        return CheckpointAnswer(job, tuple(told))

    def _reached(self, where: Where) -> tuple[Reach, LaunchKey]:
        job, reach = self.resolve(where.ref, owner=where.owner), self._reach()
        if where.role and where.role not in job.spec.roles:
            hint = _suggest(where.role, job.spec.roles, "roles")
            raise NotFound(f"job {job.name!r} has no role {where.role!r}", hint=hint)
        _refuse_absent(job, Selection(where.role, where.index))
        replica = _replica_meant(job, where)
        return reach, launch_key(job.id, job.attempt, replica.role, replica.index, replica.restart)

    def _reach(self) -> Reach:
        if not isinstance(self._backend, Reach):
            raise UsageError(f"replicas cannot be reached on the {self._backend.capabilities.name} backend")
        return self._backend

    def read(self, after: int, limit: int) -> Sequence[Stored]:
        """A piece of the whole log, for event streams."""
        return self._store.read(after, limit)

    def last_seq(self) -> int:
        return self._store.last_seq()

    # ---- wishing ----

    def cancel(self, ref: str, *, by: str = "", owner: str = "") -> JobAnswer:
        """End the job; asking twice is fine. `Conflict` once it has succeeded or failed."""

        def wish(job: Job, at_ms: int) -> ev.JobEvent | None:
            if job.cancel_by or job.phase is Phase.CANCELLED:
                return None
            _refuse_ended(job, "cancelled")
            return ev.JobCancelRequested(at_ms, job.id, by)

        return self._wish(ref, owner, wish)

    def hold(self, ref: str, *, stop: bool = False, by: str = "", owner: str = "") -> JobAnswer:
        """Keep the job from starting; with `stop`, a running attempt saves and stops, too."""

        def wish(job: Job, at_ms: int) -> ev.JobEvent | None:
            _refuse_ended(job, "held")
            return None if job.held and not (stop and job.phase.active) else ev.JobHeld(at_ms, job.id, by, stop)

        return self._wish(ref, owner, wish)

    def release(self, ref: str, *, by: str = "", owner: str = "") -> JobAnswer:
        """Undo `hold`; also ends a backoff at once."""

        def wish(job: Job, at_ms: int) -> ev.JobEvent | None:
            _refuse_ended(job, "released")
            return ev.JobReleased(at_ms, job.id, by) if job.held or job.not_before_ms else None

        return self._wish(ref, owner, wish)

    def restart(self, ref: str, *, by: str = "", owner: str = "") -> JobAnswer:
        """Stop the attempt and queue it again with its budget of restarts whole; a job in backoff goes on at once."""

        def wish(job: Job, at_ms: int) -> ev.JobEvent:
            _refuse_ended(job, "restarted")
            return ev.JobRestartRequested(at_ms, job.id, by)

        return self._wish(ref, owner, wish)

    def scale(self, ref: str, wanted: Mapping[str, int], *, by: str = "", owner: str = "") -> JobAnswer:
        """Set how many replicas elastic roles should have. `UsageError` outside their bounds."""
        if not wanted:
            raise UsageError("scale needs a role and a number", hint="for example: jobsched scale JOB worker=4")

        def wish(job: Job, at_ms: int) -> ev.JobEvent | None:
            _refuse_ended(job, "scaled")
            for name, count in wanted.items():
                role = job.spec.roles.get(name)
                if role is None:
                    hint = _suggest(name, job.spec.roles, "roles")
                    raise UsageError(f"job {job.name!r} has no role {name!r}", hint=hint)
                low, high = role.replicas.min, role.replicas.max
                if low == high:
                    raise UsageError(
                        f"role {name!r} has a fixed number of {low} replicas",
                        hint="only a role with replicas: {min: …, max: …} can be scaled",
                    )
                if not low <= count <= high:
                    raise UsageError(f"role {name!r} can have {low} to {high} replicas, not {count}")
            change = {name: count for name, count in wanted.items() if job.wanted_count(name) != count}
            return ev.JobScaled(at_ms, job.id, by, change) if change else None

        return self._wish(ref, owner, wish)

    def set_priority(self, ref: str, priority: int | str, *, by: str = "", owner: str = "") -> JobAnswer:
        """A number or a class."""
        priority = self._priority(priority) if isinstance(priority, str) else priority

        def wish(job: Job, at_ms: int) -> ev.JobEvent | None:
            _refuse_ended(job, "given another priority")
            return ev.JobPriorityChanged(at_ms, job.id, by, priority) if job.priority != priority else None

        return self._wish(ref, owner, wish)

    def edit(
        self, ref: str, spec: JobSpec | Mapping[str, object], *, by: str = "", owner: str = "",
        expected: int | None = None, dry_run: bool = False,
    ) -> EditAnswer:
        """Another spec for the job, or changes (`path -> value`) to the one it has: labels, priority, time limits and
        elastic counts change in place; anything else lets a running attempt save, and the next one starts with it. The
        same again changes nothing. `expected`: how often it was edited when the caller looked; `dry_run`: only say.

        Raises what `submit` raises, `UsageError` for what a job cannot change (its array, what it comes after), and
        `Conflict` when it has ended or was edited since."""
        changes = {} if isinstance(spec, JobSpec) else spec
        for path in changes:
            if (name := path.partition(".")[0]) in ("name", *FIXED):
                raise _unchangeable(name)
        whole = self._revision(spec) if isinstance(spec, JobSpec) else None
        told = Edit(())

        def wish(job: Job, at_ms: int) -> ev.JobEvent | None:
            nonlocal told
            before = job.next_spec or job.spec
            new, obstacle = whole or self._revision(_laid_over(before, changes))
            new = new.model_copy(update={"name": job.spec.name, "array": job.spec.array})
            told = compare(before, new)
            if "priority" in changes and "priority" not in told.fields and new.priority != job.priority:
                told = replace(told, fields=(*told.fields, "priority"))  # it was changed apart from the spec
            if not told.fields:
                return None
            _refuse_ended(job, "edited")
            if expected is not None and expected != job.edits:
                raise Conflict(f"job {job.name!r} was edited since: {job.edits} edits, not {expected}",
                               hint="look at it again, then edit what is there now")
            if fixed := [name for name in told.fields if name in FIXED]:
                raise _unchangeable(fixed[0])
            if obstacle is not None and (not isinstance(obstacle, Conflict) or "queue" in told.fields):
                raise obstacle
            event = ev.JobEdited(at_ms, job.id, by, new, told.fields, told.wanted, told.restart)
            return None if dry_run else event

        answer = self._wish(ref, owner, wish)
        return EditAnswer(answer.job, answer.headline, told.fields, told.restart)

    def _revision(self, spec: JobSpec) -> tuple[JobSpec, JobschedError | None]:
        """A spec as it would be recorded, and what speaks against it. Raises `SpecError` when it is incomplete."""
        _refuse_incomplete(spec)
        spec = self._prioritised(spec)
        with self.live.view() as (cluster, _):
            queues = tuple(cluster.queues)
            closed = _closed(cluster, spec.queue)
            never = explain.could_ever_fit(cluster, spec) if cluster.nodes else ""
        _refuse_early(queues)
        if spec.queue not in queues:
            hint = _suggest(spec.queue, queues, "queues")
            return spec, NotFound(f"there is no queue {spec.queue!r}", hint=hint)
        return spec, Unplaceable(never, hint="change the request") if never else closed

    def _wish(self, ref: str, owner: str, wish: Callable[[Job, int], ev.JobEvent | None]) -> JobAnswer:
        """Append what `wish` makes of the job as it is now (None: nothing to do), by compare-and-set, so that a wish is
        never recorded for a job that has moved on."""
        job = self.resolve(ref, owner=owner)
        for _ in range(WISH_TRIES):
            event = wish(job, self._clock.now_ms())
            if event is None:
                return _receipt(job)
            if not self._store.append([event], expected={job.id: job.version}).rejected:
                self.live.wake()
                return _receipt(evolve_job(job, event))
            job = self._known(job.id)
        raise Conflict(f"job {job.name!r} ({job.id}) changes faster than the wish can be recorded", hint="try again")

    def _known(self, job_id: JobId) -> Job:
        job = self._store.job(job_id)
        assert job is not None, "jobs are never removed from the store"
        return job

    # ---- answering ----

    def _answer(self, job: Job) -> JobAnswer:
        now_ms, verdict = self._clock.now_ms(), None
        if not job.phase.terminal:
            with self.live.view() as (cluster, _):
                known = cluster.jobs.get(job.id)
                if known and (known.phase is Phase.QUEUED or job.id in cluster.growing):
                    verdict = explain.verdict(cluster, known, now_ms, self.live.policy.order(cluster, now_ms))
        progress = self._last_progress(job) if job.phase.terminal else self._progress(job)
        return JobAnswer(job, progress, verdict, self._headline(job, verdict))

    def _answers(self, jobs: Sequence[Job]) -> tuple[JobAnswer, ...]:
        """For listings. Jobs of one line wait for the same thing, so one verdict a line does (without the place in
        line, which is each job's own), and at most `MAX_VERDICTS` of them; the rest show their reason."""
        now_ms = self._clock.now_ms()
        found: dict[object, Verdict] = {}
        verdicts: dict[JobId, Verdict] = {}
        with self.live.view() as (cluster, _):
            order = self.live.policy.order(cluster, now_ms)
            for job in jobs:
                if job.phase is Phase.QUEUED and (known := cluster.jobs.get(job.id)):
                    line = cluster.line_of(job.id)
                    key = line.key if line else job.id
                    if key not in found and len(found) < MAX_VERDICTS:
                        found[key] = replace(explain.verdict(cluster, known, now_ms, order), position=0)
                    if key in found:
                        verdicts[job.id] = replace(found[key], job_id=job.id)
        return tuple(
            JobAnswer(job, self._progress(job), verdict := verdicts.get(job.id), self._headline(job, verdict))
            for job in jobs
        )

    def _headline(self, job: Job, verdict: Verdict | None) -> str:
        """While the engine is away, that is what every job that has not ended is about."""
        away = "" if job.phase.terminal else self.live.health.backend_error
        return f"{away}; until it answers nothing starts, and what runs is left alone" if away else explain.headline(
            job, verdict)

    def _progress(self, job: Job) -> JobProgress | None:
        return None if job.phase is Phase.QUEUED else self.live.progress(job.id)

    def _last_progress(self, job: Job) -> JobProgress | None:
        """How far a job had come that has ended; None when it never told."""
        for last in self._store.samples(job.id, 1):
            return JobProgress(last.step, last.total, last.world_size, _shown(last))
        return None

    # ---- nodes and queues ----

    def nodes(self) -> tuple[NodeAnswer, ...]:
        """Every node that was ever seen, by name."""
        with self.live.view() as (cluster, _):
            return tuple(_node_answer(cluster, name) for name in sorted(cluster.nodes))

    def cordon(self, name: str, *, drain: bool = False, by: str = "") -> NodeAnswer:
        """Bind nothing new on the node; with `drain`, its attempts save and move away."""
        answer = self._node(name)
        known = answer.cordon
        if known is None or known.drain != drain or known.gpus or known.by == BY:
            event = ev.NodeCordoned(self._clock.now_ms(), answer.node.name, by, drain)
            self._store.append([event])
            self.live.wake()
            known = cordon_of(event)
        return replace(answer, cordon=known, state=_cordoned(known))

    def uncordon(self, name: str, *, by: str = "") -> NodeAnswer:
        answer = self._node(name)
        if answer.cordon is not None:
            self._store.append([ev.NodeUncordoned(self._clock.now_ms(), answer.node.name, by)])
            self.live.wake()
        return replace(answer, cordon=None, state="ready")

    def _node(self, name: str) -> NodeAnswer:
        with self.live.view() as (cluster, _):
            if name not in cluster.nodes:
                raise NotFound(f"there is no node {name!r}", hint=_suggest(name, tuple(cluster.nodes), "nodes"))
            return _node_answer(cluster, NodeName(name))

    def queues(self) -> tuple[QueueAnswer, ...]:
        with self.live.view() as (cluster, _):
            return queue_answers(cluster, self._clock.now_ms())

    def usage(self, since_ms: int = 0) -> tuple[UsageAnswer, ...]:
        """GPU time and waits by queue and user, of the jobs that live or ended at `since_ms` or later."""
        return tuple(
            UsageAnswer(
                u.queue, u.owner, u.jobs, u.succeeded, u.failed, u.cancelled,
                gpu_hours=round(u.gpu_milli_ms / 1_000 / HOUR_MS, 3),
                mean_wait_s=round(u.waited_ms / u.placed / 1_000, 3) if u.placed else 0.0,
                longest_wait_s=u.longest_wait_ms / 1_000,
            )
            for u in self._store.usage(since_ms, self._clock.now_ms())
        )  # fmt: skip

    def define_queue(self, queue: QueueSpec) -> QueueAnswer:
        """A queue, new or changed. `SpecError` when it does not go with the others (a cohort inside itself)."""
        with self.live.view() as (cluster, _):
            others = tuple(q for q in cluster.queues.values() if q.name != queue.name)
            known = cluster.queues.get(queue.name)
        try:
            distinct_queues((*others, queue))
        except ValueError as exc:
            raise SpecError([Problem(str(exc), field="cohort")]) from exc
        if queue != known:
            self._store.append([ev.QueueDefined(self._clock.now_ms(), queue)])
            self.live.wake()
        return QueueAnswer(queue)

    def count_by_phase(self) -> Mapping[str, int]:
        return self._store.count("phase")


def made_up_name() -> str:
    """`adjective-noun-4hex`."""
    import coolname  # reads word lists of half a megabyte: only when a name is needed

    return f"{coolname.generate_slug(2)}-{secrets.token_hex(2)}"


def _shown(sample: Sample) -> tuple[tuple[str, float], ...]:
    """A sample's metrics without those that are our own."""
    return tuple((name, value) for name, value in sample.metrics if not name.startswith(OWN_METRICS))


def _receipt(job: Job) -> JobAnswer:
    """The answer to a wish: the job as the log has it now. What is only known live is not waited for."""
    return JobAnswer(job, headline=explain.headline(job))


def _node_answer(cluster: Cluster, name: NodeName) -> NodeAnswer:
    space = cluster.ledger.spaces.get(name)
    return NodeAnswer(
        node=cluster.nodes[name],
        free=cluster.ledger.free(name) if space else Resources(),
        free_gpus=space.whole_total if space else 0,
        state=_node_state(cluster, name),
        cordon=cluster.cordoned.get(name),
        jobs=tuple(cluster.jobs_on(name)),
    )


def _node_state(cluster: Cluster, name: NodeName) -> NodeState:
    if name in cluster.lost:
        return "lost"
    if not cluster.is_up(name):
        return "not ready"
    return "ready" if cluster.usable(name) else _cordoned(cluster.cordoned[name])


def _cordoned(cordon: Cordon) -> NodeState:
    return "probation" if cordon.by == BY else "draining" if cordon.drain else "cordoned"


def _closed(cluster: Cluster, queue: str) -> Conflict | None:
    """Why a queue takes no jobs, if so."""
    members = [name for name, spec in cluster.queues.items() if spec.cohort == queue]
    if members:
        return Conflict(f"{queue} is a cohort, jobs wait in its queues", hint=f"one of {', '.join(members[:5])}")
    if queue in cluster.queues and cluster.queues[queue].draining:
        return Conflict(f"queue {queue} is being drained and takes no more jobs", hint="'jobsched queues' shows others")
    return None


def _kind_of_way(text: str) -> str:
    """`worker replicas`, `h100`: what a change is about."""
    return text.partition(" instead of ")[2].partition(":")[0].partition(" (")[0]


def _refuse_early(queues: Collection[str]) -> None:
    """A cluster without a single queue has not been read yet, or not since the store was away."""
    if not queues:
        raise Unreachable("the server has not read its state yet", hint="try again in a moment")


def _refuse_ended(job: Job, what: str) -> None:
    if job.phase.terminal:
        raise Conflict(
            f"job {job.name!r} ({job.id}) is {job.phase} and cannot be {what}", hint="submit it again to run it anew"
        )


def _refuse_absent(job: Job, selection: Selection) -> None:
    """Replicas that a job can never have, so that a wrong number does not look like an empty log."""
    sizes = {name: role.replicas.max for name, role in job.spec.roles.items()}
    ranks = sum(sizes[name] for name in training_roles(job.spec))
    most = sizes[selection.role] if selection.role else max(sizes.values())
    attempts = max(1, job.attempt)  # the first one may be waited for
    for what, number, highest in (
        ("index", selection.index, most - 1), ("rank", selection.rank, ranks - 1),
        ("attempt", selection.attempt, attempts),
    ):  # fmt: skip
        if number is not None and number > highest:
            raise NotFound(f"job {job.name!r} has no {what} {number}", hint=f"the highest is {highest}")


def _replica_meant(job: Job, where: Where) -> Replica:
    role, index = where.role or next(iter((*training_roles(job.spec), *job.spec.roles))), where.index or 0
    replica = next((r for r in job.replicas.values() if (r.role, r.index) == (role, index)), None)
    if replica is None or replica.state is not ReplicaState.RUNNING or job.phase.terminal:
        state = job.phase.lower() if replica is None or job.phase.terminal else replica.state.value
        which = f"replica {role}/{index} of job {job.name!r}"
        raise Conflict(f"{which} does not run: {state}", hint=f"'jobsched describe {job.id}' shows those that do")
    return replica


def _unchangeable(field: str) -> UsageError:
    return UsageError(f"{field} cannot be changed", hint="cancel the job and submit it again")


def _laid_over(spec: JobSpec, changes: Mapping[str, object]) -> JobSpec:
    """The spec with some fields replaced. Raises `SpecError`."""
    document = spec.model_dump(mode="json")
    if "priority" in changes:  # the class that it went by no longer counts
        document["priority_class"] = ""
    return load_job_dict(document, overrides=changes)


def _refuse_incomplete(spec: JobSpec) -> None:
    """Variables without a value are filled by the caller's side, which knows the caller's environment."""
    tables = [("env", spec.env), *((f"roles.{name}.env", role.env) for name, role in spec.roles.items())]
    problems = [
        Problem(f"variable {name} has no value", field=f"{where}.{name}", hint="set it where you submit")
        for where, table in tables for name, value in table.items() if value is None
    ]  # fmt: skip
    if problems:
        raise SpecError(problems)


def _suggest(wrong: str, known: Iterable[str], kind: str) -> str:
    names = sorted(set(known))
    close = difflib.get_close_matches(wrong, names, n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"{kind}: {', '.join(names[:20]) or 'none'}" if kind else "'jobsched jobs -a' lists every job"
