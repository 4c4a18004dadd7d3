"""Lines: whoever joins and leaves in whatever order, each index names the same lines, each in order."""

from __future__ import annotations

from random import Random

from jobsched.core.job import RoleShape, Shape
from jobsched.core.ledger import Stock
from jobsched.core.lines import LineKey, Lines, Place
from jobsched.core.policies.parts import pool_key
from jobsched.core.resources import JobId


def a_shape(gpus: int) -> Shape:
    return Shape((RoleShape("worker", 1, 1, 0, 0, 1_000 * gpus),))


def test_indexes_agree_whoever_comes_and_goes() -> None:
    random, lines, there = Random(3), Lines(), dict[JobId, tuple[LineKey, Place]]()
    for serial in range(600):
        if there and random.random() < 0.45:
            job_id = random.choice(list(there))
            key, place = there.pop(job_id)
            lines.leave(lines[key], pool_key(key.shape), place, starts=False)
        else:
            key = LineKey(f"q{random.randrange(3)}", random.randrange(2), a_shape(random.randrange(1, 4)),
                          outlook=(random.randrange(2),))  # fmt: skip
            place = Place(random.randrange(3), random.randrange(serial // 2, serial + 1), JobId(f"j{serial:03}"))
            there[place.job_id] = (key, place)
            assert lines.join(key, pool_key(key.shape), Stock(()), place) is lines[key]
        expected: dict[LineKey, list[Place]] = {}
        for key, place in there.values():
            expected.setdefault(key, []).append(place)
        assert {key: line.places for key, line in lines.items()} == {k: sorted(p) for k, p in expected.items()}
        assert {key for found in lines.of_queue.values() for key in found} == set(expected)
        akin = {(k.akin(), key) for found in lines.of_pool.values() for k, same in found.items() for key in same}
        assert akin == {(key.akin(), key) for key in expected}
        assert all(lines.of_queue.values())
        assert lines.waiting == len(there)


def test_a_queue_is_no_longer_stuck_when_one_of_its_jobs_comes_or_goes() -> None:
    lines, key = Lines(), LineKey("q", 0, a_shape(1))
    first, second = Place(0, 1, JobId("a")), Place(0, 2, JobId("b"))
    lines.stuck["q"] = lines.join(key, pool_key(key.shape), Stock(()), first)
    lines.join(key, pool_key(key.shape), Stock(()), second)
    assert not lines.stuck
    lines.stuck["q"] = lines[key]
    lines.leave(lines[key], pool_key(key.shape), first, starts=False)
    assert not lines.stuck
    lines.leave(lines[key], pool_key(key.shape), second, starts=False)
    assert not lines
    assert not lines.of_queue
    assert not lines.of_pool
