"""Nodes and their cordons."""

from __future__ import annotations

import pytest

from jobsched.errors import NotFound
from tests.stage import Stage


def test_nodes_tell_what_is_free_and_who_is_there(stage: Stage) -> None:
    job = stage.run(stage.submit())
    node = stage.service.nodes()[0]
    assert (node.free_gpus, node.free.gpu_milli, node.jobs) == (3, 3_000, (job.id,))
    cordoned = stage.service.cordon("n1", drain=True, by="ann")
    assert cordoned.state == "draining"
    seq = stage.store.last_seq()
    stage.service.cordon("n1", drain=True)
    assert stage.store.last_seq() == seq
    assert stage.service.nodes()[0].state == "draining"
    assert stage.service.uncordon("n1").state == "ready"
    with pytest.raises(NotFound, match="n9"):
        stage.service.cordon("n9")
