"""Read a configuration from YAML files and `key=value` overrides, and write it back.

A file may extend another one with `extends: other.yaml`, relative to itself. A later value of a key replaces an earlier
one; so does a mapping with names of its own (`data.mixture`, `deepspeed`), as a whole. Strings keep the characters that
were written: where a string is declared, `0012`, `off` and `2024_10_05` are one.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ebwm_dist.config.checks import check_config
from ebwm_dist.config.renames import RENAMED_KEYS, translate
from ebwm_dist.config.schema import Config
from ebwm_dist.config.values import FLOAT, KEYS, SECTIONS, Plain, locate, typed, unknown_key
from ebwm_dist.errors import ConfigError
from ebwm_dist.files import write_atomically

COMMAND_LINE = "command line"


class _Loader(yaml.SafeLoader):
    """YAML whose scalars are all strings, and `Plain` where they have no quotes; a key given twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"found duplicate key {name}", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}  # `<<: *other`
_Loader.add_constructor("tag:yaml.org,2002:str", lambda loader, node: node.value if node.style else Plain(node.value))


class _Dumper(yaml.SafeDumper):
    """YAML in which strings that a reader could take for numbers are quoted, `1e5` among them."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


class _Given(NamedTuple):
    value: Any
    layer: int
    origin: str


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = (), stored: bool = False) -> Config:
    """Read the file at `path` and all that it extends, apply `key=value` overrides and check the result.

    Args:
        path: of a YAML file.
        overrides: later ones win.
        stored: the file belongs to a run or an export: names of earlier versions are translated instead of refused.

    Raises:
        ConfigError: names the file (or the command line), the key, its value and what is allowed.
    """
    given: dict[str, _Given] = {}
    chain = _read_chain(Path(path))
    for layer, (origin, tree) in enumerate(chain):
        given |= {key: _Given(value, layer, origin) for key, value in _flatten(tree, "", origin, stored).items()}
    for layer, text in enumerate(overrides, len(chain)):
        given |= {key: _Given(value, layer, COMMAND_LINE) for key, value in _read_override(text, given).items()}
    _check_path_is_used(given)
    config = _config_of(given)
    try:
        check_config(config)
    except ConfigError as error:
        raise ConfigError(f"{path}{' with overrides' if overrides else ''}: {error}") from None
    return config


def parse_config(text: str, origin: str) -> Config:
    """Read what is stored of a configuration, as YAML or as JSON, which is YAML too; other keys have their defaults."""
    with _yaml_errors(origin, in_file=True):
        tree = yaml.load(text, _Loader)
    return _config_of({key: _Given(value, 0, origin) for key, value in _flatten(tree, "", origin, stored=True).items()})


def save_config(config: Config, path: str | os.PathLike[str]) -> None:
    """Write the whole tree as YAML that `load_config` reads back; readers see the old file or the new, never a part."""
    write_atomically(Path(path), to_yaml(config).encode("utf-8"))


def to_yaml(config: Config) -> str:
    """Return the whole tree as YAML."""
    values = dataclasses.asdict(config)
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True)


def override_keys(text: str) -> set[str]:
    """Return the keys that a `key=value` override sets, `section={key: value}` among its forms."""
    return set(_read_override(text, {}))


def read_yaml(path: Path, named_by: str = "") -> dict[str, Any]:
    """Return the mapping in a YAML file, its scalars as they are written: `values.convert` gives them a type.

    Args:
        path: of the file.
        named_by: what names it, for the error.

    Raises:
        ConfigError: names the file and what is wrong with it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{named_by}{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{named_by}{path}: cannot be read: {_first_line(error)}") from None
    with _yaml_errors(str(path), in_file=True):
        tree = yaml.load(text, _Loader)
    if not isinstance(tree, (dict, type(None))):
        raise ConfigError(f"{path}: expected `key: value` lines")
    return tree or {}


def _read_chain(path: Path, named_by: str = "", above: tuple[Path, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """Return (file, content) of `path` and the files it extends, the most basic one first."""
    if path.resolve() in [file.resolve() for file in above]:
        raise ConfigError(f"{named_by}files extend each other: {' -> '.join(map(str, (*above, path)))}")
    tree = read_yaml(path, named_by)
    base = tree.pop("extends", None)
    if base is None:
        return [(str(path), tree)]
    if not isinstance(base, str) or not base:
        raise ConfigError(f"{path}: extends = {base!r}: expected the name of one YAML file")
    below = _read_chain(path.parent / base, f"{path}: extends = {str(base)!r}: ", (*above, path))
    return [*below, (str(path), tree)]


def _read_override(text: str, given: Mapping[str, _Given]) -> dict[str, Any]:
    """Return the values that an override sets, by key; one inside a mapping keeps the rest of what is `given`."""
    expected = "expected key=value, as in optimizer.lr=1e-3"
    name, equals, written = text.partition("=")
    if not equals:
        raise ConfigError(f"{COMMAND_LINE}: no '=' in {text!r}; {expected}")
    names = name.split(".")
    if not all(names):
        raise ConfigError(f"{COMMAND_LINE}: empty name in the key of {text!r}; {expected}")
    if name in KEYS and KEYS[name].type is str and not written.startswith(("'", '"')):
        return {name: Plain(written)}  # whatever is in it, also where YAML would need quotes
    with _yaml_errors(f"{COMMAND_LINE}: {text}"):
        value = yaml.load(written, _Loader)
    for key in (".".join(names[:end]) for end in range(1, len(names))):
        if key in KEYS:
            return {key: _changed(key, given.get(key), name[len(key) + 1 :], value)}
    for part in reversed(names):
        value = {part: value}
    return _flatten(value, "", COMMAND_LINE)


def _changed(key: str, before: _Given | None, name: str, value: Any) -> dict[str, Any]:
    """Return the mapping at `key` with another value at `name` in it."""
    type_ = KEYS[key].type
    mapping: dict[str, Any] = deepcopy(before.value) if before is not None and get_origin(type_) is dict else {}
    # Names in data.mixture are those of folders and may have dots.
    *sections, last = name.split(".") if Any in get_args(type_) else [name]
    inner = mapping
    for section in sections:
        if not isinstance(inner.get(section), dict):
            inner[section] = {}
        inner = inner[section]
    inner[last] = value
    return mapping


@contextmanager
def _yaml_errors(origin: str, in_file: bool = False) -> Iterator[None]:
    try:
        yield
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}:" if in_file and error.problem_mark else ""
        raise ConfigError(f"{origin}:{line} not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: not valid YAML: {_first_line(error)}") from None


def _flatten(tree: Any, section: str, origin: str, stored: bool = False) -> dict[str, Any]:
    """Return the values of a section by their dotted keys, every one of which must exist."""
    names = [key.rpartition(".")[2] for key in SECTIONS[section]]
    if not isinstance(tree, dict):
        raise ConfigError(f"{origin}: {section} = {tree!r}: expected a section with the keys {', '.join(names)}")
    values: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{section}.{name}".lstrip(".")
        new = RENAMED_KEYS.get(key, key)
        if key in SECTIONS:
            values |= _flatten(value, key, origin, stored)
        elif new not in KEYS:
            raise ConfigError(f"{origin}: {unknown_key(key, value, names, section or 'the top level')}")
        elif new != key and not stored:
            raise ConfigError(f"{origin}: {key} = {value!r}: this key is now {new}")
        else:
            values |= dict([translate(key, value) if stored else (key, value)])
    return values


def _config_of(given: Mapping[str, _Given]) -> Config:
    """Return the configuration with these values, each of which is checked by itself."""
    config = Config()
    for key, (value, _, origin) in _interpolated(given).items():
        try:
            setattr(*locate(config, key), typed(key, value))
        except ConfigError as error:
            raise ConfigError(f"{origin}: {error}") from None
    return config


def _check_path_is_used(given: Mapping[str, _Given]) -> None:
    path, mixture = given.get("data.path"), given.get("data.mixture")
    if path is not None and mixture is not None and mixture.value and path.layer > mixture.layer:
        raise ConfigError(
            f"{path.origin}: data.path = {path.value!r}: would not be read, as {mixture.origin} sets data.mixture; "
            "to train on data.path alone, set data.mixture={} too"
        )


def _interpolated(given: Mapping[str, _Given]) -> dict[str, _Given]:
    """Return the values with those of other keys in place of `${key}`."""
    written = {key for key, (value, _, _) in given.items() if isinstance(value, str) and "${" in value}
    result, tree = dict(given), OmegaConf.create()
    for name in KEYS if written else ():
        value = given[name].value if name in given else KEYS[name].default
        if isinstance(value, (str, int, float, type(None))):
            OmegaConf.update(tree, name, str(value) if isinstance(value, str) else value)
    for key in written:
        try:
            result[key] = given[key]._replace(value=Plain(OmegaConf.select(tree, key)))
        except OmegaConfBaseException as error:
            raise ConfigError(f"{given[key].origin}: {key}: {_first_line(error)}") from None
    return result


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
