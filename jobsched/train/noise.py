"""How noisy gradients are: what says how much a larger batch is still worth.

The mean gradient of `b` samples has an expected square of `|G|^2 + s / b`: the true gradient's, and the variance of one
sample's over `b`. Replicas give both terms without an extra pass: each has the gradient of its own part of the batch,
and their all-reduce that of the whole (McCandlish et al., 2018, appendix A.1; Pollux, OSDI'21, measures it so). Single
steps say little, so both are averaged over many. One replica alone says nothing.
"""

from __future__ import annotations

import torch

DECAY = 0.98
"""What a step leaves of the weight of those before it."""
WARM_UP = 10
"""So few steps are not told."""


class Noise:
    """Averages of the two terms. Numbers stay on the device they were measured on: nobody waits for them."""

    def __init__(self) -> None:
        self.steps = 0
        self._weight = 0.0
        self._square: torch.Tensor | None = None
        self._variance: torch.Tensor | None = None

    def note(self, whole: torch.Tensor, parts: torch.Tensor, replicas: int, batches: int = 1) -> None:
        """One step: square of the whole batch's mean gradient; sum over replicas of the square of theirs, each times
        its part of the batch; how many replicas had a part; how many initial batches it was."""
        if replicas < 2:
            return
        variance = (parts - whole) / (replicas - 1)
        self._square = self._mean(self._square, whole - variance)
        self._variance = self._mean(self._variance, variance * batches)
        self._weight = DECAY * self._weight + 1.0 - DECAY
        self.steps += 1

    def _mean(self, mean: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
        return (1.0 - DECAY) * value + (DECAY * mean if mean is not None else 0.0)

    def metrics(self) -> dict[str, torch.Tensor]:
        """`grad_sqr` and `grad_var`: square of the true gradient, and variance of the initial batch's, as the scheduler
        takes them; nothing before enough was seen."""
        if self.steps < WARM_UP or self._square is None or self._variance is None:
            return {}
        return {
            "grad_sqr": (self._square / self._weight).clamp(min=0.0),
            "grad_var": (self._variance / self._weight).clamp(min=1e-12),
        }
