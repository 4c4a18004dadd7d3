"""Keeps the garbage collector away from what lives long.

A leader holds a few million objects for hours: jobs, specs, bindings. They are freed by their reference counts; looking
for cycles among them would stop the loop for most of a second every few minutes, and finds none.
"""

from __future__ import annotations

import gc

OLD_ENOUGH = 2
"""Collections of the middle generation after which what is left is taken to live long."""


def settle() -> None:
    """Once enough was allocated: collect what is young and set everything else aside for good. Costs what is young;
    called after every tick."""
    if gc.get_count()[2] >= OLD_ENOUGH:
        gc.collect(1)
        gc.freeze()
