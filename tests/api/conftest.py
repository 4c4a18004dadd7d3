from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from starlette.testclient import TestClient

from jobsched.api.app import Application, create_app
from tests.stage import Stage

TOKEN = "secret-token"


@dataclass
class Api:
    stage: Stage
    app: Application
    http: TestClient
    """With the token, from loopback."""
    stopped: list[bool]


@pytest.fixture
def api() -> Iterator[Api]:
    stage, stopped = Stage(), list[bool]()
    app = create_app(stage.service, TOKEN, version="1.2.3", shutdown=lambda: stopped.append(True))
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with TestClient(app.asgi, base_url="http://127.0.0.1", headers=headers) as http:
        yield Api(stage, app, http, stopped)
