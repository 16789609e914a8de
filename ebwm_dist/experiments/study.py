"""A scaling study: grids of sizes, data budgets, batches and MCMC steps, of energy models and their twins.

It is read from YAML, of which every key is checked, and becomes trials of ordinary configurations.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, TypeVar, get_args

from ebwm_dist.config.fields import number
from ebwm_dist.config.loading import load_config, read_yaml
from ebwm_dist.config.schema import Config
from ebwm_dist.config.values import MISSING, keys_of, typed, unknown_key
from ebwm_dist.errors import ConfigError
from ebwm_dist.experiments.trial import Trial

MODELS = ("ebt", "ar")
T = TypeVar("T")
_AT_LEAST_1 = {"limits": {"at_least": 1}}


@dataclass(frozen=True)
class Reference:
    """Where all axes are that a grid does not vary."""

    size: str
    batch: int = number(MISSING, at_least=1)
    """Sequences per optimizer step."""
    tokens: int | None = number(None, at_least=1)
    """Tokens, or frames, of a run; either this or `steps`."""
    steps: int | None = number(None, at_least=1)
    """Optimizer steps of a run."""
    mcmc_steps: int | None = number(None, at_least=1)
    """MCMC steps of the energy model; null: those of its configuration."""


@dataclass(frozen=True)
class Grid:
    """The values of axes, of which every combination is run, with each of the seeds."""

    size: list[str] = field(default_factory=list)
    batch: list[int] = field(default_factory=list, metadata=_AT_LEAST_1)
    tokens: list[int] = field(default_factory=list, metadata=_AT_LEAST_1)
    steps: list[int] = field(default_factory=list, metadata=_AT_LEAST_1)
    mcmc_steps: list[int] = field(default_factory=list, metadata=_AT_LEAST_1)
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"limits": {"at_least": 0}})


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
    warmup: float | None = number(None, at_least=0, at_most=1)
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
    tree = read_yaml(path)
    try:
        study = _parsed(Study, tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    for name, value in (("grids", study.grids), ("sizes", study.sizes), ("models", study.models)):
        if not value:
            raise ConfigError(f"{path}: {name} is empty: a study needs one at least")
    if unknown := [name for name in study.models if name not in MODELS]:
        raise ConfigError(f"{path}: models.{unknown[0]}: allowed are {' and '.join(MODELS)}")
    _check_axes(path, "reference", study.reference.size, study)
    if (study.reference.tokens is None) == (study.reference.steps is None):
        raise ConfigError(f"{path}: reference: needs either tokens or steps")
    for place, grid in enumerate(study.grids):
        where = f"grids[{place}]"
        if grid.tokens and grid.steps:
            raise ConfigError(f"{path}: {where}: has both tokens and steps; it can vary one of them")
        for size in grid.size:
            _check_axes(path, where, size, study)
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


def unit_of(configs: Iterable[Config]) -> str:
    """Return what is counted in runs: tokens, frames, or patches of them."""
    models = [config.model for config in configs]
    if all(model.embedding_dim is None for model in models):
        return "tokens"
    return "frames" if all(model.block_size == 1 for model in models) else "patches"


def _check_axes(path: Path, where: str, size: str, study: Study) -> None:
    if size not in study.sizes:
        raise ConfigError(f"{path}: {where}.size = {size!r}: not among sizes, which are {', '.join(study.sizes)}")


def _parsed(cls: type[T], tree: Any, where: str = "") -> T:
    """Return a section from what YAML holds; unknown and missing keys and wrong values are errors."""
    keys = keys_of(cls)
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{where} = {tree!r}: expected a section with the keys {', '.join(keys)}")
    values: dict[str, Any] = {}
    for name, value in tree.items():
        place = f"{where}.{name}".lstrip(".")
        if name not in keys:
            raise unknown_key(place, value, keys, where or "the top level")
        of = (get_args(keys[name].type) or (None,))[0]
        if dataclasses.is_dataclass(keys[name].type):
            values[name] = _parsed(keys[name].type, value, place)
        elif not dataclasses.is_dataclass(of):
            values[name] = typed(place, value, keys[name])
        elif isinstance(value, list):
            values[name] = [_parsed(of, item, f"{place}[{row}]") for row, item in enumerate(value)]  # type: ignore[arg-type]
        else:
            raise ConfigError(f"{place} = {value!r}: expected a list of sections")
    if missing := [name for name, key in keys.items() if key.default is MISSING and name not in values]:
        raise ConfigError(f"{f'{where}.{missing[0]}'.lstrip('.')} is missing")
    return cls(**values)
