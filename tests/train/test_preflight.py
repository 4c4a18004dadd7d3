"""The pre-flight check on this very machine, and what it finds where something is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from jobsched.train import preflight


def test_a_sound_machine_passes(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "jobsched.train.preflight"], capture_output=True, text=True, timeout=300, check=False,
        env={"PATH": "/usr/bin:/bin", "JOBSCHED_SCRATCH_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("preflight: passed")


def test_findings_are_sentences_and_the_code_is_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preflight, "DIGEST", "0" * 64)
    monkeypatch.setenv("JOBSCHED_SCRATCH_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-gone")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert preflight.main() == 1
    said = capsys.readouterr().err
    assert "computes wrong" in said
    assert f"{tmp_path / 'none'} cannot be written: No such file or directory" in said
    assert "CUDA does not come up, though 1 GPUs are given" in said
