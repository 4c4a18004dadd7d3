from __future__ import annotations

import os
import time
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from jobsched import load
from jobsched.errors import ConfigError, Problem, SpecError, UsageError
from jobsched.spec.job import JobSpec
from tests.fuzz_specs import check, mutated, seeds
from tests.spec import strategies

REPOSITORY = Path(__file__).parent.parent


def problems(text: str | dict[str, object], **options: object) -> tuple[Problem, ...]:
    with pytest.raises(SpecError) as refusal:
        load.load_job(text, file="job.yaml", **options)  # type: ignore[arg-type]
    return refusal.value.problems


def problem(text: str | dict[str, object], **options: object) -> Problem:
    found = problems(text, **options)
    assert len(found) == 1, [p.message for p in found]
    return found[0]


# ---- forms ----


def test_one_role_at_the_top_is_a_worker() -> None:
    short = load.load_job(
        "command: python train.py\ngpu: h100:8\nreplicas: 2..4\nimage: i\nports: {http: 0}\nname: a\n"
    )
    long = load.load_job(
        "name: a\nimage: i\n"
        "roles: {worker: {command: python train.py, gpu: 'h100:8', replicas: 2..4, ports: {http: 0}}}"
    )
    assert short == long


def test_the_wrapped_form_is_the_same_job() -> None:
    plain = load.load_job("name: bert\nlabels: {team: a, x: y}\nroles: {worker: {command: a}}\nqueue: q\n")
    wrapped = load.load_job(
        "apiVersion: jobsched.dev/v1alpha1\nkind: TrainingJob\n"
        "metadata: {name: bert, labels: {team: a}, namespace: ml, annotations: {k: v}}\n"
        "spec:\n  queue: q\n  labels: {x: y}\n  command: a\nstatus: {phase: QUEUED}\n"
    )
    assert plain == wrapped


@pytest.mark.parametrize(
    ("text", "line", "complaint"),
    [
        ("apiVersion: jobsched.dev/v2\nkind: TrainingJob\nspec: {command: a}\n", 1, "jobsched.dev/v1alpha1"),
        ("apiVersion: jobsched.dev/v1alpha1\nkind: Pod\nspec: {command: a}\n", 2, "TrainingJob"),
        ("kind: TrainingJob\nspec: {command: a}\n", 1, "apiVersion is missing"),
        (
            "apiVersion: jobsched.dev/v1alpha1\nkind: TrainingJob\nqueue: a\nspec: {command: a}\n",
            3,
            "unknown field 'queue'",
        ),
        (
            "apiVersion: jobsched.dev/v1alpha1\nkind: TrainingJob\nmetadata: {nmae: a}\nspec: {command: a}\n",
            3,
            "unknown field 'nmae'",
        ),
        (
            "apiVersion: jobsched.dev/v1alpha1\nkind: TrainingJob\nmetadata: {name: a}\nspec: {command: a, name: b}\n",
            3,
            "is not spec.name",
        ),
        (
            "apiVersion: jobsched.dev/v1alpha1\nkind: TrainingJob\nmetadata: 3\nspec: {command: a}\n",
            3,
            "must be a mapping",
        ),
        ("apiVersion: jobsched.dev/v1alpha1\nkind: TrainingJob\nspec: {command: a, cpu: x}\n", 3, "is not a CPU count"),
        ("apiVersion: jobsched.dev/v1alpha1\nkind: TrainingJob\n", 1, "spec is missing"),
    ],
)
def test_the_wrapped_form_is_checked(text: str, line: int, complaint: str) -> None:
    found = problem(text)
    assert found.line == line
    assert complaint in found.message


def test_fields_that_begin_with_x_are_the_authors_own() -> None:
    spec = load.load_job("x-common: &c {cpu: 2}\nroles:\n  worker: {<<: *c, command: a}\n  ps: {<<: *c, command: b}\n")
    assert {name: role.cpu for name, role in spec.roles.items()} == {"worker": 2_000, "ps": 2_000}


def test_paths_are_the_ones_that_were_written() -> None:
    assert problem("command: a\ncpu: x\n").field == "cpu"
    wrapped = "apiVersion: jobsched.dev/v1alpha1\nkind: TrainingJob\nspec: {command: a, cpu: x}\n"
    assert problem(wrapped).field == "spec.cpu"
    assert problem("roles: {worker: {command: a, cpu: x}}").field == "roles.worker.cpu"


# ---- all problems, each with its place ----


def test_every_problem_is_reported_at_once_in_the_order_of_the_document() -> None:
    text = """\
name: Bert
queue: research
gpus: 4
roles:
  worker:
    replcias: 4
    gpu: h100:x
    queue: default
    env: {A: 1.10, B: }
  replicas: 4
  ps: {command: "", cpu: lots, replicas: 0}
success: cheif
time_limit: 6 hours
checkpoint: {signal: USR3}
name: other
priority: true
env: {"bad name": x, MISSING: }
"""
    found = problems(text, environ={}, overrides=["roles.worker.procs=x", "roles.wroker.cpu=3"])
    assert [(p.place, p.field, p.hint) for p in found] == [
        ("--set roles.worker.procs=x", "roles.worker.procs", ""),
        ("--set roles.wroker.cpu=3", "roles.wroker.cpu", "did you mean 'worker'?"),
        ("job.yaml:1:7", "name", ""),
        ("job.yaml:3:1", "gpus", "'gpu' belongs to a role: put it under roles.NAME"),
        ("job.yaml:5:3", "roles.worker.command", ""),
        ("job.yaml:6:5", "roles.worker.replcias", "did you mean 'replicas'?"),
        ("job.yaml:7:10", "roles.worker.gpu", ""),
        ("job.yaml:8:5", "roles.worker.queue", "'queue' belongs to the job: move it to the left, out of roles"),
        ("job.yaml:9:20", "roles.worker.env.B", 'export B, give it with -e B=…, or write "" for empty'),
        ("job.yaml:10:13", "roles.replicas", "'replicas' is a field of a role: is it indented too little?"),
        ("job.yaml:11:17", "roles.ps.command", ""),
        ("job.yaml:11:26", "roles.ps.cpu", ""),
        ("job.yaml:11:42", "roles.ps.replicas", ""),
        ("job.yaml:12:10", "success", "did you mean 'chief'?"),
        ("job.yaml:13:13", "time_limit", ""),
        ("job.yaml:14:22", "checkpoint.signal", "did you mean 'USR2'?"),
        ("job.yaml:15:1", "name", "keep one of the two"),
        ("job.yaml:16:11", "priority", ""),
        ("job.yaml:17:7", "env.bad name", ""),
        ("job.yaml:17:22", "env.MISSING", 'export MISSING, give it with -e MISSING=…, or write "" for empty'),
    ]


@pytest.mark.parametrize(
    ("text", "line", "column", "message", "hint"),
    [
        ("command: a\ngpus: 4\n", 2, 1, "unknown field 'gpus'", "did you mean 'gpu'?"),
        ("command: a\nnum_nodes: 4\n", 2, 1, "unknown field 'num_nodes'", "here it is called replicas"),
        (
            "roles: {w: {command: a, backoffLimit: 4}}\n",
            1,
            25,
            "unknown field 'backoffLimit'",
            "here it is called restart.max",
        ),
        (
            "roles: {w: {command: a}}\nprocs: 4\n",
            2,
            1,
            "unknown field 'procs'",
            "'procs' belongs to a role: put it under roles.NAME",
        ),
        (
            "roles: {w: {command: a}}\ncpus: 4\n",
            2,
            1,
            "unknown field 'cpus'",
            "'cpu' belongs to a role: put it under roles.NAME",
        ),
        ("command: a\nrestart: {maximum: 3}\n", 2, 11, "unknown field 'maximum'", "did you mean 'max'?"),
        ("command: a\ngpu: {typ: h100, count: 3}\n", 2, 7, "unknown field 'typ'", "did you mean 'type'?"),
        ("command: a\nzzz: 1\n", 2, 1, "unknown field 'zzz'", "known fields: name, "),
        ("command: a\nmetadata: {}\n", 2, 1, "unknown field 'metadata'", "the wrapped form begins with apiVersion"),
        ("command: a\ncpu:\n", 2, 1, "cpu: has no value", "write one, or remove the line"),
        ("command: a\nqueue: ~\n", 2, 1, "queue: has no value", "write one, or remove the line"),
        ("command: a\nname: 5\n", 2, 7, "name: must be text, not 5", "put it in quotes"),
        ("command: a\npriority: High!\n", 2, 11, "priority: must be a whole number, not the text 'High!'", ""),
        ("command: a\npriority: 1.5\n", 2, 11, "priority: must be a whole number, not 1.5", ""),
        ("command: a\npriority: 9999999\n", 2, 11, "priority: must be at most 1,000,000, not 9999999", ""),
        ("command: a\nafter: b\n", 2, 8, "after: must be a list, not the text 'b'", "write [a, b]"),
        ("command: a\nafter: [b, 3]\n", 2, 12, "after[1]: must be text, not 3", "put it in quotes"),
        (
            "command: a\nplacement: [rack]\n",
            2,
            1,
            "placement: must be a mapping of fields, not a list",
            "write its fields",
        ),
        ("command: a\nreplicas: {min: 0}\n", 2, 17, "min: must be at least 1, not 0", ""),
        ("command: a\nreplicas: {min: 3, max: 2}\n", 2, 1, "replicas: replicas need min <= prefer <= max", ""),
        ("command: a\nenv: {A: [1]}\n", 2, 7, "A: must be text, not a list", ""),
        ("command: {a: b}\n", 1, 1, "command: a mapping is not a command", ""),
        ('command: a\nimage: "\\0"\n', 2, 8, "image: holds a NUL character", ""),
        ("command: a\narray: 3-1\n", 2, 8, "array: '3-1' is not a range", ""),
        ("queue: a\n", 1, 1, "roles: a job needs at least one role", ""),
        ("roles: {}\n", 1, 1, "roles: a job needs at least one role", ""),
        ("roles: [a]\n", 1, 1, "roles: must be a mapping of fields, not a list", ""),
        ("- command: a\n", 1, 1, "a job is a mapping of fields, not a list", "for example"),
        ("just text", 1, 1, "a job is a mapping of fields, not the text 'just text'", "for example"),
        ("", 1, 1, "the document is empty", ""),
        ("command: a\n  cpu: 4\n", 2, 6, "this is not YAML", "is the line above indented alike?"),
        ("roles:\n\tworker: {}\n", 2, 1, "this is not YAML", "indent with spaces, not tabs"),
        ("a: [1\nb: 2\n", 2, 2, "this is not YAML", "is a bracket"),
    ],
)
def test_plain_words_at_the_right_place(text: str, line: int, column: int, message: str, hint: str) -> None:
    found = problem(text)
    assert (found.file, found.line, found.column) == ("job.yaml", line, column)
    assert found.message.startswith(message)
    assert found.hint.startswith(hint)


def test_no_message_speaks_of_pydantic_or_types() -> None:
    text = "roles: {w: {command: 5, replicas: [], cpu: {}, env: 3, ports: [1], restart: x, procs: {}, preload: 3}}"
    for found in problems(text):
        assert not {"Input", "valid", "dict", "str", "pydantic", "NoneType"} & set(found.message.split()), found.message


def test_very_many_problems_are_counted_not_listed() -> None:
    text = "command: a\n" + "".join(f"x{i}: 1\n" for i in range(5_000))
    found = problems(text)
    assert len(found) == 101
    assert found[-1].message == "and 4900 more problems from here on"
    assert found[-1].line == 102


def test_a_dict_has_fields_but_no_lines() -> None:
    found = problem({"command": "a", "restart": {"max": -1}})
    assert (found.place, found.field) == ("job.yaml", "restart.max")


# ---- environment and text ----


def test_empty_variables_come_from_the_caller() -> None:
    text = 'command: a\nenv: {A: , B: "", C: secret://key, D: ~}\n'
    spec = load.load_job(text, environ={"A": "1", "B": "2", "D": ""})
    assert spec.env == {"A": "1", "B": "", "C": "secret://key", "D": ""}
    assert load.load_job(text).env == {"A": None, "B": "", "C": "secret://key", "D": None}


def test_all_missing_variables_are_named() -> None:
    found = problems("command: a\nenv: {A: , B: }\nroles: {x: {command: a, env: {C: }}}\n", environ={"A": "1"})
    assert [p.field for p in found if "not set" in p.message] == ["env.B", "roles.x.env.C"]


def test_values_that_are_text_keep_their_spelling() -> None:
    spec = load.load_job(
        "command: [train, --lr, 0.10, -n, 007, true]\nenv: {V: 1.10, B: True, H: 0x1f}\nlabels: {v: 2.0}\n"
        "placement: {nodes: {zone: 1}}\n"
    )
    assert spec.roles["worker"].command == ("train", "--lr", "0.10", "-n", "007", "true")
    assert spec.env == {"V": "1.10", "B": "True", "H": "0x1f"}
    assert (spec.labels, spec.placement.nodes) == ({"v": "2.0"}, {"zone": "1"})
    assert load.load_job_dict({"command": ["a", 0.1, 3], "env": {"A": True, "B": 2}}).env == {"A": "true", "B": "2"}


# ---- overrides ----


@pytest.mark.parametrize(
    ("overrides", "path", "value"),
    [
        (["roles.worker.replicas=6"], "roles.worker.replicas.max", 6),
        (["replicas=6"], "roles.worker.replicas.max", 6),
        (["roles.worker.replicas={min: 2, max: 3}"], "roles.worker.replicas.min", 2),
        (["roles.worker.replicas=2..3"], "roles.worker.replicas.min", 2),
        (["restart.max=9"], "restart.max", 9),
        (["checkpoint.grace=5m"], "checkpoint.grace", 300_000),
        (["name=other"], "name", "other"),
        (["name="], "name", None),
        (["env.A=x=y"], "env.A", "x=y"),
        (["env.A=1.10"], "env.A", "1.10"),
        (['env.A="1: 2"'], "env.A", "1: 2"),
        (["priority=1", "priority=2"], "priority", 2),
        (["after=[a, b]"], "after", ("a", "b")),
        ({"priority": 3}, "priority", 3),
        ({"roles.worker.cpu": "500m"}, "roles.worker.cpu", 500),
        ({"after": ["x"]}, "after", ("x",)),
    ],
)
def test_overrides_edit_any_leaf(overrides: load.Overrides, path: str, value: object) -> None:
    found: object = load.load_job("name: n\ncommand: a\nreplicas: 2\n", overrides=overrides)
    for step in path.split("."):
        found = found[step] if isinstance(found, dict) else getattr(found, step)
    assert found == value


def test_overrides_of_lists_labels_and_new_roles() -> None:
    spec = load.load_job(
        "roles: {worker: {command: [a, b]}}",
        overrides=[
            "roles.worker.command.1=c",
            'labels."a.b/c"=d',
            "roles.ps.command=serve",
            "roles.ps.replicas=2",
        ],
    )
    assert spec.roles["worker"].command == ("a", "c")
    assert spec.labels == {"a.b/c": "d"}
    assert spec.roles["ps"].replicas.max == 2
    assert load.load_job_dict({}, overrides=["command=a"]).roles["worker"].command == "a"


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("replicas", "this is not FIELD=VALUE", "for example"),
        ("=3", "this is not FIELD=VALUE", "for example"),
        ("a..b=3", "this is not FIELD=VALUE", "for example"),
        ("a.=3", "this is not FIELD=VALUE", "for example"),
        ("name.x=3", "name is the text 'n', so 'x' cannot be set in it", "set the whole of name"),
        ("roles.worker.command.7=3", "roles.worker.command is a list, so '7' cannot be set", "set the whole"),
        ("roles.wroker.cpu=3", "there is no role 'wroker'", "did you mean 'worker'?"),
        ("cpu=3", "'cpu' is a field of a role, and there are 2", "write roles.worker.cpu"),
        ("roles.worker.cpu=many", "cpu: 'many' is not a CPU count", ""),
        ("nmae=x", "unknown field 'nmae'", "did you mean 'name'?"),
        ("priority=[1", "this is not YAML", ""),
        ("priority=&a *a", "", ""),
    ],
)
def test_bad_overrides(override: str, message: str, hint: str) -> None:
    text = "name: n\nroles: {worker: {command: [a]}, ps: {command: b}}"
    found = problem(text, overrides=[override])
    assert found.place == f"--set {override}"
    assert found.message.startswith(message)
    assert found.hint.startswith(hint)


# ---- files ----


def test_directories_are_those_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a" / "job.yaml"
    file.parent.mkdir()
    file.write_text("roles: {w: {command: a, working_dir: ../b}, v: {command: b}}\ncheckpoint: {dir: ckpt}\n")
    spec = load.load_job_file(file)
    assert spec.working_dir == str(tmp_path / "a")
    assert (spec.roles["w"].working_dir, spec.roles["v"].working_dir) == (str(tmp_path / "b"), "")
    assert spec.checkpoint.dir == str(tmp_path / "a" / "ckpt")
    file.write_text("command: a\nworking_dir: sub\ncheckpoint: {dir: 's3://bucket/x'}\n")
    spec = load.load_job_file(file)
    assert (spec.working_dir, spec.checkpoint.dir) == (str(tmp_path / "a" / "sub"), "s3://bucket/x")
    assert load.load_job("command: a\nworking_dir: sub\n").working_dir == "sub"
    assert load.load_job("command: a\nworking_dir: ~/x\n", directory="/d").working_dir == os.path.expanduser("~/x")


def test_files_that_are_no_text(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_bytes(b"command: a\nname: \xff\xfe\n")
    with pytest.raises(SpecError, match="UTF-8") as refusal:
        load.load_job_file(file)
    assert refusal.value.problems[0].place == f"{file}:2:7"
    for text in ("command: a\nname: é-no\n".encode("latin-1"), bytes(range(256)), b"\0" * 1_000, b"\x7fELF\x02" * 100):
        file.write_bytes(text)
        with pytest.raises(SpecError):
            load.load_job_file(file)
    file.write_bytes("command: é\n".encode("utf-8-sig"))
    assert load.load_job_file(file).roles["worker"].command == "é"
    file.write_bytes("command: é\n".encode("utf-16"))
    assert load.load_job_file(file).roles["worker"].command == "é"


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.yaml", tmp_path, "a\0b"):
        with pytest.raises(UsageError, match="cannot read"):
            load.load_job_file(path)


def test_a_typical_file_is_read_in_time() -> None:
    text = load.template("ps")
    load.load_job(text)
    took = min(_timed(lambda: load.load_job(text)) for _ in range(5))
    assert took < 0.05


def _timed(act: object) -> float:
    assert callable(act)
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


# ---- templates, configs ----


@pytest.mark.parametrize("name", load.TEMPLATES)
def test_templates_are_valid_commented_jobs(name: str) -> None:
    text = load.template(name)
    spec = load.load_job(text, file=f"{name}.yaml", environ={})
    assert text.startswith("# yaml-language-server: $schema=")
    assert load.warnings(spec) == ()
    assert text.count("#") > 8
    assert {
        "ps": "ps" in spec.roles,
        "ddp": spec.roles["worker"].replicas.max == 2,
        "elastic": spec.roles["worker"].replicas.elastic,
        "array": spec.array is not None,
    }[name]


def test_the_commented_out_lines_of_templates_are_valid_too() -> None:
    text = (
        load.template("ddp")
        .replace("# priority: 50 ", "priority: 50 ")
        .replace("# gpu:", "gpu:")
        .replace("# restart:\n#   max", "restart:\n  max")
        .replace("# checkpoint:\n#   dir", "checkpoint:\n  dir")
    )
    spec = load.load_job(text)
    assert (spec.priority, spec.restart.max, spec.checkpoint.dir) == (50, 3, "./checkpoints")
    assert spec.roles["worker"].gpu is not None


def test_the_local_configuration_is_a_cluster_of_four_nodes() -> None:
    config = load.load_server_config_file(REPOSITORY / "configs" / "local.yaml")
    nodes = config.backend.local.virtual_nodes
    assert [(n.count, n.gpus[0].kind, n.gpus[0].count) for n in nodes] == [(4, "sim-gpu", 8)]
    assert nodes[0].names == ("node-0", "node-1", "node-2", "node-3")
    assert [q.name for q in config.queues] == ["default", "labs", "research", "vision", "nightly"]
    assert config.queues == load.load_queues_file(REPOSITORY / "configs" / "queues.yaml")


def test_configuration_errors_have_places(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(
        "listen: nowhere\nbackend:\n  local:\n    limit: auto\n    ports: 20000-40000\nqueues: queues.yaml\n"
    )
    (tmp_path / "queues.yaml").write_text("- name: a\n- name: b\n  wieght: 2\n")
    with pytest.raises(ConfigError) as refusal:
        load.load_server_config_file(file)
    assert [(p.place, p.hint) for p in refusal.value.problems] == [
        (f"{tmp_path / 'queues.yaml'}:3:3", "did you mean 'weight'?"),
        (f"{file}:1:9", ""),
        (f"{file}:4:5", "did you mean 'limits'?"),
        (f"{file}:5:12", ""),
    ]
    assert refusal.value.exit_code == 2
    assert f"{file}:4:5" in refusal.value.render()


@pytest.mark.parametrize(
    "text", ["", "[", "- a", "queues: nowhere.yaml", "queues: []", "queues: [{name: a}, {name: a}]", "home: 3"]
)
def test_configurations_that_are_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as refusal:
        load.load_server_config_file(file)
    assert refusal.value.problems[0].line > 0
    with pytest.raises(ConfigError, match="cannot read"):
        load.load_server_config_file(tmp_path / "missing.yaml")


def test_paths_of_a_configuration_are_relative_to_it() -> None:
    config = load.load_server_config("home: data\nstore: sqlite:///jobs.db\n", directory="/srv/x")
    assert (config.home, config.store) == ("/srv/x/data", "sqlite:////srv/x/jobs.db")
    for store in (
        "sqlite:////abs/jobs.db",
        "sqlite:///:memory:",
        "sqlite://",
        "postgresql+psycopg://u@h/db",
        "memory:",
        "",
    ):
        assert load.load_server_config({"store": store}, directory="/srv/x").store == store


def test_queue_files() -> None:
    assert [q.name for q in load.load_queues("- name: a\n- {name: b, weight: 3}\n")] == ["a", "b"]
    assert [q.name for q in load.load_queues({"queues": [{"name": "a"}]})] == ["a"]
    for text in ("- name: a\n- name: a\n", "[]", "queues: 3", "- {}\n- {}\n", "- name: A\n"):
        with pytest.raises(SpecError) as refusal:
            load.load_queues(text)
        assert refusal.value.problems[0].line > 0


def test_warnings_name_what_is_rarely_meant() -> None:
    spec = load.load_job("command: a\nreplicas: 2\nports: {http: 8080}\nheartbeat_timeout: 3s\n")
    assert [w.field for w in load.warnings(spec)] == ["roles.worker.ports.http", "heartbeat_timeout"]


# ---- properties ----


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(strategies.jobs)
def test_a_spec_survives_yaml(fields: dict[str, object]) -> None:
    spec = load.load_job_dict(fields)
    assume(not set(spec.model_dump_json()) & set("\x85\u2028\u2029"))  # ruamel folds these, as YAML 1.1 did
    out = StringIO()
    YAML(typ="safe", pure=True).dump(spec.model_dump(mode="json"), out)
    assert load.load_job(out.getvalue()) == spec


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_text_is_a_job_or_a_refusal_with_a_place(data: st.DataObject) -> None:
    text = data.draw(
        st.text(max_size=300)
        | st.text(st.sampled_from("abc:-#[]{}&*!|>'\"%@`, \n\t0123\\"), max_size=200)
        | st.builds(mutated, st.sampled_from(seeds()), st.randoms(use_true_random=False))
    )
    assert check(text) in ("accepted", "refused")


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(list(JobSpec.model_fields)) | st.text(max_size=5), inner)
        ),
        max_leaves=15,
    ).filter(lambda value: isinstance(value, dict)),
    st.lists(st.text(max_size=20), max_size=3),
)
def test_any_dict_is_a_job_or_a_refusal(value: dict[str, object], overrides: list[str]) -> None:
    try:
        spec = load.load_job_dict(value, environ={}, overrides=overrides)
    except SpecError as exc:
        refusal = exc
    else:
        assert spec.roles
        return
    assert refusal.problems
    refusal.render().encode()
