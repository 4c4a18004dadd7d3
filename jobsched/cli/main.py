"""`jobsched`: the root command. Knows the name and one line of help of each command, and imports a command's module
only when that command is run, so that `jobsched --help` costs little more than Python and click.

Entry point of the console script and of `python -m jobsched.cli.main`. Turns every error into its text (or one line of
JSON) on stderr and its exit code.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module

import click

from jobsched import __version__
from jobsched.errors import JobschedError

COMMANDS = {
    # name: (module, attribute, one line)
    "run": ("submit", "run", "Submit a job, show its progress and logs, exit with its code."),
    "submit": ("submit", "submit", "Submit a job and print its id."),
    "plan": ("submit", "plan", "Show where and when a job would run; change nothing."),
    "diff": ("submit", "diff", "Show what a job file would change of a job."),
    "validate": ("submit", "validate", "Check job files offline; every problem at once."),
    "init": ("submit", "init", "Write a commented job file to start from."),
    "schema": ("submit", "schema", "Print the JSON Schema of job files, for editors."),
    "jobs": ("jobs", "jobs", "List jobs (also: ls, ps, queue)."),
    "get": ("jobs", "get", "Show one job in short, or as JSON or YAML."),
    "describe": ("explain", "describe", "Show everything about a job."),
    "why": ("explain", "why", "Explain why a job waits, or why it ended."),
    "events": ("explain", "events", "Show what happened, to a job or everywhere."),
    "logs": ("output", "logs", "Show the logs of a job's replicas."),
    "metrics": ("output", "metrics", "Show progress samples: step, loss, samples/s."),
    "wait": ("jobs", "wait", "Wait until a job runs, ends, succeeds or reaches a step."),
    "cancel": ("wishes", "cancel", "Cancel jobs."),
    "hold": ("wishes", "hold", "Keep waiting jobs from starting."),
    "release": ("wishes", "release", "Let held jobs start."),
    "suspend": ("wishes", "suspend", "Save and stop running jobs; keep them queued."),
    "resume": ("wishes", "resume", "Let suspended jobs go on."),
    "restart": ("wishes", "restart", "Start jobs anew from their last checkpoint."),
    "checkpoint": ("wishes", "checkpoint", "Have a running job save now, and go on."),
    "scale": ("wishes", "scale", "Change the replicas of an elastic role."),
    "update": ("submit", "update", "Change jobs that wait or run: priority, image, any field."),
    "attach": ("jobs", "attach_", "Show logs and progress of a job until it ends."),
    "exec": ("reach", "exec_", "Run a command beside a running replica."),
    "cp": ("reach", "cp", "Copy files from or to a running replica."),
    "port-forward": ("reach", "port_forward", "Reach a port of a running replica."),
    "top": ("jobs", "top", "Watch jobs and nodes."),
    "nodes": ("cluster", "nodes", "List nodes and what is free on them."),
    "gpus": ("cluster", "gpus", "List GPUs and who uses them."),
    "node": ("cluster", "node", "Describe, cordon, uncordon or drain a node."),
    "queues": ("cluster", "queues", "List queues: jobs, GPUs in use, quotas (also: quota)."),
    "usage": ("cluster", "usage", "Sum up GPU-hours and waits by queue and user."),
    "doctor": ("cluster", "doctor", "Check this machine and the server."),
    "serve": ("server", "serve", "Run the server."),
    "server": ("server", "server", "Stop the local server, or ask how it is."),
    "dashboard": ("server", "dashboard", "Print the address of the dashboard."),
    "config": ("server", "config", "Show, explain or set client settings."),
    "version": ("server", "version", "Print the versions of client and server."),
    "completion": ("server", "completion", "Print the completion script of a shell."),
    "help": ("server", "help_", "Explain a command, a topic or an error code."),
    "debug": ("debug", "debug", "Snapshot, replay and verify the event log."),
    "simulate": ("simulate", "simulate", "Run a workload through the scheduler in virtual time."),
    "demo": ("demo", "demo", "Train, lose two replicas, recover: all on this machine."),
}
ALIASES = {"ls": "jobs", "ps": "jobs", "queue": "jobs", "quota": "queues"}


DEFECT = "this is a defect of jobsched, please report it; JOBSCHED_LOG_LEVEL=debug shows the traceback"


class Commands(click.Group):
    """The group whose commands are in the table above."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        entry = COMMANDS.get(ALIASES.get(name, name))
        if entry is None:
            return None
        command = getattr(import_module(f"jobsched.cli.{entry[0]}"), entry[1])
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as exc:
            near = get_close_matches(args[0], [*COMMANDS, *ALIASES], 1)
            suggestion = f"; did you mean {near[0]!r}?" if near else ""
            raise click.UsageError(f"there is no command {args[0]!r}{suggestion}", ctx) from exc

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """From the table: importing every command to read its help would take a second."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry[2]) for name, entry in COMMANDS.items()])


EPILOG = """\b
Examples:
  jobsched run job.yaml                      submit, watch, exit with the job's code
  jobsched run --gpus 2 -- python train.py   the same without a file
  jobsched jobs -a                           what there is
  jobsched why @last                         why it waits, or why it failed

Exit codes: 0 ok, 1 unexpected, 2 usage, 3 not found, 4 auth, 5 conflict, 6 unreachable, 7 bad job file, 8 can never be
placed, 130 Ctrl-C. 'jobsched help exit-codes' tells more.
"""


@click.command(cls=Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--server", metavar="URL", help="Server to talk to; default: the configured one.")
@click.option("--token-file", metavar="PATH", help="File that holds the access token.")
@click.version_option(__version__, prog_name="jobsched")
@click.pass_context
def cli(ctx: click.Context, server: str | None, token_file: str | None) -> None:
    """Train on GPUs you share: queue, place, watch and recover distributed training jobs."""
    ctx.meta["server"], ctx.meta["token_file"] = server, token_file


def main(args: Sequence[str] | None = None) -> None:
    """Run a command and exit the process with its code."""
    raise SystemExit(run(args))


def run(args: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code. Nothing but the answer goes to stdout."""
    arguments = list(sys.argv[1:] if args is None else args)
    try:
        code = cli.main(arguments, prog_name="jobsched", standalone_mode=False)
        sys.stdout.flush()
    except JobschedError as exc:
        _report(exc, arguments)
        return exc.exit_code
    except click.UsageError as exc:
        command = exc.ctx.command_path if exc.ctx else "jobsched"
        _report(_usage(exc.format_message(), f"see '{command} --help'"), arguments)
        return 2
    except click.ClickException as exc:  # for example a file that cannot be opened
        _report(_usage(exc.format_message(), ""), arguments)
        return 2
    except (KeyboardInterrupt, click.Abort):
        return 130
    except BrokenPipeError:  # the reader, for example `head`, has seen enough
        _drop_stdout()
        return 128 + signal.SIGPIPE
    except OSError as exc:  # the disk is full, a file may not be written
        try:
            sys.stdout.flush()
        except OSError:  # it was stdout itself
            _drop_stdout()
        where = f": {exc.filename}" if exc.filename else ""
        _report(JobschedError(f"{exc.strerror or exc}{where}"), arguments)
        return JobschedError.exit_code
    except Exception as exc:
        if os.environ.get("JOBSCHED_LOG_LEVEL") == "debug":
            raise
        _report(JobschedError(f"{type(exc).__name__}: {exc}", hint=DEFECT), arguments)
        return JobschedError.exit_code
    return code if isinstance(code, int) else 0


def _drop_stdout() -> None:
    """Nobody reads it any more, or it cannot be written: not even what is still in its buffer."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _usage(message: str, hint: str) -> JobschedError:
    from jobsched.errors import UsageError

    return UsageError(message, hint=hint)


def _report(error: JobschedError, arguments: Sequence[str]) -> None:
    if wants_json(arguments):
        click.echo(json.dumps({"error": {**error.to_wire(), "exit_code": error.exit_code}}), err=True)
        return
    text = error.render()
    if error.code != "E001":
        text += f"\n  docs: jobsched help {error.code}"
    if sys.stderr.isatty() and "NO_COLOR" not in os.environ:
        head, colon, rest = text.partition("]")
        text = click.style(head + colon, fg="red", bold=True) + rest
    click.echo(text, err=True)


def wants_json(arguments: Sequence[str]) -> bool:
    """Whether the command line (even one that does not parse), or else the environment, asks for JSON."""
    ours = list(arguments[: arguments.index("--")] if "--" in arguments else arguments)
    for at, word in enumerate(ours):
        if word in ("-o", "--output") and at + 1 < len(ours):
            return ours[at + 1] in ("json", "jsonl")
        if word in ("--json", "-ojson", "-ojsonl", "--output=json", "--output=jsonl"):
            return True
    return os.environ.get("JOBSCHED_OUTPUT") in ("json", "jsonl")


if __name__ == "__main__":
    main()
