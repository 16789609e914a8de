"""The training loop."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ebwm_dist.config.deepspeed import micro_steps
from ebwm_dist.config.launch import notes
from ebwm_dist.config.loading import save_config
from ebwm_dist.config.schema import Config
from ebwm_dist.data.format.sample_format import ClipFormat
from ebwm_dist.data.loading.mixture import Mixture
from ebwm_dist.data.loading.stream import Batch, SampleStream
from ebwm_dist.distributed import World
from ebwm_dist.encoders.preprocessing import FramePreprocessor, build_preprocessor, embedding_statistics
from ebwm_dist.errors import UserError, same_on_all_ranks
from ebwm_dist.mcmc.build import Model, build_model
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from ebwm_dist.mcmc.slices import Share
from ebwm_dist.mcmc.space import MIN_STEP_SIZE
from ebwm_dist.models.flops import peak_flops, training_flops_per_token
from ebwm_dist.run import CONFIG_FILE, save_sample_format
from ebwm_dist.training.attention import set_attention
from ebwm_dist.training.backend import set_collective_timeout
from ebwm_dist.training.checkpointing import Checkpointer, TrainingState
from ebwm_dist.training.initial_step_size import create_engine_with_step_size
from ebwm_dist.training.initial_weights import begin
from ebwm_dist.training.optimizer import set_lr
from ebwm_dist.training.profiling import Profile, step_ranges
from ebwm_dist.training.run_log import RunLog
from ebwm_dist.training.shutdown import StopSignal
from ebwm_dist.training.step_statistics import StepStatistics, targets_per_rank
from ebwm_dist.training.validation import validate
from ebwm_dist.training.watchdog import Watchdog

COLLECTIVE_MARGIN = 30.0
"""Seconds by which collectives outlast the watchdog."""


class Trainer:
    """The parts of a run, and its loop."""

    def __init__(
        self,
        config: Config,
        data: Mixture,
        world: World,
        stop: StopSignal,
        watchdog: Watchdog,
        verify_lock: Callable[[], None] = lambda: None,
    ):
        self.config, self.world = config, world
        self.stop, self.watchdog, self.verify_lock = stop, watchdog, verify_lock
        self.run_dir = Path(config.run_dir)
        self.share = Share(world.rank % config.training.position_parallel, config.training.position_parallel)
        self.log = RunLog(config, world)
        watchdog.beat(0, "loading")
        self.checkpointer = Checkpointer(config, world, lambda path: self.log.log(f"saved {path}"))
        watchdog.watch_save(self.checkpointer.activity)
        checkpoint = self.checkpointer.find(self.log.warn)
        load, self.data = begin(config, data, world, checkpoint is not None, self.log.log)
        with same_on_all_ranks():
            self.stream = SampleStream(
                config.data,
                self.data,
                seed=config.seed,
                global_batch_size=config.training.global_batch_size,
                micro_batch_size=config.training.micro_batch_size,
                dp_rank=world.rank // self.share.count,
                dp_world_size=world.world_size // self.share.count,
            )
        self.preprocess = self._build_preprocessor()
        self._build_model(load, checkpoint)
        if world.rank == 0:
            save_config(config, self.run_dir / CONFIG_FILE)
            save_sample_format(self.data.manifest, self.run_dir, data.target_share)
        self.state = TrainingState()
        if checkpoint is not None:
            self._load(checkpoint)
        self.saved_step = self.state.step
        self.damage: set[str] = set()
        """Reasons of damage that were warned of."""
        self.log.open(self.state.step)
        self._describe()

    def _build_preprocessor(self) -> FramePreprocessor:
        """Return the preprocessor of batches; for clips, with the same statistics of embeddings on all ranks."""
        with same_on_all_ranks():
            preprocessor = build_preprocessor(self.config, self.data.sample_format, self.world.device)
        if isinstance(self.data.sample_format, ClipFormat):
            self.watchdog.beat(0, "statistics of the embeddings")
            skip, alone = self.config.data.on_error == "skip", self.world.rank == 0
            found = embedding_statistics(preprocessor, self.data, self.run_dir, skip) if alone else None
            preprocessor.mean, preprocessor.std = self.world.from_rank_0(found)
        return preprocessor

    def _build_model(self, load: Callable[[nn.Module], None] | None, checkpoint: Path | None) -> None:
        config, log = self.config, self.log.log
        build = partial(build_model, config, getattr(self.data.sample_format, "pad_id", None))
        shared = self.data, self.preprocess, self.world
        self.engine, self.optimizer = create_engine_with_step_size(config, build, *shared, load, checkpoint, log)
        self.model = cast("Model", self.engine.module)
        if isinstance(self.model, EnergyBasedTransformer):
            self.model.share_positions(self.share, partial(self.world.agree, self.share.count))
        with same_on_all_ranks():
            self.attention = set_attention(config, self.model, self.world.device)
        if config.training.compile:
            self.model.compile_blocks()

    def _load(self, checkpoint: Path) -> None:
        progress = partial(self.watchdog.beat, 0, "loading")
        self.state, extra = self.checkpointer.load(
            self.engine, checkpoint, self.model.reshard_extra_state, self.log.log, progress
        )
        self.model.load_extra_state(extra)
        with same_on_all_ranks():
            self.stream.load_state_dict(self.state.data)
        self.log.log(f"continuing from {checkpoint}")

    def _describe(self) -> None:
        """Log what is trained on what, and note the FLOPs that the devices could do."""
        config, device = self.config, self.world.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        peak = peak_flops(name)
        self.peak_flops = None if peak is None else peak * self.world.world_size
        length, share = config.data.sequence_length, self.data.target_share
        self.flops_per_token = training_flops_per_token(config.model, config.mcmc, length, share)
        unit = config.model.unit
        shared = f"{self.share.count} of them on the positions of a sequence, " if self.share.count > 1 else ""
        self.log.log(
            f"{config.model.kind} with {self.engine.num_parameters:,} parameters, {self.world.world_size} x {name}, "
            f"{shared}ZeRO {config.zero.stage}, {config.training.precision}; "
            f"{self.data.train_samples:,} training sequences of {config.data.sequence_length} {unit}s, "
            f"of which {self.stream.dropped_per_epoch} an epoch do not fill a batch"
        )
        if self.attention is not None:
            self.log.log(self.attention)
        if config.data.mixture:
            self.log.log(self.data.describe_shares(config.data.path))
        for line in notes(config):
            self.log.log(line)

    def run(self) -> TrainingState:
        """Run the remaining steps, with validation and checkpoints in between, and leave everything saved."""
        state, training = self.state, self.config.training
        first, last = state.step, training.last_step
        ranges = [(self, "_next_batch", "data"), *step_ranges(self.config, self.engine, self.preprocess)]

        def writing() -> None:
            self.watchdog.beat(state.step, "profile")

        profile = Profile(self.config, self.world, first + 1, ranges, self.log.log, writing)
        try:
            stop = self._validation_due() and not self.log.has_validation(first) and self._validate()
            while state.step < last and not stop:
                with profile.step(state.step + 1):
                    stop = self._train_step()
                if state.step == first + 1:
                    self.watchdog.first_step_done()
                    # Longer than the watchdog's, whose message says more than a failed collective's.
                    set_collective_timeout(training.step_timeout + COLLECTIVE_MARGIN)
                self.checkpointer.poll()
                if state.step % self.config.checkpoint.interval == 0 or state.step == last or stop:
                    self._save()
                if self._validation_due() and not stop:
                    stop = self._validate()
                    if stop and self.saved_step != state.step:
                        self._save()
            self.checkpointer.finish(state.step, partial(self.watchdog.beat, state.step, "checkpoint"))
            self.log.log(self._outcome(first, stop))
        except BaseException as error:
            self.log.failure()
            if isinstance(error, Exception):
                self.checkpointer.settle(partial(self.watchdog.beat, state.step, "checkpoint"), self.log.warn)
            else:  # a second Ctrl-C ends the run at once; torch may not be left writing as the interpreter ends
                self.checkpointer.abandon()
            raise
        finally:
            profile.close()
            self.stream.close()
            self.checkpointer.close()
            self.log.close()
        return state

    def _outcome(self, first: int, stop: bool) -> str:
        step, training = self.state.step, self.config.training
        if stop:
            return f"asked to stop ({self.stop.reason or 'another rank'}): saved step {step}, leaving"
        if first > training.last_step:
            limit = "max_steps" if training.stop_after is None else "stop_after"
            return f"nothing to do: {self.run_dir} is at step {first}, past training.{limit} = {training.last_step}"
        if step < training.max_steps:
            return f"left after training.stop_after = {step} of {training.max_steps} steps, in {self.run_dir}"
        return f"done: step {step} of {training.max_steps}, in {self.run_dir}"

    def _train_step(self) -> bool:
        """Do one optimizer step and record it; return whether any rank was asked to stop."""
        config, state, engine = self.config, self.state, self.engine
        self.verify_lock()
        step = state.step + 1
        start, self.data_wait = time.perf_counter(), 0.0
        lr, step_size = set_lr(self.optimizer, config, step), self._step_size()
        statistics = StepStatistics(self.world, config.model.num_landscapes)
        keys: list[str] = []
        counts = self.share.number == 0  # the ranks that share its positions have the same samples
        batches, num_targets = self._micro_batches(step)
        for micro_step, batch in enumerate(batches):
            keys += batch.keys if counts else []
            self.watchdog.beat(step, "forward/backward")
            plan: Any = self.model.plan(step, micro_step)
            output = self.model.training_step(
                self.preprocess.augment(batch, config.seed, config.data),
                batch.sample_ids,
                plan,
                targets=batch.targets,
                num_targets=num_targets,
                forward=engine,
                backward=engine.backward,
            )
            statistics.add(output, batch.damaged if counts else ())
        self.watchdog.beat(step, "optimizer step")
        applied = engine.step()
        self.watchdog.beat(step, "waiting for all ranks")
        means, stop, nonfinite, damage = statistics.gather(self.stop.poll() is not None)
        self.log.samples(step, keys)

        seconds = time.perf_counter() - start
        tokens = config.training.global_batch_size * config.data.sequence_length
        state.step = step
        state.tokens += tokens
        state.seconds += seconds
        state.skipped_samples += len(damage)
        state.data = self.stream.state_dict()
        refined = config.model.kind == "ebt"
        record = {
            "kind": "train",
            "step": step,
            **{name: value if refined or name.startswith("loss") else None for name, value in means.items()},
            "grad_norm": engine.gradient_norm(),
            "lr": lr,
            "mcmc_step_size": step_size,
            "tokens": state.tokens,
            "skipped_samples": state.skipped_samples,
            "tokens_per_second": tokens / seconds,
            "data_wait": self.data_wait / seconds,
            "peak_memory_bytes": self._peak_memory(),
            "mfu": self.peak_flops and self.flops_per_token * tokens / seconds / self.peak_flops,
        }
        self.log.train(record, state.seconds)
        self._warn(applied, nonfinite, damage)
        return stop

    def _micro_batches(self, step: int) -> tuple[Iterable[Batch], float | Tensor]:
        """Return this rank's micro-batches of a step, and the number of targets that its summed losses are divided by.

        Only text has padding and context without a loss. Its targets have to be counted on all ranks before the first
        backward, so its micro-batches are read first. Those of video are large, and are read one after the other.
        """
        accumulation = micro_steps(self.config, self.world.world_size)

        def read() -> Iterator[Batch]:
            for _ in range(accumulation):
                self.watchdog.beat(step, "data")
                waited = time.perf_counter()
                batch = self._next_batch()
                self.data_wait += time.perf_counter() - waited
                yield batch

        if self.config.model.embedding_dim is not None:
            positions = self.config.training.micro_batch_size * self.config.data.sequence_length
            return read(), accumulation * positions / self.share.count
        batches = list(read())
        self.watchdog.beat(step, "forward/backward")
        targets = (self.model.layout.targets(batch.observed, batch.targets) for batch in batches)
        count = sum(int(self.model.target_mask(own).sum()) for own in targets)
        return batches, targets_per_rank(count, self.world, self.share.count)

    def _next_batch(self) -> Batch:
        return next(self.stream)

    def _warn(self, applied: bool, nonfinite: str | None, damage: list[str]) -> None:
        """Warn of what went wrong in a step, of damaged data once; end the run after too many skipped steps."""
        state, limit = self.state, self.config.training.max_nonfinite_steps
        if nonfinite is not None:
            self.log.warn(f"step {state.step} had energies or gradients not finite: {nonfinite}")
        for reason in dict.fromkeys(damage):
            if reason not in self.damage:
                self.damage.add(reason)
                self.log.warn(f"step {state.step} goes on without a damaged sample: {reason}")
        if applied:
            state.skipped_in_a_row = 0
            return
        state.skipped_in_a_row += 1
        state.skipped_steps += 1
        self.log.warn(
            f"step {state.step} skipped on all ranks: its gradient is not finite ({state.skipped_steps} skipped so far)"
        )
        if state.skipped_in_a_row >= limit:
            with same_on_all_ranks():
                raise UserError(
                    f"{limit} steps in a row had a gradient that is not finite, the last one step {state.step}: lower "
                    "optimizer.lr and start the same command again, or a new run_dir with a lower mcmc.step_size"
                )

    def _validation_due(self) -> bool:
        step = self.state.step
        return step > 0 and (step % self.config.validation.interval == 0 or step == self.config.training.max_steps)

    def _validate(self) -> bool:
        """Validate and log it; return whether any rank was asked to stop meanwhile: the next start does all of it."""
        step = self.state.step

        def proceed() -> bool:
            self.watchdog.beat(step, "validation")
            return not self.world.any_rank(self.stop.poll() is not None)

        figures = validate(self.engine, self.config, self.data, self.preprocess, self.world, proceed)
        if figures is None:
            return True
        record = {"kind": "val", "step": step, **figures, "mcmc_step_size": self._step_size()}
        self.log.validation({**record, "tokens": self.state.tokens})
        return False

    def _save(self) -> None:
        self.verify_lock()
        state = self.state
        progress = partial(self.watchdog.beat, state.step, "checkpoint")
        progress()
        self.checkpointer.begin(self.engine, state, progress, self.model.extra_state())
        self.saved_step = state.step

    def _step_size(self) -> float | None:
        """Return alpha; under ZeRO-3 all ranks have to ask for it."""
        if not isinstance(self.model, EnergyBasedTransformer):
            return None
        return max(MIN_STEP_SIZE, self.engine.read(self.model.space.step_size.alpha).item())

    def _peak_memory(self) -> int:
        if self.world.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.world.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
