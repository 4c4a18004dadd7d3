"""Who is the odd one out: the replica that a hang starts from, told by steps and stacks. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from jobsched.core.job import ReplicaId

_FRAME = re.compile(r'^\s*(?:File "(?P<file>[^"]+)", line \d+,? in )?(?P<name>[\w.<>]+)(?: \((?P<place>[^)]*)\))?\s*$')
WAITING = (
    "all_reduce", "allreduce", "all_gather", "barrier", "broadcast", "_wait", "wait", "recv", "poll", "recv_multipart",
)  # fmt: skip
"""Function names that mean "waits for its peers"."""


def odd_one_out(
    steps: Mapping[ReplicaId, int], stacks: Mapping[ReplicaId, str], suspects: Sequence[ReplicaId]
) -> ReplicaId:
    """The suspect to blame: lowest step; among equals one whose stack does not wait for peers; then one whose innermost
    frame is the rarest; then the first by name. `suspects` must not be empty."""
    frames = {rid: frame_names(text) for rid, text in stacks.items()}
    top = Counter(names[0] for names in frames.values() if names)

    def blame(rid: ReplicaId) -> tuple[int, bool, int, str]:
        names = frames.get(rid, [])
        waits = not names or any(name.split(".")[-1] in WAITING for name in names)
        return (steps.get(rid, -1), waits, top[names[0]] if names else 0, rid)

    return min(suspects, key=blame)


def frame_names(stack: str) -> list[str]:
    """Function names of the main thread, innermost first, from py-spy's or faulthandler's text."""
    names: list[str] = []
    inside = False
    for line in stack.splitlines():
        if line.startswith(("Thread", "Current thread")):
            inside = "MainThread" in line or line.startswith("Current thread")
            continue
        match = _FRAME.match(line) if inside and line.startswith((" ", "\t")) else None
        if match:
            names.append(match["name"])
    return names
