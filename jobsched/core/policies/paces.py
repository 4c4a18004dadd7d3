"""How fast jobs go on each kind of GPU, learned from the progress that they report.

A pace is milliseconds a step. What a kind does to it is a factor that like jobs share: the logarithm of a pace is taken
as that of the job plus that of the kind, fitted over families (`estimate.family_of`), then over the family, then over
what the job itself has shown; each level starts from the one above as if it had seen `TRUST` jobs like that. Nothing is
profiled beforehand (Gavel, OSDI'20) or run on each kind once (Sia, SOSP'23): a kind that nobody has tried counts as the
average of those known, so that somebody tries it.

Kept by `Cluster`, fed with progress, asked by `policies.kinds`. Not in the log: the next leader has what was noted last
(`core.recall`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from math import exp, log

from jobsched.core.job import Job
from jobsched.core.policies.families import Key, as_key, family_of
from jobsched.core.resources import JobId

TRUST = 1.0
FAMILIES_KEPT = 5_000
FAMILIES_NOTED = 1_000
"""The latest of them: what is noted every now and then must stay small."""
ROUNDS = 8
"""Turns of the fit between families and kinds."""


@dataclass(slots=True)
class _Mean:
    total: float = 0.0
    jobs: int = 0

    @property
    def value(self) -> float:
        return self.total / self.jobs


@dataclass(frozen=True, slots=True)
class PacesNote:
    """What is noted: of families (key, (kind, sum of the logarithms of paces, jobs)...), of live jobs (id, (kind,
    logarithm of its pace)...), each in the order in which they came."""

    families: tuple[tuple[Key, tuple[tuple[str, float, int], ...]], ...] = ()
    live: tuple[tuple[JobId, tuple[tuple[str, float], ...]], ...] = ()


@dataclass(slots=True)
class Paces:
    """All that was learned. Notes cost O(1); the first question after news O(families * kinds)."""

    _of: dict[JobId, dict[str, float]] = field(default_factory=dict)
    """Live job -> kind -> logarithm of its pace there, the latest last."""
    _families: dict[Key, dict[str, _Mean]] = field(default_factory=dict)
    _kinds: dict[str, float] | None = None
    """What each kind adds to a pace, for jobs of any family; None: to be fitted."""
    _fitted: dict[Key, dict[str, float]] = field(default_factory=dict)

    def noted(self) -> PacesNote:
        """O(families + live jobs)."""
        latest = islice(reversed(self._families.items()), FAMILIES_NOTED)
        families = [(key, tuple((kind, m.total, m.jobs) for kind, m in means.items())) for key, means in latest]
        return PacesNote(tuple(reversed(families)), tuple((j, tuple(paces.items())) for j, paces in self._of.items()))

    @classmethod
    def of(cls, note: PacesNote) -> Paces:
        """As it was when that was noted; of the families, the latest."""
        families = {
            as_key(key): {kind: _Mean(total, jobs) for kind, total, jobs in means} for key, means in note.families
        }
        return cls({job_id: dict(paces) for job_id, paces in note.live}, families)

    def note(self, job: Job, kind: str, step_ms: float) -> None:
        """A job makes a step in so many milliseconds there."""
        mine, pace, family = self._of.setdefault(job.id, {}), log(step_ms), family_of(job)
        before = mine.pop(kind, None)
        mine[kind] = pace
        means = self._families.setdefault(family, {})
        mean = means.setdefault(kind, _Mean())
        mean.total += pace - (before if before is not None else 0.0)
        mean.jobs += before is None
        if before is None or abs(before - pace) > 0.05:
            self._kinds = None
            self._fitted.clear()
        if len(self._families) > FAMILIES_KEPT:
            del self._families[next(iter(self._families))]

    def ended(self, job_id: JobId) -> None:
        """What it has shown stays with its family."""
        self._of.pop(job_id, None)

    def as_they_are(self) -> Paces:
        """For copies of a cluster: nothing that ends there is forgotten here. O(live jobs)."""
        return Paces(dict(self._of), self._families, self._kinds, dict(self._fitted))

    def last(self, job_id: JobId) -> str:
        """The kind on which the job last showed its pace; "": it has not."""
        return next(reversed(self._of.get(job_id, {})), "")

    def speed(self, job: Job, kind: str) -> float:
        """How fast the job goes there, in parts of its speed on average over the kinds known."""
        family = family_of(job)
        effects = self._fitted.get(family)
        if effects is None:
            if self._kinds is None:
                self._kinds = _fit(self._families)
            means = self._families.get(family, {})
            effects = self._fitted[family] = _level({k: (m.value, m.jobs) for k, m in means.items()}, self._kinds)
        if mine := self._of.get(job.id):
            effects = _level({k: (pace, 4) for k, pace in mine.items()}, effects)
        return exp(-effects.get(kind, 0.0))


def _level(seen: dict[str, tuple[float, int]], above: dict[str, float]) -> dict[str, float]:
    """What each kind adds, from paces seen (mean, how often) and what is known above."""
    if not seen:
        return above
    base = sum(pace - above.get(kind, 0.0) for kind, (pace, _) in seen.items()) / len(seen)
    return above | {
        kind: (times * (pace - base) + TRUST * above.get(kind, 0.0)) / (times + TRUST)
        for kind, (pace, times) in seen.items()
    }


def _fit(families: dict[Key, dict[str, _Mean]]) -> dict[str, float]:
    """What each kind adds over all families, by least squares in turns; the average of kinds is 0."""
    both = [means for means in families.values() if len(means) > 1]  # one kind alone tells nothing of another
    kinds = dict.fromkeys([kind for means in both for kind in means], 0.0)
    for _ in range(ROUNDS if kinds else 0):
        off: dict[str, list[float]] = {kind: [] for kind in kinds}
        for means in both:
            base = sum(mean.value - kinds[kind] for kind, mean in means.items()) / len(means)
            for kind, mean in means.items():
                off[kind].append(mean.value - base)
        kinds = {kind: sum(each) / len(each) for kind, each in off.items()}
        middle = sum(kinds.values()) / len(kinds)
        kinds = {kind: effect - middle for kind, effect in kinds.items()}
    return kinds
