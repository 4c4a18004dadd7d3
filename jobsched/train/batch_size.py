"""How large a batch pays: what a larger one brings beside what it costs, by the noise and the times of late.

A batch of `k` times the initial one makes `(v + g) / (v / k + g)` times the progress of one (`g`, `v`: square of the
true gradient and variance of the initial batch's), which is also by how much AdaScale (Johnson et al., 2020) raises the
learning rate; a step takes a part that does not grow with `k` and one that does. The best ratio wins, as in Pollux
(OSDI'21). Used by `ddp.Elastic` on one rank, which tells the others.
"""

from __future__ import annotations

from math import sqrt
from typing import Literal

Rule = Literal["adascale", "sqrt", "linear"]
WORTH = 1.05
"""A change must promise so many times the progress a second."""
SETTLE = 10
"""Steps between two changes."""
GROWTH = 2
"""Most batches at once, in multiples of what was tried."""
DECAY = 0.9
"""What a step leaves of the times of those before it."""
HELD_UP = 4
"""No step counts as more than so many times what was to be expected: somebody was held up, whatever the batch."""


def gain(square: float, variance: float, multiple: int) -> float:
    """Progress of a step with so many times the initial batch, in steps with the initial one: between 1 and that."""
    rest = variance / multiple + square
    return (variance + square) / rest if rest > 0.0 else float(multiple)


class BatchSize:
    """How many batches of the plan make one step, and by how much that raises the learning rate."""

    def __init__(self, most: int, rule: Rule = "adascale") -> None:
        """`most`: largest multiple of the initial batch."""
        self.most = max(1, most)
        self.rule = rule
        self.multiple = 1
        self.factor = 1.0
        """Of the learning rate."""
        self._times: dict[int, tuple[float, float]] = {}
        """Multiple -> (seconds of a step, of it in the all-reduce), averages of late."""
        self._since = 0

    def note(self, step_s: float, sync_s: float) -> None:
        """A step at the present multiple took so long."""
        if self._times:
            step_s = min(step_s, HELD_UP * self.step_s(self.multiple))
        told = step_s, min(sync_s, step_s)
        before = self._times.get(self.multiple, told)
        step_s, sync_s = (DECAY * old + (1 - DECAY) * new for old, new in zip(before, told, strict=True))
        self._times[self.multiple] = step_s, sync_s
        self._since += 1

    def step_s(self, multiple: int) -> float:
        """Seconds that a step would take."""
        if len(self._times) == 1:  # half of computing grows with the batch: hopeful
            (known, (step_s, sync_s)), = self._times.items()
            return sync_s + (step_s - sync_s) * (0.5 + 0.5 * multiple / known)
        count, xs, ys = len(self._times), list(self._times), [step_s for step_s, _ in self._times.values()]
        mean_x, mean_y = sum(xs) / count, sum(ys) / count
        spread = sum((x - mean_x) ** 2 for x in xs)
        slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread
        slope = min(max(0.0, slope), mean_y / mean_x)
        return mean_y + slope * (multiple - mean_x)

    def choose(self, square: float, variance: float) -> tuple[int, float]:
        """(multiple, factor of the learning rate) from the next step on."""
        multiple = self.multiple
        if self._times and self._since >= SETTLE:
            def rate(k: int) -> float:
                return gain(square, variance, k) / max(1e-9, self.step_s(k))

            best = max(range(1, min(self.most, GROWTH * max(self._times)) + 1), key=lambda k: (rate(k), -k))
            if rate(best) > WORTH * rate(multiple):
                multiple, self._since = best, 0
        match self.rule:
            case "adascale":
                return multiple, gain(square, variance, multiple)
            case "sqrt":
                return multiple, sqrt(multiple)
            case "linear":
                return multiple, float(multiple)

    def became(self, multiple: int, factor: float) -> None:
        """What all ranks go by from now on."""
        self.multiple, self.factor = multiple, factor

    def regrouped(self) -> None:
        """There is another number of ranks: times are others."""
        self._times.clear()
        self._since = 0
