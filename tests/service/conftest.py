"""The use cases, over a memory store and a live view that folds on demand."""

from __future__ import annotations

import pytest

from tests.stage import Stage


@pytest.fixture
def stage() -> Stage:
    return Stage()
