"""Settings: who wins, who said so, and writing the user's file."""

import stat
from pathlib import Path

import pytest

from jobsched.client import settings
from jobsched.errors import ConfigError, UsageError


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in settings.NAMES:
        monkeypatch.delenv(f"JOBSCHED_{name.upper()}", raising=False)
    monkeypatch.setenv("JOBSCHED_CONFIG", str(tmp_path / "user" / "config.toml"))
    (tmp_path / "project" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "project" / "deep")
    settings._read.cache_clear()


def test_flag_beats_environment_beats_project_beats_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings.get("server") == settings.Setting("server", "", "default")
    user = settings.write("server", "http://user")
    assert settings.get("server") == settings.Setting("server", "http://user", str(user))
    project = tmp_path / "project" / "jobsched.toml"
    project.write_text('server = "http://project"\n')
    assert settings.get("server") == settings.Setting("server", "http://project", str(project))
    monkeypatch.setenv("JOBSCHED_SERVER", "http://env")
    assert settings.get("server").source == "environment JOBSCHED_SERVER"
    assert settings.get("server", "http://flag") == settings.Setting("server", "http://flag", "--server")


def test_paths_are_relative_to_the_file_that_names_them(tmp_path: Path) -> None:
    (tmp_path / "project" / "jobsched.toml").write_text('home = "state"\n')
    assert settings.home() == tmp_path / "project" / "state"


def test_writing_keeps_other_lines_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "user" / "config.toml"
    path.parent.mkdir()
    path.write_text('# mine\noutput = "wide"\nserver = "http://old"\n')
    settings.write("server", 'http://new"quoted"')
    assert path.read_text() == '# mine\noutput = "wide"\nserver = "http://new\\"quoted\\""\n'
    assert settings.get("server").value == 'http://new"quoted"'
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("text", ["servr = 'x'", "server = 3", "server = ["])
def test_a_wrong_file_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "project" / "jobsched.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"jobsched\.toml"):
        settings.get("server")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UsageError, match="colour"):
        settings.write("colour", "blue")
