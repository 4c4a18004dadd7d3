"""Leadership: taking and renewing the store's lease. Used by the loop; a lost lease means: stop deciding at once."""

from __future__ import annotations

from jobsched.ports import Lease, Store

DEFAULT_TTL_MS = 15_000


class Leader:
    """Keeps the lease for one holder; `fence` is what decisions are appended with."""

    def __init__(self, store: Store, holder: str, ttl_ms: int = DEFAULT_TTL_MS) -> None:
        self._store = store
        self._holder = holder
        self._ttl_ms = ttl_ms
        self._lease: Lease | None = None
        self._renew_ms = 0
        """When the lease that is held is to be renewed."""

    def hold(self, now_ms: int) -> int | None:
        """The fence while this holder leads, renewing after a third of the time; None while somebody else does."""
        if self._lease is None or now_ms >= self._renew_ms:
            self._lease = self._store.lease(self._holder, self._ttl_ms, now_ms)
            if self._lease is not None:
                self._renew_ms = self._lease.expires_ms - 2 * self._ttl_ms // 3
        return self._lease.fence if self._lease is not None else None

    def holds(self, now_ms: int) -> bool:
        """Whether the lease has not run out: a process may be paused between deciding and acting."""
        return self._lease is not None and now_ms < self._lease.expires_ms

    def drop(self) -> None:
        """Somebody newer leads; forget the lease."""
        self._lease = None

    def release(self) -> None:
        """Hand over without waiting for the lease to run out."""
        if self._lease is not None:
            self._store.release(self._holder)
            self._lease = None

    def next_ms(self, now_ms: int) -> int:
        """When to call `hold` again at the latest."""
        return self._renew_ms if self._lease is not None else now_ms + self._ttl_ms // 3
