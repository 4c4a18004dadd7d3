"""Settings, versions, help, completion, stopping."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jobsched import __version__, errors
from jobsched.backends.supervisor.protocol import Layout
from jobsched.cli.demo import clear_away
from jobsched.cli.server import stop_server
from jobsched.client import locate
from jobsched.client.client import Client
from tests.cli.conftest import Cli


def test_config_says_who_said_so(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli("config", "set", "server", "http://box:80").code == 0
    shown = {s["name"]: s for s in cli("config", "view", "-o", "json").json["settings"]}
    assert shown["server"]["value"] == "http://box:80"
    assert shown["server"]["source"] == str(tmp_path / "config.toml")
    monkeypatch.setenv("JOBSCHED_SERVER", "http://env")
    assert "environment JOBSCHED_SERVER" in cli("config", "explain", "server").out
    assert cli("config", "explain", "colour").code == 2


def test_a_token_is_never_shown(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOBSCHED_TOKEN", "very-secret")
    for words in (
        ["config", "view"],
        ["config", "view", "--json"],
        ["config", "explain"],
        ["config", "explain", "token"],
    ):
        assert "very-secret" not in cli(*words).out


def test_version_with_and_without_a_server(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli("version", "-o", "json").json == {"schema_version": 1, "client": __version__, "server": "9.9"}

    def nothing(*_: object, **__: object) -> object:
        raise errors.Unreachable("none")

    monkeypatch.setattr(locate, "find", nothing)
    assert cli("version").out == f"client {__version__}\nserver none\n"
    assert cli("--version").out == f"jobsched, version {__version__}\n"


def test_server_status(cli: Cli) -> None:
    assert cli("server", "status", "--json").json["version"] == "9.9"


@pytest.mark.parametrize("code", list(errors.all_errors()))
def test_every_error_code_is_explained(code: str, cli: Cli) -> None:
    out = cli("help", code).out
    assert out.startswith(code)
    assert len(out.splitlines()[0]) > len(code) + 15
    assert "exit code" in out


@pytest.mark.parametrize("topic", ["exit-codes", "output", "environment", "phases", "jobs", "run", "node"])
def test_topics_and_commands_are_explained(topic: str, cli: Cli) -> None:
    assert len(cli("help", topic).out.splitlines()) >= 4


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str, cli: Cli) -> None:
    assert "_JOBSCHED_COMPLETE" in cli("completion", shell).out


@pytest.mark.e2e
def test_stopping_a_server_that_answers_no_more(alone: None, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (home / "token").write_text("secret")
    (home / "server.json").write_text(json.dumps({"url": "http://127.0.0.1:9", "pid": process.pid}))
    try:
        stop_server(home, timeout_s=60)
        assert process.wait(60) != 0
    finally:
        process.kill()
    with pytest.raises(errors.NotFound):
        stop_server(home)
    assert os.path.exists(home / "server.json")


@pytest.mark.e2e
def test_stopping_leaves_nothing_outside_of_the_home_unless_replicas_run(
    alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / ("long-" * 20)
    monkeypatch.setenv("JOBSCHED_HOME", str(home))
    sockets = Layout(home).sockets
    assert home not in sockets.parents, "a path that is too long for sockets"
    locate.start(home)
    assert sockets.is_dir()
    stop_server(home)
    assert not sockets.exists()
    locate.start(home)
    try:
        with Client() as client:
            job = client.submit({"command": "sleep 300"}).wait("running", timeout=120)
            before = job.members[0].ident
            stop_server(home)
            assert sockets.is_dir()
            locate.start(home)
        with Client() as client:
            job = client.job(job.id)
            assert (job.wait("running", timeout=120).members[0].ident, job.attempts) == (before, 1)
    finally:
        assert clear_away(home) == []
    assert not sockets.exists()


def test_the_dashboard_address_holds_the_token_in_its_fragment(cli: Cli) -> None:
    assert re.fullmatch(r"http://\S+/#token=\S+\n", cli("dashboard").out)


@pytest.mark.parametrize(
    ("words", "says"),
    [(["--port", "99999"], "65,535"), (["--host", "a b"], "not an address"), (["--db", "mysql://x"], "not a store")],
)
def test_serve_refuses_wrong_options_by_name(words: list[str], says: str, cli: Cli, tmp_path: Path) -> None:
    result = cli("serve", "--home", str(tmp_path / "home"), *words)
    assert result.code == 2
    assert says in result.err


def test_a_home_that_is_a_file_is_refused(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = cli("serve", "--home", str(tmp_path / "file"))
    assert result.code == 2
    assert "cannot be used" in result.err


@pytest.mark.parametrize("url", ["nonsense", "ftp://x", "http://"])
def test_what_is_no_url_is_no_server(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOBSCHED_HOME", str(tmp_path))
    with pytest.raises(errors.ConfigError, match="--server"):
        locate.find(url)
