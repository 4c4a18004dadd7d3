"""Hypothesis strategies for valid job files, in the notations that people write."""

from __future__ import annotations

from hypothesis import strategies as st

names = st.from_regex(r"[a-z][a-z0-9-]{0,15}[a-z0-9]", fullmatch=True)
texts = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=30)
sizes = st.builds(
    lambda number, unit: f"{number}{unit}",
    st.integers(0, 500),
    st.sampled_from(["", "Ki", "Mi", "GiB", "GB", "MB", "kb", "T"]),
) | st.integers(0, 2**49)
durations = (
    st.builds(
        lambda number, unit: f"{number}{unit}", st.integers(0, 3_000), st.sampled_from(["", "ms", "s", "m", "h", "d"])
    )
    | st.floats(0, 1e6).filter(lambda x: x == x)
    | st.just("1h30m")
    | st.just("2-12:00:00")
)
cpus = st.sampled_from([0.25, "500m", "1.5"]) | st.integers(0, 512)
env_names = st.from_regex(r"[A-Z_][A-Z0-9_]{0,10}", fullmatch=True)
envs = st.dictionaries(env_names, texts | st.just("secret://key") | st.integers() | st.booleans(), max_size=3)
kinds = st.sampled_from(["h100", "A100", "rtx4090", "h100-80gb:1g.10gb", "h100|a100"])
gpus = (
    st.integers(1, 1_024)
    | st.sampled_from([0.5, "any:0.25", "24GB..:2", "..40GB", "any", "h100(40GB..80GB):4", ["h100:8", "a100:8"]])
    | st.builds(lambda kind, n: f"{kind}:{n}", kinds, st.integers(1, 64))
    | st.fixed_dictionaries(
        {"type": kinds | st.lists(st.sampled_from(["h100", "l4"]), min_size=1, unique=True)},
        optional={"count": st.integers(1, 8), "memory": st.sampled_from(["24GB..", "16Gi..80GB"])},
    )
)
replicas = (
    st.integers(1, 100)
    | st.builds(lambda a, b: f"{a}..{a + b}", st.integers(1, 50), st.integers(0, 50))
    | st.builds(
        lambda a, b, c: {"min": a, "prefer": a + b, "max": a + b + c},
        st.integers(1, 9),
        st.integers(0, 9),
        st.integers(0, 9),
    )
)
exit_codes = st.lists(st.integers(1, 255), max_size=3)
restarts = st.fixed_dictionaries(
    {},
    optional={
        "scope": st.sampled_from(["replica", "role", "job"]),
        "max": st.integers(0, 1_000),
        "backoff": st.integers(0, 60),
        "backoff_max": st.just("1h"),
        "retry_on": exit_codes,
    },
)
commands = texts.map(lambda text: f"echo {text}") | st.lists(
    texts | st.integers() | st.floats(-1e6, 1e6), max_size=3
).map(lambda words: ["run", *words])
roles = st.fixed_dictionaries(
    {"command": commands},
    optional={
        "replicas": replicas,
        "cpu": cpus,
        "memory": sizes,
        "gpu": gpus,
        "image": texts,
        "working_dir": texts,
        "env": envs,
        "ports": st.dictionaries(st.sampled_from(["http", "grpc"]), st.just(0), max_size=2),
        "restart": restarts,
        "procs": st.integers(1, 8),
        "preload": st.lists(st.sampled_from(["torch", "os.path"]), max_size=2),
    },
)
arrays = (
    st.sampled_from(["0-9", "1,3,5", "0-99%4", "7", " 1 - 3 , 9 % 2"])
    | st.integers(1, 500)
    | st.fixed_dictionaries(
        {"indices": st.lists(st.integers(0, 1_000_000), min_size=1, max_size=20)},
        optional={"max_parallel": st.integers(0, 9)},
    )
)
jobs = st.fixed_dictionaries(
    {
        "roles": st.dictionaries(names, roles, min_size=1, max_size=3).filter(
            lambda found: not {"ps", "evaluator", "chief"} & found.keys()
        ),
    },
    optional={
        "name": names,
        "queue": names,
        "priority": st.integers(-1_000_000, 1_000_000),
        "env": envs,
        "restart": restarts,
        "labels": st.dictionaries(names, texts, max_size=3),
        "working_dir": texts,
        "image": texts,
        "array": arrays,
        "clean_up": st.sampled_from(["all", "running", "none"]),
        "keep_after_finish": durations,
        "time_limit": durations,
        "expected": durations,
        "hang_timeout": durations,
        "checkpoint": st.fixed_dictionaries(
            {},
            optional={
                "dir": texts,
                "signal": st.sampled_from(["USR1", "none"]),
                "grace": durations,
                "interval": durations,
            },
        ),
        "placement": st.fixed_dictionaries(
            {},
            optional={
                "within": st.sampled_from(["zone", "rack"]),
                "spread": st.just("node"),
                "nodes": st.dictionaries(names, texts, max_size=2),
                "tolerate": st.lists(texts, max_size=2),
                "avoid": st.lists(names, max_size=2),
            },
        ),
        "after": st.lists(names, max_size=2),
    },
)
