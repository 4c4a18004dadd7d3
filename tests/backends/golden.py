"""Rendered requests beside files that people review: `JOBSCHED_GOLDEN=write pytest …` writes them anew."""

from __future__ import annotations

import json
import os
from pathlib import Path

FOLDER = Path(__file__).parent / "golden"


def check(name: str, rendered: object) -> None:
    """That `rendered`, as JSON, is what the file `golden/NAME.json` holds."""
    text = json.dumps(rendered, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    path = FOLDER / f"{name}.json"
    if os.environ.get("JOBSCHED_GOLDEN") == "write":
        path.write_text(text)
    assert path.read_text() == text, f"differs from {path}"
