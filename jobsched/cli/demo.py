"""`jobsched demo`: a parameter-server job on four pretended nodes loses a worker and a parameter server and still
learns.

Everything is real but the GPUs: an own server in an own directory, real processes, real SIGKILLs. It claims nothing
that it has not read from the event log, and it leaves nothing running.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jobsched.cli import attach, render
from jobsched.cli.cluster import NODE_COLUMNS
from jobsched.cli.explain import explanation
from jobsched.cli.render import talk
from jobsched.cli.server import end_supervisor, stop_server
from jobsched.client import locate
from jobsched.client.documents import TERMINAL, Document, submission
from jobsched.client.interleave import interleave
from jobsched.client.remote import Remote
from jobsched.errors import JobFailed, JobschedError, UsageError, WaitTimeout

if TYPE_CHECKING:
    from jobsched.spec.job import JobSpec

NODES = """\
# written by 'jobsched demo': four nodes of eight GPUs that exist in name only
backend:
  local:
    virtual_nodes:
      - {{count: 4, cpu: 8, memory: 32Gi, gpus: "sim-gpu:8"}}
    ports: {first}-{last}   # some place in the usual range, so that a second server on this machine is not in the way
    preload: {preload}      # what the job's replicas import: a warm interpreter makes their restarts quick
"""
JOB = Path("jobs/digits_ps/job.yaml")
GOAL = 0.95
KILL_AT = {"worker": 0.15, "ps": 0.45}
"""Share of all steps after which one replica of the role is killed."""
ACCURACY = ("test_accuracy", "accuracy", "test_acc", "acc")


@dataclass(slots=True)
class Casualty:
    """One replica that the demo kills, and what became of it."""

    role: str
    index: int = -1
    pid: int = 0
    step: int = -1
    killed_at: float = 0.0
    back_at_step: int = -1
    """Step of the training when its successor first reported."""
    back_after_s: float = 0.0
    """From the kill to the first step of the training after that report."""

    @property
    def name(self) -> str:
        return f"{self.role}/{self.index}"


@dataclass(slots=True)
class Show:
    """The course of one demo."""

    remote: Remote
    job_id: str
    line: attach.StatusLine
    casualties: list[Casualty] = field(default_factory=lambda: [Casualty("worker"), Casualty("ps")])

    def say(self, text: str) -> None:
        self.line.above(lambda: talk(f"  {text}"))

    def step(self, document: Document) -> None:
        """Kill when it is time, one after the other, and notice who is back."""
        progress = document["progress"]
        if not progress or progress["step"] < 0:
            return
        for casualty in self.casualties:
            if not casualty.killed_at:
                if document["phase"] == "RUNNING" and progress["step"] >= KILL_AT[casualty.role] * progress["total"]:
                    self._kill(casualty, progress)
                return
            if not casualty.back_after_s:
                self._look_for(casualty, progress)
                return

    def _kill(self, casualty: Casualty, progress: Document) -> None:
        running = [r for r in progress["replicas"]
                   if r["role"] == casualty.role and r["state"] == "running" and r["ident"].isdecimal()]
        if not running:
            return
        victim = running[-1]
        casualty.index, casualty.pid, casualty.step = victim["index"], int(victim["ident"]), progress["step"]
        if not _belongs_to(casualty.pid, self.job_id):
            return
        os.kill(casualty.pid, signal.SIGKILL)
        casualty.killed_at = time.monotonic()
        self.say(f"✂ SIGKILL to {casualty.name} (pid {casualty.pid} on {victim['node']}) at step {casualty.step}")

    def _look_for(self, casualty: Casualty, progress: Document) -> None:
        for replica in progress["replicas"]:
            if (
                (replica["role"], replica["index"]) != (casualty.role, casualty.index) or replica["state"] != "running"
                or not replica["restart"] or replica["ident"] == str(casualty.pid) or replica["beat_age_ms"] < 0
            ):
                continue
            if casualty.back_at_step < 0:
                casualty.back_at_step = progress["step"]
            elif progress["step"] > casualty.back_at_step:
                casualty.back_after_s = time.monotonic() - casualty.killed_at
                self.say(f"✔ {casualty.name} is back as pid {replica['ident']}, and training goes on at step "
                         f"{progress['step']}, {casualty.back_after_s:.1f} s after the kill")


@click.command()
@click.option("--job", "job_file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help=f"The job to run; default: {JOB} of the source tree.")
@click.option("--home", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="Directory for the demo's server; default: a new temporary one, which is kept for its logs.")
@click.option("--limit", default=90.0, show_default=True, metavar="S", help="Give up after so many seconds.")
def demo(job_file: Path | None, home: Path | None, limit: float) -> int:
    """Train a parameter-server job on four virtual nodes of eight GPUs, SIGKILL one worker and one parameter server in
    the middle, and watch both recover. Exit 0 only if all of that happened and the model learnt.

    \b
    Example:
      jobsched demo
    """
    from jobsched.load import load_job_file

    begun = time.monotonic()
    spec = load_job_file(job_file or _find_job(), environ=os.environ)
    place = (home or Path(tempfile.mkdtemp(prefix="jobsched-demo-"))).absolute()
    place.mkdir(parents=True, exist_ok=True)
    config = place / "server.yaml"
    first = secrets.choice(range(20_000, 32_000, 400))
    preload = sorted({module for role in spec.roles.values() for module in role.preload})
    config.write_text(NODES.format(first=first, last=first + 399, preload=json.dumps(preload)))
    talk(f"a server of its own in {place}, with 4 virtual nodes of 8 sim-gpu each")
    try:
        endpoint = locate.start(place, config=config)
        with Remote(endpoint, relocate=lambda: locate.running(place)) as remote:
            return _perform(remote, spec, place, begun, limit)
    finally:
        left = clear_away(place)
        talk(f"the demo's server is stopped, {'nothing is left running' if not left else f'STILL RUNNING: {left}'}; "
             f"{time.monotonic() - begun:.0f} s in all")


def _perform(remote: Remote, spec: JobSpec, home: Path, begun: float, limit: float) -> int:
    deadline = begun + limit
    render.write(render.plain_table([c for c in NODE_COLUMNS if not c.wide], _nodes(remote)) + "\n")
    page = _submit(remote, submission(spec.model_dump(mode="json")))
    show = Show(remote, page["id"], attach.StatusLine())
    roles = ", ".join(f"{role.replicas.prefer} {name}" for name, role in spec.roles.items())
    talk(f"submitted {page['name']} ({page['id']}): {roles}")
    with closing(interleave(attach.job_updates(remote, show.job_id), silence_s=1.0)) as updates:
        for document in updates:
            if time.monotonic() > deadline:
                raise WaitTimeout(f"the job has not ended within {limit:g} s", hint=f"its logs are in {home}")
            if document is not None:
                show.line.show(document)
                show.step(document)
    show.line.clear()
    return _verdict(show, home)


def _verdict(show: Show, home: Path) -> int:
    """Read the end from the server's records, not from what was shown, and say what holds and what does not."""
    document = attach.fetch(show.remote, show.job_id)
    history = show.remote.documents(f"jobs/{show.job_id}/events", limit=10_000)
    samples = show.remote.documents(f"jobs/{show.job_id}/samples", limit=10_000)
    restarted = [who for stored in history if stored["event"]["kind"] == "ReplicasRestarted"
                 for who in stored["event"]["replicas"]]
    accuracy = final_accuracy(samples)
    checks = [
        (f"{c.name} was killed at step {c.step}, restarted in place (event log), and training went on"
         if c.killed_at else f"no {c.role} was killed: the job ended first",
         bool(c.killed_at) and c.name in restarted and bool(c.back_after_s))
        for c in show.casualties
    ]
    checks += [
        (f"the job {document['phase']} in attempt {document['attempts']} with {document['restarts']} restarts",
         document["phase"] == "SUCCEEDED"),
        (f"test accuracy {accuracy:.4f}, at least {GOAL}" if accuracy is not None else "no test accuracy was reported",
         accuracy is not None and accuracy >= GOAL),
    ]
    render.write("\n" + explanation(show.remote.documents(f"jobs/{show.job_id}/why")) + "\n\n")
    for text, holds in checks:
        render.write(f"{'✔' if holds else '✘'} {text}\n")
    render.write(f"logs: {home / 'logs'}\n")
    if document["phase"] in TERMINAL and all(holds for _, holds in checks):
        return 0
    raise JobFailed("the demo did not show all that it should", hint=f"server log: {home / 'server.log'}")


def final_accuracy(samples: Sequence[Document]) -> float | None:
    """The last accuracy that any sample carries."""
    for sample in reversed(samples):
        metrics: dict[str, Any] = dict(sample["metrics"])
        for name in ACCURACY:
            if name in metrics:
                return float(metrics[name])
    return None


def clear_away(home: Path) -> list[int]:
    """Stop the server of `home` and whatever else was started from there; returns the pids that would not go."""
    import psutil

    try:
        stop_server(home, force=True)
    except JobschedError as exc:
        talk(exc.render())
    end_supervisor(home, kill=True)
    mine = [p for p in psutil.process_iter(["pid", "cmdline"])
            if p.pid != os.getpid() and any(str(home) in word for word in p.info["cmdline"] or ())
            and any("jobsched.backends" in word for word in p.info["cmdline"] or ())]
    family = [child for p in mine for child in (*_children(p), p)]
    for process in family:
        _signal(process, signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=5)
    for process in alive:
        _signal(process, signal.SIGKILL)
    _, alive = psutil.wait_procs(alive, timeout=60)  # a machine that is busy takes its time
    return [p.pid for p in alive]


def _children(process: Any) -> list[Any]:
    import psutil

    try:
        return list(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def _signal(process: Any, number: int) -> None:
    import psutil

    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        pass


def _belongs_to(pid: int, job_id: str) -> bool:
    """Whether the process really is a replica of this job: its environment says so. Nobody else is ever killed."""
    import psutil

    try:
        return job_id in psutil.Process(pid).environ().get("JOBSCHED_LAUNCH", "")
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def _find_job() -> Path:
    """The example in the working directory or in the source tree that this package was installed from."""
    for root in (Path.cwd(), Path(__file__).resolve().parents[2]):
        if (root / JOB).is_file():
            return root / JOB
    raise UsageError(f"{JOB} is not here", hint="run it in a clone of jobsched, or name a job with --job")


def _nodes(remote: Remote) -> list[Document]:
    """The nodes, once the server has seen them."""
    until = time.monotonic() + 10
    while True:
        found: list[Document] = remote.documents("nodes")
        if found or time.monotonic() > until:
            return found
        time.sleep(0.05)


def _submit(remote: Remote, body: Document) -> Document:
    return render.job_document(json.loads(remote.post("jobs", body))["jobs"][0])

