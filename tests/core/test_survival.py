"""Buckets of run time. What tables and indexes say of jobs is in test_estimate."""

from __future__ import annotations

from jobsched.core.policies.survival import BUCKETS, PER_DOUBLING, bucket_of

MINUTE_MS = 60_000


def test_buckets_double() -> None:
    found = [bucket_of(ms) for ms in (0, 1, MINUTE_MS - 1, MINUTE_MS, 2 * MINUTE_MS, 4 * MINUTE_MS)]
    assert found == [0, 0, 0, 1, 1 + PER_DOUBLING, 1 + 2 * PER_DOUBLING]
    assert bucket_of(1 << 60) == BUCKETS - 1
