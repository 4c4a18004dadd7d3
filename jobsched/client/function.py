"""Functions as jobs: `@jobsched.task(gpus=2)` and `client.submit(fn, x)`, from a script or a notebook.

The function and its arguments are pickled by value (cloudpickle) into a folder below the home directory, the job runs
`python -m jobsched.client.call FOLDER`, and rank 0's return value comes back through a file there. So client and nodes
must share that folder and the Python minor version; the runner checks the latter and says so.
"""

from __future__ import annotations

import inspect
import os
import pickle
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping
from functools import update_wrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

from jobsched.client import settings
from jobsched.client.call import python_version
from jobsched.errors import NotFound, UsageError
from jobsched.load import load_job_dict

if TYPE_CHECKING:
    from jobsched.client.client import Client, JobArray, JobHandle
    from jobsched.spec.job import JobSpec

P = ParamSpec("P")
R = TypeVar("R")
Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments of one call."""

ROLE_FIELDS = ("replicas", "cpu", "memory", "gpu", "image", "working_dir", "procs", "preload", "ports")


def task(**options: Any) -> Callable[[Callable[P, R]], Task[P, R]]:
    """Decorator: `@jobsched.task(gpus=2, replicas=4, queue="research")`. Options are fields of the role (`replicas`,
    `cpu`, `memory`, `gpu` or `gpus`, …) and of the job (`name`, `queue`, `env`, `time_limit`, …)."""
    return lambda function: Task(function, options)


class Task(Generic[P, R]):
    """A function that can be run here (`local`, or a plain call) or as a job (`submit`, `map`)."""

    def __init__(self, function: Callable[P, R], options: Mapping[str, Any]) -> None:
        self.function = function
        self.options = dict(options)
        update_wrapper(self, function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.function(*args, **kwargs)

    def local(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run here and now, without jobsched."""
        return self.function(*args, **kwargs)

    def submit(self, *args: P.args, **kwargs: P.kwargs) -> JobHandle:
        """Run as a job of the configured server; `result()` of the handle is what the function returns."""
        return _client().submit_spec(self.spec(args, kwargs, {}))

    def map(self, items: Iterable[Any], *, max_parallel: int = 0, client: Client | None = None) -> JobArray:
        """One job per item, `function(item)` each, at most `max_parallel` at a time (0: no limit); results in order."""
        from jobsched.client.client import JobArray

        calls: list[Call] = [((item,), {}) for item in items]
        if not calls:
            raise UsageError("map needs at least one item")
        array = {"indices": list(range(len(calls))), "max_parallel": max_parallel}
        spec = self._spec(calls, {"array": array})
        members = (client or _client()).submit_spec(spec)
        assert isinstance(members, JobArray)
        return members

    def spec(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], overrides: Mapping[str, Any]) -> JobSpec:
        """The job that calls the function with these arguments; writes the call's folder."""
        return self._spec([(args, dict(kwargs))], overrides)

    def _spec(self, calls: list[Call], overrides: Mapping[str, Any]) -> JobSpec:
        options = self.options | dict(overrides)
        if "gpus" in options:
            options["gpu"] = options.pop("gpus")
        role = {name: options.pop(name) for name in ROLE_FIELDS if name in options}
        folder = write_call(self.function, calls)
        role["command"] = [sys.executable, "-m", "jobsched.client.call", str(folder)]
        role.setdefault("working_dir", os.getcwd())
        name = "".join(c if c.isalnum() else "-" for c in getattr(self.function, "__name__", "call").lower()).strip("-")
        env = {**options.pop("env", {}), "JOBSCHED_CALL_DIR": str(folder)}
        return load_job_dict({"name": name[:52] or None, **options, "env": env, "roles": {"worker": role}},
                             environ=os.environ)


def write_call(function: Callable[..., Any], calls: list[Call]) -> Path:
    """Pickle a function and the arguments of each call into a new private folder."""
    import cloudpickle

    folder = settings.home() / "calls" / uuid.uuid4().hex
    folder.mkdir(parents=True, mode=0o700)
    module = inspect.getmodule(function)
    with (folder / "call.pkl").open("wb") as out:
        if module is not None and _is_users(module):  # the job cannot import the user's script: take it along
            cloudpickle.register_pickle_by_value(module)
            try:
                cloudpickle.dump((function, calls), out)
            finally:
                cloudpickle.unregister_pickle_by_value(module)
        else:
            cloudpickle.dump((function, calls), out)
    (folder / "python").write_text(python_version())
    return folder


def read_result(folder: Path, index: int) -> Any:
    """What call number `index` returned. Raises `NotFound` when its folder is gone or not visible from here."""
    try:
        return pickle.loads((folder / f"result-{index}.pkl").read_bytes())
    except OSError as exc:
        raise NotFound(f"the result of the call in {folder} is not there: {exc}",
                       hint="results are kept in the home directory of the client that submitted the function") from exc


def _is_users(module: Any) -> bool:
    """Neither __main__ (cloudpickle takes it by value anyway) nor an installed package."""
    file = getattr(module, "__file__", None)
    if not file or module.__name__ == "__main__":
        return False
    installed = (Path(sys.prefix), Path(os.__file__).parent, Path(__file__).parents[1])
    return not any(Path(file).resolve().is_relative_to(place.resolve()) for place in installed)


def _client() -> Client:
    from jobsched.client.client import connect

    return connect()
