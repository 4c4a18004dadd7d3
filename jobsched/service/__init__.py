"""Use cases: everything a user can ask of jobsched, with typed errors; the one door behind REST, CLI and SDK.

Called by `api`, `operator` and the embedded client. A wish becomes one event, appended without a fence, and the
controller is woken; questions are answered from the store's projections and the controller's live view. Never decides
where or when a job runs and never touches a replica.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from jobsched.checkup import Checkup
from jobsched.core.answers import Check
from jobsched.core.events import Stored
from jobsched.core.job import Job
from jobsched.live import LiveView
from jobsched.ports import Backend, Clock, Store
from jobsched.service.answering import Answers
from jobsched.service.changing import Wishes
from jobsched.service.explaining import LATELY_MS, Explanations
from jobsched.service.finding import resolve
from jobsched.service.nodes import Nodes
from jobsched.service.queues import Queues
from jobsched.service.reaching import Replicas, Where
from jobsched.service.submitting import LIVE, MAX_ARRAY, IfExists, Submissions

__all__ = ["LATELY_MS", "LIVE", "MAX_ARRAY", "IfExists", "Service", "Where"]


class Service:
    """One per server. Thread-safe. What can be asked of it, by the part whose method it is."""

    def __init__(
        self, store: Store, live: LiveView, backend: Backend, clock: Clock,
        checks: Callable[[], Iterable[Check]] = tuple, priority_classes: Mapping[str, int] | None = None,
    ) -> None:  # fmt: skip
        """`checks`: as `Checkup`; `priority_classes`: names that may stand for a priority."""
        self.live = live
        self._store = store
        self.checkup = Checkup(store, live, backend, clock, checks)
        classes = dict(priority_classes or {})

        answers = Answers(store, live, clock)
        self.get = answers.get
        self.jobs = answers.jobs
        self.lively = answers.lively
        self.events = answers.events
        self.samples = answers.samples

        explanations = Explanations(answers, store, live, backend, clock, classes)
        self.why = explanations.why
        self.plan = explanations.plan
        self.incidents = explanations.incidents

        wishes = Wishes(store, live, clock, classes)
        self.cancel = wishes.cancel
        self.hold = wishes.hold
        self.release = wishes.release
        self.restart = wishes.restart
        self.scale = wishes.scale
        self.set_priority = wishes.set_priority
        self.edit = wishes.edit

        self.submit = Submissions(answers, wishes, store, live, clock, classes).submit

        replicas = Replicas(store, live, backend)
        self.logs = replicas.logs
        self.execute = replicas.execute
        self.forward = replicas.forward
        self.checkpoint = replicas.checkpoint

        nodes = Nodes(store, live, clock)
        self.nodes = nodes.every
        self.cordon = nodes.cordon
        self.uncordon = nodes.uncordon

        queues = Queues(store, live, clock)
        self.queues = queues.every
        self.usage = queues.usage
        self.define_queue = queues.define

    def resolve(self, ref: str, *, owner: str = "") -> Job:
        """The job that a reference means; see `finding.resolve`."""
        return resolve(self._store, ref, owner=owner)

    def read(self, after: int, limit: int) -> Sequence[Stored]:
        """A piece of the whole log, for event streams."""
        return self._store.read(after, limit)

    def last_seq(self) -> int:
        return self._store.last_seq()

    def count_by_phase(self) -> Mapping[str, int]:
        return self._store.count("phase")
