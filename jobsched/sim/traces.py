"""Readers of recorded traces: one function per format, from its files to a `Workload`. Called by `jobsched simulate`
and the benchmarks; never part of a running server.

Files are found under the environment variable JOBSCHED_TRACES (default: `shared/traces` beside the project), in a
folder per format. Each reader gives the cluster and the rules of its format's paper.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from pathlib import Path

from jobsched.core.node import Node
from jobsched.core.policies.placement import Score
from jobsched.core.resources import JobId
from jobsched.errors import NotFound
from jobsched.sim.rows import MOST, Row, lines, rows, tabbed, wrong
from jobsched.sim.throughput import Adaptive, Profile, Profiled, Seats, Steady
from jobsched.sim.workload import MOST_GPUS, Arrival, Rules, Workload, elastic_spec, gang_spec, make_node, make_nodes
from jobsched.spec.job import JobSpec
from jobsched.spec.quantity import MAX_CPU_MILLI, show
from jobsched.spec.queue import QueueSpec

DEFAULT_ROOT = Path(__file__).resolve().parents[2].parent / "shared" / "traces"


def root() -> Path:
    """The folder of all traces; it may not exist."""
    return Path(os.environ.get("JOBSCHED_TRACES") or DEFAULT_ROOT)


def find(fmt: str, name: str) -> Path:
    """The file `name` of a format, compressed or not, or any path. Raises NotFound."""
    for folder in (root() / fmt, Path()):
        for suffix in ("", ".gz", ".csv", ".csv.gz", ".trace", ".trace.gz"):
            path = folder / f"{name}{suffix}"
            if path.is_file():
                return path
    raise NotFound(
        f"there is no trace {name!r} of format {fmt}",
        hint=f"traces are looked for in {root() / fmt}; set JOBSCHED_TRACES to their folder",
    )


def philly(name: str = "philly_2017-10", nodes: str = "philly_vc_nodes_load85", estimates: str = "") -> Workload:
    """Philly (ATC'19) with one pool of 8-GPU nodes per virtual cluster, as in Helios (SC'21). `estimates` names a file
    of run times that jobs say they expect, each off by some error; default: the true ones are told to the policies."""
    sizes = {row["vc"]: row.count("node num", most=100_000) for row in rows(find("philly", nodes))}
    guesses = rows(find("philly", estimates)) if estimates else ()
    told = [round(row.number("est_duration_s", least=-MOST)) for row in guesses]  # noise may take them below 0
    arrivals: list[Arrival] = []
    begin: datetime | None = None
    for place, row in enumerate(rows(find("philly", name))):
        vc = row["cluster"]
        if vc not in sizes:
            continue
        at = row.instant("timestamp")
        begin = begin or at.replace(hour=0, minute=0, second=0)
        run_ms, gpus = round(row.number("duration") * 1_000), row.gpus("num_gpus")
        if told and place >= len(told):
            raise row.wrong(f"{estimates} has only {len(told)} estimates")
        spec = gang_spec(gpus, 8, f"vc-{vc}", ("vc", vc))
        if told:
            spec = spec.model_copy(update={"expected": max(0, told[place] * 1_000)})
        arrivals.append(
            Arrival(
                at_ms=round((at - begin).total_seconds() * 1_000),
                job_id=JobId(f"{place:06}"),
                spec=spec,
                work=Steady(run_ms),
                told_ms=told[place] * 1_000 if told else None,
            )
        )
    return Workload(
        name=name,
        arrivals=tuple(arrivals),
        nodes=tuple(make_node(f"{vc}-{i:03}", 8, labels=(("vc", vc),)) for vc, n in sizes.items() for i in range(n)),
        queues=tuple(QueueSpec(name=f"vc-{vc}") for vc in sizes),
        rules=Rules(kill_ms=0, strict=True, restart_ms=30_000),
    )


MURI_START_S = {
    "vgg16": (7, 7, 8, 9, 9, 10), "vgg19": (7, 7, 8, 9, 10, 10), "resnet18": (4, 5, 5, 7, 7, 7),
    "shufflenet_v2_x1_0": (4, 4, 5, 5, 7, 8), "bert": (10,) * 6, "gpt2": (10,) * 6,
    "a2c": (38, 39, 39, 46, 46, 46), "dqn": (5, 5, 6, 6, 8, 8),
}  # fmt: skip
"""Muri's measured start-up cost by model, for 1, 2, 4, 8, 16 and 32 GPUs."""
MURI_SLOWDOWN = 1.015
"""Muri's own measured cost of running under its executor."""


def muri(name: str = "trace3", *, counted: bool = False, once: bool = False) -> Workload:
    """Muri (SIGCOMM'22): 8 nodes of 8 GPUs. `counted`: one node of 64, where only the number of free GPUs counts (its
    Tiresias). `once`: the start-up cost is paid at each start, not by everyone at every event as in its simulator."""
    arrivals: list[Arrival] = []
    for row in rows(find("muri", name)):
        gpus, at_ms, steps = row.gpus("num_gpu", most=32), row.count("submit_time"), row.count("iterations")
        work_ms = min(MOST, steps * row.count("iteration_time")) * MURI_SLOWDOWN
        costs = row.one_of("model_name", MURI_START_S)
        arrivals.append(
            Arrival(
                at_ms=at_ms,
                job_id=JobId(f"{len(arrivals):06}"),
                spec=gang_spec(gpus, 64 if counted else 8),
                work=Steady(work_ms, 1_000 * costs[gpus.bit_length() - 1], steps=steps),
            )
        )
    return Workload(
        name=name,
        arrivals=tuple(arrivals),
        nodes=(make_node("n00", 64),) if counted else tuple(make_node(f"n{i:02}", 8) for i in range(8)),
        rules=Rules(
            pause_everyone=not once, kill_ms=0, repack=True, settle=True, running_first=True, whole_seconds=True
        ),
    )


POLLUX_EPOCHS = {"bert": 2, "cifar10": 100, "ncf": 10, "imagenet": 90, "deepspeech2": 80, "yolov3": 50}
ANY = 1e300
"""Largest that is only compared and divided."""
POLLUX_MAX_LOCAL_BATCH = {"yolov3": 8}
Curve = tuple[tuple[float, float, float], ...]


@cache
def pollux_profile(app: str) -> Profile:
    """One application's profile, from the files under `pollux/profiles/APP`."""
    folder = f"profiles/{app}"
    by_placement: defaultdict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for row in rows(find("pollux", f"{folder}/placements")):
        by_placement[row["placement"]].append(_step_point(row))
    by_size: defaultdict[tuple[int, int], list[tuple[float, float, float]]] = defaultdict(list)
    for row in rows(find("pollux", f"{folder}/scalability")):
        by_size[row.count("num_nodes"), row.count("num_replicas")].append(_step_point(row))
    epochs = {
        int(path.name.split("-")[1].split(".")[0]): tuple(
            (row.number("progress"), row.number("grad_sqr", ANY), row.number("grad_var", ANY)) for row in rows(path)
        )
        for path in sorted((root() / "pollux" / folder).glob("validation-*.csv*"))
    }
    for size, points in _means_by_size(by_placement).items():
        by_size.setdefault(size, points)
    largest = max(point[0] for points in by_placement.values() for point in points)
    return Profile(
        app,
        {key: tuple(sorted(points)) for key, points in by_placement.items()},
        {key: tuple(sorted(points)) for key, points in by_size.items()},
        epochs,
        POLLUX_EPOCHS[app],
        POLLUX_MAX_LOCAL_BATCH.get(app, int(largest)),
    )


def _means_by_size(
    by_placement: Mapping[str, list[tuple[float, float, float]]],
) -> dict[tuple[int, int], list[tuple[float, float, float]]]:
    """(nodes, GPUs) -> means over the placements of that size, for each batch that all of them were measured with."""
    found: defaultdict[tuple[int, int], defaultdict[float, list[tuple[float, float]]]]
    found = defaultdict(lambda: defaultdict(list))
    for placement, points in by_placement.items():
        for local, step_s, sync_s in points:
            found[len(placement), sum(map(int, placement))][local].append((step_s, sync_s))
    return {
        size: [(local, *(sum(column) / len(column) for column in zip(*times, strict=True)))
               for local, times in batches.items()]
        for size, batches in found.items()
    }  # fmt: skip


def _step_point(row: Row) -> tuple[float, float, float]:
    return row.number("local_bsz"), row.number("step_time"), row.number("sync_time")


POLLUX_FIXED_BATCH = {"ncf": 32_768}
"""Applications that keep one GPU and this batch in every run of Pollux's simulator."""


def pollux(name: str = "workload-1.0_6", elastic: bool = False) -> Workload:
    """Pollux (OSDI'21): 16 nodes of 4 GPUs, passes every minute, half a minute without progress at each start, speeds
    from its measured profiles. Jobs ask for their tuned number of GPUs, or, `elastic`, are free in the number of GPUs
    and their batch, as in the paper's own runs of Pollux."""
    arrivals = []
    for place, row in enumerate(rows(find("pollux", name))):
        row.one_of("application", POLLUX_EPOCHS)
        profile, gpus, batch = pollux_profile(row["application"]), row.gpus("num_replicas"), row.count("batch_size", 1)
        arrivals.append(
            Arrival(
                at_ms=1_000 * row.count("time"),
                job_id=JobId(f"{place:06}"),
                spec=elastic_spec(_pollux_most(profile)) if elastic else gang_spec(gpus, 4, single=True),
                work=_pollux_adaptive(profile) if elastic else Profiled(profile, batch),
            )
        )
    return Workload(
        name=name,
        arrivals=tuple(arrivals),
        nodes=tuple(make_node(f"n{i:02}", 4) for i in range(16)),
        rules=Rules(
            kill_ms=0, pass_every_ms=60_000, repack=True, settle=True, score=Score.SPREAD,
            thresholds_gpu_s=(57_600,), report_every_ms=60_000 if elastic else 0,
        ),
    )  # fmt: skip


def _pollux_adaptive(profile: Profile) -> Adaptive:
    least = min(int(point[0]) for points in profile.by_placement.values() for point in points)
    return Adaptive(profile, least, POLLUX_FIXED_BATCH.get(profile.name, 0))


def _pollux_most(profile: Profile) -> int:
    """Most GPUs of one job: where its largest batch leaves each the least."""
    if profile.name in POLLUX_FIXED_BATCH:
        return 1
    return min(64, profile.max_batch // _pollux_adaptive(profile).local_least)


def tiresias(name: str = "60_job") -> Workload:
    """The smoke-test trace of Tiresias (NSDI'19), on 15 nodes of 4 GPUs as its testbed."""
    arrivals = [
        _steady(place, row.number("submit_time"), row.number("duration"), row.gpus("num_gpu"), 4, row["model_name"])
        for place, row in enumerate(rows(find("tiresias", name)))
    ]
    return Workload(name, tuple(arrivals), make_nodes("15x4"), rules=Rules(repack=True, whole_seconds=True))


def chronus(name: str = "trace_job_Philly_MIX1", unit_s: float = 60.0) -> Workload:
    """Chronus (SoCC'21): jobs with deadlines among best-effort ones. Its time unit is taken to be a minute; rows that
    ask for no GPU are dropped."""
    arrivals = []
    for place, row in enumerate(rows(find("chronus", name))):
        gpus, at_s = row.gpus("num_gpu", least=0), unit_s * row.number("submit_time")
        if not gpus:
            continue
        arrival = _steady(place, at_s, unit_s * row.number("duration"), gpus, 8, row["model_name"], row["user"])
        if row["best_effort"] == "0":
            first = replace(row, cells={"expect_time_list": row["expect_time_list"].split("-")[0]})
            arrival = arrival.by(at_s + unit_s * first.number("expect_time_list"))
        arrivals.append(arrival)
    return Workload(name, tuple(arrivals), make_nodes("100x8"))


def elasticflow(name: str = "elasticVpollux_e", kind: str = "A100") -> Workload:
    """ElasticFlow (ASPLOS'23): 16 nodes of 8 GPUs, jobs with absolute deadlines; the first arrival is the start."""
    table = list(rows(find("elasticflow", name)))
    begin = min((row.number("submit_time") for row in table), default=0.0)
    arrivals = [
        _steady(
            place, row.number("submit_time") - begin, row.number("duration"), row.gpus("num_gpu"), 8, row["model_name"]
        ).by(row.number("ddl") - begin)
        for place, row in enumerate(table)
    ]
    return Workload(name, tuple(arrivals), make_nodes("16x8", kind.lower()))


SHOCKWAVE_COLUMNS = ("type", "command", "directory", "steps flag", "needs data", "steps", "gpus", "mode", "weight",
                     "slo", "duration", "arrival")  # fmt: skip


def shockwave(name: str = "120jobs_dynamic") -> Workload:
    """Shockwave (NSDI'23): 32 V100 (128 for the long list) in nodes of 4; the recorded run time alone stands for the
    changing batch sizes."""
    table = list(tabbed(find("shockwave", name), {12: SHOCKWAVE_COLUMNS}))
    arrivals = [
        _steady(place, row.number("arrival"), row.number("duration"), row.gpus("gpus"), 4, row["type"])
        for place, row in enumerate(table)
    ]
    return Workload(name, tuple(arrivals), make_nodes("8x4" if len(table) <= 120 else "32x4", "v100"))


GAVEL_KINDS = ("k80", "p100", "v100")
GAVEL_COLUMNS = {
    7: ("type", "command", "steps flag", "needs data", "steps", "arrival", "gpus"),
    10: ("type", "command", "directory", "steps flag", "needs data", "steps", "gpus", "weight", "slo", "arrival"),
}
"""Of its lists for simulations, and of those for its testbed."""


def gavel(name: str = "msr_seed0_0e4a51", nodes: str = "3x4:v100+3x4:p100+3x4:k80") -> Workload:
    """Gavel (OSDI'20): jobs of known steps on GPUs of three kinds, speeds from its measured throughputs. A job names
    the kinds that it can run on at all (its type was measured there), the fastest first. What is wider than all GPUs of
    one kind is dropped: Gavel never mixes kinds in a job. The command column is data and is not used. Being stopped
    costs a job 30 s."""
    measured = find("gavel", "simulation_throughputs.json")
    try:
        table: dict[str, dict[str, dict[str, float]]] = json.loads("".join(lines(measured)))
    except json.JSONDecodeError as exc:
        raise wrong(measured, f"the file is not JSON: {exc.msg}", exc.lineno) from exc
    cluster = make_nodes(nodes)
    widest = max(Counter(gpu.kind for node in cluster for gpu in node.gpus).values())
    arrivals = []
    for place, row in enumerate(tabbed(find("gavel", name), GAVEL_COLUMNS)):
        job_type, steps, gpus, at_s = row["type"], row.number("steps"), row.gpus("gpus"), row.number("arrival")
        # Job types that were not measured on several GPUs go as fast as on one.
        speeds = {
            kind: jobs[str((job_type, gpus)) if str((job_type, gpus)) in jobs else str((job_type, 1))]["null"]
            for kind, jobs in table.items()
            if str((job_type, 1)) in jobs
        }
        kinds = [kind for kind in GAVEL_KINDS if speeds.get(kind)]
        kinds.sort(key=lambda kind: -speeds[kind])
        if not kinds or gpus > widest:
            continue
        if "v100" not in kinds:
            raise row.wrong(f"{job_type} was not measured on a V100, by which run times are told", "type")
        run_s = steps / speeds["v100"]
        arrival = _steady(place, at_s, run_s, gpus, 4, job_type, single=True)
        spec = gang_spec(gpus, 4, kinds="|".join(kinds), single=True, program=_word(job_type))
        work = Steady(1_000 * run_s, 0, GavelSpeed(tuple(sorted(speeds.items()))), round(steps))
        arrivals.append(replace(arrival, spec=spec, work=work))
    return Workload(name, tuple(arrivals), cluster, rules=Rules(restart_ms=30_000))


def _word(text: str) -> str:
    return "-".join(re.findall(r"[a-z0-9]+", text.lower()))


@dataclass(frozen=True, slots=True)
class GavelSpeed:
    """Speed of one job type relative to V100; the slowest kind of a gang sets its pace."""

    steps_s: tuple[tuple[str, float], ...]

    def __call__(self, seats: Seats) -> float:
        table = dict(self.steps_s)
        best = table["v100"]
        suffix = "_unconsolidated" if len(seats) > 1 else ""
        return min(max(table.get(f"{kind or 'v100'}{suffix}", best), 1e-6) for kind, _ in seats) / best


def openb(name: str = "openb_pod_list_default", nodes: str = "openb_node_list_gpu_node") -> Workload:
    """Alibaba's GPU-sharing cluster (FGD, ATC'23): pods live from their creation to their deletion. Lists without times
    arrive a second apart and stay for a year."""
    arrivals = []
    for place, row in enumerate(rows(find("openb", name))):
        begin_s = row.number("creation_time") if row.get("creation_time") else float(place)
        end_s = row.number("deletion_time") if row.get("deletion_time") else begin_s + 365 * 86_400
        work = Steady(max(1_000.0, 1_000 * (end_s - begin_s)))
        arrivals.append(Arrival(round(1_000 * begin_s), JobId(f"{place:06}"), openb_spec(row), work))
    return Workload(name, tuple(arrivals), openb_nodes(nodes))


def openb_nodes(name: str = "openb_node_list_gpu_node") -> tuple[Node, ...]:
    return tuple(
        make_node(
            row["sn"], row.gpus("gpu", least=0), row["model"].lower(), row.count("cpu_milli"),
            row.count("memory_mib", most=1 << 29) << 20,
        )
        for row in rows(find("openb", name))
    )  # fmt: skip


def openb_spec(row: Row) -> JobSpec:
    """A pod as a job of one replica; a share when it asks for part of one GPU."""
    gpus, gpu_milli = row.gpus("num_gpu", least=0, most=MOST_GPUS), row.count("gpu_milli", most=1_000)
    if gpus and not gpu_milli:
        raise row.wrong("a pod with GPUs takes none of them", "gpu_milli")
    cpu_milli, memory_mib = row.count("cpu_milli", most=MAX_CPU_MILLI), row.count("memory_mib", most=1 << 29)
    try:
        return _pod(cpu_milli, memory_mib, gpus, gpu_milli, row.get("gpu_spec"))
    except ValueError:
        raise row.wrong(f"{show(row.get('gpu_spec'))} is not a list of GPU kinds such as P100|T4", "gpu_spec") from None


@cache
def _pod(cpu_milli: int, memory_mib: int, gpus: int, gpu_milli: int, kinds: str) -> JobSpec:
    role: dict[str, object] = {"command": "pod", "cpu": f"{cpu_milli}m", "memory": f"{memory_mib}Mi"}
    if gpus:
        role["gpu"] = {"type": kinds.lower() or "any", "count": gpus if gpus > 1 else gpu_milli / 1_000}
    return JobSpec.model_validate({"roles": {"worker": role}, "start_timeout": 0})


def _steady(
    place: int, at_s: float, run_s: float, gpus: int, per_node: int, model: str, owner: str = "sim",
    single: bool = False,
) -> Arrival:  # fmt: skip
    run_ms = max(1_000, round(1_000 * run_s))
    return Arrival(
        at_ms=round(1_000 * at_s),
        job_id=JobId(f"{place:06}"),
        spec=gang_spec(gpus, per_node, single=single, program=_word(model) or "train"),
        work=Steady(run_ms),
        owner=owner,
    )


def _muri_for(name: str, policy: str) -> Workload:
    return muri(name, counted=policy == "las")


def _philly_for(name: str, policy: str) -> Workload:
    return philly(name, estimates=f"{name}_noisy_estimate" if policy == "guessed" else "")


def read(fmt: str, name: str, policy: str) -> Workload:
    """A trace (the format's first by default) as it is played under a policy: `guessed` is about jobs that say how long
    they expect to run. Raises NotFound, and SpecError where a file is not what its format says."""
    reader, first = FORMATS[fmt]
    workload = reader(name or first, policy)
    if not workload.arrivals:
        raise wrong(find(fmt, name or first), "there is not one job in it")
    return workload


FORMATS: dict[str, tuple[Callable[[str, str], Workload], str]] = {
    "philly": (_philly_for, "philly_2017-10"),
    "muri": (_muri_for, "trace3"),
    "pollux": (lambda name, policy: pollux(name, elastic=policy == "elastic"), "workload-1.0_6"),
    "gavel": (lambda name, policy: gavel(name), "msr_seed0_0e4a51"),
    "shockwave": (lambda name, policy: shockwave(name), "120jobs_dynamic"),
    "chronus": (lambda name, policy: chronus(name), "trace_job_Philly_MIX1"),
    "elasticflow": (lambda name, policy: elasticflow(name), "elasticVpollux_e"),
    "tiresias": (lambda name, policy: tiresias(name), "60_job"),
    "openb": (lambda name, policy: openb(name), "openb_pod_list_default"),
}
"""Format -> (reader of (trace, policy), its first trace)."""


def missing() -> tuple[str, ...]:
    """Formats whose folder is not there."""
    return tuple(fmt for fmt in FORMATS if not (root() / fmt).is_dir())
