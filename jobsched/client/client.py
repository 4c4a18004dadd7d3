"""The SDK: `connect()` gives a `Client`, submitting gives a `JobHandle`; values are the ones of `core.answers`.

Used by people's scripts and notebooks; the CLI shares `locate` and `remote` with it, but shows bodies as they are.
Holds no state besides the last answer of each handle; decides nothing.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter

from jobsched.client import locate, notebook
from jobsched.client.documents import cause_sentence, log_lines, reference, saved_since, submission, user
from jobsched.client.interleave import interleave
from jobsched.client.remote import Endpoint, Remote
from jobsched.core.answers import (
    Check,
    EditAnswer,
    JobAnswer,
    JobPage,
    JobProgress,
    LogLine,
    NodeAnswer,
    PlanAnswer,
    QueueAnswer,
    ReplicaProgress,
    UsageAnswer,
    WhyAnswer,
)
from jobsched.core.events import Stored
from jobsched.core.job import CheckpointMark, Phase, Reason
from jobsched.core.observation import Incident
from jobsched.errors import JobFailed, NotFound, WaitTimeout
from jobsched.ports import Sample
from jobsched.spec.job import JobSpec

T = TypeVar("T")
Source = str | os.PathLike[str] | JobSpec | Mapping[str, Any]
Until = Literal["running", "done", "succeeded"] | Phase | int
TAIL_LINES = 20


def connect(server: str | None = None, *, token: str | None = None) -> Client:
    """The client of the configured server; with none configured, of an embedded one, which is started if need be (one
    line on stderr says so)."""
    return Client(server, token=token)


class Client:
    """One server, found as the CLI finds it. Errors are those of `jobsched.errors`, each with `.code` and `.hint`."""

    def __init__(self, server: str | None = None, *, token: str | None = None, remote: Remote | None = None) -> None:
        self.remote = remote or locate.connect(locate.find_or_start(server, token, say=_tell))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.remote.close()

    def __repr__(self) -> str:
        return f"Client({self.endpoint.url!r})"

    @property
    def endpoint(self) -> Endpoint:
        return self.remote.endpoint

    def submit(
        self, what: Source | Callable[..., object], *args: Any, if_exists: Literal["", "fail", "skip", "replace"] = "",
        hold: bool = False, **overrides: Any,
    ) -> JobHandle:
        """Submit a job file, a `JobSpec`, a dict, or a function with its arguments; an array gives a `JobArray`.

        `overrides` are fields of the job (`queue="research"`, `**{"roles.worker.replicas": 6}`; for a function those of
        `jobsched.task`).
        Raises `SpecError` with every problem found, `Unplaceable`, `Conflict`.
        """
        if callable(what):
            from jobsched.client.function import Task

            spec = (what if isinstance(what, Task) else Task(what, {})).spec(args, {}, overrides)
        else:
            spec = read_spec(what, overrides)
        return self.submit_spec(spec, if_exists=if_exists, hold=hold)

    def submit_spec(self, spec: JobSpec, *, if_exists: str = "", hold: bool = False) -> JobHandle:
        """Submit a spec as it is. Sent again with the same request id when the connection breaks: never submitted
        twice."""
        body = submission(spec.model_dump(mode="json"), if_exists=if_exists, hold=hold)
        page = self._page(self.remote.post("jobs", body))
        handles = [JobHandle(self, answer) for answer in page.jobs]
        return handles[0] if spec.array is None else JobArray(handles)

    def plan(self, what: Source, **overrides: Any) -> PlanAnswer:
        """Where and when a job would run; changes nothing."""
        spec = read_spec(what, overrides).model_dump(mode="json")
        return _adapter(PlanAnswer).validate_json(self.remote.post("plan", {"spec": spec, "owner": user()}))

    def jobs(
        self, *, state: Phase | str | None = None, queue: str | None = None, owner: str | None = None,
        name: str | None = None, label: str | None = None, array: str | None = None, limit: int = 100,
        all: bool = True,
    ) -> notebook.Listing[JobHandle]:
        """Jobs, newest first; every argument narrows the selection (`label` is `key=value`)."""
        page = self._page(self.remote.get(
            "jobs", state=state, queue=queue, owner=owner, name=name, label=label, array=array, limit=limit, all=all,
        ))
        return notebook.Listing(JobHandle(self, answer) for answer in page.jobs)

    def job(self, ref: str) -> JobHandle:
        """The job with this id, unique prefix of one, name (newest wins), or `@last`. Raises `NotFound`."""
        body = self.remote.get(f"jobs/{reference(ref)}", owner=user() if ref == "@last" else None)
        return JobHandle(self, _adapter(JobAnswer).validate_json(body))

    def nodes(self) -> notebook.Listing[NodeAnswer]:
        return notebook.Listing(_adapter(tuple[NodeAnswer, ...]).validate_json(self.remote.get("nodes")))

    def queues(self) -> notebook.Listing[QueueAnswer]:
        return notebook.Listing(_adapter(tuple[QueueAnswer, ...]).validate_json(self.remote.get("queues")))

    def usage(self, since: float = 30 * 86_400.0) -> notebook.Listing[UsageAnswer]:
        """GPU-hours and waits by queue and user, of the jobs that live or ended within `since` seconds."""
        since_ms = max(0, round(1_000 * (time.time() - since)))
        return notebook.Listing(
            _adapter(tuple[UsageAnswer, ...]).validate_json(self.remote.get("usage", since_ms=since_ms))
        )

    def doctor(self) -> notebook.Listing[Check]:
        return notebook.Listing(_adapter(tuple[Check, ...]).validate_json(self.remote.get("doctor")))

    def watch(self, job: str | None = None, *, after: int = 0) -> Iterator[Stored]:
        """Events as they happen, of one job or of the whole cluster, beginning after that sequence number; never ends
        by itself, survives a restart of the server, and gives each event once."""
        for sent in self.remote.stream("events", last_id=str(after) if after else "", after=after or None, job=job):
            if sent.event != "reconnected":
                yield _adapter(Stored).validate_json(sent.data)

    @staticmethod
    def _page(body: bytes) -> JobPage:
        return _adapter(JobPage).validate_json(body)


class JobHandle:
    """A submitted job: the last answer about it, and what can be done with it. Properties show that last answer;
    `refresh()` asks anew."""

    def __init__(self, client: Client, answer: JobAnswer) -> None:
        self._client = client
        self.answer = answer

    def __repr__(self) -> str:
        reason = f" ({self.reason})" if self.reason else ""
        return f"<Job {self.name} {self.id} {self.state}{reason}>"

    def _repr_html_(self) -> str:
        return notebook.job_html(self.answer)

    @property
    def id(self) -> str:
        return self.answer.job.id

    @property
    def name(self) -> str:
        return self.answer.job.name

    @property
    def state(self) -> Phase:
        return self.answer.job.phase

    @property
    def reason(self) -> Reason:
        """Of a waiting job the first thing it waits for, else the reason of its phase."""
        verdict, job = self.answer.verdict, self.answer.job
        return verdict.reasons[0].reason if job.phase is Phase.QUEUED and verdict and verdict.reasons else job.reason

    @property
    def headline(self) -> str:
        """The reason in a sentence."""
        return self.answer.headline

    @property
    def attempts(self) -> int:
        return self.answer.job.attempt

    @property
    def members(self) -> tuple[ReplicaProgress, ...]:
        """The replicas, with node, state and newest step."""
        return self.answer.progress.replicas if self.answer.progress else ()

    @property
    def progress(self) -> JobProgress | None:
        return self.answer.progress

    @property
    def eta_ms(self) -> int:
        """When a waiting job is expected to have started (nine in ten times), milliseconds since the epoch; 0: unknown
        or not waiting. Asks the server; `why()` has the whole band, in words too."""
        verdict = self.why().verdict if self.answer.job.phase is Phase.QUEUED else None
        return verdict.starts_before_ms if verdict else 0

    def refresh(self) -> JobHandle:
        self.answer = _adapter(JobAnswer).validate_json(self._client.remote.get(f"jobs/{self.id}"))
        return self

    def updates(self, silence_s: float | None = None) -> Iterator[JobHandle | None]:
        """This handle each time phase or progress changes, at most five times a second, until the job has ended; None
        after every `silence_s` without news."""
        sent = self._client.remote.stream("progress", job=self.id)
        with closing(interleave(sent, silence_s=silence_s)) as news:
            for item in news:
                if item is None:
                    yield None
                elif item.event != "reconnected":
                    self.answer = _adapter(JobAnswer).validate_json(item.data)
                    yield self

    def wait(self, until: Until = "done", timeout: float | None = None) -> JobHandle:
        """Wait until the job runs, has ended, has succeeded, is in a phase, or has reached a step.

        Raises `WaitTimeout` after `timeout` seconds, and `JobFailed` if the job ended without getting there.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        if self._at(until, self.refresh()):
            return self
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            for news in self.updates(left):
                if news is not None and self._at(until, news):
                    return self
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise WaitTimeout(
                        f"job {self.name} is {self.state} after {timeout:g} s, and did not reach {until!r}",
                        hint=self.headline,
                    )
                if news is None:
                    break  # silence shorter than asked for, because news came in between: wait for the rest
            else:  # the stream ended: the job has
                if not self._at(until, self.refresh()) and self.state.terminal:
                    raise self.failure()

    def result(self, timeout: float | None = None) -> Any:
        """Wait for success; what the function returned, or the last metrics of a job that is no function. Raises
        `JobFailed`, which shows the failing rank, its exit code and its last log lines."""
        self.wait("succeeded", timeout)
        folder = self.answer.job.spec.env.get("JOBSCHED_CALL_DIR")
        if folder:
            from jobsched.client.function import read_result

            return read_result(Path(folder), max(0, self.answer.job.array_index))
        last = self.metrics(1)
        return dict(last[-1].metrics) if last else {}

    def logs(
        self, *, follow: bool = False, role: str | None = None, index: int | None = None, rank: int | None = None,
        attempt: int | None = None, tail: int | None = None, grep: str | None = None,
    ) -> Iterator[LogLine]:
        """Log lines; `follow` goes on until the job has ended. Each line comes once, also across a restart of the
        server."""
        for line in log_lines(
            self._client.remote, self.id, follow=follow, role=role, index=index, rank=rank, attempt=attempt, tail=tail,
            grep=grep,
        ):
            yield LogLine(**line)

    def events(self) -> tuple[Stored, ...]:
        """The job's whole story as events, in order."""
        return _adapter(tuple[Stored, ...]).validate_json(self._client.remote.get(f"jobs/{self.id}/events"))

    def incidents(self) -> tuple[Incident, ...]:
        """What the engine (Kubernetes, Docker) says of its replicas and their nodes, as far as it remembers."""
        return _adapter(tuple[Incident, ...]).validate_json(self._client.remote.get(f"jobs/{self.id}/incidents"))

    def metrics(self, limit: int = 1_000) -> notebook.Listing[Sample]:
        """Sampled progress, newest last."""
        body = self._client.remote.get(f"jobs/{self.id}/samples", limit=limit)
        return notebook.Listing(_adapter(tuple[Sample, ...]).validate_json(body))

    def why(self, at: datetime | None = None) -> WhyAnswer:
        """Why it waits, or why it ended; and its story. `at`: as it was then."""
        at_ms = None if at is None else round(1_000 * at.timestamp())
        return _adapter(WhyAnswer).validate_json(self._client.remote.get(f"jobs/{self.id}/why", at_ms=at_ms))

    def cancel(self) -> JobHandle:
        return self._do("cancel")

    def hold(self, *, stop: bool = False) -> JobHandle:
        """Keep it from starting; `stop` also saves and stops a running attempt (suspend)."""
        return self._do("hold", {"stop": stop})

    def release(self) -> JobHandle:
        return self._do("release")

    def restart(self) -> JobHandle:
        """Stop the attempt after a checkpoint, and queue for the next one."""
        return self._do("restart", safe=False)

    def scale(self, **wanted: int) -> JobHandle:
        """Wanted replicas of elastic roles: `job.scale(worker=8)`."""
        return self._do("scale", {"wanted": wanted})

    def checkpoint(self, timeout: float = 120.0) -> CheckpointMark | None:
        """Have it save now and go on; its newest checkpoint, once there is one (`timeout` 0: without waiting). Raises
        `Conflict` when it does not run or nothing of it listens, `WaitTimeout`."""
        progress = self.refresh().progress
        step = -1 if progress is None else progress.step
        before = self.answer.job.checkpoint
        self._client.remote.post(f"jobs/{self.id}/checkpoint")
        deadline = time.monotonic() + timeout
        while timeout and not saved_since(_mark(before), _mark(self.refresh().answer.job.checkpoint), step):
            if time.monotonic() > deadline or self.state.terminal:
                raise WaitTimeout(f"job {self.name} ({self.state}) did not save", hint=f"jobsched logs {self.id}")
            time.sleep(0.1)
        return self.answer.job.checkpoint

    def update(
        self, what: Source | None = None, *, dry_run: bool = False, expected: int | None = None, **changes: Any
    ) -> EditAnswer:
        """Edit the job: another spec (`what`), or some fields of the one it has (`job.update(priority=5,
        **{"roles.worker.image": "team/train:2"})`). What can be is changed in place; anything else lets a running
        attempt save, and the next one starts with it; the answer says which. `expected`: `answer.job.edits` when you
        looked. Raises `SpecError`, `Unplaceable`, `Conflict`, `UsageError`."""
        remote, path, tag = self._client.remote, f"jobs/{self.id}/spec", "" if expected is None else f'"{expected}"'
        if what is not None:
            spec = read_spec(what, changes).model_dump(mode="json")
            body = remote.change("PUT", path, {"by": user(), "spec": spec}, if_match=tag, dry_run=dry_run)
        else:
            body = remote.change("PATCH", path, {"by": user(), "changes": changes}, if_match=tag, dry_run=dry_run)
        edit = _adapter(EditAnswer).validate_json(body)
        self.refresh()
        return edit

    def prioritize(self, priority: int | str) -> JobHandle:
        return self._do("priority", {"priority": priority})

    def live(self, timeout: float | None = None) -> None:
        """Show the job in a notebook and keep the picture current until it ends or `timeout` seconds have passed."""
        notebook.live(self, timeout)

    def failure(self) -> JobFailed:
        """The error that tells why the job did not succeed: rank, exit code, last log lines."""
        job, cause = self.answer.job, self.answer.job.cause
        if cause is None:
            return JobFailed(f"job {job.name} ended as {job.phase} ({job.reason or 'no reason given'})",
                             hint=f"jobsched why {job.id}")
        tail = "".join(f"\n  | {line}" for line in cause.tail[-TAIL_LINES:])
        return JobFailed(f"job {job.name} ended as {job.phase}: {cause_sentence(asdict(cause))}{tail}",
                         hint=f"jobsched why {job.id}; jobsched logs {job.id}")

    def _do(self, verb: str, wish: Mapping[str, object] | None = None, *, safe: bool = True) -> JobHandle:
        body = {"by": user(), **(wish or {})}
        answer = self._client.remote.post(f"jobs/{self.id}/{verb}", body, safe=safe)
        self.answer = _adapter(JobAnswer).validate_json(answer)
        return self

    def _at(self, until: Until, handle: JobHandle) -> bool:
        """Whether the job is there; raises when it never will be."""
        job = handle.answer.job
        if until == "done":
            return job.phase.terminal
        if until == "succeeded":
            there = job.phase is Phase.SUCCEEDED
        elif until == "running":
            there = job.phase is Phase.RUNNING or job.phase is Phase.SUCCEEDED
        elif isinstance(until, Phase):
            there = job.phase is until
        elif isinstance(until, int):
            there = handle.progress is not None and handle.progress.step >= until
        else:
            raise ValueError(f"cannot wait for {until!r}; wait for 'running', 'done', 'succeeded', a Phase or a step")
        if not there and job.phase.terminal:
            raise handle.failure()
        return there


class JobArray(JobHandle):
    """The members of an array, in the order of their indices; as a handle it stands for its first member."""

    def __init__(self, members: Iterable[JobHandle]) -> None:
        self.handles = tuple(members)
        if not self.handles:
            raise NotFound("the array has no members")
        super().__init__(self.handles[0]._client, self.handles[0].answer)

    def __repr__(self) -> str:
        return f"<JobArray {self.name} of {len(self.handles)}>"

    def _repr_html_(self) -> str:
        return notebook.Listing(self.handles)._repr_html_()

    def __iter__(self) -> Iterator[JobHandle]:
        return iter(self.handles)

    def __len__(self) -> int:
        return len(self.handles)

    def __getitem__(self, at: int) -> JobHandle:
        return self.handles[at]

    def wait(self, until: Until = "done", timeout: float | None = None) -> JobArray:
        """Every member; `timeout` is for all of them together."""
        deadline = None if timeout is None else time.monotonic() + timeout
        for handle in self.handles:
            handle.wait(until, None if deadline is None else max(0.0, deadline - time.monotonic()))
        return self

    def results(self, timeout: float | None = None) -> list[Any]:
        self.wait("succeeded", timeout)
        return [handle.result() for handle in self.handles]

    def result(self, timeout: float | None = None) -> list[Any]:
        """The results of all members, in order."""
        return self.results(timeout)

    def cancel(self) -> JobArray:
        for handle in self.handles:
            handle.cancel()
        return self


def _mark(checkpoint: CheckpointMark | None) -> dict[str, Any] | None:
    return None if checkpoint is None else asdict(checkpoint)


def read_spec(what: Source, overrides: Mapping[str, object]) -> JobSpec:
    """The spec of a file, dict or `JobSpec`, with fields replaced; every problem at once in a `SpecError`."""
    from jobsched import load  # the YAML reader is only needed here

    if isinstance(what, JobSpec):
        return load.load_job_dict(what.model_dump(mode="json"), overrides=overrides) if overrides else what
    if isinstance(what, Mapping):
        return load.load_job_dict(what, environ=os.environ, overrides=overrides, directory=os.getcwd())
    return load.load_job_file(what, environ=os.environ, overrides=overrides)


def _tell(line: str) -> None:
    sys.stderr.write(line + "\n")


_KNOWN: dict[Any, TypeAdapter[Any]] = {}


def _adapter(kind: type[T]) -> TypeAdapter[T]:
    """Made once per type, when it is first needed."""
    if kind not in _KNOWN:
        _KNOWN[kind] = TypeAdapter(kind)
    return _KNOWN[kind]
