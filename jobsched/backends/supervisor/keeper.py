"""Keeps the replicas of one home directory: starts them, stops them, sees them end, takes their reports.

Called by `server` (requests) and by the loop (ends, reports, timers). Everything about one replica happens here:
order -> journal -> process -> reports -> stop -> its main process ends -> whatever is left of it is killed -> end ->
journal. It knows nothing of jobs, gangs or nodes beyond their names.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from jobsched.backends.supervisor import processes, replica_log, secret_files
from jobsched.backends.supervisor.journal import Journal, Past
from jobsched.backends.supervisor.limits import Limiter, find_limiter, machine_oom_kills
from jobsched.backends.supervisor.loop import Loop
from jobsched.backends.supervisor.processes import Look
from jobsched.backends.supervisor.protocol import LAUNCH_VARIABLE, Key, Layout, Message, Order, Settings
from jobsched.backends.supervisor.replica import End, Progress, Replica, Stage, State, StopRequest
from jobsched.backends.supervisor.stacks import StackCapture
from jobsched.backends.supervisor.startable import StartError, check_ports, executable
from jobsched.backends.supervisor.sweeper import Sweeper, mark_kept
from jobsched.backends.supervisor.warm_pool import Parent, PythonRun, WarmPool, as_python_run, find_program

OOM = "Oom"
"""Value of `core.job.Reason`."""
SPAWNS_AT_ONCE = 8
WARM_WAIT_S = 30.0
"""Longest wait for a warm interpreter that is still importing."""
PUSH_INTERVAL_S = 0.1
SWEEP_S = 2.0
SWEEP_STEP_S = 0.005
SWEEPS = 20
"""Least times that what a replica left is looked for, however late the first one was."""
REFUSED_MEMORY = ("MemoryError", "std::bad_alloc", "Cannot allocate memory", "can't allocate memory")
"""Last words of a process that an rlimit refused memory."""
SILENT_S = 3.0
"""Reports come at least every two seconds, whatever the script does."""
_PR_SET_CHILD_SUBREAPER = 36


class Keeper:
    """All replicas by key. `changed` is called with each key whose report changed, or that is gone."""

    def __init__(self, layout: Layout, loop: Loop, changed: Callable[[Key], None]) -> None:
        self.layout, self.loop, self.changed = layout, loop, changed
        self.settings = Settings()
        self.limiter: Limiter = find_limiter("auto", self._folder)
        self.replicas: dict[Key, Replica] = {}
        self.held: dict[Key, None] = {}
        """Those that must not outlive whoever holds them."""
        self._past = Past()
        self._by_pid: dict[int, Replica] = {}
        self._pending: deque[Key] = deque()
        self._settling: dict[Key, Replica] = {}
        self._releasing: dict[Key, None] = {}
        """Ended replicas whose groups the kernel has not quite let go of."""
        self._captures: dict[Key, StackCapture] = {}
        self._journal = Journal(layout.journal)
        self._warm = WarmPool(loop, layout.state / "warm.log")
        self._sweeper = Sweeper(layout)
        self._oom_kills = machine_oom_kills()
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._recover()
        self._reports = self._open_reports()
        loop.every(1.0, self._each_second)

    # requests -----------------------------------------------------------------------------------------------------

    def configure(self, settings: Settings) -> None:
        if settings.limits != self.settings.limits:
            self.limiter = find_limiter(settings.limits, self._folder)
        self.settings = settings

    def start(self, orders: Iterable[Order]) -> None:
        """Accept orders; each key at most once, ever. What comes of it is seen in the reports: one that came and went
        before is told to be gone."""
        for order in orders:
            if order.key in self.replicas:
                continue
            if self._past.covers(order.key):
                self.changed(order.key)
                continue
            self._past.add(order.key)
            replica = self.replicas[order.key] = Replica(order)
            self._journal.write(["order", order.key, replica.stub()])
            self._pending.append(order.key)
            self.changed(order.key)
        self._start_pending()

    def stop(self, keys: Iterable[Key], grace_s: float) -> None:
        """Ask, terminate or kill, as far as the grace allows; a later call can only shorten."""
        now = time.monotonic()
        asked = []
        for key in keys:
            replica = self.replicas.get(key)
            if replica is None or replica.end is not None or replica.reaped is not None:
                continue
            if replica.pid == 0:
                self._withdraw(replica)
                continue
            until = now + grace_s
            if replica.stop is None:
                acknowledged = replica.progress.acknowledged if replica.progress else None
                replica.stop = StopRequest(until, acknowledged)
            elif until >= replica.stop.until and grace_s > 0:
                continue
            replica.stop.until = min(until, replica.stop.until)
            if grace_s <= 0:
                replica.stop.kill_at = now
            elif replica.stop.stage is Stage.TERMINATED:
                replica.stop.kill_at = min(replica.stop.kill_at, max(until, now + self.settings.kill_after_s))
            asked.append(replica)
        self._advance_stops(asked)

    def hold(self, keys: Iterable[Key]) -> None:
        """Somebody holds these from now on; the journal knows, for the next supervisor."""
        for key in keys:
            if key not in self.held:
                self.held[key] = None
                self._journal.write(["hold", key])

    def let_go(self, keys: Iterable[Key]) -> None:
        """Nobody holds these any more."""
        gone = list(keys)
        for key in gone:
            if key not in self.replicas:
                self.held.pop(key, None)
        self.stop(gone, 0)

    def forget(self, keys: Iterable[Key]) -> None:
        """Drop replicas whose end is known to the server."""
        for key in keys:
            replica = self.replicas.get(key)
            if replica is not None and replica.end is not None:
                del self.replicas[key]
                self.held.pop(key, None)
                self._journal.write(["forget", key])
                self.changed(key)
                self._clean_up(replica)
        if self._journal.grown(len(self.replicas)):
            self._journal.compact(self._records())

    def _clean_up(self, replica: Replica) -> None:
        """Scratch files go with the last replica in their place; a large tree is removed beside the loop."""
        policy, place = replica.order.clean_up, replica.key.rsplit("/", 1)[0] + "/"
        wanted = policy == "all" or (policy == "running" and replica.stop is not None)
        if wanted and not any(key.startswith(place) for key in self.replicas):
            scratch = self.layout.scratch_dir(replica.key)
            threading.Thread(target=shutil.rmtree, args=(scratch,), kwargs={"ignore_errors": True}, daemon=True).start()

    def ask_stacks(self, keys: Iterable[Key]) -> None:
        table = Look().table
        for key in keys:
            replica = self.replicas.get(key)
            if replica is None or replica.pid == 0 or replica.end is not None or key in self._captures:
                continue
            pids = sorted(processes.members(replica.pid, replica.start_ticks, table))

            def done(text: str, replica: Replica = replica) -> None:
                self._captures.pop(replica.key, None)
                replica.stacks = text
                self.changed(replica.key)

            self._captures[key] = StackCapture(self.loop, pids, self.layout.log(key), done)
            self._captures[key].begin()

    def prepare_warm(self, interpreter: str, preload: Sequence[str], env: dict[str, str]) -> None:
        """Have a warm interpreter ready before anybody needs it, and keep it."""
        if (program := find_program(interpreter, env.get("PATH", ""), "/")) is not None:
            self._warm.prepare(program, preload, env, pinned=True)

    def ask_checkpoint(self, keys: Iterable[Key]) -> list[Key]:
        """Those that listen: they are sent the signal, and go on."""
        table, told = Look().table, []
        for key in keys:
            replica = self.replicas.get(key)
            if replica is None or replica.state is not State.RUNNING or replica.reaped is not None:
                continue
            if self._signal_listeners(replica, processes.members(replica.pid, replica.start_ticks, table)):
                told.append(key)
        return told

    @staticmethod
    def _signal_listeners(replica: Replica, pids: Iterable[int]) -> bool:
        """The checkpoint signal to those that catch it; whether there was one."""
        number = processes.signal_number(replica.order.stop_signal)
        listening = [pid for pid in pids if number and processes.catches(pid, number)]
        for pid in listening:
            processes.send(pid, number)
        return bool(listening)

    def beside(self, key: Key) -> Message:
        """What a process needs to run beside this replica: whose neighbour it is, its environment, its groups."""
        replica = self.replicas.get(key)
        if replica is None or replica.state is not State.RUNNING or replica.reaped is not None:
            return {"ok": False, "why": "it does not run"}
        try:
            env = self._environment(replica.order) if replica.order.env else processes.environment(replica.pid)
        except StartError as error:  # a secret was taken away meanwhile
            return {"ok": False, "why": str(error)}
        replica.visited = True
        return {"ok": True, "pid": replica.pid, "env": env, "enter": replica.confinement.enter}

    @property
    def running(self) -> int:
        return sum(replica.end is None for replica in self.replicas.values())

    @property
    def releasing(self) -> int:
        return len(self._releasing)

    @property
    def starting(self) -> int:
        return sum(replica.state is State.STARTING for replica in self.replicas.values())

    def close(self) -> None:
        """Let go; replicas go on."""
        self._warm.close()
        self.limiter.close()
        self._reports.close()
        self._journal.close()

    # starting -----------------------------------------------------------------------------------------------------

    def _start_pending(self) -> None:
        """Start some; the rest in the next rounds, so that reports and requests are served in between."""
        for _ in range(min(SPAWNS_AT_ONCE, len(self._pending))):
            replica = self.replicas.get(self._pending.popleft())
            if replica is not None and replica.state is State.STARTING:
                self._spawn(replica)
        if self._pending:
            self.loop.soon(self._start_pending)

    def _spawn(self, replica: Replica) -> None:
        order = replica.order
        log = self.layout.log(order.key)
        try:
            if not log.parent.exists():
                log.parent.mkdir(parents=True, mode=0o700)
                mark_kept(log.parent, order.keep_ms)
            scratch = self.layout.scratch_dir(order.key)
            scratch.mkdir(parents=True, exist_ok=True, mode=0o700)
            cwd = order.cwd or str(scratch)
            env = self._environment(order)
            program = executable(order.argv, env.get("PATH", ""), cwd)
            run, parent = self._warm_parent(order, env, cwd)
            if parent is not None and parent.usable is None and not replica.waited:
                self._wait_for_warm(replica, parent)
                return
            check_ports(order.ports)
            replica.oom_kills_before = self._oom_kills
            replica.confinement = self.limiter.confine(_group_name(order.key), order.cpu_milli, order.memory_bytes)
            if not self._spawn_warm(replica, run, parent, env, cwd, log):
                self._spawn_cold(replica, env, cwd, log, program)
        except StartError as error:
            self._never_ran(replica, error)
        except OSError as error:
            self._never_ran(replica, StartError(f"cannot start: {error.strerror}: {error.filename or order.argv[0]}"))

    def _spawn_cold(self, replica: Replica, env: dict[str, str], cwd: str, log: Path, program: str) -> None:
        order = replica.order
        argv = replica.confinement.wrap([program, *order.argv[1:]]) if replica.confinement.enter else list(order.argv)
        with os.fdopen(replica_log.open_for_append(log), "wb", buffering=0) as out:
            process = subprocess.Popen(
                argv, executable=None if replica.confinement.enter else program, cwd=cwd, env=env,
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, close_fds=False,
            )
        process.returncode = 0  # reaped here by pidfd; Popen shall not
        self.limiter.started(process.pid, order.memory_bytes)
        self._runs(replica, process.pid)

    def _warm_parent(self, order: Order, env: dict[str, str], cwd: str) -> tuple[PythonRun | None, Parent | None]:
        run = as_python_run(order.argv, env.get("PATH", ""), cwd) if order.preload else None
        return run, self._warm.prepare(run.interpreter, order.preload, env) if run else None

    def _wait_for_warm(self, replica: Replica, parent: Parent) -> None:
        """One import serves all who want it: waiting for it beats importing the same beside it. Bounded, then cold."""

        def go_on() -> None:
            if not replica.waited:
                replica.waited = True
                self._pending.append(replica.key)
                self._start_pending()

        parent.waiting.append(go_on)
        self.loop.at(WARM_WAIT_S, go_on)

    def _spawn_warm(
        self, replica: Replica, run: PythonRun | None, parent: Parent | None, env: dict[str, str], cwd: str, log: Path
    ) -> bool:
        if run is None or parent is None or not parent.usable:
            return False
        order = replica.order
        handshake = self._warm.fork(parent, run, {
            "argv": run.argv, "env": env, "cwd": cwd, "log": str(log), "enter": replica.confinement.enter,
        })
        if handshake is None:
            return False
        replica.handshake = handshake

        def cold() -> None:
            """No answer: the replica has not run and, without its handshake, never will."""
            if replica.handshake is handshake:
                self._end_handshake(replica)
                try:
                    self._spawn_cold(replica, env, cwd, log, executable(order.argv, env.get("PATH", ""), cwd))
                except StartError as error:
                    self._never_ran(replica, error)
                except OSError as error:
                    self._never_ran(replica, StartError(f"cannot start: {error}"))

        def answered() -> None:
            if replica.handshake is not handshake:
                return
            try:
                answer = handshake.recv(64)
            except OSError:
                answer = b""
            if not answer.strip().isdigit():
                cold()
                return
            pid = int(answer)
            self.limiter.started(pid, order.memory_bytes)
            self._runs(replica, pid)
            try:
                handshake.send(b"g")
            except OSError:
                pass  # it has just died: its end is seen like any other
            self._end_handshake(replica)

        self.loop.watch(handshake, answered)
        self.loop.at(self.settings.warm_wait_s, cold)
        return True

    def _end_handshake(self, replica: Replica) -> None:
        if replica.handshake is not None:
            self.loop.unwatch(replica.handshake)
            replica.handshake.close()
            replica.handshake = None

    def _runs(self, replica: Replica, pid: int) -> None:
        """The main process exists; for a warm one, nothing of the user's has run yet."""
        seen = processes.read(pid)
        replica.pid, replica.start_ticks = pid, seen.start_ticks if seen else 0
        replica.state = State.RUNNING
        self._journal.write(["run", replica.key, pid, replica.start_ticks])
        try:
            replica.pidfd = os.pidfd_open(pid)
        except ProcessLookupError:  # only a warm one can be gone already, and unseen
            self._finish(replica, End(message="it was killed before it ran"))
            return
        self._by_pid[pid] = replica
        self.loop.watch(replica.pidfd, lambda: self._main_ended(replica))
        self.changed(replica.key)

    def _environment(self, order: Order) -> dict[str, str]:
        try:
            return {**secret_files.resolved(order.env, self.layout.secrets), LAUNCH_VARIABLE: self._mark(order.key)}
        except secret_files.SecretError as error:
            raise StartError(str(error)) from error

    def _never_ran(self, replica: Replica, error: StartError) -> None:
        replica_log.append(self.layout.log(replica.key), f"jobsched: {error}\n")
        self._finish(replica, End(exit_code=error.code, failure=error.reason, message=str(error)))

    def _withdraw(self, replica: Replica) -> None:
        """Stopped before it had a process."""
        self._end_handshake(replica)
        self._finish(replica, End(signal=signal.SIGTERM, message="stopped before it ran"))

    # stopping -----------------------------------------------------------------------------------------------------

    def _advance_stops(self, replicas: Sequence[Replica]) -> None:
        """Take each stop as far as it can go now: one look at /proc for all of them."""
        alive = [r for r in replicas if r.end is None and r.reaped is None and r.stop is not None]
        if not alive:
            return
        look = Look()
        for replica in alive:
            self._advance_stop(replica, look, time.monotonic())

    def _advance_stop(self, replica: Replica, look: Look, now: float) -> None:
        stop = replica.stop
        assert stop is not None
        pids = processes.members(replica.pid, replica.start_ticks, look.table)
        if stop.timer is not None:
            stop.timer.cancel()
        if now >= stop.kill_at:
            stop.stage = Stage.KILLED
            self._kill(self._all_of(replica, look))
            return
        if stop.stage is None:
            stop.stage = Stage.ASKED if self._signal_listeners(replica, pids) else None
        acknowledged = replica.progress is not None and replica.progress.acknowledged != stop.acknowledged_before
        if stop.stage is None or (stop.stage is Stage.ASKED and (acknowledged or now >= stop.until)):
            stop.stage = Stage.TERMINATED  # without an acknowledgement the rest of the grace goes to a SIGTERM handler
            rest = now if acknowledged else stop.until
            stop.kill_at = min(stop.kill_at, max(rest, now + self.settings.kill_after_s))
            for pid in sorted(pids, key=lambda pid: pid != replica.pid):  # a wrapper first, then its children
                processes.send(pid, signal.SIGTERM)
        due = stop.until if stop.stage is Stage.ASKED else stop.kill_at
        stop.timer = self.loop.at(max(due - now, 0.0), lambda: self._advance_stops([replica]))

    @staticmethod
    def _kill(pids: Iterable[int]) -> None:
        for pid in pids:
            processes.send(pid, signal.SIGKILL)

    def _all_of(self, replica: Replica, look: Look) -> set[int]:
        """Its members, and whoever carries its mark or sits in its groups, wherever they went."""
        also = set(look.marked(self._mark(replica.key)))
        for directory in replica.confinement.directories:
            try:
                also.update(int(line) for line in (directory / "cgroup.procs").read_text().split())
            except OSError:
                continue
        return processes.members(replica.pid, replica.start_ticks, look.table, also)

    # ending -------------------------------------------------------------------------------------------------------

    def _main_ended(self, replica: Replica) -> None:
        """The main process is gone. Its group is killed while its pid cannot be anybody else's: before we reap it."""
        if replica.own_child:
            processes.send_group(replica.pid, signal.SIGKILL)
        replica.reaped = self._reap(replica)
        self.loop.unwatch(replica.pidfd)
        os.close(replica.pidfd)
        replica.pidfd = -1
        self._by_pid.pop(replica.pid, None)
        replica.sweep_until = time.monotonic() + SWEEP_S
        self._settling[replica.key] = replica
        self.loop.soon(self._settle)

    def _reap(self, replica: Replica) -> End:
        try:
            result = os.waitid(os.P_PIDFD, replica.pidfd, os.WEXITED)
            assert result is not None
            if result.si_code == os.CLD_EXITED:
                return End(exit_code=result.si_status)
            return End(signal=result.si_status)
        except ChildProcessError:  # adopted: somebody else's child by now
            replica.own_child = False
        status = processes.exit_status_of_stranger(replica.pidfd)
        if status is None:
            return End(message="its end was not seen: the supervisor was restarted while it ran")
        code = os.waitstatus_to_exitcode(status)
        return End(exit_code=code) if code >= 0 else End(signal=-code)

    def _settle(self) -> None:
        """Kill what ended replicas left behind; report their end once nothing is left, so that ports and GPUs are free.

        Being a child subreaper, whatever a replica leaves behind shows up among our own children. Costs one small read
        when there is nothing; the whole of /proc is read only otherwise."""
        strays = set(processes.children(os.getpid())) - self._by_pid.keys() - self._warm.pids()
        look: Look | None = None
        for replica in list(self._settling.values()):
            assert replica.reaped is not None
            left: set[int] = set()
            if strays or replica.visited or not replica.own_child or processes.send_group(replica.pid, 0):
                look = look or Look()
                left = self._all_of(replica, look)
                self._kill(left)
            replica.sweeps += 1
            if left and (time.monotonic() < replica.sweep_until or replica.sweeps < SWEEPS):
                self.loop.at(SWEEP_STEP_S, self._settle)
            else:
                del self._settling[replica.key]
                self._finish(replica, replica.reaped)
        self._reap_strays(strays)

    @staticmethod
    def _reap_strays(strays: Iterable[int]) -> None:
        for pid in strays:
            try:
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)
            except ChildProcessError:
                continue

    def _finish(self, replica: Replica, end: End) -> None:
        """The end, once and for all."""
        if replica.stop is not None and replica.stop.timer is not None:
            replica.stop.timer.cancel()
        log = self.layout.log(replica.key)
        if end.exit_code != 0:
            end.tail = replica_log.tail(log)
            if not end.failure and self._out_of_memory(replica, end):
                end.failure = OOM
                end.message = end.message or "the kernel killed it: out of memory"
        self._release(replica)
        end.at = time.time()
        replica.end, replica.state, replica.reaped = end, State.EXITED, None
        replica.forget_secrets()
        self._journal.write(["end", replica.key, replica.end_record()])
        self.changed(replica.key)

    def _out_of_memory(self, replica: Replica, end: End) -> bool:
        if self.limiter.ran_out(replica.confinement):
            return True
        killed = replica.stop is None and (end.signal == signal.SIGKILL or end.exit_code == 128 + signal.SIGKILL)
        if killed and machine_oom_kills() > replica.oom_kills_before:
            return True
        last = end.tail[-1] if end.tail else ""
        limited = self.limiter.name == "rlimit" and replica.order.memory_bytes > 0
        return limited and any(text in last for text in REFUSED_MEMORY)

    def _release(self, replica: Replica) -> None:
        if self.limiter.release(replica.confinement):
            self._releasing.pop(replica.key, None)
        else:
            self._releasing[replica.key] = None
            self.loop.at(0.05, lambda: self._release(replica))

    # reports ------------------------------------------------------------------------------------------------------

    def _open_reports(self) -> socket.socket:
        path = self.layout.report_socket
        path.unlink(missing_ok=True)
        reports = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        reports.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        reports.setblocking(False)
        reports.bind(str(path))
        self.loop.watch(reports, self._take_reports)
        return reports

    def _take_reports(self) -> None:
        for _ in range(256):
            try:
                data = self._reports.recv(1 << 16)
            except BlockingIOError:
                return
            try:
                self._take_report(json.loads(data))
            except (ValueError, TypeError, KeyError, AttributeError):
                continue  # anybody may write to a socket; what makes no sense is dropped

    def _take_report(self, data: Message) -> None:
        replica = self.replicas.get(data["key"])
        if replica is None or replica.end is not None or data["v"] != 1 or data.get("token", "") != replica.order.token:
            return
        now = time.monotonic()
        first = replica.progress is None or replica.progress.step < 0
        progress = replica.progress = replica.progress or Progress()
        acknowledged = progress.acknowledged
        progress.take(data, now)
        saved = progress.acknowledged != acknowledged
        if saved and replica.stop is not None and replica.stop.stage is Stage.ASKED:
            self._advance_stops([replica])
        if saved or (first and progress.step >= 0) or now - progress.pushed_at >= PUSH_INTERVAL_S:
            self._push(replica)
        elif not progress.push_planned:
            progress.push_planned = True
            self.loop.at(progress.pushed_at + PUSH_INTERVAL_S - now, lambda: self._push(replica))

    def _push(self, replica: Replica) -> None:
        assert replica.progress is not None
        replica.progress.push_planned = False
        replica.progress.pushed_at = time.monotonic()
        self.changed(replica.key)

    # housekeeping -------------------------------------------------------------------------------------------------

    def _each_second(self) -> None:
        self._sample_silent()
        self._oom_kills = machine_oom_kills()
        for replica in self.replicas.values():
            if replica.state is State.RUNNING:
                log = self.layout.log(replica.key)
                replica.log_cut = replica_log.cut(log, self.settings.log_bytes, replica.log_cut)
        self._reap_strays(set(processes.children(os.getpid())) - self._by_pid.keys())
        self._warm.retire_idle(self.settings.warm_idle_s)
        self._sweeper.step({key.rpartition("/")[0].rsplit("/", 2)[0] for key in self.replicas})

    def _sample_silent(self) -> None:
        """Whether replicas that have stopped reporting still use the CPU: the second sign that tells hung from busy."""
        now = time.monotonic()
        silent = [r for r in self.replicas.values()
                  if r.state is State.RUNNING and r.progress is not None and now - r.progress.beat_at > SILENT_S]
        table = Look().table if silent else {}
        for replica in silent:
            pids = processes.members(replica.pid, replica.start_ticks, table)
            ticks = sum(table[pid].cpu_ticks for pid in pids)
            if ticks != replica.cpu_ticks:
                replica.cpu_ticks, replica.cpu_at = ticks, now
            self.changed(replica.key)

    def _mark(self, key: Key) -> str:
        return f"{self.layout.home_id}:{key}"

    @property
    def _folder(self) -> str:
        return f"jobsched-{self.layout.home_id}"

    def _records(self) -> Iterator[list[object]]:
        yield ["boot", processes.boot_id()]
        yield from self._past.records()
        for key in self.held:
            yield ["hold", key]
        for replica in self.replicas.values():
            yield ["order", replica.key, replica.stub()]
            if replica.pid:
                yield ["run", replica.key, replica.pid, replica.start_ticks]
            if replica.end is not None:
                yield ["end", replica.key, replica.end_record()]

    def _recover(self) -> None:
        """Read the journal, adopt what still lives, and call lost what does not."""
        same_boot = False
        for kind, *rest in self._journal.replay():
            match kind:
                case "boot":
                    same_boot = rest[0] == processes.boot_id()
                case "past":
                    self._past.restore(*rest)
                case "hold":
                    self.held[rest[0]] = None
                case "order":
                    key, stub = rest
                    self._past.add(key)
                    self.replicas[key] = Replica(Order(key=key, argv=(), env={}, **stub))
                case "run":
                    key, pid, start_ticks = rest
                    if key in self.replicas:
                        self.replicas[key].pid, self.replicas[key].start_ticks = pid, start_ticks
                case "end":
                    key, report = rest
                    if key in self.replicas:
                        self._restore_end(self.replicas[key], report)
                case "forget":
                    self.replicas.pop(rest[0], None)
                    self.held.pop(rest[0], None)
        alive = [replica for replica in self.replicas.values() if replica.end is None]
        if any(replica.pid == 0 for replica in alive) and same_boot:
            marks = {processes.marker(p.pid): p for p in Look().table.values() if p.pid == p.session and p.alive}
            for replica in alive:
                found = marks.get(self._mark(replica.key))
                if replica.pid == 0 and found is not None:
                    replica.pid, replica.start_ticks = found.pid, found.start_ticks
        self._journal.compact(self._records())
        for replica in alive:
            self._adopt(replica, same_boot)

    @staticmethod
    def _restore_end(replica: Replica, report: Message) -> None:
        replica.state = State.EXITED
        replica.stacks = report.get("stacks", "")
        replica.end = End(
            report["exit_code"], report["signal"], report["failure"], report["message"], tuple(report["tail"]),
            report["ended_at"])

    def _adopt(self, replica: Replica, same_boot: bool) -> None:
        replica.confinement = self.limiter.existing(_group_name(replica.key))
        replica.oom_kills_before = self._oom_kills
        seen = processes.read(replica.pid) if same_boot and replica.pid else None
        try:
            if seen is None or seen.start_ticks != replica.start_ticks:
                raise ProcessLookupError
            replica.pidfd = os.pidfd_open(replica.pid)
        except ProcessLookupError:
            why = "its end was not seen: it ended while no supervisor was running"
            self._finish(replica, End(message=why))
            return
        replica.state, replica.own_child = State.RUNNING, seen.parent == os.getpid()
        self._by_pid[replica.pid] = replica
        self.loop.watch(replica.pidfd, lambda: self._main_ended(replica))


def _group_name(key: Key) -> str:
    return key.replace("/", ".")
