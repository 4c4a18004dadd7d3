"""Pre-flight check of a node: whether its CPUs compute right and its scratch disk keeps what is written, and, where
torch sees GPUs, whether their memory keeps patterns and products come out the same each time.

    python -m jobsched.train.preflight

Ends with 0 when all is well, else with 1 and a sentence per finding. Run by jobsched on nodes that are on probation.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator

BLOCK = bytes(range(256)) * 4_096
"""One MiB whose digest is known."""
DIGEST = "fbbab289f7f94b25736c58be46a994c441fd02552cc6022352e3d86d2fab7c83"
ROUNDS = 64
DISK_BLOCKS = 16
GPU_MEMORY_PART = 0.5
"""Part of a GPU's free memory that is written and read."""
CHUNK_BYTES = 256 * 2**20
PATTERNS = (0x00, 0xFF, 0x55, 0xAA)
PRODUCTS = 20
SIZE = 4_096


def main() -> int:
    began = time.monotonic()
    findings = [*cpu(), *disk(), *gpus()]
    for finding in findings:
        print(f"preflight: {finding}", file=sys.stderr)
    print(f"preflight: {'failed' if findings else 'passed'} after {time.monotonic() - began:.1f} s", flush=True)
    return 1 if findings else 0


def cpu() -> Iterator[str]:
    """The same digest each time, on every CPU that this process may use."""
    allowed = os.sched_getaffinity(0)
    try:
        for core in sorted(allowed):
            os.sched_setaffinity(0, {core})
            if any(hashlib.sha256(BLOCK).hexdigest() != DIGEST for _ in range(ROUNDS // len(allowed) + 1)):
                yield f"CPU {core} computes wrong"
    finally:
        os.sched_setaffinity(0, allowed)


def disk() -> Iterator[str]:
    """What is written to the scratch directory comes back."""
    folder = os.environ.get("JOBSCHED_SCRATCH_DIR") or None
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            for _ in range(DISK_BLOCKS):
                file.write(BLOCK)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            if any(file.read(len(BLOCK)) != BLOCK for _ in range(DISK_BLOCKS)):
                yield f"{folder or tempfile.gettempdir()} gives back something else than was written"
    except OSError as error:
        yield f"{folder or tempfile.gettempdir()} cannot be written: {error.strerror}"


def gpus() -> Iterator[str]:
    """Each GPU that this process sees; none without torch."""
    wanted = [part for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part]
    try:
        import torch
    except ModuleNotFoundError:
        return
    if not torch.cuda.is_available():
        if wanted:
            yield f"CUDA does not come up, though {len(wanted)} GPUs are given"
        return
    if wanted and torch.cuda.device_count() < len(wanted):
        yield f"CUDA sees {torch.cuda.device_count()} of {len(wanted)} GPUs"
    for index in range(torch.cuda.device_count()):
        try:
            yield from _gpu(index)
        except RuntimeError as error:
            yield f"GPU {index}: {str(error).splitlines()[0]}"


def _gpu(index: int) -> Iterator[str]:
    import torch

    where = torch.device("cuda", index)
    free, _ = torch.cuda.mem_get_info(where)
    chunks = [
        torch.empty(CHUNK_BYTES, dtype=torch.uint8, device=where)
        for _ in range(max(1, int(free * GPU_MEMORY_PART) // CHUNK_BYTES))
    ]
    for pattern in PATTERNS:
        for chunk in chunks:
            chunk.fill_(pattern)
        bad = sum(int((chunk != pattern).sum()) for chunk in chunks)
        if bad:
            yield f"GPU {index}: {bad} bytes of its memory do not keep the pattern {pattern:#04x}"
    chunks.clear()
    source = torch.Generator(device=where).manual_seed(0)
    left = torch.randn(SIZE, SIZE, device=where, generator=source)
    right = torch.randn(SIZE, SIZE, device=where, generator=source)
    first = left @ right
    differ = sum(not torch.equal(first, left @ right) for _ in range(PRODUCTS))
    if differ or not bool(torch.isfinite(first).all()):
        yield f"GPU {index}: {differ} of {PRODUCTS} products of the same matrices differ"


if __name__ == "__main__":
    sys.exit(main())
