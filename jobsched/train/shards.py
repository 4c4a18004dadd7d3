"""How a model is divided among parameter servers, and divided anew when there is another number of them.

Used by `parameter_server` alone. Everything follows from the shapes of the model and the number of servers, so nothing
is negotiated, and the name of a shard's checkpoints (`ps-1-of-3`) says which values they hold.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from jobsched.train.checkpoint import Saved, committed, read

MIN_PIECE = 1_024
"""Elements below which a tensor is not cut."""
PIECES_PER_SERVER = 8

Flat = NDArray[np.float32]


@dataclass(frozen=True, slots=True, order=True)
class Slice:
    """`length` elements of flattened tensor number `tensor`, from `start`."""

    tensor: int
    start: int
    length: int


Shard = tuple[Slice, ...]
Layout = tuple[Shard, ...]


def layout_of(sizes: Sequence[int], servers: int) -> Layout:
    """Slices per server, balanced by bytes: big tensors are cut, then the biggest piece goes to the least loaded server
    (longest processing time first, Graham 1969). Depends on `sizes` and `servers` alone. O(pieces log pieces)."""
    limit = max(MIN_PIECE, -(-sum(sizes) // (servers * PIECES_PER_SERVER)))
    pieces = [Slice(tensor, start, min(limit, size - start))
              for tensor, size in enumerate(sizes) for start in range(0, size, limit)]
    shards: list[list[Slice]] = [[] for _ in range(servers)]
    loads = [0] * servers
    for piece in sorted(pieces, key=lambda p: (-p.length, p)):
        lightest = loads.index(min(loads))
        shards[lightest].append(piece)
        loads[lightest] += piece.length
    return tuple(_merged(shard) for shard in shards)


def _merged(shard: list[Slice]) -> Shard:
    """In order, with neighbouring pieces of one tensor joined."""
    result: list[Slice] = []
    for piece in sorted(shard):
        if result and result[-1].tensor == piece.tensor and result[-1].start + result[-1].length == piece.start:
            result[-1] = Slice(piece.tensor, result[-1].start, result[-1].length + piece.length)
        else:
            result.append(piece)
    return tuple(result)


def digest_of(layout: Layout) -> str:
    """Equal on two sides whose models have the same shapes and the same number of servers."""
    text = json.dumps([[(s.tensor, s.start, s.length) for s in shard] for shard in layout])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def shard_name(index: int, servers: int) -> str:
    return f"ps-{index}-of-{servers}"


def gather(tensors: Sequence[torch.Tensor | None], shard: Shard) -> Flat:
    """One contiguous float32 array of the shard's slices; a missing tensor (no gradient) counts as zeros."""
    flat = np.zeros(sum(s.length for s in shard), np.float32)
    at = 0
    for s in shard:
        tensor = tensors[s.tensor]
        if tensor is not None:
            flat[at:at + s.length] = tensor.detach().reshape(-1)[s.start:s.start + s.length].float().cpu().numpy()
        at += s.length
    return flat


def scatter(flat: Flat, tensors: Sequence[torch.Tensor], shard: Shard) -> None:
    """Write the shard's slices back into the (contiguous) tensors."""
    values = torch.from_numpy(flat)
    at = 0
    with torch.no_grad():
        for s in shard:
            tensors[s.tensor].view(-1)[s.start:s.start + s.length].copy_(values[at:at + s.length])
            at += s.length


def overlaps(mine: Shard, theirs: Shard) -> Iterator[tuple[int, int, int]]:
    """(place in the flat array of `mine`, place in that of `theirs`, length) of what both hold. O(slices)."""
    i = j = at = there = 0
    while i < len(mine) and j < len(theirs):
        a, b = mine[i], theirs[j]
        low, high = max(a.start, b.start), min(a.start + a.length, b.start + b.length)
        if a.tensor == b.tensor and low < high:
            yield at + low - a.start, there + low - b.start, high - low
        if (a.tensor, a.start + a.length) <= (b.tensor, b.start + b.length):
            at, i = at + a.length, i + 1
        else:
            there, j = there + b.length, j + 1


# ---- from one number of servers to another ----


@dataclass(frozen=True, slots=True)
class Recovered:
    """What checkpoints hold of one shard."""

    values: torch.Tensor
    known: torch.Tensor
    """Which of the values were found."""
    optimizer: dict[str, Any]
    """For `load_state_dict` of an optimizer with one flat parameter."""
    updates: int
    states: tuple[dict[str, Any], ...]
    """The states that were used, newest first; each with the `attempt` that wrote it."""


def recover(directory: Path, sizes: Sequence[int], index: int, servers: int) -> Recovered | None:
    """Every value of a shard, and its part of the optimizer's state, from the newest checkpoint that holds it: of this
    shard, or, where there were other numbers of servers before, of several. None: there is none of this model.

    What an optimizer keeps for all values of a shard together (the number of Adam's steps) comes from the shard with
    the most updates; after an orderly end all shards agree in it."""
    shard = layout_of(sizes, servers)[index]
    length = sum(s.length for s in shard)
    known = torch.zeros(length, dtype=torch.bool)
    parts: dict[str, torch.Tensor] = {}
    used: list[dict[str, Any]] = []
    for saved, theirs, digest in _saved(directory, sizes, shard_name(index, servers)):
        spans = [(at, there, n) for at, there, n in overlaps(shard, theirs) if not known[at:at + n].all()]
        state = _state(saved, digest) if spans else None
        if state is None:
            continue
        for at, there, n in spans:
            fresh = ~known[at:at + n]
            for name, tensor in (("", state["parameter"]), *_kept(state, per_value=True)):
                whole = parts.setdefault(name, torch.zeros(length, dtype=tensor.dtype))
                whole[at:at + n][fresh] = tensor[there:there + n][fresh]
            known[at:at + n] = True
        used.append(state)
    if not used:
        return None
    values, most = parts.pop(""), max(used, key=lambda state: int(state["updates"]))
    kept = {**dict(_kept(most, per_value=False)), **parts}
    optimizer = {"state": {0: kept} if kept else {}, "param_groups": most["optimizer"]["param_groups"]}
    return Recovered(values, known, optimizer, int(most["updates"]), tuple(used))


def forget_others(directory: Path, servers: int, attempt: int) -> bool:
    """Once all shards have been saved in this attempt, remove what older ones saved with other numbers of servers;
    whether all have been."""
    for index in range(servers):
        if not any(saved.attempt == attempt for saved in committed(directory, shard_name(index, servers))):
            return False
    for name in _names(directory):
        if not name.endswith(f"-of-{servers}"):
            for saved in committed(directory, name):
                if saved.attempt < attempt:
                    saved.path.with_suffix(".json").unlink(missing_ok=True)
                    saved.path.unlink(missing_ok=True)
    return True


def _names(directory: Path) -> list[str]:
    """Names of all shards that were ever saved there."""
    found = (re.fullmatch(r"(ps-\d+-of-\d+)-\d+-\d+-\d+\.json", file.name) for file in directory.glob("ps-*.json"))
    return sorted({match[1] for match in found if match})


def _saved(directory: Path, sizes: Sequence[int], own: str) -> list[tuple[Saved, Shard, str]]:
    """(checkpoint, its shard, digest of its layout) of all shards: the newest attempt first, in it `own` first. Within
    an attempt no value is in two shards."""
    found: list[tuple[Saved, Shard, str]] = []
    for name in sorted(_names(directory), key=lambda name: name != own):
        index, servers = map(int, name.removeprefix("ps-").split("-of-"))
        layout = layout_of(sizes, servers)
        if index < servers:
            found += [(saved, layout[index], digest_of(layout)) for saved in committed(directory, name)]
    return sorted(found, key=lambda entry: -entry[0].attempt)


def _state(saved: Saved, digest: str) -> dict[str, Any] | None:
    """None: damaged, gone, or of another model."""
    try:
        state: dict[str, Any] = read(saved)
    except (OSError, ValueError):
        return None
    return {**state, "attempt": saved.attempt} if state["layout"] == digest else None


def _kept(state: dict[str, Any], *, per_value: bool) -> Iterator[tuple[str, Any]]:
    """What the optimizer keeps for each value, or what it keeps for all of them together."""
    shape = state["parameter"].shape
    for name, value in state["optimizer"]["state"].get(0, {}).items():
        if (isinstance(value, torch.Tensor) and value.shape == shape) is per_value:
            yield name, value
