"""Knob classes: what they accept, what they refuse, and how several bases merge."""

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

import pytest
from toy_package.gpt import GPT, ModelKnobs, Pile5B, Pile126M

from configs.bounds import Above, AtLeast, AtMost, Below
from configs.knobs import REQUIRED, Knobs, UsageError, is_config, knobs, replace


class Size(Knobs):
    """Size of things. Second sentence."""

    DEPTH: Annotated[int, "layers"] = 12
    WIDTH: Annotated[int | None, "units"] = None
    RATE: Annotated[float, "steps per second"] = 1
    NAME: Annotated[str, "free text"] = "a"
    ON: Annotated[bool, "whether"] = False
    MESH: Annotated[list[int], "devices"] = [8, 1, 1]
    PAIR: Annotated[tuple[int, str], "one of each"] = (1, "a")
    AXES: Annotated[tuple[str, ...], "names"] = ()
    MIX: Annotated[dict[str, float], "weights"] = {"a": 1}
    KIND: Annotated[Literal["cosine", "constant"] | None, "shape"] = "cosine"


def by_name(cls) -> dict[str, Any]:
    return {knob.name: knob for knob in knobs(cls)}


def test_a_subclass_overrides_with_a_plain_assignment():
    class Deep(Size):
        DEPTH = 24

    assert Deep().DEPTH == Deep.DEPTH == 24
    assert Size().DEPTH == 12
    assert Deep(DEPTH=2).DEPTH == 2
    assert Deep() == Deep(DEPTH=24) != Deep(DEPTH=2)
    assert dataclasses.asdict(Deep())["DEPTH"] == 24
    assert "DEPTH=24" in repr(Deep())


def test_instances_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Size().DEPTH = 3


def test_values_take_the_form_of_their_type():
    size = Size(MESH=[1, 2], RATE=3, MIX={"b": 2}, PAIR=[2, "b"])
    assert (size.MESH, size.RATE, size.MIX, size.PAIR) == ((1, 2), 3.0, {"b": 2.0}, (2, "b"))
    assert type(size.RATE) is float
    assert type(size.MIX["b"]) is float
    assert Size.MESH == (8, 1, 1)
    assert type(Size.RATE) is float


def test_zero_and_empty_stay_what_they_are():
    size = Size(DEPTH=0, RATE=0.0, NAME="", MESH=[], MIX={})
    assert (size.DEPTH, size.RATE, size.NAME, size.MESH, size.MIX) == (0, 0.0, "", (), {})


def test_a_dict_is_not_shared_between_instances():
    first, second = Size(), Size()
    first.MIX["b"] = 1.0
    assert second.MIX == Size().MIX == {"a": 1.0}


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("DEPTH", "24", r"Size\.DEPTH: int wanted, got '24'; the default is 12"),
        ("DEPTH", True, r"Size\.DEPTH: int wanted, got True; the default is 12"),
        ("DEPTH", 2.0, r"Size\.DEPTH: int wanted, got 2\.0 \(write 2\); the default is 12"),
        ("DEPTH", None, r"Size\.DEPTH: int wanted, got None"),
        ("WIDTH", 0.5, r"Size\.WIDTH: int or None wanted, got 0\.5; the default is None"),
        ("RATE", False, r"Size\.RATE: float wanted, got False"),
        ("NAME", 1, r"Size\.NAME: str wanted, got 1"),
        ("ON", 1, r"Size\.ON: bool wanted, got 1"),
        ("MESH", (1, 0.5), r"Size\.MESH: int wanted, got 0\.5; the default is \[8, 1, 1\]"),
        ("MESH", 8, r"Size\.MESH: \[int, \.\.\.\] wanted, got 8"),
        ("PAIR", (1,), r"Size\.PAIR: \[int, str\] wanted, got \[1\]"),
        ("MIX", {"a": "b"}, r"Size\.MIX: float wanted, got 'b'; the default is \{'a': 1\.0\}"),
        ("KIND", "cosin", r"Size\.KIND: 'cosine' or 'constant' or None wanted, got 'cosin'"),
    ],
)
def test_a_wrong_type_is_refused_in_a_call_and_in_a_class(name, value, line):
    with pytest.raises(UsageError, match=line):
        Size(**{name: value})
    with pytest.raises(UsageError, match=line.replace("Size", "Wrong")):
        type("Wrong", (Size,), {name: value})
    with pytest.raises(UsageError, match=line):
        replace(Size(), **{name: value})


class Bounded(Knobs):
    """Numbers with bounds."""

    COUNT: Annotated[int, "things", AtLeast(1)] = 2
    SHARE: Annotated[float | None, "of them", AtLeast(0), Below(1)] = None
    WEIGHTS: Annotated[dict[str, float], "of each", Above(0), AtMost(9)] = {}
    FREE: Annotated[tuple[float, ...], "anything", "a note"] = ()


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("COUNT", 0, r"Bounded\.COUNT=0 must be at least 1; the default is 2"),
        ("SHARE", 1.0, r"Bounded\.SHARE=1\.0 must be at least 0 and below 1; the default is None"),
        ("SHARE", -0.1, "must be at least 0"),
        ("SHARE", float("nan"), r"Bounded\.SHARE=nan must be a finite number"),
        ("WEIGHTS", {"a": 1, "b": 0}, "must be above 0 and at most 9"),
        ("WEIGHTS", {"a": 10}, "must be above 0 and at most 9"),
        ("FREE", [1.0, float("-inf")], r"Bounded\.FREE=\[1\.0, -inf\] must be a finite number"),
    ],
)
def test_a_number_out_of_bounds_is_refused_in_a_call_and_in_a_class(name, value, line):
    with pytest.raises(UsageError, match=line):
        Bounded(**{name: value})
    with pytest.raises(UsageError, match=line.replace("Bounded", "Wrong")):
        type("Wrong", (Bounded,), {name: value})


def test_bounds_leave_none_and_the_limits_alone():
    bounded = Bounded(COUNT=1, SHARE=0, WEIGHTS={"a": 9}, FREE=[-1e300])
    assert (bounded.COUNT, bounded.SHARE, bounded.WEIGHTS["a"]) == (1, 0.0, 9.0)
    assert Bounded(COUNT=10**400, SHARE=None).SHARE is None


def test_a_union_keeps_the_exact_member():
    class Either(Knobs):
        """Either."""

        VALUE: Annotated[float | int | str, "anything"] = 3

    assert type(Either().VALUE) is int
    assert type(Either(VALUE=3.0).VALUE) is float


def test_replace_keeps_the_rest_and_refuses_unknown_names():
    config = replace(Size(DEPTH=3), NAME="b")
    assert (config.DEPTH, config.NAME) == (3, "b")
    with pytest.raises(UsageError, match="Size has no knob DEPHT; did you mean DEPTH?"):
        replace(config, DEPHT=1)
    with pytest.raises(UsageError, match="Size has no knob DEPHT; did you mean DEPTH?"):
        Size(DEPHT=1)


def test_a_misspelt_attribute_is_refused_when_the_class_is_made():
    with pytest.raises(
        UsageError,
        match=r"Bad\.DPETH: no base of Bad declares this knob; did you mean DEPTH\?",
    ):
        type("Bad", (Size,), {"DPETH": 3})
    with pytest.raises(UsageError, match=r"Bad\.COLOUR: .*declare it: COLOUR: Annotated\["):
        type("Bad", (Size,), {"COLOUR": 3})
    with pytest.raises(UsageError, match=r"Bad\.depth: .*did you mean DEPTH\?"):
        type("Bad", (Size,), {"depth": 3})
    with pytest.raises(UsageError, match=r"Bad\.other: knobs are upper case"):
        type("Bad", (Size,), {"other": 3})


def test_a_misspelt_attribute_of_a_plain_mixin_is_refused():
    class Plain:
        DEPHT = 3

    with pytest.raises(UsageError, match=r"Plain\.DEPHT: .*did you mean DEPTH\?"):
        type("Bad", (Plain, Size), {})


@pytest.mark.parametrize(
    ("name", "annotation", "line"),
    [
        ("SIZE", int, r'Bad\.SIZE: a knob says what it means; write SIZE: Annotated\[int, "mean'),
        ("SIZE", Annotated[int, 3], r"Bad\.SIZE: a knob says what it means"),
        ("size", Annotated[int, "x"], r"Bad\.size: knobs are upper case; write SIZE"),
        ("SIZE", Annotated[object, "x"], r"Bad\.SIZE: object cannot be typed on a command line"),
        ("SIZE", "Annotated[Missing, 'x']", r"Bad: cannot read the type of a knob: .*'?Annotated"),
    ],
)
def test_a_bad_declaration_is_refused(name, annotation, line):
    with pytest.raises(UsageError, match=line):
        type("Bad", (Knobs,), {"__annotations__": {name: annotation}, "__module__": "builtins"})


def test_what_is_no_knob_may_stand_in_a_class():
    class Fine(Size):
        _PRIVATE = 1
        TABLE: ClassVar[dict[str, int]] = {}

        @property
        def double(self) -> int:
            return 2 * self.DEPTH

        @staticmethod
        def helper() -> int:
            return 1

    assert Fine(DEPTH=2).double == 4
    assert [knob.name for knob in knobs(Fine)] == [knob.name for knob in knobs(Size)]


def test_a_knob_without_value_must_be_given():
    class Needs(Size):
        """Needs."""

        TARGET: Annotated[int, "where to go"]

    assert by_name(Needs)["TARGET"].default is REQUIRED
    assert Needs(TARGET=3).TARGET == 3
    with pytest.raises(UsageError, match="Needs needs a value for TARGET, int: where to go"):
        Needs()


def test_a_diamond_merges_as_python_does():
    class Left(Size):
        pass

    class Right(Size):
        DEPTH = 24
        NAME = "right"

    class Both(Left, Right):
        pass

    class Named(Size):
        NAME = "named"

    class All(Named, Both):
        pass

    # A plain dataclass would let Left's merely inherited 12 win.
    assert Both().DEPTH == Both.DEPTH == 24
    assert (All().DEPTH, All().NAME) == (24, "named")
    assert by_name(All)["DEPTH"].defined_in == "Right"
    assert by_name(All)["NAME"].defined_in == "Named"


def test_a_plain_mixin_gives_values():
    class Small:
        DEPTH = 1
        MESH = [1]

    class Tiny(Small, Size):
        pass

    assert (Tiny().DEPTH, Tiny().MESH) == (1, (1,))
    assert by_name(Tiny)["DEPTH"].defined_in == "Small"


def test_a_subclass_may_narrow_a_type():
    class Even(Size):
        """Even."""

        DEPTH: Annotated[Literal[2, 4], "two or four"] = 2

    assert by_name(Even)["DEPTH"].meaning == "two or four"
    with pytest.raises(UsageError, match=r"Even\.DEPTH: 2 or 4 wanted, got 3"):
        Even(DEPTH=3)


def test_knobs_are_listed_by_group_with_their_origin():
    listed = knobs(Pile5B)
    assert len({knob.name for knob in listed}) == len(listed)
    assert list(dict.fromkeys(knob.group for knob in listed)) == [
        "Size of the model",
        "Optimizer and schedule",
        "Mesh, batch and files",
    ]
    layers = by_name(Pile5B)["NUM_LAYERS"]
    assert (layers.type, layers.default, layers.meaning) == (int, 3, "transformer blocks")
    assert (layers.defined_in, layers.declared_default) == ("Pile5B", 2)
    assert by_name(Pile5B)["HIDDEN_DIMS"].defined_in == "Pile126M"
    assert by_name(Pile5B)["MAX_STEPS"].defined_in == "OptimizerKnobs"


def test_only_what_has_an_experiment_is_a_config():
    assert is_config(Pile5B)
    assert not is_config(GPT)
    assert not is_config(ModelKnobs)
    assert not is_config(ModelKnobs())
    with pytest.raises(NotImplementedError, match="ModelKnobs is a set of knobs, not a config"):
        ModelKnobs().experiment()


def test_checks_between_knobs_run_when_an_instance_is_made():
    with pytest.raises(ValueError, match="HIDDEN_DIMS=7 is odd"):
        Pile126M(HIDDEN_DIMS=7)


def test_the_docstring_is_kept():
    class Silent(Size):
        pass

    assert Size.__doc__.startswith("Size of things.")
    assert Silent.__doc__ is None
