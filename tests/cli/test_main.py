"""The root command: help of everything, light imports, speed, errors and exit codes."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import click
import httpx2
import pytest

from jobsched import errors
from jobsched.cli.main import ALIASES, COMMANDS
from jobsched.cli.main import cli as root
from tests.cli.conftest import Cli
from tests.client.fake_server import FakeServer, refusal

HEAVY = (
    "sqlalchemy",
    "fastapi",
    "uvicorn",
    "torch",
    "kubernetes",
    "ray",
    "alembic",
    "rich",
    "pydantic",
    "ruamel",
    "starlette",
    "IPython",
    "pandas",
    "docker",
)


def every_command() -> list[list[str]]:
    found = []
    context = click.Context(root)
    for name in COMMANDS:
        command = root.get_command(context, name)
        found.append([name])
        if isinstance(command, click.Group):
            found += [[name, inner] for inner in command.commands]
    return found


@pytest.mark.parametrize("words", every_command(), ids=" ".join)
def test_every_command_has_help_with_an_example(words: list[str], cli: Cli) -> None:
    result = cli(*words, "--help")
    assert result.code == 0
    assert "Example" in result.out
    assert f"jobsched {' '.join(words)}" in result.out
    for option in root.get_command(click.Context(root), words[0]).params:  # type: ignore[union-attr]
        assert not isinstance(option, click.Option) or option.hidden or option.help, option.name


def test_the_table_of_commands_is_what_the_modules_say(cli: Cli) -> None:
    out = cli("--help").out
    for name, (_, _, line) in COMMANDS.items():
        assert f"{name} " in out
        assert line.split()[0] in out
    context = click.Context(root)
    for alias, name in ALIASES.items():
        assert root.get_command(context, alias) is root.get_command(context, name)


def modules_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    return {name.split(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize(
    "statement",
    [
        "import jobsched",
        "from jobsched.cli import main",
        "from jobsched.cli import jobs, explain, output, wishes, cluster, debug, server, attach",
    ],
)
def test_commands_import_nothing_heavy(statement: str) -> None:
    assert modules_after(statement).isdisjoint(HEAVY)


@pytest.mark.parametrize(
    "statement",
    ["from jobsched.cli import submit, demo", "from jobsched import Client, task", "from jobsched import load"],
)
def test_the_sdk_imports_no_server_code(statement: str) -> None:
    assert modules_after(statement).isdisjoint(set(HEAVY) - {"pydantic", "ruamel"})


@pytest.mark.parametrize(("words", "most"), [(["--help"], 11.0), (["version"], 25.0)])
def test_commands_start_fast(words: list[str], most: float, tmp_path: object) -> None:
    """By the processor time they take, in that of a bare interpreter: machines of tests are busy, and slow. A quiet one
    starts an interpreter in 12 ms, help in 70 and what talks to a server in 160."""
    took, bare = [], []
    environ = os.environ | {"JOBSCHED_HOME": str(tmp_path), "JOBSCHED_CONFIG": str(tmp_path) + "/none"}
    for _ in range(5):
        begun = _children_s()
        subprocess.run(
            [sys.executable, "-m", "jobsched.cli.main", *words],
            capture_output=True,
            timeout=300,
            check=True,
            env=environ,
        )
        took.append(_children_s() - begun)
        begun = _children_s()
        subprocess.run([sys.executable, "-c", "pass"], timeout=300, check=True)
        bare.append(_children_s() - begun)
    assert min(took) < most * min(bare)


def _children_s() -> float:
    """Processor time of the processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_lazy_names_of_the_package() -> None:
    import jobsched

    for name in ("Client", "connect", "task", "JobSpec", "Phase", "JobFailed", "context"):
        assert getattr(jobsched, name) is not None
        assert name in dir(jobsched)
    with pytest.raises(AttributeError):
        _ = jobsched.nothing  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.NotFound("no such job", hint="look again"), 3),
        (errors.AuthError("who are you"), 4),
        (errors.Forbidden("no"), 4),
        (errors.Conflict("it changed"), 5),
        (errors.Unplaceable("never"), 8),
        (errors.SpecError([errors.Problem("bad", "gpu", "a.yaml", 3, 7, "fix")]), 7),
        (errors.JobschedError("oh"), 1),
    ],
)
def test_errors_of_the_server_have_their_exit_codes(
    error: errors.JobschedError, code: int, cli: Cli, server: FakeServer
) -> None:
    server.replies["GET jobs"] = refusal(error)
    result = cli("jobs")
    assert (result.code, result.out) == (code, "")
    assert result.err.startswith(error.render())
    as_json = cli("jobs", "-o", "json")
    assert (as_json.code, as_json.out) == (code, "")
    assert json.loads(as_json.err)["error"] == {**error.to_wire(), "exit_code": code}
    assert as_json.err.count("\n") == 1


def test_a_server_that_is_away_is_exit_6(cli: Cli, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobsched.client.remote.time.sleep", lambda _: None)
    server.replies["GET jobs"] = [httpx2.ConnectError("refused")] * 10
    result = cli("jobs")
    assert result.code == 6
    assert "error[E600]" in result.err
    assert "hint:" in result.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["jobbs"], "did you mean 'jobs'"),
        (["jobs", "--nonsense"], "--nonsense"),
        (["why"], "JOB"),
        (["jobs", "-o", "xml"], "xml"),
        (["jobs", "--columns", "COLOUR"], "columns: ID"),
        (["jobs", "--since", "yesterday"], "90s"),
        (["wait", "@last", "--for", "luck"], "luck"),
        (["run"], "job file"),
        (["scale", "x", "worker"], "ROLE=N"),
        (["submit", "--role", "worker", "--", "true"], "NAME=COUNT"),
        (["submit", "--set", "x", "--", "true"], "FIELD=VALUE"),
        (["submit", "-e", "NOT_SET_HERE", "--", "true"], "NOT_SET"),
        (["help", "nothing"], "topics:"),
    ],
)
def test_usage_errors_are_exit_2_and_say_what_to_do(words: list[str], says: str, cli: Cli) -> None:
    result = cli(*words)
    assert result.code == 2
    assert result.out == ""
    assert says in result.err
    assert "Traceback" not in result.err


def test_ctrl_c_is_130(cli: Cli, server: FakeServer) -> None:
    server.replies["GET jobs"] = KeyboardInterrupt()

    def interrupt(_: httpx2.Request) -> httpx2.Response:
        raise KeyboardInterrupt

    server.handle = interrupt  # type: ignore[method-assign]
    assert cli("jobs").code == 130


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m jobsched.cli.main schema | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=300)
    assert done.stdout == "{\n"
    assert "Traceback" not in done.stderr


def test_a_full_disk_and_a_defect_are_told_in_a_line(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = cli("init", str(tmp_path / "no" / "job.yaml"))
    assert result.code == 1
    assert "No such file or directory" in result.err
    monkeypatch.setattr("jobsched.load.template", lambda name: 1 / 0)
    result = cli("init", "-")
    assert result.code == 1
    assert "error[E001]: ZeroDivisionError" in result.err
    assert "report it" in result.err
    monkeypatch.setenv("JOBSCHED_LOG_LEVEL", "debug")
    with pytest.raises(ZeroDivisionError):
        cli("init", "-")
