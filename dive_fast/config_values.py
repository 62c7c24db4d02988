"""Values against type annotations: conversion, and both in words for error messages."""

import enum
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dive_fast.errors import InputError


def check_type(value: Any, annotation: Any, place: str) -> Any:
    """`value` as the annotation's type (1 -> 1.0 for float, 1e3 -> 1000 for int, a list -> a tuple), or InputError."""
    matched, result = _match(value, annotation)
    if not matched:
        raise InputError(f"{place}: expected {expected(annotation)}, got {describe(value)}")
    return result


def _match(value: Any, annotation: Any) -> tuple[bool, Any]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return True, value
    if origin in (typing.Union, types.UnionType):
        return _match_union(value, arguments)
    if origin is typing.Annotated:
        return _match(value, arguments[0])
    if origin is typing.Literal:
        return any(type(value) is type(option) and value == option for option in arguments), value
    return _match_class(value, annotation if origin is None else origin, arguments)


def _match_union(value: Any, options: Sequence[Any]) -> tuple[bool, Any]:
    # `SchedulerType | str` means the names of SchedulerType: the plain str would let any misspelling through.
    if any(_is_enum(option) for option in options):
        options = [option for option in options if option is not str]
    exact = [option for option in options if type(value) is (typing.get_origin(option) or option)]
    for option in [*exact, *options]:
        matched, result = _match(value, option)
        if matched:
            return True, result
    return False, value


def _match_class(value: Any, cls: Any, arguments: Sequence[Any]) -> tuple[bool, Any]:
    if cls in (None, type(None)):
        return value is None, None
    if cls is float:
        ok = isinstance(value, int | float) and not isinstance(value, bool)
        return ok, float(value) if ok else value
    if cls is int:
        if isinstance(value, float) and value.is_integer():
            return True, int(value)
        return isinstance(value, int) and not isinstance(value, bool), value
    if cls in (bool, str):
        return isinstance(value, cls), value
    if _is_enum(cls):
        names = [member.value for member in cls]
        return value in names, value
    if isinstance(cls, type) and issubclass(cls, Path):
        return isinstance(value, str), value
    if isinstance(cls, type) and issubclass(cls, Mapping | dict):
        return _match_mapping(value, arguments)
    if isinstance(cls, type) and issubclass(cls, Sequence | set | frozenset):
        return _match_sequence(value, cls, arguments)
    return False, value


def _match_mapping(value: Any, arguments: Sequence[Any]) -> tuple[bool, Any]:
    if not isinstance(value, dict):
        return False, value
    key_type, item_type = arguments or (Any, Any)
    pairs = [(_match(key, key_type), _match(item, item_type)) for key, item in value.items()]
    return all(key[0] and item[0] for key, item in pairs), {key[1]: item[1] for key, item in pairs}


def _match_sequence(value: Any, cls: type, arguments: Sequence[Any]) -> tuple[bool, Any]:
    if not isinstance(value, list | tuple):
        return False, value
    fixed = cls is tuple and arguments and Ellipsis not in arguments
    if fixed and len(arguments) != len(value):
        return False, value
    kinds = arguments if fixed else [arguments[0] if arguments else Any] * len(value)
    items = [_match(item, kind) for item, kind in zip(value, kinds, strict=True)]
    container = cls if cls in (tuple, set, frozenset) else list
    return all(matched for matched, _ in items), container(item for _, item in items)


def _is_enum(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, enum.Enum)


_PYTHON_ONLY = "nothing that YAML can hold"
_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    type(None): "null",
    Any: "anything",
}


def expected(annotation: Any) -> str:
    """An annotation in words, for error messages: `int | None` -> "a whole number or null"."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in _WORDS:
        return _WORDS[annotation]
    if origin in (typing.Union, types.UnionType):
        options = [option for option in arguments if option is not str or not any(map(_is_enum, arguments))]
        words = dict.fromkeys(expected(option) for option in options)
        return " or ".join([word for word in words if not word.startswith(_PYTHON_ONLY)] or words)
    if origin is typing.Annotated:
        return expected(arguments[0])
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, arguments))
    if _is_enum(annotation):
        return "one of " + ", ".join(str(member.value) for member in annotation)
    cls = origin or annotation
    if isinstance(cls, type) and issubclass(cls, Path):
        return "a path"
    if isinstance(cls, type) and issubclass(cls, Mapping | dict):
        return "a mapping of key: value"
    if isinstance(cls, type) and issubclass(cls, Sequence | set | frozenset):
        kinds = " and ".join(dict.fromkeys(expected(kind) for kind in arguments if kind is not Ellipsis))
        return f"a list (each {kinds})" if kinds else "a list"
    return f"{_PYTHON_ONLY} ({getattr(annotation, '__name__', annotation)}); set it from Python"


def describe(value: Any) -> str:
    """A value as it came, in words: 'abc' (text), 3 (a whole number), null, a list, a mapping."""
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "a mapping" + (f" with the keys {', '.join(map(str, value))}" if value else " without keys")
    if isinstance(value, list | tuple):
        return f"the list {value!r}"
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value!r} ({_WORDS.get(type(value), type(value).__name__)})"
