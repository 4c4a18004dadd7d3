"""CPU and memory limits of a replica: cgroup v2, else cgroup v1, else rlimits. Used by the keeper.

Which of them works is found by trying, once, at start. A replica enters its groups before its command runs: a cold one
by a tiny shell that moves itself and then becomes the command, a warm one by writing its own membership.

The rlimit fallback bounds RLIMIT_DATA (heap and anonymous memory) and not RLIMIT_AS, which counts address space: CUDA
and torch map far more than they use and would fail to start.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

PERIOD_US = 100_000
ENTER = 'n=$1; shift; while [ "$n" -gt 0 ]; do echo 0 > "$1" || exit 126; shift; n=$((n-1)); done; exec "$@"'
"""`/bin/sh -c ENTER sh N FILE… COMMAND…`: 0 names the writer itself."""


@dataclass(frozen=True, slots=True)
class Confinement:
    """Where one replica is confined. `enter`: files to write `0` to, from within."""

    directories: tuple[Path, ...] = ()
    enter: tuple[str, ...] = ()

    def wrap(self, argv: Sequence[str]) -> list[str]:
        return ["/bin/sh", "-c", ENTER, "sh", str(len(self.enter)), *self.enter, *argv] if self.enter else list(argv)


NOT_CONFINED = Confinement()


class Limiter(Protocol):
    """One way to hold replicas to what they asked for."""

    name: str

    def confine(self, name: str, cpu_milli: int, memory_bytes: int) -> Confinement:
        """Prepare limits (0: none) for a replica called `name`. OSError if the kernel refuses."""
        ...

    def existing(self, name: str) -> Confinement:
        """What an earlier supervisor prepared for this name and did not release."""
        ...

    def started(self, pid: int, memory_bytes: int) -> None:
        """The replica's command is about to run or has just begun."""
        ...

    def ran_out(self, confinement: Confinement) -> bool:
        """Whether the kernel killed a process of the replica for want of memory."""
        ...

    def release(self, confinement: Confinement) -> bool:
        """Remove the groups; False while processes are still leaving them: try again."""
        ...

    def close(self) -> None:
        """Remove what all replicas had in common, unless some still run."""
        ...


class Unlimited:
    """No limits at all."""

    name = "none"

    def confine(self, name: str, cpu_milli: int, memory_bytes: int) -> Confinement:
        return NOT_CONFINED

    def existing(self, name: str) -> Confinement:
        return NOT_CONFINED

    def started(self, pid: int, memory_bytes: int) -> None: ...

    def ran_out(self, confinement: Confinement) -> bool:
        return False

    def release(self, confinement: Confinement) -> bool:
        return True

    def close(self) -> None: ...


class Rlimits(Unlimited):
    """Memory only, per process and not per replica; what works without any rights."""

    name = "rlimit"

    def started(self, pid: int, memory_bytes: int) -> None:
        if memory_bytes:
            try:
                resource.prlimit(pid, resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
            except (ProcessLookupError, PermissionError, ValueError):
                pass  # gone already, or the limit is above the hard one


class Cgroup1:
    """The memory and cpu hierarchies of cgroup v1, below the supervisor's own groups."""

    name = "cgroup v1"

    def __init__(self, memory: Path, cpu: Path, folder: str) -> None:
        self._memory, self._cpu = memory / folder, cpu / folder
        for base in (self._memory, self._cpu):
            base.mkdir(exist_ok=True)

    def confine(self, name: str, cpu_milli: int, memory_bytes: int) -> Confinement:
        made = []
        if 0 < cpu_milli < (os.cpu_count() or 1) * 1_000:  # a limit above the machine holds anyway
            made.append(_group(self._cpu / name, {
                "cpu.cfs_period_us": PERIOD_US, "cpu.cfs_quota_us": max(cpu_milli * PERIOD_US // 1_000, 1_000),
            }))
        if memory_bytes:
            made.append(_group(self._memory / name, {"memory.limit_in_bytes": memory_bytes}))
        return Confinement(tuple(made), tuple(str(path / "tasks") for path in made))

    def existing(self, name: str) -> Confinement:
        return Confinement(tuple(base / name for base in (self._cpu, self._memory) if (base / name).exists()))

    def close(self) -> None:
        _removed((self._cpu, self._memory))

    def started(self, pid: int, memory_bytes: int) -> None: ...

    def ran_out(self, confinement: Confinement) -> bool:
        return any(_counter(path / "memory.oom_control", "oom_kill") > 0 for path in confinement.directories)

    def release(self, confinement: Confinement) -> bool:
        return _removed(confinement.directories)


class Cgroup2:
    """One group per replica below the supervisor's own."""

    name = "cgroup v2"

    def __init__(self, root: Path, folder: str) -> None:
        (root / "cgroup.subtree_control").write_text("+memory +cpu")
        self._base = root / folder
        self._base.mkdir(exist_ok=True)
        (self._base / "cgroup.subtree_control").write_text("+memory +cpu")

    def confine(self, name: str, cpu_milli: int, memory_bytes: int) -> Confinement:
        values: dict[str, int | str] = {}
        if 0 < cpu_milli < (os.cpu_count() or 1) * 1_000:
            values["cpu.max"] = f"{max(cpu_milli * PERIOD_US // 1_000, 1_000)} {PERIOD_US}"
        if memory_bytes:
            values["memory.max"] = memory_bytes
        if not values:
            return NOT_CONFINED
        path = _group(self._base / name, values)
        return Confinement((path,), (str(path / "cgroup.procs"),))

    def existing(self, name: str) -> Confinement:
        return Confinement((self._base / name,)) if (self._base / name).exists() else NOT_CONFINED

    def close(self) -> None:
        _removed((self._base,))

    def started(self, pid: int, memory_bytes: int) -> None: ...

    def ran_out(self, confinement: Confinement) -> bool:
        return any(_counter(path / "memory.events", "oom_kill") > 0 for path in confinement.directories)

    def release(self, confinement: Confinement) -> bool:
        return _removed(confinement.directories)


def find_limiter(
    wanted: str, folder: str, mounts: str = "/proc/self/mounts", own: str = "/proc/self/cgroup"
) -> Limiter:
    """The strongest way that works here. `wanted`: `auto`, `cgroup`, `rlimit` or `none`; `folder` names our group."""
    if wanted == "none":
        return Unlimited()
    if wanted != "rlimit":
        groups = _own_groups(Path(own))
        roots = _hierarchies(Path(mounts))
        for make in (_find_v2, _find_v1):
            for ours in (groups, {}):  # in a container our own path may not be visible: then the mounted root is ours
                try:
                    return make(roots, ours, folder)
                except (OSError, KeyError):
                    continue
    return Rlimits()


def _find_v2(roots: dict[str, Path], groups: dict[str, str], folder: str) -> Limiter:
    root = roots[""] / groups.get("", "").lstrip("/")
    if not {"memory", "cpu"} <= set((root / "cgroup.controllers").read_text().split()):
        raise FileNotFoundError("memory and cpu are not offered here")
    return Cgroup2(root, folder)


def _find_v1(roots: dict[str, Path], groups: dict[str, str], folder: str) -> Limiter:
    memory, cpu = (roots[name] / groups.get(name, "").lstrip("/") for name in ("memory", "cpu"))
    limiter = Cgroup1(memory, cpu, folder)
    probe = limiter.confine("probe", 1, 1 << 30)
    limiter.release(probe)
    return limiter


def _hierarchies(mounts: Path) -> dict[str, Path]:
    """Controller -> mount point; "" is the unified (v2) hierarchy."""
    found: dict[str, Path] = {}
    for line in mounts.read_text().splitlines():
        _, place, kind, options, *_ = line.split()
        if kind == "cgroup2":
            found.setdefault("", Path(place))
        elif kind == "cgroup":
            for option in options.split(","):
                found.setdefault(option, Path(place))
    return found


def _own_groups(own: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in own.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        found |= dict.fromkeys(controllers.split(","), path)
    return found


def _group(path: Path, values: dict[str, int | str] | dict[str, int]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (path / name).write_text(str(value))
    return path


def _counter(path: Path, name: str) -> int:
    try:
        for line in path.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    except OSError:
        pass
    return 0


def _removed(paths: Sequence[Path]) -> bool:
    """Remove all that can be removed; whether that was all."""
    for path in paths:
        try:
            path.rmdir()
        except OSError:
            pass  # busy, or removed at an earlier try
    return not any(path.exists() for path in paths)


def machine_oom_kills() -> int:
    """How many processes the kernel has killed for want of memory since boot, anywhere on the machine."""
    return _counter(Path("/proc/vmstat"), "oom_kill")
