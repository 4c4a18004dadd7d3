"""Shares: what every queue and cohort holds, borrows and lends, as `jobsched queues` shows it. Called by `service`."""

from __future__ import annotations

from collections.abc import Mapping

from jobsched.core.answers import Holding, QueueAnswer
from jobsched.core.cluster import Cluster
from jobsched.core.policies.fairness import SCALE, dominant
from jobsched.core.policies.quota import HOUR_MS, Account
from jobsched.core.resources import WHOLE_GPU
from jobsched.spec.queue import GPUS, MEMORY, QueueSpec


def queue_answers(cluster: Cluster, now_ms: int) -> tuple[QueueAnswer, ...]:
    """Every queue and cohort, cohorts before their members, by name. O(jobs)."""
    own: dict[str, list[int]] = {}
    for job in cluster.jobs.values():
        counts = own.setdefault(job.spec.queue, [0, 0])
        counts[job.phase.active] += 1
    accounts = cluster.quotas.accounts
    totals = {name: [0, 0] for name in accounts}
    for name, (waiting, active) in own.items():
        for account in cluster.quotas.account(name).path:
            total = totals.setdefault(account.name, [0, 0])
            total[0] += waiting
            total[1] += active
    order = sorted(accounts.values(), key=lambda a: [each.name for each in reversed(a.path)])
    capacity = cluster.fleet.capacity()
    return tuple(_answer(a, totals[a.name], capacity, now_ms) for a in order if a.spec or a.members or a.name in own)


def _answer(account: Account, counts: list[int], capacity: Mapping[str, int], now_ms: int) -> QueueAnswer:
    spec = account.spec or QueueSpec(name=account.name)
    left = None
    if spec.budget is not None:
        left = max(0.0, spec.budget.gpu_hours - account.spent(now_ms) / WHOLE_GPU / HOUR_MS)
    return QueueAnswer(
        spec, counts[0], counts[1], account.held.get(GPUS, 0) / WHOLE_GPU, len(account.path) - 1, account.members > 0,
        dominant(account, capacity) / SCALE, tuple(_holding(account, key) for key in account.root.nominal), left,
    )  # fmt: skip


def _holding(account: Account, key: str) -> Holding:
    unit = 1 if key == MEMORY else WHOLE_GPU
    numbers = (
        account.nominal.get(key, 0), account.used.get(key, 0), account.borrowed(key), account.lent(key),
        max(0, account.room(key)),
    )  # fmt: skip
    return Holding(key, *(number / unit for number in numbers))
