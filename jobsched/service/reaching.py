"""At the replicas of a job: their logs, a command beside them, a port of theirs, a checkpoint now."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jobsched.core.answers import CheckpointAnswer, LogLine
from jobsched.core.job import Job, Phase, Replica, ReplicaState
from jobsched.core.launch import LaunchKey, launch_key
from jobsched.errors import Conflict, NotFound, UsageError
from jobsched.live import LiveView
from jobsched.logs import LogReader, Selection
from jobsched.ports import Backend, Reach, Session, Store, Window
from jobsched.service.finding import resolve, suggest
from jobsched.spec.job import training_roles


@dataclass(frozen=True, slots=True)
class Where:
    """The replica that somebody wants to get at: of the job `ref`; without a role that of rank 0, without an index the
    first."""

    ref: str
    role: str = ""
    index: int | None = None
    owner: str = ""


class Replicas:
    def __init__(self, store: Store, live: LiveView, backend: Backend) -> None:
        self._store = store
        self._backend = backend
        self._logs = LogReader(store, backend, live.subscribe)

    def logs(
        self, ref: str, selection: Selection, *, follow: bool = False, tail: int | None = None, owner: str = ""
    ) -> Iterator[tuple[LogLine, ...]]:
        """Batches of log lines; see `LogReader.read`. The reference is resolved at once, not at the first batch."""
        job = resolve(self._store, ref, owner=owner)
        _refuse_absent(job, selection)
        return self._logs.read(job.id, selection, follow=follow, tail=tail)

    def execute(
        self, where: Where, command: Sequence[str], window: Window | None = None, *, stdin: bool = True
    ) -> Session:
        """Run a command beside a replica's own. Raises `NotFound` for a role or index that the job has not, `Conflict`
        when that replica does not run."""
        if not command or not command[0]:
            raise UsageError("there is no command to run", hint="for example: jobsched exec JOB -- nvidia-smi")
        reach, key = self._reached(where)
        return reach.execute(key, command, window, stdin=stdin)

    def forward(self, where: Where, port: int) -> Session:
        """A connection to a port of a replica; as `execute` otherwise."""
        if not 0 < port < 1 << 16:
            raise UsageError(f"{port} is no port")
        reach, key = self._reached(where)
        return reach.connect(key, port)

    def checkpoint(self, ref: str, *, owner: str = "") -> CheckpointAnswer:
        """Ask the replicas that run to save now, and go on. `Conflict` when the job does not run, or when none of its
        processes listens."""
        job, reach = resolve(self._store, ref, owner=owner), self._reach()
        sent = job.spec.checkpoint.signal
        if sent not in ("USR1", "USR2"):
            what = "has no checkpoint signal" if sent == "none" else f"saves at SIG{sent}, which also ends it"
            raise Conflict(f"job {job.name!r} {what}", hint="'jobsched suspend' lets it save and stop")
        running = {launch_key(job.id, job.attempt, r.role, r.index, r.restart): r.id
                   for r in job.replicas.values() if r.state is ReplicaState.RUNNING}
        if job.phase is not Phase.RUNNING or not running:
            raise Conflict(f"job {job.name!r} ({job.id}) does not run: {job.phase.lower()}")
        told = [running[key] for key in reach.ask_checkpoint(list(running)) if key in running]
        if not told:
            raise Conflict(f"no process of job {job.name!r} listens for the checkpoint signal (SIG{sent})",
                           hint="scripts do so by jobsched.train.context.should_checkpoint(), or by a handler")
        return CheckpointAnswer(job, tuple(told))

    def _reached(self, where: Where) -> tuple[Reach, LaunchKey]:
        job, reach = resolve(self._store, where.ref, owner=where.owner), self._reach()
        _refuse_absent(job, Selection(where.role, where.index))
        replica = _replica_meant(job, where)
        return reach, launch_key(job.id, job.attempt, replica.role, replica.index, replica.restart)

    def _reach(self) -> Reach:
        if not isinstance(self._backend, Reach):
            raise UsageError(f"replicas cannot be reached on the {self._backend.capabilities.name} backend")
        return self._backend


def _refuse_absent(job: Job, selection: Selection) -> None:
    """A role, and replicas, that a job can never have, so that a wrong number does not look like an empty log."""
    if selection.role and selection.role not in job.spec.roles:
        hint = suggest(selection.role, job.spec.roles, "roles")
        raise NotFound(f"job {job.name!r} has no role {selection.role!r}", hint=hint)
    sizes = {name: role.replicas.max for name, role in job.spec.roles.items()}
    ranks = sum(sizes[name] for name in training_roles(job.spec))
    most = sizes[selection.role] if selection.role else max(sizes.values())
    attempts = max(1, job.attempt)  # the first one may be waited for
    for what, number, highest in (
        ("index", selection.index, most - 1), ("rank", selection.rank, ranks - 1),
        ("attempt", selection.attempt, attempts),
    ):  # fmt: skip
        if number is not None and number > highest:
            raise NotFound(f"job {job.name!r} has no {what} {number}", hint=f"the highest is {highest}")


def _replica_meant(job: Job, where: Where) -> Replica:
    role, index = where.role or next(iter((*training_roles(job.spec), *job.spec.roles))), where.index or 0
    replica = next((r for r in job.replicas.values() if (r.role, r.index) == (role, index)), None)
    if replica is None or replica.state is not ReplicaState.RUNNING or job.phase.terminal:
        state = job.phase.lower() if replica is None or job.phase.terminal else replica.state.value
        which = f"replica {role}/{index} of job {job.name!r}"
        raise Conflict(f"{which} does not run: {state}", hint=f"'jobsched describe {job.id}' shows those that do")
    return replica
