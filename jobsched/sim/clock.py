"""Virtual time: jumps to wherever the loop wants to be next."""

from __future__ import annotations

from jobsched.ports import Wake

EPOCH_MS = 1_700_000_000_000


class SimClock:
    """Implements `ports.Clock` without waiting."""

    def __init__(self, start_ms: int = EPOCH_MS) -> None:
        self._now_ms = start_ms

    def now_ms(self) -> int:
        return self._now_ms

    def wait_until(self, instant_ms: int, wake: Wake) -> None:
        if not wake.is_set():
            self.advance_to(instant_ms)
        wake.clear()

    def advance_to(self, instant_ms: int) -> None:
        """Move forward; an instant in the past changes nothing."""
        self._now_ms = max(self._now_ms, instant_ms)
