"""What reports count."""

from __future__ import annotations

from jobsched.core import events as ev
from jobsched.core.accounting import Accounts
from jobsched.core.job import Binding, Phase
from jobsched.core.resources import GpuId, GpuShare, JobId, NodeName
from tests.world import a_gpu_node, a_spec


def test_nodes_on_demand_count_while_they_are_there() -> None:
    """Ten minutes on the one node that always is; in the last five a node more, for a job that waited."""
    first, second = JobId("a"), JobId("b")
    spec = a_spec(roles={"worker": {"command": "x", "gpu": "any:8"}})

    def whole(name: str) -> tuple[Binding, ...]:
        return (Binding("worker", 0, NodeName(name), tuple(GpuShare(GpuId(f"{name}-g{i}")) for i in range(8))),)

    minute = 60_000
    accounts = Accounts.of([a_gpu_node("n1", 8)], [
        ev.NodeSeen(0, a_gpu_node("n1", 8)),
        ev.JobSubmitted(minute, first, first, "me", spec),
        ev.JobSubmitted(minute, second, second, "me", spec),
        ev.AttemptPlaced(minute, first, 1, whole("n1")),
        ev.NodeSeen(6 * minute, a_gpu_node("burst-1", 8)),
        ev.AttemptPlaced(6 * minute, second, 1, whole("burst-1")),
        ev.AttemptEnded(11 * minute, second, 1, Phase.SUCCEEDED),
        ev.AttemptEnded(11 * minute, first, 1, Phase.SUCCEEDED),
        ev.NodeLost(12 * minute, NodeName("burst-1")),
    ], 0)  # fmt: skip
    summary = accounts.summary()
    assert (summary.gpu_allocation_pct, summary.fragmentation_pct) == (100.0, 0.0)
    assert (summary.makespan_s, accounts.capacity_milli) == (600.0, 8_000)
