"""Knobs: the upper-case numbers that a person turns, as a class to read aloud and inherit from.

    class ModelKnobs(Knobs):
        '''Size of the model.'''
        NUM_LAYERS: Annotated[int, "transformer blocks"] = 12

    class Pile5B(Pile126M):
        '''GPT-3 5B on the Pile.'''
        NUM_LAYERS = 24

A knob is declared once, with its type, its meaning and its bounds (`configs.bounds`); classes below
only give another value. A name that no base declares, a value of another type or one out of bounds
is refused where it is written: when the class is made. Config classes are frozen keyword-only
dataclasses; with several bases a value is looked up as Python looks up any attribute (plain
dataclasses do not: in a diamond, a default that one base merely inherits wins over the value that
another base sets).
"""

import dataclasses
import inspect
import typing
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, TypeVar

from configs.bounds import Bound, complaint
from configs.cli import values
from configs.cli.values import UsageError
from paxlike.nearest import did_you_mean

if typing.TYPE_CHECKING:
    import fiddle as fdl


class _Required:
    def __repr__(self) -> str:
        return "<required>"


REQUIRED = _Required()
_Config = TypeVar("_Config", bound="Knobs")


@dataclasses.dataclass(frozen=True)
class Knob:
    """One knob of a config class."""

    name: str
    type: Any
    default: Any  # REQUIRED when no class gives a value
    meaning: str
    group: str  # first line of the docstring of the class that declares it
    defined_in: str  # name of the class that gives the default
    declared_default: Any  # what the declaring class gives, to tell what a config changes
    bounds: tuple[Bound, ...] = ()


@typing.dataclass_transform(frozen_default=True, kw_only_default=True)
class Knobs:
    """Base of all config classes; see the module."""

    _abstract: ClassVar[bool] = True
    _declared: ClassVar[dict[str, tuple[Any, str, tuple[Bound, ...]]]]

    def __init_subclass__(cls, *, abstract: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._abstract = abstract
        cls._declared = _own_declarations(cls)
        _refuse_strays(cls)
        defaults = {name: _default(cls, name) for name, *_ in _declarations(cls)}
        own = {name: value for name, value in defaults.items() if name in vars(cls)}
        doc = cls.__doc__
        # All knobs are fields of every class, without defaults: those stay ordinary attributes, so
        # that Python's own lookup decides between several bases, and a dict is never shared.
        cls.__annotations__ = {name: kind for name, kind, *_ in _declarations(cls)}
        for name in defaults:
            setattr(cls, name, dataclasses.field())
        dataclasses.dataclass(frozen=True, kw_only=True, init=False)(cls)
        for name, value in own.items():
            setattr(cls, name, value)
        cls.__doc__ = doc

    def __init__(self, **changes: Any) -> None:
        names = {name for name, *_ in _declarations(type(self))}
        for name in changes:
            if name not in names:
                raise UsageError(
                    f"{type(self).__name__} has no knob {name}{did_you_mean(name, names)}"
                )
        for knob in knobs(type(self)):
            value = changes.get(knob.name, knob.default)
            if value is REQUIRED:
                wanted = f"{knob.name}, {values.describe(knob.type)}: {knob.meaning}"
                raise UsageError(f"{type(self).__name__} needs a value for {wanted}")
            where = f"{type(self).__name__}.{knob.name}"
            value = _converted(where, value, knob.type, knob.bounds, knob.default)
            object.__setattr__(self, knob.name, value)
        self.__post_init__()

    def __post_init__(self) -> None:
        """Checks between knobs; subclasses raise a ValueError in one line."""

    def experiment(self) -> "fdl.Config[Any]":
        """The tree that the knobs expand to."""
        raise NotImplementedError(
            f"{type(self).__name__} is a set of knobs, not a config: it has no experiment()"
        )


def knobs(cls: type[Knobs]) -> list[Knob]:
    """All knobs of a class, group by group, in the order in which they are declared."""
    return [
        Knob(
            name=name,
            type=kind,
            default=_default(cls, name),
            meaning=meaning,
            group=title(declared_in),
            defined_in=next(
                (base for base in cls.__mro__ if name in vars(base)), declared_in
            ).__name__,
            declared_default=_default(declared_in, name),
            bounds=bounds,
        )
        for name, kind, meaning, bounds, declared_in in _declarations(cls)
    ]


def replace(config: _Config, **changes: Any) -> _Config:
    """The config with some knobs changed, under the same checks as at construction."""
    given = {knob.name: getattr(config, knob.name) for knob in knobs(type(config))}
    return type(config)(**{**given, **changes})


def is_config(cls: Any) -> bool:
    """Whether `cls` can be run: it has an experiment() and is not declared abstract."""
    return (
        isinstance(cls, type)
        and issubclass(cls, Knobs)
        and not cls._abstract
        and cls.experiment is not Knobs.experiment
    )


def title(cls: type) -> str:
    """The first line of the docstring without its full stop, or the name of the class."""
    lines = inspect.cleandoc(vars(cls).get("__doc__") or cls.__name__).splitlines()
    return lines[0].removesuffix(".")


def _own_declarations(cls: type) -> dict[str, tuple[Any, str, tuple[Bound, ...]]]:
    """name -> (type, meaning, bounds) of the knobs that the body of `cls` annotates."""
    try:
        annotations = inspect.get_annotations(cls, eval_str=True)
    except NameError as error:
        raise UsageError(f"{cls.__name__}: cannot read the type of a knob: {error}") from error
    declared = {}
    for name, annotation in annotations.items():
        if name.startswith("_") or ClassVar in (annotation, typing.get_origin(annotation)):
            continue
        where = f"{cls.__name__}.{name}"
        if not name.isupper():
            raise UsageError(
                f"{where}: knobs are upper case; write {name.upper()}, or ClassVar[...] for no knob"
            )
        notes = getattr(annotation, "__metadata__", ())
        meaning = next((note for note in notes if isinstance(note, str)), None)
        if typing.get_origin(annotation) is not Annotated or not meaning:
            shown = values.describe(annotation)
            raise UsageError(
                f"{where}: a knob says what it means; write "
                f'{name}: Annotated[{shown}, "meaning, unit"]'
            )
        kind = typing.get_args(annotation)[0]
        if not values.is_supported(kind):
            raise UsageError(
                f"{where}: {values.describe(kind)} cannot be typed on a command line; "
                "knobs are int, float, bool, str, None, Literal, tuple, dict, and unions of these"
            )
        bounds = tuple(note for note in notes if isinstance(note, Bound))
        declared[name] = (kind, meaning, bounds)
    return declared


def _refuse_strays(cls: type[Knobs]) -> None:
    """Refuses what looks like a knob but is declared nowhere: it would have no effect."""
    names = {name for name, *_ in _declarations(cls)}
    mixins = [
        base
        for base in cls.__mro__
        if not issubclass(base, Knobs) and base.__module__ not in ("builtins", "typing")
    ]
    for owner in (cls, *mixins):
        class_variables = vars(owner).get("__annotations__", {}).keys() - names
        for name, value in vars(owner).items():
            if name in names | class_variables or name.startswith("_"):
                continue
            if name.isupper() or (name.upper() in names and owner is cls):
                remedy = (
                    did_you_mean(name, names)
                    or f'; declare it: {name}: Annotated[type, "meaning, unit"] = ...'
                )
                raise UsageError(
                    f"{owner.__name__}.{name}: no base of {cls.__name__} declares this knob{remedy}"
                )
            if owner is cls and not hasattr(value, "__get__") and not isinstance(value, type):
                raise UsageError(
                    f"{owner.__name__}.{name}: knobs are upper case; this would have no effect"
                )


def _declarations(cls: type) -> Iterator[tuple[str, Any, str, tuple[Bound, ...], type]]:
    """(name, type, meaning, bounds, declaring class) of all knobs; the nearest declaration counts."""
    seen = set()
    for base in cls.__mro__:
        for name, (kind, meaning, bounds) in vars(base).get("_declared", {}).items():
            if name not in seen:
                seen.add(name)
                yield name, kind, meaning, bounds, base


def _default(cls: type, name: str) -> Any:
    """The value that `cls` gives to a knob, checked; REQUIRED where there is none."""
    kind, _, bounds = next(rest[:3] for declared, *rest in _declarations(cls) if declared == name)
    value = getattr(cls, name, REQUIRED)
    if value is REQUIRED:
        return REQUIRED
    inherited = next((vars(base)[name] for base in cls.__mro__[1:] if name in vars(base)), REQUIRED)
    return _converted(f"{cls.__name__}.{name}", value, kind, bounds, inherited)


def _converted(where: str, value: Any, kind: Any, bounds: tuple[Bound, ...], now: Any) -> Any:
    default = "" if now is REQUIRED else f"; the default is {values.show(now)}"
    try:
        converted = values.convert(value, kind)
    except values.WrongType as error:
        raise UsageError(f"{where}: {error}{default}") from error
    if wrong := complaint(converted, bounds):
        raise UsageError(f"{where}={values.show(converted)} {wrong}{default}")
    return converted
