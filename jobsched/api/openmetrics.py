"""`/metrics`: the state of jobsched as OpenMetrics text. Labels are bounded (phases, queues, states): no job names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import get_args

from jobsched.core.answers import NodeState
from jobsched.core.job import Phase
from jobsched.service import Service

MEDIA_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"
Sample = tuple[Mapping[str, str], float]


def render(service: Service) -> str:
    """Current numbers. O(live jobs + nodes)."""
    return "\n".join((*_lines(service), "# EOF", ""))


def _lines(service: Service) -> Iterator[str]:
    counts = service.count_by_phase()
    queues, nodes = service.queues(), service.nodes()
    yield from _family("jobsched_leader", "gauge", "Whether this server leads.", [({}, float(service.live.leading))])
    health = service.live.health
    yield from _family("jobsched_ticks", "counter", "Rounds of the controller.", [({}, float(health.ticks))])
    yield from _family(
        "jobsched_last_tick_seconds", "gauge", "How long the last round took.", [({}, health.last_tick_ms / 1_000)]
    )
    yield from _family(
        "jobsched_rejected_decisions", "counter", "Decisions that a wish overtook.", [({}, float(health.rejected))]
    )
    yield from _family("jobsched_events", "counter", "Events in the log.", [({}, float(service.last_seq()))])
    yield from _family(
        "jobsched_jobs", "gauge", "Jobs by phase.", (({"phase": p.value}, float(counts.get(p.value, 0))) for p in Phase)
    )
    yield from _family(
        "jobsched_queue_jobs", "gauge", "Live jobs by queue.",
        (({"queue": q.queue.name, "state": state}, float(count))
         for q in queues for state, count in (("waiting", q.waiting), ("active", q.active))),
    )  # fmt: skip
    yield from _family(
        "jobsched_queue_gpus_in_use", "gauge", "GPUs held by queue.",
        (({"queue": q.queue.name}, q.gpus_in_use) for q in queues),
    )  # fmt: skip
    present = [n for n in nodes if n.state != "lost"]
    devices = [gpu for n in present for gpu in n.node.gpus]
    in_use = sum(gpu.healthy for gpu in devices) - sum(n.free.gpu_milli for n in present) / 1_000
    yield from _family(
        "jobsched_gpus", "gauge", "GPUs of the nodes that are present.",
        [({"state": "total"}, float(len(devices))), ({"state": "in_use"}, in_use),
         ({"state": "unhealthy"}, float(sum(not gpu.healthy for gpu in devices)))],
    )  # fmt: skip
    yield from _family(
        "jobsched_nodes", "gauge", "Nodes by state.",
        (({"state": state}, float(sum(n.state == state for n in nodes))) for state in get_args(NodeState)),
    )  # fmt: skip


def _family(name: str, kind: str, text: str, samples: Iterable[Sample]) -> Iterator[str]:
    yield f"# TYPE {name} {kind}"
    yield f"# HELP {name} {text}"
    for labels, value in samples:
        shown = ",".join(f'{key}="{_escaped(label)}"' for key, label in labels.items())
        yield f"{name}{'_total' if kind == 'counter' else ''}{'{' + shown + '}' if shown else ''} {value:g}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
