from __future__ import annotations

from jobsched.core.diagnose import frame_names, odd_one_out
from jobsched.core.job import ReplicaId

PY_SPY = """Process 71: python train.py
Thread 71 (active): "MainThread"
    {inner} (train.py:12)
    main (train.py:40)
    <module> (train.py:44)
Thread 80 (idle): "Thread-1"
    wait (threading.py:331)
"""
FAULTHANDLER = """Thread 0x00007f (most recent call first):
  File "threading.py", line 331 in wait

Current thread 0x00007e (most recent call first):
  File "train.py", line 12 in acquire_lock
  File "train.py", line 44 in <module>
"""


def rid(name: str) -> ReplicaId:
    return ReplicaId(name)


def test_main_thread_frames_innermost_first() -> None:
    assert frame_names(PY_SPY.format(inner="load")) == ["load", "main", "<module>"]
    assert frame_names(FAULTHANDLER) == ["acquire_lock", "<module>"]


def test_the_lowest_step_is_odd() -> None:
    names = [rid(f"worker/{i}") for i in range(3)]
    assert odd_one_out(dict(zip(names, (7, 6, 7), strict=True)), {}, names) == "worker/1"


def test_among_equals_the_one_that_does_not_wait_for_its_peers() -> None:
    names = [rid(f"worker/{i}") for i in range(4)]
    stacks = {n: PY_SPY.format(inner="all_reduce" if n != "worker/2" else "load") for n in names}
    assert odd_one_out(dict.fromkeys(names, 5), stacks, names) == "worker/2"
