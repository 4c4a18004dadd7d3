from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from jobsched.backends.bundle import BundleError, Owner, folders, pack

OWNER = Owner(1234, 5678)


def packed(directory: Path, limit: int = 10_000, prefix: str = "/a/b") -> dict[str, tarfile.TarInfo]:
    out = io.BytesIO()
    pack(directory, out, limit, OWNER, prefix)
    out.seek(0)
    with tarfile.open(fileobj=out) as tar:
        entries = {entry.name: entry for entry in tar.getmembers()}
        tar.extractall(directory.parent / "out", filter="fully_trusted")
    return entries


@pytest.fixture
def work(tmp_path: Path) -> Path:
    for name, text in {"train.py": "x", "src/model.py": "yy", "data/big.bin": "z" * 5_000, ".git/HEAD": "h",
                       "src/__pycache__/model.pyc": "c", "logs/keep.txt": "k", "logs/run.log": "l"}.items():
        path = tmp_path / "work" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "work"


def test_everything_below_the_prefix_with_the_owner(work: Path) -> None:
    entries = packed(work)
    assert {"a/b", "a/b/train.py", "a/b/src/model.py", "a/b/data/big.bin"} <= entries.keys()
    assert not any(".git" in name or name.endswith(".pyc") for name in entries)
    assert {(entry.uid, entry.gid, entry.uname) for entry in entries.values()} == {(1234, 5678, "")}
    assert (work.parent / "out/a/b/src/model.py").read_text() == "yy"


def test_ignore_files_are_heeded(work: Path) -> None:
    (work / ".gitignore").write_text("data/\n*.log\n")
    assert {"a/b/logs/keep.txt"} == {name for name in packed(work) if name.startswith(("a/b/logs/", "a/b/data"))}
    (work / ".jobschedignore").write_text("logs\n!logs\n/src/*.py\n")
    entries = packed(work)
    assert "a/b/data/big.bin" in entries, ".jobschedignore alone decides"
    assert "a/b/src/model.py" not in entries


def test_too_much_is_refused_with_the_remedy(work: Path) -> None:
    with pytest.raises(BundleError, match=r"\.jobschedignore"):
        packed(work, limit=5_000)
    (work / ".jobschedignore").write_text("data\n")
    packed(work, limit=5_000)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="does not exist"):
        packed(tmp_path / "nowhere")


def test_links_that_leave_are_followed_and_others_stay_links(work: Path) -> None:
    outside = work.parent / "shared"
    (outside / "deep").mkdir(parents=True)
    (outside / "deep/table.csv").write_text("1,2")
    (work / "inside.py").symlink_to("train.py")
    (work / "table.csv").symlink_to(outside / "deep/table.csv")
    (work / "shared").symlink_to(outside)
    (outside / "back").symlink_to(work)
    (outside / "again").symlink_to(outside)
    os.link(work / "train.py", work / "zz-same.py")
    entries = packed(work)
    assert entries["a/b/inside.py"].issym()
    assert entries["a/b/table.csv"].isreg()
    assert (work.parent / "out/a/b/shared/deep/table.csv").read_text() == "1,2"
    assert (work.parent / "out/a/b/zz-same.py").read_text() == "x"
    assert not any("back/" in name or "again/" in name for name in entries), "links in circles end"


def test_sockets_and_dangling_links_do_no_harm(work: Path) -> None:
    (work / "dangling").symlink_to("/no/such/file")
    os.mkfifo(work / "pipe")
    assert not {"a/b/dangling", "a/b/pipe"} & packed(work).keys()


def test_empty_directories(tmp_path: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(folders({"/scratch": 0o700}, OWNER))) as tar:
        (entry,) = tar.getmembers()
    assert (entry.name, entry.isdir(), entry.mode, entry.uid) == ("scratch", True, 0o700, 1234)
