"""Dataclasses and plain values (what YAML and JSON hold): strict conversion both ways, and a digest.

An unknown key is an error that names the nearest right one; a value of another type is never coerced silently.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from typing import Any, Literal, TypeVar, Union

from fac_jax.errors import UserError

T = TypeVar("T")


def to_plain(value: Any) -> Any:
    """Dataclasses, tuples and dicts as plain JSON and YAML values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_plain(item) for item in value]
    return value


def digest(value: Any) -> str:
    """SHA-256 (16 hex digits) of any tree of dataclasses and plain values."""
    text = json.dumps(to_plain(value), sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def suggest(name: str, names: typing.Iterable[str]) -> str:
    """`" (did you mean 'layer'?)"`, or nothing when no name is near."""
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def from_plain(kind: type[T], value: Any, where: str) -> T:
    """Build `kind` from plain values; `where` is the path named in errors, such as `quickstart.yaml: sae`."""
    return typing.cast(T, _convert(kind, value, where))


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _dataclass(typing.cast(type, kind), value, where)
    if origin is Literal:
        if value not in arguments:
            raise UserError(
                f"{where} is {value!r}{suggest(str(value), map(str, arguments))}; choose from {list(arguments)}"
            )
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where} is {value!r}; it must be a mapping of names")
        return {str(key): _convert(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where} is {value!r}; it must be a list")
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) != len(value):
            raise UserError(f"{where} has {len(value)} items; it must have {len(kinds)}")
        return tuple(_convert(k, item, f"{where}.{i}") for i, (k, item) in enumerate(zip(kinds, value, strict=True)))
    return _scalar(kind, value, where)


def _dataclass(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(
            f"{where} is {value!r}; it must be a mapping with the keys {[f.name for f in dataclasses.fields(kind)]}"
        )
    kinds = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]
    for key in value:
        if key not in names:
            raise UserError(f"{where} has no key {key!r}{suggest(str(key), names)}; its keys are: {', '.join(names)}")
    for f in dataclasses.fields(kind):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in value:
            raise UserError(f"{where} lacks the key {f.name!r}")
    return kind(**{key: _convert(kinds[key], item, f"{where}: {key}") for key, item in value.items()})


def _scalar(kind: type, value: Any, where: str) -> Any:
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        try:
            return float(value)
        except ValueError:
            pass
    if type(value) is kind:
        return value
    raise UserError(f"{where} is {value!r} ({type(value).__name__}); it must be {kind.__name__}")
