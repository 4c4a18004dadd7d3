from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobsched.spec import quantity as q


@pytest.mark.parametrize(
    ("text", "ms"),
    [
        ("90s", 90_000),
        ("1h30m", 5_400_000),
        ("1.5h", 5_400_000),
        ("2d", 172_800_000),
        ("250ms", 250),
        ("1w", 604_800_000),
        (90, 90_000),
        (0.25, 250),
        ("90", 90_000),
        ("1:30:00", 5_400_000),
        ("2-12:00:00", 216_000_000),
        (" 1 h 30 m ", 5_400_000),
        (0, 0),
    ],
)
def test_durations_that_people_write(text: object, ms: int) -> None:
    assert q.parse_duration_ms(text) == ms


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("32Gi", 32 * 2**30),
        ("80GiB", 80 * 2**30),
        ("24GB", 24 * 10**9),
        ("500M", 500 * 10**6),
        ("512 Mi", 512 * 2**20),
        (7, 7),
        ("1.5Gi", 3 * 2**29),
        ("0", 0),
        ("10b", 10),
        ("512Ti", 2**49),
    ],
)
def test_sizes_that_people_write(text: object, count: int) -> None:
    assert q.parse_bytes(text) == count


@pytest.mark.parametrize(("text", "milli"), [(4, 4_000), (0.5, 500), ("500m", 500), ("2", 2_000), ("0.25", 250)])
def test_cpus_that_people_write(text: object, milli: int) -> None:
    assert q.parse_cpu_milli(text) == milli


@pytest.mark.parametrize("parse", [q.parse_duration_ms, q.parse_bytes, q.parse_cpu_milli])
@pytest.mark.parametrize(
    "value",
    [
        "",
        " ",
        "x",
        "1x",
        "1h30",
        "-1",
        -1,
        True,
        None,
        [],
        {},
        float("nan"),
        float("inf"),
        "9" * 60,
        pytest.param(10**400, id="huge"),
        pytest.param("9" * 10_000, id="long"),
        pytest.param("1" + " " * 10_000, id="wide"),
        "1e3",
        "٣",
        "0x10",
        "1_000",
        "nan",
    ],
)
def test_nonsense_is_refused_in_words(parse: object, value: object) -> None:
    assert callable(parse)
    with pytest.raises(ValueError, match=r"is not a|out of range") as refusal:
        parse(value)
    assert len(str(refusal.value)) < 200


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (24 * 10**9, "24GB"),
        (32 * 2**30, "32Gi"),
        (0, "0"),
        (7, "7"),
        (1024, "1Ki"),
        (1000, "1KB"),
        (1536 * 2**20, "1536Mi"),
        (1025, "1025"),
    ],
)
def test_sizes_are_shown_in_the_unit_they_were_meant_in(count: int, text: str) -> None:
    assert q.format_bytes(count) == text


@given(
    st.integers(0, q.MAX_BYTES)
    | st.builds(lambda n, unit: n * unit, st.integers(0, 500), st.sampled_from([10**9, 2**30]))
)
def test_sizes_read_back(count: int) -> None:
    assert q.parse_bytes(q.format_bytes(count)) == count


@given(st.integers(0, q.MAX_MS))
def test_durations_read_back(ms: int) -> None:
    assert q.parse_duration_ms(q.format_duration(ms)) == ms


@given(st.integers(0, q.MAX_CPU_MILLI))
def test_cpus_read_back(milli: int) -> None:
    assert q.parse_cpu_milli(q.format_cpu(milli)) == milli


def test_no_sum_over_a_whole_job_leaves_64_bits() -> None:
    for most in (q.MAX_BYTES, q.MAX_CPU_MILLI, q.MAX_MS):
        assert most * 10_000 < 2**63


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "nothing"),
        (True, "true"),
        ({}, "a mapping"),
        ([1], "a list"),
        ("a\nb", "'a\\nb'"),
        (object(), "a Python object"),
        pytest.param(10**5_000, "a number of more than 24 digits", id="huge"),
    ],
)
def test_values_are_quoted_on_one_short_line(value: object, shown: str) -> None:
    assert q.show(value) == shown
    assert len(q.show("x" * 10_000)) < 80
