"""How answers are shown: one document, or a list of them, as table, wide, json, jsonl, yaml, name or csv.

Used by every command. stdout carries data and nothing else; `talk` writes to stderr. Works on plain documents (the JSON
of the API), so that no model is built for a listing; rich is imported only when a table is drawn on a terminal.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import wraps
from typing import IO, Any, TypeVar, cast

import click

from jobsched.client import settings
from jobsched.client.documents import Document
from jobsched.errors import UsageError

SCHEMA_VERSION = 1
FLEXED = 8
"""Least width of a flexible column."""
FORMATS = ("table", "wide", "json", "jsonl", "yaml", "name", "csv")
INSTANT = re.compile(r"^(?:.*_)?(?:at|since|before|after)_ms$")
"""Fields of the wire form that are instants: `submitted_at_ms`, `phase_since_ms`, `not_before_ms`, …"""
USERS = ("spec", "labels", "wanted")
"""Fields whose content is the user's own, names included: shown as it is."""
PHASES = {
    "QUEUED": ("○", ""),
    "STARTING": ("◔", "cyan"),
    "RUNNING": ("▶", "blue"),
    "STOPPING": ("◼", "yellow"),
    "SUCCEEDED": ("✔", "green"),
    "FAILED": ("✘", "red"),
    "CANCELLED": ("⊘", "dim"),
}
"""Glyph and colour of each phase; the word is always there too."""

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table: its title, and its value in a document. `age`: the value is an instant in milliseconds,
    shown as "3m", in full in csv. `wide`: only shown by `-o wide`, csv, or when named by --columns. `flexible`: cut
    first on a narrow terminal."""

    title: str
    value: Callable[[Document], Any]
    wide: bool = False
    age: bool = False
    flexible: bool = False


@dataclass(frozen=True, slots=True)
class View:
    """What the output options of a command say."""

    format: str = "table"
    columns: tuple[str, ...] = ()
    sort_by: str = ""
    headers: bool = True
    quiet: bool = False

    @property
    def json(self) -> bool:
        return self.format in ("json", "jsonl")


def output_options(command: F) -> F:
    """Adds -o, --json, -q, --columns, --sort-by and --no-headers; the command gets them as `view`."""

    @wraps(command)
    def wrapper(*args: Any, output: str | None, as_json: bool, quiet: bool, columns: str, sort_by: str,
                no_headers: bool, **kwargs: Any) -> Any:
        chosen = "json" if as_json else output or settings.get("output").value
        if chosen not in FORMATS:
            raise UsageError(f"{chosen!r} is not an output format", hint=f"formats: {', '.join(FORMATS)}")
        names = tuple(n.strip().upper() for n in columns.split(",") if n.strip())
        return command(*args, view=View(chosen, names, sort_by.upper(), not no_headers, quiet), **kwargs)

    for option in (
        click.option("--no-headers", is_flag=True, help="Tables without their first line."),
        click.option("--sort-by", default="", metavar="COLUMN", help="Sort by a column; -COLUMN: the other way."),
        click.option("--columns", default="", metavar="A,B", help="Only these columns, in this order."),
        click.option("-q", "--quiet", is_flag=True, help="Only ids or names; no talk."),
        click.option("--json", "as_json", is_flag=True, help="The same as -o json."),
        click.option("-o", "--output", type=click.Choice(FORMATS), metavar="FORMAT",
                     help=f"Output format: {', '.join(FORMATS)}."),
    ):
        option(wrapper)
    return cast(F, wrapper)


# ---- documents ----


def job_document(answer: Mapping[str, Any]) -> Document:
    """A `JobAnswer` as one flat document: the job's fields, and beside them progress, verdict and headline."""
    progress = answer.get("progress")
    return {
        **answer["job"],
        "attempts": answer["job"]["attempt"],
        "headline": answer.get("headline", ""),
        "metrics": dict(progress["metrics"]) if progress else {},
        "progress": progress,
        "verdict": answer.get("verdict"),
    }


def public(value: Any) -> Any:
    """A document as users get it: instants as RFC 3339 (null for "not yet") under their name without `_ms`, metric
    pairs as objects."""
    if isinstance(value, Mapping):
        made: Document = {}
        for name, item in value.items():
            if name in USERS:
                made[name] = item
            elif INSTANT.match(name) and isinstance(item, int):
                made[name.removesuffix("_ms")] = rfc3339(item) if item else None
            elif name == "metrics" and isinstance(item, list):
                made[name] = dict(item)
            else:
                made[name] = public(item)
        return made
    return [public(item) for item in value] if isinstance(value, list) else value


def rfc3339(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1_000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


# ---- output ----


def show_list(view: View, columns: Sequence[Column], documents: Iterable[Document], *, name: str, key: str) -> None:
    """A listing. `name` is the field that holds it in JSON, `key` the field of a document that -q and -o name print."""
    rows = _sorted(view, columns, list(documents))
    if view.quiet or view.format == "name":
        write("".join(f"{row[key]}\n" for row in rows))
    elif view.format == "json":
        write_json({name: rows})
    elif view.format == "jsonl":
        for row in rows:
            write_json(row)
    elif view.format == "yaml":
        write_yaml({name: rows})
    elif view.format == "csv":
        write_csv(view, chosen(view, columns), rows)
    else:
        write_table(view, chosen(view, columns), rows)


def show_one(view: View, document: Document, text: Callable[[], str], *, key: str = "id") -> None:
    """One document: as data, or as the text a person reads."""
    if view.quiet or view.format == "name":
        write(f"{document[key]}\n")
    elif view.json:
        write_json(document)
    elif view.format == "yaml":
        write_yaml(document)
    elif view.format == "csv":
        raise UsageError("csv is for listings", hint="use -o json for a single document")
    else:
        write(text().rstrip("\n") + "\n")


def write(text: str) -> None:
    """To stdout, whatever its encoding can hold."""
    try:
        sys.stdout.write(text)
    except UnicodeEncodeError:
        encoding = sys.stdout.encoding
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def write_json(document: Mapping[str, Any]) -> None:
    write(json.dumps({"schema_version": SCHEMA_VERSION, **public(document)}, ensure_ascii=False) + "\n")


def write_yaml(document: Mapping[str, Any]) -> None:
    from ruamel.yaml import YAML

    writer: Any = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.sort_base_mapping_type_on_output = False  # in the order of the JSON form
    writer.dump({"schema_version": SCHEMA_VERSION, **public(document)}, sys.stdout)


def write_yaml_documents(documents: Sequence[Mapping[str, Any]], comment: str) -> None:
    """As they are, for other programs; the same part twice is written out twice."""
    from ruamel.yaml import YAML

    writer: Any = YAML(typ="safe", pure=True)
    writer.default_flow_style, writer.width = False, 10_000
    writer.sort_base_mapping_type_on_output = False
    writer.representer.ignore_aliases = lambda _: True
    write(f"# {comment}\n")
    writer.dump_all(documents, sys.stdout)


def write_csv(view: View, columns: Sequence[Column], rows: Iterable[Document]) -> None:
    out = csv.writer(sys.stdout, lineterminator="\n")
    if view.headers:
        out.writerow([c.title for c in columns])
    for row in rows:
        out.writerow([rfc3339(c.value(row)) if c.age and c.value(row) else c.value(row) for c in columns])


def write_table(view: View, columns: Sequence[Column], rows: Sequence[Document]) -> None:
    """Styled and cut to the width on a terminal; plain, whole columns in a pipe."""
    if not styled(sys.stdout):
        write(plain_table(columns, rows, headers=view.headers))
        return
    from rich.console import Console

    Console(file=sys.stdout).print(styled_table(view, columns, rows))


def plain_table(columns: Sequence[Column], rows: Sequence[Document], *, headers: bool = True) -> str:
    lines = [[cell(c, row) for c in columns] for row in rows]
    if headers:
        lines.insert(0, [c.title for c in columns])
    widths = [max((len(line[at]) for line in lines), default=0) for at in range(len(columns))]
    return "".join("  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip() + "\n"
                   for line in lines)


def styled_table(view: View, columns: Sequence[Column], rows: Sequence[Document]) -> Any:
    """The same as a rich table, phases with glyph and colour."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", show_header=view.headers)
    lines = []
    for row in rows:
        cells = []
        for column in columns:
            text = cell(column, row)
            glyph, colour = PHASES.get(text, ("", "")) if column.title == "PHASE" else ("", "")
            cells.append(Text(f"{glyph} {text}" if glyph else text, style=colour))
        lines.append(cells)
    natural = [max([len(c.title) if view.headers else 0, *(line[at].cell_len for line in lines)])
               for at, c in enumerate(columns)]
    widths = fitted(natural, [c.flexible for c in columns], shutil.get_terminal_size().columns)
    for column, width in zip(columns, widths, strict=False):
        table.add_column(column.title, no_wrap=True, overflow="ellipsis", width=width)
    for line in lines:
        table.add_row(*line[:len(widths)])
    return table


def fitted(natural: Sequence[int], flexible: Sequence[bool], room: int) -> list[int]:
    """Widths of the columns that fit into `room` characters, each followed by two blanks: flexible ones are cut, the
    widest first; where that is not enough, columns at the right are left out."""
    for count in range(len(natural), 0, -1):
        widths = [*natural[:count]]
        cuttable = [at for at in range(count) if flexible[at]]
        while sum(widths) + 2 * count > room:
            widest = max(cuttable, key=lambda at: widths[at], default=0)
            if not cuttable or widths[widest] <= FLEXED:
                break
            widths[widest] -= 1
        else:
            return widths
    return [*natural[:1]]


def chosen(view: View, columns: Sequence[Column]) -> list[Column]:
    """The columns that the view shows: those named, else all but the wide ones."""
    if not view.columns:
        return [c for c in columns if not c.wide or view.format in ("wide", "csv")]
    by_title = {c.title: c for c in columns}
    return [_column(by_title, name) for name in view.columns]


def cell(column: Column, row: Document) -> str:
    value = column.value(row)
    if column.age:
        return age(value)
    if value is None or value == "":
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def age(at_ms: int) -> str:
    return duration(int(time.time() * 1_000) - at_ms) if at_ms else "-"


def duration(ms: int) -> str:
    """The two largest units at most: 45s, 3m, 2h05m, 4d."""
    seconds = max(0, ms) // 1_000
    if seconds < 120:
        return f"{seconds}s"
    if seconds < 7_200:
        return f"{seconds // 60}m"
    if seconds < 172_800:
        return f"{seconds // 3_600}h{seconds % 3_600 // 60:02d}m"
    return f"{seconds // 86_400}d"


def count(number: int, thing: str) -> str:
    """A number with its thing: 1 restart, 2 restarts."""
    return f"{number} {thing}" + ("" if number == 1 else "s")


def seconds(text: str | None) -> float | None:
    """A duration option ("90s", "2h") in seconds. Raises `UsageError`."""
    if text is None:
        return None
    from jobsched.spec.quantity import parse_duration_ms

    try:
        return parse_duration_ms(text) / 1_000
    except ValueError as exc:
        raise UsageError(str(exc)) from exc


def rfc3339_ms(text: str) -> int | None:
    """An RFC 3339 time in milliseconds since the epoch, UTC where it names no zone; None for anything else."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return None
    return round((found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp() * 1_000)


def instant_ms(text: str) -> int:
    """A point in time option: RFC 3339, or a duration ("10m") before now. Raises `UsageError`."""
    found = rfc3339_ms(text)
    if found is not None:
        return found
    try:
        return round(1_000 * (time.time() - (seconds(text) or 0.0)))
    except UsageError as exc:
        raise UsageError(f"{text!r} is neither an RFC 3339 time nor a duration",
                         hint="--at 2026-01-31T12:00:00Z, or --at 10m") from exc


def styled(stream: IO[str]) -> bool:
    """Whether colour and live lines may go to this stream: a terminal, unless NO_COLOR, TERM=dumb or TTY_COMPATIBLE=0
    say otherwise; FORCE_COLOR says yes."""
    if os.environ.get("NO_COLOR") or os.environ.get("TTY_COMPATIBLE") == "0":
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def talk(text: str) -> None:
    """Progress, warnings and hints: stderr."""
    click.echo(text, err=True)


def confirm(question: str, *, yes: bool, command: str) -> None:
    """Ask before something destructive, on a terminal only; elsewhere the exact command with -y is the answer."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError(f"{question} Nobody is there to ask", hint=f"say yes with: {command} -y")
    click.confirm(question, abort=True, err=True)


def watched(every_s: float, draw: Callable[[], Any]) -> None:
    """Draw a renderable again and again until Ctrl-C; on a terminal only."""
    from rich.console import Console
    from rich.live import Live

    with Live(draw(), console=Console(file=sys.stdout), auto_refresh=False, screen=False) as live:
        while True:
            time.sleep(every_s)
            live.update(draw(), refresh=True)


def _sorted(view: View, columns: Sequence[Column], rows: list[Document]) -> list[Document]:
    if not view.sort_by:
        return rows
    column = _column({c.title: c for c in columns}, view.sort_by.removeprefix("-"))

    def order(row: Document) -> tuple[bool, float, str]:
        value = column.value(row)
        number = isinstance(value, (int, float))
        return not number, value if number else 0, str(value)

    return sorted(rows, key=order, reverse=view.sort_by.startswith("-"))


def _column(by_title: Mapping[str, Column], name: str) -> Column:
    if name not in by_title:
        raise UsageError(f"there is no column {name!r}", hint=f"columns: {', '.join(by_title)}")
    return by_title[name]
