"""Rows of recorded workloads, each cell read as what it must be: whatever is wrong is told with file, line and column.

Used by the readers in `traces.py`. Raises `SpecError` and nothing else for what a file holds.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from math import isfinite
from pathlib import Path
from typing import TypeVar

from jobsched.errors import Problem, SpecError
from jobsched.spec.job import MAX_REPLICAS
from jobsched.spec.quantity import show

T = TypeVar("T")
MOST = 1e13
"""Largest number of jobs and times: milliseconds since 1970 are below it."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a trace by the names of its columns."""

    path: Path
    line: int
    cells: Mapping[str, str]

    def wrong(self, message: str, column: str = "") -> SpecError:
        """The error that names this line."""
        return wrong(self.path, message, self.line, column)

    def __getitem__(self, column: str) -> str:
        if column not in self.cells:
            raise self.wrong(f"there is no column {column!r} here, only {', '.join(self.cells) or 'nothing'}", column)
        return self.cells[column]

    def get(self, column: str) -> str:
        """The cell, "" where there is none."""
        return self.cells.get(column, "")

    def number(self, column: str, most: float = MOST, least: float = 0) -> float:
        """A number from `least` to `most`; never infinite."""
        text = self[column]
        try:
            number = float(text)
        except ValueError:
            raise self.wrong(f"{show(text)} is not a number", column) from None
        if not isfinite(number) or not least <= number <= most:
            raise self.wrong(f"{show(text)} is not a number from {least:g} to {most:g}", column)
        return number

    def count(self, column: str, least: int = 0, most: int = int(MOST)) -> int:
        """A whole number."""
        number = self.number(column)
        if number != int(number) or not least <= number <= most:
            raise self.wrong(f"{show(self[column])} is not a whole number from {least} to {most:,}", column)
        return int(number)

    def gpus(self, column: str, least: int = 1, most: int = MAX_REPLICAS) -> int:
        """How many GPUs a job asks for."""
        return self.count(column, least, most)

    def instant(self, column: str) -> datetime:
        """A date and time in ISO 8601."""
        try:
            return datetime.fromisoformat(self[column])
        except ValueError:
            raise self.wrong(f"{show(self[column])} is not a time such as 2017-10-01 00:00:45", column) from None

    def one_of(self, column: str, known: Mapping[str, T]) -> T:
        """What `known` has for the cell."""
        if self[column] not in known:
            raise self.wrong(f"{show(self[column])} is not known; there are {', '.join(known)}", column)
        return known[self[column]]


def wrong(path: Path, message: str, line: int = 0, column: str = "") -> SpecError:
    """Something is wrong with a file, or with one line of it."""
    hint = f"column {column}" if column else ""
    return SpecError([Problem(message, file=str(path), line=line, hint=hint)])


def lines(path: Path) -> Iterator[str]:
    """The lines of a text file, compressed or not."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            yield from file
    except EOFError as exc:
        raise wrong(path, "the compressed file ends too early; it was not copied whole") from exc
    except (gzip.BadGzipFile, zlib.error) as exc:
        raise wrong(path, f"the file cannot be decompressed: {exc}") from exc
    except UnicodeDecodeError as exc:
        raise wrong(path, "the file is not text (UTF-8)") from exc


def rows(path: Path) -> Iterator[Row]:
    """The lines of a CSV file whose first line names the columns."""
    table = csv.DictReader(lines(path), restkey="")
    try:
        for cells in table:
            row = Row(path, table.line_num, {name: cell for name, cell in cells.items() if isinstance(cell, str)})
            if len(row.cells) != len(cells):
                raise row.wrong(f"the line has not the {len(table.fieldnames or ())} cells of the first one")
            yield row
    except csv.Error as exc:
        raise wrong(path, f"the file is not CSV: {exc}", table.line_num) from exc


def tabbed(path: Path, columns: Mapping[int, Sequence[str]]) -> Iterator[Row]:
    """The lines of a file without a heading, cells divided by tabs; `columns`: their names, by how many there are."""
    for at, line in enumerate(lines(path), 1):
        cells = line.rstrip("\n").split("\t")
        names = columns.get(len(cells))
        if names is None:
            sizes = " or ".join(map(str, columns))
            raise wrong(path, f"the line has {len(cells)} cells divided by tabs, not {sizes}", at)
        yield Row(path, at, dict(zip(names, cells, strict=True)))
