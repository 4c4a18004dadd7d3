"""Jobs and listings as HTML for notebooks: static, escaped, without scripts, so that it also shows on a code host and
in exports.

Used by the handles of `client.client`. Talks to nobody; pandas and IPython are used only where they are installed.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from html import escape
from typing import TYPE_CHECKING, Any, TypeVar

from jobsched.core.answers import JobAnswer, NodeAnswer
from jobsched.core.job import Phase
from jobsched.errors import MissingExtra

if TYPE_CHECKING:
    from jobsched.client.client import JobHandle

T = TypeVar("T")

COLOURS: Mapping[Phase, tuple[str, str]] = {
    Phase.QUEUED: ("#6b7280", "○"),
    Phase.STARTING: ("#0369a1", "◔"),
    Phase.RUNNING: ("#1d4ed8", "▶"),
    Phase.STOPPING: ("#a16207", "◼"),
    Phase.SUCCEEDED: ("#15803d", "✔"),
    Phase.FAILED: ("#b91c1c", "✘"),
    Phase.CANCELLED: ("#6b7280", "⊘"),
}
"""Colour and glyph of each phase; the word always stands beside them."""
CELL = "text-align:left;padding:2px 12px 2px 0;vertical-align:top"
LIVE_INTERVAL_S = 0.5


class Listing(tuple[T, ...]):
    """A tuple that shows as a table in notebooks and turns into a data frame."""

    __slots__ = ()

    def __new__(cls, items: Iterable[T] = ()) -> Listing[T]:
        return super().__new__(cls, items)

    def rows(self) -> list[dict[str, Any]]:
        """Flat records, one per item."""
        return [_row(item) for item in self]

    def to_frame(self) -> Any:
        """A pandas DataFrame of `rows()`. Raises `MissingExtra` without pandas."""
        try:
            import pandas
        except ImportError as exc:
            raise MissingExtra("to_frame() needs pandas", hint="pip install pandas") from exc
        return pandas.DataFrame(self.rows())

    def _repr_html_(self) -> str:
        rows = self.rows()
        if not rows:
            return "<em>nothing to show</em>"
        cells = [[_cell(value) for value in row.values()] for row in rows]
        return table(rows[0], cells)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """An HTML table; `rows` hold HTML, `head` plain text."""
    top = "".join(f'<th style="{CELL}">{escape(name)}</th>' for name in head)
    body = "".join("<tr>" + "".join(f'<td style="{CELL}">{cell}</td>' for cell in row) + "</tr>" for row in rows)
    return f'<table style="border-collapse:collapse"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'


def job_html(answer: JobAnswer) -> str:
    """A card: name, state, headline, progress bar, timeline, replicas."""
    job, progress = answer.job, answer.progress
    parts = [
        f'<div style="font-family:system-ui,sans-serif"><strong>{escape(job.name)}</strong> '
        f"<code>{escape(job.id)}</code> {_pill(job.phase)} {escape(answer.headline or job.reason)}",
    ]
    if progress is not None and progress.step >= 0:
        of = f" of {progress.total}" if progress.total > 0 else ""
        numbers = " · ".join(f"{escape(name)} {value:.4g}" for name, value in progress.metrics)
        parts.append(f"<div>step {progress.step}{of}{' · ' + numbers if numbers else ''}</div>")
        if progress.total > 0:
            parts.append(_bar(min(1.0, progress.step / progress.total)))
    parts.append(_timeline(answer))
    if progress is not None and progress.replicas:
        parts.append(table(
            ("replica", "rank", "node", "state", "step", "restarts"),
            [[escape(f"{r.role}/{r.index}"), str(r.rank) if r.rank >= 0 else "", escape(r.node), escape(r.state),
              str(r.step) if r.step >= 0 else "", str(r.restart)] for r in progress.replicas],
        ))
    return "".join(parts) + "</div>"


def live(handle: JobHandle, timeout: float | None) -> None:
    """Keep a job's card current in the notebook's output; prints lines where IPython is not installed."""
    until = None if timeout is None else time.monotonic() + timeout
    try:
        from IPython.display import HTML, display
    except ImportError:
        shown = None
    else:
        shown = display(HTML(job_html(handle.refresh().answer)), display_id=True)
    drawn_at = 0.0
    for _ in handle.updates(LIVE_INTERVAL_S):
        now = time.monotonic()
        if until is not None and now >= until:
            break
        if now - drawn_at >= LIVE_INTERVAL_S:
            drawn_at = now
            _show(shown, handle)
    _show(shown, handle.refresh())


def _show(shown: Any, handle: JobHandle) -> None:
    if shown is None:
        print(repr(handle), handle.headline)  # noqa: T201  the plain fallback of a display
    else:
        from IPython.display import HTML

        shown.update(HTML(job_html(handle.answer)))


def _cell(value: Any) -> str:
    if isinstance(value, Phase):
        return _pill(value)
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else escape(str(value))


def _pill(phase: Phase) -> str:
    colour, glyph = COLOURS[phase]
    return (f'<span style="background:{colour};color:#fff;border-radius:9px;padding:1px 8px;font-size:85%">'
            f"{glyph} {phase}</span>")


def _bar(fraction: float) -> str:
    return (f'<svg width="320" height="10" role="img" aria-label="{fraction:.0%}"><rect width="320" height="10" rx="3" '
            f'fill="#e5e7eb"/><rect width="{320 * fraction:.0f}" height="10" rx="3" fill="#1d4ed8"/></svg>')


def _timeline(answer: JobAnswer) -> str:
    """Waiting, and running since the first start, to scale, up to now or the end."""
    job = answer.job
    end = job.ended_at_ms or int(time.time() * 1_000)
    span = max(1, end - job.submitted_at_ms)
    started = job.first_started_at_ms or end
    waited = max(0.0, min(1.0, (started - job.submitted_at_ms) / span)) * 320
    colour, _ = COLOURS[job.phase if job.first_started_at_ms else Phase.QUEUED]
    label = f"waited {(started - job.submitted_at_ms) / 1_000:.1f} s, then {(end - started) / 1_000:.1f} s"
    return (f'<div><svg width="320" height="8" role="img" aria-label="{label}"><rect width="{waited:.1f}" height="8" '
            f'fill="#9ca3af"/><rect x="{waited:.1f}" width="{320 - waited:.1f}" height="8" fill="{colour}"/></svg> '
            f'<small>{label}; attempt {job.attempt}, {job.restarts} restarts</small></div>')


def _row(item: Any) -> dict[str, Any]:
    """One item as a flat record: handles and answers by what people ask for, other values by their plain fields."""
    answer = getattr(item, "answer", item)
    if isinstance(answer, JobAnswer):
        job, progress = answer.job, answer.progress
        return {"id": job.id, "name": job.name, "queue": job.spec.queue, "phase": job.phase,
                "reason": str(getattr(item, "reason", job.reason)), "attempts": job.attempt, "restarts": job.restarts,
                "step": progress.step if progress and progress.step >= 0 else None}
    if isinstance(answer, NodeAnswer):
        node = answer.node
        return {"name": node.name, "state": answer.state, "gpu_kinds": ", ".join(sorted({g.kind for g in node.gpus})),
                "gpus": len(node.gpus), "free_gpus": answer.free_gpus, "cpus": node.cpu_milli / 1_000,
                "free_cpus": answer.free.cpu_milli / 1_000, "memory_gib": node.memory_bytes / 2**30,
                "free_memory_gib": answer.free.memory_bytes / 2**30, "jobs": len(answer.jobs)}
    assert is_dataclass(item)
    assert not isinstance(item, type)
    return _flat(asdict(item))


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            flat |= _flat(value)
        elif name == "metrics":
            flat |= dict(value)
        elif isinstance(value, (list, tuple)):
            flat[name] = len(value)
        else:
            flat[name] = getattr(value, "name", value) if not isinstance(value, (str, int, float)) else value
    return flat
