from __future__ import annotations

import json

from jobsched.contract import from_environ, to_environ
from jobsched.core.job import Phase
from tests.world import World, a_ps_spec, a_spec


def environments(world: World) -> dict[str, dict[str, str]]:
    found = {}
    for key, launch in world.engine.alive().items():
        _, _, role, index, _ = key.split("/")
        found[f"{role}/{index}"] = to_environ(launch.contract, launch.env)
    return found


def test_ranks_peers_and_coordinator_agree_over_the_gang() -> None:
    world = World(nodes=2, gpus=2)
    spec = a_spec(
        env={"A": "1"},
        roles={
            "worker": {"command": "w", "replicas": 3, "gpu": "any:1", "env": {"B": "2"}, "ports": {"debug": 0}},
            "ps": {"command": ["python", "ps.py"], "replicas": 2},
            "chief": {"command": "c", "gpu": "any:1"},
        },
    )
    job_id = world.submit(spec)
    world.run_to_phase(job_id, Phase.RUNNING)
    envs = environments(world)
    assert {name: env.get("RANK") for name, env in envs.items()} == {
        "chief/0": "0", "worker/0": "1", "worker/1": "2", "worker/2": "3", "ps/0": None, "ps/1": None,
    }  # fmt: skip
    assert len({env["TF_CONFIG"].split('"task"')[0] for env in envs.values()}) == 1
    assert len({(env["MASTER_ADDR"], env["MASTER_PORT"]) for env in envs.values()}) == 1
    cluster = json.loads(envs["ps/1"]["TF_CONFIG"])["cluster"]
    addresses = [address for role in cluster.values() for address in role]
    assert len(addresses) == len(set(addresses)) == 6
    assert envs["chief/0"]["MASTER_PORT"] not in {a.split(":")[1] for a in addresses}
    assert envs["worker/0"]["A"] + envs["worker/0"]["B"] == "12"
    assert int(envs["worker/1"]["JOBSCHED_PORT_DEBUG"]) > 0
    contract = from_environ(envs["worker/2"])
    assert contract is not None
    assert contract.address == cluster["worker"][2]
    assert {env["DMLC_ROLE"] for env in envs.values()} == {"server", "worker"}


def test_a_restarted_ps_keeps_its_address() -> None:
    world = World()
    job_id = world.submit(a_ps_spec())
    world.run_to_phase(job_id, Phase.RUNNING)
    before = environments(world)["ps/1"]["TF_CONFIG"]
    world.engine.kill(world.key(job_id, "ps", 1))
    world.tick(3)
    after = environments(world)["ps/1"]
    assert after["TF_CONFIG"] == before
    assert after["JOBSCHED_RESTART"] == "1"


def test_tokens_belong_to_the_attempt() -> None:
    world = World()
    first, second = world.submit(a_ps_spec()), world.submit()
    world.run_to_phase(second, Phase.RUNNING)
    tokens: dict[str, set[str]] = {}
    for key, launch in world.engine.alive().items():
        tokens.setdefault(key.split("/")[0], set()).add(launch.contract.token)
    assert all(len(found) == 1 for found in tokens.values())
    assert tokens[first] != tokens[second]
