from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobsched.spec import document
from jobsched.spec.document import Malformed


def plain(text: str) -> object:
    root, problems = document.parse(text, "f.yaml")
    assert not problems
    return root.plain


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("22:22", "22:22"),
        ("1:30:00", "1:30:00"),
        ("1_000", "1_000"),
        ("0o17", 15),
        ("017", 17),
        ("0x1F", 31),
        ("1.10", 1.1),
        (".5", 0.5),
        ("-1e3", -1e3),
        ("+7", 7),
        (".inf", float("inf")),
        ("2024-01-01", "2024-01-01"),
        ("'7'", "7"),
        ('"true"', "true"),
        ("!!str 7", "7"),
        ("! 7", "7"),
        ("9" * 41, "9" * 41),
        ("=", "="),
        ("<<", "<<"),
        ("1.", 1.0),
        ("0b1", "0b1"),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    assert plain(f"a: {text}") == {"a": value}


def test_every_part_knows_its_place_and_path() -> None:
    root, _ = document.parse("a:\n  b:\n  - c: 1\n  - [x, {y: 2}]\n", "f.yaml")
    inner = root.fields["a"].fields["b"]
    assert isinstance(inner.value, list)
    c = inner.value[0].fields["c"]
    assert (c.path, c.key_at[1:], c.at[1:]) == ("a.b[0].c", (3, 5), (3, 8))
    assert isinstance(inner.value[1].value, list)
    y = inner.value[1].value[1].fields["y"]
    assert (y.path, y.at) == ("a.b[1][1].y", ("f.yaml", 4, 13))


def test_anchors_and_merges_keep_the_place_where_the_value_stands() -> None:
    root, problems = document.parse(
        "x: &x {cpu: 1, gpu: 2}\ny:\n  <<: *x\n  cpu: 3\nz: *x\nw: {<<: [{a: 1}, {a: 2, b: 3}]}\n", "f"
    )
    assert not problems
    assert root.plain == {
        "x": {"cpu": 1, "gpu": 2},
        "y": {"cpu": 3, "gpu": 2},
        "z": {"cpu": 1, "gpu": 2},
        "w": {"a": 1, "b": 3},
    }
    assert root.fields["y"].fields["gpu"].path == "y.gpu"
    assert root.fields["y"].fields["gpu"].at.line == 1


def test_json_is_read_too_even_with_tabs_and_pairs_of_escapes() -> None:
    value = {"a": [1, 2.5, None, True, "😀 é"], "b": {"c": 'tab\there / \\ "'}}
    assert plain(json.dumps(value, indent="\t")) == value
    assert plain(json.dumps(value)) == value
    assert plain(r'{"a": "\/"}') == {"a": "/"}


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(10**30), 10**30)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters(blacklist_categories=["Cs"]), max_size=20),
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.text("abc_é", min_size=1, max_size=5), inner, max_size=4)
        ),
        max_leaves=20,
    ).filter(lambda value: isinstance(value, (dict, list)))
)
@settings(deadline=None, max_examples=100)
def test_what_json_writes_is_read_as_the_same(value: object) -> None:
    assert plain(json.dumps(value)) == value


@pytest.mark.parametrize(
    ("text", "line", "column", "complaint"),
    [
        ("", 1, 1, "empty"),
        ("# only a comment\n", 1, 1, "empty"),
        ("---\n", 1, 1, "empty"),
        ("a: 1\n---\nb: 2\n", 2, 1, "second document"),
        ("a: 1\nb:\n\t- 2\n", 3, 1, "not YAML"),
        ("a: b: c\n", 1, 5, "not YAML"),
        ("a: [1, 2\n", 2, 1, "not YAML"),
        ('a: "x\n', 2, 1, "not YAML"),
        ("a: *nowhere\n", 1, 4, "no anchor above"),
        ("a: &a [*a]\n", 1, 8, "no anchor above"),
        ("a: 1\nb: \x01\n", 2, 4, "character"),
        ('a: "\\UFFFFFFFF"\n', 1, 1, "not YAML"),
        pytest.param("a: " + "[" * 200_000, 1, 44, "40 levels", id="tower of ["),
        pytest.param("- " * 200_000, 1, 83, "40 levels", id="tower of -"),
        pytest.param("{" * 100_000, 1, 42, "40 levels", id="tower of {"),
        pytest.param("a: [" + "1," * 30_000 + "]", 1, 39_999, "20,000 values", id="long list"),
    ],
)
def test_what_has_no_tree_is_refused_with_its_place(text: str, line: int, column: int, complaint: str) -> None:
    began = time.monotonic()
    with pytest.raises(Malformed, match=complaint) as refusal:
        document.parse(text, "f.yaml")
    problem = refusal.value.problem
    assert (problem.file, problem.line) == ("f.yaml", line)
    if complaint != "not YAML":
        assert problem.column == column
    assert time.monotonic() - began < 30  # never a hang, on however busy a machine


def test_an_alias_bomb_is_cut_off() -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]" for i in range(1, 30)]
    with pytest.raises(Malformed, match="aliases counted"):
        document.parse("\n".join(lines), "f")
    chain = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 100)]
    with pytest.raises(Malformed, match="levels"):
        document.parse("\n".join(chain), "f")


def test_a_text_beyond_the_limit_is_not_even_looked_at() -> None:
    with pytest.raises(Malformed, match="characters"):
        document.parse("a" * (document.MAX_CHARS + 1), "f")


@pytest.mark.parametrize(
    ("text", "line", "column", "complaint"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, 1, "the first is at line 1, column 1"),
        ("a: {x: 1, x: 2}\n", 1, 11, "twice"),
        ("? [1]\n: 2\n", 1, 3, "key must be text"),
        (": 2\n", 1, 1, "key must be text"),
        ("a: !!python/object:os.system x\n", 1, 4, "tag"),
        ("a: !!binary aGk=\n", 1, 4, "tag"),
        ("a: !mine {b: 1}\n", 1, 4, "tag"),
        ("a:\n  <<: 5\n", 2, 7, "takes a mapping"),
        ('{"a": "\\ud83d"}', 1, 7, "surrogate"),
        ('{"\\udc00": 1}', 1, 2, "surrogate"),
    ],
)
def test_what_leaves_a_tree_is_reported_beside_it(text: str, line: int, column: int, complaint: str) -> None:
    root, problems = document.parse(text, "f.yaml")
    assert isinstance(root.value, dict)
    assert [(p.line, p.column) for p in problems] == [(line, column)]
    assert complaint in problems[0].message
    problems[0].message.encode()


def test_keys_are_text_as_they_were_written() -> None:
    assert plain("1: a\ntrue: b\n1.10: c\n") == {"1": "a", "true": "b", "1.10": "c"}


def test_plain_values_become_trees_without_lines() -> None:
    node = document.from_plain({"a": [1, {2: None}], "b": (True, "x")}, "<spec>")
    assert node.plain == {"a": [1, {"2": None}], "b": [True, "x"]}
    assert node.fields["a"].at == ("<spec>", 0, 0)
    endless: list[object] = []
    endless.append(endless)
    for value, complaint in ((endless, "levels"), ({"a": object()}, "no place"), ({"a": {1, 2}}, "no place")):
        with pytest.raises(Malformed, match=complaint):
            document.from_plain(value, "<spec>")


def test_numbers_can_be_taken_as_written() -> None:
    root, _ = document.parse("a: 1.10\nb: 0x10\nc: True\nd: [1]\n", "f")
    for node in root.fields.values():
        node.as_text()
    assert root.plain == {"a": "1.10", "b": "0x10", "c": "True", "d": [1]}
