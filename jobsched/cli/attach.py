"""Watching a job until it ends: `run`, `submit --wait`, `wait`, `logs -f`. One live line on a terminal, plain lines
elsewhere.

Used by the commands of `submit` and `jobs`. Leaving (Ctrl-C) never touches the job.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial

from jobsched.cli import render
from jobsched.cli.connection import path_of
from jobsched.cli.render import View, duration, talk
from jobsched.client.documents import TERMINAL, Document, cause_sentence, exit_code, log_lines
from jobsched.client.interleave import interleave
from jobsched.client.remote import Remote
from jobsched.errors import JobschedError, UsageError, WaitTimeout

LOST_TOUCH = 125
"""Exit code of an attached command that lost its server (`docker run` and `env` do the same)."""
PLAIN_INTERVAL_S = 5.0
"""Least time between two progress lines where nothing can be overwritten."""
REDRAW_S = 1.0
ASK_S = (2.0, 30.0)
"""When a job that waits is first, and then again, asked for its expected start."""


class StatusLine:
    """The last line of a terminal's stderr, redrawn in place; lines written above it push it down. In a pipe: a line
    when the phase or the reason changes, and progress now and then."""

    def __init__(self) -> None:
        self._live = render.styled(sys.stderr) and sys.stderr.isatty()
        self._text = ""
        self._said: tuple[str, ...] = ()
        self._said_at = 0.0

    def show(self, document: Document) -> None:
        text = status(document)
        if self._live:
            self._text = text[: shutil.get_terminal_size().columns - 1]
            self._draw()
            return
        state = (document["phase"], document["reason"], str(document["attempts"]), str(document["restarts"]),
                 "foreseen" if (document.get("verdict") or {}).get("starts_before_ms") else "")
        if state != self._said or time.monotonic() - self._said_at > PLAIN_INTERVAL_S:
            self._said, self._said_at = state, time.monotonic()
            talk(text)

    def above(self, write: Callable[[], None]) -> None:
        """Write something that stays."""
        self.clear()
        write()
        if self._live and self._text:
            self._draw()

    def clear(self) -> None:
        if self._live and self._text:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()

    def _draw(self) -> None:
        sys.stderr.write(f"\r\x1b[2K{self._text}")
        sys.stderr.flush()


def status(document: Document) -> str:
    """One line: phase, why or how far, numbers, replicas."""
    glyph, _ = render.PHASES[document["phase"]]
    parts = [f"{glyph} {document['name']} {document['phase']}"]
    progress = document.get("progress")
    if progress and progress["step"] >= 0:
        parts.append(f"step {progress['step']}" + (f"/{progress['total']}" if progress["total"] > 0 else ""))
        parts += [f"{name} {value:.4g}" for name, value in document["metrics"].items()]
    if progress and progress["replicas"]:
        running = sum(1 for r in progress["replicas"] if r["state"] == "running")
        parts.append(f"replicas {running}/{len(progress['replicas'])}")
    if document["restarts"]:
        parts.append(f"restarts {document['restarts']}")
    headline = document["headline"] or document["reason"]
    if headline and not (progress and progress["step"] >= 0):
        parts.append(headline)
    verdict = document.get("verdict")
    if verdict and verdict.get("position"):
        parts.append(f"place {verdict['position']}")
    if verdict and verdict.get("starts_before_ms"):
        parts.append(f"starts in about {duration(verdict['starts_before_ms'] - int(time.time() * 1_000))}")
    return " · ".join(parts)


def follow(
    remote: Remote, answer: Document, view: View, *, timeout_s: float | None = None, begun: str = "submitted"
) -> int:
    """Show logs and progress of a job until it ends; the exit code is the job's. Logs go to stdout, with
    JSON output to stderr; Ctrl-C and a time-out only leave."""
    document = render.job_document(answer)
    ref, line = document["id"], StatusLine()
    until = None if timeout_s is None else time.monotonic() + timeout_s
    ask_at, starts_ms = time.monotonic() + ASK_S[0], 0
    replicas = sum(role["replicas"]["prefer"] for role in document["spec"]["roles"].values())
    if not view.quiet:
        talk(f"{begun} {document['name']} ({ref})")
    out = sys.stderr if view.json else sys.stdout
    logs = (("log", item) for item in log_lines(remote, ref, follow=True))
    news: Iterator[tuple[str, Document]] = (("job", item) for item in job_updates(remote, ref))
    silence = REDRAW_S if until is None else min(REDRAW_S, max(0.05, timeout_s or 0))
    try:
        with closing(interleave(logs, news, silence_s=silence)) as items:
            for item in items:
                if item is not None and item[0] == "log":
                    text = log_text(item[1], prefix=replicas > 1)
                    line.above(partial(print, text, file=out, flush=True))
                elif item is not None:
                    document = item[1] if item[1]["metrics"] else {**item[1], "metrics": document["metrics"]}
                    if view.format == "jsonl":
                        line.above(partial(render.write_json, {"type": "progress", **document}))
                    if not view.quiet:
                        line.show(_starting(document, starts_ms))
                if document["phase"] == "QUEUED" and not view.quiet and time.monotonic() >= ask_at:
                    ask_at, starts_ms = time.monotonic() + ASK_S[1], expected_start(remote, ref)
                    line.show(_starting(document, starts_ms))
                if until is not None and time.monotonic() > until:
                    line.clear()
                    raise WaitTimeout(
                        f"job {document['name']} is {document['phase']} after {timeout_s:g} s; it goes on",
                        hint=f"jobsched logs -f {ref}; jobsched cancel {ref}",
                    )
        line.clear()
        return ended(remote, ref, view, document["metrics"])
    except KeyboardInterrupt:
        line.clear()
        talk(f"detached; the job goes on\n  jobsched logs -f {ref}\n  jobsched cancel {ref}")
        return 130
    except WaitTimeout:
        raise
    except JobschedError as exc:  # the server is gone, or tells in a stream what is wrong with it
        line.clear()
        talk(f"{exc.render()}\nlost touch with the job; it goes on\n  jobsched logs -f {ref}")
        return LOST_TOUCH


def expected_start(remote: Remote, ref: str) -> int:
    """When a waiting job starts at the latest, most likely (ms); 0: nobody can tell."""
    with suppress(JobschedError):  # the next look shows what is wrong
        verdict = remote.documents(f"jobs/{ref}/why").get("verdict")
        return int(verdict["starts_before_ms"]) if verdict else 0
    return 0


def _starting(document: Document, starts_ms: int) -> Document:
    """With what was last heard of its start."""
    verdict = document.get("verdict")
    return {**document, "verdict": {**verdict, "starts_before_ms": starts_ms}} if verdict and starts_ms else document


def ended(remote: Remote, ref: str, view: View, metrics: Document) -> int:
    """Say how a job ended; its exit code. Metrics are the newest of what was watched and what was sampled."""
    document = fetch(remote, ref)
    samples = remote.documents(f"jobs/{ref}/samples", limit=1)
    document["metrics"] = dict(samples[-1]["metrics"]) if samples else metrics
    code = exit_code(document)
    if view.json:
        shown = ("id", "name", "phase", "reason", "attempts", "restarts", "metrics", "headline", "cause", "checkpoint",
                 "submitted_at_ms", "first_started_at_ms", "ended_at_ms", "ran_ms")
        render.write_json({"exit_code": code, **{name: document[name] for name in shown}})
        return code
    if not view.quiet:
        took = duration(document["ended_at_ms"] - document["submitted_at_ms"])
        talk(f"{render.PHASES[document['phase']][0]} {document['name']} {document['phase']} after {took}, "
             f"{render.count(document['attempts'], 'attempt')}, {render.count(document['restarts'], 'restart')}")
        if document["cause"] and document["phase"] == "FAILED":
            talk(f"  {cause_sentence(document['cause'])}\n  jobsched why {ref}")
    return code


def wait(remote: Remote, ref: str, until: str, timeout_s: float | None) -> int:
    """Wait quietly; 0 when the job got there (for `done`: the job's own code). Raises `WaitTimeout`."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    document = fetch(remote, ref)
    while not (there := reached(document, until)) and document["phase"] not in TERMINAL:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise WaitTimeout(f"job {document['name']} is {document['phase']} after {timeout_s:g} s",
                              hint=document["headline"])
        with closing(interleave(job_updates(remote, document["id"]), silence_s=left)) as updates:
            for update in updates:
                if update is None or (deadline is not None and time.monotonic() > deadline):
                    break
                document = update
                if reached(document, until):
                    break
        if not reached(document, until):
            document = fetch(remote, ref)
    return exit_code(document) if until == "done" or not there else 0


def reached(document: Document, until: str) -> bool:
    """Whether a job is where `--for` says."""
    match until:
        case "done":
            return document["phase"] in TERMINAL
        case "succeeded":
            return bool(document["phase"] == "SUCCEEDED")
        case "running":
            return document["phase"] in ("RUNNING", "SUCCEEDED")
        case step if step.isdecimal():
            return bool(document["progress"] and document["progress"]["step"] >= int(step))
        case _:
            raise UsageError(f"cannot wait for {until!r}", hint="--for running, done, succeeded or a step number")


def fetch(remote: Remote, ref: str) -> Document:
    return render.job_document(remote.documents(path_of(remote, ref)))


def job_updates(remote: Remote, ref: str) -> Iterator[Document]:
    """The job each time its phase or progress changes, until it has ended."""
    for sent in remote.stream("progress", job=ref):
        if sent.event != "reconnected":
            yield render.job_document(json.loads(sent.data))


def log_text(line: Document, *, prefix: bool) -> str:
    return f"[{line['role']}/{line['index']}] {line['text']}" if prefix else str(line["text"])
