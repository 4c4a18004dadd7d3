"""Commands about jobs that are there: list, explain, follow, change. All of them work on the documents of the API and
start fast, because no model is imported.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import click

from jobsched.cli import attach, render
from jobsched.cli.connection import connected, for_each, path_of
from jobsched.cli.render import Column, View, output_options, talk
from jobsched.client.documents import (
    TERMINAL,
    Document,
    cause_sentence,
    exit_code,
    log_lines,
    saved_since,
    user,
)
from jobsched.client.remote import Remote
from jobsched.errors import UsageError, WaitTimeout

SHORT_ID = 10
"""Characters of an id that tables show at least; more where jobs on the page share them."""

WATCH_S = 0.5
"""Pause between two looks for new samples."""
SETTLE_S = 0.3
"""Longest wait for the server to act on a wish before the job is shown."""


def _progress(document: Document, name: str) -> Any:
    progress = document.get("progress")
    return progress[name] if progress and progress[name] != -1 else None


def _step(document: Document) -> str | None:
    step, total = _progress(document, "step"), _progress(document, "total")
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
@output_options
@click.pass_context
def describe(ctx: click.Context, job: str, view: View) -> None:
    """Show everything about a job: state, spec, replicas and where they run, checkpoint, last failure, events.

    \b
    Example:
      jobsched describe @last
    """
    with connected(ctx) as remote:
        document = attach.fetch(remote, job)
        history = remote.documents(f"jobs/{document['id']}/events", limit=1_000)
    render.show_one(view, {**document, "events": history}, lambda: _description(document, history))


def _description(document: Document, history: Sequence[Document]) -> str:
    checkpoint, cause = document["checkpoint"], document["cause"]
    facts = {
        "Id": document["id"],
        "Name": document["name"],
        "Owner": document["owner"],
        "Queue": f"{document['spec']['queue']}, priority {document['priority']}",
        "Phase": document["phase"] + (f" ({document['reason']})" if document["reason"] else ""),
        "Headline": document["headline"],
        "Progress": attach.status(document) if document["progress"] else "",
        "Submitted": render.rfc3339(document["submitted_at_ms"]),
        "Started": _instant(document["first_started_at_ms"]),
        "Ended": _instant(document["ended_at_ms"]),
        "Attempts": f"{document['attempts']}, restarts {document['restarts']}",
        "Checkpoint": f"step {checkpoint['step']} of attempt {checkpoint['attempt']}: {checkpoint['path']}"
        if checkpoint else "",
        "Waits for": ", ".join(document["waiting_for"]),
        "Labels": ", ".join(f"{k}={v}" for k, v in document["labels"].items()),
        "Failure": cause_sentence(cause) if cause and cause["failure_class"] else "",
    }
    text = "".join(f"{name + ':':12} {value}\n" for name, value in facts.items() if value)
    roles = (Column("ROLE", lambda r: r["role"]), Column("REPLICAS", lambda r: _count(r["replicas"])),
             Column("CPU", lambda r: r["cpu"]), Column("MEMORY", lambda r: r["memory"]),
             Column("GPU", lambda r: _gpu(r["gpu"])), Column("COMMAND", lambda r: _command(r["command"])))
    rows = [{"role": name, **role} for name, role in document["spec"]["roles"].items()]
    text += "\nRoles\n" + render.plain_table(roles, rows)
    if document["replicas"]:
        live = {(r["role"], r["index"]): r for r in (document["progress"] or {"replicas": ()})["replicas"]}
        replicas = (
            Column("REPLICA", lambda r: f"{r['role']}/{r['index']}"),
            Column("STATE", lambda r: r["state"]),
            Column("NODE", lambda r: (r["binding"] or {}).get("node")),
            Column("GPUS", lambda r: " ".join(_share(g) for g in (r["binding"] or {}).get("gpus", ()))),
            Column("RANK", lambda r: _known(live, r, "rank")),
            Column("STEP", lambda r: _known(live, r, "step")),
            Column("RESTARTS", lambda r: r["restart"]),
            Column("PROCESS", lambda r: _known(live, r, "ident")),
        )
        text += "\nReplicas\n" + render.plain_table(replicas, [*document["replicas"].values()])
    if document["verdict"]:
        text += "\nWaits because\n" + "\n".join(reasons(document["verdict"])) + "\n"
    if cause and cause["tail"]:
        text += "\nLast log lines\n" + "".join(f"  | {line}\n" for line in cause["tail"])
    return text + "\nEvents\n" + render.plain_table([c for c in EVENT_COLUMNS if not c.wide], history[-30:])


def _instant(at_ms: int) -> str:
    return render.rfc3339(at_ms) if at_ms else ""


def _count(replicas: Document) -> str:
    low, high = replicas["min"], replicas["max"]
    return str(low) if low == high else f"{low}..{high}, prefers {replicas['prefer']}"


def _gpu(gpu: Document | None) -> str:
    return f"{'|'.join(gpu['kinds']) or 'any'}:{gpu['milli'] / 1_000:g}" if gpu else ""


def _command(command: str | list[str]) -> str:
    text = command if isinstance(command, str) else " ".join(command)
    first = text.strip().splitlines()[0] if text.strip() else ""
    return first if len(first) <= 60 and first == text.strip() else first[:59] + "…"


def _share(gpu: Document) -> str:
    return str(gpu["gpu"]) if gpu["milli"] == 1_000 else f"{gpu['gpu']}×{gpu['milli'] / 1_000:g}"


def _known(live: dict[tuple[str, int], Document], replica: Document, name: str) -> Any:
    value = live.get((replica["role"], replica["index"]), {}).get(name)
    return None if value == -1 else value


@click.command()
@click.argument("job")
@click.option("--at", metavar="TIME", help="As it was at this RFC 3339 time, or so long ago (90s, 2h).")
@output_options
@click.pass_context
def why(ctx: click.Context, job: str, at: str | None, view: View) -> None:
    """Explain a job: every reason why it waits, with numbers and what would help; or the root cause of its end, with
    the last log lines and the stacks of a hang; and its story so far.

    \b
    Examples:
      jobsched why @last
      jobsched why @last --at 10m
    """
    at_ms = None if at is None else render.instant_ms(at)
    with connected(ctx) as remote:
        answer = remote.documents(f"{path_of(remote, job)}/why", at_ms=at_ms)
    document = {**answer, "id": answer["job"]["id"]}
    render.show_one(view, document, lambda: explanation(answer))


def explanation(answer: Document) -> str:
    """The text of `why`."""
    job, verdict = answer["job"], answer.get("verdict")
    lines = [f"{render.PHASES[job['phase']][0]} {job['name']} ({job['id']}) {job['phase']}"]
    if answer["headline"]:
        lines[0] += f": {answer['headline']}"
    if verdict:
        lines += reasons(verdict)
    if answer.get("deadline"):
        lines.append(f"  deadline: {answer['deadline']}")
    cause = job["cause"]
    if cause:
        title = "root cause" if job["phase"] in TERMINAL else "last failure" if cause["failure_class"] else "last stop"
        lines.append(f"{title}: {cause_sentence(cause)}")
        for line in cause["tail"]:
            lines.append(f"  | {line}")
        for who, stack in cause["stacks"]:
            lines.append(f"stack of {who}:")
            lines += [f"  {row}" for row in stack.splitlines()]
    if answer.get("warnings"):
        lines += ["the engine says:", *(f"  {_detail(_incident(one))}" for one in answer["warnings"])]
    if answer["story"]:
        lines += ["story:", *(f"  {sentence}" for sentence in answer["story"])]
    return "\n".join(lines)


def reasons(verdict: Document | None) -> list[str]:
    """Every reason that holds with its numbers and what would help; the place in line and the expected start."""
    if not verdict:
        return []
    lines = []
    for reason in verdict["reasons"]:
        lines.append(f"  {reason['reason']}: {reason['message']}")
        if reason.get("fix"):
            lines.append(f"    fix: {reason['fix']}")
    if verdict.get("position"):
        lines.append(f"  place in line: {verdict['position']}")
    if verdict.get("nearest_fit"):
        lines.append(f"  nearest fit: {verdict['nearest_fit']}")
    if verdict.get("starts"):
        lines.append(f"  expected start: {verdict['starts']}")
    lines += [f"  sooner with: {way}" for way in verdict.get("sooner", ())]
    return lines


def _detail(stored: Document) -> str:
    """What an event says besides its kind and job."""
    event = stored["event"]
    if stored["seq"] is None:
        return str(event["says"])
    hidden = {"kind", "at_ms", "job_id", "spec", "request_id", "bindings", "cause", "outcome", "tail", "node"}
    nothing: tuple[Any, ...] = (None, "", [], {}, 0, -1, False)
    parts = [f"{k}={_brief(v)}" for k, v in event.items() if k not in hidden and v not in nothing]
    if isinstance(event.get("node"), dict):
        parts.append(f"node={event['node']['name']}")
    elif event.get("node"):
        parts.append(f"node={event['node']}")
    if event.get("bindings"):
        parts.append(" ".join(f"{b['role']}/{b['index']}→{b['node']}" for b in event["bindings"]))
    cause = event.get("cause") or (event.get("outcome") or {}).get("cause")
    if event.get("outcome"):
        parts.append(f"→ {event['outcome']['phase']} ({event['outcome']['reason']})")
    if cause:
        parts.append(cause_sentence(cause))
    return " ".join(parts)


def _brief(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(_brief(v) for v in value)
    if isinstance(value, dict):
        return str(value.get("name")) if "name" in value else ",".join(f"{k}:{v}" for k, v in value.items())
    return str(value)


def _incident(incident: Document) -> Document:
    """What an engine says, in the form of an event; it has no number, being in no log."""
    role, index = incident["key"].split("/")[2:4] if incident["key"] else ("", "")
    who = f"{role}/{index}" if role else f"node {incident['node']}"
    often = f" (×{incident['count']})" if incident["count"] > 1 else ""
    text = f"{who}: {incident['message'] or incident['reason']}{often}"
    event = {"kind": incident["reason"], "at_ms": incident["at_ms"], "says": text, "warning": incident["warning"]}
    return {"seq": None, "event": event}


def _merged(stored: Sequence[Document], incidents: Iterable[Document]) -> list[Document]:
    """By time, the events of the log in their own order: the engine's clock is not the server's."""
    latest = 0
    placed: list[tuple[int, int, Document]] = []
    for item in stored:
        latest = max(latest, item["event"]["at_ms"])
        placed.append((latest, 0, item))
    placed += [(item["event"]["at_ms"], 1, item) for item in incidents]
    return [item for _, _, item in sorted(placed, key=lambda one: one[:2])]


EVENT_COLUMNS = (
    Column("SEQ", lambda s: s["seq"]),
    Column("TIME", lambda s: render.rfc3339(s["event"]["at_ms"])),
    Column("JOB", lambda s: s["event"].get("job_id"), wide=True),
    Column("EVENT", lambda s: s["event"]["kind"]),
    Column("DETAIL", _detail, flexible=True),
)


@click.command()
@click.argument("job", required=False)
@click.option("-f", "--follow", is_flag=True, help="Go on with events as they happen.")
@click.option("--after", type=click.IntRange(0), default=0, metavar="SEQ", help="Only events after this number.")
@output_options
@click.pass_context
def events(ctx: click.Context, job: str | None, follow: bool, after: int, view: View) -> None:
    """Show the events of a job, with what the engine says of its replicas and nodes (without a number); without a job,
    follow those of the whole cluster.

    \b
    Examples:
      jobsched events @last
      jobsched events -f -o jsonl
    """
    with connected(ctx) as remote:
        job_id = attach.fetch(remote, job)["id"] if job else None
        if job_id and not follow:
            listed = remote.documents(f"jobs/{job_id}/events", after=after or None, limit=10_000)
            if not after and not view.quiet and view.format != "name":
                listed = _merged(listed, map(_incident, remote.documents(f"jobs/{job_id}/incidents")))
            render.show_list(view, EVENT_COLUMNS, listed, name="events", key="seq")
            return
        for sent in remote.stream("events", last_id=str(after) if after else "", after=after or None, job=job_id):
            if sent.event == "reconnected":
                continue
            stored = json.loads(sent.data)
            if view.json:
                render.write_json(stored)
            else:
                cells = [render.cell(c, stored) for c in EVENT_COLUMNS if job_id is None or not c.wide]
                render.write("  ".join(cells) + "\n")


@click.command()
@click.argument("job")
@click.option("-f", "--follow", is_flag=True, help="Go on until the job has ended.")
@click.option("--role", help="Only this role.")
@click.option("--index", type=click.IntRange(0), help="Only this index of the role.")
@click.option("--rank", type=click.IntRange(0), help="Only this rank.")
@click.option("--attempt", type=click.IntRange(0), help="Of this attempt; 0: of every one; default: the last.")
@click.option("--tail", type=click.IntRange(0, 100_000), metavar="N", help="Only the last N lines of each replica.")
@click.option("--grep", metavar="TEXT", help="Only lines that hold this text.")
@click.option("--prefix/--no-prefix", default=None, help="Begin lines with [role/index]; default: if several.")
@click.option("--timestamps", is_flag=True, help="With -f: begin lines with the time they arrived.")
@click.option("--exit-status", is_flag=True, help="With -f: exit with the job's code.")
@output_options
@click.pass_context
def logs(
    ctx: click.Context, /, job: str, view: View, follow: bool, prefix: bool | None, timestamps: bool,
    exit_status: bool, **selection: Any,
) -> int:
    """Show the logs of a job's replicas.

    \b
    Examples:
      jobsched logs -f @last
      jobsched logs bert --role worker --rank 3 --tail 50
    """
    with connected(ctx) as remote:
        document = attach.fetch(remote, job)
        several = sum(role["replicas"]["prefer"] for role in document["spec"]["roles"].values()) > 1
        shown = several if prefix is None else prefix
        line = None
        try:
            for line in log_lines(remote, document["id"], follow=follow, **selection):
                if view.json:
                    render.write_json(line)
                else:
                    arrived = f"{render.rfc3339(int(time.time() * 1_000))} " if timestamps and follow else ""
                    render.write(f"{arrived}{attach.log_text(line, prefix=shown)}\n")
        except KeyboardInterrupt:
            return 130
        if line is None and not view.quiet:
            talk("nothing was written" if document["phase"] in TERMINAL else "nothing is written yet; -f waits for it")
        return exit_code(attach.fetch(remote, document["id"])) if follow and exit_status else 0


def _watch_metrics(remote: Remote, path: str, limit: int, view: View) -> None:
    """A line a sample, as they come."""
    shown = 0
    while True:
        ended = remote.documents(path)["job"]["phase"] in TERMINAL  # looked at before, so that the last is shown
        fresh = [s for s in remote.documents(f"{path}/samples", limit=limit) if s["at_ms"] > shown]
        for sample in fresh:
            if view.json:
                render.write_json(sample)
            else:
                render.write("  ".join(render.cell(c, sample) for c in METRIC_COLUMNS) + "\n")
        sys.stdout.flush()
        shown = max([shown, *(s["at_ms"] for s in fresh)])
        if ended:
            return
        time.sleep(WATCH_S)


METRIC_COLUMNS = (
    Column("TIME", lambda s: render.rfc3339(s["at_ms"])),
    Column("ATTEMPT", lambda s: s["attempt"]),
    Column("STEP", lambda s: s["step"]),
    Column("WORLD", lambda s: s["world_size"]),
    Column("METRICS", lambda s: " ".join(f"{k}={v:.4g}" for k, v in dict(s["metrics"]).items()), flexible=True),
)


@click.command()
@click.argument("job")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True,
              help="The newest so many samples.")
@click.option("-w", "--watch", is_flag=True, help="Go on with new ones until the job has ended.")
@output_options
@click.pass_context
def metrics(ctx: click.Context, job: str, limit: int, watch: bool, view: View) -> None:
    """Show progress samples of a job, newest last.

    \b
    Examples:
      jobsched metrics @last -o csv > curve.csv
      jobsched metrics @last -w
    """
    with connected(ctx) as remote:
        path = path_of(remote, job)
        if watch:
            _watch_metrics(remote, path, limit, view)
            return
        samples = remote.documents(f"{path}/samples", limit=limit)
    names = sorted({name for s in samples for name in dict(s["metrics"])})
    columns = METRIC_COLUMNS if view.format != "csv" else (*METRIC_COLUMNS[:-1], *map(_metric_column, names))
    render.show_list(view, columns, samples, name="samples", key="step")


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


def _metric_column(name: str) -> Column:
    return Column(name.upper(), lambda sample: dict(sample["metrics"]).get(name))


# ---- wishes ----


def _wish(ctx: click.Context, refs: Sequence[str], verb: str, body: Document, view: View, *, safe: bool = True) -> int:
    """Do the same to each job; what fails is reported and does not keep the others from being done."""
    with connected(ctx) as remote:

        def wish(ref: str) -> Document:
            answer = remote.post(f"{path_of(remote, ref)}/{verb}", {"by": user(), **body}, safe=safe)
            return render.job_document(json.loads(answer))

        receipts, worst = for_each(refs, wish)
        done = _settled(remote, receipts)
    render.show_list(view, JOB_COLUMNS, done, name="jobs", key="id")
    return worst


def _settled(remote: Remote, receipts: Sequence[Document]) -> list[Document]:
    """The jobs once the server has acted on the wish, or as they are after `SETTLE_S`: a receipt only tells that the
    wish is written down."""
    until = time.monotonic() + SETTLE_S
    settled = []
    for receipt in receipts:
        while (now := attach.fetch(remote, receipt["id"]))["version"] <= receipt["version"]:
            if time.monotonic() > until:
                break
            time.sleep(0.02)
        settled.append(now)
    return settled


def _wish_command(name: str, verb: str, body: Callable[[], Document], text: str, *, ask: str = "", safe: bool = True
                  ) -> click.Command:
    @click.command(name, help=f"{text}\n\n\b\nExample:\n  jobsched {name} JOB{' -y' if ask else ''}")
    @click.argument("jobs", nargs=-1, metavar="JOB...")
    @click.option("-l", "--label", metavar="K=V", help="All jobs with this label that have not ended.")
    @click.option("-y", "--yes", is_flag=True, hidden=not ask, help="Do not ask.")
    @output_options
    @click.pass_context
    def command(ctx: click.Context, jobs: Sequence[str], label: str | None, yes: bool, view: View) -> int:
        if bool(jobs) == bool(label):
            raise UsageError("name jobs, or a label that they have", hint=f"jobsched {name} JOB, or -l team=vision")
        if label:
            with connected(ctx) as remote:
                jobs = [d["id"] for d in page(remote, {"label": label, "limit": 1_000})[0]]
        if ask and sys.stdin.isatty():
            render.confirm(ask.format(", ".join(jobs)), yes=yes, command=f"jobsched {name} {' '.join(jobs)}")
        return _wish(ctx, jobs, verb, body(), view, safe=safe)

    return command


cancel = _wish_command("cancel", "cancel", dict,
                       "Cancel jobs: running ones save and stop. Asks first on a terminal.", ask="Cancel {}?")
hold = _wish_command("hold", "hold", lambda: {"stop": False},
                     "Keep waiting jobs from starting; running ones run on, but do not start again.")
release = _wish_command("release", "release", dict, "Let held jobs start.")
suspend = _wish_command("suspend", "hold", lambda: {"stop": True},
                        "Save and stop running jobs, and keep them in the queue until 'jobsched resume'.")
resume = _wish_command("resume", "release", dict, "Let suspended or held jobs go on.")
restart = _wish_command("restart", "restart", dict, "Save, stop and start jobs anew from their last checkpoint.",
                        safe=False)


@click.command()
@click.argument("job")
@click.option("--timeout", default="2m", show_default=True, metavar="2m", help="Longest wait for it; then exit 124.")
@click.option("--no-wait", is_flag=True, help="Only ask.")
@click.pass_context
def checkpoint(ctx: click.Context, job: str, timeout: str, no_wait: bool) -> None:
    """Have a running job save now, and go on. Its scripts must listen: context.should_checkpoint(), or a handler of the
    checkpoint signal.

    \b
    Example:
      jobsched checkpoint @last
    """
    until = time.monotonic() + (render.seconds(timeout) or 0)
    with connected(ctx) as remote:
        path = path_of(remote, job)
        document = attach.fetch(remote, job)
        before, step = document["checkpoint"], _progress(document, "step")
        asked = json.loads(remote.post(f"{path}/checkpoint"))["asked"]
        names = ", ".join(asked[:8]) + ("…" if asked[8:] else "")
        talk(f"asked {render.count(len(asked), 'replica')} to save: {names}")
        while not no_wait and not saved_since(before, document["checkpoint"], -1 if step is None else step):
            if document["phase"] in TERMINAL or time.monotonic() > until:
                raise WaitTimeout(f"job {document['name']} ({document['phase']}) did not save",
                                  hint=f"jobsched logs {document['id']}")
            time.sleep(0.1)
            document = attach.fetch(remote, document["id"])
        if not no_wait:
            mark = document["checkpoint"]
            render.write(f"step {mark['step']} of attempt {mark['attempt']}: {mark['path']}\n")


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
@click.argument("job")
@click.argument("counts", nargs=-1, required=True, metavar="ROLE=N...")
@output_options
@click.pass_context
def scale(ctx: click.Context, job: str, counts: Sequence[str], view: View) -> int:
    """Change how many replicas an elastic role should have. Parameter servers (role ps) change their number with a new
    attempt, which goes on from their checkpoints.

    \b
    Examples:
      jobsched scale @last worker=8
      jobsched scale @last ps=2
    """
    wanted = {}
    for text in counts:
        match = re.fullmatch(r"([a-z0-9-]+)=(\d+)", text)
        if match is None:
            raise UsageError(f"{text!r} is not ROLE=N", hint="jobsched scale JOB worker=8")
        wanted[match[1]] = int(match[2])
    return _wish(ctx, [job], "scale", {"wanted": wanted}, view)


# ---- top ----


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
