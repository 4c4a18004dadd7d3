"""Keeps the garbage collector away from what lives long.

A leader holds a few million objects for hours: jobs, specs, bindings. They are freed by their reference counts; looking
for cycles among them would stop the loop for most of a second every few minutes, and finds none.
"""

from __future__ import annotations

import gc

OFTEN = 700
"""Objects made between two looks at the youngest: so few that they are still at hand."""
NEVER = 1 << 30
OLD_ENOUGH = 10
"""Such looks after which what is left is taken to live long."""


def prepare() -> None:
    """From now on only the youngest are looked at. Before the first tick."""
    gc.set_threshold(OFTEN, NEVER, NEVER)


def settle() -> None:
    """Once enough was made: set everything aside for good that was looked at once. Costs what is youngest; called after
    every tick."""
    if gc.get_count()[1] >= OLD_ENOUGH:
        gc.collect(0)
        gc.freeze()
