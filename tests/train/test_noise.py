"""The noise of gradients, against what it is known to be: by itself, and measured by a real gang of two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from jobsched.core.policies.goodput import Report
from jobsched.train.noise import WARM_UP, Noise
from tests.ports import held_ports


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.4, 0.4, 0.2), (0.25,) * 4])
def test_both_terms_come_out_whatever_the_parts_of_the_batch(shares: tuple[float, ...]) -> None:
    torch.manual_seed(0)
    batch, size, deviation = 100, 50, 3.0
    true = torch.full((size,), 0.2)
    noise = Noise()
    for _ in range(400):
        parts = [true + deviation * torch.randn(size) / (share * batch) ** 0.5 for share in shares]
        whole = sum((share * part for share, part in zip(shares, parts, strict=True)), torch.zeros(size))
        weighted = sum((share * part.dot(part) for share, part in zip(shares, parts, strict=True)), torch.zeros(()))
        noise.note(whole.dot(whole), weighted, len(shares))
    told = noise.metrics()
    assert float(told["grad_sqr"]) == pytest.approx(size * 0.2**2, rel=0.15)
    assert float(told["grad_var"]) == pytest.approx(size * deviation**2 / batch, rel=0.1)


def test_one_replica_and_too_few_steps_tell_nothing() -> None:
    noise = Noise()
    for _ in range(2 * WARM_UP):
        noise.note(torch.ones(()), torch.ones(()), 1)
    assert noise.metrics() == {}
    for _ in range(WARM_UP - 1):
        noise.note(torch.ones(()), torch.ones(()), 2)
    assert noise.metrics() == {}


SCRIPT = """
import json
import torch
from jobsched.train import ddp
from jobsched.train.context import context
from jobsched.train.data import Plan

told = {}
context.report = lambda **fields: told.update(fields)
torch.manual_seed(0)
size, batch, weights = 4_096, 64, 10
targets = torch.randn(size, weights) * 2.0 + 1.0
model = torch.nn.Linear(1, weights, bias=False)
torch.nn.init.zeros_(model.weight)
trainer = ddp.Elastic(model, torch.optim.SGD(model.parameters(), lr=0.0), plan=Plan(size, batch, 4))
for part in trainer.batches():
    rows = torch.from_numpy(part.indices)
    loss = (model(torch.ones(len(rows), 1)) - targets[rows]).square().sum(1).mean() / 2
    trainer.step(loss)
if trainer.rank == 0:
    mean = targets.mean(0)
    print(json.dumps({
        "told": {name: float(told[name]) for name in ("grad_sqr", "grad_var", "batch")},
        "true": [float(mean.dot(mean)), float(targets.var(0).sum() / batch)],
    }))
"""
"""Weights stay at 0, where the gradient of a sample is minus its target: noise is known exactly."""


def test_a_gang_of_two_measures_the_noise_of_its_gradients() -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("JOBSCHED_")}
    with held_ports(1) as (port,):
        env |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        gang = [
            subprocess.Popen([sys.executable, "-c", SCRIPT], env=env | {"RANK": str(rank)}, stdout=subprocess.PIPE,
                             text=True)
            for rank in range(2)
        ]  # fmt: skip
        try:
            outs = [replica.communicate(timeout=300)[0] for replica in gang]
        finally:
            for replica in gang:
                replica.kill()
    said = json.loads(outs[0])
    square, variance = said["true"]
    assert said["told"]["grad_sqr"] == pytest.approx(square, rel=0.1)
    assert said["told"]["grad_var"] == pytest.approx(variance, rel=0.15)
    report = Report.of(said["told"] | {"samples_per_s": 100.0}, 1, 2)
    assert report is not None
    assert report.noise == (said["told"]["grad_sqr"], said["told"]["grad_var"])  # as the scheduler reads it
