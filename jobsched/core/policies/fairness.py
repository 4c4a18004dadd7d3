"""Fair share: which queue's turn it is. Dominant resource fairness (Ghodsi, NSDI'11) over a tree of cohorts, compared
level by level from the root as in Slurm's Fair Tree, so that a cohort's share does not grow with its number of queues.

Queues within their quota go before those that borrow (Kueue); among equals, the one whose dominant share per weight is
smallest. Integers only: shares are counted in `SCALE`ths of the cluster.
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


def turn(account: Account, capacity: Mapping[str, int], needs: Mapping[str, int]) -> Turn:
    """When a queue's turn comes, by what is held now and whether it would borrow if a job took `needs` (limit ->
    amount). `capacity`: resource -> how much the cluster has. O(depth)."""
    return tuple((borrowed(each, capacity, needs), share(each, capacity)) for each in reversed(account.path))


def share(account: Account, capacity: Mapping[str, int]) -> int:
    """Its dominant share, per weight."""
    return _weighed(account, dominant(account, capacity))


def dominant(account: Account, capacity: Mapping[str, int]) -> int:
    """The largest part of any resource that the account holds."""
    return max((n * SCALE // capacity[r] for r, n in account.held.items() if n and capacity.get(r)), default=0)


def borrowed(account: Account, capacity: Mapping[str, int], needs: Mapping[str, int]) -> int:
    """The largest part of any limited resource that it would hold above its quota, per weight; 0 within its quota."""
    if account.parent is None:
        return 0
    above = ((key, n - account.own_room(key)) for key, n in needs.items())
    return _weighed(account, max((n * SCALE // max(1, capacity.get(k, 0)) for k, n in above if n > 0), default=0))


def _weighed(account: Account, part: int) -> int:
    return part // account.weight if account.weight else NEVER
