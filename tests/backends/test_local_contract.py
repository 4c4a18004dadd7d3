"""The local backend keeps every promise of a backend."""

from __future__ import annotations

from tests.contracts.backend import ProcessBackendContract


class TestLocalBackend(ProcessBackendContract):
    """`engine` comes from conftest."""
