"""Commands that turn a job file or a command line into a job: run, submit, plan, validate, init, schema.

Reading job files needs the models and the YAML reader, so these take half a second to start; the commands of `jobs` do
not.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from jobsched.cli import attach, render
from jobsched.cli.connection import connected, for_each, path_of
from jobsched.cli.explain import reasons
from jobsched.cli.jobs import JOB_COLUMNS
from jobsched.cli.render import View, output_options, talk
from jobsched.client.documents import Document, submission, user
from jobsched.errors import SpecError, UsageError

if TYPE_CHECKING:
    from jobsched.spec.job import JobSpec

F = TypeVar("F", bound=Callable[..., Any])
TEMPLATES = ("ps", "ddp", "elastic", "array")


def spec_options(command: F) -> F:
    """The options that fill or change fields of the job."""
    for option in (
        click.option("--if-exists", type=click.Choice(["fail", "skip", "replace"]), default=None,
                     help="What to do when a live job has the name."),
        click.option("--hold", is_flag=True, help="Do not start it before 'jobsched release'."),
        click.option("--after", multiple=True, metavar="JOB", help="Start only after this job has succeeded."),
        click.option("--array", metavar="0-9%4", help="Once per index, at most 4 at a time."),
        click.option("--time-limit", metavar="2h", help="Longest run of all attempts together."),
        click.option("--priority", metavar="N|CLASS", help="Higher goes first within the queue."),
        click.option("--queue", metavar="NAME", help="Queue to wait in."),
        click.option("--name", metavar="NAME", help="Name of the job."),
        click.option("-e", "--env", multiple=True, metavar="K=V", help="Variable; K alone takes the caller's."),
        click.option("--set", "changes", multiple=True, metavar="A.B=C", help="Any field: roles.worker.replicas=6."),
        click.option("--image", metavar="IMAGE", help="Container image."),
        click.option("--role", "roles", multiple=True, metavar="NAME=N", help="Replicas of a role."),
        click.option("--gpus", metavar="N|KIND:N", help="GPUs of each replica of a command line job."),
    ):
        option(command)
    return command


@click.command()
@click.argument("words", nargs=-1, metavar="FILE | -- COMMAND...")
@spec_options
@click.option("--timeout", metavar="2h", help="Stop watching after this long (exit 124); the job goes on.")
@output_options
@click.pass_context
def run(ctx: click.Context, /, words: Sequence[str], view: View, timeout: str | None, **options: Any) -> int:
    """Submit a job, show its progress and logs, and exit with its code.

    Ctrl-C only stops watching; the job goes on. With -o json, logs go to stderr and the last line of stdout is a JSON
    object with phase, attempts, restarts, metrics and exit_code.

    \b
    Examples:
      jobsched run job.yaml
      jobsched run --gpus 2 --role worker=4 -- python train.py --lr 0.1
    """
    answer = _submit_one(ctx, words, options)
    with connected(ctx) as remote:
        return attach.follow(remote, answer, view, timeout_s=render.seconds(timeout))


@click.command()
@click.argument("words", nargs=-1, metavar="FILE | - | -- COMMAND...")
@spec_options
@click.option("--wait", "wait_for_end", is_flag=True, help="Wait for the end and exit with the job's code.")
@click.option("--timeout", metavar="2h", help="With --wait: longest wait (exit 124).")
@output_options
@click.pass_context
def submit(
    ctx: click.Context, /, words: Sequence[str], view: View, wait_for_end: bool, timeout: str | None, **options: Any
) -> int:
    """Submit a job and print its id.

    \b
    Examples:
      jobsched submit job.yaml --set roles.worker.replicas=6 -e LR=0.1
      id=$(jobsched submit -q --array 0-9%4 -- ./sweep.sh)
      jobsched submit --wait - < job.yaml
    """
    page = _submit(ctx, words, options)
    documents = [render.job_document(a) for a in page["jobs"]]
    if view.format in ("table", "wide"):
        for document in documents:
            render.write(f"{document['id']}\n")
            if not view.quiet:
                held = ", held" if document["held"] else ""
                talk(f"submitted {document['name']} to queue {document['spec']['queue']}{held}")
        if not view.quiet and sys.stderr.isatty():
            talk(f"  follow: jobsched logs -f {documents[0]['id']}\n  cancel: jobsched cancel {documents[0]['id']}")
    else:
        render.show_list(view, (), documents, name="jobs", key="id")
    if not wait_for_end:
        return 0
    with connected(ctx) as remote:
        codes = [attach.wait(remote, d["id"], "done", render.seconds(timeout)) for d in documents]
    return max(codes)  # of an array the highest, as with sbatch -W


@click.command()
@click.argument("jobs", nargs=-1, required=True, metavar="JOB...")
@click.option("-f", "--file", "file", metavar="FILE", help="A job file that says what the job shall be; -: stdin.")
@click.option("--priority", metavar="N|CLASS", help="A number, or a class such as high; higher goes first.")
@click.option("--queue", metavar="NAME", help="Queue to wait in.")
@click.option("--time-limit", metavar="2h", help="Longest run of all attempts together.")
@click.option("--image", metavar="IMAGE", help="Container image.")
@click.option("-e", "--env", multiple=True, metavar="K=V", help="Variable; K alone takes the caller's.")
@click.option("--set", "changes", multiple=True, metavar="A.B=C", help="Any field: roles.worker.gpu=4.")
@click.option("--dry-run", is_flag=True, help="Only say what would change, and whether the job would start anew.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask before a running job is started anew.")
@output_options
@click.pass_context
def update(
    ctx: click.Context, /, jobs: Sequence[str], view: View, file: str | None, dry_run: bool, yes: bool, **options: Any
) -> int:
    """Change jobs that wait or run. Labels, priority, time limits and the counts of elastic roles change in place; for
    anything else a running attempt saves, and the next one starts with it. Asks before that on a terminal.

    \b
    Examples:
      jobsched update @last --priority high
      jobsched update bert --set roles.worker.gpu=4 -e LR=0.1 --dry-run
      jobsched update bert -f job.yaml
    """
    method, body = _edit(file, _overrides(options))
    with connected(ctx) as remote:

        def change(job: str) -> Document:
            path = f"{path_of(remote, job)}/spec"
            if not (dry_run or yes) and sys.stdin.isatty():
                _confirm_edit(json.loads(remote.change(method, path, body, dry_run=True)), job)
            answer = json.loads(remote.change(method, path, body, dry_run=dry_run))
            if not view.quiet:
                talk(_edit_text(answer, dry_run))
            return {**render.job_document(answer), "fields": answer["fields"], "restart": answer["restart"]}

        done, worst = for_each(jobs, change)
    render.show_list(view, JOB_COLUMNS, done, name="jobs", key="id")
    return worst


@click.command()
@click.argument("file", metavar="FILE")
@click.argument("job", required=False)
@click.option("-e", "--env", multiple=True, metavar="K=V", help="Variable; K alone takes the caller's.")
@click.option("--set", "changes", multiple=True, metavar="A.B=C", help="Any field: roles.worker.gpu=4.")
@click.pass_context
def diff(ctx: click.Context, /, file: str, job: str | None, **options: Any) -> int:
    """Show what a job file would change of a job (default: the one with the file's name). Exits 0 when nothing differs,
    1 when something does.

    \b
    Example:
      jobsched diff job.yaml && echo up to date
    """
    method, body = _edit(file, _overrides(options))
    job = job or body["spec"]["name"]
    if not job:
        raise UsageError("the file gives the job no name", hint="jobsched diff FILE JOB")
    with connected(ctx) as remote:
        path = f"{path_of(remote, job)}/spec"
        before = remote.documents(path)
        answer = json.loads(remote.change(method, path, body, dry_run=True))
    for field in answer["fields"]:
        was, becomes = (json.dumps(_at(spec, field), sort_keys=True) for spec in (before, body["spec"]))
        render.write(f"{field}: {was} -> {becomes}\n")
    talk(_edit_text(answer, dry_run=True))
    return 1 if answer["fields"] else 0


def _at(spec: Any, path: str) -> Any:
    """The value of a field; None where there is none."""
    for step in path.split("."):
        spec = spec.get(step) if isinstance(spec, dict) else None
    return spec


def _edit(file: str | None, changes: dict[str, str]) -> tuple[Literal["PUT", "PATCH"], Document]:
    """How an edit is asked for, and its body: a whole spec, or some fields of the one that a job has."""
    if file is None:
        if not changes:
            raise UsageError("there is nothing to change", hint="for example: jobsched update JOB --priority 50")
        return "PATCH", {"by": user(), "changes": changes}
    from jobsched import load

    spec = load.load_job_file(file, environ=os.environ, overrides=changes)
    return "PUT", {"by": user(), "spec": spec.model_dump(mode="json")}


def _confirm_edit(answer: Document, job: str) -> None:
    if answer["restart"] and answer["job"]["phase"] in ("STARTING", "RUNNING"):
        question = f"{', '.join(answer['fields'])}: save, stop and start {answer['job']['name']} anew with it?"
        render.confirm(question, yes=False, command=f"jobsched update {job} …")


def _edit_text(answer: Document, dry_run: bool) -> str:
    if not answer["fields"]:
        return f"{answer['job']['name']}: nothing differs"
    how = "in place"
    if answer["restart"]:
        active = answer["job"]["phase"] in ("STARTING", "RUNNING", "STOPPING")
        how = "from the next attempt on; this one saves and stops" if active else "from its start on"
    return f"{answer['job']['name']}: {'would change' if dry_run else 'changed'} {', '.join(answer['fields'])}, {how}"


@click.command()
@click.argument("words", nargs=-1, metavar="FILE | -- COMMAND...")
@spec_options
@click.option("--exit-code", is_flag=True, help="Exit 0: starts now, 10: must wait, 8: never.")
@output_options
@click.pass_context
def plan(ctx: click.Context, /, words: Sequence[str], view: View, exit_code: bool, **options: Any) -> int:
    """Show where and when a job would run; change nothing.

    \b
    Example:
      jobsched plan job.yaml
    """
    spec = read(words, options)
    with connected(ctx, start=True) as remote:
        answer = json.loads(remote.post("plan", {"spec": spec.model_dump(mode="json"), "owner": user()}))
    render.show_one(view, answer, lambda: _plan_text(spec, answer), key="code")
    return int(answer["code"]) if exit_code else 0


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(allow_dash=True), metavar="FILE...")
@output_options
def validate(files: Sequence[str], view: View) -> int:
    """Check job files offline: every problem at once, each with file, line and column. Exit 7 if there is one.

    \b
    Example:
      jobsched validate jobs/*/job.yaml
    """
    from jobsched import load

    results: list[Document] = []
    for file in files:
        try:
            spec = load.load_job_file(file, environ=None)
        except SpecError as exc:
            results.append({"file": file, "ok": False, "problems": exc.to_wire()["problems"]})
            if not view.json:
                talk(exc.render())
        else:
            results.append({"file": file, "ok": True, "problems": []})
            for problem in load.warnings(spec):
                talk(f"warning: {file}: {problem.message} ({problem.field})\n  hint: {problem.hint}")
    columns = (render.Column("FILE", lambda r: r["file"]),
               render.Column("RESULT", lambda r: "ok" if r["ok"] else f"{len(r['problems'])} problems"))
    render.show_list(view, columns, results, name="files", key="file")
    return 0 if all(r["ok"] for r in results) else SpecError.exit_code


@click.command()
@click.argument("file", default="job.yaml", type=click.Path())
@click.option("--template", type=click.Choice(TEMPLATES), default="ddp", show_default=True, help="Kind of job.")
@click.option("--force", is_flag=True, help="Overwrite the file.")
def init(file: str, template: str, force: bool) -> None:
    """Write a commented job file to start from.

    \b
    Example:
      jobsched init --template ps job.yaml
    """
    from jobsched import load

    text = load.template(template)
    if file == "-":
        render.write(text)
        return
    path = Path(file)
    if path.exists() and not force:
        raise UsageError(f"{file} exists", hint="overwrite it with --force, or name another file")
    path.write_text(text)
    talk(f"wrote {file}; next: jobsched run {file}")


@click.command()
@click.option("--crd", is_flag=True, help="The definitions of TrainingJob and TrainingQueue for Kubernetes instead.")
def schema(crd: bool) -> None:
    """Print the JSON Schema of job files, for editors; or the Kubernetes definitions made from the same models.

    \b
    Examples:
      jobsched schema > job.v1.json     # then: # yaml-language-server: $schema=job.v1.json
      jobsched schema --crd | kubectl apply --server-side -f -
    """
    if crd:
        from jobsched.spec.crd import manifests

        render.write_yaml_documents(manifests(), "made by 'jobsched schema --crd'")
        return
    from jobsched import load

    render.write(json.dumps(load.json_schema(), indent=2) + "\n")


# ---- from words to a spec ----


def read(words: Sequence[str], options: dict[str, Any]) -> JobSpec:
    """The spec that the words (one file, `-`, or a command) and options ask for. Raises `SpecError` with every
    problem."""
    from jobsched import load

    if not words:
        raise UsageError("name a job file, or a command after '--'", hint="jobsched run --gpus 1 -- python train.py")
    overrides = _overrides(options)
    if len(words) == 1 and (words[0] == "-" or _is_job_file(words[0])):
        if options.get("gpus"):
            raise UsageError("--gpus is for commands; a job file says it per role",
                             hint="use --set roles.worker.gpu=2")
        return load.load_job_file(words[0], environ=os.environ, overrides=overrides)
    return load.load_job_dict(_command_job(words, options), environ=os.environ, overrides=overrides)


def _is_job_file(word: str) -> bool:
    return word.endswith((".yaml", ".yml", ".json"))


def _command_job(words: Iterable[str], options: dict[str, Any]) -> Document:
    """The job of a bare command: every role runs it, in the directory where it was typed."""
    counts = _roles(options) or {"worker": "1"}
    role: Document = {"command": list(words)}
    if options.get("gpus"):
        role["gpu"] = options["gpus"]
    return {"working_dir": os.getcwd(), "roles": {name: dict(role) for name in counts}}


def _overrides(options: dict[str, Any]) -> dict[str, str]:
    """Options as `path -> text`, the form of --set; later ones win."""
    named = {"name": "name", "queue": "queue", "priority": "priority", "time_limit": "time_limit", "array": "array",
             "image": "image"}
    found = {path: str(options[option]) for option, path in named.items() if options.get(option)}
    found |= {f"roles.{name}.replicas": count for name, count in _roles(options).items()}
    if options.get("after"):
        found["after"] = json.dumps(list(options["after"]))
    for pair in options.get("env", ()):
        name, equals, value = pair.partition("=")
        if not equals and name not in os.environ:
            raise UsageError(f"-e {name}: it is not set here", hint=f"-e {name}=VALUE")
        found[f"env.{name}"] = json.dumps(value if equals else os.environ[name])
    for change in options.get("changes", ()):
        path, equals, value = change.partition("=")
        if not equals or not path:
            raise UsageError(f"--set {change!r} is not FIELD=VALUE", hint="--set roles.worker.replicas=6")
        found[path] = value
    return found


def _roles(options: dict[str, Any]) -> dict[str, str]:
    roles = {}
    for text in options.get("roles", ()):
        name, equals, count = text.partition("=")
        if not equals or not name or not count:
            raise UsageError(f"--role {text!r} is not NAME=COUNT", hint="--role worker=4")
        roles[name] = count
    return roles


def _submit(ctx: click.Context, words: Sequence[str], options: dict[str, Any]) -> Document:
    spec = read(words, options).model_dump(mode="json")
    body = submission(spec, if_exists=options.get("if_exists") or "", hold=bool(options.get("hold")))
    with connected(ctx, start=True) as remote:
        page: Document = json.loads(remote.post("jobs", body))
    return page


def _submit_one(ctx: click.Context, words: Sequence[str], options: dict[str, Any]) -> Document:
    if options.get("array"):
        raise UsageError("run shows one job, not an array", hint="use 'jobsched submit --wait --array …'")
    jobs = _submit(ctx, words, options)["jobs"]
    if len(jobs) > 1:
        raise UsageError(f"run shows one job, and this is an array of {len(jobs)}, which was submitted",
                         hint=f"jobsched jobs --array {jobs[0]['job']['array_id']}")
    document: Document = jobs[0]
    return document


def _plan_text(spec: JobSpec, answer: Document) -> str:
    head = f"Job {spec.name or '(unnamed)'}   queue {spec.queue} · priority {spec.priority_class or spec.priority}\n"
    columns = (render.Column("ROLE", lambda r: r["role"]), render.Column("REPLICAS", lambda r: r["replicas"]),
               render.Column("EACH", lambda r: r["each"]), render.Column("WHERE", lambda r: " ".join(r["where"])))
    verdict = answer.get("verdict")
    ending = {0: "Starts now.", 10: "Must wait.", 8: "Can never start here."}[answer["code"]]
    where = render.plain_table(columns, answer["roles"]) if answer["roles"] else ""
    lines = [ending, *reasons(verdict)]
    if answer["victims"]:
        lines[0] = "Starts as soon as others have made room:"
        lines[1:] = [f"  {v['name']} ({v['job_id']}) {v['how']}" + (
            f"; {v['unsaved_gpu_s']:g} GPU-seconds since its last checkpoint" if v["unsaved_gpu_s"] else ""
        ) for v in answer["victims"]]  # fmt: skip
    if answer.get("deadline"):
        lines.append(f"Deadline: {answer['deadline']}")
    lines += [
        f"Queue {q['queue']} then holds {q['used']:g} of its {q['quota']:g} {q['resource']}"
        + (f", {q['borrowed']:g} of them borrowed" if q["borrowed"] else "") for q in answer["quota"]
    ]
    return head + where + "\n".join(lines)
