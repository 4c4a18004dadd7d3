"""Fair share: which queue's turn it is. Dominant resource fairness (Ghodsi, NSDI'11) over a tree of cohorts, compared
level by level from the root as in Slurm's Fair Tree, so that a cohort's share does not grow with its number of queues.

Queues within their quota go before those that borrow (Kueue); among equals, the one whose dominant share per weight is
smallest: what it holds now, and what it held on average in the past, with a half-life (Slurm, Kueue's usage-based fair
sharing). Everything that starts pays an entry, so that a burst of short jobs counts before it is over. Shares are
counted in `SCALE`ths of the cluster. Past use outlives its leader (`core.recall`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jobsched.core.policies.quota import Account

SCALE = 10**9
NEVER = 10**18
"""The share of a queue of weight 0: it comes when nobody else wants anything."""

Turn = tuple[tuple[int, int], ...]
"""(borrowed share, share) per level, root first; the smallest goes first."""


@dataclass(frozen=True, slots=True)
class FairShare:
    """How queues take turns."""

    half_life_ms: int = 0
    """After which past use counts half; 0: only what is held now counts."""
    entry_ms: int = 60_000
    """What starts counts as held for so long already."""


def turn(
    account: Account, capacity: Mapping[str, int], needs: Mapping[str, int], how: FairShare, now_ms: int
) -> Turn:
    """When a queue's turn comes, by its share and whether it would borrow if a job took `needs` (limit -> amount).
    `capacity`: resource -> how much the cluster has. O(depth)."""
    return tuple(
        (borrowed(each, capacity, needs), _weighed(each, share(each, capacity, how, now_ms)))
        for each in reversed(account.path)
    )


def share(account: Account, capacity: Mapping[str, int], how: FairShare, now_ms: int) -> int:
    """Its dominant share now and in the past: the larger the sum, the later its turn."""
    now, half_life_ms = dominant(account, capacity), how.half_life_ms
    if not half_life_ms:
        return now
    past = [account.average(r, now_ms, half_life_ms) * SCALE / n for r, n in capacity.items() if n]
    return now + round(max(past, default=0.0))


def dominant(account: Account, capacity: Mapping[str, int]) -> int:
    """The largest part of any resource that the account holds."""
    return max([n * SCALE // capacity[r] for r, n in account.held.items() if n and capacity.get(r)], default=0)


def borrowed(account: Account, capacity: Mapping[str, int], needs: Mapping[str, int]) -> int:
    """The largest part of any limited resource that it would hold above its quota, per weight; 0 within its quota."""
    if account.parent is None:
        return 0
    above = ((key, n - account.own_room(key)) for key, n in needs.items())
    return _weighed(account, max((n * SCALE // max(1, capacity.get(k, 0)) for k, n in above if n > 0), default=0))


def _weighed(account: Account, part: int) -> int:
    return part // account.weight if account.weight else NEVER
