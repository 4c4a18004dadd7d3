"""Looking inside: replay at a point, verify, snapshot."""

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Cli
from tests.client.fake_server import ID, FakeServer, a_history


@pytest.mark.parametrize(
    ("at", "phase", "seq"),
    [
        (["--at", "1"], "QUEUED", 1),
        (["--at", "2"], "STARTING", 2),
        ([], "RUNNING", 4),
        (["--at", "2026-01-01T00:00:01.500Z"], "STARTING", 2),
        (["--at", "2026-01-01T00:00:03"], "RUNNING", 4),
    ],
)
def test_replay_at_a_point(at: list[str], phase: str, seq: int, cli: Cli, server: FakeServer, tmp_path: Path) -> None:
    server.history = a_history()
    events = cli("events", "bert", "-o", "jsonl").out
    (tmp_path / "job.jsonl").write_text(events)
    (tmp_path / "job.json").write_text(cli("events", "bert", "-o", "json").out)
    stored = [data for _, data in server.stored()]
    (tmp_path / "wire.json").write_text(json.dumps(stored))
    server.replies[f"GET jobs/{ID}/events"] = [stored, [], stored, [], stored, []]
    for source in ("bert", "job.jsonl", "job.json", "wire.json"):
        document = cli("debug", "replay", source, *at, "-o", "json").json
        assert (document["phase"], document["seq"], document["id"]) == (phase, seq, ID)
    assert phase in cli("debug", "replay", "job.jsonl", *at).out


def test_replay_says_what_is_wrong(cli: Cli, server: FakeServer, tmp_path: Path) -> None:
    server.history = a_history()
    (tmp_path / "job.jsonl").write_text(cli("events", "bert", "-o", "jsonl").out)
    assert cli("debug", "replay", "job.jsonl", "--at", "0").code == 3
    assert cli("debug", "replay", "job.jsonl", "--at", "lunch").code == 2
    (tmp_path / "other.json").write_text('{"not": "events"}')
    assert cli("debug", "replay", "other.json").code == 2


def test_verify(cli: Cli, server: FakeServer) -> None:
    assert cli("debug", "verify").out == "ok: 7 events, 1 jobs\n"
    server.replies["GET debug/verify"] = {"ok": False, "events": 7, "jobs": 1, "problems": ["event 3 is gone"]}
    result = cli("debug", "verify")
    assert result.code == 1
    assert "event 3 is gone" in result.out


def test_snapshot(cli: Cli) -> None:
    assert json.loads(cli("debug", "snapshot").out) == {"seq": 7}
