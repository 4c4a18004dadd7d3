"""Answers in words, with numbers: why a job waits, what would let it start, where a spec would run, what happened.

The same engine as `schedule`, read-only: the ledger is worked on inside a trial and put back.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

from jobsched.core.answers import Verdict, Why
from jobsched.core.cluster import Cluster, missing_replicas
from jobsched.core.job import Asked, Job, Phase, Reason, ReplicaState, RoleShape, Shape
from jobsched.core.ledger import Short
from jobsched.core.lines import LineKey, Place
from jobsched.core.node import kind_matches
from jobsched.core.plan import Forecast, Reservation
from jobsched.core.policies.admission import admit, most_ever
from jobsched.core.policies.backfill import in_the_way
from jobsched.core.policies.ordering import Ordering, priority
from jobsched.core.policies.placement import Gang, place_gang
from jobsched.core.policies.quota import HOUR_MS, Refused
from jobsched.core.resources import WHOLE_GPU
from jobsched.core.shape import shape_of
from jobsched.spec.job import JobSpec
from jobsched.spec.quantity import format_bytes, format_cpu
from jobsched.spec.queue import CPU, GPUS, MEMORY


def verdict(cluster: Cluster, job: Job, now_ms: int, order: Ordering | None = priority) -> Verdict:
    """Every reason that keeps a job waiting, most important first. `order`: who goes first among the waiting; None: all
    jobs are weighed anew in each pass, so that there is no place in line. O(lines of its queue + placing it once)."""
    reasons = list(_reasons(cluster, job, now_ms))
    ahead = _ahead(cluster, job, order) if order is not None else 0
    nearest = ""
    if not reasons:
        short = _try(cluster, cluster.shape(job), job)
        if isinstance(short, Short):
            reasons.append(_shortage(cluster, cluster.shape(job), short))
            nearest = f"{short.placed} of {many(short.role.min, f'{short.role.role} replica')} fit now"
        elif claims := in_the_way(cluster, job, (-job.priority, 0, 0, ""), list(cluster.reservations.values()), now_ms):
            reasons += (_claimed(cluster, job, claim, now_ms) for claim in claims)
        else:
            turn = f"{many(ahead, 'job')} of its queue before it" if ahead else "it is next; a pass has not come yet"
            reasons.append(Why(Reason.PRIORITY, turn))
        if ahead and isinstance(short, Short):
            text = f"{many(ahead, 'waiting job')} of queue {job.spec.queue} before it"
            reasons.append(Why(Reason.PRIORITY, text))
    if job.asked is not None:
        reasons.insert(0, _provisioning(job.asked))
    line = cluster.line_of(job.id)
    if line is not None and (ready_ms := cluster.ripening.get(line.key, 0)) > now_ms:
        text = f"who might make room for it has only just started; nobody is asked to before {moment(ready_ms, now_ms)}"
        reasons.append(Why(Reason.RESOURCES, text))
    in_line = line is not None
    return Verdict(job.id, tuple(reasons), ahead + 1 if in_line and order is not None else 0, nearest)


def _reasons(cluster: Cluster, job: Job, now_ms: int) -> Iterator[Why]:
    """Reasons that do not depend on free resources."""
    if job.held:
        yield Why(Reason.HELD, "held by a user", f"jobsched release {job.name}")
    if job.not_before_ms > now_ms:
        wait = (job.not_before_ms - now_ms) / 1000
        text = f"waits {wait:.0f} s before attempt {job.attempt + 1}"
        last = f" after: {job.cause.message}" if job.cause else ""
        yield Why(Reason.BACKOFF, text + last, f"jobsched release {job.name}")
    for dependency in job.waiting_for:
        other = cluster.jobs.get(dependency)
        state = f"{other.name}, which is {other.phase}" if other else f"{dependency}, which has just ended"
        yield Why(Reason.DEPENDENCY, f"waits for job {state}")
    queue = cluster.queues.get(job.spec.queue)
    if queue is None:
        yield Why(Reason.QUEUE_PAUSED, f"queue {job.spec.queue} does not exist", "jobsched queues")
        return
    if queue.paused:
        yield Why(Reason.QUEUE_PAUSED, f"queue {queue.name} is paused")
    if job.id in cluster.nominated:
        yield _room(cluster, job)
    refused = admit(cluster, job, now_ms)
    if isinstance(refused, Refused) and not queue.paused:
        yield _limit(cluster, refused)
    never = could_ever_fit(cluster, job.spec)
    if never:
        yield Why(Reason.UNPLACEABLE, never, "ask for less, or wait for other nodes (jobsched nodes)")


def _claimed(cluster: Cluster, job: Job, claim: Reservation, now_ms: int) -> Why:
    """It fits, but somebody was promised to start first."""
    whose = cluster.jobs[claim.job_id].name if claim.job_id in cluster.jobs else claim.job_id
    what = f"what queue {claim.queue} may take is" if claim.limits(job) else "places are"
    text = f"{what} kept for job {whose}, expected to start {moment(claim.at_ms, now_ms)}; this job may last longer"
    return Why(Reason.RESERVATION, text, "a time_limit that ends before lets it start now")


def _room(cluster: Cluster, job: Job) -> Why:
    leaving = [cluster.jobs[v].name for v in cluster.nominated[job.id] if v in cluster.jobs]
    who = f"{many(len(leaving), 'job')} saving and leaving ({', '.join(leaving[:5])})" if leaving else "all have left"
    return Why(Reason.RESERVATION, f"room is being made for it: {who}; its places are kept")


def _provisioning(asked: Asked) -> Why:
    text = f"waiting for {many(asked.nodes, 'node')} of pool {asked.pool}, asked {clock(asked.at_ms)} UTC"
    return Why(Reason.PROVISIONING, text, "if they are late, the next pool by price is asked")


def clock(at_ms: int) -> str:
    """Hour and minute, UTC."""
    hour, minute = divmod(at_ms // 60_000 % 1_440, 60)
    return f"{hour:02}:{minute:02}"


def moment(at_ms: int, now_ms: int) -> str:
    """An instant to come: "14:20 UTC", with seconds when it is near, with days when it is far."""
    if at_ms - now_ms < 120_000:
        return f"{clock(at_ms)}:{at_ms // 1_000 % 60:02} UTC"
    days = (at_ms - now_ms) // 86_400_000
    return f"{clock(at_ms)} UTC" + (f" in {many(days, 'day')}" if days > 0 else "")


def starting(when: Forecast, now_ms: int) -> str:
    """When a job starts, in words; or why nobody can tell."""
    if not when.before_ms:
        return f"nobody can tell: {when.unknown}"
    early, late = moment(when.after_ms, now_ms), moment(when.before_ms, now_ms)
    if when.before_ms - now_ms < 1_000:
        return "now"
    if when.by == ("leaving",):
        within = _in(when.before_ms, when.before_ms, now_ms).replace("in ", "in at most ", 1)
        return f"{within}, once those who leave have saved"
    if "limit" in when.by and {"limit", "leaving", "pace"}.issuperset(when.by):
        within = _in(when.before_ms, when.before_ms, now_ms)
        return f"by {late} ({within}), if those before it use up their time limits"
    within = _in(when.after_ms, when.before_ms, now_ms)
    pace = ", if all before it go on at the pace of the first" if "pace" in when.by else ""
    if early == late:
        return f"about {early} ({within}){pace}"
    return f"between {early.removesuffix(' UTC')} and {late} (p50/p90; {within}){pace}"


def punctual(job: Job, starts: Forecast, left: tuple[int, int] | None, now_ms: int) -> str:
    """Whether a job will keep its `deadline`, in words; "" when it has none. `left`: time to its end from its start (of
    a running job: from now) in ms, by medians and by 90th percentiles; None: nobody can tell."""
    if not job.spec.deadline:
        return ""
    due_ms = job.submitted_at_ms + job.spec.deadline
    due = moment(due_ms, now_ms)
    if job.phase.terminal:
        late_ms = job.ended_at_ms - due_ms
        return f"{due}, missed {_by(late_ms)}" if late_ms > 0 else f"{due}, kept"
    if due_ms <= now_ms:
        return f"{due}, missed: it has passed"
    if left is None:
        return f"{due}; nobody can tell how long it runs, as no like job has ended yet: `expected` in its file helps"
    if not starts.before_ms:
        return f"{due}; nobody can tell when it starts"
    early_ms, late_ms = starts.after_ms + left[0], starts.before_ms + left[1]
    ends = f"it ends about {moment(early_ms, now_ms)}"
    if not left[0]:
        ends = f"it ends by {moment(late_ms, now_ms)}, when its time limit runs out"
    elif early_ms // 60_000 != late_ms // 60_000:
        early = moment(early_ms, now_ms).removesuffix(" UTC")
        ends = f"it ends between {early} and {moment(late_ms, now_ms)} (p50/p90)"
    if early_ms > due_ms:
        return f"{due}, likely missed {_by(early_ms - due_ms)}: {ends}"
    return f"{due}, {'likely kept' if late_ms <= due_ms else 'at risk'}: {ends}"


def _by(late_ms: int) -> str:
    return _in(late_ms, late_ms, 0).replace("in ", "by ", 1)


def _in(early_ms: int, late_ms: int, now_ms: int) -> str:
    low, high = (max(0, at - now_ms) for at in (early_ms, late_ms))
    unit_ms, unit = next(((ms, name) for ms, name in ((86_400_000, "d"), (3_600_000, "h"), (60_000, "min"))
                          if high >= 2 * ms), (1_000, "s"))
    low, high = round(low / unit_ms), round(high / unit_ms)
    return f"in {high} {unit}" if low == high else f"in {low} to {high} {unit}"


def _limit(cluster: Cluster, refused: Refused) -> Why:
    """The limit that stands in the way, in words."""
    fix = "wait for its jobs to end, or submit to another queue"

    def unit(amount: int) -> str:
        return format_bytes(amount) if refused.resource == MEMORY else f"{amount / WHOLE_GPU:g}"

    what = {CPU: "CPUs", GPUS: "GPUs"}.get(refused.resource, refused.resource)
    holds = unit(max(0, refused.limit - refused.left))
    match refused.reason:
        case Reason.ARRAY_LIMIT:
            text = f"{many(refused.limit, 'member')} of the array may run at once, and that many do"
            return Why(Reason.ARRAY_LIMIT, text)
        case Reason.QUOTA_USER:
            text = f"needs {_gpus(refused.needs)}; your jobs hold {holds} of {unit(refused.limit)} per user"
            return Why(Reason.QUOTA_USER, f"{text} in queue {refused.queue}", "wait for your other jobs to end")
        case Reason.BUDGET:
            hours = refused.limit / WHOLE_GPU / HOUR_MS
            text = f"queue {refused.queue} has used its {hours:g} GPU-hours of this window"
            return Why(Reason.BUDGET, text, "wait for the next window, or submit to another queue")
        case _:
            account = cluster.quotas.account(refused.queue)
            if refused.resource in account.root.nominal:
                used, borrowed = account.used.get(refused.resource, 0), account.borrowed(refused.resource)
            else:
                used, borrowed = refused.limit - refused.left, 0
            lent = f" ({unit(borrowed)} of them borrowed)" if borrowed else ""
            more = f"may take {unit(refused.left)} more now" if refused.left > 0 else "may take no more now"
            needs = _gpus(refused.needs) if refused.resource == GPUS else f"{unit(refused.needs)} {what}"
            text = f"needs {needs}; queue {refused.queue} holds {unit(used)}{lent} of its"
            return Why(refused.reason, f"{text} {unit(refused.limit)} and {more}", fix)


def _ahead(cluster: Cluster, job: Job, order: Ordering) -> int:
    """How many waiting jobs of its queue go first; in a line they stand in their order."""
    mine = LineKey(job.spec.queue, job.priority, cluster.shape(job), job.array_id)
    key = order(mine, Place(cluster.rank(job, cluster.estimates), job.submitted_at_ms, job.id))
    return sum(
        bisect_left(line.places, key, key=lambda place: order(line_key, place))
        for line_key, line in cluster.lines.of_queue.get(job.spec.queue, {}).items()
    )


def _try(cluster: Cluster, shape: Shape, job: Job | None = None) -> Gang | Short:
    with cluster.ledger.trial():
        return place_gang(cluster, shape, job.avoid if job else (), count=True)


def _shortage(cluster: Cluster, shape: Shape, short: Short) -> Why:
    """Names the resource that is short, with what is needed and what is free."""
    role = short.role
    ledger, fleet = cluster.ledger, cluster.fleet
    want = f"{role.min} × {each_of(role)}"
    spaces = [s for name, s in ledger.spaces.items() if fleet.usable(name) and not fleet.unwelcome(shape, name)]
    if role.gpu_milli:
        classes = ledger.matching(role)
        free = sum(s.whole.get(c, 0) for s in spaces for c in classes)
        total = sum(1 for s in ledger.spaces.values() if not cluster.fleet.unwelcome(shape, s.node.name)
                    for c in s.gpu_class.values() if c in classes)  # fmt: skip
        most = max((s.whole.get(c, 0) for s in spaces for c in classes), default=0)
        text = f"role {role.role} needs {want}; {free} of {total} matching GPUs are free, at most {most} on one node"
        idle = sum(count for s in spaces for (kind, _), count in s.whole.items() if kind_matches(kind, ()))
        kinds = ",".join(role.gpu_kinds)
        if kinds and free < role.min * max(1, role.gpu_milli // WHOLE_GPU) <= idle:
            fix = f"{idle} GPUs of any kind are free: gpu: any:{role.gpu_milli // WHOLE_GPU or 1}"
            return Why(Reason.GPU_TYPE, text, fix)
    else:
        free_cpu = sum(max(0, s.cpu_milli) for s in spaces)
        most_cpu = max((s.cpu_milli for s in spaces), default=0)
        text = (f"role {role.role} needs {want}; {format_cpu(free_cpu)} CPUs are free, "
                f"at most {format_cpu(max(0, most_cpu))} on one node")
    text += _apart(cluster, shape)
    if shape.within:
        return Why(Reason.TOPOLOGY, f"{text}, all within one {shape.within}", f"placement: {{prefer: {shape.within}}}")
    cordoned = [n for n in cluster.fleet.cordoned if n in cluster.fleet.nodes]
    if cordoned and short.placed < role.min:
        text += f" ({many(len(cordoned), 'node')} cordoned)"
    if not spaces and cordoned:
        return Why(Reason.NODE_CORDONED, text, f"jobsched node uncordon {cordoned[0]}")
    fewer = "fewer replicas, or " if role.min > 1 else ""
    return Why(Reason.RESOURCES, text, f"{fewer}wait for running jobs to end")


def _apart(cluster: Cluster, shape: Shape) -> str:
    """What the shape asks of its nodes beside room on them, and how many nodes are out of the question for it."""
    kept_off: dict[str, int] = {}
    for name in cluster.fleet.nodes:
        if words := cluster.fleet.unwelcome(shape, name):
            kept_off[words] = kept_off.get(words, 0) + 1
    nodes = [f"{many(count, 'node')} {words}" for words, count in kept_off.items()]
    text = f", each on another {shape.spread}" if shape.spread else ""
    return f"{text} (not on {', '.join(nodes[:3])})" if nodes else text


def each_of(role: RoleShape) -> str:
    parts = []
    if role.gpu_milli:
        parts.append(f"{role.gpu_milli / WHOLE_GPU:g} {'|'.join(role.gpu_kinds) or 'any'} GPU")
    parts.append(f"{format_cpu(role.cpu_milli)} CPU")
    if role.memory_bytes:
        parts.append(format_bytes(role.memory_bytes))
    return "(" + ", ".join(parts) + ")"


def _amount(resource: str, amount: int) -> str:
    if resource == MEMORY:
        return f"{format_bytes(amount)} of memory"
    return many(amount / WHOLE_GPU, {GPUS: "GPU", CPU: "CPU"}.get(resource, resource))


def _gpus(milli: int) -> str:
    return many(milli / WHOLE_GPU, "GPU")


def many(count: float, what: str) -> str:
    return f"{count:g} {what}{'' if count == 1 else 's'}"


def could_ever_fit(cluster: Cluster, spec: JobSpec) -> str:
    """"" if the cluster, empty and healthy, could hold the job at its minimum; else why not, in a sentence. Costs a
    placement once per shape, until a node changes."""
    if not cluster.fleet.nodes:
        return ""
    shape = shape_of(spec)
    beyond = most_ever(cluster, spec.queue, shape)
    if beyond is not None:
        needs, most = (_amount(beyond.resource, n) for n in (beyond.needs, beyond.limit))
        whose = "one user's jobs may hold" if beyond.reason is Reason.QUOTA_USER else f"queue {beyond.queue} may hold"
        return f"the job needs {needs}, {whose} {most}"
    empty = cluster.emptied()
    if shape not in empty.ever_fits:
        empty.ever_fits[shape] = _misfit(empty, shape)
    return empty.ever_fits[shape]


def _misfit(empty: Cluster, shape: Shape) -> str:
    result = _try(empty, shape)
    if isinstance(result, Gang):
        return ""
    role = result.role
    if role.gpu_milli:
        kinds = sorted({g.kind for n in empty.fleet.nodes.values() for g in n.gpus})
        if not any(kind_matches(k.lower(), role.gpu_kinds) for k in kinds):
            want = f"a GPU of kind {'|'.join(role.gpu_kinds)}" if role.gpu_kinds else "any GPU"
            return f"no node has {want} for role '{role.role}' (there is: {', '.join(kinds) or 'none'})"
        biggest = max((s.whole_total for s in empty.ledger.spaces.values()), default=0)
        if role.gpu_milli // WHOLE_GPU > biggest:
            want = _gpus(role.gpu_milli)
            return f"no node can ever hold role '{role.role}': it needs {want}, the biggest node has {biggest}"
    fits = f"holds {result.placed} of {role.min}" if result.placed else f"cannot hold {role.min}"
    where = _apart(empty, shape) + (f", all within one {shape.within}" if shape.within else "")
    return f"the whole cluster, empty, {fits} of role '{role.role}' at {each_of(role)} each{where}"


# ---- sentences ----


def _fewer(job: Job, role: str, lack: int) -> str:
    """An elastic role may do with fewer on purpose, for whom it gave way or because more would not speed it up."""
    wanted = job.wanted_count(role)
    if job.spec.roles[role].replicas.elastic and wanted - lack >= job.spec.roles[role].replicas.min:
        return f"runs with {wanted - lack} of {many(wanted, f'{role} replica')}"
    return f"waits for {many(lack, f'more {role} replica')}"


def headline(job: Job, found: Verdict | None = None) -> str:
    """One sentence for a table: what the job does or why it does not."""
    match job.phase:
        case Phase.QUEUED:
            if found and found.reasons:
                return found.reasons[0].message
            return job.reason.value
        case Phase.STARTING:
            late = sum(r.state is ReplicaState.BOUND for r in job.replicas.values())
            return f"{len(job.replicas) - late} of {len(job.replicas)} replicas run"
        case Phase.RUNNING:
            if job.suspected_since_ms:
                return f"suspected of hanging: {', '.join(job.suspects)}"
            again = [r.id for r in job.replicas.values() if r.state is ReplicaState.BOUND]
            if again:
                return f"recovering {', '.join(again)}"
            return ", ".join(_fewer(job, role, lack) for role, lack in missing_replicas(job).items())
        case Phase.STOPPING:
            return f"{job.reason.value} → {job.outcome.phase if job.outcome else ''}"
        case _:
            return job.cause.message if job.cause and job.phase is not Phase.SUCCEEDED else job.reason.value
