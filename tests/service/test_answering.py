"""Jobs as people see them."""

from __future__ import annotations

from jobsched.ports import OWN_METRICS, JobQuery, Sample
from tests.stage import Stage


def test_pages_follow_one_another(stage: Stage) -> None:
    ids = [stage.submit().id for _ in range(5)]
    page = stage.service.jobs(JobQuery(limit=2))
    assert ([a.job.id for a in page.jobs], page.more) == (ids[:2:-1], True)
    rest = stage.service.jobs(JobQuery(limit=3, before=page.jobs[-1].job.id))
    assert ([a.job.id for a in rest.jobs], rest.more) == (ids[2::-1], False)


def test_an_ended_job_still_says_how_far_it_came(stage: Stage) -> None:
    job = stage.run(stage.submit())
    stage.store.add_samples([Sample(job.id, 5, 1, 40, 50, 2, (("loss", 0.25), (f"{OWN_METRICS}nodes", 1.0)))])
    assert stage.service.samples(job.id)[0].metrics == (("loss", 0.25),), "our own are nobody's business"
    stage.end(job)
    progress = stage.service.get(job.id).progress
    assert progress is not None
    assert (progress.step, progress.total, progress.metrics) == (40, 50, (("loss", 0.25),))
    silent = stage.run(stage.submit())
    stage.end(silent)
    assert stage.service.get(silent.id).progress is None


def test_while_the_engine_is_away_every_live_job_says_so(stage: Stage) -> None:
    job, ended = stage.run(stage.submit()), stage.end(stage.run(stage.submit()))
    stage.live.health.backend_error = "the engine does not answer"
    for headline in (stage.service.get(job.id).headline, stage.service.jobs(JobQuery()).jobs[1].headline):
        assert headline == "the engine does not answer; until it answers nothing starts, and what runs is left alone"
    assert "does not answer" in stage.service.why(job.id).headline
    assert "does not answer" not in stage.service.get(ended.id).headline
