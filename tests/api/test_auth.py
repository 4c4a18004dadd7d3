"""The gate: hosts, tokens, sizes, headers; and the token file."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobsched.api.auth import MAX_BODY_BYTES, load_token
from jobsched.errors import ConfigError
from tests.api.conftest import Api


def test_a_missing_or_wrong_token_is_told_apart_and_challenged(api: Api) -> None:
    for value, words in ((None, "a token is required"), ("Bearer nope", "a valid token is required")):
        del api.http.headers["Authorization"]
        response = api.http.get("/v1/jobs", headers={"Authorization": value} if value else {})
        assert (response.status_code, response.json()["code"]) == (401, "E400")
        assert response.json()["message"] == words
        assert response.headers["www-authenticate"].startswith("Bearer")
        api.http.headers["Authorization"] = "x"


def test_even_unknown_paths_and_the_document_need_the_token(api: Api) -> None:
    for path in ("/nowhere", "/v1/openapi.json", "/metrics", "/v1/healthz/../jobs", "/docs"):
        assert api.http.get(path, headers={"Authorization": ""}).status_code == 401


def test_only_reading_is_open_on_open_paths(api: Api) -> None:
    assert api.http.get("/v1/healthz", headers={"Authorization": ""}).status_code == 200
    assert api.http.post("/v1/healthz", headers={"Authorization": ""}).status_code == 401


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:80", "localhost:1234", "[::1]:80", "[::1]"])
def test_loopback_names_are_served(api: Api, host: str) -> None:
    assert api.http.get("/v1/jobs", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "localhost.evil"])
def test_a_rebound_name_is_refused_before_anything_else(api: Api, host: str) -> None:
    response = api.http.get("/v1/healthz", headers={"Host": host})
    assert (response.status_code, response.json()["code"]) == (403, "E403")


def test_a_large_body_is_refused_however_it_is_framed(api: Api) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(MAX_BODY_BYTES // 65_536 + 1):
            yield b"x" * 65_536

    for body in (b"x" * (MAX_BODY_BYTES + 1), chunks()):
        response = api.http.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
        assert (response.status_code, response.json()["code"]) == (413, "E100")


def test_every_answer_has_the_security_headers(api: Api) -> None:
    for path in ("/v1/healthz", "/v1/jobs", "/nowhere", "/"):
        headers = api.http.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert len(headers["x-request-id"]) == 16
        assert "access-control-allow-origin" not in headers


def test_the_token_is_made_once_and_private(tmp_path: Path) -> None:
    path = tmp_path / "token"
    token = load_token(path)
    assert len(token) >= 40
    assert load_token(path) == token
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_token(tmp_path / "other") != token


def test_a_token_that_others_can_read_or_that_is_empty_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "token"
    load_token(path)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="read by others"):
        load_token(path)
    path.chmod(0o600)
    path.write_text("\n")
    with pytest.raises(ConfigError, match="empty"):
        load_token(path)
