"""A report of simulated runs: one HTML file with a table of figures and plots, and each plot as a PNG beside it.

Called by `jobsched simulate --report`. Plots are drawn by matplotlib (extra `sim`), which is imported only here.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from jobsched.core.accounting import Accounts
from jobsched.core.resources import WHOLE_GPU
from jobsched.errors import MissingExtra
from jobsched.sim.run import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 2_000
"""Most points per curve."""
BARS = 400
"""Most jobs in a Gantt chart."""
HOUR_MS = 3_600_000
DPI = 110

STYLE = """body{font:14px system-ui,sans-serif;margin:2em;max-width:70em;color:#222}table{border-collapse:collapse}
td,th{padding:.25em .8em;border-bottom:1px solid #ddd;text-align:right}th:first-child,td:first-child{text-align:left}
img{max-width:100%;margin:.5em 0}h2{margin-top:1.6em}"""


def write_report(results: Sequence[Result], folder: Path) -> Path:
    """Write `report.html` and a PNG per plot into `folder`; returns the path of the HTML file, which needs no other."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [f"<h1>{escape(results[0].workload)}</h1>", _table(results)]
    for title, name, figure in _figures(results):
        png = BytesIO()
        figure.savefig(png, format="png", dpi=DPI)
        (folder / f"{name}.png").write_bytes(png.getvalue())
        image = base64.b64encode(png.getvalue()).decode()
        parts.append(f'<h2>{escape(title)}</h2><img alt="{escape(title)}" src="data:image/png;base64,{image}">')
    path = folder / "report.html"
    head = f"<!doctype html><meta charset=utf-8><title>jobsched simulate</title><style>{STYLE}</style>"
    path.write_text(head + "\n".join(parts) + "\n")
    return path


def _figures(results: Sequence[Result]) -> Iterator[tuple[str, str, Figure]]:
    """(title, file name, plot)"""
    yield "Jobs waiting", "queue", _over_time(results, 2, "jobs waiting")
    yield "GPUs allocated", "allocation", _over_time(results, 1, "GPUs")
    yield "Completion times", "jct", _distribution(results)
    for result in results:
        yield f"Gantt: {result.policy}", f"gantt-{result.policy}", _gantt(result.accounts)


def plotting() -> type[Figure]:
    """matplotlib's `Figure`, which needs no window and no global state. Raises `MissingExtra`."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingExtra("reports need the package 'matplotlib'", hint='pip install "jobsched[sim]"') from error
    return Figure


def _figure(height: float = 3.0) -> Figure:
    """An empty plot with one pair of axes."""
    figure = plotting()(figsize=(9, height), layout="constrained")
    figure.subplots()
    return figure


def _table(results: Sequence[Result]) -> str:
    rows = [r.row() for r in results]
    keys = [key for key in rows[0] if key != "policy"]
    head = "".join(f"<th>{escape(str(row['policy']))}</th>" for row in rows)
    lines = "".join(
        f"<tr><td>{key}</td>{''.join(f'<td>{_number(row[key])}</td>' for row in rows)}</tr>" for key in keys
    )
    return f"<table><tr><th></th>{head}</tr>{lines}</table>"


def _number(value: object) -> str:
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _over_time(results: Sequence[Result], which: int, label: str) -> Figure:
    figure = _figure()
    (axes,) = figure.axes
    unit = WHOLE_GPU if which == 1 else 1
    for result in results:
        accounts = result.accounts
        points = accounts.points[:: max(1, len(accounts.points) // POINTS)] + accounts.points[-1:]
        hours = [(point[0] - accounts.start_ms) / HOUR_MS for point in points]
        axes.step(hours, [point[which] / unit for point in points], where="post", lw=1, label=result.policy)
    axes.set(xlabel="hours", ylabel=label, ylim=(0, None))
    axes.legend()
    return figure


def _distribution(results: Sequence[Result]) -> Figure:
    figure = _figure()
    (axes,) = figure.axes
    for result in results:
        times = sorted(max(0.001, job.jct_ms / 1_000) for job in result.accounts.jobs.values() if job.phase.terminal)
        if times:
            axes.ecdf(times, label=result.policy)
    axes.set(xscale="log", xlabel="seconds from submission to end", ylabel="share of jobs")
    axes.legend()
    return figure


def _gantt(accounts: Accounts) -> Figure:
    """One line a job, oldest on top: grey while it waits, the darker the more GPUs while it holds some."""
    jobs = sorted(accounts.jobs.values(), key=lambda job: (job.submitted_ms, job.job_id))
    jobs = jobs[:: max(1, len(jobs) // BARS)]
    figure = _figure(min(12.0, 2.0 + len(jobs) / 40))
    (axes,) = figure.axes
    most = max((gpus for job in jobs for _, _, gpus in job.spells), default=1)

    def hours(begin: int, end: int) -> tuple[float, float]:
        return (begin - accounts.start_ms) / HOUR_MS, max(1, end - begin) / HOUR_MS

    for place, job in enumerate(jobs):
        axes.broken_barh([hours(job.submitted_ms, job.ended_ms or accounts.end_ms)], (place, 1), color="#e4e4e4")
        shades = [str(0.75 - 0.7 * gpus.bit_length() / max(1, most.bit_length())) for _, _, gpus in job.spells]
        axes.broken_barh([hours(since, until) for since, until, _ in job.spells], (place, 1), color=shades)
    axes.set(xlabel="hours", ylabel="jobs, oldest on top")
    axes.set_title(f"light grey: waits; the darker, the more GPUs it holds (up to {most})", loc="left", fontsize=9)
    axes.invert_yaxis()
    return figure
