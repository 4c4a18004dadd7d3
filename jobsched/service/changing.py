"""Wishes about a job that is there: each becomes one event, or none where it is so already."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from jobsched.core import events as ev
from jobsched.core.answers import EditAnswer, JobAnswer
from jobsched.core.edit import FIXED, Edit, compare
from jobsched.core.job import Job, Phase
from jobsched.core.lifecycle import evolve_job
from jobsched.core.resources import JobId
from jobsched.errors import Conflict, NotFound, Unplaceable, UsageError
from jobsched.live import LiveView
from jobsched.load import load_job_dict
from jobsched.ports import Clock, Store
from jobsched.service.answering import receipt
from jobsched.service.entry import examine, priority_of
from jobsched.service.finding import resolve, suggest
from jobsched.spec.job import JobSpec

WISH_TRIES = 20
"""How often a wish is tried anew when the job changes between look and append."""


class Wishes:
    def __init__(self, store: Store, live: LiveView, clock: Clock, classes: Mapping[str, int]) -> None:
        self._store = store
        self._live = live
        self._clock = clock
        self._classes = classes

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
                    hint = suggest(name, job.spec.roles, "roles")
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
        priority = priority_of(priority, self._classes) if isinstance(priority, str) else priority

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
        whole = examine(spec, self._live, self._classes) if isinstance(spec, JobSpec) else None
        told = Edit(())

        def wish(job: Job, at_ms: int) -> ev.JobEvent | None:
            nonlocal told
            before = job.next_spec or job.spec
            new, closed, never = whole or examine(_laid_over(before, changes), self._live, self._classes)
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
            if isinstance(closed, NotFound):
                raise closed
            if never:
                raise Unplaceable(never, hint="change the request")
            if closed is not None and "queue" in told.fields:
                raise closed
            event = ev.JobEdited(at_ms, job.id, by, new, told.fields, told.wanted, told.restart)
            return None if dry_run else event

        answer = self._wish(ref, owner, wish)
        return EditAnswer(answer.job, answer.headline, told.fields, told.restart)

    def _wish(self, ref: str, owner: str, wish: Callable[[Job, int], ev.JobEvent | None]) -> JobAnswer:
        """Append what `wish` makes of the job as it is now (None: nothing to do), by compare-and-set, so that a wish is
        never recorded for a job that has moved on."""
        job = resolve(self._store, ref, owner=owner)
        for _ in range(WISH_TRIES):
            event = wish(job, self._clock.now_ms())
            if event is None:
                return receipt(job)
            if not self._store.append([event], expected={job.id: job.version}).rejected:
                self._live.wake()
                return receipt(evolve_job(job, event))
            job = self._known(job.id)
        raise Conflict(f"job {job.name!r} ({job.id}) changes faster than the wish can be recorded", hint="try again")

    def _known(self, job_id: JobId) -> Job:
        job = self._store.job(job_id)
        assert job is not None, "jobs are never removed from the store"
        return job


def _refuse_ended(job: Job, what: str) -> None:
    if job.phase.terminal:
        raise Conflict(
            f"job {job.name!r} ({job.id}) is {job.phase} and cannot be {what}", hint="submit it again to run it anew"
        )


def _unchangeable(field: str) -> UsageError:
    return UsageError(f"{field} cannot be changed", hint="cancel the job and submit it again")


def _laid_over(spec: JobSpec, changes: Mapping[str, object]) -> JobSpec:
    """The spec with some fields replaced. Raises `SpecError`."""
    document = spec.model_dump(mode="json")
    if "priority" in changes:  # the class that it went by no longer counts
        document["priority_class"] = ""
    return load_job_dict(document, overrides=changes)
