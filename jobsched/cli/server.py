"""Commands about the server itself and the client's settings: serve, server, dashboard, config, version, completion,
help.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import click

from jobsched import __version__
from jobsched.cli import render
from jobsched.cli.connection import connected
from jobsched.cli.render import Column, View, output_options, talk
from jobsched.client import locate, settings
from jobsched.errors import JobschedError, Unreachable, UsageError, WaitTimeout, all_errors

STOP_TIMEOUT_S = 60.0


@click.command()
@click.option("--config", "config_file", type=click.Path(exists=True, dir_okay=False), metavar="FILE",
              help="Server configuration; default: server.yaml in the home directory, if there is one.")
@click.option("--host", metavar="ADDRESS", help="Address to listen on; default 127.0.0.1.")
@click.option("--port", type=int, metavar="N", help="Port to listen on; 0 picks a free one.")
@click.option("--db", metavar="URL", help="Database, e.g. postgresql://…; default: SQLite in the home directory.")
@click.option("--home", metavar="DIR", help="Directory for database, token and logs.")
@click.option("--embedded", is_flag=True, hidden=True, help="Started by a client.")
def serve(
    config_file: str | None, host: str | None, port: int | None, db: str | None, home: str | None, embedded: bool
) -> None:
    """Run the server and its backends, in the foreground. Ctrl-C stops it; running jobs go on and are found again.

    \b
    Example:
      jobsched serve --config configs/local.yaml --port 8080
    """
    from jobsched import load, wiring
    from jobsched.spec.server import ServerConfig

    place = settings.home(home).absolute()
    own = place / "server.yaml"
    file = Path(config_file) if config_file else own if own.is_file() else None
    config = load.load_server_config_file(file) if file else wiring.embedded_config() if embedded else ServerConfig()
    given = {"host": host, "port": port}
    listen = config.listen.model_dump() | {k: v for k, v in given.items() if v is not None}
    asked = load.load_server_config({"listen": listen, "store": db or config.store}, file="<command line>")
    changes: dict[str, object] = {"listen": asked.listen, "store": asked.store}
    if home or embedded or not config.home:
        changes["home"] = str(place)
    wiring.serve(config.model_copy(update=changes), embedded=embedded)


@click.group()
def server() -> None:
    """Stop the local server, or ask how it is.

    \b
    Example:
      jobsched server stop
    """


@server.command()
@click.option("--force", is_flag=True, help="Kill it if it does not stop; jobs run on, as they do in any case.")
@click.pass_context
def stop(ctx: click.Context, force: bool) -> None:
    """Stop the server of this home directory. Running jobs go on, and the next server finds them again.

    \b
    Example:
      jobsched server stop
    """
    stop_server(settings.home(), force=force)
    talk("stopped; running jobs go on")


def stop_server(home: Path, *, force: bool = False, timeout_s: float = STOP_TIMEOUT_S) -> None:
    """Ask the server running from `home` to stop, and wait until it has. Raises `NotFound` when none runs,
    `WaitTimeout` when it does not stop (`force`: it is killed then)."""
    pid = locate.server_pid(home)
    endpoint = locate.running(home)
    try:
        assert endpoint is not None
        with locate.connect(endpoint) as remote:
            remote.post("shutdown")
    except (JobschedError, AssertionError):
        os.kill(pid, signal.SIGTERM)
    until = time.monotonic() + timeout_s
    while locate.alive(pid):
        if time.monotonic() > until:
            if not force:
                raise WaitTimeout(f"the server (pid {pid}) does not stop", hint="jobsched server stop --force")
            os.kill(pid, signal.SIGKILL)
            until = time.monotonic() + timeout_s
        time.sleep(0.05)
    end_supervisor(home)


def end_supervisor(home: Path, *, kill: bool = False) -> None:
    """Of a server that has gone: it would end by itself in a minute. While replicas run it stays, unless they are to be
    killed."""
    from jobsched.backends.supervisor.client import Line
    from jobsched.backends.supervisor.protocol import Layout

    with suppress(OSError):
        line = Line(Layout(home).control_socket)
        if line.ask({"do": "quit", "kill": kill})["ok"]:
            line.wait_for_end()
        line.close()


@server.command("status")
@output_options
@click.pass_context
def server_status(ctx: click.Context, view: View) -> int:
    """Show which server is used, and whether it answers. Exit 6 if it does not.

    \b
    Example:
      jobsched server status -o json
    """
    endpoint = locate.find(ctx.meta.get("server"), token_file=ctx.meta.get("token_file"))
    facts = {"url": endpoint.url, "source": endpoint.source, "local": endpoint.local,
             "home": str(settings.home()) if endpoint.local else None, "answers": True, "version": None, "leader": None}
    try:
        with locate.connect(endpoint) as remote:
            health = remote.documents("healthz")
            facts |= {"version": health["version"], "leader": health["leader"]}
    except Unreachable:
        facts["answers"] = False
    render.show_one(view, facts, lambda: "".join(f"{k + ':':9} {v}\n" for k, v in facts.items() if v is not None),
                    key="url")
    return 0 if facts["answers"] else Unreachable.exit_code


@click.command()
@click.pass_context
def dashboard(ctx: click.Context) -> None:
    """Print the address of the dashboard, with the access token in its fragment, which browsers do not send anywhere.

    \b
    Example:
      open "$(jobsched dashboard)"
    """
    endpoint = locate.find(ctx.meta.get("server"), token_file=ctx.meta.get("token_file"))
    with locate.connect(endpoint) as remote:
        remote.documents("version")  # an address that does not answer, or a token that is refused, helps nobody
        endpoint = remote.endpoint
    render.write(f"{endpoint.url.rstrip('/')}/#token={quote(endpoint.token)}\n")


# ---- settings ----

SETTING_COLUMNS = (
    Column("SETTING", lambda s: s["name"]),
    Column("VALUE", lambda s: s["value"]),
    Column("SOURCE", lambda s: s["source"]),
    Column("MEANING", lambda s: s["meaning"], wide=True),
)


@click.group()
def config() -> None:
    """Show, explain or set client settings.

    \b
    Example:
      jobsched config explain server
    """


def _setting(found: settings.Setting) -> dict[str, object]:
    value = "********" if found.name == "token" and found.value else found.value
    return {"name": found.name, "value": value, "source": found.source, "meaning": settings.NAMES[found.name]}


@config.command()
@output_options
def view(view: View) -> None:
    """Show every setting, its value and who said so.

    \b
    Example:
      jobsched config view -o json
    """
    render.show_list(view, SETTING_COLUMNS, [_setting(s) for s in settings.everything()], name="settings", key="name")


@config.command()
@click.argument("name", required=False)
@output_options
def explain(name: str | None, view: View) -> None:
    """Tell where the value of a setting comes from, and where else it could be set.

    \b
    Example:
      jobsched config explain server
    """
    if name is not None and name not in settings.NAMES:
        raise UsageError(f"there is no setting {name!r}", hint=f"settings: {', '.join(settings.NAMES)}")
    shown = [_setting(settings.get(n)) for n in ([name] if name else settings.NAMES)]

    def text() -> str:
        order = f"flag, then JOBSCHED_<NAME>, then {settings.PROJECT_FILE} of the project, then {settings.user_file()}"
        lines = [f"{s['name']} = {s['value'] or '(empty)'}\n  {s['meaning']}\n  from: {s['source']}" for s in shown]
        return "\n".join([*lines, f"looked at in this order: {order}, then the machine's file, then the default"])

    render.show_one(view, {"settings": shown, "name": name or "all"}, text, key="name")


@config.command("set")
@click.argument("name")
@click.argument("value")
def set_(name: str, value: str) -> None:
    """Set a value in your own file.

    \b
    Example:
      jobsched config set server http://gpu-box:8080
    """
    talk(f"wrote {settings.write(name, value)}")


# ---- version, completion, help ----


@click.command()
@output_options
@click.pass_context
def version(ctx: click.Context, view: View) -> None:
    """Print the versions of client and server.

    \b
    Example:
      jobsched version -o json
    """
    found: dict[str, object] = {"client": __version__, "server": None}
    try:
        with connected(ctx) as remote:
            found["server"] = remote.documents("healthz")["version"]
    except Unreachable:
        pass
    render.show_one(view, found, lambda: f"client {__version__}\nserver {found['server'] or 'none'}", key="client")


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish", "pwsh"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell.

    \b
    Example:
      eval "$(jobsched completion bash)"
    """
    from click.shell_completion import get_completion_class

    from jobsched.cli.main import cli

    found = get_completion_class(shell)
    if found is None:
        raise UsageError(f"this version of click cannot complete for {shell}", hint="pip install -U click")
    render.write(found(cli, {}, "jobsched", "_JOBSCHED_COMPLETE").source() + "\n")


TOPICS = {
    "exit-codes": """\
0    ok
1    unexpected
2    usage: wrong flags or arguments
3    not found
4    not allowed: no token, or a wrong one
5    conflict: the state changed, or does not allow it
6    the server cannot be reached
7    the job file is wrong
8    no node can ever hold the job
130  Ctrl-C
Attached commands (run, submit --wait, wait, logs -f --exit-status) exit with the job's own code: 128+N for
signal N (143 for a cancelled job), 124 when time ran out, 125 when jobsched or its machines failed.""",
    "output": """\
stdout carries data, stderr everything else. -o table|wide|json|jsonl|yaml|name|csv, or JOBSCHED_OUTPUT.
On a terminal tables are styled and cut to its width; in a pipe they are plain and whole.
JSON holds schema_version and times in RFC 3339. -q prints ids only. NO_COLOR, FORCE_COLOR and TTY_COMPATIBLE are
respected.""",
    "environment": """\
JOBSCHED_SERVER      URL of the server
JOBSCHED_TOKEN       access token
JOBSCHED_TOKEN_FILE  file with the access token
JOBSCHED_HOME        directory of the local server
JOBSCHED_CONFIG      the user's configuration file
JOBSCHED_OUTPUT      default output format
Flags beat the environment; the environment beats jobsched.toml of the project, then the user's file. See
'jobsched config explain'.""",
    "phases": """\
QUEUED     waits; the reason says why ('jobsched why JOB')
STARTING   has its places, replicas are starting
RUNNING    every replica of the gang runs
STOPPING   replicas save and stop; then it queues again or ends
SUCCEEDED, FAILED, CANCELLED   ended""",
    "jobs": """\
A JOB is named by its id, a unique prefix of it, its name (the newest wins), or @last.
Write a file with 'jobsched init', check it with 'jobsched validate', run it with 'jobsched run'.""",
}


@click.command("help")
@click.argument("topic", required=False)
@click.pass_context
def help_(ctx: click.Context, topic: str | None) -> None:
    """Explain a command, an error code (E217), or a topic: exit-codes, output, environment, phases, jobs.

    \b
    Example:
      jobsched help E217
    """
    from jobsched.cli.main import cli

    root = ctx.find_root()
    if topic is None:
        render.write(cli.get_help(root) + f"\n\nTopics: {', '.join(TOPICS)}, and error codes.\n")
        return
    errors = all_errors()
    command = cli.get_command(root, topic)
    if topic in TOPICS and topic != "jobs":
        render.write(TOPICS[topic] + "\n")
    elif topic.upper() in errors:
        cls = errors[topic.upper()]
        about = (cls.__doc__ or "").strip() or MEANINGS.get(cls.code, "")
        numbers = f"exit code {cls.exit_code}, HTTP status {cls.http_status}"
        render.write(f"{cls.code} {cls.__name__}: {about}\n  {numbers}\n")
    elif command is not None:
        with click.Context(command, info_name=topic, parent=root) as inner:
            render.write(command.get_help(inner) + "\n")
        if topic in TOPICS:
            render.write(f"\n{TOPICS[topic]}\n")
    else:
        raise UsageError(f"there is no topic, command or error code {topic!r}",
                         hint=f"topics: {', '.join(TOPICS)}; error codes: {', '.join(errors)}")


MEANINGS = {
    "E100": "flags or arguments that make no sense together.",
    "E217": "no node of the cluster, even when empty, can hold one of the job's replicas; see 'jobsched nodes'.",
    "E300": "there is no such job, node or queue; see 'jobsched jobs -a'.",
    "E400": "the server wants a token, and got none or a wrong one; see 'jobsched help environment'.",
    "E403": "the token is right, but does not allow this.",
    "E500": "the thing changed since you looked, or its state does not allow this.",
    "E600": "the server, its database or an engine cannot be reached.",
    "E620": "the server's database cannot be reached.",
    "E700": "a bounded wait ran out; the job goes on.",
    "E040": "a configuration file is wrong.",
}
"""What errors mean whose class says no more than its name."""
