"""Crash loops: the server dies at its N-th call of a port, before or after the call took effect, for N = 1, 2, …
until the scenario completes without a crash. Every N ends in the same final state, nothing is bound twice, nothing is
left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from jobsched.core import events as ev
from jobsched.core.job import Job, Phase
from jobsched.core.launch import Launch
from jobsched.core.lifecycle import evolve_job
from jobsched.core.resources import JobId
from jobsched.sim.backend import Script
from jobsched.store.memory import MemoryStore
from tests.world import World, a_ps_spec, a_spec

WATCHED = ("append", "observe", "start", "stop", "forget", "ask_stacks", "read", "load", "lease", "add_samples")
MOST_CALLS = 400


class ServerDied(Exception):
    """The process is gone: nothing in memory survives."""


class Trap:
    """Forwards to a port, counting calls; the N-th of all traps sharing `fuse` dies, once."""

    def __init__(self, target: Any, fuse: dict[str, Any]) -> None:
        self._target, self._fuse = target, fuse

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._target, name)
        if name not in WATCHED:
            return attribute

        def call(*args: Any, **kwargs: Any) -> Any:
            fuse = self._fuse
            fuse["calls"] += 1
            dies = fuse["calls"] == fuse["at"]
            if dies and not fuse["after"]:
                raise ServerDied(name)
            result = attribute(*args, **kwargs)
            if dies:
                raise ServerDied(name)
            return result

        return call


def until(world: World, done: Callable[[], bool]) -> None:
    while True:
        try:
            world.run_until(done)
        except ServerDied:
            world.boot()
        else:
            return


def ps_job(world: World) -> list[JobId]:
    """submit -> run -> fail -> restart in place -> gang restart -> succeed, with a second job waiting behind."""
    first = world.submit(a_ps_spec(restart={"retry_on": [7]}))
    second = world.submit(a_spec(roles={"worker": {"command": "x", "gpu": "any:4", "replicas": 3}}))
    until(world, lambda: world.job(first).phase is Phase.RUNNING)
    world.engine.kill(world.key(first, "worker", 0))
    until(world, lambda: world.job(first).restarts == 1 and sum(first in key for key in world.engine.alive()) == 5)
    world.wish(ev.JobRestartRequested(world.clock.now_ms(), first, "me"))
    ends = (Phase.SUCCEEDED, Phase.FAILED)
    until(world, lambda: world.job(first).phase in ends and world.job(second).phase in ends)
    for _ in range(3):
        until(world, lambda: not world.engine.alive())
    return [first, second]


def scripts(launch: Launch) -> Script:
    return Script() if "/ps/" in launch.key else Script(run_ms=5_000, step_ms=500, save_ms=100)


@pytest.mark.parametrize("after", [False, True], ids=["before-effect", "after-effect"])
def test_a_crash_at_every_call_of_a_port_ends_the_same(after: bool) -> None:
    crashes = 0
    for at in range(1, MOST_CALLS):
        fuse: dict[str, Any] = {"calls": 0, "at": at, "after": after}
        store = MemoryStore()
        world = World(
            nodes=2,
            scripts=scripts,
            store=Trap(store, fuse),  # type: ignore[arg-type]
            wrap=lambda backend, fuse=fuse: Trap(backend, fuse),  # type: ignore[misc]
        )
        # Reads and wishes of the test itself do not count.
        world.store = store
        jobs = [store.job(i) for i in ps_job(world)]
        final = [(j.phase, j.attempt, j.restarts) for j in jobs if j is not None]
        assert final == [(Phase.SUCCEEDED, 2, 2), (Phase.SUCCEEDED, 1, 0)], f"died at call {at}: {final}"
        assert not world.engine.alive(), f"died at call {at}: orphans {list(world.engine.alive())}"
        replay(store)
        if fuse["calls"] < at:
            break
        crashes += 1
    else:
        pytest.fail(f"the scenario still calls a port after {MOST_CALLS} calls")
    assert crashes > 50


def replay(store: MemoryStore) -> None:
    """The log alone gives the projections, without gaps or doubles."""
    jobs: dict[JobId, Job] = {}
    for place, stored in enumerate(store.read(0), start=1):
        assert stored.seq == place
        job_id = stored.event.job_id
        if job_id is not None:
            jobs[job_id] = evolve_job(jobs.get(job_id), stored.event)  # type: ignore[arg-type]
    for job_id, job in jobs.items():
        assert store.job(job_id) == job
