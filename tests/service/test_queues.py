"""Queues and what was used in them."""

from __future__ import annotations

from tests.stage import Stage


def test_usage_in_gpu_hours(stage: Stage) -> None:
    stage.clock.time_ms += 1
    job = stage.submit(roles={"worker": {"command": "x", "gpu": "any:2"}})
    stage.clock.time_ms += 60_000
    stage.run(job)
    stage.clock.time_ms += 1_800_000
    (used,) = stage.service.usage()
    assert (used.queue, used.owner, used.jobs, used.gpu_hours) == ("default", "ann", 1, 1.0)
    assert (used.mean_wait_s, used.longest_wait_s) == (60.0, 60.0)


def test_queues_count_waiting_and_active(stage: Stage) -> None:
    stage.run(stage.submit())
    stage.submit()
    queue = stage.service.queues()[0]
    assert (queue.waiting, queue.active, queue.gpus_in_use) == (1, 1, 1.0)
