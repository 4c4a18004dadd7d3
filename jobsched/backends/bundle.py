"""A job's directory as a tar archive, for engines that do not share the server's files.

What `.jobschedignore` (else `.gitignore`) at its top names is left out, and so is `.git`. Links that leave the
directory are followed, so that the copy is whole. Used by adapters; never writes to the directory.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pathspec

ALWAYS_OUT = (".git/", "__pycache__/", "*.pyc")


class BundleError(Exception):
    """The directory cannot be packed; the text is for people."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose files they shall be."""

    uid: int
    gid: int


def pack(directory: Path, out: IO[bytes], limit: int, owner: Owner, prefix: str = "") -> None:
    """Write a tar of `directory` (each name below `prefix`) to `out`. BundleError when there is no such directory, or
    more than `limit` bytes of files in it."""
    if not directory.is_dir():
        raise BundleError(f"working directory {directory} does not exist")
    left = limit
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path, name in members(directory):
            info = _described(tar, path, os.path.join(prefix, name) if name else prefix or ".", directory, owner)
            if info is None:
                continue
            left -= info.size
            if left < 0:
                raise BundleError(
                    f"working directory {directory} holds more than {limit / 2**20:g} MiB; name what the job does not"
                    f" need in {directory}/.jobschedignore, or raise the limit of the backend"
                )
            _add(tar, info, path)


def folder(name: str, owner: Owner, mode: int = 0o700) -> tarfile.TarInfo:
    """An entry for an empty directory."""
    info = tarfile.TarInfo(name.strip("/"))
    info.type, info.mode, info.uid, info.gid = tarfile.DIRTYPE, mode, owner.uid, owner.gid
    return info


def folders(names: dict[str, int], owner: Owner) -> bytes:
    """A tar of empty directories: name -> mode."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, mode in names.items():
            tar.addfile(folder(name, owner, mode))
    return out.getvalue()


def members(directory: Path) -> Iterator[tuple[Path, str]]:
    """(path, name relative to `directory`), the directory itself first under the name ''. In a definite order."""
    ignored = _ignored(directory)
    yield directory, ""
    todo, entered = [directory], {directory.resolve()}
    while todo:
        here = todo.pop()
        with os.scandir(here) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
            name = os.path.relpath(entry.path, directory)
            inside = entry.is_dir(follow_symlinks=False)
            if entry.is_symlink() and entry.is_dir() and _leaves(Path(entry.path), directory):
                target = Path(entry.path).resolve()
                if inside := not any(target in (place, *place.parents) for place in entered):  # else without an end
                    entered.add(target)
            if not ignored.match_file(name + "/" if inside else name):
                yield Path(entry.path), name
                if inside:
                    todo.append(Path(entry.path))


def _ignored(directory: Path) -> pathspec.GitIgnoreSpec:
    for name in (".jobschedignore", ".gitignore"):
        try:
            lines = (directory / name).read_text(errors="replace").splitlines()
        except OSError:
            continue
        return pathspec.GitIgnoreSpec.from_lines([*ALWAYS_OUT, *lines])
    return pathspec.GitIgnoreSpec.from_lines(ALWAYS_OUT)


def _leaves(link: Path, directory: Path) -> bool:
    return not link.resolve().is_relative_to(directory.resolve())


def _described(
    tar: tarfile.TarFile, path: Path, name: str, directory: Path, owner: Owner
) -> tarfile.TarInfo | None:
    """The entry of one file; None for sockets, devices, and what has gone meanwhile."""
    try:
        outside = path.is_symlink() and _leaves(path, directory)
        info = tar.gettarinfo(path.resolve() if outside else path, arcname=name.strip("/"))
    except OSError:
        return None
    if info is None or not (info.isreg() or info.isdir() or info.issym() or info.islnk()):
        return None
    if info.islnk():  # a second name of a file in the archive: written out again, so that either may be left out
        info.type, info.linkname, info.size = tarfile.REGTYPE, "", path.stat().st_size
    info.uid, info.gid, info.uname, info.gname = owner.uid, owner.gid, "", ""
    return info


def _add(tar: tarfile.TarFile, info: tarfile.TarInfo, path: Path) -> None:
    if not info.isreg():
        tar.addfile(info)
        return
    try:
        with open(path, "rb") as file:
            tar.addfile(info, file)
    except PermissionError as error:
        raise BundleError(f"{path} may not be read by the server: {error.strerror}") from error
    except OSError as error:
        raise BundleError(f"{path} changed while it was packed: {error}") from error
