"""The keys of a section, and the values that each of them takes: its type, its choices and its limits.

Sections are dataclasses: those of the configuration, and those of other files, such as studies.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import re
import types
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from ebwm_dist.config.deepspeed_keys import check_deepspeed_keys
from ebwm_dist.config.renames import RENAMED_VALUES
from ebwm_dist.config.schema import Config
from ebwm_dist.errors import ConfigError

_LIMITS = {
    "at_least": (operator.ge, "at least"),
    "above": (operator.gt, "more than"),
    "at_most": (operator.le, "at most"),
    "below": (operator.lt, "less than"),
}
_WORDS = {
    **dict.fromkeys(("", "~", "null"), None),
    **dict.fromkeys(("true", "yes", "on"), True),
    **dict.fromkeys(("false", "no", "off"), False),
}
_DIGITS = r"(?:0|[1-9]\d*|[1-9]\d{0,2}(?:_\d{3})+)"
_INTEGER = re.compile(rf"[-+]?{_DIGITS}$", re.ASCII)
FLOAT = re.compile(rf"[-+]?(?:{_DIGITS}\.\d*|\.\d+|{_DIGITS}(?=[eE]))(?:[eE][-+]?\d+)?$", re.ASCII)


class Plain(str):
    """A scalar without quotes, as it was written: what it means depends on the type of its key."""

    def __repr__(self) -> str:
        return str(self)


class Key(NamedTuple):
    """The type of a value, whether it may be null, and default (`MISSING` without one) and metadata of its field."""

    type: Any
    optional: bool
    default: Any
    metadata: Mapping[str, Any]


MISSING = dataclasses.MISSING


def keys_of(section: Any, prefix: str = "") -> dict[str, Key]:
    """Return the keys of a section, with a prefix before their names."""
    hints, keys = get_type_hints(section), {}
    for field in dataclasses.fields(section):
        hint, make = hints[field.name], field.default_factory
        optional = type(None) in get_args(hint)
        inner = get_args(hint)[0] if optional else hint
        default = field.default if make is MISSING else make()
        keys[prefix + field.name] = Key(inner, optional, default, field.metadata)
    return keys


_TOP = keys_of(Config)
SECTIONS: dict[str, dict[str, Key]] = {"": _TOP} | {
    name: keys_of(key.type, f"{name}.") for name, key in _TOP.items() if dataclasses.is_dataclass(key.type)
}
"""The keys of every section by their dotted names; `""` is the top level."""
KEYS = {name: key for section in SECTIONS.values() for name, key in section.items() if name not in SECTIONS}
"""All keys that hold a value."""


def locate(config: Config, name: str) -> tuple[Any, str]:
    """Return the section of `config` that holds the key `name`, and its name there."""
    section, _, attribute = name.rpartition(".")
    return getattr(config, section) if section else config, attribute


def unknown_key(name: str, value: Any, known: Iterable[str], where: str) -> ConfigError:
    """Return the error about a key `name` that is none of those `known` in its section, which `where` names."""
    known = list(known)
    close = difflib.get_close_matches(name.rpartition(".")[2], known, n=1)
    meant = f"did you mean {close[0]!r}? " if close else ""
    return ConfigError(f"{name} = {value!r}: unknown key; {meant}{where} has {', '.join(known)}")


def typed(name: str, value: Any, key: Key | None = None) -> Any:
    """Return `value` in the type of the key `name`, of the configuration unless a `key` is given.

    Raises:
        ConfigError: the conversion would lose something or the value is not allowed; the message lists what is.
    """
    key = key or KEYS[name]
    choices, limits = key.metadata.get("choices"), key.metadata.get("limits", {})
    try:
        null = key.optional and (value is None or (isinstance(value, Plain) and _scalar(value) is None))
        converted: Any = None if null else convert(value, key.type)
        if choices and converted not in choices:
            raise TypeError
    except TypeError:
        expected = f"expected {expectation(key.type)}{' or null' if key.optional else ''}"
        if choices:
            expected = f"allowed are {', '.join(map(repr, choices))}"
        if isinstance(value, str) and value in RENAMED_VALUES.get(name, ()):
            expected = f"this value is now {RENAMED_VALUES[name][value]!r}"
        raise ConfigError(f"{name} = {value!r}: {expected}") from None
    for number in _leaves(converted):
        if (
            limits
            and isinstance(number, (int, float))
            and not all(_LIMITS[limit][0](number, bound) for limit, bound in limits.items())
        ):
            allowed = " and ".join(f"{_LIMITS[limit][1]} {bound:g}" for limit, bound in limits.items())
            raise ConfigError(f"{name} = {value!r}: must be {allowed}")
    if name == "deepspeed":
        check_deepspeed_keys(converted)
    return converted


def convert(value: Any, type_: Any) -> Any:
    """Return `value`, as it was read from YAML, in a type; raise TypeError where something would be lost by it."""
    if get_origin(type_) in (Union, types.UnionType):
        for option in get_args(type_):
            with suppress(TypeError):
                return convert(value, option)
        raise TypeError
    if get_origin(type_) is Literal:
        if value in get_args(type_):
            return str(value)
    elif type_ is str:
        if isinstance(value, str) and value:
            return str(value)
    elif isinstance(value, Plain):
        scalar = _scalar(value)
        return scalar if type_ is Any else convert(scalar, type_)
    elif type_ is Any:
        if isinstance(value, list):
            return [convert(item, Any) for item in value]
        return convert(value, dict[str, Any]) if isinstance(value, dict) else value
    elif get_origin(type_) is dict:
        if isinstance(value, Mapping):
            return {str(name): convert(item, get_args(type_)[1]) for name, item in value.items()}
    elif get_origin(type_) is list:
        if isinstance(value, (list, tuple)):
            return [convert(item, get_args(type_)[0]) for item in value]
    elif get_origin(type_) is tuple:
        items = get_args(type_)
        if isinstance(value, (list, tuple)) and len(value) == len(items):
            return tuple(convert(item, of) for item, of in zip(value, items, strict=True))
    elif type_ is bool or isinstance(value, bool):
        if type_ is bool and isinstance(value, bool):
            return value
    elif type_ is int:
        # `1e6` is a natural way to write a number of steps.
        if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
            return int(value)
    elif isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    raise TypeError


def _leaves(value: Any) -> list[Any]:
    """Return the values in nested mappings and lists."""
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for item in value for leaf in _leaves(item)] if isinstance(value, (list, tuple)) else [value]


def _scalar(text: str) -> Any:
    """Return the meaning of a plain scalar where no string is declared. Octals, base 60 and dates have none."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _INTEGER.match(text):
        return int(text.replace("_", ""))
    return float(text) if FLOAT.match(text) else str(text)


def expectation(type_: Any) -> str:
    """Return what a value of a type is called in errors."""
    if get_origin(type_) in (Union, types.UnionType):
        return " or ".join(map(expectation, get_args(type_)))
    if get_origin(type_) is Literal:
        return " or ".join(map(repr, get_args(type_)))
    if get_origin(type_) is list:
        (of,) = get_args(type_)  # pairs are those of a schedule
        return (
            "points [[sample, weight], ...]"
            if get_origin(of) is tuple
            else f"a list, of which each is {expectation(of)}"
        )
    if get_origin(type_) is tuple:
        return f"a list of {len(get_args(type_))} numbers"
    if get_origin(type_) is dict:
        of = get_args(type_)[1]
        return "a section" if of is Any else f"names, and {expectation(of)} for each"
    return {bool: "true or false", int: "an integer", float: "a finite number", str: "a non-empty string"}[type_]
