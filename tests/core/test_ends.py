"""When running jobs end, kept in order."""

from __future__ import annotations

from jobsched.core.policies.ends import Ends
from jobsched.sim.run import POLICIES, Simulation
from jobsched.sim.workload import synthetic


def test_nothing_is_kept_of_jobs_that_are_gone_although_nobody_asks() -> None:
    for policy in ("fifo", "easy"):
        simulation = Simulation(synthetic(60, seed=1), POLICIES[policy], policy)
        simulation.run()
        with simulation.controller.view() as (cluster, _):
            if policy == "easy":
                assert cluster.ends.soonest(10, cluster.jobs, cluster.estimates, 1 << 50) == []
            assert cluster.ends == Ends(), policy
