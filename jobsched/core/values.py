"""Values: dataclasses that never change, at the price of plain objects.

`dataclass(frozen=True)` also guards at run time, and so makes each field ten times as dear to fill; a tick makes values
by the thousand. Here it is mypy that sees to it that nobody assigns: to it, this is the standard decorator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass
else:
    import dataclasses
    from functools import partial

    def dataclass(cls=None, /, *, frozen=False, **options):
        """`dataclasses.dataclass`, whose `frozen` means: hashable by its fields, guarded by mypy alone."""
        if cls is None:
            return partial(dataclass, frozen=frozen, **options)
        hashed = frozen and options.get("eq", True) and "__hash__" not in cls.__dict__
        return dataclasses.dataclass(cls, unsafe_hash=hashed, **options)
