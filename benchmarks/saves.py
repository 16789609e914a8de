"""How long a save keeps the training waiting: beside the training against between two steps, in one run.

python -m benchmarks.saves
python -m benchmarks.saves --json --layers 2 --width 64 --vocab 500

One process trains an energy-based transformer on random tokens through the engine and saves it `--saves` times each
way, in turn. `blocked` is the time from the end of a step until the next may begin. A save beside the training is given
steps until it is committed, as it is where checkpoints lie far apart; `steps_while_writing` tells how many these were,
and `step_while_writing` how long one took. The first copy is listed by itself: its memory is new.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ebwm_dist.config.schema import Config, DataConfig, ModelConfig, TrainingConfig, ZeroConfig
from ebwm_dist.mcmc.build import build_model
from ebwm_dist.training.backend import setup_distributed
from ebwm_dist.training.checkpointing import Checkpointer, TrainingState
from ebwm_dist.training.engine import create_engine

Record = dict[str, Any]
WAYS = ("between steps", "beside the training")


def settings(args: argparse.Namespace, run_dir: Path) -> Config:
    """Return the configuration of the run."""
    return Config(
        run_dir=str(run_dir),
        model=ModelConfig(vocab_size=args.vocab, dim=args.width, num_layers=args.layers, num_heads=args.width // 32),
        training=TrainingConfig(global_batch_size=1, micro_batch_size=1, precision=args.precision),
        data=DataConfig(sequence_length=args.seq_len),
        zero=ZeroConfig(args.stage),
    )


def measure(args: argparse.Namespace, run_dir: Path) -> Record:
    """Train and save; return the seconds and their ratio."""
    config, world = settings(args, run_dir), setup_distributed(600)
    engine, _ = create_engine(config, lambda: build_model(config, pad_id=0), world)
    model: Any = engine.module
    generator = torch.Generator().manual_seed(0)
    checkpointer, step = Checkpointer(config, world), 0

    def train() -> float:
        nonlocal step
        step += 1
        tokens = torch.randint(1, args.vocab, (1, args.seq_len + 1), generator=generator).to(world.device)
        start = time.perf_counter()
        plan = model.plan(step, 0)
        model.training_step(tokens, torch.tensor([step]), plan, forward=engine, backward=engine.backward)
        engine.step()
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    train()
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    alone = [train() for _ in range(2)]
    beside: list[float] = []
    for _ in range(args.saves + 1):  # the first one of each is for the memory and the files to be there
        for way in WAYS:
            config.checkpoint.asynchronous = way == WAYS[1]
            train()
            start = time.perf_counter()
            checkpointer.begin(engine, TrainingState(step=step))
            seconds[way].append(time.perf_counter() - start)
            while checkpointer.activity() is not None:
                beside.append(train())
            checkpointer.wait(lambda: None)
    size = sum(file.stat().st_size for file in next(checkpointer.root.glob("step-*")).iterdir())
    blocked = {way: statistics.median(times[1:]) for way, times in seconds.items()}
    return {
        "parameters": engine.num_parameters,
        "device": str(world.device),
        "zero_stage": args.stage,
        "checkpoint_bytes": size,
        "blocked": blocked,
        "first_copy": seconds[WAYS[1]][0],
        "step": statistics.median(alone),
        "step_while_writing": statistics.median(beside) if beside else None,
        "steps_while_writing": len(beside),
        "ratio": blocked[WAYS[1]] / blocked[WAYS[0]],
    }


def main() -> int:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--seq-len", type=int, default=16)
    parser.add_argument("--stage", type=int, default=1, help="of ZeRO")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--saves", type=int, default=2, help="of each kind, after the first")
    parser.add_argument("--folder", help="where to save; on the disk to measure")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    args = parser.parse_args()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        record = measure(args, folder)
    finally:
        shutil.rmtree(folder)
    if args.json:
        print(json.dumps(record))
        return 0
    size = f"{record['checkpoint_bytes'] / 1e6:,.0f} MB"
    print(f"{record['parameters']:,} parameters, ZeRO {args.stage}: {size} a checkpoint")
    for way, value in record["blocked"].items():
        print(f"{way}: {value:.3f} s a save")
    print(f"ratio: {record['ratio']:.3f} (first copy: {record['first_copy']:.3f} s)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
