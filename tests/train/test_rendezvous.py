"""Rendezvous among listeners of one process: who leads, who is waited for, who is turned away."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict

import pytest

from jobsched.train.rendezvous import Health, Identity, Member, Rendezvous, Round, Stale, all_loopback, bind_host
from tests.ports import held_ports

PATIENCE_S = 60.0
"""Only a failing test waits as long, and only for what must come about; listeners and threads may be late."""


class Hall:
    """Replicas 0..n-1 of one role, each with its own listener; `form` runs in a thread."""

    def __init__(self, size: int) -> None:
        self.held = ExitStack()
        self.addresses = tuple(f"127.0.0.1:{port}" for port in self.held.enter_context(held_ports(size)))
        self.pool = ThreadPoolExecutor(16)
        self.here: dict[int, Rendezvous] = {}

    def enter(self, index: int, restart: int = 0, known: tuple[str, ...] | None = None, token: str = "t",
              **options: object) -> Rendezvous:
        identity = Identity(index, restart, 1, token, known or self.addresses)
        self.here[index] = Rendezvous(identity, **{"min_members": 1, "wanted": 1,
                                                   "lost_after_s": PATIENCE_S, "start_wait_s": PATIENCE_S, **options})
        return self.here[index]

    def leave(self, index: int) -> None:
        self.here.pop(index).close()

    def form(self, index: int, step: int = -1, synced: int = 0, **options: object) -> Future[Round | None]:
        return self.pool.submit(self.here[index].form, step, synced, lambda: f"store-of-{index}", **options)

    def close(self) -> None:
        for index in list(self.here):
            self.leave(index)
        self.pool.shutdown(wait=False)
        self.held.close()


@pytest.fixture
def hall() -> Iterator[Hall]:
    made = Hall(4)
    yield made
    made.close()


def all_form(hall: Hall, *indices: int, step: int = -1, synced: int = 0) -> Round:
    rounds = [f.result(PATIENCE_S) for f in [hall.form(i, step, synced) for i in indices]]
    assert len(set(rounds)) == 1
    assert rounds[0] is not None
    return rounds[0]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


def test_all_agree_and_the_lowest_leads(hall: Hall) -> None:
    for index in (2, 0, 1):
        hall.enter(index, wanted=3)
    closed = all_form(hall, 0, 1, 2)
    assert [m.index for m in closed.members] == [0, 1, 2]
    assert (closed.number, closed.store) == (1, "store-of-0")
    assert not closed.in_step
    assert closed.source == 0


def test_the_first_round_waits_for_all_that_were_started(hall: Hall) -> None:
    said: list[str] = []
    hall.enter(0, wanted=2, say=said.append)
    first = hall.form(0)
    until(lambda: "1 of 2 replicas are here; starts without the rest soon" in said)
    assert not first.done()
    hall.enter(1, wanted=2)
    hall.form(1)
    assert len(first.result(PATIENCE_S).members) == 2


def test_but_not_for_ever(hall: Hall) -> None:
    hall.enter(0, wanted=3, start_wait_s=0.3)
    assert len(hall.form(0).result(PATIENCE_S).members) == 1


def test_fewer_than_the_minimum_wait(hall: Hall) -> None:
    said: list[str] = []
    hall.enter(0, min_members=2, start_wait_s=0, say=said.append)
    first = hall.form(0)
    until(lambda: "1 of at least 2 replicas are here" in said)
    assert not first.done()
    hall.enter(1, min_members=2)
    hall.form(1)
    assert len(first.result(PATIENCE_S).members) == 2


def test_survivors_meet_again_without_who_is_gone(hall: Hall) -> None:
    for index in range(3):
        hall.enter(index, wanted=3)
    all_form(hall, 0, 1, 2)
    hall.leave(0)
    closed = all_form(hall, 1, 2, step=7, synced=1)
    assert (closed.number, [m.index for m in closed.members]) == (2, [1, 2])
    assert closed.in_step
    assert closed.store == "store-of-1"


def test_who_comes_back_knocks_and_the_most_advanced_is_the_source(hall: Hall) -> None:
    for index in range(3):
        hall.enter(index, wanted=3)
    all_form(hall, 0, 1, 2)
    hall.leave(0)
    all_form(hall, 1, 2, step=7, synced=1)
    hall.enter(0, restart=1, wanted=3)
    newcomer = hall.form(0)
    until(lambda: hall.here[1].someone_waits and hall.here[2].someone_waits)
    assert not newcomer.done()
    others = [hall.form(1, 9, 2), hall.form(2, 8, 2)]
    closed = newcomer.result(PATIENCE_S)
    assert [f.result(PATIENCE_S) for f in others] == [closed, closed]
    assert [m.index for m in closed.members] == [0, 1, 2]
    assert closed.source == 1
    assert not hall.here[1].someone_waits


def test_a_newcomer_whose_address_nobody_was_told_is_learned(hall: Hall) -> None:
    known = (*hall.addresses[:2], "", "")
    hall.enter(0, known=known, wanted=2)
    hall.enter(1, known=known, wanted=2)
    all_form(hall, 0, 1)
    hall.enter(2, wanted=3)
    newcomer = hall.form(2)
    until(lambda: hall.here[0].someone_waits)
    again = [hall.form(0, 1, 1), hall.form(1, 1, 1)]
    assert len(newcomer.result(PATIENCE_S).members) == 3
    assert all(f.result(PATIENCE_S) == newcomer.result() for f in again)


def test_a_knock_and_a_join_that_come_late_ask_for_no_further_round(hall: Hall) -> None:
    """The group met with who had knocked and joined, perhaps twice: that they hear of it only now is no wish."""
    hall.enter(0, wanted=2)
    hall.enter(1, wanted=2)
    closed = all_form(hall, 0, 1)
    for op in ("knock", "join"):
        health, _ = hall.here[0]._ask(1, {"op": op, "member": asdict(closed.members[0])}, PATIENCE_S)
        assert health is Health.ALIVE
    assert not hall.here[1].someone_waits
    anew = Member(0, 0, round=1, group=(0, 1))
    assert hall.here[0]._ask(1, {"op": "knock", "member": asdict(anew)}, PATIENCE_S)[0] is Health.ALIVE
    assert hall.here[1].someone_waits


def test_an_older_start_of_a_replica_is_turned_away(hall: Hall) -> None:
    hall.enter(0, wanted=2)
    hall.enter(1, restart=2, wanted=2)
    all_form(hall, 0, 1)
    hall.leave(1)
    hall.enter(1, restart=1, wanted=2)
    with pytest.raises(Stale):
        hall.form(1).result(PATIENCE_S)


def test_another_jobs_process_is_no_peer(hall: Hall) -> None:
    hall.enter(0, token="another job's")
    hall.enter(1)
    while (health := hall.here[1].survey()[0]) is Health.SILENT:
        pass  # it is late
    assert health is Health.GONE
    assert len(hall.form(1).result(PATIENCE_S).members) == 1


def mute(address: str) -> socket.socket:
    """Accepts connections and never answers, as a stopped process does."""
    host, _, port = address.rpartition(":")
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((host, int(port)))
    sock.listen()
    return sock


def test_a_silent_member_is_waited_for_and_then_left_behind_by_the_majority(hall: Hall) -> None:
    said: list[str] = []
    for index in range(3):
        hall.enter(index, wanted=3, lost_after_s=1.5, say=said.append)
    all_form(hall, 0, 1, 2)
    hall.leave(2)
    with mute(hall.addresses[2]):
        closed = all_form(hall, 0, 1, step=3, synced=1)
    assert [m.index for m in closed.members] == [0, 1]
    assert any("do not answer; waits up to" in text for text in said)


def test_half_a_group_does_not_go_on_while_the_other_half_is_silent(hall: Hall) -> None:
    said: list[str] = []
    for index in range(2):
        hall.enter(index, wanted=2, lost_after_s=0.2, say=said.append)
    all_form(hall, 0, 1)
    hall.leave(1)
    with mute(hall.addresses[1]):
        lonely = hall.form(0, 3, 1)
        until(lambda: any("no majority" in text for text in said))
        assert not lonely.done()
    assert len(lonely.result(PATIENCE_S).members) == 1  # now it refuses connections: its process is gone


def test_who_has_finished_and_finds_nobody_is_done(hall: Hall) -> None:
    hall.enter(0, min_members=2)
    assert hall.form(0, 10, 1, finished=True).result(PATIENCE_S) is None


def test_garbage_on_the_port_does_no_harm(hall: Hall) -> None:
    hall.enter(0)
    host, _, port = hall.addresses[0].rpartition(":")
    strange = json.dumps({"token": "t", "index": "x"}).encode() + b"\n"
    for text in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b"{}\n", strange):
        with suppress(ConnectionResetError), socket.create_connection((host, int(port)), PATIENCE_S) as sock:
            sock.sendall(text)
            assert b'"ok"' not in sock.makefile("rb").readline()
    assert len(hall.form(0).result(PATIENCE_S).members) == 1


def test_the_source_has_the_newest_round_then_most_steps_then_the_lowest_index() -> None:
    def source(*progress: tuple[int, int]) -> int:
        return Round(9, tuple(Member(i, 0, 8, r, s) for i, (r, s) in enumerate(progress)), "").source

    cases: list[tuple[Callable[[], int], int]] = [
        (lambda: source((0, -1), (3, 5), (3, 6)), 2),
        (lambda: source((4, 1), (3, 9)), 0),
        (lambda: source((3, 5), (3, 5)), 0),
    ]
    assert [case() for case, _ in cases] == [wanted for _, wanted in cases]


def test_what_to_bind() -> None:
    assert (bind_host("10.0.0.3"), bind_host("localhost"), bind_host("pod-0.svc")) == ("10.0.0.3", "127.0.0.1", "")
    assert all_loopback(["127.0.0.1:1", "localhost:2"])
    assert not all_loopback(["127.0.0.1:1", "10.0.0.3:2"])
