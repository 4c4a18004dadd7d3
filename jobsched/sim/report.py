"""A report of simulated runs as one HTML file: a table of figures and plots drawn as inline SVG. No plotting library.

Called by `jobsched simulate --report`.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import log10
from pathlib import Path

from jobsched.core.accounting import Accounts
from jobsched.core.resources import WHOLE_GPU
from jobsched.sim.run import Result

WIDTH, HEIGHT, MARGIN = 760, 220, 48
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f")
POINTS = 600
"""Most points per curve."""
BARS = 400
"""Most jobs in a Gantt chart."""
Curve = Sequence[tuple[float, float]]

STYLE = """body{font:14px system-ui,sans-serif;margin:2em;max-width:60em;color:#222}table{border-collapse:collapse}
td,th{padding:.25em .8em;border-bottom:1px solid #ddd;text-align:right}th:first-child,td:first-child{text-align:left}
svg{background:#fafafa;margin:.5em 0}text{font-size:11px;fill:#555}h2{margin-top:1.6em}"""


def write_report(results: Sequence[Result], folder: Path) -> Path:
    """Write `report.html` into `folder`; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.html"
    path.write_text(render(results))
    return path


def render(results: Sequence[Result]) -> str:
    """The page."""
    names = [f"{r.policy}" for r in results]
    parts = [
        f"<h1>{escape(results[0].workload)}</h1>",
        _table(results),
        "<h2>Jobs waiting</h2>",
        plot(names, [_over_time(r.accounts, 2) for r in results], "hours", "jobs"),
        "<h2>GPUs allocated</h2>",
        plot(names, [_over_time(r.accounts, 1) for r in results], "hours", "GPUs"),
        "<h2>Completion times</h2>",
        plot(names, [_distribution(r.accounts) for r in results], "log10 seconds", "share of jobs"),
    ]
    for result in results:
        parts += [f"<h2>Gantt: {escape(result.policy)}</h2>", gantt(result.accounts)]
    body = "\n".join(parts)
    return f"<!doctype html><meta charset=utf-8><title>jobsched simulate</title><style>{STYLE}</style>{body}\n"


def _table(results: Sequence[Result]) -> str:
    rows = [r.row() for r in results]
    keys = [key for key in rows[0] if key != "policy"]
    head = "".join(f"<th>{escape(str(row['policy']))}</th>" for row in rows)
    lines = "".join(
        f"<tr><td>{key}</td>{''.join(f'<td>{_figure(row[key])}</td>' for row in rows)}</tr>" for key in keys
    )
    return f"<table><tr><th></th>{head}</tr>{lines}</table>"


def _figure(value: object) -> str:
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _over_time(accounts: Accounts, which: int) -> Curve:
    unit = WHOLE_GPU if which == 1 else 1
    points = accounts.points
    every = max(1, len(points) // POINTS)
    return [((p[0] - accounts.start_ms) / 3_600_000, p[which] / unit) for p in points[::every]]


def _distribution(accounts: Accounts) -> Curve:
    times = sorted(job.jct_ms for job in accounts.jobs.values() if job.phase.terminal)
    every = max(1, len(times) // POINTS)
    return [(log10(max(1.0, ms / 1_000)), (i + 1) / len(times)) for i, ms in enumerate(times)][::every]


def plot(names: Sequence[str], curves: Sequence[Curve], x_label: str, y_label: str) -> str:
    """Curves over common axes."""
    xs = [x for curve in curves for x, _ in curve] or [0.0]
    ys = [y for curve in curves for _, y in curve] or [0.0]
    left, right, top = min(xs), max(xs), max(ys) or 1.0
    across = (WIDTH - 2 * MARGIN) / ((right - left) or 1.0)
    up = (HEIGHT - 2 * MARGIN) / top
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">', _axes(left, right, top)]
    for place, (name, curve) in enumerate(zip(names, curves, strict=True)):
        colour = COLOURS[place % len(COLOURS)]
        path = " ".join(f"{MARGIN + (x - left) * across:.1f},{HEIGHT - MARGIN - y * up:.1f}" for x, y in curve)
        parts.append(f'<polyline fill="none" stroke="{colour}" points="{path}"/>')
        parts.append(f'<text x="{MARGIN + 110 * place}" y="14" style="fill:{colour}">{escape(name)}</text>')
    parts.append(f'<text x="{WIDTH - MARGIN}" y="{HEIGHT - 8}" text-anchor="end">{x_label}</text>')
    parts.append(f'<text x="4" y="{MARGIN - 8}">{y_label}</text></svg>')
    return "".join(parts)


def _axes(left: float, right: float, top: float) -> str:
    frame = f"M{MARGIN} {MARGIN}V{HEIGHT - MARGIN}H{WIDTH - MARGIN}"
    parts = [f'<path d="{frame}" stroke="#999" fill="none"/>']
    for step in range(5):
        part = step / 4
        x, y = MARGIN + part * (WIDTH - 2 * MARGIN), HEIGHT - MARGIN - part * (HEIGHT - 2 * MARGIN)
        across, up = f"{left + part * (right - left):.3g}", f"{part * top:.3g}"
        parts.append(f'<text x="{x}" y="{HEIGHT - MARGIN + 14}" text-anchor="middle">{across}</text>')
        parts.append(f'<text x="{MARGIN - 4}" y="{y + 4}" text-anchor="end">{up}</text>')
    return "".join(parts)


def gantt(accounts: Accounts) -> str:
    """One line a job, oldest on top: grey while it waits, coloured by GPUs while it holds some."""
    jobs = sorted(accounts.jobs.values(), key=lambda job: (job.submitted_ms, job.job_id))
    jobs = jobs[:: max(1, len(jobs) // BARS)]
    begin, end = accounts.start_ms, max(accounts.end_ms, accounts.start_ms + 1)
    across = (WIDTH - 2 * MARGIN) / (end - begin)
    height = max(1, min(6, 1_200 // max(1, len(jobs))))
    parts = [f'<svg viewBox="0 0 {WIDTH} {height * len(jobs) + 20}" width="{WIDTH}">']
    for place, job in enumerate(jobs):
        y, until = place * height, job.ended_ms or end
        parts.append(_bar(MARGIN + (job.submitted_ms - begin) * across, y, (until - job.submitted_ms) * across, "#ddd"))
        for since, to, gpus in job.spells:
            colour = COLOURS[max(0, gpus).bit_length() % len(COLOURS)]
            parts.append(_bar(MARGIN + (since - begin) * across, y, (to - since) * across, colour))
    return "".join([*parts, "</svg>"])


def _bar(x: float, y: float, width: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y}" width="{max(0.3, width):.1f}" height="1" fill="{colour}"/>'
