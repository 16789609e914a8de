"""A scaling study: grids of sizes, data budgets, batches and MCMC steps, of energy models and their twins.

It is read from YAML, of which every key is checked, and becomes trials of ordinary configurations.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from ebwm_dist.config.loading import load_config, read_yaml
from ebwm_dist.config.schema import Config
from ebwm_dist.config.values import convert, expectation
from ebwm_dist.errors import ConfigError
from ebwm_dist.experiments.trial import Trial

MODELS = ("ebt", "ar")
T = TypeVar("T")


@dataclass(frozen=True)
class Reference:
    """Where all axes are that a grid does not vary."""

    size: str
    batch: int
    """Sequences per optimizer step."""
    tokens: int | None = None
    """Tokens, or frames, of a run; either this or `steps`."""
    steps: int | None = None
    """Optimizer steps of a run."""
    mcmc_steps: int | None = None
    """MCMC steps of the energy model; null: those of its configuration."""


@dataclass(frozen=True)
class Grid:
    """The values of axes, of which every combination is run, with each of the seeds."""

    size: list[str] = field(default_factory=list)
    batch: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    mcmc_steps: list[int] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])


@dataclass(frozen=True)
class Study:
    """What a file in configs/studies/ says."""

    title: str
    models: dict[str, str]
    """`ebt` and `ar`: configuration files, relative to the study's."""
    sizes: dict[str, list[str]]
    """Names of sizes, and the overrides that make them; one that begins with `ebt:` or `ar:` is for that model alone.
    Sizes called `depth...` differ from the reference in their layers alone, and are no steps of the ladder of
    parameters."""
    reference: Reference
    grids: list[Grid]
    overrides: list[str] = field(default_factory=list)
    """Of all runs, as those of sizes."""
    warmup: float | None = None
    """Warm-up of the learning rate as a share of a run's steps; null: that of the configuration."""
    gpu: str | None = None
    """Kind of GPU that times are estimated for (section `cluster` has their number); null: a core of a CPU."""


@dataclass(frozen=True)
class StudyRun:
    """A run of a study and its place on the axes."""

    trial: Trial
    model: str
    """`ebt` or `ar`."""
    size: str
    batch: int
    steps: int
    mcmc_steps: int | None
    """Of an energy model; null: as its configuration has it."""


def read_study(path: Path) -> Study:
    """Read a study.

    Raises:
        ConfigError: names the file, the key and what is allowed.
    """
    study = _parsed(Study, read_yaml(path), str(path), "")
    for name, value in (("grids", study.grids), ("sizes", study.sizes), ("models", study.models)):
        if not value:
            raise ConfigError(f"{path}: {name} is empty: a study needs one at least")
    if unknown := [name for name in study.models if name not in MODELS]:
        raise ConfigError(f"{path}: models.{unknown[0]}: allowed are {' and '.join(MODELS)}")
    _check_axes(path, "reference", study.reference.size, study)
    if (study.reference.tokens is None) == (study.reference.steps is None):
        raise ConfigError(f"{path}: reference: needs either tokens or steps")
    for number, grid in enumerate(study.grids):
        where = f"grids[{number}]"
        if grid.tokens and grid.steps:
            raise ConfigError(f"{path}: {where}: has both tokens and steps; it can vary one of them")
        for size in grid.size:
            _check_axes(path, where, size, study)
    for where, values in _numbers(study):
        if wrong := [value for value in values if value < (0 if where.endswith("seeds") else 1)]:
            raise ConfigError(f"{path}: {where} has {wrong[0]}: must be at least {0 if where.endswith('seeds') else 1}")
    if study.warmup is not None and not 0 <= study.warmup <= 1:
        raise ConfigError(f"{path}: warmup = {study.warmup}: must be from 0 to 1, a share of a run's steps")
    return study


def runs_of(study: Study, path: Path) -> list[StudyRun]:
    """Return the runs of a study from the file `path`, each once.

    Raises:
        ConfigError: a configuration cannot be read, or is not of the model that it is given for.
    """
    bases: dict[str, tuple[Path, Config]] = {}
    for model, name in study.models.items():
        base = path.parent / name
        bases[model] = base, load_config(base, _of_model(model, study.overrides))
        if (kind := bases[model][1].model.kind) != model:
            raise ConfigError(f"{path}: models.{model} = {name!r}: {base} has model.kind = {kind!r}")
    runs: dict[StudyRun, None] = {}
    for grid, model in product(study.grids, study.models):
        for place, seed in product(_places(study.reference, grid, model), grid.seeds):
            runs[_run(study, *bases[model], place, model, seed)] = None
    return list(runs)


def _places(reference: Reference, grid: Grid, model: str) -> Iterator[Reference]:
    """Yield the combinations of a grid; a twin has no MCMC steps."""
    varied: dict[str, list[Any]] = {
        name: values for name in ("size", "batch", "tokens", "steps", "mcmc_steps") if (values := getattr(grid, name))
    }
    base = dataclasses.replace(reference, mcmc_steps=None) if model == "ar" else reference
    if model == "ar":
        varied.pop("mcmc_steps", None)
    if varied.keys() & {"tokens", "steps"}:
        base = dataclasses.replace(base, tokens=None, steps=None)
    for values in product(*varied.values()):
        yield dataclasses.replace(base, **dict(zip(varied, values, strict=True)))


def _run(study: Study, base: Path, config: Config, place: Reference, model: str, seed: int) -> StudyRun:
    batch, steps = place.batch, place.steps
    if place.tokens is not None:
        steps = max(1, round(place.tokens / (batch * config.data.sequence_length)))
    assert steps is not None
    world = config.cluster.num_nodes * config.cluster.workers_per_node
    micro_batch = math.gcd(config.training.micro_batch_size, max(1, batch // world))
    overrides = [
        *_of_model(model, study.sizes[place.size]),
        f"training.max_steps={steps}",
        f"training.global_batch_size={batch}",
    ]
    overrides.append(f"training.micro_batch_size={micro_batch}")
    if study.warmup is not None:
        overrides.append(f"optimizer.warmup_steps={round(study.warmup * steps)}")
    name = f"{model}-{place.size}-{batch}x{steps}"
    if place.mcmc_steps is not None:
        overrides += [f"mcmc.num_steps={place.mcmc_steps}", "mcmc.max_num_steps=null"]
        name += f"-{place.mcmc_steps}mcmc"
    trial = Trial(f"{name}-seed{seed}", base, (*overrides, *_of_model(model, study.overrides)), seed)
    return StudyRun(trial, model, place.size, batch, steps, place.mcmc_steps)


def _of_model(model: str, overrides: list[str]) -> list[str]:
    others = tuple(f"{name}:" for name in MODELS if name != model)
    return [text.removeprefix(f"{model}:") for text in overrides if not text.startswith(others)]


def _check_axes(path: Path, where: str, size: str, study: Study) -> None:
    if size not in study.sizes:
        raise ConfigError(f"{path}: {where}.size = {size!r}: not among sizes, which are {', '.join(study.sizes)}")


def _numbers(study: Study) -> Iterator[tuple[str, list[int]]]:
    """Yield the numbers of a study that count something, and where they are."""
    for number, grid in enumerate(study.grids):
        for name in ("batch", "tokens", "steps", "mcmc_steps", "seeds"):
            yield f"grids[{number}].{name}", getattr(grid, name)
    for name in ("batch", "tokens", "steps", "mcmc_steps"):
        value = getattr(study.reference, name)
        yield f"reference.{name}", [] if value is None else [value]


def _parsed(cls: type[T], tree: Any, path: str, where: str) -> T:
    """Return a dataclass from what YAML holds; unknown and missing keys and wrong types are errors."""
    hints = get_type_hints(cls)
    fields = {one.name: one for one in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{path}: {where} = {tree!r}: expected a section with the keys {', '.join(fields)}")
    values: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{where}.{key}".lstrip(".")
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            meant = f"did you mean {close[0]!r}? " if close else ""
            raise ConfigError(f"{path}: {name} = {value!r}: unknown key; {meant}known are {', '.join(fields)}")
        values[key] = _value(hints[key], value, path, name)
    for name, one in fields.items():
        if name not in values and one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{path}: {f'{where}.{name}'.lstrip('.')} is missing")
    return cls(**values)


def _value(hint: Any, value: Any, path: str, name: str) -> Any:
    optional = get_origin(hint) is not None and type(None) in get_args(hint)
    type_ = get_args(hint)[0] if optional else hint
    if dataclasses.is_dataclass(type_):
        return _parsed(type_, value, path, name)  # type: ignore[arg-type]
    if get_origin(type_) is list and dataclasses.is_dataclass(of := get_args(type_)[0]) and isinstance(value, list):
        return [_parsed(of, item, path, f"{name}[{number}]") for number, item in enumerate(value)]  # type: ignore[arg-type]
    if optional and (value is None or str(value) in ("", "~", "null")):
        return None
    try:
        return convert(value, type_)
    except TypeError:
        expected = (
            "a list of sections" if dataclasses.is_dataclass((get_args(type_) or (None,))[0]) else expectation(type_)
        )
        raise ConfigError(f"{path}: {name} = {value!r}: expected {expected}{' or null' if optional else ''}") from None
