"""Dataclasses from what JSON holds, checked by their own hints where pydantic is not installed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Annotated, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from edgekit.errors import nearest
from edgekit.target import Bound, Check

T = TypeVar("T")
_CALLED: Mapping[object, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def checked(kind: type[T], raw: object, name: str = "") -> T:
    """Return a dataclass from what JSON holds, checked as strictly as `config.checked` does it.

    Args:
        kind: The dataclass; its hints may be plain types, `Literal`, tuples, mappings from text, alternatives, other
            dataclasses, and `Annotated` with `Bound` and `Check`.
        raw: What JSON holds.
        name: Dotted name of the value, for the messages.

    Raises:
        ValueError: An unknown or missing key, a wrong type or value; says which and what is expected.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"'{name}' is {raw!r}; expected a section")
    hints = get_type_hints(kind, include_extras=True)
    assert dataclasses.is_dataclass(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := [key for key in raw if key not in fields]:
        raise ValueError(f"unknown key '{_below(name, unknown[0])}'; {nearest(unknown[0], fields)}")
    for field in fields.values():
        if field.default is field.default_factory is dataclasses.MISSING and field.name not in raw:
            raise ValueError(f"'{_below(name, field.name)}' is missing")
    return kind(**{key: _value(hints[key], value, _below(name, key)) for key, value in raw.items()})


def _value(hint: object, value: object, name: str) -> object:
    """Return a value as its hint has it; raises as `checked`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        made = _value(arguments[0], value, name)
        for rule in arguments[1:]:
            if told := _broken(rule, made):
                raise ValueError(f"'{name}' is {value!r}; {told}")
        return made
    if origin in (Union, UnionType):
        return _alternative(arguments, value, name)
    if origin is Literal:
        if not any(value == known and type(value) is type(known) for known in arguments):
            raise ValueError(f"'{name}' is {value!r}; expected {' or '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        return _tuple(arguments, value, name)
    if origin is Mapping:
        if not isinstance(value, dict):
            raise ValueError(f"'{name}' is {value!r}; expected a section")
        return {key: _value(arguments[1], one, _below(name, key)) for key, one in value.items()}
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return checked(hint, value, name)
    return _plain(hint, value, name)


def _alternative(hints: tuple[object, ...], value: object, name: str) -> object:
    if value is None and NoneType in hints:
        return None
    told = []
    for hint in hints:
        if hint is not NoneType:
            try:
                return _value(hint, value, name)
            except ValueError as error:
                told.append(str(error))
    raise ValueError(told[0] if len(told) == 1 else " or ".join(told))


def _tuple(hints: tuple[object, ...], value: object, name: str) -> tuple[object, ...]:
    if not isinstance(value, list):
        raise ValueError(f"'{name}' is {value!r}; expected a list")
    wanted = hints[:1] * len(value) if hints[-1] is Ellipsis else hints
    if len(wanted) != len(value):
        raise ValueError(f"'{name}' is {value!r}; expected {len(wanted)} values")
    return tuple(_value(hint, one, f"{name}.{i}") for i, (hint, one) in enumerate(zip(wanted, value, strict=True)))


def _plain(hint: object, value: object, name: str) -> object:
    """Return a truth value, a number or a text as its type has it; a whole number does where any number is wanted."""
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"'{name}' is {value!r}; expected {_CALLED.get(hint, hint)}")
    return value


def _broken(rule: object, value: object) -> str:
    """Return what a rule expects of a value that does not follow it; empty where it does."""
    if isinstance(rule, Check):
        return "" if rule.holds(value) else rule.told
    if not isinstance(rule, Bound):
        return ""
    if rule.entries is not None and isinstance(value, tuple) and len(value) < rule.entries:
        return f"expected at least {rule.entries} values"
    if not isinstance(value, int | float):
        return ""
    if rule.least is not None and value < rule.least:
        return f"expected {rule.least} or more"
    if rule.above is not None and value <= rule.above:
        return f"expected more than {rule.above}"
    return f"expected {rule.most} or less" if rule.most is not None and value > rule.most else ""


def _below(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
