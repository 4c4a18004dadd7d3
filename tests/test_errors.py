from __future__ import annotations

import json
from dataclasses import replace

import pytest

from jobsched import errors
from jobsched.errors import ConfigError, JobschedError, NotFound, Problem, SpecError, Unplaceable

TWO = (
    Problem("unknown field 'gpus'", "gpus", "job.yaml", 3, 1, "did you mean 'gpu'?"),
    Problem("'x' is not a size", "memory", "job.yaml", 4, 9),
)


def test_a_problem_shows_its_place_as_far_as_it_is_known() -> None:
    assert TWO[0].place == "job.yaml:3:1"
    assert Problem("m", file="f").place == "f"
    assert Problem("m").place == "<spec>"


def test_a_spec_error_shows_what_where_and_what_to_do_for_each_problem() -> None:
    assert SpecError(TWO).render() == (
        "error[E200]: unknown field 'gpus'\n  --> job.yaml:3:1  gpus\n  hint: did you mean 'gpu'?\n"
        "error[E200]: 'x' is not a size\n  --> job.yaml:4:9  memory"
    )
    assert str(SpecError(TWO)) == "2 problems: unknown field 'gpus'; …"
    assert str(SpecError(TWO[1:])) == "'x' is not a size"


@pytest.mark.parametrize("error", [SpecError(TWO), ConfigError(problems=TWO)])
def test_problems_travel_on_the_wire(error: JobschedError) -> None:
    body = json.loads(json.dumps(error.to_wire()))
    assert body["code"] == error.code
    problems = tuple(Problem(**p) for p in body["problems"])
    assert problems == tuple(replace(problem, code=error.code) for problem in TWO)


def test_errors_without_problems() -> None:
    assert (
        NotFound("no job 'x'", hint="see jobsched jobs").render()
        == "error[E300]: no job 'x'\n  hint: see jobsched jobs"
    )
    assert ConfigError("cannot read f").to_wire() == {"code": "E040", "message": "cannot read f", "hint": ""}
    assert Unplaceable("too big").render() == "error[E217]: too big"


def test_every_error_has_its_own_code_and_codes_for_http_and_the_shell() -> None:
    found = errors.all_errors()
    assert found["E200"] is SpecError
    for code, kind in found.items():
        assert kind.code == code
        assert 400 <= kind.http_status <= 504
        assert kind.exit_code in (1, 2, 3, 4, 5, 6, 7, 8, 124)
    assert (SpecError.exit_code, ConfigError.exit_code, Unplaceable.exit_code) == (7, 2, 8)
