"""Which jobs are alike: what a user runs again and again has one key, under which its like have taught something."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import takewhile

from jobsched.core.job import Job

Key = tuple[object, ...]
_COUNTER = re.compile(r"[-_.]?[0-9a-f]*[0-9]+[0-9a-f]*$")
"""What tells the runs of one name apart; names that the server makes up end in digits too."""


def family_of(job: Job) -> Key:
    """What the job has in common with its like; its GPUs come last."""
    spec = job.spec
    runs = tuple([(name, role.image, _program(role.command)) for name, role in spec.roles.items()])
    return (spec.queue, job.owner, spec.image, runs, gpus_milli(job))


def gpus_milli(job: Job) -> int:
    """GPUs that the job wants, in thousandths."""
    gpus, wanted = 0, job.wanted
    for name, role in job.spec.roles.items():
        if (gpu := role.gpu) is not None:
            gpus += gpu.milli * (wanted.get(name, role.replicas.prefer) if wanted else role.replicas.prefer)
    return gpus


def unnumbered(name: str) -> str:
    """The name of a job without what tells its runs apart."""
    return _COUNTER.sub("", name)


def as_key(key: Sequence[object]) -> Key:
    """A key as it was before it was written down as lists."""
    return tuple(as_key(part) if isinstance(part, (list, tuple)) else part for part in key)


@lru_cache(maxsize=10_000)
def _program(command: tuple[str, ...] | str) -> str:
    """`python train.py` of `python train.py --lr 0.1`: a sweep's members differ in what follows."""
    words = command.split() if isinstance(command, str) else command
    return " ".join(takewhile(lambda word: not word.startswith("-"), words))
