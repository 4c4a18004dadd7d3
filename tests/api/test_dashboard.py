"""The dashboard's files: open, self-contained, and within what the content security policy allows."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.resources import as_file, files

import pytest

from jobsched.api.dashboard import FILES
from tests.api.conftest import Api


@pytest.mark.parametrize("path", sorted(FILES))
def test_the_files_are_served_without_a_token(api: Api, path: str) -> None:
    response = api.http.get(path, headers={"Authorization": ""})
    assert response.status_code == 200
    assert response.headers["content-type"] == FILES[path][1]
    assert api.http.head(path, headers={"Authorization": ""}).status_code == 200
    assert len(response.text) > 1_000


@pytest.mark.parametrize("path", sorted(FILES))
def test_nothing_comes_from_elsewhere_and_nothing_is_inline(api: Api, path: str) -> None:
    text = api.http.get(path).text
    hosts = set(re.findall(r"https?://([^/\"]+)", text))
    assert hosts <= {"www.w3.org"}  # the name of SVG's vocabulary
    inline = r"<style|<script(?![^>]*\bsrc=)|\bstyle=|\bon\w+=\"|innerHTML|insertAdjacentHTML|\beval\("
    assert not re.search(inline, text)


def test_the_page_asks_for_the_files_that_are_there(api: Api) -> None:
    page = api.http.get("/").text
    asked = set(re.findall(r"(?:href|src)=\"([\w.]+)\"", page))
    assert {f"/{name}" for name in asked} == set(FILES) - {"/"}


def test_every_path_that_the_script_asks_for_is_in_the_api(api: Api) -> None:
    script = api.http.get("/dashboard.js").text
    asked = set(re.findall(r"(?<!\.)(?:get|post|stream)\(\s*[`\"]([a-z]+(?:/\$\{\w+\}(?:/[a-z]+)?)?)", script))
    known = {re.sub(r"\{\w+\}", "X", path.removeprefix("/v1/")) for path in api.app.api.openapi()["paths"]}
    assert asked >= {"jobs", "nodes", "queues", "doctor", "events", "progress", "jobs/${id}/logs", "jobs/${ref}/why"}
    wishes = {"jobs/${id}"}  # followed by the verb
    assert {re.sub(r"\$\{\w+\}", "X", path) for path in asked - wishes} <= known


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_script_is_well_formed() -> None:
    with as_file(files("jobsched.api.dashboard").joinpath("dashboard.js")) as path:
        command = ["node", "--input-type=module", "--check"]
        done = subprocess.run(command, stdin=path.open("rb"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
