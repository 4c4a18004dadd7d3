"""Actuate: carry out converge's actions on a backend. Every act is idempotent, so nothing is remembered here."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import assert_never

from jobsched.core.launch import Action, AskStacks, Forget, Launch, Start, Stop
from jobsched.core.observation import Sight
from jobsched.core.resources import JobId
from jobsched.ports import Backend


def actuate(
    backend: Backend, actions: Iterable[Action], sight: Sight, now_ms: int, secret: bytes,
    assert_leading: Callable[[], None],
) -> None:  # fmt: skip
    """Stops first, so that what they free is free when the starts arrive. Raises BackendUnreachable: the rest is done
    by the next tick; and what `assert_leading` raises, which is asked before each call, as the one before may have
    taken longer than a lease lasts."""
    starts: list[Launch] = []
    for action in actions:
        if isinstance(action, Start):
            starts += action.launches
            continue
        assert_leading()
        match action:
            case Forget():
                backend.forget(action.keys)
                sight.forget(action.keys)
            case Stop():
                backend.stop(action.keys, action.grace_ms)
            case AskStacks():
                backend.ask_stacks(action.keys)
            case _:
                assert_never(action)
    if starts:
        assert_leading()
        for launch in starts:
            sight.ordered_at_ms[launch.key] = now_ms
            sight.by_job.setdefault(JobId(launch.contract.job_id), set()).add(launch.key)
        backend.start([_with_secrets(launch, secret) for launch in starts] if secret else starts)


def _with_secrets(launch: Launch, secret: bytes) -> Launch:
    """Each attempt has a token that lets its replicas report; each job a secret by which they know each other."""
    job_id, attempt = launch.contract.job_id, launch.contract.attempt

    def derived(purpose: str) -> str:
        return hmac.new(secret, purpose.encode(), hashlib.sha256).hexdigest()[:32]

    token, shared = derived(f"attempt/{job_id}/{attempt}"), derived(f"job/{job_id}")
    return replace(launch, contract=replace(launch.contract, token=token, secret=shared))
