"""A YAML or JSON text as a tree whose every part knows its place, so that an error can point at it.

Only `jobsched.load` uses it. YAML 1.2 core schema (https://yaml.org/spec/1.2.2/#103-core-schema) over ruamel.yaml's
event parser: `no`, `22:22` and `1_000` are text, keys are text, tags beyond the core are refused. Input is hostile:
size, depth and number of nodes are bounded *after* aliases are expanded, so that a small text cannot become a large
tree. Nothing here knows what a job is, and nothing is ever constructed but plain values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, StringMark
from ruamel.yaml.events import (
    AliasEvent,
    DocumentEndEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
    StreamStartEvent,
)
from ruamel.yaml.reader import ReaderError

from jobsched.errors import Problem
from jobsched.spec.quantity import show

MAX_CHARS = 2**20
MAX_NODES = 20_000
MAX_DEPTH = 40
MAX_PATH = 200
"""Longest path that a problem shows."""

Scalar = str | int | float | bool | None
E = TypeVar("E", bound=Event)

_NULL = re.compile(r"(?:~|null|Null|NULL|)")
_TRUE, _FALSE = re.compile(r"true|True|TRUE"), re.compile(r"false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]{1,40}")
_OCTAL, _HEX = re.compile(r"0o[0-7]{1,40}"), re.compile(r"0x[0-9a-fA-F]{1,40}")
_FLOAT = re.compile(r"(?=.*[.eE])[-+]?(?:\.[0-9]{1,400}|[0-9]{1,400}(?:\.[0-9]{0,400})?)(?:[eE][-+]?[0-9]{1,9})?")
_INF, _NAN = re.compile(r"([-+]?)\.(?:inf|Inf|INF)"), re.compile(r"\.(?:nan|NaN|NAN)")
_CORE_TAGS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "bool", "null", "map", "seq"))
_TEXT_TAGS = ("!", "tag:yaml.org,2002:str")
MERGE_KEY = "<<"


class Place(NamedTuple):
    """Where something stands; line and column count from 1, 0 when the source has none (a dict, an option)."""

    file: str
    line: int = 0
    column: int = 0

    def problem(self, message: str, *, path: str = "", hint: str = "") -> Problem:
        return Problem(message, path[:MAX_PATH], self.file, self.line, self.column, hint)


@dataclass(slots=True)
class Node:
    """One value: where it stands, where its key stands, its path as the author wrote it, and its text if a scalar.

    The tree is built for one load and edited in place by it (shorthands, overrides), never shared.
    """

    value: Scalar | list[Node] | dict[str, Node]
    at: Place
    key_at: Place
    path: str = ""
    text: str = ""

    @property
    def fields(self) -> dict[str, Node]:
        """The entries of a mapping; of anything else none, so that later checks can say what is wrong with it."""
        return self.value if isinstance(self.value, dict) else {}

    @property
    def plain(self) -> object:
        """The value as dicts, lists and scalars."""
        match self.value:
            case dict():
                return {key: child.plain for key, child in self.value.items()}
            case list():
                return [child.plain for child in self.value]
            case scalar:
                return scalar

    def moved(self, at: Place, path: str) -> Node:
        """The same value at another place and path, all of it."""
        match self.value:
            case dict():
                fields = {key: child.moved(at, join(path, key)) for key, child in self.value.items()}
                return Node(fields, at, at, path)
            case list():
                return Node([child.moved(at, f"{path}[{i}]") for i, child in enumerate(self.value)], at, at, path)
            case scalar:
                return Node(scalar, at, at, path, self.text)

    def as_text(self) -> None:
        """Turn a number or boolean into the text it was written as (`1.10` stays `1.10`), where text is what counts."""
        if isinstance(self.value, (bool, int, float)):
            self.value = self.text


class Malformed(Exception):
    """The text has no tree: a syntax error, or more than the bounds allow."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def parse(text: str, file: str) -> tuple[Node, list[Problem]]:
    """The tree of a text, and problems that leave a tree (duplicate keys, foreign tags). Raises `Malformed`."""
    start = Place(file, 1, 1)
    if len(text) > MAX_CHARS:
        raise Malformed(start.problem(f"the text has {len(text):,} characters; at most {MAX_CHARS:,} are read"))
    if text.lstrip().startswith(("{", "[")):
        text = text.replace("\t", " ")  # JSON may be indented with tabs, YAML not; within JSON strings there are none
    reader = _Reader(_events(text, file), file)
    try:
        return reader.document(), reader.problems
    except RecursionError as exc:  # the parser's own, for example in a tower of block indicators
        raise Malformed(start.problem("the text is nested too deeply")) from exc


def from_plain(value: object, file: str, path: str = "", depth: int = 0) -> Node:
    """The tree of dicts, lists and scalars; no part has a line. Raises `Malformed` where nested too deeply."""
    at = Place(file)
    if depth > MAX_DEPTH:
        raise Malformed(at.problem(f"nested more than {MAX_DEPTH} levels deep", path=path))
    match value:
        case Mapping():
            named = {_key_text(key): child for key, child in value.items()}
            fields = {key: from_plain(child, file, join(path, key), depth + 1) for key, child in named.items()}
            return Node(fields, at, at, path)
        case list() | tuple():
            return Node([from_plain(v, file, f"{path}[{i}]", depth + 1) for i, v in enumerate(value)], at, at, path)
        case None | bool() | float():
            return Node(value, at, at, path, json.dumps(value))
        case int():
            return Node(value, at, at, path, show(value))
        case str():
            return Node(str(value), at, at, path, value)
        case _:
            raise Malformed(at.problem(f"{show(value)} has no place in a spec", path=path))


def _key_text(key: object) -> str:
    return _printable(key) if isinstance(key, str) else json.dumps(key, default=show)


def join(path: str, key: str) -> str:
    """The path of a mapping's entry."""
    return f"{path}.{key}" if path else key


def _place(file: str, mark: StringMark) -> Place:
    return Place(file, mark.line + 1, mark.column + 1)


def _events(text: str, file: str) -> Iterator[Event]:
    """ruamel's events; whatever goes wrong inside it is a `Malformed` with the nearest place."""
    at = Place(file, 1, 1)
    try:
        for event in YAML(typ="safe", pure=True).parse(text):
            at = _place(file, event.start_mark)
            yield event
    except MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        raise Malformed(_syntax_problem(exc, at if mark is None else _place(file, mark))) from exc
    except ReaderError as exc:
        before = text[:exc.position] if isinstance(exc.position, int) else ""
        at = Place(file, before.count("\n") + 1, len(before) - before.rfind("\n"))
        raise Malformed(at.problem("a character that YAML does not allow", hint="save it as plain UTF-8 text")) from exc
    except RecursionError:
        raise
    except Exception as exc:  # the parser has bugs of its own (escapes beyond Unicode, odd directives)
        raise Malformed(at.problem("this is not YAML")) from exc


_SYNTAX_HINTS = (
    (r"cannot start any token", "indent with spaces, not tabs; put text that begins with a special sign in quotes"),
    (r"mapping values are not allowed", "is the line above indented alike? put text that holds ': ' in quotes"),
    (r"expected <block end>|did not find expected", "does this line begin in the same column as its neighbours?"),
    (r"could not find expected ':'|expected ':'", "a field is 'name: value'"),
    (r"flow (mapping|sequence)|expected ',' or", "is a bracket or a comma missing?"),
    (r"quoted scalar|end of stream", "is a closing quote missing?"),
    (r"undefined alias|alias", "text that begins with '*' or '&' goes in quotes"),
)


def _syntax_problem(exc: MarkedYAMLError, at: Place) -> Problem:
    said = " ".join(part for part in (exc.context, exc.problem) if part)
    hint = next((hint for pattern, hint in _SYNTAX_HINTS if re.search(pattern, said)), "")
    return at.problem(f"this is not YAML: {' '.join(said.split())[:200]}", hint=hint)


@dataclass(slots=True)
class _Reader:
    """Composes events into nodes; recursion is bounded by MAX_DEPTH."""

    events: Iterator[Event]
    file: str
    problems: list[Problem] = field(default_factory=list)
    anchors: dict[str, Node] = field(default_factory=dict)
    count: int = 0

    def document(self) -> Node:
        self._expect(StreamStartEvent)
        event = next(self.events)
        if isinstance(event, StreamEndEvent):
            raise Malformed(Place(self.file, 1, 1).problem("the document is empty"))
        assert isinstance(event, DocumentStartEvent)
        root = self._node(next(self.events), "", None, 0)
        self._expect(DocumentEndEvent)
        event = next(self.events)
        if not isinstance(event, StreamEndEvent):
            raise Malformed(_place(self.file, event.start_mark).problem(
                "a second document begins here", hint="one document per file; put each job in its own file",
            ))
        if root.value is None:
            raise Malformed(Place(self.file, 1, 1).problem("the document is empty"))
        return root

    def _expect(self, kind: type[E]) -> E:
        event = next(self.events)
        assert isinstance(event, kind), event
        return event

    def _counted(self, at: Place, depth: int) -> None:
        self.count += 1
        if depth > MAX_DEPTH:
            raise Malformed(at.problem(f"nested more than {MAX_DEPTH} levels deep"))
        if self.count > MAX_NODES:
            raise Malformed(at.problem(f"more than {MAX_NODES:,} values, aliases counted as often as they are used"))

    def _node(self, event: Event, path: str, key_at: Place | None, depth: int) -> Node:
        at = _place(self.file, event.start_mark)
        self._counted(at, depth)
        match event:
            case AliasEvent():
                target = self.anchors.get(event.anchor)
                if target is None:
                    raise Malformed(at.problem(
                        f"alias *{event.anchor} refers to no anchor above it", path=path,
                        hint="text that begins with '*' goes in quotes",
                    ))
                return replace(self._copy(target, path, depth), key_at=key_at or at)
            case MappingStartEvent():
                node = Node({}, at, key_at or at, path)
                self._mapping(node, depth)
            case SequenceStartEvent():
                items: list[Node] = []
                while not isinstance(item := next(self.events), SequenceEndEvent):
                    items.append(self._node(item, f"{path}[{len(items)}]", None, depth + 1))
                node = Node(items, at, key_at or at, path)
            case _:
                assert isinstance(event, ScalarEvent), event
                node = Node(self._scalar(event, path), at, key_at or at, path, event.value)
        tag = None if event.ctag is None else str(event.ctag)
        if tag is not None and tag not in (*_CORE_TAGS, *_TEXT_TAGS):
            self.problems.append(at.problem(f"the tag {show(tag)} is not allowed", path=path, hint="remove it"))
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        return node

    def _scalar(self, event: ScalarEvent, path: str) -> Scalar:
        tag = None if event.ctag is None else str(event.ctag)
        if not event.value.isascii():
            # JSON writes characters beyond the basic plane as two escapes; YAML's parser leaves them apart.
            event.value = event.value.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
            if event.value != _printable(event.value):
                at = _place(self.file, event.start_mark)
                self.problems.append(at.problem("half of a surrogate pair is not text", path=path))
                event.value = _printable(event.value)
        return str(event.value) if event.style or tag in _TEXT_TAGS else resolve(event.value)

    def _mapping(self, node: Node, depth: int) -> None:
        merged: list[Node] = []
        fields = node.fields
        while not isinstance(event := next(self.events), MappingEndEvent):
            at = _place(self.file, event.start_mark)
            key_node = self._node(event, node.path, None, depth + 1)
            key = key_node.text
            path = join(node.path, key)
            if isinstance(key_node.value, (list, dict)) or (key_node.value is None and not key):
                problem = at.problem("a key must be text", path=node.path, hint="is something missing before ':'?")
                self.problems.append(problem)
                self._node(next(self.events), path, at, depth + 1)
                continue
            child = self._node(next(self.events), path, at, depth + 1)
            if key == MERGE_KEY and isinstance(event, ScalarEvent) and not event.style:
                merged += child.value if isinstance(child.value, list) else [child]
            elif key in fields:
                first = fields[key].key_at
                self.problems.append(at.problem(
                    f"{show(key)} is there twice; the first is at line {first.line}, column {first.column}", path=path,
                    hint="keep one of the two",
                ))
            else:
                fields[key] = child
        for source in merged:
            if not isinstance(source.value, dict):
                self.problems.append(source.at.problem("'<<' takes a mapping, or a list of mappings", path=node.path))
            for key, child in source.fields.items():
                if key not in fields:
                    fields[key] = replace(self._copy(child, join(node.path, key), depth + 1), key_at=child.key_at)

    def _copy(self, node: Node, path: str, depth: int) -> Node:
        """A copy at another path, counted like any other value: an alias bomb meets MAX_NODES."""
        self._counted(node.at, depth)
        match node.value:
            case dict():
                fields = {key: self._copy(child, join(path, key), depth + 1) for key, child in node.value.items()}
                return replace(node, value=fields, path=path)
            case list():
                items = [self._copy(child, f"{path}[{i}]", depth + 1) for i, child in enumerate(node.value)]
                return replace(node, value=items, path=path)
            case _:
                return replace(node, path=path)


def resolve(text: str) -> Scalar:
    """A plain scalar by the core schema. Numbers of more than 40 digits stay text: no field could hold them."""
    first = text[:1]
    if first not in "-+.0123456789~nNtTfF" and text:
        return text
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text):
        return True
    if _FALSE.fullmatch(text):
        return False
    if _INT.fullmatch(text):
        return int(text)
    if _OCTAL.fullmatch(text):
        return int(text[2:], 8)
    if _HEX.fullmatch(text):
        return int(text, 16)
    if _FLOAT.fullmatch(text):
        return float(text)
    if infinite := _INF.fullmatch(text):
        return float(f"{infinite[1]}inf")
    return float("nan") if _NAN.fullmatch(text) else text


def _printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
