"""Goes wrong on request, without torch, so that it starts in a moment. Flags come from the command line or from `MODE`,
`RANK_AT_FAULT`, `STEPS`, `STEP_MS`, `AT_STEP`, `EXIT` of the environment.

    none        trains and exits 0
    crash       the rank at fault exits with EXIT (or dies of signal -EXIT) at step AT_STEP, every time
    crash-once  the same, in its first start only
    hang        the rank at fault waits for a lock for ever, in the first start only; the others go on and wait
    oom         the rank at fault takes memory until it is killed
    slow        the rank at fault takes ten times as long per step
    deaf        ignores SIGTERM and SIGINT, and never saves
"""

import argparse
import os
import signal
import sys
import threading
import time

from jobsched import context

MODES = ("none", "crash", "crash-once", "hang", "oom", "slow", "deaf")


def wait_for_a_lock_that_is_never_released() -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def eat_memory() -> None:
    eaten = []
    while True:
        eaten.append(bytearray(os.urandom(1 << 20)) * 16)


def go_wrong(mode: str, code: int) -> None:
    """What happens at step AT_STEP on the rank at fault."""
    first = context.attempt == 1 and context.restart == 0
    match mode:
        case "crash" | "crash-once" if mode == "crash" or first:
            print(f"rank {context.rank} fails on purpose with {code}", file=sys.stderr, flush=True)
            if code < 0:
                os.kill(os.getpid(), -code)
            sys.exit(code)
        case "hang" if first:
            wait_for_a_lock_that_is_never_released()
        case "oom":
            eat_memory()


def main() -> int:
    def default(name: str, value: str) -> str:
        return os.environ.get(name, value)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=MODES, default=default("MODE", "none"))
    parser.add_argument("--rank-at-fault", type=int, default=int(default("RANK_AT_FAULT", "1")))
    parser.add_argument("--steps", type=int, default=int(default("STEPS", "30")))
    parser.add_argument("--step-ms", type=float, default=float(default("STEP_MS", "50")))
    parser.add_argument("--at-step", type=int, default=int(default("AT_STEP", "10")))
    parser.add_argument("--exit", type=int, default=int(default("EXIT", "137")), help="negative: a signal")
    options = parser.parse_args()

    at_fault = context.rank == options.rank_at_fault or context.world_size == 1
    if options.mode == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    for step in range(options.steps):
        if step == options.at_step and at_fault:
            go_wrong(options.mode, options.exit)
        time.sleep(options.step_ms / 1_000 * (10 if options.mode == "slow" and at_fault else 1))
        context.report(step=step + 1, total=options.steps, loss=1 / (step + 1))
    print(f"rank {context.rank} is done with attempt {context.attempt}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
