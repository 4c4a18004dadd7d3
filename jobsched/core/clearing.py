"""Others leave for waiting jobs: who is made to, and the starts of those for whom it was done. Steps of `schedule`."""

from __future__ import annotations

from collections.abc import Sequence

from jobsched.core.cluster import Cluster
from jobsched.core.job import Job, Shape
from jobsched.core.lines import Line
from jobsched.core.passes import EVICTIONS, Pass
from jobsched.core.policies.admission import admit
from jobsched.core.policies.placement import Gang, place_gang
from jobsched.core.policies.victims import Preemption, Victim, may_claim


def start_nominated(run: Pass) -> None:
    """Start jobs for which others left, or keep for them what is free of the places that they will have; in the order
    in which room was made for them, after those that made it by starting anew in what they kept."""
    cluster = run.cluster
    late = [cluster.jobs[job_id] for job_id in cluster.nominated if cluster.line_of(job_id) is not None]
    late.sort(key=lambda job: not cluster.stays(job))
    for at, job in enumerate(late):
        shape = admit(cluster, job, run.now_ms)
        if not isinstance(shape, Shape) or not run.start(job, shape):
            late = late[at:]
            break
    else:
        late = []
    for job, gang in _promised(run, late):
        if _real(run, job, gang):
            run.place(job, gang)
        else:
            run.keep(job, gang)


def _promised(run: Pass, jobs: Sequence[Job]) -> list[tuple[Job, Gang]]:
    """Where these jobs will run once everybody who leaves has left; who will not even then loses its nomination when
    nobody leaves for it any more. Leaves ledger and quotas as they were."""
    cluster = run.cluster
    found: list[tuple[Job, Gang]] = []
    if not jobs:
        return found
    mark = cluster.mark()
    cluster.lend_leaving()
    for job in jobs:
        shape = admit(cluster, job, run.now_ms, least=True)
        gang = place_gang(cluster, shape, job.avoid, run.policy.score) if isinstance(shape, Shape) else None
        if isinstance(gang, Gang):
            cluster.charge(job, gang.bindings, starts=True)
            found.append((job, gang))
        elif not cluster.nominated[job.id]:
            del cluster.nominated[job.id]
    cluster.rollback(mark)
    return found


def _real(run: Pass, job: Job, gang: Gang) -> bool:
    """Take a job's promised places if they are free by now, and its queue admits it."""
    cluster = run.cluster
    roles = cluster.shape(job).by_name
    needs: dict[str, int] = {}
    for binding in gang.bindings:
        for resource, amount in cluster.amounts(binding, roles[binding.role]):
            needs[resource] = needs.get(resource, 0) + amount
    places = [(binding, roles[binding.role]) for binding in gang.bindings]
    if cluster.quotas.refuses(job.spec.queue, job.owner, needs, run.now_ms) or not cluster.ledger.take_all(places):
        return False
    cluster.charge(job, gang.bindings, starts=True)
    return True


def make_room(run: Pass, how: Preemption, line: Line) -> None:
    """Look for room for the jobs of a line whose head does not fit, until one is sought in vain. Works on what is there
    once everybody who leaves has left, so that a job which only has to wait for that makes nobody else leave."""
    cluster, room, queue = run.cluster, run.room, line.key.queue
    if room.vain.get(queue, 0) >= how.tries or not may_claim(cluster, how, line.key):
        return
    found: list[tuple[Job, Gang, tuple[Victim, ...]]] = []
    hunt = room.hunt(how, run.policy.score, run.now_ms)
    if ready_ms := hunt.candidates.ready_ms(line.key):
        cluster.ripening[line.key] = ready_ms
        room.vain[queue] = room.vain.get(queue, 0) + 1
        return
    with room.ahead():
        leaving, mark = len(room.evicted), cluster.mark()
        for job in run.heads(line):
            if len(run.decisions) + len(found) >= run.policy.batch or leaving >= EVICTIONS:
                line.blocked_at = -1
                cluster.lines.again()
                break
            way = hunt.room_for(job)
            if way is None:
                room.vain[queue] = room.vain.get(queue, 0) + 1
                break
            found.append((job, *way))
            leaving += len(way[1])
        patient = [(job, gang) for job, gang, victims in found if not victims]
        if len(patient) == len(found):
            cluster.rollback(mark)
        else:
            for job, gang in patient:
                room.forgo(job, gang)
    if hunt.wait_ms:
        cluster.ripening[line.key] = hunt.wait_ms
    for job, gang, victims in found:
        if victims:
            run.keep(job, gang)
            room.evicted += [(job, victim) for victim in victims]


def ripe(cluster: Cluster, now_ms: int) -> None:
    """Lines that were left alone because a victim was still protected, which it is no longer, are worth a try."""
    for key, ready_ms in list(cluster.ripening.items()):
        line = cluster.lines.get(key)
        if line is None or ready_ms <= now_ms:
            del cluster.ripening[key]
            if line is not None:
                line.blocked_at = line.refused_at = -1
                cluster.lines.again()
