"""Commands that tell of one job: everything about it, why it is where it is, what happened to it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import click

from jobsched.cli import attach, render
from jobsched.cli.connection import connected, path_of
from jobsched.cli.render import Column, View, output_options
from jobsched.client.documents import TERMINAL, Document, cause_sentence


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
