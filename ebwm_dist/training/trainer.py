"""The training loop: from a configuration to a finished run, the same on one process and on many."""

from __future__ import annotations

import random
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ebwm_dist.checkpoint.run_lock import RunLock
from ebwm_dist.config.checks import check_world
from ebwm_dist.config.deepspeed import micro_steps
from ebwm_dist.config.loading import save_config
from ebwm_dist.config.schema import Config
from ebwm_dist.data.format.manifest import SPLITS
from ebwm_dist.data.format.sample_format import ClipFormat, TokenFormat
from ebwm_dist.data.loading.mixture import Mixture
from ebwm_dist.data.loading.stream import Batch, SampleStream, validation_batches
from ebwm_dist.data.tokenizer import load_tokenizer
from ebwm_dist.distributed import World, leave
from ebwm_dist.encoders.preprocessing import FramePreprocessor, build_preprocessor, check_format, embedding_statistics
from ebwm_dist.errors import PeerError, UserError, same_on_all_ranks
from ebwm_dist.evaluation.losses import accumulate
from ebwm_dist.mcmc.build import Model, build_model
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from ebwm_dist.mcmc.space import MIN_STEP_SIZE
from ebwm_dist.models.flops import peak_flops, training_flops_per_token
from ebwm_dist.models.output import Evaluation
from ebwm_dist.rendezvous import Place
from ebwm_dist.run import CONFIG_FILE, save_sample_format
from ebwm_dist.training.backend import set_collective_timeout, setup_distributed
from ebwm_dist.training.checkpointing import Checkpointer, TrainingState
from ebwm_dist.training.engine import create_engine
from ebwm_dist.training.metrics import Console, MetricsLog, SampleLog, train_line, val_line
from ebwm_dist.training.optimizer import set_lr
from ebwm_dist.training.shutdown import StopSignal
from ebwm_dist.training.step_statistics import StepStatistics, targets_per_rank
from ebwm_dist.training.wandb_log import WandbLog
from ebwm_dist.training.watchdog import Watchdog, heartbeat_store, is_communication_error

COLLECTIVE_MARGIN = 30.0
"""Seconds by which collectives outlast the watchdog."""


def train(config: Config, stop: StopSignal | None = None, tell: Callable[[str], None] | None = None) -> TrainingState:
    """Train until `training.max_steps`, `training.stop_after` or a stop signal; return the state then.

    `tell` is told why, before this process is ended for want of progress.
    """
    check_world(config, Place.of_environment().world_size)
    data = load_data(config)
    stop = stop or StopSignal()
    world = setup_distributed(config.training.startup_timeout, stop.poll)
    lock = RunLock(Path(config.run_dir))
    timeouts = config.training.startup_timeout, config.training.step_timeout
    watchdog = Watchdog(world, heartbeat_store(), *timeouts, tell, data.outage)
    failure = None
    try:
        world.together(lambda: lock.take() if world.rank == 0 else None)
        return Trainer(config, data, world, stop, watchdog, lock).run()
    except BaseException as error:
        failure = f"{type(error).__name__}: {error}"
        if is_communication_error(error):
            # A failed collective says nothing of who failed it, or when; the heartbeats do.
            raise PeerError(watchdog.explain(error)) from error
        raise
    finally:
        lock.release()
        watchdog.close(failure)
        stop.close()
        if failure is None:  # else the others may sit in a collective, which a clean end of NCCL would wait for
            leave()


class Trainer:
    """Holds the parts of a run together."""

    def __init__(
        self,
        config: Config,
        data: Mixture,
        world: World,
        stop: StopSignal,
        watchdog: Watchdog,
        lock: RunLock | None = None,
    ):
        self.config, self.data, self.manifest, self.world = config, data, data.manifest, world
        self.stop, self.watchdog, self.lock = stop, watchdog, lock
        self.run_dir = Path(config.run_dir)
        self.console = Console(self.run_dir / "logs" / f"rank_{world.rank:05d}.log", world.rank == 0)
        watchdog.beat(0, "loading")

        with same_on_all_ranks():
            self.stream = SampleStream(
                config.data,
                self.data,
                seed=config.seed,
                global_batch_size=config.training.global_batch_size,
                micro_batch_size=config.training.micro_batch_size,
                dp_rank=world.rank,
                dp_world_size=world.world_size,
            )
        self.checkpointer = Checkpointer(config, world)
        checkpoint = self.checkpointer.find(lambda text: self._say(f"WARNING: {text}", sys.stderr))
        if world.rank == 0:
            save_config(config, self.run_dir / CONFIG_FILE)
            save_sample_format(self.manifest, self.run_dir)

        self.unit = "token" if config.model.embedding_dim is None else "frame"
        self.preprocess = self._build_preprocessor()
        random.seed(config.seed)
        np.random.seed(config.seed % 2**32)
        sample_format = self.manifest.sample_format
        pad_id = sample_format.pad_id if isinstance(sample_format, TokenFormat) else None
        self.engine, self.optimizer = create_engine(config, lambda: build_model(config, pad_id), world)
        self.model = cast("Model", self.engine.module)
        if config.training.compile:
            self.model.compile_blocks()
        self.state = TrainingState()
        if checkpoint is not None:
            self.state, extra = self.checkpointer.load(
                self.engine,
                checkpoint,
                self.model.reshard_extra_state,
                self._say,
                lambda: watchdog.beat(0, "loading"),
            )
            self.model.load_extra_state(extra)
            with same_on_all_ranks():
                self.stream.load_state_dict(self.state.data)
            self._say(f"continuing from {checkpoint}")
        self.saved_step = self.state.step

        self.flops_per_token = training_flops_per_token(config.model, config.mcmc, config.data.sequence_length)
        name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"
        self.peak_flops = peak_flops(name) * world.world_size
        self.damage: set[str] = set()
        self.logs: list[MetricsLog | WandbLog] = []
        self.samples: SampleLog | None = None
        if world.rank == 0:
            if config.data.log_sample_ids:
                self.samples = SampleLog(self.run_dir, self.state.step)
            metrics = MetricsLog(self.run_dir, self.state.step)
            self.logs.append(metrics)
            if metrics.dropped:
                self._say(
                    f"training goes on from step {self.state.step}: {metrics.dropped} records of later steps "
                    f"are kept in {metrics.replaced}"
                )
            self.logs.append(WandbLog(config, self.run_dir, lambda text: self._say(f"WARNING: {text}", sys.stderr)))
        self.console.start_bar(config.training.max_steps, self.state.step)
        self._say(
            f"{config.model.kind} with {self.engine.num_parameters:,} parameters, {world.world_size} x {name}, "
            f"ZeRO {config.zero.stage}, {config.training.precision}; "
            f"{self.data.train_samples:,} training sequences of {config.data.sequence_length} {self.unit}s, "
            f"of which {self.stream.dropped_per_epoch} an epoch do not fill a batch"
        )
        if config.data.mixture:
            self._say(self.data.describe_shares(config.data.path))
        if config.warmup_steps < config.optimizer.warmup_steps:
            self._say(
                f"optimizer.warmup_steps = {config.optimizer.warmup_steps} is more than training.max_steps: "
                f"the warm-up takes {config.warmup_steps} steps, all of the run"
            )

    def run(self) -> TrainingState:
        """Run the remaining steps, with validation and checkpoints in between, and leave everything saved."""
        config, state, training = self.config, self.state, self.config.training
        last = training.last_step
        first = state.step
        stop = False
        try:
            if self._validation_due() and not self._validated(state.step):
                stop = self._validate()  # a kill or a stop came between a checkpoint and its validation
            while state.step < last and not stop:
                stop = self._train_step()
                if state.step == first + 1:
                    self.watchdog.first_step_done()
                    # Longer than the watchdog's, whose message says more than a failed collective's.
                    set_collective_timeout(training.step_timeout + COLLECTIVE_MARGIN)
                if state.step % config.checkpoint.interval == 0 or state.step == last or stop:
                    self._save()
                if self._validation_due() and not stop:
                    stop = self._validate()
                    if stop and self.saved_step != state.step:
                        self._save()
            self.checkpointer.finish(state.step, lambda: self.watchdog.beat(state.step, "upload"))
            if stop:
                self._say(f"asked to stop ({self.stop.reason or 'another rank'}): saved step {state.step}, leaving")
            elif first > last:
                limit = "max_steps" if training.stop_after is None else "stop_after"
                self._say(f"nothing to do: {self.run_dir} is at step {first}, past training.{limit} = {last}")
            elif state.step < training.max_steps:
                self._say(f"left after training.stop_after = {last} of {training.max_steps} steps, in {self.run_dir}")
            else:
                self._say(f"done: step {state.step} of {training.max_steps}, in {self.run_dir}")
        except BaseException:
            self.console.record(traceback.format_exc())
            raise
        finally:
            self.stream.close()
            self.checkpointer.close()
            self.console.close()
            for log in (*self.logs, *([self.samples] if self.samples else [])):
                log.close()
        return state

    def _train_step(self) -> bool:
        """Do one optimizer step and record it; return whether any rank was asked to stop."""
        config, state, engine = self.config, self.state, self.engine
        self._verify_lock()
        step = state.step + 1
        start, self.data_wait = time.perf_counter(), 0.0
        lr = set_lr(self.optimizer, config, step)
        step_size = self._step_size()
        seen = StepStatistics(self.world, config.model.num_landscapes)
        keys: list[str] = []
        batches, num_targets = self._micro_batches(step)
        for micro_step, batch in enumerate(batches):
            keys += batch.keys
            self.watchdog.beat(step, "forward/backward")
            plan: Any = self.model.plan(step, micro_step)
            output = self.model.training_step(
                self.preprocess.augment(batch.observed, batch.sample_ids, config.seed, config.data.min_crop_scale),
                batch.sample_ids,
                plan,
                num_targets=num_targets,
                forward=engine,
                backward=engine.backward,
            )
            seen.add(output, batch.skipped)
        self.watchdog.beat(step, "optimizer step")
        applied = engine.step()

        self.watchdog.beat(step, "waiting for all ranks")
        means, stop, nonfinite, damage = seen.gather(self.stop.poll() is not None)
        if config.data.log_sample_ids:
            ranks = self.world.gather_objects(keys)  # a rank's part of the global batch is contiguous
            if self.samples is not None:
                self.samples.write({"step": step, "samples": [key for rank in ranks for key in rank]})

        seconds = time.perf_counter() - start
        tokens_in_step = config.training.global_batch_size * config.data.sequence_length
        state.step = step
        state.tokens += tokens_in_step
        state.seconds += seconds
        state.skipped_samples += len(damage)
        state.data = self.stream.state_dict()
        refined = config.model.kind == "ebt"
        figures = {name: value if refined or name.startswith("loss") else None for name, value in means.items()}
        self._record(
            {
                "kind": "train",
                "step": step,
                **figures,
                "grad_norm": engine.gradient_norm(),
                "lr": lr,
                "mcmc_step_size": step_size,
                "tokens": state.tokens,
                "skipped_samples": state.skipped_samples,
                "tokens_per_second": tokens_in_step / seconds,
                "data_wait": self.data_wait / seconds,
                "peak_memory_bytes": self._peak_memory(),
                "mfu": self.flops_per_token * tokens_in_step / seconds / self.peak_flops if self.peak_flops else 0.0,
            }
        )
        if nonfinite is not None:
            self._say(f"WARNING: step {step} had energies or gradients not finite: {nonfinite}", sys.stderr)
        self._warn_of_damage(damage)
        self._count_skipped(applied)
        return stop

    def _micro_batches(self, step: int) -> tuple[Iterable[Batch], float | Tensor]:
        """Return this rank's micro-batches of a step, and the number of targets that its summed losses are divided by.

        Only text has padding, which has to be counted on all ranks before the first backward: so its micro-batches are
        read first. Those of video are large, and are read one after the other.
        """
        accumulation = micro_steps(self.config, self.world.world_size)

        def read() -> Iterator[Batch]:
            for _ in range(accumulation):
                self.watchdog.beat(step, "data")
                waited = time.perf_counter()
                batch = next(self.stream)
                self.data_wait += time.perf_counter() - waited
                yield batch

        if self.unit == "frame":
            return read(), accumulation * self.config.training.micro_batch_size * self.config.data.sequence_length
        batches = list(read())
        self.watchdog.beat(step, "forward/backward")
        count = sum(int(self.model.target_mask(batch.observed[:, 1:]).sum()) for batch in batches)
        return batches, targets_per_rank(count, self.world)

    def _warn_of_damage(self, damage: list[str]) -> None:
        """Say why samples were replaced, once for each damage."""
        for reason in dict.fromkeys(damage):
            if reason not in self.damage:
                self.damage.add(reason)
                self._say(f"WARNING: step {self.state.step} goes on without a damaged sample: {reason}", sys.stderr)

    def _count_skipped(self, applied: bool) -> None:
        """Keep count of steps that were left out because their gradient was not finite; stop after too many."""
        state, limit = self.state, self.config.training.max_nonfinite_steps
        state.skipped_in_a_row = 0 if applied else state.skipped_in_a_row + 1
        if applied:
            return
        state.skipped_steps += 1
        self._say(
            f"WARNING: step {state.step} skipped on all ranks: its gradient is not finite "
            f"({state.skipped_steps} skipped so far)",
            sys.stderr,
        )
        if state.skipped_in_a_row >= limit:
            error = UserError(
                f"{limit} steps in a row had a gradient that is not finite, the last one step {state.step}: lower "
                "optimizer.lr and start the same command again, or a new run_dir with a lower mcmc.step_size"
            )
            error.same_on_all_ranks = True
            raise error

    def _record(self, record: dict[str, Any]) -> None:
        """Write the record of a step everywhere, and its line to the console every `log_interval` steps."""
        for log in self.logs:
            log.write(record)
        self.console.advance()
        step, training = record["step"], self.config.training
        if step % training.log_interval == 0 or step in (1, training.max_steps):
            remaining = (training.max_steps - step) * self.state.seconds / step
            unit = "tok" if self.unit == "token" else "frames"
            self._say(train_line(record, training.max_steps, remaining, unit))

    def _validation_due(self) -> bool:
        step = self.state.step
        return step > 0 and (step % self.config.validation.interval == 0 or step == self.config.training.max_steps)

    def _validated(self, step: int) -> bool:
        done = bool(self.logs) and isinstance(self.logs[0], MetricsLog) and self.logs[0].has("val", step)
        return self.world.from_rank_0(done)

    def _validate(self) -> bool:
        """Evaluate the held-out split at the trained number of steps; no second-order graph is built.

        Return whether any rank was asked to stop meanwhile: the rest is then left out, and done by the next start.
        """
        config, step = self.config, self.state.step
        batches = validation_batches(
            self.data,
            batch_size=config.training.micro_batch_size,
            max_sequences=config.validation.max_sequences,
            dp_rank=self.world.rank,
            dp_world_size=self.world.world_size,
        )

        def proceed() -> bool:
            self.watchdog.beat(step, "validation")
            return not self.world.any_rank(self.stop.poll() is not None)

        def forward(observed: Tensor, sample_ids: Tensor, num_steps: int) -> Evaluation:
            return self.engine(self.model.evaluate, observed, sample_ids, num_steps)

        sums = accumulate(forward, batches, config.mcmc.max_mcmc_steps, self.preprocess, proceed)
        if sums is None:
            return True
        result = sums.over_ranks().result()
        record = {
            "kind": "val",
            "step": step,
            "loss": sum(result.step_losses) / len(result.step_losses),
            "loss_first_step": result.step_losses[0],
            "loss_last_step": result.step_losses[-1],
            "energy_first": result.energies[0] if result.energies else None,
            "energy_last": result.energies[-1] if result.energies else None,
            **(
                {"perplexity": result.perplexities[-1]} if result.copy_loss is None else {"copy_loss": result.copy_loss}
            ),
            "mcmc_step_size": self._step_size(),
            "tokens": self.state.tokens,
        }
        for log in self.logs:
            log.write(record)
        self._say(val_line(record))
        return False

    def _build_preprocessor(self) -> FramePreprocessor:
        """Return what shows batches to the model; the statistics of clips are the same on all ranks."""
        with same_on_all_ranks():
            preprocess = build_preprocessor(self.config, self.manifest.sample_format, self.world.device)
        if isinstance(self.manifest.sample_format, ClipFormat):
            self.watchdog.beat(0, "statistics of the embeddings")
            skip = self.config.data.on_error == "skip"
            found = embedding_statistics(preprocess, self.data, self.run_dir, skip) if self.world.rank == 0 else None
            preprocess.mean, preprocess.std = self.world.from_rank_0(found)
        return preprocess

    def _verify_lock(self) -> None:
        """End a run that was taken for dead, before it writes among what another one writes."""
        if self.lock is not None:
            self.lock.verify()

    def _save(self) -> None:
        self._verify_lock()
        self.watchdog.beat(self.state.step, "checkpoint")
        path = self.checkpointer.save(
            self.engine,
            self.state,
            lambda: self.watchdog.beat(self.state.step, "checkpoint"),
            self.model.extra_state(),
        )
        self.saved_step = self.state.step
        self._say(f"saved {path}")

    def _step_size(self) -> float | None:
        """Return alpha; under ZeRO-3 all ranks have to ask for it."""
        if not isinstance(self.model, EnergyBasedTransformer):
            return None
        return max(MIN_STEP_SIZE, self.engine.read(self.model.space.step_size.alpha).item())

    def _peak_memory(self) -> int:
        if self.world.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.world.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _say(self, text: str, stream: Any = None) -> None:
        self.console.line(text, stream)


def load_data(config: Config) -> Mixture:
    """Return the configured data sets, if they are there and fit each other and the configured model."""
    with same_on_all_ranks():
        data = Mixture.load(config.data)
        data.check_files(("val",) if config.data.on_error == "skip" else SPLITS)
        check_format(config, data.sample_format)
        for source in data.sources:
            if isinstance(source.manifest.sample_format, TokenFormat):
                load_tokenizer(source.manifest)
    return data
