"""For every test: logging as if nobody had configured it, and at the end a count of what was not run, with reasons."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import settings

# No deadlines: a loaded machine is no defect. The same examples each time, so that a red run is about the change that
# it tests; BENCH=full looks for new ones.
settings.register_profile("patient", deadline=None, derandomize=os.environ.get("BENCH") != "full")
settings.load_profile("patient")

# A shell that runs tests in the background has them ignore SIGINT, and what they start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _default_logging() -> Iterator[None]:
    """A server configures logging for its process; the next test's stderr is another file."""
    yield
    structlog.reset_defaults()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else str(report.longrepr)
        for report in skipped
    )
    terminalreporter.section("not run here")
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"{count} × {reason}")
    terminalreporter.write_line(f"{len(skipped)} tests or modules skipped")
