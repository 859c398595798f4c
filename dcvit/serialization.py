"""Dataclasses from the plain values of an untrusted file.

`dataclasses.asdict` converts a dataclass to plain values, and `from_plain` is its inverse. It checks every value
against the annotation of its field. So a damaged or forged file is refused before it does harm, and the error names the
field.
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from reprlib import Repr
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import numpy as np

__all__ = ["field_types", "from_plain", "plain_numbers"]

T = TypeVar("T")

DEPTH = 16
"""Largest nesting depth of values annotated with `Any`; settings have a depth of 3."""

_REPR = Repr()
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 80


def from_plain(kind: type[T], values: Any, where: str = "") -> T:
    """Create a dataclass from the plain values of a JSON file.

    Args:
        kind: The dataclass. Its fields may be plain values, `Literal`s, unions, tuples, mappings and dataclasses.
        values: A mapping with a value for each field that has no default.
        where: Name of the record in error messages; by default, the name of the class.

    Raises:
        TypeError: If a field is missing, unknown or has a wrong type; the message names it.
        ValueError: If the dataclass itself refuses a value.
    """
    return cast(T, _convert(kind, values, where or kind.__name__))


@cache
def field_types(kind: type) -> dict[str, Any]:
    """Return the annotations of a dataclass's fields by name."""
    return get_type_hints(kind)


def _convert(kind: Any, values: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        _check_depth(values, where)
        return values
    if origin in (Union, UnionType):
        return _one_of(arguments, values, where)
    if origin is Literal:
        if values not in arguments or isinstance(values, bool):
            raise TypeError(f"{where} is {_shown(values)}: expected one of {', '.join(map(repr, arguments))}")
        return values
    if origin is tuple:
        return _tuple(arguments, values, where)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        of_key, of_value = arguments
        table = _table(values, where)
        return {
            _key(of_key, key, where): _convert(of_value, value, f"{where}[{key!r}]") for key, value in table.items()
        }
    if is_dataclass(kind):
        return _record(cast(type, kind), values, where)
    return _scalar(kind, values, where)


def _one_of(kinds: tuple[Any, ...], values: Any, where: str) -> Any:
    if values is None and NoneType in kinds:
        return None
    # An int is also accepted as a float, so the exact type comes first: an int stays an int.
    members = [kind for kind in kinds if kind is not NoneType]
    for kind in sorted(members, key=lambda kind: kind is not type(values)):
        if len(members) == 1:
            return _convert(kind, values, where)
        try:
            return _convert(kind, values, where)
        except TypeError as error:
            refusal = error
    raise refusal


def _tuple(kinds: tuple[Any, ...], values: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(values, list | tuple):
        raise TypeError(f"{where} is {_shown(values)}: expected a list")
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(values)
    if len(kinds) != len(values):
        raise TypeError(f"{where} has {len(values)} values: expected {len(kinds)}")
    return tuple(
        _convert(kind, value, f"{where}[{i}]") for i, (kind, value) in enumerate(zip(kinds, values, strict=True))
    )


def _key(kind: Any, key: str, where: str) -> Any:
    if kind is not int:
        return key
    if not key.isascii() or not key.isdigit() or len(key) > 9:
        raise TypeError(f"{where} has the key {_shown(key)}: expected a whole number")
    return int(key)


def _record(kind: type, values: Any, where: str) -> Any:
    table, hints = _table(values, where), field_types(kind)
    known = {field.name: field for field in fields(kind)}
    if unknown := sorted(table.keys() - known.keys()):
        raise TypeError(f"{where} has the unknown field {_shown(unknown[0])}")
    for name, field in known.items():
        if name not in table and field.default is MISSING and field.default_factory is MISSING:
            raise TypeError(f"{where} has no {name}")
    return kind(**{name: _convert(hints[name], value, f"{where}.{name}") for name, value in table.items()})


def _table(values: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise TypeError(f"{where} is {_shown(values)}: expected a table")
    return values


def _scalar(kind: Any, values: Any, where: str) -> Any:
    fits = isinstance(values, kind) and (kind is bool or not isinstance(values, bool))
    if kind is float and isinstance(values, int) and not isinstance(values, bool):
        fits = True
    if not fits or (kind in (int, float) and isinstance(values, int) and not -(2**63) <= values < 2**63):
        raise TypeError(f"{where} is {_shown(values)}: expected {kind.__name__}")
    return values


def _check_depth(values: Any, where: str, left: int = DEPTH) -> None:
    """Refuse values nested so deeply that copying or printing them would exhaust the stack."""
    if not isinstance(values, Mapping | list | tuple):
        return
    if not left:
        raise TypeError(f"{where} is nested more than {DEPTH} deep")
    for value in values.values() if isinstance(values, Mapping) else values:
        _check_depth(value, where, left - 1)


def _shown(value: Any) -> str:
    """Return a value as text for an error message, at most 40 characters long."""
    shown = _REPR.repr(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."


def plain_numbers(config: Any) -> None:
    """Convert NumPy numbers in a dataclass's fields to Python numbers, which JSON accepts."""

    def plain(value: Any) -> Any:
        if isinstance(value, np.generic):
            return value.item()
        return tuple(map(plain, value)) if isinstance(value, tuple | list | np.ndarray) else value

    for each in fields(config):
        object.__setattr__(config, each.name, plain(getattr(config, each.name)))
