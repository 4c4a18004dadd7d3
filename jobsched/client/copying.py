"""Files and directories to and from a replica, as a tar through the pipe of a command there: what `kubectl cp` does.

Used by `jobsched cp` and the SDK. What comes is unpacked as from a stranger: nothing outside of the destination, no
devices, no owners.
"""

from __future__ import annotations

import posixpath
import tarfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobsched.client.channel import Channel, opened
from jobsched.client.remote import Remote
from jobsched.errors import Conflict, JobschedError, NotFound, UsageError

PACKS = 'cd "$1" || exit 2; h=; [ ! -L "$2" ] || h=h; exec tar -c${h}f - "./$2"'
"""Only the path itself is followed where it is a link: a link to a file stands for the file."""
IS_DIRECTORY = '[ -d "$1" ]'
MAX_SAID = 64 << 10
NO_TAR = "there is no tar where the replica runs; 'jobsched exec -i JOB -- sh -c \"cat > FILE\"' copies single files"


@dataclass(frozen=True, slots=True)
class Side:
    """A path in a replica: `path` is the URL of its job, `order` names the replica (`role`, `index`)."""

    remote: Remote
    path: str
    order: Mapping[str, Any]
    name: str
    """Of the replica, for people."""

    def run(self, *command: str, stdin: bool = False) -> Any:
        return opened(self.remote, self.path, {"do": "exec", "command": command, "stdin": stdin, **self.order})


@dataclass(slots=True)
class Copied:
    """What was copied, and what was left out because it is not safe or not a file."""

    files: int = 0
    bytes: int = 0
    skipped: tuple[str, ...] = ()


class _Received:
    """stdout of a command as a file to be read; its stderr is kept."""

    def __init__(self, channel: Channel) -> None:
        self._channel, self._held, self.said = channel, b"", b""

    def read(self, size: int) -> bytes:
        while len(self._held) < size and (piece := self._channel.receive()) is not None:
            if piece[0] == "err":
                self.said = (self.said + piece[1])[-MAX_SAID:]
            else:
                self._held += piece[1]
        data, self._held = self._held[:size], self._held[size:]
        return data

    def drain(self) -> None:
        while self.read(1 << 16):
            pass


def download(side: Side, source: str, target: Path) -> Copied:
    """`source` in the replica to `target` here: into it if it is a directory, else under that name. Raises `NotFound`
    where there is no such path."""
    place = posixpath.normpath(source)
    folder, base = posixpath.dirname(place) or ".", posixpath.basename(place) or "."
    into = target / base if target.is_dir() and base not in (".", "..") else target
    if not into.parent.is_dir():
        raise NotFound(f"there is no directory {into.parent} here")
    copied, skipped = Copied(), list[str]()
    with side.run("/bin/sh", "-c", PACKS, "sh", folder, base) as channel:
        received = _Received(channel)
        try:
            with tarfile.open(fileobj=received, mode="r|") as archive:  # type: ignore[call-overload]  # it only reads
                for member in archive:
                    try:
                        _unpack(archive, member, base, into, copied)
                    except tarfile.FilterError as exc:
                        skipped.append(str(exc))
        except tarfile.ReadError as exc:
            received.drain()
            _refuse(side, source, received.said, channel.code)
            raise JobschedError(f"what came is no archive: {exc}") from exc
        received.drain()
        if not copied.files and not into.exists():
            _refuse(side, source, received.said, channel.code)
    copied.skipped = (*skipped, *received.said.decode(errors="replace").splitlines())
    return copied


def _unpack(archive: tarfile.TarFile, member: tarfile.TarInfo, base: str, into: Path, copied: Copied) -> None:
    """One member: the top becomes `into`, and what is below it stays below. FilterError for what would not."""
    rest = _below(member.name, base)
    if not rest and member.isdir():
        into.mkdir(exist_ok=True)
        return
    root, name = (into, rest) if rest else (into.parent, into.name)
    link = _below(member.linkname, base) if member.islnk() else member.linkname
    safe = tarfile.data_filter(member.replace(name=name, linkname=link, deep=False), str(root))
    archive.extract(safe, root, filter="fully_trusted")
    if safe.isfile():
        copied.files, copied.bytes = copied.files + 1, copied.bytes + safe.size


def upload(source: Path, side: Side, target: str) -> Copied:
    """`source` here to `target` in the replica: into it if it is a directory there, else under that name."""
    if not source.exists():
        raise NotFound(f"there is no {source} here")
    place = posixpath.normpath(target)
    if _succeeds(side, "/bin/sh", "-c", IS_DIRECTORY, "sh", target):
        folder, name = place, source.resolve().name
    elif target.endswith("/"):
        raise NotFound(f"there is no directory {target} in {side.name}")
    else:
        folder, name = posixpath.dirname(place) or ".", posixpath.basename(place)
    copied, wrong = Copied(), list[Exception]()

    def told(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if not (member.isfile() or member.isdir() or member.issym() or member.islnk()):
            copied.skipped = (*copied.skipped, f"{member.name}: not a file")
            return None
        copied.files += member.isfile()
        copied.bytes += member.size if member.isfile() else 0
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        return member

    with side.run("tar", "-xof", "-", "-C", folder, stdin=True) as channel:
        def send() -> None:
            try:
                with tarfile.open(fileobj=_Sent(channel.send), mode="w|") as archive:  # type: ignore[call-overload]  # and writes
                    archive.add(source, name, filter=told)
                channel.end_input()
            except (OSError, JobschedError, tarfile.TarError) as exc:
                wrong.append(exc)
                channel.hang_up()

        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        received = _Received(channel)
        try:
            received.drain()
        except JobschedError:
            thread.join()
            if wrong and isinstance(wrong[0], OSError):
                raise wrong[0] from None
            raise
        if channel.code:
            _refuse(side, target, received.said, channel.code)
        thread.join()
    return copied


@dataclass(frozen=True, slots=True)
class _Sent:
    """A file that is written to a command's stdin."""

    send: Callable[[bytes], None]

    def write(self, data: bytes) -> int:
        self.send(bytes(data))
        return len(data)


def _succeeds(side: Side, *command: str) -> bool:
    with side.run(*command) as channel:
        received = _Received(channel)
        received.drain()
    if channel.code in (126, 127):
        raise Conflict(f"no shell can be run in {side.name}", hint=NO_TAR)
    return bool(channel.code == 0)


def _below(name: str, base: str) -> str:
    """`./base/x/y` -> `x/y`, the base itself -> ``. A member that is not below the base is none that was asked for."""
    plain = posixpath.normpath(name)
    if base in (".", "..") or plain == base:
        return "" if plain in (base, ".") else plain
    if not plain.startswith(f"{base}/"):
        raise UsageError(f"the archive holds {name!r}, which was not asked for")
    return plain[len(base) + 1 :]


def _refuse(side: Side, path: str, said: bytes, code: int | None) -> None:
    """Why a copy failed, in words. Raises, unless nothing is known of a failure."""
    text = said.decode(errors="replace").strip()
    if code in (126, 127):
        raise Conflict(f"nothing can be copied from or to {side.name}: {text or 'tar: not found'}", hint=NO_TAR)
    first = text.partition("\n")[0]  # what else is wrong follows from that
    if "No such file" in first or "can't cd" in first:
        look = f"jobsched exec {side.name} -- ls -l {posixpath.dirname(path)}".rstrip()
        raise NotFound(f"there is no {path} in {side.name}", hint=look)
    if code:
        raise JobschedError(f"tar in {side.name} failed: {text or f'exit code {code}'}")
