"""`make bench`: every benchmark, one JSON line a figure (name, value, unit, peer, ratio). BENCH=full: large sizes."""

from __future__ import annotations

import os
import subprocess
import sys

SUITES = ("local", "scale", "store", "train", "faults", "elastic", "served", "admit", "fill", "place", "cycle", "jct",
          "starts")


def main() -> int:
    """Each suite in a process of its own, so that none inherits another's memory; the worst exit status."""
    small = {} if os.environ.get("BENCH") == "full" else {"BENCH": "small"}
    return max(
        subprocess.run([sys.executable, "-m", f"tests.benchmarks.{suite}"], env={**os.environ, **small}).returncode
        for suite in SUITES
    )


if __name__ == "__main__":
    sys.exit(main())
