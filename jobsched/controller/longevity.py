"""Keeps the garbage collector away from what lives long.

A leader holds a few million objects for hours: jobs, specs, bindings. They are freed by their reference counts; looking
for cycles among them would stop the loop for most of a second every few minutes, and finds none.
"""

from __future__ import annotations

import gc


def settle() -> None:
    """Collect what is young and set everything else aside for good. Costs what is young; call it now and then."""
    gc.collect(1)
    gc.freeze()
