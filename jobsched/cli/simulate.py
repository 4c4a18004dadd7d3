"""`jobsched simulate`: a recorded or synthetic workload through the real scheduler, in virtual time."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from jobsched.cli import render
from jobsched.errors import UsageError

if TYPE_CHECKING:
    from jobsched.sim.run import Result, Simulation
    from jobsched.sim.workload import Workload

SYNTHETIC, SERVED, MIXED = "synthetic", "served", "mixed"
MOST_JOBS = 1_000_000
FAULT_SPAN_MS = 30 * 86_400_000


@click.command()
@click.argument("fmt", metavar="[FORMAT]", default=SYNTHETIC)
@click.argument("trace", required=False, default="")
@click.option("--nodes", metavar="NODES", default="", help="Cluster, for example 16x4 or 8x8:v100+4x8:k80.")
@click.option("--policy", metavar="NAME", default="learned", show_default=True, help="Who goes first.")
@click.option("--compare", metavar="NAME", multiple=True, help="Run this policy too; may be repeated.")
@click.option("--faults", metavar="SPEC", default="", help="What breaks: all, or node=6h,replica=30m,crash=1h …")
@click.option("--jobs", type=click.IntRange(0, MOST_JOBS), default=0, help="Only the first so many; 0: all.")
@click.option("--seed", type=int, default=0, show_default=True, help="All randomness.")
@click.option("--report", "folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path),
              help="Write report.html and its plots there.")  # fmt: skip
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True,
              help="Output format: table, or json with one line a figure.")
def simulate(
    fmt: str, trace: str, nodes: str, policy: str, compare: tuple[str, ...], faults: str, jobs: int, seed: int,
    folder: Path | None, output: str,
) -> None:  # fmt: skip
    """Run a workload through the real scheduler in virtual time. FORMAT is synthetic (the default), served (jobs
    with parameter servers; TRACE says how they are numbered: free, workers, 1:4 or 1:1), mixed (rigid, elastic, urgent
    and shared jobs, quotas, nodes on demand), or that of a recorded trace: philly, muri, pollux, gavel, shockwave,
    chronus, elasticflow, tiresias, openb.

    \b
    Examples:
      jobsched simulate
      jobsched simulate muri trace3 --policy srsf --compare las
      jobsched simulate synthetic --faults all --seed 7
      jobsched simulate mixed --policy server --faults all
      jobsched simulate served free --policy elastic
    """
    from jobsched.sim.faults import parse_faults
    from jobsched.sim.report import plotting, write_report
    from jobsched.sim.run import POLICIES
    from jobsched.sim.workload import placeable
    from jobsched.wiring import configure_logging

    configure_logging(os.environ.get("JOBSCHED_LOG_LEVEL", "error"))  # what a simulated server warns of is played
    names = tuple(dict.fromkeys((policy, *compare)))
    if unknown := [name for name in names if name not in POLICIES]:
        raise UsageError(f"there is no policy {unknown[0]!r}", hint=f"known policies: {', '.join(POLICIES)}")
    try:
        means = parse_faults(faults)
    except ValueError as exc:
        raise UsageError(str(exc)) from exc
    if folder is not None:  # better now than after hours
        plotting()
        folder.mkdir(parents=True, exist_ok=True)
    results = []
    for name in names:
        workload, refused = placeable(_workload(fmt, trace, nodes, name, jobs, seed))
        if refused:
            render.talk(f"{refused}; left out, as a server refuses them")
        results.append(_run(workload, name, means, seed))
        if (left := results[-1].summary.jobs - results[-1].summary.ended) > 0:
            render.talk(f"{left:,} of {results[-1].summary.jobs:,} jobs never ended under {name}; "
                        "completion times are those of the others")  # fmt: skip
        if output == "json":
            render.write(json.dumps(results[-1].row()) + "\n")
    if output == "table":
        render.write(_table(results) + "\n")
    if folder is not None:
        render.talk(f"wrote {write_report(results, folder)}")


def _workload(fmt: str, trace: str, nodes: str, policy: str, jobs: int, seed: int) -> Workload:
    from jobsched.sim import traces
    from jobsched.sim.mixed import mixed
    from jobsched.sim.workload import RATIOS, elsewhere, make_nodes, served, synthetic

    try:
        cluster = make_nodes(nodes) if nodes else ()
    except ValueError as exc:
        raise UsageError(str(exc)) from exc
    if fmt == SYNTHETIC:
        if trace and not (re.fullmatch("[0-9]{1,9}", trace) and 1 <= int(trace) <= MOST_JOBS):
            raise UsageError(f"{trace!r} is not a number of jobs", hint=f"1 to {MOST_JOBS:,}; a file needs its format")
        workload = synthetic(int(trace) if trace else jobs or 2_000, seed, nodes or "16x8")
    elif fmt == SERVED:
        if trace and trace not in RATIOS:
            raise UsageError(f"servers cannot be numbered {trace!r}", hint=f"known ways: {', '.join(RATIOS)}")
        workload = served(jobs or 300, seed, trace or RATIOS[0])
    elif fmt == MIXED:
        workload = mixed(jobs or 300, seed, nodes or "8x8")
    elif fmt in traces.FORMATS:
        workload = traces.read(fmt, trace, policy)
    else:
        known = ", ".join([SYNTHETIC, SERVED, MIXED, *traces.FORMATS])
        raise UsageError(f"there is no trace format {fmt!r}", hint=f"known formats: {known}")
    if jobs:
        first = sorted(workload.arrivals, key=lambda arrival: arrival.at_ms)[:jobs]  # some lists are in no order
        workload = replace(workload, arrivals=tuple(first))
    return elsewhere(workload, cluster) if cluster else workload


def _run(workload: Workload, policy: str, faults: dict[str, int], seed: int) -> Result:
    from jobsched.sim.faults import Chaos
    from jobsched.sim.run import POLICIES, Simulation

    simulation = Simulation(workload, POLICIES[policy], policy, seed)
    if not faults:
        return _with_progress(simulation)
    chaos = Chaos(simulation, faults, FAULT_SPAN_MS, replay=" ".join(["jobsched", *sys.argv[1:]]))
    chaos.run()
    chaos.verify()
    render.talk(f"what happened under {policy}: {chaos.tally}")
    return simulation.result()


def _with_progress(simulation: Simulation) -> Result:
    if not sys.stderr.isatty():
        return simulation.run()
    with click.progressbar(length=len(simulation.arrivals), label=simulation.name, file=sys.stderr) as bar:
        return simulation.run(lambda ended: bar.update(ended - bar.pos))


def _table(results: list[Result]) -> str:
    rows = [result.row() for result in results]
    keys = [key for key in rows[0] if key != "policy"]
    width = max(map(len, keys))
    head = " " * width + "".join(f"{row['policy']!s:>16}" for row in rows)
    body = [f"{key:<{width}}" + "".join(f"{_cell(row[key]):>16}" for row in rows) for key in keys]
    return "\n".join([head, *body])


def _cell(value: object) -> str:
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
