"""Speed models: what is believed of sizes never tried, and how near fits come to the truth."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobsched.core.policies.goodput import KEPT, Batches, Curve, Report, Serving, SpeedModel, Straight, not_negative


def truth(nodes: int, replicas: int, local: float) -> tuple[float, float]:
    """(seconds of a pass, of it in synchronisation) of a job with half-hidden synchronisation."""
    compute_s = 0.02 + 0.001 * local
    sync_s = 0.0 if replicas == 1 else (0.1 if nodes > 1 else 0.01) + (0.002 if nodes > 1 else 0.001) * (replicas - 2)
    step_s = (compute_s**2 + sync_s**2) ** 0.5
    return step_s, step_s - compute_s


def learned(sizes: list[tuple[int, int]], locals_: list[float], **fields: object) -> SpeedModel:
    model = SpeedModel()
    for (nodes, replicas), local in product(sizes, locals_):
        step_s, sync_s = truth(nodes, replicas, local)
        model.note(Report(nodes, replicas, local, step_s, sync_s, **fields))  # type: ignore[arg-type]
    return model


def test_without_a_measurement_a_job_is_believed_to_scale_perfectly() -> None:
    assert SpeedModel().speedup(3, 12) == 12


def test_one_measurement_alone_says_nothing_against_more_replicas() -> None:
    model = learned([(1, 1)], [64.0], batches=Batches(64.0, 64.0))
    assert model.speedup(1, 4) > 2.5
    assert model.most_tried == (1, 0)


def test_a_fit_predicts_sizes_in_between() -> None:
    model = learned([(1, 1), (1, 2), (1, 4), (2, 8), (4, 16)], [32.0, 64.0])
    curve = Curve.fit(model.seen)
    for nodes, replicas, local in ((1, 3, 48.0), (3, 12, 40.0), (8, 32, 64.0)):
        assert curve.pass_s(nodes, replicas, local) == pytest.approx(truth(nodes, replicas, local)[0], rel=0.1)


def test_noise_decides_how_much_a_larger_batch_is_worth() -> None:
    batches = Batches(64.0, 1024.0, 16.0, 256.0)
    noisy = learned([(1, 1), (1, 4)], [64.0], noise=(1.0, 50.0), batches=batches)
    clean = learned([(1, 1), (1, 4)], [64.0], noise=(1.0, 0.01), batches=batches)
    assert noisy.gain(1024.0) > 8.0
    assert clean.gain(1024.0) < 1.1
    assert noisy.choose(1, 4)[1] > clean.choose(1, 4)[1]
    assert clean.speedup(1, 4) < noisy.speedup(1, 4)


def test_a_lone_replica_needs_two_passes_for_more_than_the_initial_batch() -> None:
    batches = Batches(64.0, 1024.0, 16.0, 256.0)
    assert batches.split(64.0, 1) == (64.0, 0)
    assert batches.split(128.0, 1) == (64.0, 1)
    assert batches.split(1024.0, 2) == (256.0, 1)


def test_samples_per_second_alone_give_amdahl() -> None:
    """Strong scaling of a fixed batch: 10 ms that do not shrink, 90 ms that do."""
    model = SpeedModel()
    for replicas in (1, 2, 4):
        report = Report.of({"samples_per_s": 48 / (0.01 * (replicas > 1) + 0.09 / replicas)}, 1, replicas)
        assert report is not None
        model.note(report)
    assert model.speedup(1, 4) == pytest.approx(0.09 / (0.01 + 0.09 / 4), rel=0.05)
    assert 4.0 < model.speedup(1, 8) < 5.0
    assert Report.of({"loss": 1.0}, 1, 2) is None


def test_samples_per_second_are_of_all_replicas_and_local_ones_of_that_which_reports() -> None:
    """Four workers, each a hundred samples a second: a batch of 48 takes 120 ms."""
    for told in (
        {"samples_per_s": 400.0}, {"local_samples_per_s": 100.0},
        {"samples_per_s": 400.0, "local_samples_per_s": 90.0}, {"step_s": 0.12, "local_samples_per_s": 1.0},
    ):  # fmt: skip
        report = Report.of({"batch": 48.0, **told}, 1, 4)
        assert report is not None, told
        assert report.step_s == pytest.approx(0.12), told
    apart = Report.of({"asynchronous": 1.0, "local_samples_per_s": 100.0}, 1, 4, 2)
    assert apart is not None
    assert apart.step_s == pytest.approx(0.01)


def test_reports_travel_as_metrics() -> None:
    for batches, noise in ((Batches(64.0, 1024.0, 16.0, 256.0), (2.0, 3.0)), (Batches(48.0, 48.0), (0.0, 0.0))):
        report = Report(2, 8, 6.0, 0.5, 0.1, noise, batches)
        assert Report.of(dict(report.metrics()), 2, 8) == report
    report = Report(1, 8, 6.0, 0.5, 0.1, (0.0, 0.0), Batches(6.0, 6.0, apart=True), servers=3)
    assert Report.of(dict(report.metrics()), 2, 8, 3) == report


def test_a_straight_line_is_never_below_zero() -> None:
    assert Straight.through([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]).slope == 0.0
    assert Straight.through([1.0, 2.0], [1.0, 3.0]) == Straight(0.0, 15 / 13)


# ---- parameter servers ----

TRUTH = (0.1, 0.04, 0.01, 0.002, 0.003)
"""Computing, a server's load, an exchange, a further worker, a further server."""


def served_s(workers: int, servers: int) -> tuple[float, float]:
    """(seconds of a step, of it with the servers) as in Optimus."""
    compute_s, *thetas = TRUTH
    sync_s = sum(theta * x for theta, x in zip(thetas, Serving.terms(workers, servers), strict=True))
    return compute_s + sync_s, sync_s


def learned_with_servers(sizes: list[tuple[int, int]], apart: bool, tells_sync: bool) -> SpeedModel:
    model = SpeedModel()
    for workers, servers in sizes:
        step_s, sync_s = served_s(workers, servers)
        if not apart:  # one batch is divided among all
            step_s -= TRUTH[0] * (1 - 1 / workers)
        local = 1.0 if apart else 1.0 / workers
        batches = Batches(1.0, 1.0, apart=apart)
        model.note(Report(1, workers, local, step_s, sync_s if tells_sync else -1.0, (0.0, 0.0), batches, servers))
    return model


@pytest.mark.parametrize("tells_sync", [True, False])
@pytest.mark.parametrize("apart", [True, False])
def test_a_few_measurements_with_servers_predict_others(apart: bool, tells_sync: bool) -> None:
    model = learned_with_servers([(1, 1), (2, 1), (4, 1), (4, 2), (8, 4), (6, 6)], apart, tells_sync)
    assert model.most_tried == (8, 6)
    for workers, servers in ((3, 1), (8, 2), (12, 6), (16, 4), (16, 8)):
        step_s, _ = served_s(workers, servers)
        true = workers / step_s if apart else 1 / (step_s - TRUTH[0] * (1 - 1 / workers))
        assert model.rate(1, workers, servers) == pytest.approx(true, rel=0.1)


@pytest.mark.parametrize("tells_sync", [True, False])
def test_one_measurement_is_hopeful_about_workers_and_about_servers(tells_sync: bool) -> None:
    model = learned_with_servers([(4, 1)], True, tells_sync)
    assert model.speedup(1, 8, 1) > 1.2 * model.speedup(1, 4, 1)
    if tells_sync:  # else all of it may be computing
        assert model.speedup(1, 4, 2) > 1.1 * model.speedup(1, 4, 1)


def test_servers_that_were_tried_in_vain_are_believed() -> None:
    """All of it is the exchange."""
    model = SpeedModel()
    for servers in (1, 2):
        model.note(Report(1, 4, 1.0, 0.2, 0.1, (0.0, 0.0), Batches(apart=True), servers))
    assert model.speedup(1, 4, 4) < 1.02 * model.speedup(1, 4, 2)


def not_negative_by_trying(rows: list[list[float]], wanted: list[float]) -> float:
    """The least error of any subset of columns, by solving each without bounds and keeping those without a negative."""
    a, b, best = np.array(rows), np.array(wanted), float(np.dot(wanted, wanted))
    for size in range(1, a.shape[1] + 1):
        for columns in combinations(range(a.shape[1]), size):
            x, *_ = np.linalg.lstsq(a[:, columns], b, rcond=None)
            if (x >= 0).all():
                best = min(best, float(((a[:, columns] @ x - b) ** 2).sum()))
    return best


numbers = st.floats(0.01, 10.0)


@given(st.lists(st.tuples(numbers, numbers, numbers, st.floats(-5.0, 10.0)), min_size=1, max_size=6))
def test_no_coefficient_is_negative_and_none_do_better(table: list[tuple[float, float, float, float]]) -> None:
    rows, wanted = [list(row[:3]) for row in table], [row[3] for row in table]
    found = not_negative(rows, wanted, (1e-9, 1e-9, 1e-9))
    assert min(found) >= 0.0
    told = [sum(x * c for x, c in zip(row, found, strict=True)) for row in rows]
    error = sum((x - y) ** 2 for x, y in zip(told, wanted, strict=True))
    assert error <= not_negative_by_trying(rows, wanted) + 1e-4 * (1 + sum(y * y for y in wanted))


def test_memory_is_bounded_and_new_measurements_count() -> None:
    model = learned([(1, 1)], [float(n) for n in range(1, 2 * KEPT)])
    assert len(model.seen) == KEPT
    before = model.rate(1, 1)
    for _ in range(60):
        model.note(Report(1, 1, 2.0 * KEPT - 1, 10.0, 0.0))
    assert model.seen[1, 1, 0, 2.0 * KEPT - 1][0] == pytest.approx(10.0, rel=0.01)
    assert model.rate(1, 1) != before


def test_what_is_left_follows_the_pace_at_the_present_size() -> None:
    model = SpeedModel()
    model.passed(1, (2, 0), 100, 1_000, 10_000)
    assert model.left_ms == float("inf")
    model.passed(1, (2, 0), 200, 1_000, 20_000)
    assert model.left_ms == 80_000
    model.passed(1, (4, 0), 210, 1_000, 21_000)
    model.passed(1, (4, 0), 250, 1_000, 23_000)
    assert model.left_ms == 750 * 2_000 / 40
    model.passed(1, (4, 0), 1_000, 1_000, 60_000)
    assert model.left_ms == 0
