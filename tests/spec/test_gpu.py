from __future__ import annotations

import pytest
from pydantic import ValidationError

from jobsched.spec.gpu import GpuRequest


@pytest.mark.parametrize(
    ("written", "kinds", "milli", "low", "high"),
    [
        ("h100:8", ("h100",), 8_000, 0, None),
        ("any:1", (), 1_000, 0, None),
        ("any:0.5", (), 500, 0, None),
        (0.25, (), 250, 0, None),
        (8, (), 8_000, 0, None),
        ("8", (), 8_000, 0, None),
        ("24GB..:2", (), 2_000, 24 * 10**9, None),
        ("24GB:2", (), 2_000, 24 * 10**9, None),
        ("..40GB", (), 1_000, 0, 40 * 10**9),
        ("16Gi..80GB:4", (), 4_000, 16 * 2**30, 80 * 10**9),
        (["h100:8", "A100:8"], ("h100", "a100"), 8_000, 0, None),
        ("h100|a100:2", ("h100", "a100"), 2_000, 0, None),
        ("h100(40GB..):1", ("h100",), 1_000, 40 * 10**9, None),
        ("h100-80gb:1g.10gb", ("h100-80gb:1g.10gb",), 1_000, 0, None),
        ("h100-80gb:1g.10gb:3", ("h100-80gb:1g.10gb",), 3_000, 0, None),
        ("4090:2", ("4090",), 2_000, 0, None),
        ({"type": ["h100", "a100"], "memory": "24GB..", "count": 8}, ("h100", "a100"), 8_000, 24 * 10**9, None),
        ({"memory": "24GB"}, (), 1_000, 24 * 10**9, None),
        ({"kinds": ["h100"], "milli": 2_000}, ("h100",), 2_000, 0, None),
    ],
)
def test_gpu_notations(written: object, kinds: tuple[str, ...], milli: int, low: int, high: int | None) -> None:
    gpu = GpuRequest.model_validate(written)
    assert (gpu.kinds, gpu.milli, gpu.memory_min_bytes) == (kinds, milli, low)
    assert high is None or gpu.memory_max_bytes == high
    assert GpuRequest.model_validate(str(gpu)) == gpu
    assert GpuRequest.model_validate_json(gpu.model_dump_json()) == gpu


@pytest.mark.parametrize(
    "written",
    [
        "",
        "h100:x",
        "h100:0",
        "h100:1.5",
        "h100:-1",
        0,
        -1,
        1.5,
        2_000,
        True,
        [],
        ["h100:8", "a100:4"],
        ["any", "h100"],
        "any|h100",
        "h 100:8",
        "80GB..24GB:1",
        pytest.param("x" * 10_000, id="long"),
        {"type": 5},
        {"type": "h100", "milli": 5, "colour": "red"},
        float("nan"),
        pytest.param(10**400, id="huge"),
        [[[]]],
        {"count": "many"},
        "..:1",
    ],
)
def test_gpu_nonsense(written: object) -> None:
    if written == "..:1":  # no bounds at all is any GPU
        assert GpuRequest.model_validate(written) == GpuRequest()
        return
    with pytest.raises(ValidationError):
        GpuRequest.model_validate(written)


def test_gpu_shown_and_counted() -> None:
    assert str(GpuRequest.model_validate("24GB..:2")) == "24GB..:2"
    assert str(GpuRequest.model_validate(["h100:8", "a100:8"])) == "h100|a100:8"
    assert str(GpuRequest.model_validate(0.5)) == "any:0.5"
    assert GpuRequest.model_validate(0.5).count == 1
    assert GpuRequest.model_validate("h100:8").count == 8
