"""Thin calls to a Ray cluster, in a process of their own: `python -m jobsched.backends.ray_driver FD`.

Started by `ray`, one per server. Ray ends a driver whose cluster goes away, keeps one connection per process, and has
calls that never return; here that costs a small process and not the server, which starts another one. Decides nothing:
it carries out orders, polls nodes, and relays what the actors tell. Everything on the cluster is detached, so nothing
ends with it.

Both ways go plain dictionaries over the socket FD. To here:
    {"do": "start", "groups": [Group, …], "actors": [Actor, …]}   groups are reserved first, all or none
    {"do": "attend", "key": k, "offset": n}    follow an actor of an earlier driver; its log from this byte on
    {"do": "stop", "key": k, "grace_ms": n}    {"do": "stacks", "key": k}
    {"do": "ask", "question": n, "key": k, "method": name of one of `Host`, "args": […]}
    {"do": "remove", "keys": [k, …], "groups": [name, …]}
    {"do": "provision", "request": {…}}        to the autoscaler, instead of what it was asked before
From here:
    {"is": "listing", "nodes": …, "available": …, "actors": [{key, actor, node, report, note}, …],
        "groups": {name: [[node, resources], …]}}
    {"is": "nodes", "nodes": …, "available": …}       once a second: also the proof that all is well
    {"is": "made", "key": k, "actor": id}             {"is": "news", "key": k, **Host.news}
    {"is": "late", "keys": […], "groups": […]}        not reserved in time, and taken back whole
    {"is": "answer", "question": n, "said": …}        or "why" there is none
    {"is": "dead", "key": k, "text": …}               {"is": "failed", "key": k, "text": …}
    {"is": "asked", "problem": …}                     of the autoscaler; empty: all is well
    {"is": "down", "text": …}                         the cluster cannot be reached; the driver ends
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.exceptions
from ray._private.services import canonicalize_bootstrap_address
from ray._private.state import actors as actor_table
from ray._private.state import available_resources_per_node
from ray.util import (
    get_placement_group,
    list_named_actors,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from jobsched.backends.ray_actor import Host

Json = dict[str, Any]
T = TypeVar("T")

POLL_S = 1.0
START_S = 25.0
KNOCK_S = 2.0
"""Longest wait for the head to take a connection."""
WAIT_S = 10.0
"""How long one question for news stays open."""
FIRST_S = 5.0
"""Longest wait for an actor's answer while listing."""
PAUSE_S = 0.5
DEADLY = (
    ray.exceptions.RayActorError, ray.exceptions.RayTaskError, ray.exceptions.OutOfMemoryError,
    ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError,
)
"""What a question to an actor raises when there will be no answer any more; any other error is the cluster's."""
AT_ONCE = 16
"""Blocking calls at the same time."""


class Driver:
    """One connection to one cluster."""

    def __init__(self, server: Connection, settings: Json) -> None:
        self.server = server
        self.settings = settings
        self.namespace: str = settings["namespace"]
        self.prefix: str = settings["prefix"]
        self.address = ""
        self._actors: Json = {}
        self._groups: dict[str, Any] = {}
        self._removed: set[str] = set()
        self._pool = ThreadPoolExecutor(AT_ONCE)
        self._poller = ThreadPoolExecutor(1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._host = ray.remote(Host)

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        orders: asyncio.Queue[Json | None] = asyncio.Queue()
        removals: list[asyncio.Task[None]] = []

        def listen() -> None:
            with contextlib.suppress(EOFError, OSError):
                while True:
                    loop.call_soon_threadsafe(orders.put_nowait, self.server.recv())
            loop.call_soon_threadsafe(orders.put_nowait, None)

        await self._blocking(self._connect)
        self._tell({"is": "listing", **await self._listing()})
        threading.Thread(target=listen, daemon=True).start()
        self._aside(self._poll())
        while (order := await orders.get()) is not None:
            match order["do"]:
                case "start":
                    self._aside(self._start(order))
                case "attend":
                    self._aside(self._attend(order["key"], order["offset"]))
                case "stop":
                    self._call(order["key"], "stop", order["grace_ms"])
                case "ask":
                    self._aside(self._ask(order))
                case "stacks":
                    self._call(order["key"], "ask_stacks")
                case "remove":
                    removals = [one for one in removals if not one.done()]
                    removals.append(self._aside(self._remove(order)))
                case "provision":
                    self._aside(self._provision(order["request"]))
        if removals:
            await asyncio.wait(removals, timeout=FIRST_S)

    # the cluster --------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        address = self.settings["address"]
        if address == "auto":
            address = canonicalize_bootstrap_address("auto") or self._started()
        knock(address)  # Ray itself would try for half a minute
        ray.init(address, namespace=self.namespace, log_to_driver=False, logging_level="ERROR")
        self.address = ray.get_runtime_context().gcs_address

    def _started(self) -> str:
        """The address of a new cluster on this machine, which outlives us."""
        if not self.settings["start"]:
            raise ConnectionError("no Ray cluster runs on this machine; start one with: ray start --head")
        start = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--disable-usage-stats"]
        done = subprocess.run(start, capture_output=True, text=True, timeout=START_S, check=False)
        if done.returncode:
            raise ConnectionError(f"ray start --head failed: {done.stderr.strip()[-500:]}")
        return canonicalize_bootstrap_address("auto") or ""

    async def _listing(self) -> Json:
        """Everything of ours, each actor with its newest report (None: it does not answer yet)."""
        nodes = await self._blocking(self._look)
        named = await self._blocking(lambda: list_named_actors(all_namespaces=True))
        ours = [one["name"] for one in named
                if one["namespace"] == self.namespace and one["name"].startswith(self.prefix)]
        found = [one for one in await asyncio.gather(*map(self._found, ours)) if one is not None]
        groups = {}
        table = await self._blocking(placement_group_table)
        for one in table.values():
            if one["name"].startswith(self.prefix) and one["state"] != "REMOVED":
                places = one["bundles_to_node_id"]
                groups[one["name"]] = [[places.get(at, ""), one["bundles"][at]] for at in sorted(one["bundles"])]
        return {**nodes, "actors": found, "groups": groups}

    async def _found(self, name: str) -> Json | None:
        try:
            actor = await self._blocking(lambda: ray.get_actor(name, namespace=self.namespace))
        except ValueError:  # it has just gone
            return None
        key = name.removeprefix(self.prefix)
        self._actors[key] = actor
        ident = actor._actor_id.hex()
        known = await self._blocking(lambda: actor_table(ident))
        news: Json = {"report": None, "note": {}}
        with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
            news = await asyncio.wait_for(_answer(actor.news.remote(0, -1, 0.0)), FIRST_S)
        node = known["Address"]["NodeID"]
        return {"key": key, "actor": ident, "node": node, "report": news["report"], "note": news["note"]}

    def _look(self) -> Json:
        knock(self.address)
        return {"nodes": [node for node in ray.nodes() if node["Alive"]], "available": available_resources_per_node()}

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            found = await asyncio.get_running_loop().run_in_executor(self._poller, self._look)
            self._tell({"is": "nodes", **found})

    # replicas -----------------------------------------------------------------------------------------------------

    async def _start(self, order: Json) -> None:
        groups, actors = order["groups"], order["actors"]
        try:
            for group in groups:
                self._groups[group["name"]] = await self._blocking(partial(self._group, group))
            seconds = self.settings["bind_s"]
            waits = [self._blocking(partial(self._groups[group["name"]].wait, seconds)) for group in groups]
            if not all(await asyncio.gather(*waits)):
                for group in groups:
                    await self._drop_group(group["name"])
                late = {group["name"] for group in groups}
                keys = [one["key"] for one in actors if one["group"] in late]
                self._tell({"is": "late", "keys": keys, "groups": sorted(late)})
                actors = [one for one in actors if one["group"] not in late]
            archives = {path: ray.put(Path(path).read_bytes())
                        for path in dict.fromkeys(one["archive"] for one in actors) if path}
        except (ray.exceptions.RayError, ValueError, OSError) as error:
            for one in actors:
                self._tell({"is": "failed", "key": one["key"], "text": str(error)})
            return
        await asyncio.gather(*(self._make(one, archives) for one in actors))

    def _group(self, group: Json) -> Any:
        with contextlib.suppress(ValueError):  # left by a driver that ended between this and the actors
            remove_placement_group(get_placement_group(group["name"]))
        return placement_group(
            group["bundles"], name=group["name"], lifetime="detached", bundle_label_selector=group["selectors"])

    async def _make(self, one: Json, archives: Json) -> None:
        key = one["key"]
        if key in self._removed:
            return
        try:
            actor = await self._blocking(lambda: self._actor(one, archives))
        except (ray.exceptions.RayError, ValueError) as error:
            self._tell({"is": "failed", "key": key, "text": str(error)})
            return
        if key in self._removed:
            await self._kill(actor)
            return
        self._actors[key] = actor
        self._tell({"is": "made", "key": key, "actor": actor._actor_id.hex()})
        await self._attend(key, 0)

    def _actor(self, one: Json, archives: Json) -> Any:
        group = self._groups.get(one["group"]) or get_placement_group(one["group"])
        options = self._host.options(
            name=self.prefix + one["key"], namespace=self.namespace, lifetime="detached", get_if_exists=True,
            max_restarts=0, max_concurrency=16, **one["demand"],
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, one["bundle"]))
        settings = self.settings
        return options.remote(
            settings["place"], settings["owner"], settings["supervisor"], one["order"], archives.get(one["archive"]),
            one["ray_gpus"], one["note"])

    async def _attend(self, key: str, offset: int) -> None:
        """Relay an actor's news until its replica has ended, or it has."""
        version, actor = 0, self._actors.get(key)
        while actor is not None and key in self._actors and self._actors[key] is actor:
            try:
                news = await _answer(actor.news.remote(version, offset, WAIT_S))
            except ray.exceptions.ActorUnavailableError:
                await asyncio.sleep(PAUSE_S)
                continue
            except DEADLY as error:
                if self._actors.get(key) is actor:
                    self._tell({"is": "dead", "key": key, "text": str(error)})
                    await self._kill(actor)  # Ray may be about to make it anew
                return
            version, offset = news["version"], news["begin"] + len(news["data"])
            self._tell({"is": "news", "key": key, **news})
            if news["drained"]:
                return

    def _call(self, key: str, method: str, *args: object) -> None:
        """An order to an actor; what comes of it is seen in its news."""
        if (actor := self._actors.get(key)) is not None:
            with contextlib.suppress(ray.exceptions.RayError):
                getattr(actor, method).remote(*args)

    async def _ask(self, order: Json) -> None:
        """Ask an actor something, and tell what it says; `why` tells why there is no answer."""
        answer: Json = {"why": "it has no actor"}
        if (actor := self._actors.get(order["key"])) is not None:
            try:
                said = getattr(actor, order["method"]).remote(*order["args"])
                answer = {"said": await asyncio.wait_for(_answer(said), WAIT_S)}
            except (*DEADLY, ray.exceptions.ActorUnavailableError, TimeoutError, AttributeError) as error:
                answer = {"why": f"its actor does not answer: {str(error).strip().splitlines()[-1:]}"}
        self._tell({"is": "answer", "question": order["question"], **answer})

    async def _remove(self, order: Json) -> None:
        self._removed.update(order["keys"])

        async def gone(actor: Any) -> None:
            with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
                if order["recorded"]:
                    await asyncio.wait_for(_answer(actor.forget.remote()), FIRST_S)
            await self._kill(actor)

        actors = [self._actors.pop(key, None) for key in order["keys"]]
        await asyncio.gather(*(gone(actor) for actor in actors if actor is not None))
        for name in order["groups"]:
            await self._drop_group(name)

    async def _provision(self, request: Json) -> None:
        """On the poller's thread, so that the newest request is the last."""
        problem = await asyncio.get_running_loop().run_in_executor(self._poller, partial(_ask_for_nodes, request))
        self._tell({"is": "asked", "problem": problem})

    async def _kill(self, actor: Any) -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            await self._blocking(lambda: ray.kill(actor))

    async def _drop_group(self, name: str) -> None:
        def drop() -> None:
            with contextlib.suppress(ValueError):  # it has gone already
                remove_placement_group(self._groups.pop(name, None) or get_placement_group(name))

        await self._blocking(drop)

    # plumbing -----------------------------------------------------------------------------------------------------

    def _tell(self, message: Json) -> None:
        self.server.send(message)

    async def _blocking(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)

    def _aside(self, work: Awaitable[None]) -> asyncio.Task[None]:
        """On its own; any trouble that is not handled there means that the cluster is away."""

        async def guarded() -> None:
            try:
                await work
            except Exception as error:
                end(self.server, error)

        task = asyncio.ensure_future(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def knock(address: str) -> None:
    """Whether the head takes connections. OSError when it does not."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), KNOCK_S).close()


def _ask_for_nodes(request: Json) -> str:
    """What is wrong with that; empty when nothing is."""
    from ray.autoscaler.sdk import request_resources
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    try:
        request_resources(**request)
        if request["bundles"] and not is_autoscaler_v2():
            return "this cluster's autoscaler is Ray's first one, which knows pools only by the size of their nodes"
    except (ray.exceptions.RayError, ValueError) as error:
        return str(error)
    return ""


async def _answer(ref: Any) -> Any:
    return await ref


def end(server: Connection, error: BaseException) -> None:
    """Say why, and end at once: Ray's own threads may never."""
    with contextlib.suppress(OSError):
        words = str(error).strip() or "no reason given"
        server.send({"is": "down", "text": f"{type(error).__name__}: {words.splitlines()[0][:300]}"})
    os._exit(1)


def main() -> None:
    with Connection(int(sys.argv[1])) as server:
        try:
            asyncio.run(Driver(server, server.recv()).run())
        except BaseException as error:
            end(server, error)
    os._exit(0)


if __name__ == "__main__":
    main()
