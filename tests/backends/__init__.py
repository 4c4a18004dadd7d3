"""Engines for real, or stand-ins of them; each keeps the promises of `tests.contracts.backend`."""

import pytest

pytest.register_assert_rewrite("tests.contracts.backend")
