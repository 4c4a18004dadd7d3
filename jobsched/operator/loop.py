"""The operator: what `kubectl` does to TrainingJobs and TrainingQueues becomes use cases of the service, and what comes
of them goes back into their status and events.

Started by `wiring` where the configuration has `kubernetes_objects`. Works only while this server leads. One thread
brings one object at a time from what it is to what it should be; informers, the service's events and the clock only say
which object to look at, so that nothing depends on having heard everything. Never places, starts or stops anything.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import structlog

from jobsched.backends.kubernetes_api import Api, Exists, Gone, Refused
from jobsched.backends.kubernetes_watch import Informer
from jobsched.core import events as ev
from jobsched.core.answers import Check, JobAnswer
from jobsched.core.job import Phase
from jobsched.core.resources import JobId
from jobsched.core.story import sentence
from jobsched.errors import Conflict, JobschedError, NotFound, Unplaceable, Unreachable
from jobsched.live import LiveView
from jobsched.operator import objects
from jobsched.operator.objects import FINALIZER, UID, Json, Refusal
from jobsched.ports import Clock, JobQuery
from jobsched.service import MAX_ARRAY, Service
from jobsched.spec.crd import GROUP, JOBS, QUEUES, VERSION
from jobsched.spec.queue import retired

log = structlog.get_logger("jobsched.operator")

RETRY_S = (1.0, 30.0)
"""First and longest pause before an object that could not be dealt with is looked at again."""
SWEEP_S = 10.0
"""How often waiting jobs are looked at although nothing was heard: why they wait changes without an event."""
SWEPT = 100
"""Most jobs per sweep."""
WAITING = ("QUEUED", "STARTING", objects.REFUSED)
LOOK_S = 1.0
"""How soon a change of leader is noticed."""
MOST_NEWS = 1_000
"""Events that wait to be told; older ones are dropped."""
QUIET = ("CheckpointSaved", "ReplicaExited", "ReplicasStarted", "HangCleared", "JobSubmitted")
"""Events of a job that are not worth a Kubernetes Event."""
BAD = ("ReplicasLost", "ReplicasRestarted", "ReplicasUnbound", "HangSuspected")

Key = tuple[str, str]
"""(plural, name)."""


@dataclass(slots=True)
class _Due:
    """Which objects to look at, and when. Thread-safe."""

    news: threading.Condition = field(default_factory=threading.Condition)
    now: dict[Key, None] = field(default_factory=dict)
    later: list[tuple[float, Key]] = field(default_factory=list)
    failures: dict[Key, int] = field(default_factory=dict)
    closed: bool = False

    def add(self, keys: Sequence[Key]) -> None:
        with self.news:
            self.now.update(dict.fromkeys(keys))
            self.news.notify_all()

    def again(self, key: Key) -> None:
        """Later: longer each time in a row."""
        with self.news:
            count = self.failures[key] = self.failures.get(key, 0) + 1
            pause = min(RETRY_S[0] * 2 ** (count - 1), RETRY_S[1])
            heapq.heappush(self.later, (time.monotonic() + pause, key))

    def done(self, key: Key) -> None:
        self.failures.pop(key, None)

    def take(self, until: float) -> Key | None:
        """The next one; None at `until` (monotonic), or once closed."""
        with self.news:
            while not self.closed:
                at = time.monotonic()
                while self.later and self.later[0][0] <= at:
                    self.now.setdefault(heapq.heappop(self.later)[1])
                if self.now:
                    key = next(iter(self.now))
                    del self.now[key]
                    return key
                if at >= until:
                    return None
                soonest = self.later[0][0] if self.later else until
                self.news.wait(min(soonest, until) - at)
        return None

    def close(self) -> None:
        with self.news:
            self.closed = True
            self.news.notify_all()


class Operator:
    """One per server. `start` returns at once; `close` leaves every job as it is."""

    def __init__(
        self, api: Api, service: Service, live: LiveView, clock: Clock, *, directory: str = "",
        configured: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """`configured`: names of queues that the server's configuration defines; objects cannot change those."""
        self._api, self._service, self._live, self._clock = api, service, live, clock
        self._directory, self._configured = directory, frozenset(configured)
        self._base = f"/apis/{GROUP}/{VERSION}/namespaces/{api.namespace}"
        self._lock = threading.Lock()
        self._objects: dict[Key, Json] = {}
        self._keys: dict[JobId, Key] = {}
        """Job -> the object that it belongs to."""
        self._submitting: tuple[str, Key] | None = None
        """The object, after its uid, whose jobs are being submitted: news of them may come before the answer does."""
        self._due = _Due()
        self._told: dict[Key, Refusal] = {}
        """The refusal that an event was last written about."""
        self._news: deque[tuple[Key, ev.Stored]] = deque(maxlen=MOST_NEWS)
        self._turn = 0
        self._informers = [self._informer(plural) for plural in (JOBS, QUEUES)]
        self._thread = threading.Thread(target=self._run, name="jobsched-operator", daemon=True)
        self._unsubscribe: Callable[[], None] | None = None

    def start(self) -> None:
        self._unsubscribe = self._live.subscribe(self._on_events)
        for informer in self._informers:
            informer.start()
        self._thread.start()

    def close(self) -> None:
        if self._unsubscribe is not None:
            self._unsubscribe()
        for informer in self._informers:
            informer.close()
        self._due.close()
        if self._thread.is_alive():
            self._thread.join(10)
        self._api.close()

    def check(self) -> Check:
        """A line of `doctor`."""
        problem = next((informer.problem for informer in self._informers if informer.problem), "")
        hint = "install the definitions: jobsched schema --crd | kubectl apply --server-side -f -" if problem else ""
        with self._lock:
            jobs = sum(plural == JOBS for plural, _ in self._objects)
        said = f"follows {jobs} TrainingJobs in namespace {self._api.namespace}"
        return Check("kubernetes objects", not problem, problem or said, hint)

    # ---- what is heard ----

    def _informer(self, plural: str) -> Informer:
        def listed(items: list[Json]) -> None:
            kind = "TrainingJob" if plural == JOBS else "TrainingQueue"  # members of a list do not say
            for one in items:
                one.setdefault("kind", kind)
                one.setdefault("apiVersion", f"{GROUP}/{VERSION}")
            found = {(plural, objects.name_of(one)): one for one in items}
            with self._lock:
                gone = [key for key in self._objects if key[0] == plural and key not in found]
                for key in gone:
                    del self._objects[key]
                self._objects |= found
            self._due.add([*found, *gone])

        def heard(kind: str, one: Json) -> None:
            key = plural, objects.name_of(one)
            with self._lock:
                if kind == "DELETED":
                    self._objects.pop(key, None)
                else:
                    self._objects[key] = one
            self._due.add([key])

        return Informer(self._api, f"{self._base}/{plural}", {}, listed, heard)

    def _on_events(self, news: Sequence[ev.Stored], _: frozenset[JobId]) -> None:
        """On the controller's thread: only notes what to look at."""
        with self._lock:
            if self._submitting is not None:
                uid, theirs = self._submitting
                for item in news:
                    if isinstance(item.event, ev.JobSubmitted) and item.event.spec.labels.get(UID) == uid:
                        self._keys[item.event.job_id] = theirs
            about = [(key, item) for item in news
                     if (job_id := item.event.job_id) is not None and (key := self._keys.get(job_id))]
            self._news.extend(about)
        if about:
            self._due.add([key for key, _ in about])

    # ---- the loop ----

    def _run(self) -> None:
        leading, sweep_at = False, time.monotonic() + SWEEP_S
        while not self._due.closed:
            if self._live.leading and not leading:
                with self._lock:
                    self._due.add(list(self._objects))
            leading = self._live.leading
            if time.monotonic() >= sweep_at:
                self._sweep()
                sweep_at = time.monotonic() + SWEEP_S
            key = self._due.take(time.monotonic() + LOOK_S)
            if key is not None and leading:  # a follower lets go of it; a new leader looks at everything
                self._look_at(key)

    def _look_at(self, key: Key) -> None:
        plural, name = key
        try:
            self._tell_news()
            with self._lock:
                found = self._objects.get(key)
            if found is None:
                self._told.pop(key, None)
                again = False
            else:
                again = self._job(key, found) if plural == JOBS else self._queue(key, found)
        except Gone:
            again = False
        except Exists:  # changed since we saw it: the newer one is on its way
            again = True
        except (Refused, Unreachable) as error:
            log.warning("object not brought up to date", kind=plural, name=name, error=str(error))
            again = True
        except Exception:
            log.exception("object not brought up to date", kind=plural, name=name)
            again = True
        if again:
            self._due.again(key)
        else:
            self._due.done(key)

    def _sweep(self) -> None:
        """Waiting jobs in turn, and queues: their numbers change without an event of their own."""
        with self._lock:
            waiting = [key for key, found in self._objects.items()
                       if key[0] == JOBS and (found.get("status") or {}).get("phase") in WAITING]
            queues = [key for key in self._objects if key[0] == QUEUES]
        self._turn = self._turn % len(waiting) if waiting else 0
        turn = (waiting[self._turn :] + waiting[: self._turn])[:SWEPT]
        self._turn += len(turn)
        self._due.add([*turn, *queues])

    # ---- jobs ----

    def _job(self, key: Key, found: Json) -> bool:
        """Bring one TrainingJob up to date. Whether to look again although nothing is heard of it."""
        answers = self._jobs_of(found)
        if found["metadata"].get("deletionTimestamp"):
            return self._job_deleted(key, found, answers)
        status = found.get("status") or {}
        if not answers and Phase.__members__.get(status.get("phase", ""), Phase.QUEUED).terminal:
            return False  # it ended under a server that kept another log; its story is over
        found = self._claimed(key, found)
        refusal = _refusal_in(status) if answers else None
        again = False
        try:
            if not answers:
                self._submit(key, found)
                answers = self._jobs_of(found)
            elif status.get("observedGeneration") != objects.generation_of(found):
                refusal = None
                spec = objects.job_spec(found, self._directory)
                for answer in answers:
                    if len(answers) == 1 or not answer.job.phase.terminal:
                        self._service.edit(answer.job.id, spec, by=objects.owner_of(found))
                answers = self._jobs_of(found)
        except Unreachable:
            raise
        except JobschedError as error:
            refusal = Refusal.of(error, edit=bool(answers))
            again = isinstance(error, NotFound | Unplaceable | Conflict) and not answers
        self._note(key, answers)
        self._tell_refusal(key, found, refusal)
        self._write(key, found, objects.job_status(found, answers, refusal, self._clock.now_ms()))
        return again

    def _submit(self, key: Key, found: Json) -> None:
        uid, spec = objects.uid_of(found), objects.job_spec(found, self._directory)
        with self._lock:
            self._submitting = uid, key
        try:
            page = self._service.submit(spec, owner=objects.owner_of(found), request_id=uid)
            self._note(key, page.jobs)
        finally:
            with self._lock:
                self._submitting = None

    def _job_deleted(self, key: Key, found: Json, answers: Sequence[JobAnswer]) -> bool:
        """Cancel; once no replica is left, let the object go."""
        self._note(key, answers)
        live = [answer.job for answer in answers if not answer.job.phase.terminal]
        for job in live:
            if not job.cancel_by:
                with suppress(Conflict):  # it has just ended by itself
                    self._service.cancel(job.id, by=objects.owner_of(found))
        if live:
            status = objects.job_status(found, answers, None, self._clock.now_ms())
            self._write(key, found, status)
            return True
        self._let_go(key, found)
        with self._lock:
            for answer in answers:
                self._keys.pop(answer.job.id, None)
        return False

    def _jobs_of(self, found: Json) -> tuple[JobAnswer, ...]:
        """The jobs that were made from an object, members of an array in order."""
        query = JobQuery(labels=((UID, objects.uid_of(found)),), owner=objects.owner_of(found), limit=MAX_ARRAY)
        answers: list[JobAnswer] = []
        while True:
            page = self._service.jobs(query)
            answers += page.jobs
            if not page.more:
                return tuple(sorted(answers, key=lambda answer: answer.job.array_index))
            query = replace(query, before=page.jobs[-1].job.id)

    def _note(self, key: Key, answers: Sequence[JobAnswer]) -> None:
        with self._lock:
            self._keys.update({answer.job.id: key for answer in answers})

    # ---- queues ----

    def _queue(self, key: Key, found: Json) -> bool:
        name, gone = key[1], bool(found["metadata"].get("deletionTimestamp"))
        refusal = None
        try:
            if name in self._configured:
                raise Conflict(f"queue {name!r} is defined in the server's configuration", hint="change it there")
            queue = objects.queue_spec(found)
            if not gone:
                found = self._claimed(key, found)
            known = next((one for one in self._service.queues() if one.queue.name == name), None)
            wanted = retired(queue, empty=False) if gone else queue
            if known is None or known.queue != wanted:
                self._service.define_queue(wanted)
                self._retry_refused()
        except Unreachable:
            raise
        except JobschedError as error:
            refusal = Refusal.of(error, edit=False)
        answer = next((one for one in self._service.queues() if one.queue.name == name), None)
        if gone and (refusal is not None or answer is None or not answer.waiting + answer.active):
            self._let_go(key, found)
            return False
        self._tell_refusal(key, found, refusal)
        self._write(key, found, objects.queue_status(found, answer, refusal, self._clock.now_ms()))
        return gone or answer is None

    def _retry_refused(self) -> None:
        """A queue is new or changed: what was refused may be taken now."""
        with self._lock:
            self._due.add([key for key, found in self._objects.items()
                           if key[0] == JOBS and (found.get("status") or {}).get("phase") == objects.REFUSED])

    # ---- calls ----

    def _claimed(self, key: Key, found: Json) -> Json:
        """With our finalizer on it."""
        held = found["metadata"].get("finalizers") or []
        return found if FINALIZER in held else self._patch(key, found, [*held, FINALIZER])

    def _let_go(self, key: Key, found: Json) -> None:
        held = found["metadata"].get("finalizers") or []
        if FINALIZER in held:
            self._patch(key, found, [one for one in held if one != FINALIZER])

    def _patch(self, key: Key, found: Json, finalizers: list[str]) -> Json:
        version = found["metadata"]["resourceVersion"]
        body = {"metadata": {"finalizers": finalizers, "resourceVersion": version}}
        return self._api.patch(f"{self._base}/{key[0]}/{key[1]}", body)

    def _write(self, key: Key, found: Json, status: Json) -> None:
        """The status, where it differs."""
        before = found.get("status") or {}
        if before != {name: value for name, value in status.items() if value is not None}:
            gone: Json = dict.fromkeys(name for name in before if name not in status)
            roles = {name: None for name in before.get("roles") or {} if name not in status.get("roles", {})}
            if roles:
                status = status | {"roles": status["roles"] | roles}
            self._api.patch(f"{self._base}/{key[0]}/{key[1]}/status", {"status": status | gone})

    def _tell_refusal(self, key: Key, found: Json, refusal: Refusal | None) -> None:
        """As an Event, once."""
        if refusal is None or self._told.get(key) == refusal:
            if refusal is None:
                self._told.pop(key, None)
            return
        self._told[key] = refusal
        number = f"{refusal.reason.lower()}-{objects.generation_of(found)}-{self._clock.now_ms():x}"
        self._event(found, "Warning", refusal.reason, refusal.message, number)

    def _tell_news(self) -> None:
        """What happened to jobs, as Events of their objects."""
        while True:
            with self._lock:
                if not self._news:
                    return
                key, item = self._news.popleft()
                found = self._objects.get(key)
            text = sentence(item.event)
            if found is not None and text and item.event.kind not in QUIET:
                bad = item.event.kind in BAD or getattr(item.event, "phase", None) is Phase.FAILED
                kind = "Warning" if bad else "Normal"
                self._event(found, kind, item.event.kind, text, f"{item.seq:x}")

    def _event(self, found: Json, kind: str, reason: str, message: str, number: str) -> None:
        """Best effort: nothing depends on it."""
        body = objects.event(found, kind, reason, message, number, self._clock.now_ms())
        try:
            self._api.create(f"/api/v1/namespaces/{self._api.namespace}/events", body)
        except (Exists, Gone):
            pass
        except (Refused, Unreachable) as error:
            log.warning("event not written", name=objects.name_of(found), error=str(error))


def _refusal_in(status: Json) -> Refusal | None:
    """The refusal that a status tells of: it holds until the next edit."""
    for one in status.get("conditions") or ():
        if one["type"] == "Accepted" and one["status"] == "False":
            return Refusal(one["reason"], one["message"])
    return None
