"""References to jobs."""

from __future__ import annotations

import pytest

from jobsched.errors import Conflict, NotFound
from tests.stage import Stage, a_spec


def test_references(stage: Stage) -> None:
    old, new = stage.submit(), stage.submit()
    other = stage.service.submit(a_spec(name="gpt"), owner="bob").jobs[0].job
    resolve = stage.service.resolve
    assert resolve(old.id).id == resolve(old.id.upper()).id == old.id
    assert resolve("bert").id == new.id
    assert resolve("@last").id == other.id
    assert resolve("@last", owner="ann").id == new.id
    unique = next(n for n in range(4, 27) if not new.id.startswith(old.id[:n]) and not other.id.startswith(old.id[:n]))
    assert resolve(old.id[:unique]).id == old.id
    with pytest.raises(Conflict) as caught:
        resolve(old.id[:6])
    assert old.id in caught.value.hint
    with pytest.raises(NotFound, match="bret") as missing:
        resolve("bret")
    assert "bert" in missing.value.hint


@pytest.mark.parametrize("ref", ["", "@last", "nothing", "01k", "0" * 26, "../..", "é\0"])
def test_a_reference_to_nothing_is_not_found(stage: Stage, ref: str) -> None:
    with pytest.raises(NotFound):
        stage.service.get(ref)
