"""Log files of replicas: one per launch key, appended to by the replica itself, limited in size, with true offsets.

The head of a long log is cut by punching a hole (the file keeps its length, the blocks are freed), so writers never
notice and an offset means the same byte for ever. Where the file system cannot do that, the file is emptied and the
number of bytes cut is kept beside it (`.cut`). Used by the keeper (writing side) and by `LocalBackend.logs`.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

BLOCK = 4096
TAIL_BYTES = 4096
TAIL_LINES = 20
CHUNK = 64 << 10
_KEEP_SIZE_AND_PUNCH_HOLE = 0x01 | 0x02
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)


def open_for_append(path: Path) -> int:
    """A descriptor for a replica's stdout and stderr; the caller closes it."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def append(path: Path, text: str) -> None:
    """A note of the supervisor's own, on lines of its own."""
    fd = open_for_append(path)
    try:
        os.write(fd, text.encode(errors="replace"))
    finally:
        os.close(fd)


def cut(path: Path, keep: int, done: int) -> int:
    """Free all but about the newest `keep` bytes; `done` is what the last call returned (0 at first). Returns the
    offset up to which the head is gone now. Cheap when there is nothing to do."""
    try:
        size = os.stat(path).st_size
    except FileNotFoundError:
        return done
    end = (size - keep) // BLOCK * BLOCK
    if end <= done or size < keep + keep // 8:  # an eighth of slack, so that a chatty log is not cut at every look
        return done
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        if not punch(fd, end):
            _side_file(path).write_text(str(_emptied(path) + size))
            os.ftruncate(fd, 0)
            return 0
    finally:
        os.close(fd)
    return end


def punch(fd: int, end: int) -> bool:
    """Free the blocks before `end`; False where the file system cannot."""
    return bool(_libc.fallocate(fd, _KEEP_SIZE_AND_PUNCH_HOLE, 0, end) == 0)


def size(path: Path) -> int:
    """True length of the log so far, what was cut included; 0 when there is none."""
    try:
        return os.stat(path).st_size + _emptied(path)
    except FileNotFoundError:
        return 0


def read(path: Path, offset: int, limit: int = CHUNK) -> tuple[int, bytes]:
    """Up to `limit` bytes from `offset`, or from the first whole line that still exists after it, and where they begin.
    Empty at the end. FileNotFoundError when there is no log."""
    base = _emptied(path)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        inside = max(offset - base, 0)
        skipped = offset < base
        try:
            begin = os.lseek(fd, inside, os.SEEK_DATA)
        except OSError:  # nothing but a hole, or the end
            return base + max(inside, os.fstat(fd).st_size), b""
        skipped |= begin > inside
        data = os.pread(fd, limit, begin)
    finally:
        os.close(fd)
    if skipped and begin > 0 and (newline := data.find(b"\n")) >= 0:  # the cut went through a line
        begin, data = begin + newline + 1, data[newline + 1:]
    return base + begin, data


def tail(path: Path, lines: int = TAIL_LINES) -> tuple[str, ...]:
    """The last lines, at most 4 KiB of them; empty when there is no log."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return ()
    try:
        length = os.fstat(fd).st_size
        begin = max(length - TAIL_BYTES, 0)
        data = os.pread(fd, TAIL_BYTES, begin)
    finally:
        os.close(fd)
    found = data.lstrip(b"\0").decode(errors="replace").splitlines()
    whole = found[1:] if begin > 0 and len(found) > 1 else found
    return tuple(whole[-lines:])


def _side_file(path: Path) -> Path:
    return path.with_suffix(".cut")


def _emptied(path: Path) -> int:
    try:
        return int(_side_file(path).read_text())
    except (FileNotFoundError, ValueError):
        return 0
