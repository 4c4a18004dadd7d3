"""Quotas: what every queue and cohort holds, counted as replicas come and go, and what each may still take.

`Cluster` owns one `Quotas` and keeps it true through `book`. A pass works on the same accounts inside a trial. The
arithmetic is that of Kueue's hierarchical cohorts (pkg/cache/scheduler/resource_node.go): an account first uses what it
never lends; the rest of its quota lies in its parent, where its neighbours may use it and from where it borrows.
Everything is O(depth of the tree) and does not depend on the number of queues or jobs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from math import exp2, log

from jobsched.core.job import Reason, RoleShape
from jobsched.core.node import kind_matches
from jobsched.core.resources import WHOLE_GPU
from jobsched.spec.queue import CPU, GPUS, MEMORY, QueueSpec

Amounts = tuple[tuple[str, int], ...]
"""(resource, amount) of something booked: `gpus`, if any, first and their kind, in thousandths, `cpu` too, `memory` in
bytes."""
HOUR_MS = 3_600_000


def amounts_of(role: RoleShape, kind: str, gpu_milli: int) -> Amounts:
    """What one replica of a role takes when its GPUs are of `kind`."""
    return _amounts(role.cpu_milli, role.memory_bytes, kind, gpu_milli)


@lru_cache(65_536)
def _amounts(cpu_milli: int, memory_bytes: int, kind: str, gpu_milli: int) -> Amounts:
    gpus = ((GPUS, gpu_milli), *(((kind, gpu_milli),) if kind else ())) if gpu_milli else ()
    return (*gpus, (CPU, cpu_milli), (MEMORY, memory_bytes))


@dataclass(frozen=True, slots=True)
class Refused:
    """Which limit keeps a job from starting; what it needs and what is left, in the resource's unit."""

    reason: Reason
    queue: str = ""
    """The queue or cohort whose limit it is."""
    resource: str = ""
    needs: int = 0
    left: int = 0
    limit: int = 0
    until_ms: int = 0
    """When the limit ends by itself (a budget's window); 0: it does not."""


@dataclass(slots=True, eq=False)
class Account:
    """One queue or cohort. Amounts by resource; those of quotas by the names that the tree's quotas use."""

    name: str
    parent: Account | None = None
    spec: QueueSpec | None = None
    """None: only named as somebody's cohort."""
    path: tuple[Account, ...] = ()
    """Itself first, the root last."""
    members: int = 0
    """How many accounts name it as their cohort."""
    tree: tuple[Account, ...] = ()
    """Of roots: every account of the tree."""
    held: dict[str, int] = field(default_factory=dict)
    """By its jobs and those of everything in it."""
    booked: int = 0
    """How often something was booked in it: the same number, and it holds the same."""
    users: dict[str, int] = field(default_factory=dict)
    """GPUs held by each of its users, in thousandths."""
    nominal: dict[str, int] = field(default_factory=dict)
    """Its own quota and what its members lend; of roots, the keys are all that is limited in the tree."""
    kept: dict[str, int] = field(default_factory=dict)
    """The part of `nominal` that it does not lend."""
    used: dict[str, int] = field(default_factory=dict)
    """What counts against `nominal`: its own jobs, and what members use beyond what they keep."""
    counts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Of roots: resource -> limits that it counts for (`h100-80gb` for `h100`)."""
    bounded: bool = False
    """Whether any limit stands on the path."""
    spent_milli_ms: int = 0
    """GPU time held since the present budget window began, up to `spent_at_ms`."""
    spent_at_ms: int = 0
    past: dict[str, float] = field(default_factory=dict)
    """What it held on average, older times counting half per half-life, up to `past_at_ms`."""
    past_at_ms: int = 0

    @property
    def weight(self) -> int:
        return self.spec.weight if self.spec is not None else 1

    @property
    def root(self) -> Account:
        return self.path[-1]

    # ---- questions ----

    def room(self, key: str) -> int:
        """How much more of a limited resource may be taken, borrowing included; below 0 when a quota was lowered."""
        nominal, used = self.nominal.get(key, 0), self.used.get(key, 0)
        if self.parent is None:
            return nominal - used
        kept = self.kept.get(key, 0)
        above = self.parent.room(key)
        if self.spec is not None and key in self.spec.borrowing_limit:
            above = min(above, nominal - kept - max(0, used - kept) + self.spec.borrowing_limit[key])
        return max(0, kept - used) + above

    def ever(self, key: str) -> int:
        """The most of a limited resource that it could hold if nobody else held any."""
        nominal = self.nominal.get(key, 0)
        if self.parent is None:
            return nominal
        kept, above = self.kept.get(key, 0), self.parent.ever(key)
        if self.spec is not None and key in self.spec.borrowing_limit:
            above = min(above, nominal - kept + self.spec.borrowing_limit[key])
        return kept + above

    def own_room(self, key: str) -> int:
        """How much more may be taken without borrowing."""
        return self.nominal.get(key, 0) - self.used.get(key, 0)

    def borrowed(self, key: str) -> int:
        return max(0, -self.own_room(key))

    def lent(self, key: str) -> int:
        """What others use of its quota, at most: the unused lendable part, as far as its neighbours borrow."""
        if self.parent is None:
            return 0
        unused = max(0, self.nominal.get(key, 0) - max(self.used.get(key, 0), self.kept.get(key, 0)))
        spare = max(0, self.parent.nominal.get(key, 0) - self.parent.used.get(key, 0))
        return max(0, unused - spare)

    def average(self, resource: str, now_ms: int, half_life_ms: int) -> float:
        """What it held of a resource on average, what is held now included."""
        if now_ms <= self.past_at_ms:
            return self.past.get(resource, 0.0)
        now, fades = self.held.get(resource, 0), exp2(-(now_ms - self.past_at_ms) / half_life_ms)
        return self.past.get(resource, 0.0) * fades + now * (1 - fades)

    def advance(self, now_ms: int, half_life_ms: int) -> None:
        """Bring `past` up to now."""
        if now_ms > self.past_at_ms:
            known = dict.fromkeys((*self.past, *self.held))
            self.past = {resource: self.average(resource, now_ms, half_life_ms) for resource in known}
            self.past_at_ms = now_ms

    def spent(self, now_ms: int) -> int:
        """GPU time held in the present budget window, in thousandths of a GPU times milliseconds."""
        if self.spec is None or self.spec.budget is None:
            return 0
        begin = now_ms - now_ms % self.spec.budget.window
        before = self.spent_milli_ms if self.spent_at_ms >= begin else 0
        return before + self.held.get(GPUS, 0) * (now_ms - max(begin, min(now_ms, self.spent_at_ms)))


@dataclass(slots=True)
class Books:
    """What is held, as one may think it to be: `Quotas.seen_as`. Without anything: as if nothing ran."""

    accounts: dict[str, tuple[dict[str, int], dict[str, int], dict[str, int], int]] = field(default_factory=dict)
    """Account -> its `held`, `users`, `used` and `booked`."""
    arrays: dict[str, int] = field(default_factory=dict)
    undo: list[tuple[str, str, Amounts, int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class AccountNote:
    """What an account's jobs used and the jobs that live cannot tell: spent in the budget's window, and in the past."""

    name: str
    spent_milli_ms: int
    spent_at_ms: int
    past: tuple[tuple[str, float], ...]
    past_at_ms: int


class Quotas:
    """Every account by name. Not thread-safe: it belongs to its cluster."""

    def __init__(self) -> None:
        self.accounts: dict[str, Account] = {}
        self.arrays: dict[str, int] = {}
        """Active members per array."""
        self._booked: dict[str, dict[str, dict[Amounts, int]]] = {}
        """Queue -> user -> what its replicas take, and how many take as much; what accounts are made of when the tree
        changes."""
        self._undo: list[tuple[str, str, Amounts, int]] | None = None
        self.windows: tuple[int, ...] = ()
        """Lengths of the budgets' windows."""
        self.half_life_ms = 0
        """Of past use; 0: it is not kept."""
        self.entry_ms = 0
        """So long everything that starts is taken to have been held already: many short jobs at once are not free."""

    # ---- use that is over ----

    def noted(self) -> tuple[AccountNote, ...]:
        return tuple(
            AccountNote(a.name, a.spent_milli_ms, a.spent_at_ms, tuple(a.past.items()), a.past_at_ms)
            for a in self.accounts.values() if a.spent_at_ms or a.past_at_ms
        )  # fmt: skip

    def recall(self, notes: Iterable[AccountNote]) -> None:
        """Accounts that are defined go on from what was noted."""
        for note in notes:
            account = self.accounts.get(note.name)
            if account is not None:
                account.spent_milli_ms, account.spent_at_ms = note.spent_milli_ms, note.spent_at_ms
                account.past, account.past_at_ms = dict(note.past), note.past_at_ms

    # ---- the tree ----

    def define(self, spec: QueueSpec) -> None:
        """Add a queue or change it. O(queues + users)."""
        specs = {name: a.spec for name, a in self.accounts.items() if a.spec is not None}
        if specs.get(spec.name) == spec:
            return
        before = self.accounts
        self.accounts = {}
        for each in {**specs, spec.name: spec}.values():
            self._account(each.name).spec = each
        for account in list(self.accounts.values()):
            if account.spec is not None and account.spec.cohort is not None:
                parent = self._account(account.spec.cohort)
                account.parent, parent.members = parent, parent.members + 1
        self._reckon()
        for name, old in before.items():
            account = self._known(name)
            account.spent_milli_ms, account.spent_at_ms = old.spent_milli_ms, old.spent_at_ms
            account.past, account.past_at_ms = old.past, old.past_at_ms
        for queue, users in self._booked.items():
            for owner, held in users.items():
                for amounts, replicas in held.items():
                    self._add(self._known(queue), owner, amounts, replicas)

    def account(self, queue: str) -> Account:
        """The account of a queue, also of one that is not defined (jobs outlive queues)."""
        return self.accounts.get(queue) or self._known(queue)

    def _account(self, name: str) -> Account:
        if name not in self.accounts:
            self.accounts[name] = Account(name)
        return self.accounts[name]

    def _known(self, name: str) -> Account:
        account = self._account(name)
        if not account.path:
            account.path = account.tree = (account,)
        return account

    def _reckon(self) -> None:
        """Paths and quotas, members before their cohorts."""
        for account in self.accounts.values():
            path, up = [account], account.parent
            while up is not None and up not in path:  # a loop is refused where configs are read
                path.append(up)
                up = up.parent
            account.path = tuple(path)
            account.root.tree += (account,)
        for account in sorted(self.accounts.values(), key=lambda a: -len(a.path)):
            spec = account.spec
            if spec is not None:
                for key, amount in spec.quota.items():
                    account.nominal[key] = account.nominal.get(key, 0) + amount
            for key, amount in account.nominal.items():
                lends = spec.lending_limit.get(key, amount) if spec is not None else amount
                account.kept[key] = max(0, amount - lends)
                if account.parent is not None:
                    lent = account.parent.nominal
                    lent[key] = lent.get(key, 0) + amount - account.kept[key]
            if spec is not None and account.parent is not None:
                for key in spec.borrowing_limit:
                    account.parent.nominal.setdefault(key, 0)
        self.windows = tuple(
            a.spec.budget.window for a in self.accounts.values() if a.spec is not None and a.spec.budget is not None
        )
        for account in self.accounts.values():
            account.bounded = bool(account.root.nominal) or any(
                a.spec is not None and (a.spec.max_gpus is not None or a.spec.budget is not None) for a in account.path
            ) or (account.spec is not None and account.spec.max_gpus_per_user is not None)

    # ---- booking ----

    def book(self, queue: str, owner: str, amounts: Amounts, sign: int, at_ms: int = 0) -> None:
        """Count what a replica takes (+1) or gives back (-1); `at_ms` 0: inside a trial, where no time passes."""
        account = self.account(queue)
        if self._undo is not None:
            self._undo.append((queue, owner, amounts, sign))
        else:
            if self.windows:
                for each in account.path:
                    if each.spec is not None and each.spec.budget is not None:
                        each.spent_milli_ms, each.spent_at_ms = each.spent(at_ms), at_ms
            if self.half_life_ms:
                self._remember(account, amounts, sign, at_ms)
            users = self._booked.get(queue)
            if users is None:
                users = self._booked[queue] = {}
            held = users.get(owner)
            if held is None:
                held = users[owner] = {}
            replicas = held.get(amounts, 0) + sign
            if replicas:
                held[amounts] = replicas
            else:
                del held[amounts]
        self._add(account, owner, amounts, sign)

    def age(self, now_ms: int, half_life_ms: int, entry_ms: int) -> None:
        """Before a pass: past use up to now, so that what the pass books counts from now on. O(queues)."""
        self.half_life_ms, self.entry_ms = half_life_ms, entry_ms
        for account in self.accounts.values() if half_life_ms else ():
            account.advance(now_ms, half_life_ms)

    def _remember(self, account: Account, amounts: Amounts, sign: int, at_ms: int) -> None:
        """Past use, before what is held changes; what starts pays its entry."""
        entry = self.entry_ms * log(2) / self.half_life_ms if sign > 0 else 0.0
        for each in account.path:
            each.advance(at_ms, self.half_life_ms)
            for resource, amount in amounts if entry else ():
                each.past[resource] = each.past.get(resource, 0.0) + amount * entry

    def _add(self, account: Account, owner: str, amounts: Amounts, sign: int) -> None:
        path = account.path
        for each in path:
            each.booked += 1
            held = each.held
            for resource, amount in amounts:
                held[resource] = held.get(resource, 0) + sign * amount
        resource, amount = amounts[0]
        if resource == GPUS:
            account.users[owner] = account.users.get(owner, 0) + sign * amount
        root = path[-1]
        if root.nominal:
            for resource, amount in amounts:
                for key in self.limits(root, resource):
                    _use(account, key, sign * amount)

    @staticmethod
    def limits(root: Account, resource: str) -> tuple[str, ...]:
        """The limits of a tree that a resource counts for."""
        found = root.counts.get(resource)
        if found is None:
            named = (CPU, MEMORY, GPUS)
            found = root.counts[resource] = tuple(
                key for key in root.nominal
                if key == resource or (key not in named and resource not in named and kind_matches(resource, (key,)))
            )  # fmt: skip
        return found

    def holds(self, queue: str) -> dict[str, int]:
        """What the jobs of a queue itself hold, resource -> amount: added up anew. O(its users)."""
        found: dict[str, int] = {}
        for held in self._booked.get(queue, {}).values():
            for amounts, replicas in held.items():
                for resource, amount in amounts:
                    found[resource] = found.get(resource, 0) + replicas * amount
        return found

    def start(self, array_id: str, change: int) -> None:
        """Count a member of an array that starts (+1) or ends (-1)."""
        if self._undo is not None:
            self._undo.append((array_id, "", (), change))
        self.arrays[array_id] = self.arrays.get(array_id, 0) + change

    def begin(self) -> None:
        """A trial begins: what is booked from now on is put back at its end. Not re-entrant."""
        assert self._undo is None
        self._undo = []

    def end(self) -> None:
        """It ends."""
        self.rollback(0)
        self._undo = None

    def mark(self) -> int:
        """A point inside a trial to roll back to."""
        assert self._undo is not None
        return len(self._undo)

    def rollback(self, mark: int) -> None:
        assert self._undo is not None
        while len(self._undo) > mark:
            name, owner, amounts, sign = self._undo.pop()
            if amounts:
                self._add(self.account(name), owner, amounts, -sign)
            else:
                self.arrays[name] -= sign

    @contextmanager
    def seen_as(self, books: Books) -> Iterator[None]:
        """Inside a trial: as other books have it; they keep what is booked inside. O(queues)."""
        assert self._undo is not None
        kept = self._exchange(books)
        try:
            yield
        finally:
            now = self._exchange(kept)
            books.accounts, books.arrays, books.undo = now.accounts, now.arrays, now.undo

    def copied(self) -> Books:
        """A copy of the books as they are. O(queues + users)."""
        held = {n: (dict(a.held), dict(a.users), dict(a.used), a.booked) for n, a in self.accounts.items()}
        return Books(held, dict(self.arrays))

    def _exchange(self, books: Books) -> Books:
        kept = Books({n: (a.held, a.users, a.used, a.booked) for n, a in self.accounts.items()}, self.arrays)
        kept.undo, self._undo = self._undo or [], books.undo
        self.arrays = books.arrays
        for name, account in self.accounts.items():
            account.held, account.users, account.used, account.booked = books.accounts.get(name) or ({}, {}, {}, 0)
        return kept

    # ---- admission ----

    def refuses(self, queue: str, owner: str, needs: Mapping[str, int], now_ms: int) -> Refused | None:
        """The first limit that forbids taking `needs` (resource -> amount) in a queue; None: it may. Kinds of GPUs are
        named in `needs` by themselves."""
        account = self.account(queue)
        if not account.bounded:
            return None
        gpus = needs.get(GPUS, 0)
        for each in account.path if gpus else ():
            spec = each.spec
            if spec is None:
                continue
            if spec.max_gpus is not None:
                left = spec.max_gpus * WHOLE_GPU - each.held.get(GPUS, 0)
                if gpus > left:
                    return Refused(Reason.QUOTA_QUEUE, each.name, GPUS, gpus, left, spec.max_gpus * WHOLE_GPU)
            if spec.budget is not None:
                limit = spec.budget.gpu_hours * WHOLE_GPU * HOUR_MS
                left = limit - each.spent(now_ms)
                if left <= 0:
                    until = now_ms - now_ms % spec.budget.window + spec.budget.window
                    return Refused(Reason.BUDGET, each.name, GPUS, gpus, left, limit, until)
        if gpus and account.spec is not None and account.spec.max_gpus_per_user is not None:
            limit = account.spec.max_gpus_per_user * WHOLE_GPU
            left = limit - account.users.get(owner, 0)
            if gpus > left:
                return Refused(Reason.QUOTA_USER, queue, GPUS, gpus, left, limit)
        root = account.root
        if root.nominal:
            for resource, amount in needs.items():
                for key in self.limits(root, resource) if amount else ():
                    left = account.room(key)
                    if amount > left:
                        return Refused(Reason.QUOTA_QUEUE, queue, key, amount, left, account.nominal.get(key, 0))
        return None

    def limits_kinds(self, queue: str) -> bool:
        """Whether a GPU kind has a quota of its own in the queue's tree."""
        return any(key not in (GPUS, CPU, MEMORY) for key in self.account(queue).root.nominal)

    def next_window_ms(self, now_ms: int) -> int:
        """When the next budget window begins that may let a queue start again; 0: none."""
        return min([now_ms - now_ms % window + window for window in self.windows]) if self.windows else 0

    @property
    def longest_window_ms(self) -> int:
        """After so long every budget is whole again; 0: there is none."""
        return max(self.windows, default=0)


def _use(account: Account, key: str, change: int) -> None:
    """An account's use rises or falls; its parent sees what goes beyond what the account keeps."""
    kept, before = account.kept.get(key, 0), account.used.get(key, 0)
    account.used[key] = before + change
    if account.parent is not None:
        above = max(0, before + change - kept) - max(0, before - kept)
        if above:
            _use(account.parent, key, above)
