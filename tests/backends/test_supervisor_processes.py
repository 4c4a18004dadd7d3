"""Who belongs to a replica: decided on made-up process tables, because what is found here is killed elsewhere."""

from __future__ import annotations

import os

import pytest

from jobsched.backends.supervisor import processes
from jobsched.backends.supervisor.processes import Process, members

SUPERVISOR = os.getpid()
"""`members` protects the process that asks."""


def table(*rows: tuple[int, int, int, int]) -> dict[int, Process]:
    """From (pid, parent, session, start_ticks)."""
    return {
        pid: Process(pid, "S", parent, session, session, start, 0) for pid, parent, session, start in rows
    }


def a_machine(*rows: tuple[int, int, int, int]) -> dict[int, Process]:
    """Init, kernel threads (parent 0, session 0), a shell, the supervisor, other people's things, and `rows`."""
    return table(
        (1, 0, 0, 1), (2, 0, 0, 1), (3, 2, 0, 1), (500, 1, 0, 50), (501, 500, 501, 51),
        (SUPERVISOR, 501, SUPERVISOR, 900), (700, 1, 700, 100), (701, 700, 700, 5_000), *rows,
    )


MAIN, START = 4_000_000, 1_000


def test_the_session_and_descendants_in_other_sessions_belong() -> None:
    known = a_machine(
        (MAIN, SUPERVISOR, MAIN, START), (4_000_001, MAIN, MAIN, START), (4_000_002, 4_000_001, 4_000_002, START + 5),
        (4_000_003, 1, MAIN, START + 9),
    )
    assert members(MAIN, START, known) == {MAIN, 4_000_001, 4_000_002, 4_000_003}


def test_what_a_dead_main_process_left_in_its_session_belongs() -> None:
    known = a_machine((4_000_001, SUPERVISOR, MAIN, START + 1))
    assert members(MAIN, START, known) == {4_000_001}


@pytest.mark.parametrize("also", [(), (0,), (1,), (2,), (0, 1, 500), (SUPERVISOR,), (501,), (700,)])
def test_nobody_else_ever_belongs(also: tuple[int, ...]) -> None:
    """Not the machine, not ourselves, not our ancestors, not older processes, however they got on the list."""
    known = a_machine((MAIN, SUPERVISOR, MAIN, START))
    assert members(MAIN, START, known, also) == {MAIN}


def test_a_pid_that_somebody_else_has_by_now_does_not_count() -> None:
    known = a_machine((MAIN, 700, MAIN, START + 500), (4_000_001, MAIN, MAIN, START + 501))
    assert members(MAIN, START, known) == set()


def test_without_a_known_identity_nothing_belongs() -> None:
    assert members(MAIN, 0, a_machine((MAIN, SUPERVISOR, MAIN, START))) == set()


def test_zombies_are_not_alive() -> None:
    known = a_machine()
    known[MAIN] = Process(MAIN, "Z", SUPERVISOR, MAIN, MAIN, START, 0)
    assert members(MAIN, START, known) == set()


@pytest.mark.parametrize("pid", [1, 0, -1])
def test_signals_never_go_to_many_or_to_init(pid: int) -> None:
    with pytest.raises(AssertionError):
        processes.send(pid, 0)
    with pytest.raises(AssertionError):
        processes.send_group(pid, 0)
    with pytest.raises(AssertionError):
        members(pid, START, a_machine())


def test_our_own_process_can_be_read() -> None:
    own = processes.read(os.getpid())
    assert own is not None
    assert own.alive
    assert own.parent == os.getppid()
    assert processes.table()[own.pid].start_ticks == own.start_ticks
    assert processes.read(2**22 + 1) is None
