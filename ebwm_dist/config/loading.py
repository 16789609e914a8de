"""Read a configuration from YAML files and `key=value` overrides, and write it back.

A file may name another one with `extends: other.yaml`, relative to itself; its own keys win over that file's. Every
value is checked where it was given, so that an error can name the file (or the command line) it came from.
"""

from __future__ import annotations

import difflib
import math
import os
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import Field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ebwm_dist.config.checks import check_config, check_value
from ebwm_dist.config.schema import Config
from ebwm_dist.errors import ConfigError
from ebwm_dist.files import write_atomically

COMMAND_LINE = "command line"


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Read the file at `path` and all that it extends, apply `key=value` overrides and check the result."""
    tree: Any = OmegaConf.structured(Config)
    for origin, values in [*_read_chain(Path(path)), *(_read_override(text) for text in overrides)]:
        tree = OmegaConf.merge(tree, _checked_section(values, Config, "", origin))
    try:
        resolved = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error.full_key}: {_first_line(error)}") from None
    # Interpolations (`${...}`) have a value, and so a type, only now.
    checked = _checked_section(resolved, Config, "", str(path))
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), checked))
    assert isinstance(config, Config)
    try:
        check_config(config)
    except ConfigError as error:
        raise ConfigError(f"{path}{' with overrides' if overrides else ''}: {error}") from None
    return config


def save_config(config: Config, path: str | os.PathLike[str]) -> None:
    """Write the whole tree as YAML that `load_config` reads back; readers see the old file or the new, never a part."""
    write_atomically(Path(path), OmegaConf.to_yaml(OmegaConf.structured(config)).encode())


def _read_chain(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return (file, values) of `path` and the files it extends, the most basic one first."""
    chain: list[tuple[str, dict[str, Any]]] = []
    visited: list[Path] = []
    current, named_by = path, ""
    while True:
        if current.resolve() in visited:
            cycle = " -> ".join([*(name for name, _ in reversed(chain)), str(current)])
            raise ConfigError(f"{named_by}files extend each other: {cycle}")
        visited.append(current.resolve())
        values = _read_yaml(current, named_by)
        base = values.pop("extends", None)
        chain.insert(0, (str(current), values))
        if base is None:
            return chain
        if not isinstance(base, str):
            raise ConfigError(f"{current}: extends = {base!r}: expected the name of one YAML file")
        named_by = f"{current}: extends = {base!r}: "
        current = current.parent / base


def _read_yaml(path: Path, named_by: str) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{named_by}{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{named_by}{path}: cannot be read: {_first_line(error)}") from None
    with _yaml_errors(str(path), in_file=True):
        # OmegaConf's YAML reads `1e-3` as a number and refuses a key given twice; plain PyYAML does neither.
        values = OmegaConf.to_container(OmegaConf.create(text))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, got a list")
    return {str(key): value for key, value in values.items()}


def _read_override(text: str) -> tuple[str, dict[str, Any]]:
    expected = "expected key=value, as in optimizer.lr=1e-3"
    key, equals, _ = text.partition("=")
    if not equals:
        raise ConfigError(f"{COMMAND_LINE}: no '=' in {text!r}; {expected}")
    if not all(key.split(".")):
        raise ConfigError(f"{COMMAND_LINE}: empty name in the key of {text!r}; {expected}")
    with _yaml_errors(f"{COMMAND_LINE}: {text}", in_file=False):
        tree = OmegaConf.to_container(OmegaConf.from_dotlist([text]))
    assert isinstance(tree, dict)
    return COMMAND_LINE, {str(name): value for name, value in tree.items()}


@contextmanager
def _yaml_errors(origin: str, in_file: bool) -> Iterator[None]:
    try:
        yield
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}:" if in_file and error.problem_mark else ""
        raise ConfigError(f"{origin}:{line} not valid YAML: {error.problem}") from None
    except AssertionError:  # What OmegaConf says of a document that is a mere number.
        raise ConfigError(f"{origin}: expected `key: value` lines") from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{origin}: not valid YAML: {_first_line(error)}") from None


def _checked_section(values: Any, section: type, prefix: str, origin: str) -> dict[str, Any]:
    """Check `values` against the dataclass `section`, and return them converted to the types declared there."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{origin}: {prefix} = {values!r}: expected a section with the keys {_listed(section)}")
    known = {field.name: field for field in fields(section)}
    result: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        if name not in known:
            raise ConfigError(f"{origin}: {key} = {value!r}: unknown key; {_suggestion(str(name), section, prefix)}")
        hint = _type_hints(section)[name]
        if isinstance(hint, type) and is_dataclass(hint):
            result[name] = _checked_section(value, hint, key, origin)
        elif isinstance(value, str) and "${" in value:
            result[name] = value
        else:
            result[name] = _checked_value(value, hint, known[name], key, origin)
    return result


def _checked_value(value: Any, hint: Any, field: Field[Any], key: str, origin: str) -> Any:
    choices = field.metadata.get("choices")
    expectation = f"allowed are {', '.join(map(repr, choices))}" if choices else f"expected {_expectation(hint)}"
    try:
        converted = _converted(value, hint)
    except TypeError:
        raise ConfigError(f"{origin}: {key} = {value!r}: {expectation}") from None
    if choices and converted not in choices:
        raise ConfigError(f"{origin}: {key} = {value!r}: {expectation}")
    try:
        check_value(key, converted)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from None
    return converted


def _converted(value: Any, hint: Any) -> Any:
    """Convert `value` to the type `hint`, where nothing is lost by it; raise TypeError otherwise."""
    if _is_union(hint):
        if value is None:
            return None
        return _converted(value, _without_none(hint))
    if get_origin(hint) is tuple:
        items = get_args(hint)
        if isinstance(value, (list, tuple)) and len(value) == len(items):
            return [_converted(item, type_) for item, type_ in zip(value, items, strict=True)]
    elif get_origin(hint) is dict:
        if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
            of = get_args(hint)[1]
            return value if of is Any else {name: _converted(item, of) for name, item in value.items()}
    elif isinstance(value, bool):
        if hint is bool:
            return value
    elif hint is int:
        # `1e6` is a float in YAML, and a natural way to write a number of steps.
        if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
            return int(value)
    elif hint is float:
        if isinstance(value, (int, float)) and math.isfinite(value):
            return float(value)
    elif hint is str and isinstance(value, (str, int)):
        return str(value)
    raise TypeError


def _expectation(hint: Any) -> str:
    if _is_union(hint):
        return f"{_expectation(_without_none(hint))} or null"
    if get_origin(hint) is tuple:
        return f"a list of {len(get_args(hint))} numbers"
    if get_origin(hint) is dict:
        of = get_args(hint)[1]
        return "a section" if of is Any else f"names, and {_expectation(of)} for each"
    return {bool: "true or false", int: "an integer", float: "a finite number", str: "a string"}[hint]


def _suggestion(name: str, section: type, prefix: str) -> str:
    names = [field.name for field in fields(section)]
    close = difflib.get_close_matches(name, names, n=1)
    meant = f"did you mean {close[0]!r}? " if close else ""
    return f"{meant}{prefix or 'the top level'} has {_listed(section)}"


def _listed(section: type) -> str:
    return ", ".join(field.name for field in fields(section))


@cache
def _type_hints(section: type) -> dict[str, Any]:
    return get_type_hints(section)


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _without_none(hint: Any) -> Any:
    (inner,) = (item for item in get_args(hint) if item is not type(None))
    return inner


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
