"""The lines in which jobs wait that may start: like jobs together, best rank and oldest first.

Kept by `Cluster`; a pass looks at the heads of lines, so that its cost follows how many kinds of jobs wait, not how
many jobs.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from jobsched.core.job import Job, Shape
from jobsched.core.ledger import Stock
from jobsched.core.policies.estimate import Estimates
from jobsched.core.policies.parts import PoolKey
from jobsched.core.resources import JobId


class LineKey(NamedTuple):
    """Jobs that the scheduler need not tell apart but by rank and age: same queue, priority, shape, array, owner where
    the queue tells its users apart, and outlook where the policy has one (`Cluster.alike`)."""

    queue: str
    priority: int
    shape: Shape
    array_id: str = ""
    owner: str = ""
    outlook: tuple[int, ...] = ()

    @property
    def has_run(self) -> bool:
        """Whether its jobs ran before, each for its own time: the last of an outlook says for how long, roughly."""
        return bool(self.outlook) and self.outlook[-1] > 0

    def akin(self) -> LineKey:
        """The same for all lines that differ in nothing but their outlook."""
        return self._replace(outlook=()) if self.outlook else self


class Place(NamedTuple):
    """A job's place in its line: lower rank first, then older."""

    rank: int
    submitted_at_ms: int
    job_id: JobId


Rank = Callable[[Job, Estimates], int]
"""What decides between like jobs before their age: a policy's estimate of how long each will take, for example. Asked
when a job joins its line."""


def equal_rank(job: Job, estimates: Estimates) -> int:
    """Age alone decides."""
    return 0


Alike = Callable[[Job, Estimates], tuple[int, ...]]
"""Jobs of which a policy expects the same, now and later, as long as they wait, get equal values. Asked when a job
joins its line."""


def all_alike(job: Job, estimates: Estimates) -> tuple[int, ...]:
    """The policy does not look at what a job has done."""
    return ()


@dataclass(slots=True)
class Line:
    """One line of like jobs, best rank and oldest first."""

    key: LineKey
    stock: Stock
    """What there is for it."""
    places: list[Place] = field(default_factory=list)
    blocked_at: int = -1
    """`Stock.freed` when its head was last found not to fit; equal means: not worth another try."""
    refused_at: int = -1
    """`Ledger.freed` when its head was last over a quota or limit."""
    hindered_at: int = -1
    """`Cluster.claims_made` when reservations of others were in the way of its head; -1: none were."""


class Lines(dict[LineKey, Line]):
    """All lines that are not empty. What a job's joining or leaving costs is its place among its like: O(log n)."""

    def __init__(self) -> None:
        super().__init__()
        self.of_queue: dict[str, dict[LineKey, Line]] = {}
        """The same by queue; queues without waiting jobs are absent."""
        self.of_pool: dict[PoolKey, dict[LineKey, dict[LineKey, Line]]] = {}
        """The same by where their jobs may run, those that differ in nothing but their outlook together."""
        self.stuck: dict[str, Line] = {}
        """Queue whose first line was found not to fit, where that stops the whole queue; forgotten when a job comes or
        goes."""
        self.waiting = 0
        """How many jobs are in a line."""
        self.news = 0
        """Rises when a line is worth a try that was not: a job came, or one left that did not start."""
        self.started = 0
        """How many left because they start."""
        self.looked: tuple[int, int] | None = None
        """(`Ledger.freed`, `Cluster.claims_made`) when all that are `stuck` were last looked at; None: look again."""

    def join(self, key: LineKey, pool: PoolKey, stock: Stock, place: Place) -> Line:
        """Take a place in the line that is for such jobs."""
        line = self.get(key)
        if line is None:
            line = self[key] = self.of_queue.setdefault(key.queue, {})[key] = Line(key, stock)
            self.of_pool.setdefault(pool, {}).setdefault(key.akin(), {})[key] = line
        self.waiting += 1
        self.news += 1
        self.stuck.pop(key.queue, None)
        places = line.places
        if not places or places[-1] < place:
            places.append(place)  # who comes last usually goes last; where thousands wait, looking for it costs more
        else:
            insort(places, place)
        if line.hindered_at >= 0:
            line.blocked_at = -1  # it may be over sooner than those before it
        return line

    def again(self) -> None:
        """A line that was left alone is worth a try."""
        self.news += 1
        self.looked = None

    def leave(self, line: Line, pool: PoolKey, place: Place, starts: bool) -> None:
        """Give the place up. A line that nobody is in is forgotten."""
        key, places = line.key, line.places
        del places[0 if places[0] is place else bisect_left(places, place)]
        self.waiting -= 1
        if starts:
            self.started += 1
        else:
            self.news += 1
        self.stuck.pop(key.queue, None)
        if places:
            return
        del self[key]
        del self.of_queue[key.queue][key]
        if not self.of_queue[key.queue]:
            del self.of_queue[key.queue]
        akin = key.akin()
        del self.of_pool[pool][akin][key]
        if not self.of_pool[pool][akin]:
            del self.of_pool[pool][akin]
            if not self.of_pool[pool]:
                del self.of_pool[pool]
