"""Expected starts keep what they claim, on a workload of which nobody tells run times."""

from __future__ import annotations

from jobsched.sim.workload import synthetic
from tests.benchmarks.starts import measured


def test_bands_hold_about_as_often_as_they_claim() -> None:
    seen = measured(synthetic(jobs=1_500, seed=3, load=1.3), one_in=5)
    assert seen.asked > 80
    assert seen.told > 0.5 * seen.asked
    assert 0.3 < seen.by_half / seen.told < 0.75
    assert seen.by_nine_tenths / seen.told > 0.8
