"""Data-parallel training that changes its world size in place, and plain process groups for those who do without.

    trainer = Elastic(model, optimizer, plan=Plan(size, batch=96, epochs=20), state={"seen": torch.zeros(size)})
    for batch in trainer.batches():
        loss = criterion(model(x[batch.indices]), y[batch.indices])
        sums = trainer.step(loss, seen=one_hot(batch.indices))
        trainer.state["seen"] += sums["seen"]

One step is one all-reduce: gradients weighted by samples, the caller's sums, two flags, and what tells the noise of the
gradients (`noise`, which is reported), in one flat buffer. If it fails because a peer died, nothing was applied: `step`
returns zeros, the survivors meet again (`rendezvous`), take the most advanced member's state, and the same batch is
dealt anew among them. Replicas that come back are let in at the next step boundary. Everything that decides which
sample comes next is part of the replicated state, so no sample is lost or used twice. With `max_batch` a step may take
several batches of the plan as one where the noise says that this pays (`batch_size`), at a learning rate that rises
with it. Where the role is not restarted in place, the world is the fixed one of `RANK` and `WORLD_SIZE`.
"""

from __future__ import annotations

import io
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch._dynamo  # every optimizer imports it at its first step, which takes seconds: better in a warm interpreter
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from jobsched.contract import ReplicaEnv
from jobsched.train.batch_size import BatchSize, Rule
from jobsched.train.checkpoint import Checkpointer
from jobsched.train.context import context
from jobsched.train.data import Indices, Plan
from jobsched.train.noise import Noise
from jobsched.train.rendezvous import Health, Identity, Rendezvous, Round, all_loopback

SETUP_S = 10.0
"""Longest time that the members of a closed round may take to connect before they meet again."""


def device() -> torch.device:
    """The GPU of this process, made its current one, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(chosen)
    return chosen


def init(timeout_s: float = 300.0) -> tuple[int, int]:
    """Join the fixed process group that `RANK`, `WORLD_SIZE` and `MASTER_*` describe; returns (rank, world size).

    nccl with GPUs of their own, else gloo. A single process needs no group and gets (0, 1).
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not dist.is_initialized():
        device()
        _prefer_loopback([os.environ["MASTER_ADDR"] + ":0"])
        dist.init_process_group(_backend(), timeout=timedelta(seconds=timeout_s))
    return rank, world


def anyone(flag: bool) -> bool:
    """Whether `flag` is set on any rank of the process group; every rank must ask at the same point."""
    if not dist.is_initialized():
        return flag
    told = torch.tensor([float(flag)], device=device())
    dist.all_reduce(told)
    return bool(told > 0)


def _backend() -> str:
    """nccl refuses two ranks on one device, so replicas that have a share of a GPU talk through gloo."""
    return "nccl" if torch.cuda.is_available() and not context.env.gpu_shared else "gloo"


def _prefer_loopback(addresses: list[str]) -> None:
    """gloo resolves the host's own name otherwise, which may be slow, wrong or unreachable."""
    if all_loopback(addresses):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """This rank's part of one batch. `indices` may be empty; `count` is the size of the whole batch, which is so many
    `batches` of the plan."""

    position: int
    epoch: int
    last: bool
    """Whether the epoch ends with it."""
    indices: Indices
    count: int
    batches: int = 1


class Elastic:
    """Trains `model` in step with however many peers there are right now.

    `state` holds whatever else must be the same everywhere (tensors, numbers): change it only between `step` and the
    next batch, only from what `step` returned. `world_sizes` lists (position, world size) at each change.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, plan: Plan,
                 state: dict[str, Any] | None = None, checkpoint_every_s: float | None = None, checkpoint_dir: str = "",
                 max_batch: int = 0, lr_rule: Rule = "adascale",
                 timeout_s: float = 60.0, lost_after_s: float = 10.0, start_wait_s: float = 20.0) -> None:
        """`max_batch`: most samples of one step; 0: always those of a batch of the plan. The plan's epochs stay as they
        are, so a larger batch means fewer steps, each `lr_rule` times as far: adascale by the noise, the root of the
        batch, or in proportion to it. `timeout_s`: longest time of one collective before the members meet again. With
        `checkpoint_dir` (default: the job's), rank 0 saves every `checkpoint_every_s` (default: the job's interval,
        else 10), and training goes on from the newest whole checkpoint."""
        self.model = model
        self.optimizer = optimizer
        self.plan = plan
        self.state = state or {}
        self.position = 0
        self.rank, self.world = 0, 1
        self.noise = Noise()
        self.batch_size = BatchSize(max_batch // plan.batch, lr_rule)
        self._stepped_s = 0.0
        self.world_sizes: list[tuple[int, int]] = []
        self._timeout_s = timeout_s
        self._checkpoint_every_s = checkpoint_every_s or context.checkpoint_every_s(otherwise=10.0)
        self._saved_at_s = time.monotonic()
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._round: Round | None = None
        self._synced = 0
        self._broken = False
        self._regroup = False
        self._batch: Batch | None = None
        self._store: TCPStore | None = None
        directory = checkpoint_dir or context.checkpoint_dir
        self._checkpoints = Checkpointer(directory, name="elastic", shared=True) if directory else None
        self._resumed = self._resume()
        env = context.env
        self._rendezvous = _rendezvous_of(env, lost_after_s, start_wait_s) if env.in_place else None

    def batches(self) -> Iterator[Batch]:
        """This rank's parts of all batches that are left; forms and re-forms the group in between."""
        try:
            if self._rendezvous is None:
                self.rank, self.world = init(self._timeout_s)
                self._sync(source=0)
                self._became(self.world)
            else:
                self._form()
            while True:
                if self._broken or self._regroup:
                    self._form()
                elif self.position < self.plan.total:
                    self._batch = self._deal()
                    yield self._batch
                    self._save_if_due()
                elif self._all_finished():
                    return
        finally:
            self._leave_group()
            if self._rendezvous:
                self._rendezvous.close()

    def _deal(self) -> Batch:
        epoch, number = divmod(self.position, self.plan.per_epoch)
        batches = min(self.batch_size.multiple, self.plan.per_epoch - number)
        count = sum(len(self.plan.indices(self.position + i)) for i in range(batches))
        return Batch(self.position, epoch, number + batches == self.plan.per_epoch,
                     self.plan.share(self.position, self.rank, self.world, batches), count, batches)

    def step(self, loss: torch.Tensor, **sums: torch.Tensor) -> dict[str, torch.Tensor]:
        """Backward, one all-reduce, one optimizer step. `loss` is the mean over this rank's part of the batch.

        Returns each of `sums` added up over all ranks, and `loss`, the mean over the whole batch. If the step broke off
        because a peer is gone, all of them are zeros, nothing was applied, and the batch comes again.
        """
        batch = self._batch
        assert batch is not None, "step belongs into the body of `for batch in trainer.batches()`"
        self.optimizer.zero_grad(set_to_none=True)
        share = len(batch.indices) / batch.count
        if share:
            (loss * share).backward()  # type: ignore[no-untyped-call]  # torch has no types here
        extra = {**sums, "loss": loss.detach() * share if share else torch.zeros(())}
        flags = [float(self._rendezvous is not None and self._rendezvous.someone_waits),
                 float(self._checkpoints is not None and context.should_checkpoint())]
        where = self._parameters[0].device
        pieces = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self._parameters]
        flat = torch.cat([t.reshape(-1).to(where, torch.float32)
                          for t in (*pieces, *extra.values(), torch.tensor([*flags, *self._proposal(), 0.0]))])
        size = sum(piece.numel() for piece in pieces)
        if share:  # the loss was scaled, and the gradient with it
            flat[-1] = flat[:size].dot(flat[:size]) / share
        pushed_s = time.monotonic()
        if not self._reduced(flat):
            return {name: torch.zeros_like(value) for name, value in extra.items()}
        synced_s = time.monotonic()
        if batch.count == batch.batches * self.plan.batch:  # before the optimizer may touch the gradients
            self.noise.note(flat[:size].dot(flat[:size]), flat[-1].clone(), min(self.world, batch.count), batch.batches)
        at = 0
        for parameter in self._parameters:
            parameter.grad = flat[at:at + parameter.numel()].view_as(parameter).to(parameter.dtype)
            at += parameter.numel()
        self._optimize(batch)
        self.position += batch.batches
        reduced = {}
        for name, value in extra.items():
            reduced[name] = flat[at:at + value.numel()].view_as(value).to(value.device, value.dtype)
            at += value.numel()
        context.report(step=self.position, total=self.plan.total, loss=reduced["loss"], batch=self.plan.batch)
        if noise := self.noise.metrics():
            context.report(grad_sqr=noise["grad_sqr"], grad_var=noise["grad_var"])
        self._regroup = bool(flat[at] > 0)
        if flat[at + 1] > 0:
            self._saved_at_s = float("-inf")
        if self.batch_size.most > 1:
            self._tell_pace(batch, pushed_s, synced_s)
            self.batch_size.became(round(float(flat[at + 2])), float(flat[at + 3]))
        return reduced

    def _proposal(self) -> tuple[float, float]:
        """How many batches shall make the next step, and the factor of the learning rate: rank 0 decides, and as the
        others add nothing, the sum is what all go by."""
        if self.rank or self.batch_size.most == 1:
            return 0.0, 0.0
        noise = self.noise.metrics()
        if not noise:
            return float(self.batch_size.multiple), self.batch_size.factor
        return self.batch_size.choose(float(noise["grad_sqr"]), float(noise["grad_var"]))

    def _optimize(self, batch: Batch) -> None:
        """One step, at the learning rate that the batch deserves; the last of an epoch may be smaller than decided."""
        factor = self.batch_size.factor * min(1.0, batch.batches / self.batch_size.multiple)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] * max(1.0, factor)
        self.optimizer.step()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _tell_pace(self, batch: Batch, pushed_s: float, synced_s: float) -> None:
        """Learn and report what this step took, all of it since the last one."""
        now_s, sync_s = time.monotonic(), synced_s - pushed_s
        if self._stepped_s and batch.count == self.batch_size.multiple * self.plan.batch:
            step_s = now_s - self._stepped_s
            self.batch_size.note(step_s, min(sync_s, step_s))
            context.report(step_s=step_s, sync_s=min(sync_s, step_s), local_batch=batch.count / self.world,
                           batch_initial=self.plan.batch, batch_max=self.batch_size.most * self.plan.batch)
        self._stepped_s = now_s

    def _reduced(self, flat: torch.Tensor) -> bool:
        """All-reduce in place; False if a peer is gone (and then the group is broken)."""
        if self.world == 1:
            return True
        try:
            dist.all_reduce(flat)
            if flat.is_cuda:
                torch.cuda.synchronize()  # a failure must show before anything is applied
        except RuntimeError:
            if self._rendezvous is None:
                raise
            self._broken = True
            return False
        return True

    def _all_finished(self) -> bool:
        """Whether every member has come to the end. If a peer is gone the others meet once more, as one of them may be
        behind and need the state; whoever then finds nobody is finished."""
        if not self._reduced(torch.zeros(1, device=self._parameters[0].device)):
            return False
        self._save(final=True)
        return True

    def _form(self) -> None:
        """Meet the others, connect, and take over the most advanced state. Repeats until that has worked out."""
        rendezvous = self._rendezvous
        assert rendezvous is not None
        while True:
            self._leave_group()
            finished = self.position >= self.plan.total
            step = self.position if self._synced or self._resumed else -1
            closed = rendezvous.form(step, self._synced, self._open_store, finished=finished, alone=self._look_again)
            self._round = closed
            if closed is None:
                self.rank, self.world, self._broken, self._regroup = 0, 1, False, False
                return
            try:
                self._connect(closed)
                if not closed.in_step:
                    self._sync(closed.source)
            except (RuntimeError, OSError):
                continue  # somebody died while we connected: meet again
            self._synced = closed.number
            self._broken = self._regroup = False
            self._became(len(closed.members))
            return

    def _connect(self, closed: Round) -> None:
        assert self._rendezvous is not None
        self.rank, self.world = closed.rank_of(self._rendezvous.me.index), len(closed.members)
        if self.world == 1:
            return
        host, _, port = closed.store.rpartition(":")
        store = self._store if self.rank == 0 and self._store else _store(host, int(port))
        self._await_members(store, closed)
        dist.init_process_group(_backend(), store=PrefixStore(f"round-{closed.number}", store), rank=self.rank,
                                world_size=self.world, timeout=timedelta(seconds=self._timeout_s))
        if _backend() == "nccl":
            threading.Thread(target=self._watch, args=(closed,), name="jobsched-watch", daemon=True).start()

    def _await_members(self, store: Store, closed: Round) -> None:
        """Go on once all members have reached the store; RuntimeError at once if one of them has died meanwhile."""
        assert self._rendezvous is not None
        store.set(f"here-{self.rank}", "")
        keys = [f"here-{rank}" for rank in range(self.world)]
        began = asked = time.monotonic()
        while not store.check(keys):
            if time.monotonic() - asked > 0.2:
                asked = time.monotonic()
                health = self._rendezvous.survey()
                if asked - began > SETUP_S or any(health.get(m.index) is Health.GONE for m in closed.members):
                    raise RuntimeError("a member is gone before the group was connected")
            time.sleep(0.002)

    def _open_store(self) -> str:
        """Serve a new store on a free port of this host; called on the leader as it closes a round."""
        assert self._rendezvous is not None
        me = self._rendezvous.me
        host = me.addresses[me.index].rpartition(":")[0]
        self._store = _store(host, 0)
        return f"{host}:{self._store.port}"

    def _leave_group(self) -> None:
        if dist.is_initialized():
            if self._broken and _backend() == "nccl":
                dist.distributed_c10d._abort_process_group()  # an orderly end would wait for the peer that is gone
            else:
                dist.destroy_process_group()
        self._store = None

    def _watch(self, closed: Round) -> None:
        """nccl does not notice by itself that a peer's process has ended: abort the collective that waits for it."""
        rendezvous = self._rendezvous
        assert rendezvous is not None
        others = {m.index for m in closed.members} - {rendezvous.me.index}
        while self._round is closed and not self._broken:
            health = rendezvous.survey()
            if any(health[i] is Health.GONE for i in others):
                dist.distributed_c10d._abort_process_group()
                return
            time.sleep(0.2)

    def _became(self, world: int) -> None:
        self.world_sizes.append((self.position, world))
        self.batch_size.regrouped()
        self._stepped_s = 0.0
        if self._checkpoints and self.rank == 0:
            self._checkpoints.take_over()
        context.report(step=self.position, total=self.plan.total, world=world, message="")

    def _payload(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "state": self.state,
                "position": self.position, "batches": self.batch_size.multiple, "factor": self.batch_size.factor}

    def _take(self, payload: dict[str, Any]) -> None:
        self.model.load_state_dict(payload["model"])
        self.optimizer.load_state_dict(payload["optimizer"])
        self.state = payload["state"]
        self.position = payload["position"]
        self.batch_size.became(payload.get("batches", 1), payload.get("factor", 1.0))

    def _sync(self, source: int) -> None:
        """Everybody takes the state of rank `source`. Raises RuntimeError if a peer is gone."""
        if self.world == 1:
            return
        where = self._parameters[0].device
        data = torch.empty(0, dtype=torch.uint8)
        if self.rank == source:
            buffer = io.BytesIO()
            torch.save(self._payload(), buffer)
            data = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
        size = torch.tensor([data.numel()], device=where)
        dist.broadcast(size, source)
        data = data.to(where) if self.rank == source else torch.empty(int(size), dtype=torch.uint8, device=where)
        dist.broadcast(data, source)
        if self.rank != source:
            self._take(torch.load(io.BytesIO(data.cpu().numpy().tobytes()), map_location=where, weights_only=True))

    def _resume(self) -> bool:
        """Go on from the newest whole checkpoint, if there is one that is further than we are."""
        found = self._checkpoints.load(map_location=self._parameters[0].device) if self._checkpoints else None
        if found is None or found[1] < self.position:
            return False
        self._take(found[0])
        return True

    def _look_again(self) -> bool:
        """No peer is there: did the group finish, and leave its final checkpoint, before we came?"""
        saved = self._checkpoints.list() if self._checkpoints else []
        if saved and saved[0].step >= self.plan.total:
            self._resumed = self._resume() or self._resumed
        return self.position >= self.plan.total

    def _save_if_due(self) -> None:
        if not self._broken and time.monotonic() - self._saved_at_s >= self._checkpoint_every_s:
            self._save()

    def _save(self, final: bool = False) -> None:
        """Rank 0 writes the state of everybody; others acknowledge a request once they know that it is written."""
        asked = self._saved_at_s == float("-inf")
        self._saved_at_s = time.monotonic()
        if self._checkpoints is None:
            return
        path = str(self._checkpoints.directory)
        if self.rank == 0:
            path = str(self._checkpoints.save(self._payload(), self.position))
            context.checkpoint_saved(path, self.position)
        if asked and not final and self._reduced(torch.zeros(1, device=self._parameters[0].device)) and self.rank:
            context.checkpoint_saved(path, self.position)


def _store(host: str, port: int) -> TCPStore:
    """A client of the store at this port, or, with port 0, a new store on a free port."""
    return TCPStore(host, port, is_master=port == 0, wait_for_workers=False, timeout=timedelta(seconds=SETUP_S))


def _rendezvous_of(env: ReplicaEnv, lost_after_s: float, start_wait_s: float) -> Rendezvous:
    addresses = env.peers[env.role]
    _prefer_loopback([a for a in addresses if a])
    me = Identity(env.index, env.restart, env.attempt, env.peer_token, addresses)
    return Rendezvous(me, min_members=env.min_replicas, wanted=env.role_world_size, lost_after_s=lost_after_s,
                      start_wait_s=start_wait_s, say=lambda text: context.report(message=text))
