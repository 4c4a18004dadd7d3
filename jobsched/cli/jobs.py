"""Commands that list jobs, show one, or stay with it. Like all that work on the documents of the API, they start fast,
because no model is imported.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import click

from jobsched.cli import attach, render
from jobsched.cli.connection import connected, path_of
from jobsched.cli.render import Column, View, output_options, talk
from jobsched.client.documents import TERMINAL, Document, user
from jobsched.client.remote import Remote
from jobsched.errors import UsageError

SHORT_ID = 10
"""Characters of an id that tables show at least; more where jobs on the page share them."""


def progress(document: Document, name: str) -> Any:
    """A number of a job's progress; None where it is not known."""
    found = document.get("progress")
    return found[name] if found and found[name] != -1 else None


def _step(document: Document) -> str | None:
    step, total = progress(document, "step"), progress(document, "total")
    return None if step is None else f"{step}/{total}" if total else str(step)


def _replicas(document: Document) -> str | None:
    """Running of wanted; of an ended job nothing."""
    if document["phase"] in TERMINAL:
        return None
    wanted = document["wanted"]
    prefer = sum(wanted.get(name, role["replicas"]["prefer"]) for name, role in document["spec"]["roles"].items())
    running = sum(1 for replica in document["replicas"].values() if replica["state"] == "running")
    return f"{running}/{prefer}"


def _reason(document: Document) -> str:
    """Of a waiting job what it waits for, which only the live cluster knows; else the reason of its phase."""
    reasons = (document.get("verdict") or {}).get("reasons") if document["phase"] == "QUEUED" else None
    return str(reasons[0]["reason"] if reasons else document["reason"])


def _gpus(document: Document) -> float | int | None:
    """What the job holds; while it holds nothing, what it wants."""
    bound = [g for r in document["replicas"].values() for g in (r["binding"] or {}).get("gpus", ())]
    milli = sum(gpu["milli"] for gpu in bound) or sum(
        document["wanted"].get(name, role["replicas"]["prefer"]) * role["gpu"]["milli"]
        for name, role in document["spec"]["roles"].items() if role.get("gpu")
    )  # fmt: skip
    return milli / 1_000 if milli % 1_000 else milli // 1_000 or None


JOB_COLUMNS = (
    Column("ID", lambda d: d.get("short_id", d["id"])),
    Column("NAME", lambda d: d["name"], flexible=True),
    Column("QUEUE", lambda d: d["spec"]["queue"], flexible=True),
    Column("OWNER", lambda d: d["owner"], wide=True),
    Column("PRIORITY", lambda d: d["priority"], wide=True),
    Column("PHASE", lambda d: d["phase"]),
    Column("REASON", _reason, flexible=True),
    Column("STEP", _step),
    Column("REPLICAS", _replicas),
    Column("GPUS", _gpus),
    Column("ATTEMPTS", lambda d: d["attempts"], wide=True),
    Column("RESTARTS", lambda d: d["restarts"]),
    Column("AGE", lambda d: d["submitted_at_ms"], age=True),
    Column("HEADLINE", lambda d: d["headline"], wide=True, flexible=True),
)


@click.command()
@click.option("-a", "--all", "everything", is_flag=True, help="Ended jobs too.")
@click.option("-w", "--watch", is_flag=True, help="Keep the table current; with -o jsonl, stream changes.")
@click.option("-l", "--label", metavar="K=V", help="Only jobs with this label.")
@click.option("-u", "--user", "owner", metavar="NAME", help="Only jobs of this user ('me': yours).")
@click.option("--state", metavar="PHASE,…", help="Only jobs in these phases.")
@click.option("--queue", metavar="NAME", help="Only jobs of this queue.")
@click.option("--name", metavar="NAME", help="Only jobs with this name.")
@click.option("--array", metavar="ID", help="Only members of this array.")
@click.option("--since", metavar="2h", help="Only jobs submitted this recently.")
@click.option("--limit", type=click.IntRange(1, 1_000), default=100, show_default=True,
              help="At most this many, newest first.")
@output_options
@click.pass_context
def jobs(ctx: click.Context, /, view: View, watch: bool, **selection: Any) -> None:
    """List jobs, newest first: those that wait or run, or with -a all of them.

    \b
    Examples:
      jobsched jobs -a --state FAILED --since 1d
      jobsched jobs -o json | jq -r '.jobs[] | select(.phase=="QUEUED") | .id'
      jobsched jobs -w -o jsonl
    """
    with connected(ctx) as remote:
        if watch and view.json:
            stream_changes(remote, selection)
        elif watch and render.styled(sys.stdout):
            render.watched(1.0, lambda: render.styled_table(view, render.chosen(view, JOB_COLUMNS),
                                                            page(remote, selection)[0]))
        elif watch:
            raise UsageError("--watch needs a terminal, or -o jsonl for a stream of changes")
        else:
            listed, more = page(remote, selection)
            render.show_list(view, JOB_COLUMNS, listed, name="jobs", key="id")
            if not listed and view.format in ("table", "wide") and not view.quiet:
                talk("no such job" if selection["everything"] else "no job waits or runs; -a shows ended ones, too")
            if more and not view.quiet:
                talk(f"the first {len(listed)}; more with --limit {min(1_000, selection['limit'] * 10)}")


def page(remote: Remote, selection: dict[str, Any]) -> tuple[list[Document], bool]:
    """Selected jobs as documents with short ids; whether there are more."""
    ago = render.seconds(selection.get("since"))
    owner = selection.get("owner")
    answer = remote.documents(
        "jobs", all=selection.get("everything") or bool(selection.get("state")), label=selection.get("label"),
        owner=user() if owner == "me" else owner, state=(selection.get("state") or "").upper(),
        queue=selection.get("queue"), name=selection.get("name"), array=selection.get("array"),
        limit=selection.get("limit"), since_ms=int(1_000 * (time.time() - ago)) if ago else None,
    )
    documents = [render.job_document(a) for a in answer["jobs"]]
    short = shortest([d["id"] for d in documents])
    return [{"short_id": d["id"][:short], **d} for d in documents], answer["more"]


def shortest(ids: Sequence[str]) -> int:
    """Length of a prefix that tells these ids apart."""
    return next((n for n in range(SHORT_ID, 27) if len({i[:n] for i in ids}) == len(set(ids))), 26)


def stream_changes(remote: Remote, selection: dict[str, Any]) -> None:
    """Events of the selected jobs as JSON lines until Ctrl-C; with --state, of jobs then in one of those phases."""
    ago, me = render.seconds(selection["since"]), user()
    wanted: dict[str, Callable[[Document], Any]] = {
        "owner": lambda d: d["owner"] == (me if selection["owner"] == "me" else selection["owner"]),
        "queue": lambda d: d["spec"]["queue"] == selection["queue"],
        "name": lambda d: d["name"] == selection["name"],
        "array": lambda d: d["array_id"] == selection["array"],
        "label": lambda d: selection["label"] in {f"{k}={v}" for k, v in d["labels"].items()},
        "since": lambda d: d["submitted_at_ms"] > 1_000 * (time.time() - (ago or 0)),
    }
    tests = [test for name, test in wanted.items() if selection[name]]
    phases = {name.strip() for name in (selection["state"] or "").upper().split(",")} - {""}
    known: dict[str, bool] = {}
    for sent in remote.stream("events"):
        if sent.event == "reconnected":
            continue
        stored = json.loads(sent.data)
        job_id = stored["event"].get("job_id")
        if not job_id:
            continue
        if phases or (tests and job_id not in known):
            document = attach.fetch(remote, job_id)
            known[job_id] = all(test(document) for test in tests) and (not phases or document["phase"] in phases)
        if known.get(job_id, True):
            render.write_json(stored)


@click.command()
@click.argument("job")
@output_options
@click.pass_context
def get(ctx: click.Context, job: str, view: View) -> None:
    """Show one job in a line, or all of it with -o json or yaml.

    JOB is an id, a unique prefix of one, a name (the newest wins), or @last.

    \b
    Example:
      jobsched get @last -o json | jq .phase
    """
    with connected(ctx) as remote:
        document = attach.fetch(remote, job)
    if view.format in ("table", "wide", "csv"):
        render.show_list(view, JOB_COLUMNS, [document], name="jobs", key="id")
    else:
        render.show_one(view, document, str)


@click.command()
@click.argument("job")
@click.option("--for", "until", default="done", show_default=True, metavar="WHAT",
              help="running, done, succeeded, or a step number.")
@click.option("--timeout", metavar="2h", help="Longest wait; then exit 124.")
@click.pass_context
def wait(ctx: click.Context, job: str, until: str, timeout: str | None) -> int:
    """Wait for a job; exits 0 when it got there. For 'done', and when it ended before, the exit code is the job's.

    \b
    Example:
      jobsched wait @last --for 1000 --timeout 10m && echo "a thousand steps"
    """
    with connected(ctx) as remote:
        return attach.wait(remote, job, until, render.seconds(timeout))


@click.command("attach")
@click.argument("job")
@output_options
@click.pass_context
def attach_(ctx: click.Context, job: str, view: View) -> int:
    """Show the logs and the progress of a job until it ends, and exit with its code, as 'run' does. Ctrl-C only leaves.

    \b
    Example:
      jobsched attach @last
    """
    with connected(ctx) as remote:
        return attach.follow(remote, remote.documents(path_of(remote, job)), view, begun="attached to")


@click.command()
@click.option("--once", is_flag=True, help="Print it once; the way in a pipe.")
@click.option("--interval", default=1.0, show_default=True, metavar="S", help="Seconds between pictures.")
@click.pass_context
def top(ctx: click.Context, once: bool, interval: float) -> None:
    """Watch nodes and live jobs; Ctrl-C leaves.

    \b
    Example:
      jobsched top --once
    """
    from jobsched.cli.cluster import NODE_COLUMNS

    live = [c for c in JOB_COLUMNS if not c.wide]
    nodes = [c for c in NODE_COLUMNS if not c.wide]
    numbers = Column("METRICS", lambda d: " ".join(f"{k} {v:.4g}" for k, v in d["metrics"].items()), flexible=True)
    with connected(ctx) as remote:
        if once or not render.styled(sys.stdout):
            render.write(render.plain_table(nodes, remote.documents("nodes")) + "\n")
            render.write(render.plain_table([*live, numbers], page(remote, {"limit": 50})[0]))
            return

        def draw() -> Any:
            from rich.console import Group

            view = View()
            return Group(render.styled_table(view, nodes, remote.documents("nodes")), "",
                         render.styled_table(view, [*live, numbers], page(remote, {"limit": 50})[0]))

        render.watched(max(0.2, interval), draw)
