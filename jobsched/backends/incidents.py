"""What an engine said lately about replicas and nodes: each thing once, with how often, and not too many of them.

Used by adapters that are a `ports.Chronicle`. Nothing is stored: after a restart the engine is asked for what it
remembers.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import replace

from jobsched.core.launch import parse_key
from jobsched.core.observation import Incident
from jobsched.core.resources import JobId, NodeName

MOST = 2_000
"""Of all jobs and nodes together; the least recent go first."""
MOST_SHOWN = 200
LONGEST = 1_000
"""Characters of a message."""


class Incidents:
    """Thread-safe."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str, str, str], Incident] = {}
        self._lock = threading.Lock()

    def note(self, incident: Incident, *, total: bool = False) -> None:
        """`total`: its count says how often it was told in all; else once more."""
        incident = replace(incident, message=incident.message.strip()[:LONGEST])
        name = (incident.key, incident.node if not incident.key else "", incident.reason, incident.message)
        with self._lock:
            before = self._found.pop(name, None)
            if before is not None:
                count = max(before.count, incident.count) if total else before.count + incident.count
                incident = replace(incident, at_ms=max(before.at_ms, incident.at_ms), count=count)
            self._found[name] = incident
            while len(self._found) > MOST:
                del self._found[next(iter(self._found))]

    def about(self, job_id: JobId, nodes: Collection[NodeName]) -> list[Incident]:
        """Oldest first. O(all that is kept)."""
        with self._lock:
            kept = list(self._found.values())
        mine = [one for one in kept if (parse_key(one.key).job_id == job_id if one.key else one.node in nodes)]
        return sorted(mine, key=lambda one: (one.at_ms, one.key, one.reason))[-MOST_SHOWN:]
