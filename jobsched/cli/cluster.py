"""Commands about the cluster: nodes, node, queues, doctor."""

from __future__ import annotations

import json
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from jobsched.cli import render
from jobsched.cli.connection import connected, segment
from jobsched.cli.render import Column, View, output_options
from jobsched.client import locate, settings
from jobsched.client.documents import Document
from jobsched.errors import JobschedError, NotFound


def _message(answer: Document) -> str:
    """What is wrong with it, or why nothing new is bound on it (on some of its GPUs)."""
    said = (answer["node"]["message"], (answer["cordon"] or {}).get("why", ""))
    return "; ".join(filter(None, said))


def _gpu_kinds(answer: Document) -> str:
    kinds: dict[str, int] = {}
    for gpu in answer["node"]["gpus"]:
        kinds[gpu["kind"]] = kinds.get(gpu["kind"], 0) + 1
    return " ".join(f"{kind}:{count}" for kind, count in kinds.items())


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f}Gi"


NODE_COLUMNS = (
    Column("NODE", lambda a: a["node"]["name"]),
    Column("STATE", lambda a: a["state"]),
    Column("GPU", _gpu_kinds),
    Column("FREE-GPUS", lambda a: f"{a['free_gpus']}/{len(a['node']['gpus'])}"),
    Column("FREE-CPU", lambda a: f"{a['free']['cpu_milli'] / 1_000:g}/{a['node']['cpu_milli'] / 1_000:g}"),
    Column("FREE-MEMORY", lambda a: f"{_gib(a['free']['memory_bytes'])}/{_gib(a['node']['memory_bytes'])}"),
    Column("JOBS", lambda a: len(a["jobs"])),
    Column("ADDRESS", lambda a: a["node"]["address"], wide=True),
    Column("LABELS", lambda a: ",".join(f"{k}={v}" for k, v in a["node"]["labels"]), wide=True, flexible=True),
    Column("MESSAGE", _message, wide=True, flexible=True),
)


@click.command()
@click.option("--gpu", metavar="KIND", help="Only nodes with GPUs of this kind.")
@output_options
@click.pass_context
def nodes(ctx: click.Context, gpu: str | None, view: View) -> None:
    """List nodes, their GPUs, and what is free on them.

    \b
    Example:
      jobsched nodes --gpu h100
    """
    with connected(ctx) as remote:
        answers = remote.documents("nodes")
    if gpu:
        answers = [a for a in answers if any(g["kind"].startswith(gpu.lower()) for g in a["node"]["gpus"])]
    rows = [{**a, "name": a["node"]["name"]} for a in answers]
    render.show_list(view, NODE_COLUMNS, rows, name="nodes", key="name")


def _gpu_state(row: Document) -> str:
    if not row["gpu"]["healthy"]:
        return "unhealthy"
    if row["jobs"]:
        return "used"
    if row["foreign"]:
        return "others"
    return "free" if row["node_state"] == "ready" else str(row["node_state"])


GPU_COLUMNS = (
    Column("GPU", lambda r: r["gpu"]["id"]),
    Column("NODE", lambda r: r["node"]),
    Column("KIND", lambda r: r["gpu"]["kind"]),
    Column("MEMORY", lambda r: _gib(r["gpu"]["memory_bytes"])),
    Column("STATE", _gpu_state),
    Column("USED-BY", lambda r: " ".join(r["jobs"]), flexible=True),
    Column("ISLAND", lambda r: r["gpu"]["island"], wide=True),
)


@click.command()
@click.option("--kind", metavar="KIND", help="Only GPUs whose kind begins so.")
@click.option("--node", "node_name", metavar="NAME", help="Only GPUs of this node.")
@click.option("--free", is_flag=True, help="Only those that nobody uses.")
@output_options
@click.pass_context
def gpus(ctx: click.Context, kind: str | None, node_name: str | None, free: bool, view: View) -> None:
    """List GPUs, one a line: where, what kind, and which replicas use it (a share as ×0.5).

    \b
    Example:
      jobsched gpus --free --kind h100
    """
    with connected(ctx) as remote:
        answers = remote.documents("nodes")
        live = remote.documents("jobs", limit=1_000, state="STARTING,RUNNING,STOPPING")["jobs"]
    users: dict[str, list[str]] = {}
    for job in (answer["job"] for answer in live):
        for replica in job["replicas"].values():
            for share in (replica["binding"] or {}).get("gpus", ()):
                part = "" if share["milli"] == 1_000 else f"×{share['milli'] / 1_000:g}"
                who = f"{job['name']}/{replica['role']}/{replica['index']}{part}"
                users.setdefault(share["gpu"], []).append(who)
    rows = [
        {"gpu": gpu, "id": gpu["id"], "node": a["node"]["name"], "node_state": a["state"],
         "jobs": users.get(gpu["id"], []), "foreign": gpu["id"] in {s["gpu"] for s in a["node"]["foreign_gpus"]}}
        for a in answers for gpu in a["node"]["gpus"]
        if gpu["kind"].startswith((kind or "").lower()) and node_name in (None, a["node"]["name"])
    ]  # fmt: skip
    rows = [{**row, "state": _gpu_state(row)} for row in rows]
    render.show_list(view, GPU_COLUMNS, [r for r in rows if not free or r["state"] == "free"], name="gpus", key="id")


@click.group()
def node() -> None:
    """Describe, cordon, uncordon or drain a node.

    \b
    Example:
      jobsched node drain n01
    """


@node.command("describe")
@click.argument("name")
@output_options
@click.pass_context
def describe_node(ctx: click.Context, name: str, view: View) -> None:
    """Show everything about a node: GPUs, what is free, the jobs on it.

    \b
    Example:
      jobsched node describe n01
    """
    with connected(ctx) as remote:
        answers = remote.documents("nodes")
    found = next((a for a in answers if a["node"]["name"] == name), None)
    if found is None:
        raise NotFound(f"there is no node {name!r}", hint=f"nodes: {', '.join(a['node']['name'] for a in answers)}")
    gpus = (Column("GPU", lambda g: g["id"]), Column("KIND", lambda g: g["kind"]),
            Column("MEMORY", lambda g: _gib(g["memory_bytes"])),
            Column("HEALTH", lambda g: "ok" if g["healthy"] else "unhealthy"))

    def text() -> str:
        head = "".join(f"{c.title + ':':13} {render.cell(c, found)}\n" for c in NODE_COLUMNS)
        return head + "\n" + render.plain_table(gpus, found["node"]["gpus"]) + "\nJobs: " + " ".join(found["jobs"])

    render.show_one(view, {**found, "name": name}, text, key="name")


def _node_wish(name: str, verb: str, body: Document, text: str) -> None:
    @node.command(name, help=f"{text}\n\n\b\nExample:\n  jobsched node {name} n01")
    @click.argument("names", nargs=-1, required=True, metavar="NODE...")
    @output_options
    @click.pass_context
    def command(ctx: click.Context, names: tuple[str, ...], view: View) -> None:
        with connected(ctx) as remote:
            answers = [json.loads(remote.post(f"nodes/{segment(n)}/{verb}", body)) for n in names]
        rows = [{**a, "name": a["node"]["name"]} for a in answers]
        render.show_list(view, NODE_COLUMNS, rows, name="nodes", key="name")


_node_wish("cordon", "cordon", {"drain": False}, "Start nothing new on a node; what runs there goes on.")
_node_wish("uncordon", "uncordon", {}, "Use a node again.")
_node_wish("drain", "cordon", {"drain": True}, "Start nothing new on a node, and have its jobs save and move away.")

QUEUE_COLUMNS = (
    Column("QUEUE", lambda a: "  " * a["depth"] + a["queue"]["name"]),
    Column("WEIGHT", lambda a: a["queue"]["weight"]),
    Column("STATE", lambda a: _queue_state(a)),
    Column("WAITING", lambda a: a["waiting"]),
    Column("ACTIVE", lambda a: a["active"]),
    Column("GPUS", lambda a: f"{a['gpus_in_use']:g}"),
    Column("MAX-GPUS", lambda a: a["queue"].get("max_gpus")),
    Column("SHARE", lambda a: f"{100 * a['share']:.0f}%"),
    Column("QUOTA", lambda a: _per_resource(a, "quota")),
    Column("BORROWED", lambda a: _per_resource(a, "borrowed")),
    Column("LENT", lambda a: _per_resource(a, "lent")),
    Column("LEFT", lambda a: _per_resource(a, "left"), wide=True),
    Column("BUDGET-LEFT", lambda a: None if (left := a["budget_left_gpu_h"]) is None else f"{left:.1f}h", wide=True),
)


def _queue_state(answer: Document) -> str:
    queue = answer["queue"]
    return "cohort" if answer["is_cohort"] else "paused" if queue["paused"] else (
        "draining" if queue["draining"] else "open"
    )  # fmt: skip


def _per_resource(answer: Document, what: str) -> str | None:
    """`8` where only GPUs of any kind have a quota, else `gpus:8 cpu:64`; nothing for nothing."""
    found = [h for h in answer["holdings"] if what in ("quota", "left") or h[what]]
    shown = {h["resource"]: _gib(h[what]) if h["resource"] == "memory" else f"{h[what]:g}" for h in found}
    if list(shown) == ["gpus"]:
        return shown["gpus"]
    return " ".join(f"{name}:{text}" for name, text in shown.items()) or None


@click.command()
@output_options
@click.pass_context
def queues(ctx: click.Context, view: View) -> None:
    """List queues and cohorts: jobs waiting and active, what they hold, borrow and lend.

    \b
    Example:
      jobsched queues -o json
    """
    with connected(ctx) as remote:
        answers = remote.documents("queues")
    rows = [{**a, "name": a["queue"]["name"]} for a in answers]
    render.show_list(view, QUEUE_COLUMNS, rows, name="queues", key="name")


USAGE_COLUMNS = (
    Column("QUEUE", lambda u: u["queue"]),
    Column("USER", lambda u: u["owner"]),
    Column("JOBS", lambda u: u["jobs"]),
    Column("SUCCEEDED", lambda u: u["succeeded"]),
    Column("FAILED", lambda u: u["failed"]),
    Column("CANCELLED", lambda u: u["cancelled"], wide=True),
    Column("GPU-HOURS", lambda u: f"{u['gpu_hours']:.2f}"),
    Column("MEAN-WAIT", lambda u: f"{u['mean_wait_s']:.1f}s"),
    Column("LONGEST-WAIT", lambda u: f"{u['longest_wait_s']:.1f}s"),
)


@click.command()
@click.option("--since", metavar="TIME", default="30d", show_default=True,
              help="Jobs that live, or ended after this RFC 3339 time or within so long (90s, 7d).")
@click.option("--user", "-u", metavar="NAME", help="Only this user's.")
@click.option("--queue", metavar="NAME", help="Only this queue's.")
@output_options
@click.pass_context
def usage(ctx: click.Context, since: str, user: str | None, queue: str | None, view: View) -> None:
    """Sum up GPU-hours and waits by queue and user.

    \b
    Examples:
      jobsched usage --since 7d
      jobsched usage --queue research -o csv
    """
    with connected(ctx) as remote:
        answers = remote.documents("usage", since_ms=max(0, render.instant_ms(since)))
    rows = [
        {**a, "name": f"{a['queue']}/{a['owner']}"} for a in answers
        if user in (None, a["owner"]) and queue in (None, a["queue"])
    ]  # fmt: skip
    render.show_list(view, USAGE_COLUMNS, rows, name="usage", key="name")


# ---- doctor ----

CHECK_COLUMNS = (
    Column("", lambda c: "ok" if c["ok"] else "!!"),
    Column("CHECK", lambda c: c["name"]),
    Column("FOUND", lambda c: c["message"], flexible=True),
    Column("HINT", lambda c: c["hint"], flexible=True),
)


@click.command()
@output_options
@click.pass_context
def doctor(ctx: click.Context, view: View) -> int:
    """Check this machine (Python, torch, GPUs, cgroups, disk) and, if one answers, the server. Exit 1 if something is
    wrong.

    \b
    Example:
      jobsched doctor -o json
    """
    checks = [*_machine(), *_server(ctx)]
    render.show_list(view, CHECK_COLUMNS, checks, name="checks", key="name")
    return 0 if all(c["ok"] for c in checks) else 1


def _check(name: str, ok: bool, message: str, hint: str = "") -> Document:
    return {"name": name, "ok": ok, "message": message, "hint": hint}


def _machine() -> Iterator[Document]:
    """What can be told without a server. torch is looked for, never imported."""
    from importlib import metadata

    yield _check("python", sys.version_info >= (3, 11), f"{platform.python_version()} ({sys.executable})")
    try:
        yield _check("torch", True, metadata.version("torch"))
    except metadata.PackageNotFoundError:
        yield _check("torch", True, "not installed; only jobs that use it need it", "pip install 'jobsched[torch]'")
    yield _gpus()
    yield _cgroup()
    home = settings.home()
    existing = next(p for p in (home, *home.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    yield _check("disk", free > 2**30, f"{free / 2**30:.1f} GiB free for {home}", "" if free > 2**30 else "make room")


def _gpus() -> Document:
    import pynvml

    try:
        pynvml.nvmlInit()
        try:
            handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
            names = [_text(pynvml.nvmlDeviceGetName(h)) for h in handles]
            driver = _text(pynvml.nvmlSystemGetDriverVersion())
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as exc:
        return _check("gpus", True, f"no NVIDIA GPU is visible ({exc})", "virtual GPUs work without")
    return _check("gpus", True, f"{len(names)}: {', '.join(names)}; driver {driver}")


def _text(value: Any) -> str:
    """NVML bindings of some ages answer in bytes."""
    return value.decode() if isinstance(value, bytes) else str(value)


def _cgroup() -> Document:
    root = Path("/sys/fs/cgroup")
    version = "v2" if (root / "cgroup.controllers").exists() else "v1" if (root / "memory").is_dir() else "none"
    return _check("cgroup", True, version, "" if version != "none" else "CPU and memory limits fall back to rlimits")


def _server(ctx: click.Context) -> Iterator[Document]:
    """The server's own checks, and how far its clock is from ours."""
    try:
        endpoint = locate.find(ctx.meta.get("server"), token_file=ctx.meta.get("token_file"))
    except JobschedError as exc:
        yield _check("server", True, exc.message, exc.hint)
        return
    with locate.connect(endpoint) as remote:
        try:
            asked = time.monotonic()
            version = remote.documents("version")
            took_ms = (time.monotonic() - asked) * 1_000
            yield _check("server", True, f"{endpoint.url}, version {version['version']}, answers in {took_ms:.0f} ms")
            for check in remote.documents("doctor"):
                yield {**check, "name": f"server {check['name']}"}
        except JobschedError as exc:
            yield _check("server", False, exc.message, exc.hint)
