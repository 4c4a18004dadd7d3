"""README.md keeps its word: every command in it exists with its options, every YAML block loads, every Python block
compiles, and every file it points at is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from jobsched import load
from jobsched.cli.main import cli

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.M | re.S)


def commands() -> list[str]:
    """Every `jobsched …` of the shell blocks and of inline code that is more than a mention."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    found = [m[1] for line in lines for m in re.finditer(r"(?:^|\$\(|\| )(jobsched [^|)#]*)", line)]
    return found + re.findall(r"`(jobsched [^`]+)`", TEXT)


def test_readme_shows_what_it_promises() -> None:
    assert len(commands()) >= 20
    assert len(blocks("yaml")) >= 2
    assert len(blocks("python")) >= 3
    figures = TEXT.partition("\n## Figures\n")[2].partition("\n## ")[0]
    assert len(re.findall(r"^\| .*\d.* \|$", figures, re.M)) >= 5


@pytest.mark.parametrize("line", commands())
def test_command_exists_and_has_these_options(line: str) -> None:
    command: click.Command = cli
    words = shlex.split(line)[1:]
    asks_help = words[-1:] == ["--help"]
    if asks_help:
        words.pop()
    ctx = click.Context(cli, info_name="jobsched")
    while isinstance(command, click.Group) and words:
        name, found, words = command.resolve_command(ctx, words)
        assert found is not None
        command, ctx = found, click.Context(found, info_name=name, parent=ctx)
    bare = line.split() == ["jobsched", *ctx.command_path.split()[1:]]  # a mention such as `jobsched run`
    if not asks_help and not (bare and any(p.required for p in command.params)):
        command.make_context(ctx.info_name, words, parent=ctx.parent)


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_blocks_are_jobs(text: str) -> None:
    load.load_job(text, environ={})


@pytest.mark.parametrize("text", blocks("python"))
def test_python_blocks_compile(text: str) -> None:
    compile(text, "README.md", "exec")


def test_files_and_make_targets_exist() -> None:
    named = set(re.findall(r"\]\(([^)#:]+)\)", TEXT)) | set(re.findall(r"\b(?:jobs|configs)/[\w./-]+\w", TEXT))
    assert named
    assert [name for name in named if not (README.parent / name).exists()] == []
    targets = re.findall(r"^([a-z]+):", (README.parent / "Makefile").read_text(), re.M)
    assert set(re.findall(r"\bmake ([a-z]+)", TEXT)) <= set(targets)
