"""A trained run, opened from a path or an address: its configuration, checkpoint, model, tokenizer, data and records.

Everything is read when it is first used, and only files that are read are hashed. Opening a run imports OmegaConf
alone; its model adds torch (and safetensors, for an export), its tokenizer the library of its kind, its data the rest.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebwm_dist.checkpoint.folder import MARKER, newest_intact, read_marker
from ebwm_dist.config.launch import check_libraries
from ebwm_dist.config.loading import load_config
from ebwm_dist.config.schema import Config
from ebwm_dist.errors import CheckpointError, DataError
from ebwm_dist.files import METRICS_FILE, Record, printable, read_records, sha256_of_file, write_atomically, write_json
from ebwm_dist.storage import without_options

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ebwm_dist.data.format.manifest import Manifest
    from ebwm_dist.data.loading.mixture import Mixture
    from ebwm_dist.data.loading.stream import Batch
    from ebwm_dist.data.tokenizer import Tokenizer
    from ebwm_dist.encoders import Encoder
    from ebwm_dist.encoders.preprocessing import EmbeddingStatistics, FramePreprocessor
    from ebwm_dist.mcmc.build import Model

CONFIG_FILE, FORMAT_FILE, EXPORT_FILE = "config.yaml", "inputs.json", "export.json"
EXPORT_FORMAT, EXPORT_VERSION = "ebwm-export", 1


class Run:
    """A run folder, one of its checkpoints, or an export, of this machine or in object storage.

    Args:
        path: the folder, or an address of s3://, gs:// or file://.
        device: where its model and its data are put.

    Raises:
        CheckpointError: `path` is none of them, or is damaged; what is read later raises it later.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        self.name, self.device = without_options(str(path)), device
        self.remote = "://" in str(path)
        if printable(path) != str(path):
            raise CheckpointError(f"{printable(path)} is not valid UTF-8, which torch cannot open: rename the folder")
        given = Path(path)
        if self.remote:
            from ebwm_dist.checkpoint.fetching import fetch

            given = fetch(str(path), EXPORT_FILE, _warn)
        self._export = read_export(given) if (given / EXPORT_FILE).is_file() else None
        self._checkpoint = given if (given / MARKER).is_file() else None
        self.folder = given if self._checkpoint is None else given.resolve().parents[1]
        """The run folder or export."""
        if not (self.folder / CONFIG_FILE).is_file():
            found = "does not exist" if not given.exists() else "is neither a run folder nor a checkpoint nor an export"
            raise CheckpointError(
                f"{path} {found}: name a folder that launchers/train.py, export.py or import_weights.py has written"
            )

    @property
    def is_folder(self) -> bool:
        """Whether a whole run folder was named, which may get further checkpoints."""
        return self._export is None and self._checkpoint is None

    @cached_property
    def config(self) -> Config:
        """The configuration it was trained with."""
        return load_config(self.folder / CONFIG_FILE, stored=True)

    @cached_property
    def checkpoint(self) -> Path:
        """The checkpoint that was named, or the newest one whose weights are intact; an export is its own."""
        from ebwm_dist.checkpoint.zero_files import verify_weights

        if self._export is not None:
            return self.folder
        if self._checkpoint is not None:
            verify_weights(self._checkpoint)
            return self._checkpoint
        found = newest_intact(self.folder / "checkpoints", _warn, verify_weights)
        if found is None:
            raise CheckpointError(f"{self.name} holds no checkpoint: train it first with launchers/train.py")
        return found

    @property
    def source(self) -> str:
        """How records name it: the checkpoint or export, or the address that was given."""
        return self.name if self.remote else str(self.checkpoint)

    @cached_property
    def step(self) -> int:
        """Optimizer steps the model was trained for."""
        return int((self._export or read_marker(self.checkpoint))["step"])

    @property
    def trained_steps(self) -> int:
        """MCMC steps that training takes at most; 1 of an autoregressive model."""
        return self.config.mcmc.max_mcmc_steps if self.config.model.kind == "ebt" else 1

    @cached_property
    def sample_format(self) -> dict[str, Any]:
        """The description of a training sample: `kind` and the fields of that kind in `data/format/sample_format.py`.

        Imported weights have only some of them.
        """
        file = self.folder / FORMAT_FILE
        try:
            return dict(json.loads(file.read_text("utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}): restore it from a copy") from None

    @property
    def pad_id(self) -> int | None:
        """The token that does not count as a target; None without tokens."""
        return self.sample_format.get("pad_id")

    @property
    def tokenizer_file(self) -> Path | None:
        """Where its tokenizer is; None for a model of embeddings, or of token ids alone."""
        name = self.sample_format.get("tokenizer")
        return None if name is None else self.folder / Path(name).name

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of its text; None for a model of embeddings, or of token ids alone."""
        if (file := self.tokenizer_file) is None:
            return None
        if not file.is_file():
            raise CheckpointError(f"{self.folder} has no {file.name}, which its model was trained with: restore it")
        if (found := sha256_of_file(file)) != (expected := self.sample_format.get("tokenizer_sha256", "")):
            raise CheckpointError(
                f"{file} is not the tokenizer that the model was trained with (sha256 {found[:12]}, {FORMAT_FILE} says "
                f"{expected[:12]}): restore it"
            )
        from ebwm_dist.data.tokenizer import SpecialTokens, reopen_tokenizer

        return reopen_tokenizer(file, SpecialTokens.of(self.sample_format))

    def weights(self) -> Mapping[str, Tensor]:
        """Return the weights as they are saved, on the CPU."""
        if self._export is not None:
            return _exported_weights(self.folder, self._export["files"])
        from ebwm_dist.checkpoint.zero_files import load_module_state

        for key, saved in read_marker(self.checkpoint)["metadata"]["model"].items():
            now = getattr(self.config.model, key, None)
            if now != saved:
                raise CheckpointError(
                    f"{self.checkpoint} has model.{key} = {saved}, {self.folder / CONFIG_FILE} has {now}"
                )
        return load_module_state(self.checkpoint)

    @cached_property
    def model(self) -> Model:
        """The trained model in float32."""
        import torch

        from ebwm_dist.mcmc.build import build_model

        check_libraries(self.config)
        with torch.device("meta"):
            model = build_model(self.config, self.pad_id)
        state = self.weights()
        check_weights(model, state, str(self.checkpoint))
        state = {name: tensor.to(self.device, torch.float32) for name, tensor in state.items()}
        model.load_state_dict(state, assign=True)
        return model.eval()

    @cached_property
    def records(self) -> list[Record]:
        """The records of metrics.jsonl up to the step of the model; an export has none."""
        return [record for record in read_records(self.folder / METRICS_FILE) if record["step"] <= self.step]

    def validation_data(self, source: str | Mixture | None = None) -> ValidationData:
        """Return held-out data, normalised with the mean and standard deviation of the run's own training data.

        Args:
            source: a folder or its address, or data that are open; None: the data that it was trained on.

        Raises:
            DataError: the model cannot be used on them, as they were made with another tokenizer or encoder.
        """
        import torch

        from ebwm_dist.data.loading.mixture import Mixture
        from ebwm_dist.encoders.preprocessing import build_preprocessor, check_format

        data = self.config.data
        if isinstance(source, str):
            data = replace(data, path=source, mixture={})
        mixture = source if isinstance(source, Mixture) else Mixture.load(data)
        config = replace(self.config, data=replace(data, path=mixture.name, mixture={}))
        check_format(config, mixture.sample_format)
        preprocess = build_preprocessor(config, mixture.sample_format, torch.device(self.device))
        self._check_made_alike(mixture, preprocess.encoder)
        if self.config.model.embedding_dim is not None:
            preprocess.mean, preprocess.std = self.statistics.mean, self.statistics.std
            mixture = mixture.normalised_with(preprocess.mean, preprocess.std)
        return ValidationData(mixture, preprocess)

    @cached_property
    def statistics(self) -> EmbeddingStatistics:
        """The statistics of the embeddings that it was trained on."""
        from ebwm_dist.encoders.preprocessing import STATISTICS_FILE, EmbeddingStatistics, read_statistics

        made = self.sample_format
        if made["kind"] == "clips":
            return read_statistics(self.folder / STATISTICS_FILE)
        return EmbeddingStatistics(made.get("encoder"), made.get("encoder_sha256"), made["mean"], made["std"])

    def _check_made_alike(self, mixture: Mixture, encoder: Encoder | None) -> None:
        """Refuse data made with another tokenizer or encoder; the width of either may well be the same."""
        if mixture.sample_format.kind == "clips":
            assert encoder is not None
            self.statistics.check(encoder, self.folder)
            return
        content = asdict(mixture.sample_format)
        if mixture.sample_format.kind == "latents":
            maker, trained = "encoder", self.statistics.sha256
        else:
            maker, trained = "tokenizer", self.sample_format.get("tokenizer_sha256")
        found = content[f"{maker}_sha256"]
        if trained is not None and found != trained:
            raise DataError(
                f"the {maker} of {self.name} is not the one that the shards in {mixture.name} were made with (sha256 "
                f"{trained[:12]}, theirs is {found[:12]}): name data that were made with it"
            )
        if content.get("pad_id") != self.pad_id:
            raise DataError(
                f"the shards in {mixture.name} have the pad token {content['pad_id']}, {self.name} was trained with "
                f"{self.pad_id}: name data that were made with its tokenizer"
            )


@dataclass(frozen=True)
class ValidationData:
    """Held-out data, and the preprocessing that shows them to a model as its training data were shown.

    Of a mixture these are the held-out splits of its data sets one after the other, each with its share by weight: the
    samples on which training validates.
    """

    mixture: Mixture
    preprocess: FramePreprocessor

    def batches(self, batch_size: int, max_sequences: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Yield this rank's batches of at most `max_sequences` samples, always the same ones."""
        from ebwm_dist.data.loading.stream import validation_batches

        return validation_batches(
            self.mixture,
            batch_size=batch_size,
            max_sequences=max_sequences,
            dp_rank=rank,
            dp_world_size=world_size,
        )

    def counts(self, max_sequences: int) -> list[int]:
        """Return how many samples of each data set the batches hold."""
        counts = Counter(self.mixture.held_out(max_sequences)[1][0].tolist())
        return [counts[number] for number in range(len(self.mixture.sources))]

    def tokens_per_byte(self, max_sequences: int) -> float | None:
        """Return the tokens of a byte of text among the samples that the batches hold; None without text."""
        tokens = size = 0.0
        for source, count in zip(self.mixture.sources, self.counts(max_sequences), strict=True):
            split = source.manifest.val
            tokens += split.totals.get("tokens", 0) * count / max(split.samples, 1)
            size += split.totals.get("text_bytes", 0) * count / max(split.samples, 1)
        return tokens / size if size else None

    @property
    def samples(self) -> int:
        """Return the number of held-out samples in all data sets."""
        return sum(source.manifest.val.samples for source in self.mixture.sources)


def save_sample_format(manifest: Manifest, folder: Path, target_share: float = 1.0) -> None:
    """Write a description of samples and of how many positions are targets into `folder`, and a copy of a tokenizer."""
    from ebwm_dist.data.format.sample_format import describe_format

    described = describe_format(manifest.sample_format)
    if "tokenizer" in described:
        write_atomically(folder / Path(described["tokenizer"]).name, manifest.read_tokenizer())
    write_json(folder / FORMAT_FILE, described | ({"target_share": target_share} if target_share < 1 else {}))


def check_weights(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights that are not exactly those of `model`, naming all that differ in one line."""
    expected = model.state_dict()
    problems = []
    for problem, names in (("missing", expected.keys() - state.keys()), ("unknown", state.keys() - expected.keys())):
        if names:
            problems.append(f"{problem} {', '.join(sorted(names))}")
    for name in sorted(expected.keys() & state.keys()):
        if state[name].shape != expected[name].shape:
            problems.append(f"{name} is {list(state[name].shape)} instead of {list(expected[name].shape)}")
    if problems:
        raise CheckpointError(f"{where} does not hold the configured model: {'; '.join(problems)}")


def read_export(folder: Path) -> dict[str, Any]:
    """Return the content of `export.json` once all files are found to be those that were exported."""
    file = folder / EXPORT_FILE
    try:
        record = json.loads(file.read_text("utf-8"))
        known = record["format"] == EXPORT_FORMAT
        version, files = record["version"], dict(record["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): export again") from None
    if not known or version != EXPORT_VERSION:
        raise CheckpointError(f"{file} is of version {version}, this program reads {EXPORT_VERSION}: export again")
    for name, sha256 in files.items():
        if Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(f"{folder} has no file {name!r}, which {EXPORT_FILE} lists: export again")
        if sha256_of_file(folder / name) != sha256:
            raise CheckpointError(f"{folder / name} has changed since it was exported: export again")
    return record


def _exported_weights(folder: Path, files: Mapping[str, str]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state: dict[str, Tensor] = {}
    for name in files:
        if name.endswith(".safetensors"):
            try:
                state |= load_file(folder / name)
            except SafetensorError as error:
                raise CheckpointError(f"{folder / name} is not a file of weights ({error}): export again") from None
    return state


def _warn(text: str) -> None:
    print(f"WARNING: {text}", file=sys.stderr)
