"""Readers of recorded traces meet files that are not what they should be: what, where, what to do; never a defect."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from jobsched.cli.main import run
from jobsched.errors import SpecError
from jobsched.sim import traces

HEAD = "job_id,num_gpu,submit_time,iterations,model_name,duration,interval\n"
GOOD = "0,1,0,606,vgg19,164,30\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JOBSCHED_TRACES", str(tmp_path))
    for fmt in traces.FORMATS:
        (tmp_path / fmt).mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("", "", "not one job"),
        (HEAD, "", "not one job"),
        ("a,b,c\n1,2,3\n", ":2", "no column 'submit_time' here, only a, b, c"),
        (HEAD + GOOD + "1,-5,30,133,vgg11,147,23\n", ":3", "'-5' is not a number from 0"),
        (HEAD + GOOD + "1,0,30,133,vgg11,147,23\n", ":3", "'0' is not a whole number from 1"),
        (HEAD + GOOD + "1,100000,30,133,vgg11,147,23\n", ":3", "'100000' is not a whole number from 1 to 10,000"),
        (HEAD + GOOD + "1,1.5,30,133,vgg11,147,23\n", ":3", "'1.5' is not a whole number"),
        (HEAD + GOOD + "1,abc,30,133,vgg11,147,23\n", ":3", "'abc' is not a number"),
        (HEAD + GOOD + "1,1,30,133,vgg11,-7,23\n", ":3", "'-7' is not a number from 0"),
        (HEAD + GOOD + "1,1,30,133,vgg11,nan,23\n", ":3", "'nan' is not a number from 0"),
        (HEAD + GOOD + "1,1,30,133,vgg11,1e400,23\n", ":3", "'1e400' is not a number from 0"),
        (HEAD + GOOD + "1,1,3", ":3", "the line has not the 7 cells"),
        (HEAD + GOOD + "1,1,30,133,vgg11,147,23,9,9\n", ":3", "the line has not the 7 cells"),
    ],
)
def test_a_wrong_row_is_told_with_its_line(folder: Path, text: str, place: str, message: str) -> None:
    path = folder / "tiresias" / "mine.csv"
    path.write_text(text)
    with pytest.raises(SpecError) as caught:
        traces.read("tiresias", "mine", "fifo")
    (problem,) = caught.value.problems
    assert problem.place == f"{path}{place}"
    assert message in problem.message


def test_a_file_that_was_not_copied_whole_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "tiresias" / "mine.csv.gz"
    whole = gzip.compress((HEAD + GOOD * 1_000).encode())
    for content, message in ((whole[:-9], "ends too early"), (b"hello", "cannot be decompressed"),
                             (gzip.compress(b"\xff\xfe\x00"), "not text")):  # fmt: skip
        path.write_bytes(content)
        assert run(["simulate", "tiresias", "mine"]) == 7
        err = capsys.readouterr().err
        assert message in err
        assert str(path) in err
        assert "defect" not in err


WRONG = {
    "philly": ("timestamp,duration,num_gpus,gpu_time,cluster\nyesterday,30.0,1,30.0,a\n", "'yesterday' is not a time"),
    "muri": ("num_gpu,submit_time,iterations,iteration_time,model_name\n1,0,5,5,resnet9000\n", "'resnet9000' is not"),
    "pollux": ("name,time,application,num_replicas,batch_size\na,1,doom,1,8\n", "'doom' is not known; there are bert"),
    "gavel": ("LM\tpython3\n", "2 cells divided by tabs, not 7 or 10"),
    "shockwave": ("LM\tpython3\n", "2 cells divided by tabs, not 12"),
    "chronus": ("num_gpu,submit_time,duration,model_name,user,best_effort,expect_time_list\n1,1,1,a,b,0,x-9\n",
                "'x' is not a number"),
    "elasticflow": ("submit_time,duration,num_gpu,model_name\n5,5,1,a\n", "no column 'ddl'"),
    "openb": ("cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec\n1,1,1,1000,A 1!\n", "is not a list of GPU kinds"),
}  # fmt: skip


@pytest.mark.parametrize("fmt", WRONG)
def test_every_format_names_what_is_wrong(folder: Path, fmt: str) -> None:
    text, message = WRONG[fmt]
    path = folder / fmt / ("mine.trace" if "\t" in text else "mine.csv")
    path.write_text(text)
    (folder / "philly" / "philly_vc_nodes_load85.csv").write_text("vc,node num\na,1\n")
    (folder / "gavel" / "simulation_throughputs.json").write_text("{}")
    with pytest.raises(SpecError, match=message) as caught:
        traces.read(fmt, "mine", "fifo")
    assert caught.value.problems[0].file == str(path)


def test_guesses_below_nothing_are_taken_for_none(folder: Path) -> None:
    """The noise of Philly's published estimates takes some below 0."""
    (folder / "philly" / "philly_vc_nodes_load85.csv").write_text("vc,node num\na,1\n")
    (folder / "philly" / "mine.csv").write_text(
        "timestamp,duration,num_gpus,gpu_time,cluster\n" + "2017-10-01 00:00:45,30.0,1,30.0,a\n" * 2
    )
    (folder / "philly" / "mine_noisy_estimate.csv").write_text("est_duration_s\n-20\n40\n")
    workload = traces.read("philly", "mine", "guessed")
    assert [arrival.spec.expected for arrival in workload.arrivals] == [0, 40_000]
    (folder / "philly" / "mine_noisy_estimate.csv").write_text("est_duration_s\n40\n")
    with pytest.raises(SpecError, match="mine_noisy_estimate has only 1 estimates"):
        traces.read("philly", "mine", "guessed")


def test_gavel_needs_its_measurements_whole(folder: Path) -> None:
    (folder / "gavel" / "mine.trace").write_text("")
    (folder / "gavel" / "simulation_throughputs.json").write_text('{"v100": ')
    with pytest.raises(SpecError, match="not JSON"):
        traces.read("gavel", "mine", "fifo")
