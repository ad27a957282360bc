"""Rules that the fields of configurations share; each error names the field and its value."""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable
from typing import Any, Literal

from gdn_jax.errors import UserError

hints = functools.cache(typing.get_type_hints)


def require(condition: bool, sentence: str) -> None:
    """UserError with `sentence` unless the condition holds."""
    if not condition:
        raise UserError(sentence)


def positive(group: Any, path: str, *names: str) -> None:
    """Raises UserError unless the named fields of a group are positive and finite."""
    for name in names:
        value = getattr(group, name)
        require(value > 0, f"{path}.{name} is {value}; it must be positive.")
        require(value < math.inf, f"{path}.{name} is {value}; it must be finite.")


def typed(group: Any, path: str) -> None:
    """Raises UserError unless every field has its type; an int given for a float becomes a float, a list a tuple."""
    for name, hint in hints(type(group)).items():
        value, where = getattr(group, name), f"{path}.{name}"
        made = next((part for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part)), None)
        if hint is Any:
            continue
        if made is None:
            object.__setattr__(group, name, coerce(hint, value, where))
        else:
            optional = made is not hint and value is None
            require(optional or isinstance(value, made), f"{where} is {value!r}; it must be a config.{made.__name__}.")


def without_none(hint: Any) -> Any:
    """The type X of a hint `X | None`."""
    return next(arg for arg in typing.get_args(hint) if arg is not type(None))


def coerce(hint: Any, value: Any, where: str, make: Callable[[type, Any, str], Any] | None = None) -> Any:
    """`value` converted to the type of a field; make(class, value, where) builds a nested dataclass."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else coerce(without_none(hint), value, where, make)
    if origin is Literal:
        found = any(value == arg and type(value) is type(arg) for arg in args)
        require(found, f"{where} is {value!r}; it must be one of {', '.join(map(repr, args))}.")
        return value
    if origin is tuple:
        require(isinstance(value, (list, tuple)), f"{where} is {value!r}; it must be a list.")
        return tuple(coerce(args[0], item, where, make) for item in value)
    if dataclasses.is_dataclass(hint):
        return make(hint, value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    correct = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    require(correct, f"{where} is {value!r}; it must be of type {hint.__name__}.")
    return value
