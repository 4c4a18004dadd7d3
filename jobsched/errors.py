"""The exception tree: every error a user can meet, with its code, HTTP status, exit code and hint.

    JobschedError                     E001  500  exit 1
    ├── UsageError                    E100  400  exit 2    flags or arguments that make no sense together
    ├── SpecError                     E200  422  exit 7    a job file or trace is wrong (carries every problem found)
    ├── Unplaceable                   E217  422  exit 8    no node of the cluster can ever hold the job
    ├── NotFound                      E300  404  exit 3
    ├── AuthError                     E400  401  exit 4
    ├── Forbidden                     E403  403  exit 4
    ├── Conflict                      E500  409  exit 5    changed since you looked, or the state does not allow it
    │   └── StaleFence                E510  409  exit 5    an outdated leader tried to decide
    ├── Unreachable                   E600  503  exit 6    server, store or engine cannot be reached
    │   ├── BackendUnreachable        E610  503  exit 6
    │   └── StoreUnavailable          E620  503  exit 6
    ├── WaitTimeout                   E700  504  exit 124  a bounded wait ran out
    ├── MissingExtra                  E031  501  exit 1    an optional package is not installed
    ├── ConfigError                   E040  400  exit 2    a server or client configuration file is wrong
    └── JobFailed                     E800  409  exit 1    raised by the SDK when a job you wait for did not succeed

Raised everywhere, imported by everyone, imports nothing but the standard library. Programmer errors are assertions,
never members of this tree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a document: where it stands, what is wrong, what to do.

    `line` and `column` count from 1; 0 means the document has no position there (for example a Python dict), or that
    the whole line is meant.
    """

    message: str
    field: str = ""
    file: str = ""
    line: int = 0
    column: int = 0
    hint: str = ""
    code: str = "E200"

    @property
    def place(self) -> str:
        """`file:line:column` as far as it is known."""
        parts = [self.file or "<spec>"]
        if self.line:
            parts += [str(self.line), str(self.column)] if self.column else [str(self.line)]
        return ":".join(parts)


class JobschedError(Exception):
    """Base of all errors users meet."""

    code = "E001"
    http_status = 500
    exit_code = 1
    problems: tuple[Problem, ...] = ()
    """Every thing wrong with a document, in its order; empty for errors that are not about documents."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def to_wire(self) -> dict[str, object]:
        """The JSON body that the API sends and `-o json` prints."""
        body: dict[str, object] = {"code": self.code, "message": self.message, "hint": self.hint}
        return body | {"problems": [asdict(p) for p in self.problems]} if self.problems else body

    def render(self) -> str:
        """The text a terminal shows: what, where, why, what to do."""
        blocks = [
            (f"error[{p.code}]: {p.message}\n  --> {p.place}" + (f"  {p.field}" if p.field else ""), p.hint)
            for p in self.problems
        ] or [(f"error[{self.code}]: {self.message}", self.hint)]
        return "\n".join(f"{text}\n  hint: {hint}" if hint else text for text, hint in blocks)


def _summary(problems: Sequence[Problem]) -> str:
    first = problems[0].message if problems else "the document is not valid"
    return f"{len(problems)} problems: {first}; …" if len(problems) > 1 else first


class UsageError(JobschedError):
    code, http_status, exit_code = "E100", 400, 2


class SpecError(JobschedError):
    """A job file, queue file, trace or dict is wrong; `problems` holds every one found, in document order."""

    code, http_status, exit_code = "E200", 422, 7

    def __init__(self, problems: Sequence[Problem], *, hint: str = "") -> None:
        super().__init__(_summary(problems), hint=hint)
        self.problems = tuple(problems)


class Unplaceable(JobschedError):
    code, http_status, exit_code = "E217", 422, 8


class NotFound(JobschedError):
    code, http_status, exit_code = "E300", 404, 3


class AuthError(JobschedError):
    code, http_status, exit_code = "E400", 401, 4


class Forbidden(JobschedError):
    code, http_status, exit_code = "E403", 403, 4


class Conflict(JobschedError):
    code, http_status, exit_code = "E500", 409, 5


class StaleFence(Conflict):
    """A decision was appended with a fence older than the current leader's."""

    code = "E510"


class Unreachable(JobschedError):
    code, http_status, exit_code = "E600", 503, 6


class BackendUnreachable(Unreachable):
    """The engine behind a backend did not answer; nothing is known about its replicas, so nothing is decided."""

    code = "E610"


class StoreUnavailable(Unreachable):
    code = "E620"


class WaitTimeout(JobschedError):
    code, http_status, exit_code = "E700", 504, 124


class MissingExtra(JobschedError):
    """An optional package is not installed; the hint is the `pip install` line."""

    code, http_status, exit_code = "E031", 501, 1


class ConfigError(JobschedError):
    """A configuration file is wrong; `problems` says where, when it is a YAML file whose places are known."""

    code, http_status, exit_code = "E040", 400, 2

    def __init__(self, message: str = "", *, hint: str = "", problems: Sequence[Problem] = ()) -> None:
        super().__init__(message or _summary(problems), hint=hint)
        self.problems = tuple([replace(problem, code=self.code) for problem in problems])


class JobFailed(JobschedError):
    """A job that was waited for did not succeed; `cause` tells the first failing replica, code and last log lines."""

    code, http_status, exit_code = "E800", 409, 1


def all_errors() -> Mapping[str, type[JobschedError]]:
    """Code -> class for the whole tree (`jobsched help E217`, and the client turning a body back into an error)."""
    found: dict[str, type[JobschedError]] = {}
    todo: list[type[JobschedError]] = [JobschedError]
    while todo:
        cls = todo.pop()
        found[cls.code] = cls
        todo.extend(cls.__subclasses__())
    return dict(sorted(found.items()))
