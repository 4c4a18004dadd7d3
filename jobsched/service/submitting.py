"""Jobs into the log: ids and names, arrays, dependencies, a name that is already taken."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Literal

from ulid import ULIDGenerator

from jobsched.core import events as ev
from jobsched.core.answers import JobPage
from jobsched.core.job import Job, Phase
from jobsched.core.lifecycle import evolve_job
from jobsched.core.resources import JobId
from jobsched.errors import Conflict, Problem, SpecError, Unplaceable
from jobsched.live import LiveView
from jobsched.ports import Clock, JobQuery, Store
from jobsched.service.answering import MAX_PAGE, Answers, receipt
from jobsched.service.changing import Wishes
from jobsched.service.entry import examine
from jobsched.service.finding import ID, resolve
from jobsched.spec.job import ArraySpec, JobSpec

LIVE = tuple(p for p in Phase if not p.terminal)
MAX_ARRAY = 10_000
"""Members of one array submission; more would keep the store's one writer busy for seconds."""
CHUNK = 500
"""Submissions per append, so that the leader gets its turn during a large array."""

IfExists = Literal["", "fail", "skip", "replace"]


class Submissions:
    def __init__(
        self, answers: Answers, wishes: Wishes, store: Store, live: LiveView, clock: Clock, classes: Mapping[str, int]
    ) -> None:
        self._answers = answers
        self._wishes = wishes
        self._store = store
        self._live = live
        self._clock = clock
        self._classes = classes
        self._new_id = ULIDGenerator(clock=clock.now_ms)
        self._naming = threading.Lock()

    def submit(
        self, spec: JobSpec, *, owner: str = "", request_id: str = "", hold: bool = False, if_exists: IfExists = ""
    ) -> JobPage:
        """Queue a job, or every member of its array. Doing it again with the same owner and request id changes nothing
        and gives the same jobs.

        Raises `SpecError` (incomplete spec), `NotFound` (queue, dependency), `Unplaceable` (no node can ever hold it;
        not with `hold`), `Conflict` (a dependency did not succeed; the name is taken and `if_exists` is "fail")."""
        spec, closed, never = examine(spec, self._live, self._classes, fits=not hold)
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
                return JobPage(tuple(self._answers.answer(job) for job in taken))
            if if_exists == "fail":
                raise Conflict(
                    f"job {taken[0].name!r} ({taken[0].id}) is {taken[0].phase} under that name",
                    hint="choose another name, or --if-exists=skip or replace",
                )
            for job in taken:
                with suppress(Conflict):  # it has just ended by itself
                    self._wishes.cancel(job.id, by=owner)
            return self._append(wishes)

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
            self._live.wake()
            for wish, item in zip(wishes[at : at + CHUNK], stored, strict=True):
                assert isinstance(item.event, ev.JobSubmitted)
                known = self._store.job(item.event.job_id) if item.event.job_id != wish.job_id else None
                jobs.append(known or evolve_job(None, item.event))
        return JobPage(tuple(map(receipt, jobs[:MAX_PAGE])), more=len(jobs) > MAX_PAGE)

    def _next_id(self) -> JobId:
        return JobId(str(self._new_id.generate()).lower())

    def _dependencies(self, spec: JobSpec, owner: str) -> tuple[JobId, ...]:
        """Ids of the jobs in `after` that have yet to succeed. The id of an array stands for all its members."""
        waiting: dict[JobId, None] = {}
        for ref in spec.after:
            array = JobQuery(array_id=ref.lower(), limit=MAX_ARRAY)
            members = self._store.jobs(array) if ID.fullmatch(array.array_id) else ()
            for job in members or (resolve(self._store, ref, owner=owner),):
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


def made_up_name() -> str:
    """`adjective-noun-4hex`."""
    import coolname  # reads word lists of half a megabyte: only when a name is needed

    return f"{coolname.generate_slug(2)}-{secrets.token_hex(2)}"
