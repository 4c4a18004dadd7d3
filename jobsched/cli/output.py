"""Commands that show what a job puts out: its logs, its metrics."""

from __future__ import annotations

import sys
import time
from typing import Any

import click

from jobsched.cli import attach, render
from jobsched.cli.connection import connected, path_of
from jobsched.cli.render import Column, View, output_options, talk
from jobsched.client.documents import TERMINAL, exit_code, log_lines
from jobsched.client.remote import Remote

WATCH_S = 0.5
"""Pause between two looks for new samples."""


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


def _metric_column(name: str) -> Column:
    return Column(name.upper(), lambda sample: dict(sample["metrics"]).get(name))
