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
        (["simulate", "--nodes", "0x8"], "'0x8': a cluster has 1 to"),
        (["simulate", "--nodes", "4x0"], "'4x0': a cluster has 1 to"),
        (["simulate", "--nodes", "99999999x99999999"], "a cluster has 1 to 100,000 nodes of 1 to 1,024 GPUs"),
        (["simulate", "--nodes", "4x8:V100"], "'4x8:V100' is not a set of nodes"),
        (["simulate", "synthetic", "0"], "'0' is not a number of jobs"),
        (["simulate", "synthetic", "many"], "'many' is not a number of jobs"),
        (["simulate", "synthetic", "5", "--compare", "magic"], "there is no policy 'magic'"),
        (["simulate", "synthetic", "5", "--faults", "fire"], "'fire' is not a kind of fault"),
        (["simulate", "synthetic", "5", "--faults", "node=0h"], "'node=0h': the time between two such faults"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert not told.out, "nothing runs before everything is known to be right"


def test_jobs_that_no_node_can_hold_are_refused_not_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    """They would wait for ever, counted among jobs whose averages are of the others alone."""
    assert run(["simulate", "served", "1:4", "--jobs", "40", "--nodes", "1x2", "-o", "json"]) == 0
    told = capsys.readouterr()
    refused = int(told.err.split()[0])
    assert 0 < refused < 40
    assert "of 40 jobs can never run on these nodes, first 0000" in told.err
    assert "the whole cluster, empty, holds" in told.err
    assert json.loads(told.out)["jobs"] == 40 - refused


def test_gangs_are_cut_to_the_nodes_that_were_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Muri's jobs ask for whole nodes of eight, philly's for nodes of their virtual cluster."""
    monkeypatch.setenv("JOBSCHED_TRACES", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    columns = "num_gpu,submit_time,iterations,iteration_time,model_name,batch_size"
    (tmp_path / "mine.csv").write_text(f"{columns}\n16,0,100,1000,bert,4\n3,0,100,1000,bert,4\n")
    for policy in ("srsf", "las"):
        assert run(["simulate", "muri", "mine", "--nodes", "6x3", "--policy", policy, "-o", "json"]) == 0
        told = capsys.readouterr()
        assert (json.loads(told.out)["jobs"], told.err) == (2, "")
    (tmp_path / "theirs.csv").write_text("timestamp,cluster,duration,num_gpus\n2017-10-01 00:00:00,vc1,60,8\n")
    (tmp_path / "philly_vc_nodes_load85.csv").write_text("vc,node num\nvc1,1\n")
    assert run(["simulate", "philly", "theirs", "--nodes", "2x4", "--policy", "fifo", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["avg_jct_s"] == pytest.approx(60, abs=0.1)


def test_a_cluster_for_none_of_the_jobs_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JOBSCHED_TRACES", str(tmp_path))
    (tmp_path / "mine.csv").write_text(
        "cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec\n1000,1,1,1000,P100\n1000,1,1,1000,T4\n"
    )
    (tmp_path / "openb_node_list_gpu_node.csv").write_text("sn,gpu,model,cpu_milli,memory_mib\nn0,2,P100,8000,1024\n")
    monkeypatch.chdir(tmp_path)
    assert run(["simulate", "openb", "mine", "--nodes", "4x8"]) == 8
    told = capsys.readouterr()
    assert "2 of 2 jobs can never run on these nodes" in told.err
    assert "no node has a GPU of kind p100" in told.err
    assert not told.out


def test_the_first_jobs_are_those_that_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JOBSCHED_TRACES", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    jobs = "".join(f"{at},{run_s},1,resnet\n" for at, run_s in ((900, 70), (0, 10), (600, 50), (300, 30)))
    (tmp_path / "mine.csv").write_text(f"submit_time,duration,num_gpu,model_name\n{jobs}")
    assert run(["simulate", "tiresias", "mine", "--jobs", "2", "--policy", "fifo", "-o", "json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["jobs"] == 2
    assert (row["avg_jct_s"], row["makespan_s"]) == pytest.approx((20, 330), abs=0.1)


def test_only_figures_go_to_stdout_whatever_the_simulated_server_warns_of(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["simulate", "synthetic", "40", "--nodes", "4x8", "--faults", "outage=10m", "-o", "json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["jobs"] == 40
    assert told.err.splitlines() == ["what happened under learned: starts 40"]


def test_processor_time_is_counted_with_faults_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["simulate", "synthetic", "15", "--nodes", "4x8", "--faults", "node=5h", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["cpu_s"] > 0
