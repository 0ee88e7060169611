"""Strict `a.b=c` overrides of a `RunConfig`, and its plain-dictionary form.

An unknown key names its nearest neighbour; a value of the wrong type names the type. `none` switches off an optional
part (`engram=none`, `model.moe=none`).
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from engram_megatron.config import RunConfig
from engram_megatron.config_fields import PATH
from engram_megatron.errors import UsageError


def apply_overrides(config: RunConfig, assignments: Sequence[str]) -> RunConfig:
    """Return `config` with every `key=value` of `assignments` set, later ones winning.

    Raises `UsageError` for an unknown key, a missing `=`, or a value that does not have the field's type.
    """
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise UsageError(f"override {assignment!r} is not of the form key=value")
        config = _set(config, config, key.strip(), key.strip().split("."), text.strip())
    return config


def with_absolute_paths(config: RunConfig, assignments: Sequence[str]) -> list[str]:
    """The assignments, for a program that starts in another folder. Raises `UsageError` as `apply_overrides` does."""
    found = leaves(apply_overrides(config, assignments))
    paths = {key for key, _, field in found if field.metadata.items() >= PATH.items()}
    split = [assignment.partition("=") for assignment in assignments]
    return [f"{key}={Path(text).absolute() if key in paths and text else text}" for key, _, text in split]


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    """Yield (dotted key, value, field) of every leaf of a config, depth first, in the order of declaration."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", value, f


def to_dict(config: Any) -> dict[str, Any]:
    """JSON-able nested dictionary of a config; tuples become lists."""
    result: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            result[f.name] = to_dict(value)
        else:
            result[f.name] = list(value) if isinstance(value, tuple) else value
    return result


def overrides_between(base: RunConfig, target: RunConfig) -> list[str]:
    """The `key=value` list that turns `base` into `target`: `apply_overrides(base, result) == target`, but `name`."""
    before = {key: value for key, value, _ in leaves(base)}
    after = [(key, value) for key, value, _ in leaves(target) if key != "name"]
    return [f"{key}={as_text(value)}" for key, value in after if key not in before or before[key] != value]


def as_text(value: Any) -> str:
    """A config value as an override would set it: `none`, `true`, `2,15`."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def from_dict(cls: type[Any], values: dict[str, Any]) -> Any:
    """Inverse of `to_dict`. Raises `UsageError` for a key that `cls` does not have (a newer or older version's)."""
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise UsageError(f"{cls.__name__} has no field {unknown[0]!r}: the file was written by another version")
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        nested = _dataclass_in(hints[key])
        if nested is not None and value is not None:
            arguments[key] = from_dict(nested, value)
        else:
            arguments[key] = tuple(value) if isinstance(value, list) else value
    return cls(**arguments)


def _dataclass_in(hint: Any) -> Any:
    """The dataclass of a hint `X` or `X | None`, else None."""
    for candidate in (hint, *get_args(hint)):
        if dataclasses.is_dataclass(candidate):
            return candidate
    return None


def _set(root: RunConfig, config: Any, full_key: str, path: list[str], text: str) -> Any:
    name, *rest = path
    hints = typing.get_type_hints(type(config))
    if name not in hints:
        raise UsageError(_unknown(root, full_key))
    hint, current = hints[name], getattr(config, name)
    nested = _dataclass_in(hint)
    if rest:
        if nested is None:
            raise UsageError(_unknown(root, full_key))
        if current is None:
            raise UsageError(f"cannot set {full_key}: {full_key.removesuffix('.' + '.'.join(rest))} is none")
        value = _set(root, current, full_key, rest, text)
    elif nested is not None:
        if text.lower() != "none" or type(None) not in get_args(hint):
            names = ", ".join(f.name for f in dataclasses.fields(nested))
            raise UsageError(f"{full_key} is a group; set one of its fields ({names})")
        value = None
    else:
        value = _parse(full_key, hint, text)
    return dataclasses.replace(config, **{name: value})


def _unknown(root: RunConfig, key: str) -> str:
    known = [name for name, _, _ in leaves(root)]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    tail = [k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    return f"unknown key {key!r}; did you mean {(tail or near)[0]!r}?"


def _parse(key: str, hint: Any, text: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if text.lower() == "none":
            return None
        return _parse(key, next(a for a in arguments if a is not type(None)), text)
    if origin is Literal:
        if text not in arguments:
            raise UsageError(f"{key} = {text!r} must be one of {', '.join(map(str, arguments))}")
        return text
    if origin is tuple:
        items = [item for item in text.strip("()[]").split(",") if item.strip()]
        if arguments[-1] is not Ellipsis and len(items) != len(arguments):
            raise UsageError(f"{key} = {text!r} must have {len(arguments)} items")
        return tuple(_parse(key, arguments[0], item.strip()) for item in items)
    if hint is str:
        return text
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise UsageError(f"{key} = {text!r} must be true or false")
        return text.lower() == "true"
    return _parse_number(key, hint, text)


def _parse_number(key: str, hint: Any, text: str) -> int | float:
    assert hint in (int, float), hint
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = None
    if isinstance(value, bool) or not isinstance(value, int | float) or (hint is int and not isinstance(value, int)):
        raise UsageError(f"{key} = {text!r} must be of type {hint.__name__}")
    return float(value) if hint is float else value
