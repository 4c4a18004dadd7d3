"""A sharded, asynchronous parameter server: workers push gradients and pull parameters over pyzmq.

    ps role:      ParameterServer(model, lambda p: torch.optim.SGD(p, lr=0.1), plan=plan).serve()
    worker role:  client = ParameterClient(model, plan=plan)
                  for lease in client.leases():
                      loss(model, lease.indices).backward()
                      client.step(lease)

Every side builds the same model (same seed) and derives the same layout from its shapes alone, so nothing is negotiated
and a server that is started anew finds its shard again. Parameters only: buffers (batch-norm statistics) stay local.

A worker sends each request until it is answered; the server knows its last sequence number and applies a push once.
Workers come and go: a new start of a worker (higher restart number) replaces the old one and frees its leases. A server
that was killed goes on from its last checkpoint, with pushes since then lost for its shard; the ledger of data leases
is journalled beside it and loses nothing. The server never ends by itself, except on SIGTERM: it answers until the
workers have said goodbye, so that all servers have applied the same pushes, saves, and returns.

The number of servers may differ from attempt to attempt. Each value then comes from the newest checkpoint that holds
it, whichever shard of however many that was, with its part of the optimizer's state (`shards`).

Messages are JSON and raw float32, never pickle.
"""

from __future__ import annotations

import copy
import hmac
import json
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch._dynamo  # every optimizer imports it at its first step, which takes seconds: better in a warm interpreter
import zmq
from torch import nn

from jobsched.train.checkpoint import Checkpointer, Fenced
from jobsched.train.context import context
from jobsched.train.data import Indices, Lease, Ledger, Plan
from jobsched.train.rendezvous import bind_host
from jobsched.train.shards import Flat, digest_of, forget_others, gather, layout_of, recover, scatter, shard_name

PARTING_S = 1.0
"""Longest time that a server which is told to end waits for workers to finish their step."""
ENDED = 128 + signal.SIGTERM
"""Exit code of a worker that was told to end."""
WINDOW = 32
"""Steps of which a worker tells the pace."""
RETRY_S = (0.5, 1.0, 2.0)
"""Waits before a request is sent again; the last one repeats."""

OptimizerOf = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(slots=True)
class _Worker:
    """What a server remembers of a worker: its start, the last push applied and how that went, its clock in pushes."""

    restart: int
    sequence: int = 0
    applied: bool = True
    clock: int = 0
    heard_s: float = 0.0
    here: bool = True
    parked: list[bytes] = field(default_factory=list)
    """Envelope of the reply that waits for slower workers: [identity, header]."""


class ParameterServer:
    """One server: owns one shard of the parameters and the optimizer for it; server 0 also keeps the data ledger."""

    def __init__(self, model: nn.Module, optimizer: OptimizerOf, *, plan: Plan | None = None,
                 max_staleness: int | None = None, checkpoint_every_s: float | None = None,
                 worker_timeout_s: float = 10.0, directory: str | Path = "") -> None:
        """`optimizer` gets one flat parameter, so it must work element by element (SGD, Adam, …). `max_staleness`:
        a worker that is more than that many pushes ahead of the slowest live one waits; None: never. It saves every
        `checkpoint_every_s` (default: the job's interval, else 5). `directory` defaults to the job's checkpoint
        directory. Restores the newest whole checkpoint of this shard."""
        env = context.env
        addresses = env.peers["ps"]
        self.index = env.index
        self.address = addresses[self.index]
        self._token = env.peer_token
        parameters = list(model.parameters())
        self._sizes = [p.numel() for p in parameters]
        self._servers = len(addresses)
        layout = layout_of(self._sizes, self._servers)
        self._digest = digest_of(layout)
        self._parameter = nn.Parameter(torch.from_numpy(gather(parameters, layout[self.index])))
        self._parameter.grad = torch.zeros_like(self._parameter)
        self._values: Flat = self._parameter.detach().numpy()
        self._gradient: Flat = self._parameter.grad.numpy()
        self._optimizer = optimizer([self._parameter])
        self._max_staleness = max_staleness
        self._checkpoint_every_s = checkpoint_every_s or context.checkpoint_every_s(otherwise=5.0)
        self._worker_timeout_s = worker_timeout_s
        self._workers: dict[str, _Worker] = {}
        self._saver: threading.Thread | None = None
        self._save_error: BaseException | None = None
        self._tidied = False
        self.updates = 0
        self._checkpoints = Checkpointer(directory, name=shard_name(self.index, self._servers))
        self._ledger = None
        if plan and self.index == 0:
            journal = self._checkpoints.directory / "ps-leases.jsonl"
            self._ledger = Ledger(plan, journal, lease_s=worker_timeout_s)
        self._restore()

    def serve(self) -> None:
        """Answer workers until SIGTERM, then save and return. Raises `Fenced` if a newer start took over."""
        host, _, port = self.address.rpartition(":")
        socket: Any = zmq.Context.instance().socket(zmq.ROUTER)
        socket.setsockopt(zmq.LINGER, 500)
        _bind(socket, f"tcp://{bind_host(host) or '*'}:{port}")
        self._checkpoints.note("address", self.address)  # for workers placed before this server moved here
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        saved_at, saved_updates = time.monotonic(), self.updates
        try:
            while not context.should_stop():
                self._report()
                if poller.poll(200):
                    self._drain(socket)
                self._unpark(socket)
                if self._save_error:
                    raise self._save_error
                wanted = context.should_checkpoint()
                if wanted:
                    self._save_now()
                elif self.updates > saved_updates and time.monotonic() - saved_at >= self._checkpoint_every_s:
                    saved_at, saved_updates = time.monotonic(), self.updates
                    self._save_aside()
            self._part(socket, poller)
            self._save_now()
        finally:
            socket.close()

    def _part(self, socket: Any, poller: zmq.Poller) -> None:
        """The attempt ends: answer workers until they have said goodbye, but no longer than `PARTING_S`."""
        until_s = time.monotonic() + PARTING_S
        while self._live() and (left_s := until_s - time.monotonic()) > 0:
            if poller.poll(max(1, int(1_000 * left_s))):
                self._drain(socket)
            self._unpark(socket)

    def _drain(self, socket: Any) -> None:
        """Answer everything that is there, but come back to look at signals now and then."""
        for _ in range(256):
            try:
                identity, head, *frames = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                request = json.loads(head)
                answer, payload = self._answer(request, frames, identity)
            except (ValueError, KeyError, TypeError, IndexError) as error:
                answer, payload = {"error": f"not understood: {error!r}"}, None
            if answer is not None:
                reply = [identity, json.dumps(answer).encode()]
                socket.send_multipart(reply if payload is None else [*reply, payload])

    def _answer(self, request: Mapping[str, Any], frames: Sequence[bytes],
                identity: bytes) -> tuple[dict[str, object] | None, Flat | None]:
        """The reply (header, parameters); header None: the reply is parked."""
        if not hmac.compare_digest(str(request["token"]), self._token):
            return {"error": "refused: another job"}, None
        if request["layout"] != self._digest:
            return {"error": "refused: this model or number of servers differs from the server's"}, None
        name, restart = str(request["worker"]), int(request["restart"])
        worker = self._workers.get(name)
        if worker is None or restart > worker.restart:
            if self._ledger:
                self._ledger.release(name)
            others = [w.clock for w in self._live() if w is not worker]
            worker = self._workers[name] = _Worker(restart, clock=min(others, default=0))
        elif restart < worker.restart:
            return {"error": "stale: a newer start of this worker exists"}, None
        worker.heard_s, worker.here = time.monotonic(), True
        if self._ledger:
            self._ledger.renew(name, worker.heard_s)
        answer: dict[str, object] = {"n": request["n"]}
        match request["op"]:
            case "pull":
                return answer, self._values
            case "lease":
                return answer | self._lease(name), None
            case "bye":
                worker.here = False
                if self._ledger:
                    self._ledger.release(name)
                return answer, None
            case "step":
                if int(request["n"]) > worker.sequence:  # else: sent again after its answer was lost
                    worker.sequence = int(request["n"])
                    worker.applied = self._apply(name, request, frames)
                    worker.clock += 1
                answer |= {"applied": worker.applied, "workers": len(self._live())}
                if self._too_far_ahead(worker):
                    worker.parked = [identity, json.dumps(answer).encode()]
                    return None, None
                return answer, self._values
        raise ValueError(f"unknown request {request['op']!r}")

    def _apply(self, name: str, request: Mapping[str, Any], frames: Sequence[bytes]) -> bool:
        """One optimizer step with the pushed gradient, and the batch counted as used, both or neither."""
        position = request.get("done")
        if self._ledger and position is not None and not self._ledger.holds(name, int(position)):
            return False
        self._gradient[:] = np.frombuffer(frames[0], np.float32)
        self._optimizer.step()
        self.updates += 1
        if self._ledger and position is not None:
            self._ledger.finish(int(position), np.frombuffer(frames[1], np.int64))
        return True

    def _lease(self, name: str) -> dict[str, object]:
        ledger = self._ledger
        if ledger is None:
            raise ValueError("this server keeps no data ledger")
        return {"lease": ledger.lease(name, time.monotonic()), "finished": ledger.finished,
                "done": len(ledger.done), "epochs": ledger.complete_epochs, "exact": ledger.exact_epochs}

    def _live(self) -> list[_Worker]:
        now = time.monotonic()
        return [w for w in self._workers.values() if w.here and now - w.heard_s < self._worker_timeout_s]

    def _too_far_ahead(self, worker: _Worker) -> bool:
        return self._max_staleness is not None and \
            worker.clock - min((w.clock for w in self._live()), default=worker.clock) > self._max_staleness

    def _unpark(self, socket: Any) -> None:
        """Answer those who waited for slower workers that have caught up, left or fallen silent."""
        for worker in self._workers.values():
            if worker.parked and not self._too_far_ahead(worker):
                socket.send_multipart([*worker.parked, self._values])
                worker.parked = []

    def _report(self) -> None:
        context.report(updates=self.updates, workers=len(self._live()))
        if self._ledger:
            context.report(epochs=self._ledger.complete_epochs, epochs_exact=self._ledger.exact_epochs)

    def _snapshot(self) -> dict[str, Any]:
        workers = {name: [w.restart, w.sequence, int(w.applied), w.clock] for name, w in self._workers.items()}
        return {"parameter": self._parameter.detach().clone(), "optimizer": copy.deepcopy(self._optimizer.state_dict()),
                "updates": self.updates, "workers": workers, "layout": self._digest}

    def _save_aside(self) -> None:
        """Save in a thread, so that serving goes on; a save that is still under way is enough."""
        if self._saver is None or not self._saver.is_alive():
            snapshot = self._snapshot()
            self._saver = threading.Thread(target=self._save, args=(snapshot,), name="jobsched-save")
            self._saver.start()

    def _save_now(self) -> None:
        if self._saver:
            self._saver.join()
        self._write(self._snapshot())

    def _write(self, snapshot: dict[str, Any]) -> None:
        context.checkpoint_saved(self._checkpoints.save(snapshot, snapshot["updates"]), snapshot["updates"])
        if self.index == 0 and not self._tidied:
            self._tidied = forget_others(self._checkpoints.directory, self._servers, context.attempt)

    def _save(self, snapshot: dict[str, Any]) -> None:
        try:
            self._write(snapshot)
        except Fenced as error:
            self._save_error = error  # the serving thread ends over it
        except OSError as error:
            context.report(message=f"checkpoint not written: {error}")

    def _restore(self) -> None:
        """Go on from the newest checkpoints, of however many servers they are."""
        found = recover(self._checkpoints.directory, self._sizes, self.index, self._servers)
        if found is None:
            return
        with torch.no_grad():
            self._parameter[found.known] = found.values[found.known]
        self._optimizer.load_state_dict(found.optimizer)
        self.updates = found.updates
        now = time.monotonic()
        for state in found.states:
            if state["attempt"] == context.attempt:  # else all workers have started anew, and count from 0
                self._workers |= {name: _Worker(restart, sequence, bool(applied), clock, now)
                                  for name, (restart, sequence, applied, clock) in state["workers"].items()}
        if lost := int((~found.known).sum()):  # a server died before it ever saved, or they do not share the directory
            text = f"{lost:,} of {len(found.known):,} values begin anew: not in {self._checkpoints.directory}"
            sys.stderr.write(text + "\n")
            context.report(message=text)


def _bind(socket: Any, address: str) -> None:
    """Bind; a predecessor that is just ending may hold the address a moment longer."""
    for _ in range(100):
        try:
            socket.bind(address)
            return
        except zmq.ZMQError as error:
            if error.errno != zmq.EADDRINUSE:
                raise
            time.sleep(0.1)
    socket.bind(address)


class ServerLost(RuntimeError):
    """A parameter server did not come back within the worker's patience."""


class ParameterClient:
    """A worker's side. Construction pulls the current parameters into the model."""

    def __init__(self, model: nn.Module, *, plan: Plan | None = None, patience_s: float = 300.0) -> None:
        """`plan`: the same as the server's, for `leases`. A server that is away is waited for at most `patience_s`."""
        env = context.env
        self._addresses = list(env.peers["ps"])
        self._parameters = list(model.parameters())
        self._layout = layout_of([p.numel() for p in self._parameters], len(self._addresses))
        self._head = {"token": env.peer_token, "layout": digest_of(self._layout), "worker": f"{env.role}-{env.index}",
                      "restart": env.attempt * 1_000_000 + env.restart}
        self._plan = plan
        self._patience_s = patience_s
        self._directory = Path(env.checkpoint_dir) if env.checkpoint_dir else None
        self._sequence = 0
        self._sockets: dict[int, Any] = {}
        self._workers = 0
        self._stepped_s, self._served_s = 0.0, 0.0
        """When the last step ended, and the time since then that requests took."""
        self._paces: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        """(seconds of a step, seconds of it with the servers) of late."""
        self.done = 0
        """Batches done by all workers together, as of the last lease."""
        self.epochs = 0
        self.epochs_exact = 0
        context.report(asynchronous=1)
        self.pull()

    def pull(self) -> None:
        """Fetch the newest parameters into the model."""
        self._receive(self._exchange("pull", dict.fromkeys(range(len(self._addresses)), ())))

    def step(self, lease: Lease | None = None, used: Indices | None = None) -> bool:
        """Push the gradients, pull the newest parameters, clear the gradients.

        `lease`: the batch they come from is done; `used`: what was really loaded for it (default: what was leased).
        False if the lease had passed to another worker: then nothing was counted.
        """
        gradients = [p.grad for p in self._parameters]
        frames: dict[int, tuple[Any, ...]] = {s: (gather(gradients, shard),) for s, shard in enumerate(self._layout)}
        extra: dict[str, object] = {}
        if lease is not None:
            extra["done"] = lease.position
            frames[0] += (np.ascontiguousarray(lease.indices if used is None else used, np.int64),)
        replies = self._exchange("step", frames, extra)
        self._receive(replies)
        self._tell_pace(int(replies[0][0]["workers"]))
        for parameter in self._parameters:
            parameter.grad = None
        return bool(replies[0][0]["applied"])

    def _tell_pace(self, workers: int) -> None:
        """What numbers of workers and servers are chosen by, with so many workers. The median, as waits for a server
        that was away are not what a step takes."""
        now_s = time.monotonic()
        if workers != self._workers:
            self._workers, self._stepped_s = workers, 0.0
            self._paces.clear()
        if self._stepped_s:
            self._paces.append((now_s - self._stepped_s, self._served_s))
        self._stepped_s, self._served_s = now_s, 0.0
        if len(self._paces) >= WINDOW // 4:
            step_s, sync_s = (median(column) for column in zip(*self._paces, strict=True))
            context.report(world=workers, step_s=step_s, sync_s=sync_s)

    def leases(self) -> Iterator[Lease]:
        """Batches to work on, until all epochs are done by all workers together. Told to end (SIGTERM), this
        worker says goodbye once the step in hand is done, and raises SystemExit."""
        assert self._plan is not None, "leases need a plan"
        while True:
            if context.should_stop():
                self.close()
                raise SystemExit(ENDED)
            answer, _ = self._exchange("lease", {0: ()})[0]
            self.done, self.epochs, self.epochs_exact = answer["done"], answer["epochs"], answer["exact"]
            if answer["finished"]:
                return
            if (position := answer["lease"]) is None:
                time.sleep(0.05)  # the rest is in other hands, and comes back if they fail
                continue
            yield Lease(position, position // self._plan.per_epoch, self._plan.indices(position))

    def close(self) -> None:
        """Say goodbye, so that nobody waits for this worker; a server that is away is not waited for."""
        try:
            self._exchange("bye", dict.fromkeys(range(len(self._addresses)), ()), patience_s=1.0)
        except ServerLost:
            pass
        for socket in self._sockets.values():
            socket.close(linger=0)
        self._sockets.clear()

    def _receive(self, replies: Mapping[int, tuple[dict[str, Any], list[bytes]]]) -> None:
        for server, (_, frames) in replies.items():
            scatter(np.frombuffer(bytearray(frames[0]), np.float32), self._parameters, self._layout[server])

    def _exchange(self, op: str, frames: Mapping[int, tuple[Any, ...]], extra: Mapping[str, object] | None = None,
                  patience_s: float | None = None) -> dict[int, tuple[dict[str, Any], list[bytes]]]:
        """Send one request to each of these servers and wait for all answers, sending again as long as it takes."""
        self._sequence += 1
        head = json.dumps({**self._head, "op": op, "n": self._sequence, **(extra or {})}).encode()
        patience = self._patience_s if patience_s is None else patience_s
        replies: dict[int, tuple[dict[str, Any], list[bytes]]] = {}
        began = time.monotonic()
        for wait_s in _waits(patience):
            missing = [s for s in frames if s not in replies]
            for server in missing:
                self._socket(server).send_multipart([head, *frames[server]])
            deadline = time.monotonic() + wait_s
            while missing and (left := deadline - time.monotonic()) > 0:
                self._collect(missing, left, replies)
                missing = [s for s in frames if s not in replies]
            if not missing:
                self._served_s += time.monotonic() - began
                if time.monotonic() - began > RETRY_S[0]:
                    context.report(message="")
                return {s: replies[s] for s in frames}
            if context.should_stop():
                raise SystemExit(ENDED)  # the servers are told the same
            away = ", ".join(f"ps {s} at {self._addresses[s]}" for s in missing)
            context.report(message=f"waits for {away} ({time.monotonic() - began:.0f} s)")
            for server in missing:  # a fresh connection: what the old one holds may never arrive, or arrive late
                self._sockets.pop(server).close(linger=0)
                self._look_up(server)
        raise ServerLost(f"{away} did not answer for {patience:g} s")

    def _look_up(self, server: int) -> None:
        """The server may have been started anew elsewhere; it notes its address beside its checkpoints."""
        if self._directory:
            try:
                note = self._directory / f"{shard_name(server, len(self._addresses))}.address"
                self._addresses[server] = note.read_text()
            except OSError:
                pass  # it has not noted one yet

    def _collect(self, servers: Sequence[int], timeout_s: float,
                 replies: dict[int, tuple[dict[str, Any], list[bytes]]]) -> None:
        poller = zmq.Poller()
        for server in servers:
            poller.register(self._sockets[server], zmq.POLLIN)
        ready = dict(poller.poll(max(1, int(timeout_s * 1_000))))
        for server in servers:
            if self._sockets[server] in ready:
                head, *frames = self._sockets[server].recv_multipart()
                answer = json.loads(head)
                if "error" in answer:
                    raise RuntimeError(f"ps {server}: {answer['error']}")
                if answer["n"] == self._sequence:
                    replies[server] = (answer, frames)

    def _socket(self, server: int) -> Any:
        if server not in self._sockets:
            socket: Any = zmq.Context.instance().socket(zmq.DEALER)
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.RECONNECT_IVL, 50)
            socket.connect(f"tcp://{self._addresses[server]}")
            self._sockets[server] = socket
        return self._sockets[server]


def _waits(patience_s: float) -> Iterator[float]:
    """Growing waits that add up to the patience."""
    left, number = patience_s, 0
    while left > 0:
        wait = min(RETRY_S[min(number, len(RETRY_S) - 1)], left)
        yield wait
        left, number = left - wait, number + 1
