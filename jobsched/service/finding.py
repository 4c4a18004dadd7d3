"""The job that a person means, and a guess at what was meant instead."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from jobsched.core.job import Job
from jobsched.core.resources import JobId
from jobsched.errors import Conflict, NotFound
from jobsched.ports import JobQuery, Store

ID = re.compile(r"[0-9a-hjkmnp-tv-z]{26}")
ID_PREFIX = re.compile(r"[0-9a-hjkmnp-tv-z]{4,25}")


def resolve(store: Store, ref: str, *, owner: str = "") -> Job:
    """The job that a reference means: full id, name (the newest so called), unique id prefix, or "@last" (the
    newest, of `owner` if given). Raises `NotFound` with a suggestion, `Conflict` when a prefix means several."""
    if ref == "@last":
        newest = store.jobs(JobQuery(owner=owner, limit=1))
        if not newest:
            raise NotFound("there is no job yet", hint="submit one with 'jobsched submit FILE'")
        return newest[0]
    lower = ref.lower()
    if ID.fullmatch(lower) and (job := store.job(JobId(lower))):
        return job
    if named := store.jobs(JobQuery(name=ref, limit=1)) if ref else ():
        return named[0]
    found = store.jobs(JobQuery(id_prefix=lower, limit=6)) if ID_PREFIX.fullmatch(lower) else ()
    if len(found) == 1:
        return found[0]
    if found:
        listed = ", ".join(f"{job.id} ({job.name})" for job in found[:5]) + (", …" if len(found) > 5 else "")
        raise Conflict(f"{ref!r} is the beginning of several job ids", hint=f"one of {listed}")
    names = [job.name for job in store.jobs(JobQuery(limit=500))]
    raise NotFound(f"there is no job {ref!r}", hint=suggest(ref, names, ""))


def suggest(wrong: str, known: Iterable[str], kind: str) -> str:
    names = sorted(set(known))
    close = difflib.get_close_matches(wrong, names, n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"{kind}: {', '.join(names[:20]) or 'none'}" if kind else "'jobsched jobs -a' lists every job"
