"""How commands reach their server: the options of the root command, then the client's own way of finding it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from urllib.parse import quote

import click

from jobsched.cli.render import talk
from jobsched.client import locate
from jobsched.client.documents import Document, reference, user
from jobsched.client.remote import Remote
from jobsched.errors import JobschedError


def connected(ctx: click.Context, *, start: bool = False) -> Remote:
    """A connection, to be closed by the caller. `start`: with no server configured, an embedded one is started, and
    stderr says so. Raises `Unreachable` otherwise."""
    server = ctx.meta.get("server")
    token_file = ctx.meta.get("token_file")
    if start:
        return locate.connect(locate.find_or_start(server, token_file=token_file, say=talk))
    return locate.connect(locate.find(server, token_file=token_file))


def segment(name: str) -> str:
    """A node name or job reference as one segment of a URL."""
    return quote(name, safe="")


def for_each(refs: Sequence[str], ask: Callable[[str], Document]) -> tuple[list[Document], int]:
    """What `ask` answers for each job, and the worst exit code; what fails is reported and does not keep the others
    from being asked. A single one that fails raises."""
    answers, worst = list[Document](), 0
    for ref in refs:
        try:
            answers.append(ask(ref))
        except JobschedError as exc:
            if len(refs) == 1:
                raise
            talk(exc.render())
            worst = max(worst, exc.exit_code)
    return answers, worst


def path_of(remote: Remote, ref: str) -> str:
    """`jobs/…` for what a user called a job; `@last` is the newest of the user's own."""
    if ref == "@last":
        return f"jobs/{remote.documents('jobs/@last', owner=user())['job']['id']}"
    return f"jobs/{reference(ref)}"
