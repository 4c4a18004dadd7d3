"""Rendezvous of an elastic role without any central service: every replica listens at its own stable address.

Used by `ddp`. One round = one agreed, ordered list of members. The lowest index whose process is alive leads: it
collects joins, closes the round once every live replica has joined it, and answers all of them at once. A replica that
comes back knocks at a running group, which meets again at its next step boundary; it knows the others' addresses from
its contract, and they learn its own from its calls.

A member of the last round counts as dead only if its listener refuses connections (the process is gone) or stays
silent for `lost_after_s`; and with silent ones about, a majority of the last round is needed, so that a cut network
cannot make two groups. Messages are one line of JSON each way; each names attempt, restart and token, and a stale
replica is turned away. Standard library only; never imports torch, never pickles.
"""

from __future__ import annotations

import hmac
import json
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

CONNECT_S = 1.0
POLL_S = 0.05
JOIN_WAIT_S = 1.0


class Stale(RuntimeError):
    """A newer attempt or restart of this very replica exists; this process should end."""


class Health(StrEnum):
    ALIVE = "alive"
    """Its listener answered."""
    GONE = "gone"
    """Its address refuses connections: the process has ended."""
    SILENT = "silent"
    """No answer in time: stopped, overloaded, or cut off."""


@dataclass(frozen=True, slots=True)
class Member:
    """One replica as it joins: `round` is the last round it was in (0: none), `group` who else was in that, `synced`
    the last round in which it held the group's state, `step` its committed step (-1: no state)."""

    index: int
    restart: int
    round: int = 0
    synced: int = 0
    step: int = -1
    group: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Round:
    """The agreed result: `members` sorted by index, so that a rank is a place in it; `store` is where rank 0 serves."""

    number: int
    members: tuple[Member, ...]
    store: str

    def rank_of(self, index: int) -> int:
        return [m.index for m in self.members].index(index)

    @property
    def source(self) -> int:
        """Rank of the member with the most advanced state: last in the newest round, then most steps, then lowest."""
        return max(range(len(self.members)), key=lambda r: (*_progress(self.members[r]), -r))

    @property
    def in_step(self) -> bool:
        """Whether all members hold the same state already, so that nothing needs to be sent."""
        return len({_progress(m) for m in self.members}) == 1 and self.members[0].synced > 0


def _progress(member: Member) -> tuple[int, int]:
    return member.synced, member.step


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this replica is for its peers. `addresses` are "host:port" per index of its role, empty where unknown."""

    index: int
    restart: int
    attempt: int
    token: str
    addresses: tuple[str, ...]


@dataclass(slots=True)
class _Desk:
    """What the listener knows, under one condition variable."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    forming: bool = False
    joined: dict[int, Member] = field(default_factory=dict)
    last: Round | None = None
    waiting: bool = False
    restarts: dict[int, int] = field(default_factory=dict)
    """Highest restart seen per index; lower ones are stale."""
    addresses: dict[int, str] = field(default_factory=dict)
    """Where each index listens: from the contract, and newer from the replica itself when it calls."""


class Rendezvous:
    """This replica's listener and the protocol of `form`. Close it when training is over: peers then see it gone."""

    def __init__(self, me: Identity, *, min_members: int = 1, wanted: int = 1, lost_after_s: float = 10.0,
                 start_wait_s: float = 20.0, say: Callable[[str], None] = lambda _: None) -> None:
        """`wanted` members are waited for, at most `start_wait_s`, before the very first round; `say` is told what is
        being waited for. Raises OSError if the own address cannot be bound within `lost_after_s`."""
        self.me = me
        self.min_members = min_members
        self.wanted = wanted
        self.lost_after_s = lost_after_s
        self.start_wait_s = start_wait_s
        self._say = say
        self._desk = _Desk(addresses=dict(enumerate(me.addresses)))
        self._listener = _listen(me.addresses[me.index], self._answer, lost_after_s)
        self._pool = ThreadPoolExecutor(max_workers=8, thread_name_prefix="jobsched-probe")
        self._silent_since: dict[int, float] = {}

    @property
    def someone_waits(self) -> bool:
        """Whether a replica outside the running group has knocked."""
        return self._desk.waiting

    def close(self) -> None:
        self._listener.shutdown()
        self._listener.server_close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def form(self, step: int, synced: int, open_store: Callable[[], str], *, finished: bool = False,
             alone: Callable[[], bool] = lambda: False) -> Round | None:
        """Meet the others and return the new round; blocks until there is one.

        `step`: committed step, -1 without state; `synced`: last round in which this replica held the group's state.
        `open_store` is called on the leader and returns the store's address.
        `finished`: nothing is left to train, so no minimum holds and None comes back if nobody else is alive; `alone`
        is asked now and then while no peer is there and makes None come back too. Raises `Stale`.
        """
        began = time.monotonic()
        desk = self._desk
        member = Member(self.me.index, self.me.restart, synced=synced, step=step)
        if desk.last:
            member = replace(member, round=desk.last.number, group=tuple(m.index for m in desk.last.members))
        with desk.changed:
            desk.forming, desk.waiting = True, False
            desk.joined = {i: m for i, m in desk.joined.items() if i != member.index} | {member.index: member}
        try:
            while True:
                health = self.survey()
                alive = sorted(i for i, h in health.items() if h is Health.ALIVE)
                if not alive and (finished or alone()):
                    return None
                if alive and alive[0] < self.me.index:
                    closed = self._join(alive[0], member)
                else:
                    closed = self._lead(member, health, open_store, began, finished)
                if closed is not None:
                    with desk.changed:  # who joined too late for this round waits for the next
                        desk.joined = {i: m for i, m in desk.joined.items() if m not in closed.members}
                        desk.last, desk.forming, desk.waiting = closed, False, bool(desk.joined)
                        desk.changed.notify_all()
                    self._silent_since.clear()
                    self._say("")
                    return closed
        finally:
            desk.forming = False

    def survey(self) -> dict[int, Health]:
        """Health of every other index of the role; all are asked at the same time. Raises `Stale`."""
        with self._desk.changed:
            others = [i for i, address in self._desk.addresses.items() if address and i != self.me.index]
        return dict(zip(others, self._pool.map(self._probe, others), strict=True))

    def _probe(self, index: int) -> Health:
        health, _ = self._ask(index, {"op": "ping"}, CONNECT_S)
        return health

    def _ask(self, index: int, request: Mapping[str, object], timeout_s: float) -> tuple[Health, dict[str, Any]]:
        host, _, port = self._desk.addresses[index].rpartition(":")
        hello = {"attempt": self.me.attempt, "token": self.me.token, "index": self.me.index,
                 "restart": self.me.restart, "address": self.me.addresses[self.me.index], "to": index}
        try:
            with socket.create_connection((host, int(port)), timeout=min(CONNECT_S, timeout_s)) as sock:
                sock.settimeout(timeout_s)
                sock.sendall(json.dumps({**hello, **request}).encode() + b"\n")
                line = sock.makefile("rb").readline()
            answer = json.loads(line) if line else {}
        except ConnectionRefusedError:
            return Health.GONE, {}
        except (OSError, ValueError):
            return Health.SILENT, {}
        if answer.get("refused") == "stale":
            raise Stale(f"a newer start of replica {self.me.index} exists")
        if "ok" in answer:
            with self._desk.changed:
                self._desk.restarts[index] = max(int(answer["restart"]), self._desk.restarts.get(index, 0))
        # Whoever listens there without knowing us is no peer: the port belongs to somebody else by now.
        return (Health.ALIVE if "ok" in answer else Health.GONE if answer else Health.SILENT), answer

    def _join(self, leader: int, member: Member) -> Round | None:
        self._say(f"waits for replica {leader} to open the next round")
        _, answer = self._ask(leader, {"op": "join", "member": asdict(member)}, JOIN_WAIT_S + CONNECT_S)
        closed = answer.get("round")
        if not closed:
            if not answer:
                time.sleep(POLL_S)
            return None
        return Round(closed["number"], tuple(_member(m) for m in closed["members"]), closed["store"])

    def _lead(self, me: Member, health: Mapping[int, Health], open_store: Callable[[], str], began: float,
              finished: bool) -> Round | None:
        """Close the round if everybody who should be in it has joined, else wait a moment."""
        desk = self._desk
        alive = {i for i, h in health.items() if h is Health.ALIVE}
        for index in alive:  # a group that runs must hear that somebody waits
            if index not in desk.joined:
                self._pool.submit(self._ask, index, {"op": "knock", "member": asdict(me)}, CONNECT_S)
        with desk.changed:
            joined = {i: m for i, m in desk.joined.items()
                      if i == me.index or (i in alive and m.restart >= desk.restarts.get(i, 0))}
            missing = self._missing(joined, alive, health, began, finished)
            if missing:
                desk.changed.wait(POLL_S)
        if missing:
            self._say(missing)
            return None
        store = open_store()
        members = tuple(joined[i] for i in sorted(joined))
        return Round(max(m.round for m in members) + 1, members, store)

    def _missing(self, joined: Mapping[int, Member], alive: set[int], health: Mapping[int, Health], began: float,
                 finished: bool) -> str:
        """What still keeps the round open, in words; empty if nothing does."""
        now = time.monotonic()
        if late := sorted(alive - joined.keys()):
            return f"waits for replicas {late} to join"
        newest = max(joined.values(), key=lambda m: m.round)
        silent = [i for i in newest.group if health.get(i) is Health.SILENT]
        self._silent_since = {i: self._silent_since.get(i, now) for i in silent}
        if young := [i for i in silent if now - self._silent_since[i] < self.lost_after_s]:
            return f"replicas {young} do not answer; waits up to {self.lost_after_s:g} s for them"
        survivors = [m for m in joined.values() if m.round == newest.round]
        if len(survivors) <= len(silent):
            return f"replicas {silent} do not answer and this side is no majority; waits for them"
        if not finished and len(joined) < self.min_members:
            return f"{len(joined)} of at least {self.min_members} replicas are here"
        fresh = all(m.round == 0 for m in joined.values())
        if not finished and fresh and len(joined) < self.wanted and now - began < self.start_wait_s:
            return f"{len(joined)} of {self.wanted} replicas are here; starts without the rest soon"
        return ""

    def _answer(self, request: Mapping[str, Any]) -> dict[str, object]:
        """The listener's side: one reply per request."""
        if not hmac.compare_digest(str(request.get("token", "")), self.me.token):
            return {"refused": "token"}
        index, restart, attempt = int(request["index"]), int(request["restart"]), int(request["attempt"])
        if request.get("to") != self.me.index:
            return {"refused": "address"}
        desk = self._desk
        with desk.changed:
            if attempt != self.me.attempt:
                return {"refused": "stale" if attempt < self.me.attempt else "attempt"}
            if restart < desk.restarts.get(index, 0):
                return {"refused": "stale"}
            desk.restarts[index] = restart
            desk.addresses[index] = str(request["address"])  # it may have moved, or have been placed after us
            match request.get("op"):
                case "join":
                    return self._take_join(_member(request["member"]))
                case "knock" if not _includes(desk.last, _member(request["member"])):
                    desk.waiting = desk.waiting or not desk.forming
        return {"ok": True, "restart": self.me.restart}

    def _take_join(self, member: Member) -> dict[str, object]:
        """Note the join and hold the caller until the round closes or the wait is over (under the lock)."""
        desk = self._desk
        if not _includes(desk.last, member):  # else it is late, and was let in already
            desk.joined[member.index] = member
            desk.waiting = desk.waiting or not desk.forming
            desk.changed.notify_all()
            desk.changed.wait_for(lambda: _includes(desk.last, member), JOIN_WAIT_S)
        answer: dict[str, object] = {"ok": True, "restart": self.me.restart}
        return answer | ({"round": asdict(desk.last)} if desk.last and _includes(desk.last, member) else {})


def _member(data: Mapping[str, Any]) -> Member:
    return Member(**{**data, "group": tuple(data["group"])})


def _includes(closed: Round | None, member: Member) -> bool:
    """Whether this round is the answer to that join."""
    return closed is not None and closed.number > member.round and member in closed.members


class _Listener(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128


def _listen(address: str, answer: Callable[[Mapping[str, Any]], dict[str, object]], patience_s: float) -> _Listener:
    """Serve on our own address; a predecessor that is just ending may hold it a moment longer."""

    class Handler(socketserver.StreamRequestHandler):
        timeout = 5

        def handle(self) -> None:
            try:
                self.wfile.write(json.dumps(answer(json.loads(self.rfile.readline(65_536)))).encode() + b"\n")
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                pass  # not one of ours, or gone

    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + patience_s
    while True:
        try:
            server = _Listener((bind_host(host), int(port)), Handler)
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_S)
    threading.Thread(target=server.serve_forever, args=(0.05,), name="jobsched-rendezvous", daemon=True).start()
    return server


def bind_host(host: str) -> str:
    """The address to bind for a peer-visible host: an IP itself, every interface for a name."""
    try:
        socket.inet_pton(socket.AF_INET, host)
    except OSError:
        return "127.0.0.1" if host == "localhost" else ""
    return host


def all_loopback(addresses: Sequence[str]) -> bool:
    return all(a.rpartition(":")[0] in ("127.0.0.1", "localhost") for a in addresses)
