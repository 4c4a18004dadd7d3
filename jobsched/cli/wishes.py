"""Commands that change jobs that are there. `update`, which reads a spec, is in `submit.py`."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Sequence

import click

from jobsched.cli import attach, render
from jobsched.cli.connection import connected, for_each, path_of
from jobsched.cli.jobs import JOB_COLUMNS, page, progress
from jobsched.cli.render import View, output_options, talk
from jobsched.client.documents import TERMINAL, Document, saved_since, user
from jobsched.client.remote import Remote
from jobsched.errors import UsageError, WaitTimeout

SETTLE_S = 0.3
"""Longest wait for the server to act on a wish before the job is shown."""


def _wish(ctx: click.Context, refs: Sequence[str], verb: str, body: Document, view: View, *, safe: bool = True) -> int:
    """Do the same to each job; what fails is reported and does not keep the others from being done."""
    with connected(ctx) as remote:

        def wish(ref: str) -> Document:
            answer = remote.post(f"{path_of(remote, ref)}/{verb}", {"by": user(), **body}, safe=safe)
            return render.job_document(json.loads(answer))

        receipts, worst = for_each(refs, wish)
        done = _settled(remote, receipts)
    render.show_list(view, JOB_COLUMNS, done, name="jobs", key="id")
    return worst


def _settled(remote: Remote, receipts: Sequence[Document]) -> list[Document]:
    """The jobs once the server has acted on the wish, or as they are after `SETTLE_S`: a receipt only tells that the
    wish is written down."""
    until = time.monotonic() + SETTLE_S
    settled = []
    for receipt in receipts:
        while (now := attach.fetch(remote, receipt["id"]))["version"] <= receipt["version"]:
            if time.monotonic() > until:
                break
            time.sleep(0.02)
        settled.append(now)
    return settled


def _wish_command(name: str, verb: str, body: Callable[[], Document], text: str, *, ask: str = "", safe: bool = True
                  ) -> click.Command:
    @click.command(name, help=f"{text}\n\n\b\nExample:\n  jobsched {name} JOB{' -y' if ask else ''}")
    @click.argument("jobs", nargs=-1, metavar="JOB...")
    @click.option("-l", "--label", metavar="K=V", help="All jobs with this label that have not ended.")
    @click.option("-y", "--yes", is_flag=True, hidden=not ask, help="Do not ask.")
    @output_options
    @click.pass_context
    def command(ctx: click.Context, jobs: Sequence[str], label: str | None, yes: bool, view: View) -> int:
        if bool(jobs) == bool(label):
            raise UsageError("name jobs, or a label that they have", hint=f"jobsched {name} JOB, or -l team=vision")
        if label:
            with connected(ctx) as remote:
                jobs = [d["id"] for d in page(remote, {"label": label, "limit": 1_000})[0]]
        if ask and sys.stdin.isatty():
            render.confirm(ask.format(", ".join(jobs)), yes=yes, command=f"jobsched {name} {' '.join(jobs)}")
        return _wish(ctx, jobs, verb, body(), view, safe=safe)

    return command


cancel = _wish_command("cancel", "cancel", dict,
                       "Cancel jobs: running ones save and stop. Asks first on a terminal.", ask="Cancel {}?")
hold = _wish_command("hold", "hold", lambda: {"stop": False},
                     "Keep waiting jobs from starting; running ones run on, but do not start again.")
release = _wish_command("release", "release", dict, "Let held jobs start.")
suspend = _wish_command("suspend", "hold", lambda: {"stop": True},
                        "Save and stop running jobs, and keep them in the queue until 'jobsched resume'.")
resume = _wish_command("resume", "release", dict, "Let suspended or held jobs go on.")
restart = _wish_command("restart", "restart", dict, "Save, stop and start jobs anew from their last checkpoint.",
                        safe=False)


@click.command()
@click.argument("job")
@click.option("--timeout", default="2m", show_default=True, metavar="2m", help="Longest wait for it; then exit 124.")
@click.option("--no-wait", is_flag=True, help="Only ask.")
@click.pass_context
def checkpoint(ctx: click.Context, job: str, timeout: str, no_wait: bool) -> None:
    """Have a running job save now, and go on. Its scripts must listen: context.should_checkpoint(), or a handler of the
    checkpoint signal.

    \b
    Example:
      jobsched checkpoint @last
    """
    until = time.monotonic() + (render.seconds(timeout) or 0)
    with connected(ctx) as remote:
        path = path_of(remote, job)
        document = attach.fetch(remote, job)
        before, step = document["checkpoint"], progress(document, "step")
        asked = json.loads(remote.post(f"{path}/checkpoint"))["asked"]
        names = ", ".join(asked[:8]) + ("…" if asked[8:] else "")
        talk(f"asked {render.count(len(asked), 'replica')} to save: {names}")
        while not no_wait and not saved_since(before, document["checkpoint"], -1 if step is None else step):
            if document["phase"] in TERMINAL or time.monotonic() > until:
                raise WaitTimeout(f"job {document['name']} ({document['phase']}) did not save",
                                  hint=f"jobsched logs {document['id']}")
            time.sleep(0.1)
            document = attach.fetch(remote, document["id"])
        if not no_wait:
            mark = document["checkpoint"]
            render.write(f"step {mark['step']} of attempt {mark['attempt']}: {mark['path']}\n")


@click.command()
@click.argument("job")
@click.argument("counts", nargs=-1, required=True, metavar="ROLE=N...")
@output_options
@click.pass_context
def scale(ctx: click.Context, job: str, counts: Sequence[str], view: View) -> int:
    """Change how many replicas an elastic role should have. Parameter servers (role ps) change their number with a new
    attempt, which goes on from their checkpoints.

    \b
    Examples:
      jobsched scale @last worker=8
      jobsched scale @last ps=2
    """
    wanted = {}
    for text in counts:
        match = re.fullmatch(r"([a-z0-9-]+)=(\d+)", text)
        if match is None:
            raise UsageError(f"{text!r} is not ROLE=N", hint="jobsched scale JOB worker=8")
        wanted[match[1]] = int(match[2])
    return _wish(ctx, [job], "scale", {"wanted": wanted}, view)
