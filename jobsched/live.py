"""What use cases need of the controller: its live cluster, and how it does. Implemented by `controller.loop`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from jobsched.core.answers import JobProgress
from jobsched.core.cluster import Cluster
from jobsched.core.observation import Sight
from jobsched.core.passes import Policy
from jobsched.core.resources import JobId
from jobsched.logs import Listener


class Health(Protocol):
    """How the controller's loop does."""

    ticks: int
    last_tick_ms: float
    store_error: str
    backend_error: str
    rejected: int


class LiveView(Protocol):
    """What the service needs of the controller."""

    @property
    def health(self) -> Health: ...

    @property
    def leading(self) -> bool: ...

    @property
    def policy(self) -> Policy: ...

    def view(self) -> AbstractContextManager[tuple[Cluster, Sight]]:
        """The live cluster and what was last seen, held still while the context is open: be quick."""
        ...

    def wake(self) -> None:
        """There is news in the store."""
        ...

    def caught_up(self, seq: int, timeout_s: float) -> bool:
        """Wait until everything that the log holds up to this event has been decided on, or by a follower folded, at
        most so long; whether it has."""
        ...

    def progress(self, job_id: JobId) -> JobProgress | None: ...

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call with every batch of events once it is folded, and the jobs whose progress changed; the result
        unsubscribes. Listeners run on the controller's thread and must not block."""
        ...
