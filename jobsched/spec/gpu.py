"""A request for GPUs, in every notation that people write."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator

from jobsched.spec import quantity
from jobsched.spec.fields import Bytes, SpecModel, any_of
from jobsched.spec.quantity import show

GPU_KIND = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}(:[0-9]{1,2}g\.[0-9]{1,4}gb(\+[a-z.]{1,8})?)?")
"""A kind, with its profile when it is a MIG slice (`h100-80gb:1g.10gb`)."""
_COUNT = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")
_GPU_TEXT = (r"^\s*([A-Za-z0-9_. -]+(:[0-9]{1,2}[gG]\.[0-9]{1,4}[gG][bB](\+[A-Za-z.]{1,8})?)?\s*(\||$|(\([^()]+\))?\s*"
             r"(:(0*[1-9][0-9]*(\.[0-9]+)?|0+\.0*[1-9][0-9]*))?\s*$))+$")
"""What the notations of a GPU request look like, for schemas."""


class GpuRequest(SpecModel):
    """GPUs of one replica: kinds in order of preference, a range of memory, and how much, in thousandths of a GPU.

    Written `h100:8`, `any:1`, `any:0.5`, `24GB..:2` (memory range), `[h100:8, a100:8]`, `8`, or
    `{type: [h100, a100], memory: 24GB.., count: 8}`. A size without dots is the least memory.
    """

    model_config = ConfigDict(json_schema_extra=lambda schema: any_of(schema, [
        {"type": "string", "pattern": _GPU_TEXT, "examples": ["h100:8", "any:1", "any:0.5", "24GB..:2", "h100|a100:4"]},
        {"type": "number", "exclusiveMinimum": 0, "maximum": 1_024},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        {"type": "object", "additionalProperties": False, "minProperties": 1, "properties": {
            "type": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
            "memory": {"type": ["string", "number"], "examples": ["24GB..", "40GB..80GB"]},
            "count": {"type": ["number", "string"]},
        }},
    ]))

    kinds: Annotated[tuple[str, ...], Field(max_length=64)] = ()
    """GPU kinds that will do, best first; empty means any kind. `h100` also matches `h100-80gb`."""
    memory_min_bytes: Bytes = 0
    """Least memory of one GPU."""
    memory_max_bytes: Bytes = quantity.MAX_BYTES
    """Most memory of one GPU."""
    milli: Annotated[int, Field(strict=True, ge=1, le=1_024_000)] = 1_000
    """Thousandths of a GPU; below 1000 a share of one GPU, else a whole number of GPUs times 1000."""

    @model_validator(mode="before")
    @classmethod
    def _notation(cls, value: object) -> object:
        return parse_gpu(value)

    @field_validator("kinds")
    @classmethod
    def _kinds(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        kinds = tuple(dict.fromkeys(kind.strip().lower() for kind in value))
        for kind in kinds:
            if kind == "any":
                raise ValueError("'any' stands alone: it already includes every other kind")
            if not GPU_KIND.fullmatch(kind):
                raise ValueError(f"{show(kind)} is not a GPU kind; {_GPU_HINT}")
        return kinds

    @field_validator("memory_max_bytes")
    @classmethod
    def _range(cls, value: int, info: ValidationInfo) -> int:
        if info.data.get("memory_min_bytes", 0) > value:
            raise ValueError("the lower bound of GPU memory is above the upper bound")
        return value

    @field_validator("milli")
    @classmethod
    def _whole(cls, value: int) -> int:
        if value > 1_000 and value % 1_000:
            raise ValueError(f"{value / 1_000:g} GPUs: above 1 only whole GPUs can be asked for")
        return value

    @property
    def count(self) -> int:
        """How many GPU devices one replica is given (a share counts as one)."""
        return max(1, self.milli // 1_000)

    def __str__(self) -> str:
        """The shortest notation, which reads back to an equal request: `h100|a100:8`, `24GB..:2`, `h100(40GB..):1`."""
        low, high = self.memory_min_bytes, self.memory_max_bytes
        memory = ""
        if low or high != quantity.MAX_BYTES:
            upper = "" if high == quantity.MAX_BYTES else quantity.format_bytes(high)
            memory = f"{quantity.format_bytes(low)}..{upper}"
        kinds = "|".join(self.kinds)
        what = f"{kinds}({memory})" if kinds and memory else kinds or memory or "any"
        return f"{what}:{self.milli / 1_000:g}"


_GPU_HINT = "write for example h100:8, 24GB..:2, any:1 or any:0.5"


def parse_gpu(value: object) -> object:
    """Normal form (a dict of `GpuRequest` fields) of every GPU notation; other values pass through to pydantic."""
    match value:
        case bool():
            raise ValueError(f"{show(value)} is not a GPU request; {_GPU_HINT}")
        case int() | float():
            return {"milli": _gpu_milli(value)}
        case str():
            return _parse_gpu_text(value)
        case list() | tuple():
            return _parse_gpu_list(value)
        case dict() if value.keys() & {"type", "memory", "count"}:
            kinds = value.get("type", "any")
            result = {k: v for k, v in value.items() if k not in ("type", "memory", "count")}
            result["kinds"] = _kind_list(kinds.split("|")) if isinstance(kinds, str) else kinds
            result["milli"] = _gpu_milli(value.get("count", 1))
            return result | (_memory_range(value["memory"]) if "memory" in value else {})
        case _:
            return value


def _parse_gpu_list(value: Sequence[object]) -> dict[str, object]:
    parts = [part for part in map(parse_gpu, value) if isinstance(part, dict)]
    if not parts or len(parts) != len(value):
        raise ValueError("a list of GPUs holds notations such as h100:8, best first")
    common = {k: v for k, v in parts[0].items() if k != "kinds"}
    if any({k: v for k, v in part.items() if k != "kinds"} != common for part in parts):
        raise ValueError("every entry of a GPU list must ask for the same number of GPUs and the same memory")
    if len(parts) > 1 and not all(part.get("kinds") for part in parts):
        raise ValueError("'any' stands alone: it already includes every other kind")
    return common | {"kinds": [kind for part in parts for kind in part.get("kinds", ())]}


def _parse_gpu_text(text: str) -> dict[str, object]:
    text = text.strip()
    if len(text) > 4_096:
        raise ValueError(f"{show(text)} is not a GPU request; {_GPU_HINT}")
    head, colon, tail = text.rpartition(":")
    if not colon and _COUNT.fullmatch(text):
        head, tail = "any", text
    elif not _COUNT.fullmatch(tail):  # a MIG kind such as h100-80gb:1g.10gb holds a colon of its own
        head, tail = text, "1"
    result: dict[str, object] = {"milli": _gpu_milli(tail)}
    kinds, bracket, memory = head.partition("(")
    if bracket and memory.endswith(")"):
        result |= _memory_range(memory[:-1])
    elif ".." in head or _is_size(head):
        return result | _memory_range(head)
    return result | {"kinds": _kind_list((kinds if bracket and memory.endswith(")") else head).split("|"))}


def _kind_list(kinds: Sequence[str]) -> tuple[str, ...]:
    return () if [kind.strip() for kind in kinds] == ["any"] else tuple(kinds)


def _is_size(text: str) -> bool:
    """Whether text is a size with a unit: `24GB` is memory, `4090` is a kind."""
    try:
        return quantity.parse_bytes(text) > 0 and not text.strip().isdigit()
    except ValueError:
        return False


def _memory_range(value: object) -> dict[str, object]:
    low, _, high = value.partition("..") if isinstance(value, str) else (value, "", "")
    return {
        "memory_min_bytes": quantity.parse_bytes(low) if low != "" else 0,
        "memory_max_bytes": quantity.parse_bytes(high) if high.strip() else quantity.MAX_BYTES,
    }


def _gpu_milli(value: object) -> int:
    text = value.strip() if isinstance(value, str) else ""
    number = float(text) if _COUNT.fullmatch(text) else value
    if not isinstance(number, (int, float)) or isinstance(number, bool) or not 0.001 <= number <= 1_024:
        raise ValueError(f"{show(value)} is not a number of GPUs; write 1 to 1024, or a share such as 0.5")
    return round(number * 1_000)
