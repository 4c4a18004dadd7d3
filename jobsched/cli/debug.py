"""`jobsched debug`: look inside a server and its event log."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import click

from jobsched.cli import attach, render
from jobsched.cli.connection import connected
from jobsched.cli.render import View, output_options
from jobsched.client.documents import Document
from jobsched.errors import NotFound, UsageError


@click.group()
def debug() -> None:
    """Snapshot, replay and verify the event log.

    \b
    Example:
      jobsched debug verify
    """


@debug.command()
@click.pass_context
def snapshot(ctx: click.Context) -> None:
    """Print the live cluster and what was last seen of it as JSON, for a bug report.

    \b
    Example:
      jobsched debug snapshot > snapshot.json
    """
    with connected(ctx) as remote:
        render.write(json.dumps(remote.documents("debug/snapshot"), indent=1) + "\n")


@debug.command()
@output_options
@click.pass_context
def verify(ctx: click.Context, view: View) -> int:
    """Replay the whole event log and compare it with the database and the live cluster. Exit 1 if they differ.

    \b
    Example:
      jobsched debug verify -o json
    """
    with connected(ctx) as remote:
        result = remote.documents("debug/verify")

    def text() -> str:
        head = f"{'ok' if result['ok'] else 'NOT OK'}: {result['events']} events, {result['jobs']} jobs"
        return "\n".join([head, *(f"  {problem}" for problem in result["problems"])])

    render.show_one(view, result, text, key="ok")
    return 0 if result["ok"] else 1


@debug.command()
@click.argument("source", metavar="FILE|JOB")
@click.option("--at", metavar="SEQ|TIME", help="Stop after this event number or RFC 3339 time; default: the end.")
@output_options
@click.pass_context
def replay(ctx: click.Context, source: str, at: str | None, view: View) -> None:
    """Fold the events of a job up to a point, and show the job as it was then.

    SOURCE is a job of the server, or a file (or -) that 'jobsched events JOB -o json' or -o jsonl wrote.

    \b
    Examples:
      jobsched debug replay @last --at 42
      jobsched events JOB -o jsonl > job.jsonl; jobsched debug replay job.jsonl --at 2026-01-31T12:00:00Z
    """
    from pydantic import TypeAdapter

    from jobsched.core.answers import JobAnswer
    from jobsched.core.events import Stored, of_job
    from jobsched.core.job import Job
    from jobsched.core.lifecycle import Illegal, evolve_job

    stored = TypeAdapter(list[Stored]).validate_python(_events(ctx, source))
    job: Job | None = None
    last = 0
    for item in stored:
        if _past(item.seq, item.event.at_ms, at):
            break
        try:
            job = evolve_job(job, of_job(item.event))
        except Illegal as exc:
            render.talk(f"event {item.seq} is not legal: {exc}")
            raise SystemExit(1) from exc
        last = item.seq
    if job is None:
        raise NotFound(f"no event of the job lies before {at}")
    answer = TypeAdapter(JobAnswer).dump_python(JobAnswer(job), mode="json")
    document = {**render.job_document(answer), "seq": last}
    render.show_one(view, document, lambda: f"after event {last}:\n{_as_of(document)}")


def _events(ctx: click.Context, source: str) -> list[Any]:
    if source == "-" or Path(source).is_file():
        return _read(sys.stdin.read() if source == "-" else Path(source).read_text())
    with connected(ctx) as remote:
        job_id = attach.fetch(remote, source)["id"]
        found: list[Any] = []
        while page := remote.documents(f"jobs/{job_id}/events", after=found[-1]["seq"] if found else None,
                                       limit=1_000):
            found += page
    return found


def _read(text: str) -> list[Any]:
    """Events in the wire form, or as `-o json` and `-o jsonl` print them (instants as text)."""
    try:
        try:
            whole = json.loads(text)
            found = whole["events"] if isinstance(whole, dict) and "events" in whole else whole
            found = found if isinstance(found, list) else [found]
        except json.JSONDecodeError:
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
        return [{"seq": item["seq"], "event": internal(item["event"])} for item in found]
    except (ValueError, TypeError, KeyError) as exc:
        raise UsageError(f"the file does not hold events: {exc}", hint="jobsched events JOB -o jsonl") from exc


def internal(value: Any) -> Any:
    """Inverse of `render.public` for events."""
    if isinstance(value, dict):
        made: Document = {}
        for name, item in value.items():
            if name in render.USERS:
                made[name] = item
            elif re.match(r"^(?:.*_)?(?:at|since|before|after)$", name) and (item is None or isinstance(item, str)):
                made[f"{name}_ms"] = _instant_ms(item) if item else 0
            else:
                made[name] = internal(item)
        return made
    return [internal(item) for item in value] if isinstance(value, list) else value


def _past(seq: int, at_ms: int, at: str | None) -> bool:
    if at is None:
        return False
    return seq > int(at) if at.isdecimal() else at_ms > _instant_ms(at)


def _instant_ms(text: str) -> int:
    found = render.rfc3339_ms(text)
    if found is None:
        raise UsageError(f"{text!r} is neither an event number nor an RFC 3339 time",
                         hint="--at 42, or --at 2026-01-31T12:00:00Z")
    return found


def _as_of(document: Document) -> str:
    from jobsched.cli.jobs import JOB_COLUMNS

    replicas = (render.Column("REPLICA", lambda r: f"{r['role']}/{r['index']}"),
                render.Column("STATE", lambda r: r["state"]),
                render.Column("NODE", lambda r: (r["binding"] or {}).get("node")),
                render.Column("RESTARTS", lambda r: r["restart"]))
    text = render.plain_table([c for c in JOB_COLUMNS if c.title not in ("STEP", "AGE", "HEADLINE")], [document])
    rows = [*document["replicas"].values()]
    return text + ("\n" + render.plain_table(replicas, rows) if rows else "")
