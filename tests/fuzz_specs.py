"""Feeds mutated job files to `jobsched.load` and insists on a job or a refusal that names its place, in bounded time.

    python -m tests.fuzz_specs [N=10000] [SEED=1]

Starts from the templates, the example jobs and a few hand-written files; everything random comes from SEED, so a
failure is repeated by the command that it prints. Ends with one line of JSON: how many files were accepted and
refused, the slowest, and the total time. Exit code 1 at the first traceback, missing place or file over the limit.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from jobsched import load
from jobsched.errors import SpecError

LIMIT_S = 5.0
"""For one file; a good one takes a hundredth of that."""
HAND_WRITTEN = (
    "apiVersion: jobsched.dev/v1alpha1\nkind: TrainingJob\nmetadata: {name: a, labels: {x: y}}\n"
    'spec: {command: a, gpu: "h100:8"}\n',
    "x-base: &b {cpu: 1, command: a}\nroles:\n  worker: {<<: *b, gpu: 24GB..:2}\n  ps: *b\n"
    "placement: {within: rack, nodes: {a: b}}\n",
    json.dumps(
        {"name": "a", "roles": {"w": {"command": ["a", 1], "replicas": {"min": 1, "max": 3}}}, "array": "0-9%4"},
        indent=1,
    ),
    "command: |\n  a\n  b\nenv: {A: , B: 1.10, C: 'x'}\nrestart: {max: 3, retry_on: [33], scope: role}\n"
    "time_limit: 1h30m\n",
)
TOKENS = (
    "&a ",
    "*a",
    "!!str ",
    "!x ",
    "? ",
    ": ",
    "- ",
    "[",
    "]",
    "{",
    "}",
    "|\n",
    ">-\n",
    "'",
    '"',
    "#",
    "\t",
    "\n",
    "\n\n",
    "---\n",
    "...\n",
    "%YAML 1.1\n",
    "<<: ",
    "~",
    ".nan",
    ".inf",
    "-1",
    "0",
    "1e999",
    "9" * 30,
    "9" * 400,
    "true",
    "null",
    "\\",
    '"\\ud800"',
    "\0",
    "\x85",
    "\u2028",
    "\ufeff",
    "é",
    "😀",
    "0-99999",
    "10000..1",
    "any:0.5",
    "secret://",
    "h100:",
    "99999999h",
    "512Ti",
    "  ",
    "\r\n",
    "`",
    "@",
    "%",
)
WORDS = (
    "gpus",
    "roles",
    "worker",
    "ps",
    "command",
    "replicas",
    "env",
    "cpu",
    "spec",
    "metadata",
    "array",
    "indices",
    "min",
    "kinds",
    "type",
)


@cache
def seeds() -> tuple[str, ...]:
    """The valid files that mutation starts from."""
    examples = sorted((Path(__file__).parent.parent / "jobs").glob("*/job.yaml"))
    return (
        *map(load.template, load.TEMPLATES),
        *HAND_WRITTEN,
        *(path.read_text(encoding="utf-8") for path in examples),
    )


def mutated(text: str, rng: random.Random) -> str:
    """The text after one to eight random edits."""
    for _ in range(rng.randint(1, 8)):
        text = rng.choice(EDITS)(text, rng)
    return text[:100_000]


def _insert(text: str, rng: random.Random) -> str:
    at = rng.randint(0, len(text))
    return text[:at] + rng.choice(TOKENS) * rng.choice((1, 1, 1, 1, 2, 60)) + text[at:]


def _delete(text: str, rng: random.Random) -> str:
    at = rng.randint(0, len(text))
    return text[:at] + text[at + rng.randint(1, 20) :]


def _character(text: str, rng: random.Random) -> str:
    at = rng.randint(0, len(text))
    return (
        text[:at]
        + chr(rng.choice((rng.randrange(32, 127), rng.randrange(0xD800), rng.randrange(0x10000, 0x110000))))
        + text[at + 1 :]
    )


def _duplicate_line(text: str, rng: random.Random) -> str:
    lines = text.split("\n")
    lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
    return "\n".join(lines)


def _swap_lines(text: str, rng: random.Random) -> str:
    lines = text.split("\n")
    a, b = rng.randrange(len(lines)), rng.randrange(len(lines))
    lines[a], lines[b] = lines[b], lines[a]
    return "\n".join(lines)


def _indent(text: str, rng: random.Random) -> str:
    lines = text.split("\n")
    at = rng.randrange(len(lines))
    lines[at] = rng.choice((" ", "    ", "\t", "- ")) + lines[at] if rng.random() < 0.6 else lines[at].lstrip()
    return "\n".join(lines)


def _value(text: str, rng: random.Random) -> str:
    lines = text.split("\n")
    at = rng.randrange(len(lines))
    key, colon, _ = lines[at].partition(":")
    lines[at] = f"{key}{colon} {rng.choice(TOKENS)}{rng.choice(TOKENS)}"
    return "\n".join(lines)


def _word(text: str, rng: random.Random) -> str:
    return text.replace(rng.choice(WORDS), rng.choice(WORDS), rng.randint(1, 3))


def _truncate(text: str, rng: random.Random) -> str:
    return text[: rng.randint(0, len(text))]


def _splice(text: str, rng: random.Random) -> str:
    other = rng.choice(seeds())
    return text[: rng.randint(0, len(text))] + other[rng.randint(0, len(other)) :]


def _comment_in(text: str, rng: random.Random) -> str:
    lines = text.split("\n")
    at = rng.randrange(len(lines))
    lines[at] = lines[at].replace("# ", "", 1)
    return "\n".join(lines)


EDITS: Sequence[Callable[[str, random.Random], str]] = (
    _insert,
    _delete,
    _character,
    _duplicate_line,
    _swap_lines,
    _indent,
    _value,
    _word,
    _truncate,
    _splice,
    _comment_in,
)


def check(text: str) -> str:
    """`accepted` or `refused`; AssertionError for a refusal without a place, anything else is a bug of the reader."""
    try:
        load.load_job(text, file="fuzz.yaml", environ={"A": "1"})
    except SpecError as exc:
        refusal = exc
    else:
        return "accepted"
    assert refusal.problems, "a refusal without problems"
    for problem in refusal.problems:
        assert problem.line > 0, f"no line: {problem}"
        assert problem.column > 0, f"no column: {problem}"
        assert problem.message, "a problem without a message"
    refusal.render().encode()
    json.dumps(refusal.to_wire())
    return "refused"


def main(count: int = 10_000, seed: int = 1) -> int:
    found = {"accepted": 0, "refused": 0}
    slowest = 0.0
    began = time.perf_counter()
    for number in range(count):
        rng = random.Random(f"{seed}/{number}")
        text = mutated(rng.choice(seeds()), rng) if number >= len(seeds()) else seeds()[number]
        start = time.perf_counter()
        try:
            found[check(text)] += 1
            took = time.perf_counter() - start
            assert took < LIMIT_S, f"took {took:.1f} s"
        except Exception:
            print(f"file {number} of seed {seed}: {text!r}", file=sys.stderr)
            print(f"again: python -m tests.fuzz_specs {number + 1} {seed}", file=sys.stderr)
            raise
        slowest = max(slowest, took)
    print(
        json.dumps(
            {
                "files": count,
                "seed": seed,
                **found,
                "tracebacks": 0,
                "without_place": 0,
                "slowest_s": round(slowest, 3),
                "total_s": round(time.perf_counter() - began, 1),
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
