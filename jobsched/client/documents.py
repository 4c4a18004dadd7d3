"""Bodies of the API as plain documents: what needs no models, so that commands start fast.

Shared by the SDK and the CLI. Knows the wire form of `core.answers` and nothing about how it is shown.
"""

from __future__ import annotations

import getpass
import json
import os
import signal
import uuid
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from jobsched.client.remote import Remote
from jobsched.errors import NotFound

Document = dict[str, Any]
TERMINAL = ("SUCCEEDED", "FAILED", "CANCELLED")


def submission(spec: Mapping[str, Any], *, if_exists: str = "", hold: bool = False) -> Document:
    """Body of POST /v1/jobs, with a fresh idempotency key."""
    return {"spec": spec, "request_id": uuid.uuid4().hex, "owner": user(), "hold": hold, "if_exists": if_exists}


def reference(ref: str) -> str:
    """What a user called a job, as one segment of a URL. Raises `NotFound` for what no job can be called."""
    if not ref.strip() or "/" in ref:
        raise NotFound(f"there is no job {ref!r}", hint="name it by its id, the beginning of one, its name, or @last")
    return quote(ref, safe="@")


def user() -> str:
    """Who asks, as far as this machine knows."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a passwd entry
        return str(os.getuid())


def log_lines(remote: Remote, ref: str, **selection: Any) -> Iterator[Document]:
    """Log lines of a job as documents {role, index, rank, attempt, restart, offset, text}, each once: a stream that
    had to begin anew after its server went away is read past what was seen already."""
    seen: dict[tuple[str, int, int, int], int] = {}
    again = False
    for sent in remote.stream(f"jobs/{ref}/logs", **selection):
        if sent.event == "reconnected":
            again = True
            continue
        line = json.loads(sent.data)
        replica = (line["role"], line["index"], line.get("attempt", 0), line.get("restart", 0))
        offset = line.get("offset", 0)
        if again and offset <= seen.get(replica, -1):
            continue
        seen[replica] = max(offset, seen.get(replica, -1))
        yield line


def saved_since(before: Mapping[str, Any] | None, now: Mapping[str, Any] | None, step: int) -> bool:
    """Whether a checkpoint came after `before` (both as in a job's document); where the training had not gone on since
    that one (it stood at `step`), there is nothing new to save."""
    return now is not None and (now != before or now["step"] >= step >= 0)


def cause_sentence(cause: Mapping[str, Any]) -> str:
    """The root cause in one line: what happened, to which rank, where, whose fault."""
    who = f"{cause['role']}/{cause['index']}" if cause.get("role") else "the job"
    code, number, node = cause.get("exit_code"), cause.get("signal"), cause.get("node")
    said = cause.get("message") or (f"ended: {cause.get('reason') or 'unknown'}" + (f" {number}" if number else ""))
    facts = {
        f"rank {cause.get('rank')}": cause.get("rank", -1) >= 0,
        f"node {node}": bool(node) and str(node) not in said,
        f"exit code {code}": code is not None and f"code {code}" not in said,
        f"fault: {cause.get('failure_class')}": bool(cause.get("failure_class")),
    }
    more = ", ".join(text for text, holds in facts.items() if holds)
    what = said if not cause.get("role") or who in said else f"{who}: {said}"
    return f"{what} ({more})" if more else what


def exit_code(job: Mapping[str, Any]) -> int:
    """What an attached command exits with: the job's own code, 128+N for a signal, 124 for a time limit, 125 when
    there is no code because jobsched or its machines failed; a cancelled job counts as ended by SIGTERM."""
    if job["phase"] == "SUCCEEDED":
        return 0
    if job["phase"] == "CANCELLED":
        return 128 + signal.SIGTERM
    cause = job.get("cause") or {}
    reason = cause.get("reason") or job.get("reason")
    if reason in ("TimeLimit", "QueueDeadline"):
        return 124
    if cause.get("exit_code"):
        return int(cause["exit_code"])
    if cause.get("signal"):
        return 128 + int(cause["signal"])
    return 125
