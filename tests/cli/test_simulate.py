"""`jobsched simulate`: its figures, its errors, its report."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from jobsched.cli.main import run


def test_json_gives_one_line_per_policy(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["simulate", "synthetic", "40", "--nodes", "2x8", "--compare", "sjf", "-o", "json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["policy"] for row in rows] == ["learned", "sjf"]
    assert all(row["jobs"] == 40 and row["makespan_s"] > 0 for row in rows)


def test_the_same_seed_gives_the_same_figures(capsys: pytest.CaptureFixture[str]) -> None:
    figures = []
    for _ in range(2):
        assert run(["simulate", "synthetic", "30", "--seed", "7", "-o", "json"]) == 0
        row = json.loads(capsys.readouterr().out)
        figures.append({key: value for key, value in row.items() if key != "cpu_s"})
    assert figures[0] == figures[1]


def test_a_report_is_one_file_and_its_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert run(["simulate", "synthetic", "30", "--compare", "sjf", "--report", str(tmp_path)]) == 0
    assert "makespan_s" in capsys.readouterr().out
    plots = {"queue", "allocation", "jct", "gantt-learned", "gantt-sjf"}
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", *(f"{name}.png" for name in plots)}
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in plots)
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(plots)
    assert "<th>sjf</th>" in page
    assert 'src="h' not in page


def test_a_report_without_matplotlib_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run(["simulate", "synthetic", "5", "--report", str(tmp_path)]) == 1
    assert 'pip install "jobsched[sim]"' in capsys.readouterr().err


def test_faults_run_to_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["simulate", "synthetic", "15", "--nodes", "4x8", "--faults", "replica=1h,crash=1h", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["jobs"] == 15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["simulate", "excel"], "there is no trace format 'excel'"),
        (["simulate", "--policy", "magic"], "there is no policy 'magic'"),
        (["simulate", "--nodes", "many"], "'many' is not a set of nodes"),
        (["simulate", "synthetic", "5", "--faults", "fire"], "'fire' is not a kind of fault"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    assert message in capsys.readouterr().err
