"""Begin a run with weights that were trained before: `training.initialize_from`.

A new run takes over every parameter, the step size alpha among them: the energies that it descends were trained with
it, so `mcmc.step_size` then only sets its learning rate. A model of video also takes over the mean and the standard
deviation that embeddings were normalised with, without which its weights mean nothing. Optimizer, schedule, order of
the data, random states and replayed states are new. Rank 0 alone reads the weights, in the precision that they were
trained in, and the other ranks get them from it parameter by parameter, at every ZeRO stage.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ebwm_dist.checkpoint.fetching import fetch_description
from ebwm_dist.checkpoint.folder import read_marker
from ebwm_dist.checkpoint.zero_files import weight_files
from ebwm_dist.config.schema import Config
from ebwm_dist.data.format.sample_format import ClipFormat, LatentFormat, TokenFormat
from ebwm_dist.data.loading.mixture import Mixture
from ebwm_dist.data.tokenizer import load_tokenizer
from ebwm_dist.data.tokenizer.opening import JSON_FILE, MODEL_FILE
from ebwm_dist.distributed import World
from ebwm_dist.encoders.preprocessing import STATISTICS_FILE, EmbeddingStatistics, build_preprocessor
from ebwm_dist.errors import CheckpointError
from ebwm_dist.files import write_json
from ebwm_dist.mcmc.build import build_model
from ebwm_dist.mcmc.space import MIN_STEP_SIZE
from ebwm_dist.run import CONFIG_FILE, EXPORT_FILE, FORMAT_FILE, Run, check_weights
from ebwm_dist.storage import without_options

RECORD_FILE = "initialized_from.json"
"""In the run folder: where its first weights came from."""
_ALPHA = "space.step_size.alpha"
_OF_ENERGIES = {"variant", "num_landscapes", "tie_embeddings", "energy_head", "add_most_recent"}
"""Keys of the model that only energy models look at."""
_OF_TRAINING = {"step_size", "learn_step_size", "step_size_lr_multiplier", "num_steps_warmup", "step_size_warmup"}
"""Keys of the refinement that say how alpha and the number of steps come to be, not what they do."""
_OF_TOKENS = {"space.embeddings.weight", "space.vocab_to_embed.weight", "embeddings.weight", "head.weight"}
"""Matrices of models of text that have a row for each token."""


class InitialWeights:
    """Weights for a new run, which fit its configuration and its data; all ranks make it together.

    Args:
        config: of the new run, with `training.initialize_from`.
        data: what it trains on.
        world: this process and the others.
        log: gets lines about the weights when they are loaded.

    Raises:
        CheckpointError: the weights cannot be read, or do not fit; the message names everything that differs.
    """

    def __init__(self, config: Config, data: Mixture, world: World, log: Callable[[str], None]) -> None:
        self.world, self._log = world, log
        self._state: Mapping[str, Tensor] = {}
        self._unknown: list[int] = []

        def read() -> Any:
            if world.rank != 0:
                return None
            source = _open(config.training.initialize_from)
            statistics, notes = check_fit(source, config, data), describe_changes(source, config)
            self._state, self._unknown = source.weights(), _unknown_tokens(source, data)
            with torch.device("meta"):
                check_weights(build_model(source.config, source.pad_id or 0), self._state, str(source.checkpoint))
            alpha = self._state[_ALPHA].item() if _ALPHA in self._state else None
            if alpha is not None:
                given = config.mcmc.step_size
                of_config = (
                    "which mcmc.step_size = auto takes" if given == "auto" else f"mcmc.step_size = {given:g} not"
                )
                notes.append(f"alpha = {alpha:.4g} is of these weights, {of_config}")
            record = {"source": source.name, "step": source.step, "sha256": _hashes(source)}
            write_json(Path(config.run_dir) / RECORD_FILE, record)
            if statistics is not None and isinstance(data.sample_format, ClipFormat):
                write_json(Path(config.run_dir) / STATISTICS_FILE, asdict(statistics))
            return statistics, alpha, [f"begins with the weights of {source.name}, step {source.step}", *notes]

        self.statistics: EmbeddingStatistics | None
        self.alpha: float | None
        self._notes: list[str]
        self.statistics, self.alpha, self._notes = world.together(read)[0]

    @torch.no_grad()
    def load(self, model: nn.Module) -> None:
        """Give a model that was just built the weights; rows of tokens that they do not know stay as they were drawn.

        Ranks may hold shares of the parameters (ZeRO-3). The weights are let go of.
        """
        import deepspeed

        for name, p in model.named_parameters():
            # Without shares this does nothing.
            with deepspeed.zero.GatheredParameters([p], modifier_rank=0):
                if self.world.rank == 0:
                    saved = self._state[name]
                    rows, unknown = slice(min(len(p), len(saved))), self._unknown if name in _OF_TOKENS else []
                    drawn = p[unknown]
                    p[rows].copy_(saved[rows])
                    if unknown:
                        p[unknown] = drawn
                        self._notes.append(_unknown_rows(name, unknown))
                    if len(p) != len(saved):
                        self._notes.append(_rows(name, len(saved), len(p)))
            if not hasattr(p, "ds_id") and self.world.world_size > 1:
                dist.broadcast(p.data, 0)
        self._state = {}
        for note in self._notes:
            self._log(note)


def begin(
    config: Config, data: Mixture, world: World, resumes: bool, log: Callable[[str], None]
) -> tuple[Callable[[nn.Module], None] | None, Mixture]:
    """Return what loads the weights that a run begins with, if they are not drawn, and its data, normalised for them.

    Args:
        config: of the run; an automatic step size becomes that of the weights.
        data: what it trains on.
        world: this process and the others.
        resumes: whether the run goes on from a checkpoint of its own. It then keeps its normalisation, and the source
            of its first weights, which may be gone, is not looked at.
        log: gets lines about the weights, and one about a source that is not looked at.
    """
    run_dir, source = Path(config.run_dir), config.training.initialize_from
    load, statistics = None, None
    if resumes:
        if source is not None:
            shown = without_options(source)
            log(f"training.initialize_from = {shown} is not read: the run goes on from its own checkpoint")
        if isinstance(data.sample_format, LatentFormat):
            statistics = world.together(lambda: _stored_statistics(run_dir) if world.rank == 0 else None)[0]
    elif source is not None:
        initial = InitialWeights(config, data, world, log)
        load, statistics = initial.load, initial.statistics
        if config.mcmc.step_size == "auto" and initial.alpha is not None:
            config.mcmc.step_size = max(MIN_STEP_SIZE, initial.alpha)
    elif world.rank == 0 and (run_dir / RECORD_FILE).is_file():  # of a start that has left no checkpoint
        (run_dir / RECORD_FILE).unlink()
        (run_dir / STATISTICS_FILE).unlink(missing_ok=True)
    if statistics is not None and isinstance(data.sample_format, LatentFormat):
        data = data.normalised_with(statistics.mean, statistics.std)
    return load, data


def check_initial_weights(config: Config, data: Mixture | None) -> list[str]:
    """Check weights without loading them, for a dry run, and return lines about them.

    Args:
        config: with `training.initialize_from`. Of an address, the files that describe the run are fetched alone.
        data: of the run; None: they are not there yet, so that the weights are compared with the configuration alone.
    """
    name = str(config.training.initialize_from)
    if "://" not in name:
        source = _open(name)
        step = source.step
        check_fit(source, config, data)
        return [f"weights: of {source.name}, step {step}", *describe_changes(source, config)]
    with tempfile.TemporaryDirectory() as folder:
        fetch_description(name, Path(folder), (CONFIG_FILE, FORMAT_FILE, STATISTICS_FILE, JSON_FILE, MODEL_FILE))
        source = Run(folder)
        source.name = without_options(name)
        check_fit(source, config, data)
        return [f"weights: of {source.name}", *describe_changes(source, config)]


def _open(name: str | None) -> Run:
    try:
        return Run(str(name))
    except CheckpointError as error:
        raise CheckpointError(f"training.initialize_from: {error}") from None


def check_fit(source: Run, config: Config, data: Mixture | None) -> EmbeddingStatistics | None:
    """Return the statistics that a model of embeddings needs; refuse weights that do not fit, naming all reasons."""
    statistics, problems = None, list(_other_model(source, config))
    embeddings = config.model.embedding_dim is not None
    alike = embeddings == (source.config.model.embedding_dim is not None)
    if data is not None and alike and embeddings != isinstance(data.sample_format, TokenFormat):
        if embeddings:
            trained, (encoder, sha256) = source.statistics, _encoder(config, data)
            statistics = EmbeddingStatistics(encoder, sha256, trained.mean, trained.std)
            if trained.sha256 is not None and trained.sha256 != sha256:
                problems.append(
                    f"their encoder is {trained.encoder} (sha256 {trained.sha256[:12]}), that of {data.name} is "
                    f"{encoder} ({sha256[:12]})"
                )
        else:
            problems += _other_tokenizer(source, config, data)
    if problems:
        raise CheckpointError(
            f"training.initialize_from = {source.name}: its weights do not fit this run: {'; '.join(problems)}"
        )
    return statistics


def describe_changes(source: Run, config: Config) -> list[str]:
    """Return lines on what may be meant, but is not as it was when the weights were trained."""
    there, here, lines = source.config, config, []
    pairs = [("data.sequence_length", there.data.sequence_length, here.data.sequence_length)]
    if here.model.kind == "ebt":
        before, now = asdict(there.mcmc), asdict(here.mcmc)
        pairs += [(f"mcmc.{key}", before[key], now[key]) for key in now if key not in _OF_TRAINING]
    if here.model.kind == "dit" or here.mcmc.initial_state == "noised":
        before, now = asdict(there.noise), asdict(here.noise)
        pairs += [(f"noise.{key}", before[key], now[key]) for key in now]
    changed = [f"{key} was {before}, now it is {now}" for key, before, now in pairs if before != now]
    if changed:
        lines.append(f"not as these weights were trained: {'; '.join(changed)}")
    if source.sample_format["kind"] == "tokens" and "tokenizer_sha256" not in source.sample_format:
        lines.append("these weights come without a tokenizer: their token ids are taken to be those of the data")
    return lines


def _other_model(source: Run, config: Config) -> Iterator[str]:
    models = source.config.model, config.model
    there, here = ({**asdict(model), "block_shape": model.block_axes} for model in models)
    unused = _OF_ENERGIES if there["kind"] == here["kind"] != "ebt" else set()
    frames = None not in (there["embedding_dim"], here["embedding_dim"])
    if frames or config.training.initialize_vocabulary == "resize":
        unused = unused | {"vocab_size"}
    for key in here:
        if there[key] != here[key] and key not in unused:
            remedy = ""
            if key == "vocab_size":
                remedy = " (training.initialize_vocabulary=resize takes the rows that both have)"
            yield f"model.{key} is {there[key]} there and {here[key]} here{remedy}"


def _other_tokenizer(source: Run, config: Config, data: Mixture) -> Iterator[str]:
    """Compare the tokenizers; imported weights come without one."""
    assert isinstance(data.sample_format, TokenFormat)
    made, end = source.sample_format, data.sample_format.eos_id
    trained, found = made.get("tokenizer_sha256"), data.sample_format.tokenizer_sha256
    if trained is None:
        return
    if made["eos_id"] != end:
        yield f"their documents end with the token {made['eos_id']}, those of {data.name} with {end}"
    if trained == found:
        return
    differ = f"their tokenizer (sha256 {trained[:12]}) is not that of {data.name} ({found[:12]})"
    if config.training.initialize_vocabulary == "strict":
        yield f"{differ} (training.initialize_vocabulary=resize takes more or fewer tokens after the common ones)"
        return
    common = _common_ids(source, data)
    # An id that the file of one of them does not have, as that of an added pad token, never meant anything there.
    others = [number for number, (before, now) in enumerate(common) if before != now and before and now]
    if others:
        before, now = common[others[0]]
        first = f"the first is {others[0]}, {before!r} there and {now!r} here"
        mean = "1 id means another token" if len(others) == 1 else f"{len(others):,} ids mean other tokens"
        yield f"{differ}: {mean}, {first}"


def _common_ids(source: Run, data: Mixture) -> list[tuple[str, str]]:
    """Return what each id that both tokenizers have stands for there and here; nothing if weights come without one."""
    there, here = source.tokenizer, load_tokenizer(data.manifest)
    return [] if there is None else list(zip(there.pieces(), here.pieces(), strict=False))


def _unknown_tokens(source: Run, data: Mixture) -> list[int]:
    """Return the tokens of the data whose ids were no tokens when the weights were trained: that of added padding."""
    if not isinstance(data.sample_format, TokenFormat):
        return []
    return [number for number, (before, now) in enumerate(_common_ids(source, data)) if now and not before]


def _encoder(config: Config, data: Mixture) -> tuple[str, str]:
    """Return spec and hash of the encoder of the data."""
    sample_format = data.sample_format
    if isinstance(sample_format, LatentFormat):
        return sample_format.encoder, sample_format.encoder_sha256
    encoder = build_preprocessor(config, sample_format, torch.device("cpu")).encoder
    assert encoder is not None
    return encoder.spec, encoder.sha256


def _stored_statistics(run_dir: Path) -> EmbeddingStatistics | None:
    """Return the normalisation of latents that a run has had so far; None: that of its data."""
    if not (run_dir / RECORD_FILE).is_file():
        return None
    try:
        made = json.loads((run_dir / FORMAT_FILE).read_text("utf-8"))
        return EmbeddingStatistics(made["encoder"], made["encoder_sha256"], float(made["mean"]), float(made["std"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{run_dir / FORMAT_FILE} cannot be read ({error}): restore it from a copy") from None


def _hashes(source: Run) -> dict[str, str]:
    """Return the files that hold the weights, with their hashes."""
    folder = source.checkpoint
    if (folder / EXPORT_FILE).is_file():
        files: dict[str, str] = json.loads((folder / EXPORT_FILE).read_text("utf-8"))["files"]
        return {name: sha256 for name, sha256 in files.items() if name.endswith(".safetensors")}
    described = read_marker(folder)["files"]
    return {name: described[name]["sha256"] for name in weight_files(folder)}


def _rows(name: str, before: int, now: int) -> str:
    """Return in words what becomes of the rows of a matrix with a row for each token."""
    if before > now:
        return f"{name}: the rows {now} to {before - 1} of these weights are left out"
    return f"{name}: the rows {before} to {now - 1} are new, as in a fresh model"


def _unknown_rows(name: str, tokens: list[int]) -> str:
    """Return in words what becomes of rows whose ids were no tokens when the weights were trained."""
    which = f"row {tokens[0]} is" if len(tokens) == 1 else f"rows {', '.join(map(str, tokens))} are"
    return f"{name}: the {which} new, as in a fresh model: no token had that id when these weights were trained"
