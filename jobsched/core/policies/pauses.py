"""What changes of size cost: time without progress, learned from those that were seen.

A job that reports steps shows it by itself: from its last report at the old size to its first at the new one, less what
the steps between them took (`goodput.SpeedModel.passed`), less the time that it waited for places. The next change
of that job, or of one of its family (`estimate.family_of`), is expected to take the median of the latest seen, its own
before those of others; what is believed without any counts as one of them, so that a single slow start, which would
keep a job from ever changing again, is not yet believed.

Kept by `Cluster`, fed by `controller.telemetry`, asked by `policies.elasticity` and `victims`. Not in the log: the next
leader has what was noted last (`core.recall`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice

from jobsched.core.job import Job
from jobsched.core.policies.families import Key, as_key, family_of
from jobsched.core.resources import JobId

ASKED = 8
"""Pauses that are looked at."""
KEPT = 32
"""Of one family; the latest."""
FAMILIES_KEPT = 1_000

Seen = tuple[tuple[JobId, int], ...]
"""(job, milliseconds), oldest first."""
PausesNote = tuple[tuple[Key, bool, Seen], ...]
"""What is noted: (family, whether in place, what was seen), that with the latest news last."""


@dataclass(slots=True)
class Pauses:
    """All that was learned. O(1) each."""

    _of: dict[tuple[Key, bool], Seen] = field(default_factory=dict)
    """(Family, whether replicas came and went in place) -> what was seen."""

    def noted(self) -> PausesNote:
        """O(families)."""
        return tuple((family, in_place, seen) for (family, in_place), seen in self._of.items())

    @classmethod
    def of(cls, note: PausesNote) -> Pauses:
        """As it was when that was noted."""
        return cls({(as_key(family), in_place): tuple((job_id, ms) for job_id, ms in seen)
                    for family, in_place, seen in note})  # fmt: skip

    def as_they_are(self) -> Pauses:
        """For copies of a cluster. O(families)."""
        return Pauses(dict(self._of))

    def note(self, job: Job, in_place: bool, pause_ms: int) -> None:
        """A change of this job's size took so long."""
        key = family_of(job), in_place
        seen = self._of.pop(key, ())
        self._of[key] = (*seen, (job.id, pause_ms))[-KEPT:]
        for oldest in list(islice(self._of, max(0, len(self._of) - FAMILIES_KEPT))):
            del self._of[oldest]

    def expected_ms(self, job: Job, in_place: bool, otherwise_ms: int) -> int:
        """How long the next change of this job's size will take; `otherwise_ms`: while nothing was seen."""
        seen = self._of.get((family_of(job), in_place), ()) if self._of else ()
        own = [ms for job_id, ms in seen if job_id == job.id]
        others = [ms for job_id, ms in seen if job_id != job.id]
        latest = sorted([otherwise_ms, *[*others, *own][-ASKED:]])
        return latest[(len(latest) - 1) // 2]
