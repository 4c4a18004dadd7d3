"""The composition root: from a server's configuration to running objects; the only place that names concrete classes.

Called by `jobsched serve`, by tests and by whoever embeds a server. Starting and stopping a server never touches a
replica: those belong to the backend, and the next server finds them again. Decides nothing.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from importlib import import_module
from pathlib import Path

import structlog
from filelock import FileLock, Timeout

from jobsched import __version__
from jobsched.controller.loop import Controller
from jobsched.core.answers import Check
from jobsched.core.lines import all_alike, equal_rank
from jobsched.core.passes import Policy
from jobsched.core.policies.backfill import Backfill
from jobsched.core.policies.defragmentation import Defragmentation
from jobsched.core.policies.elasticity import Elasticity
from jobsched.core.policies.fairness import FairShare
from jobsched.core.policies.health import Health
from jobsched.core.policies.kinds import by_kind, learned_left, learned_speed, where_alike
from jobsched.core.policies.ordering import (
    LEASE_MS,
    TIRESIAS_GPU_S,
    Factors,
    estimated,
    expected_service,
    finish_time_fairness,
    gpu_time,
    in_time,
    in_time_heads,
    learned,
    learned_heads,
    least_attained,
    left_told,
    nobody,
    outlook,
    patient,
    shortest,
    urgent,
)
from jobsched.core.policies.placement import Score
from jobsched.core.policies.preemption import Replan, first
from jobsched.core.policies.victims import Preemption, Scope
from jobsched.core.pools import NodePool
from jobsched.errors import ConfigError, Conflict, MissingExtra
from jobsched.ports import Backend, Provisioner, Store, Wake
from jobsched.service import Service
from jobsched.spec import server as spec
from jobsched.spec.backends import BackendConfig, GpuStock, KubernetesBackend, LocalBackend, VirtualNodes
from jobsched.spec.server import PolicyConfig, ServerConfig

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
FIRST_TICK_S = 30.0
"""Longest wait for the first look at the cluster before the server answers all the same."""
START_S = 60.0
DRAIN_S = 3.0
"""How long open requests may go on once the server stops."""
LITTLE_DISK_BYTES = 2**30
RECALL_EVERY_MS = 300_000
"""How often what is known beyond the projections is kept for the next leader; also when a server stops."""
BACKFILL = {"off": None, "easy": Backfill(1), "conservative": Backfill(64)}

log = structlog.get_logger("jobsched.server")


class SystemClock:
    """The time of day at the start, carried on by the monotonic clock: it neither jumps nor goes backwards."""

    def __init__(self) -> None:
        self._offset_ns = time.time_ns() - time.monotonic_ns()

    def now_ms(self) -> int:
        return (self._offset_ns + time.monotonic_ns()) // 1_000_000

    def wait_until(self, instant_ms: int, wake: Wake) -> None:
        wake.wait(max(0, instant_ms - self.now_ms()) / 1_000)
        wake.clear()


class Server:
    """One server in one home directory. `start` returns once it answers; `stop` leaves every replica running."""

    def __init__(self, config: ServerConfig, *, embedded: bool = False) -> None:
        """`embedded`: a client started it by itself, which is noted in `server.json`."""
        self.home = home_of(config)
        self.url = ""
        self.token = ""
        self._config = config
        self._embedded = embedded
        self._stop_wish = threading.Event()
        self._operator_check: Callable[[], Check] | None = None
        self._open = ExitStack()

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Take the home directory, open store and backend, begin to tick and to answer. Raises `Conflict` when another
        server has the home, and what store, backend and address raise."""
        with ExitStack() as opened:  # closed in reverse, also when starting fails half-way
            try:
                self.home.mkdir(parents=True, exist_ok=True, mode=0o700)
                opened.callback(_only_one(self.home).release)
            except OSError as exc:
                raise ConfigError(f"the home directory {self.home} cannot be used: {exc.strerror or exc}",
                                  hint="choose another one with --home or JOBSCHED_HOME") from exc  # fmt: skip
            listener = opened.enter_context(self._bind())
            store = make_store(self._config, self.home)
            opened.callback(store.close)
            backend = self._make_backend()
            opened.callback(backend.close)
            self._serve(opened, listener, store, backend)
            self._open = opened.pop_all()
        log.info("serving", url=self.url, home=str(self.home), pid=os.getpid(), version=__version__)

    def stop(self) -> None:
        """Finish open requests, end the loop, hand over the lease, give back the home. Idempotent."""
        self._open.close()

    def wish_to_stop(self) -> None:
        """Let `wait` return."""
        self._stop_wish.set()

    def wait(self) -> None:
        """Until somebody wishes the server to stop."""
        self._stop_wish.wait()

    def _serve(self, opened: ExitStack, listener: socket.socket, store: Store, backend: Backend) -> None:
        from jobsched.api.app import create_app
        from jobsched.api.auth import LOOPBACK, load_token
        from jobsched.api.http import HttpServer

        if self._config.pools and not isinstance(backend, Provisioner):
            name = backend.capabilities.name
            raise ConfigError(f"pools: the {name} backend cannot have nodes made", hint="leave pools out")
        clock = SystemClock()
        self.token = load_token(self.home / "token")
        controller = self.controller = Controller(
            store, backend, clock, _policy(self._config.policy, self._config.pools),
            queues=self._config.queues,
            sole_definer=self._config.kubernetes_objects is None and "queues" in self._config.model_fields_set,
            holder=f"{socket.gethostname()}:{self.home}",  # the next server of this home is the same leader
            lease_ttl_ms=self._config.timers.lease_ttl,
            idle_ms=self._config.timers.longest_wait,
            node_grace_ms=self._config.timers.node_grace,
            recall_every_ms=RECALL_EVERY_MS,
            secret=load_token(self.home / "secret").encode(),
        )  # fmt: skip
        controller.start()
        opened.callback(controller.stop)
        service = Service(store, controller, backend, clock, self._checks, self._config.priority_classes)
        host, port = listener.getsockname()[:2]
        app = create_app(
            service, self.token, version=__version__, shutdown=self.wish_to_stop,
            hosts=LOOPBACK if host in LOOPBACK_HOSTS else None,
        )  # fmt: skip
        if self._config.kubernetes_objects is not None:
            opened.callback(self._start_operator(self._config.kubernetes_objects, service, controller, clock))
        _await_first_tick(controller)
        http = HttpServer(app, listener, drain_s=DRAIN_S)
        http.start(timeout_s=START_S)
        opened.callback(http.stop)
        near = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        self.url = f"http://[{near}]:{port}" if ":" in near else f"http://{near}:{port}"
        self._announce()
        opened.callback(self._retract)

    def _start_operator(
        self, config: spec.KubernetesObjects, service: Service, controller: Controller, clock: SystemClock
    ) -> Callable[[], None]:
        """Follow the objects; the result stops that."""
        from jobsched.backends.registry import load_engine

        load_engine("kubernetes.config", "kubernetes")
        from jobsched.backends.kubernetes_api import Api
        from jobsched.operator.loop import Operator

        given = {name: text for name in ("kubeconfig", "context", "namespace") if (text := getattr(config, name))}
        backend = self._config.backend.kubernetes or KubernetesBackend()
        operator = Operator(
            Api(backend.model_copy(update=given)), service, controller, clock, directory=config.directory,
            configured=[queue.name for queue in self._config.queues],
        )  # fmt: skip
        self._operator_check = operator.check
        operator.start()
        return operator.close

    def _bind(self) -> socket.socket:
        listen = self._config.listen
        try:
            family = socket.getaddrinfo(listen.host, listen.port, type=socket.SOCK_STREAM)[0][0]
            return socket.create_server((listen.host, listen.port), family=family, backlog=512)
        except OSError as exc:
            raise ConfigError(
                f"cannot listen on {listen.host}:{listen.port}: {exc.strerror or exc}",
                hint="choose another address with --host and --port; port 0 takes any free one",
            ) from exc

    def _make_backend(self) -> Backend:
        from jobsched.backends.registry import make_backend

        with ThreadPoolExecutor(1) as pool:  # a backend starts processes; the web framework is imported meanwhile
            backend = pool.submit(make_backend, self._config.backend, self.home)
            import_module("jobsched.api.http")
            return backend.result()

    # ---- server.json: how clients of this home find the server ----

    def _announce(self) -> None:
        said = {
            "url": self.url, "pid": os.getpid(), "token_file": str(self.home / "token"), "version": __version__,
            "embedded": self._embedded,
        }  # fmt: skip
        draft = self.home / f"server.json.{os.getpid()}"
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
            json.dump(said, out)
        draft.replace(self.home / "server.json")

    def _retract(self) -> None:
        (self.home / "server.json").unlink(missing_ok=True)

    def _checks(self) -> Iterator[Check]:
        free = shutil.disk_usage(self.home).free
        yield Check("home", free > LITTLE_DISK_BYTES, f"{self.home}, {free / 2**30:.1f} GiB free",
                    "" if free > LITTLE_DISK_BYTES else "make room: logs and checkpoints are kept there")  # fmt: skip
        python = ".".join(map(str, sys.version_info[:3]))
        if self._operator_check is not None:
            yield self._operator_check()
        yield Check("server", True, f"jobsched {__version__}, Python {python}, pid {os.getpid()}, {self.url}")


def _node_pool(pool: spec.NodePool) -> NodePool:
    return NodePool(
        pool.name, pool.cpu, pool.memory,
        gpu_kind=pool.gpus.kind if pool.gpus else "", gpus=pool.gpus.count if pool.gpus else 0,
        gpu_memory_bytes=pool.gpu_memory, labels=tuple(sorted(pool.labels.items())) or (("pool", pool.name),),
        taints=pool.taints, min=pool.min, max=pool.max, price=round(pool.price * 1_000), delay_ms=pool.delay,
        idle_ms=pool.idle,
    )  # fmt: skip


def _replan(config: PolicyConfig) -> Replan | None:
    """Of orders that place all runnable jobs anew. In a line of one outlook all but `attained` go by what is left, then
    by age, so that its first are enough to look at."""
    how = _preemption(config)
    min_run_ms, spares = (how.min_runtime_ms, how.spares) if how is not None else (None, nobody)
    match config.ordering:
        case "learned":
            return Replan(patient(learned, min_run_ms, spares), heads=learned_heads, frugal=True)
        case "shortest":
            order = patient(urgent(estimated(lambda told, firm: shortest(gpu_time(told), firm))), min_run_ms, spares)
            return Replan(order, heads=first, frugal=True)
        case "fairness":
            lease_ms = None if min_run_ms is None else max(LEASE_MS, min_run_ms)
            order = urgent(estimated(lambda told, _: finish_time_fairness(told)))
            return Replan(patient(order, lease_ms, spares), heads=first)
        case "kinds":
            return Replan(by_kind(learned_left, learned_speed, min_run_ms, spares), heads=where_alike(learned_heads))
        case "in-time":
            return Replan(patient(urgent(estimated(in_time)), min_run_ms, spares), heads=in_time_heads)
        case "attained":
            return Replan(patient(urgent(least_attained(TIRESIAS_GPU_S)), min_run_ms, spares), remember=True)
        case _:
            return None


def _preemption(config: PolicyConfig) -> Preemption | None:
    how = config.preemption
    if how is None:
        return None
    return Preemption(how.reclaim, Scope(how.priority), how.min_runtime, how.lost_percent)


def _policy(config: PolicyConfig, pools: Sequence[spec.NodePool]) -> Policy:
    health = config.health
    anew = _replan(config)
    return Policy(
        node_pools=tuple(_node_pool(pool) for pool in pools),
        factors=None if config.ordering != "multifactor" else Factors(
            (by := config.factors).priority, by.age, by.size, by.fair, by.age_full, config.fair_half_life
        ),
        rank=left_told if anew else expected_service if config.ordering == "service" else equal_rank,
        alike=outlook if anew else all_alike,
        replan=anew,
        fair=FairShare(config.fair_half_life) if config.fair else None,
        backfill=BACKFILL[config.backfill],
        preemption=_preemption(config),
        score=Score(config.score),
        elastic=None if (sizes := config.elastic) is None else Elasticity(
            every_ms=sizes.every, growth=sizes.growth, horizon_ms=sizes.horizon, restart_ms=sizes.restart,
            in_place_ms=sizes.in_place, doubt=sizes.gain_percent / 100,
        ),
        defragmentation=Defragmentation() if config.defragmentation else None,
        health=None if health is None else Health(
            threshold=health.threshold, half_life_ms=health.half_life, recheck_ms=health.recheck,
            preflight=health.preflight, image=health.image, timeout_ms=health.timeout,
        ),
    )  # fmt: skip


def embedded_config() -> ServerConfig:
    """What a server offers that a client started by itself: this machine; without any GPU, four virtual nodes of eight
    simulated GPUs, so that gangs, queues and recovery can be seen on a laptop."""
    from jobsched.backends.gpus import read_inventory

    if read_inventory().gpus:
        return ServerConfig()
    nodes = VirtualNodes(count=4, cpu=16, memory=64 * 2**30, gpus=(GpuStock(kind="sim-gpu", count=8),))
    return ServerConfig(backend=BackendConfig(local=LocalBackend(virtual_nodes=(nodes,))))


def serve(config: ServerConfig, *, embedded: bool = False) -> None:
    """Run a server until SIGTERM, SIGINT, SIGHUP or POST /v1/shutdown. Main thread only."""
    configure_logging(os.environ.get("JOBSCHED_LOG_LEVEL", "info"))
    server = Server(config, embedded=embedded)

    def on_signal(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)  # the second one ends the process at once
        server.wish_to_stop()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        with server:
            server.wait()
            log.info("stopping; running jobs go on")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def home_of(config: ServerConfig) -> Path:
    """The directory that holds everything a server keeps."""
    if config.home:
        return Path(config.home).expanduser().absolute()
    import platformdirs

    return Path(os.environ.get("JOBSCHED_HOME") or platformdirs.user_data_dir("jobsched")).absolute()


def make_store(config: ServerConfig, home: Path) -> Store:
    if config.store == "memory:":
        from jobsched.store.memory import MemoryStore

        return MemoryStore()
    from jobsched.store.sql import SqlStore

    try:
        return SqlStore(config.store or f"sqlite:///{home / 'jobsched.db'}")
    except ModuleNotFoundError as exc:  # the driver of a database, of which only SQLite's comes with Python
        kind = config.store.partition(":")[0]  # the rest may hold a password
        raise MissingExtra(f"a {kind} store needs {exc.name}", hint="pip install 'jobsched[postgres]'") from exc


def configure_logging(level: str) -> None:
    """Everything to stderr: for people on a terminal, as JSON lines elsewhere. Never local variables: they hold
    secrets."""
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ConfigError(f"JOBSCHED_LOG_LEVEL is {level!r}", hint="one of debug, info, warning, error")
    tty = sys.stderr.isatty()
    shown: Sequence[structlog.typing.Processor] = (
        [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)] if tty
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper("%H:%M:%S" if tty else "iso", utc=not tty),
            *shown,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
    )  # fmt: skip


def _only_one(home: Path) -> FileLock:
    """The lock on a home directory, taken; the system lets go of it when the process dies, however it dies."""
    lock = FileLock(home / "server.lock", timeout=0, mode=0o600)
    try:
        lock.acquire()
    except Timeout:
        said = {}
        with suppress(OSError, ValueError):
            said = json.loads((home / "server.json").read_text())
        who = f" (pid {said['pid']}) at {said['url']}" if {"pid", "url"} <= said.keys() else ""
        hint = "stop it with 'jobsched server stop', or choose another --home"
        raise Conflict(f"another server{who} runs from {home}", hint=hint) from None
    return lock


def _await_first_tick(controller: Controller) -> None:
    """Before it there is no cluster to ask, and before it has seen the backend's nodes it is empty. A server that can
    reach neither answers all the same, and `doctor` says so."""
    until, health = time.monotonic() + FIRST_TICK_S, controller.health
    while time.monotonic() < until and not (controller.ready or health.store_error or health.backend_error):
        time.sleep(0.005)
