"""Words of the command line to values."""

import pytest

from configs.cli import values


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("2", int, 2),
        ("-1", int, -1),
        ("1_000", int, 1000),
        ("1e-4", float, 1e-4),
        ("3", float, 3.0),
        ("inf", float, float("inf")),
        ("true", bool, True),
        ("False", bool, False),
        ("TRUE", bool, True),
        ("None", int | None, None),
        ("none", str | None, None),
        ("'None'", str | None, "None"),
        ("bfloat16", str, "bfloat16"),
        ('"bfloat16"', str, "bfloat16"),
        ("'bfloat16'", str, "bfloat16"),
        (r"\"bfloat16\"", str, "bfloat16"),
        ("", str, ""),
        ("''", str, ""),
        ("8", str, "8"),
        ("8", str | None, "8"),
        ("8", str | int, 8),
        ("true", str, "true"),
        ("3", float | int, 3),
        ("gs://bucket/a b.model", str, "gs://bucket/a b.model"),
        ("it's", str, "it's"),
        ("[1,8,1]", tuple[int, ...], (1, 8, 1)),
        ("(1, 8, 1)", tuple[int, ...], (1, 8, 1)),
        ("1,8,1", tuple[int, ...], (1, 8, 1)),
        ("(1,)", tuple[int, ...], (1,)),
        ("[]", tuple[int, ...], ()),
        ("[data,fsdp]", tuple[str, ...], ("data", "fsdp")),
        ("['a,b', \"c\", 3]", list[str], ("a,b", "c", "3")),
        ("[[1,2],[3]]", tuple[tuple[int, ...], ...], ((1, 2), (3,))),
        ("{a: 1, 'b': 0.5}", dict[str, float], {"a": 1.0, "b": 0.5}),
        ("{}", dict[str, float], {}),
    ],
)
def test_words_become_values_of_the_type(text, kind, value):
    parsed = values.parse(text, kind)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "kind", "line"),
    [
        ("2.5", int, "int wanted, got 2.5"),
        ("1e5", int, r"int wanted, got 100000.0 \(write 100000\)"),
        ("'2'", int, "int wanted, got '2'"),
        ("true", int, "int wanted, got True"),
        ("1", bool, "bool wanted, got 1"),
        ("yes", bool, "bool wanted, got 'yes'"),
        ("", int, "int wanted, got ''"),
        ("", str | None, "str or None wanted, got an empty text"),
        ("' '", str | None, "str or None wanted, got an empty text"),
        ("None", int, "int wanted, got None"),
        ("None", str, "str wanted, got None"),
        ("8", tuple[int, ...], r"\[int, \.\.\.\] wanted, got 8"),
        ("[1,a]", tuple[int, ...], "int wanted, got 'a'"),
        ("[1,8", tuple[int, ...], r"\[int, \.\.\.\] wanted, got \[1,8"),
        ("[1,[2]", tuple[int, ...], r"brackets or quotes do not close in 1,\[2"),
        ("[1]", dict[str, float], r"\{str: float\} wanted, got \[1\]"),
        ("{a}", dict[str, float], r"\{str: float\} wanted, got \{a\}"),
    ],
)
def test_words_of_another_type_are_refused(text, kind, line):
    with pytest.raises(values.WrongType, match=line):
        values.parse(text, kind)


@pytest.mark.parametrize("value", [(1, 8), "bfloat16", "8", "None", "a b", "", ["x", "true"], 1e-5])
def test_typed_values_come_back(value):
    back = values.parse_untyped(values.typed(value))
    assert back == (list(value) if isinstance(value, tuple) else value)
