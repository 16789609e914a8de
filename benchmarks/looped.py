"""Is it the energy, or the iteration? Twins of the pointer task, some of which iterate without an energy.

    python -m benchmarks.looped --kind candidate --seed 0 --save

Trains on the documents, curriculum and schedule of `configs/reasoning.yaml`, made as they are needed:

- `ebt`: the model of that configuration;
- `ar`: an autoregressive twin of `--layers` layers; with `--equal-flops` it takes as many optimizer steps, with
  curriculum and schedule stretched, as make its training FLOPs those of `ebt`, and with `--no-lessons` it trains on all
  4 hops from the start;
- `candidate`: its weights and passes, where the output of the blocks takes the place of -dE/de: the prediction is fed
  back, there is no energy and no second order;
- `whole`: a looped transformer: the whole sequence goes through the same block in every step, embeddings added again;
- `steps`: an autoregressive model that writes its steps out, every node on the way being a token of its answer.

Prints accuracy by hops after every number of steps, and where a model stops by itself, on documents with one query;
`--save` appends them to benchmarks/results/looped.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_tools.tasks import graphs, letters, pointers, sudoku
from ebwm_dist.config.loading import load_config
from ebwm_dist.config.schema import Config
from ebwm_dist.mcmc.build import build_model
from ebwm_dist.mcmc.schedule import plan_at
from ebwm_dist.models.flops import training_flops_per_token
from ebwm_dist.training.optimizer import build_optimizer, set_lr

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "looped.jsonl"
PAD, END, MAX_HOPS, TEST_STEPS, TEST_DOCUMENTS, TOLERANCE = 0, 3, 4, 32, 1000, 0.1


@dataclass(frozen=True)
class Task:
    """Documents whose difficulty can be chosen."""

    document: Callable[..., dict[str, Any]]
    hardest: int
    training: Callable[[int], dict[str, int]] = lambda hardest: {}
    """From the largest difficulty of a lesson to further arguments of its documents."""
    held_out: dict[str, int] = field(default_factory=dict)
    """Further arguments of documents to test on."""

    @cached_property
    def tokens(self) -> dict[str, int]:
        """Return the number of every word."""
        documents = [self.document(random.Random(f"words {number}"), 1, self.hardest) for number in range(4000)]
        words = {word for one in documents for text in one["prompt"] + one["completion"] for word in text.split()}
        return {word: 4 + number for number, word in enumerate(sorted(words))}


TASKS = {
    "pointers": Task(
        pointers.document,
        pointers.MOST_HOPS,
        lambda hops: {"deepest": hops} if hops < MAX_HOPS else {},
        {"queries": 1},
    ),
    "letters": Task(letters.document, letters.LONGEST),
    "graphs": Task(graphs.document, graphs.FARTHEST, held_out={"queries": 1}),
    "sudoku": Task(sudoku.document, sudoku.MOST_BLANKS),
}


class LoopedCandidate(nn.Module):
    """The parts of an EBT; the output of its blocks takes the place of -dE/de."""

    def __init__(self, config: Config):
        super().__init__()
        ebt: Any = build_model(config, PAD)
        self.space, self.transformer, self.context_stream = ebt.space, ebt.transformer, ebt.context_stream

    def chain(self, context: Tensor, steps: int) -> list[Tensor]:
        """Return the logits [B, S, V] after every step."""
        keys_values, weight = self.context_stream(context, 0), self.space.vocab_to_embed.weight
        logits = torch.zeros(*context.shape, len(weight)).scatter_(-1, context[..., None], 10.0)
        states = []
        for _ in range(steps):
            p = logits.softmax(-1)
            x = p @ weight
            positions = torch.arange(1, 1 + x.shape[1])
            rotary = self.transformer.blocks.rotary(positions, x.dtype)
            for block, (keys, values) in zip(self.transformer.blocks, keys_values, strict=True):
                x, _ = self.transformer.blocks.run(block, block.candidate, x, keys, values, rotary, positions, None)
            logits = p + self.space.step_size() * (self.transformer.norm(x) @ weight.T)
            states.append(logits)
        return states


class LoopedWhole(nn.Module):
    """A looped transformer: the sequence goes through the same blocks in every step."""

    def __init__(self, config: Config):
        super().__init__()
        self.twin: Any = build_model(config, PAD)

    def chain(self, context: Tensor, steps: int) -> list[Tensor]:
        """Return the logits [B, S, V] after every step."""
        embedded, twin = self.twin.embed(context), self.twin
        rotary = twin.blocks.rotary(torch.arange(context.shape[1]), embedded.dtype)
        x, states = torch.zeros_like(embedded), []
        for _ in range(steps):
            x = x + embedded
            for block in twin.blocks:
                x, *_ = twin.blocks.run(block, block.context, x, rotary, None)
            x = twin.norm(x)
            states.append(twin.head(x))
        return states


def encode(document: dict[str, Any], numbers: dict[str, int]) -> tuple[list[int], list[int], list[int]]:
    """Return tokens [S+1], targets [S] and difficulties [S] of a document."""
    tokens, targets, hops = [END], [], []
    for prompt, completion, difficulty in zip(
        document["prompt"], document["completion"], document["difficulty"], strict=True
    ):
        given, answer = ([numbers[word] for word in text.split()] for text in (prompt, completion))
        tokens += given + answer
        targets += [PAD] * len(given) + answer
        hops += [-1] * (len(given) + len(answer) - 1) + [difficulty]
    return [*tokens, END], [*targets, END], [*hops, -1]


def batch(documents: list[dict[str, Any]], numbers: dict[str, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, targets and difficulties of documents, filled up to the longest."""
    columns = [list(column) for column in zip(*(encode(one, numbers) for one in documents), strict=True)]
    length = max(map(len, columns[1]))
    fill = [(PAD, length + 1), (PAD, length), (-1, length)]
    rows = [[row + [x] * (n - len(row)) for row in c] for c, (x, n) in zip(columns, fill, strict=True)]
    return tuple(torch.tensor(column) for column in rows)  # type: ignore[return-value]


def hops_at(config: Config, step: int) -> int:
    """Return the hops of the curriculum at an optimizer step: no more than every number of MCMC steps reaches."""
    mcmc = config.mcmc
    grown = 1 + (mcmc.num_steps - 1) * step // mcmc.num_steps_warmup
    return min(MAX_HOPS, grown)


def training_flops(config: Config, task: Task, max_steps: int) -> float:
    """Return the FLOPs of so many optimizer steps; MCMC steps count as they are taken."""
    documents = [task.document(random.Random(str(number)), 1, MAX_HOPS) for number in range(200)]
    _, targets, _ = batch(documents, task.tokens)
    length, share = targets.shape[1], (targets != PAD).double().mean().item()
    per_token = {
        steps: training_flops_per_token(
            config.model, replace(config.mcmc, num_steps=steps, max_num_steps=None), length, share
        )
        for steps in range(1, config.mcmc.max_mcmc_steps + 1)
    }
    taken = (plan_at(config.mcmc, config.seed, step, 0).num_steps for step in range(1, max_steps + 1))
    return config.training.global_batch_size * length * sum(per_token[steps] for steps in taken)


def stretch(config: Config, task: Task, kind: str, layers: int, equal_flops: bool) -> None:
    """Set the model's kind and layers, and train a twin for as many FLOPs as the EBT of the configuration."""
    flops, steps = training_flops(config, task, config.training.max_steps), config.training.max_steps
    config.model.kind = "ar" if kind in ("ar", "steps", "whole") else "ebt"
    config.model.num_layers = layers
    if equal_flops:
        factor = flops / training_flops(config, task, steps)
        config.training.max_steps = round(factor * steps)
        config.mcmc.num_steps_warmup = round(factor * config.mcmc.num_steps_warmup)


def train(
    config: Config, task: Task, kind: str, lessons: bool = True
) -> tuple[nn.Module, Callable[[Tensor, int], list[Tensor]]]:
    """Train a model and return it, and what computes its logits after every step."""
    torch.manual_seed(config.seed)
    model: Any = {"candidate": LoopedCandidate, "whole": LoopedWhole}.get(kind, lambda c: build_model(c, PAD))(config)
    optimizer = build_optimizer(model, config)
    draw = random.Random(f"train {config.seed}")
    size, parameters = config.training.global_batch_size, list(model.parameters())
    for step in range(1, config.training.max_steps + 1):
        hops = hops_at(config, step) if lessons else MAX_HOPS
        more = task.training(hops) | ({"steps": True} if kind == "steps" else {})
        tokens, targets, _ = batch([task.document(draw, 1, hops, **more) for _ in range(size)], task.tokens)
        set_lr(optimizer, config, step)
        plan = plan_at(config.mcmc, config.seed, step, 0)
        if hasattr(model, "chain"):
            mask = targets != PAD
            loss = F.cross_entropy(model.chain(tokens[:, :-1], plan.num_steps)[-1][mask], targets[mask])
            loss.backward()
        else:
            ids = torch.arange(size) + step * size
            loss = model.training_step(tokens, ids, plan if kind == "ebt" else None, targets=targets).loss
        nn.utils.clip_grad_norm_(parameters, config.optimizer.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step} | {hops} hops | loss {loss.item():.4f} | {time.process_time():.0f} s", flush=True)

    @torch.no_grad()
    def predict(context: Tensor, steps: int) -> list[Tensor]:
        if hasattr(model, "chain"):
            return list(model.chain(context, steps))
        if config.model.kind == "ar":
            return [model.predict(context)]
        ((_, states),) = model.refine_slices(context, steps, torch.arange(len(context)))
        return [state for _, state in states][1:]

    return model, predict


def held_out(task: Task) -> list[dict[str, Any]]:
    """Return documents of all difficulties."""
    return [task.document(random.Random(f"test {n}"), 1, task.hardest, **task.held_out) for n in range(TEST_DOCUMENTS)]


def accuracy(task: Task, predict: Callable[[Tensor, int], list[Tensor]]) -> dict[str, Any]:
    """Return by hops the accuracy after every number of steps, and accuracy and steps where predictions settle."""
    right, stopped, taken, hops = [], [], [], []
    documents = held_out(task)
    for start in range(0, TEST_DOCUMENTS, 250):
        tokens, targets, difficulty = batch(documents[start : start + 250], task.tokens)
        asked = difficulty >= 0
        states = [state[asked] for state in predict(tokens[:, :-1], TEST_STEPS)]
        good = torch.stack([state.argmax(-1) == targets[asked] for state in states])
        if len(states) > 1:
            p = torch.stack(states).softmax(-1)
            calm = (p[1:] - p[:-1]).abs().amax(-1) <= TOLERANCE
            calm[-1] = True
            last = calm.int().argmax(0) + 1  # the step that has changed nothing
            stopped.append(good.gather(0, last[None])[0])
            taken.append(last + 1)
        right.append(good)
        hops.append(difficulty[asked])
    all_right, all_hops = torch.cat(right, 1).double(), torch.cat(hops)
    levels = [all_hops == level for level in range(1, task.hardest + 1)]

    def by_hops(column: Tensor) -> dict[int, float]:
        return {hops: column[own].mean().item() for hops, own in enumerate(levels, 1)}

    steps = [by_hops(row) for row in all_right]
    found: dict[str, Any] = {
        "answers": {hops: int(own.sum()) for hops, own in enumerate(levels, 1)},
        "accuracy": {hops: {n: row[hops] for n, row in enumerate(steps, 1)} for hops in steps[0]},
    }
    if stopped:
        all_taken = torch.cat(taken).double()
        found["stopped"] = {
            "accuracy": by_hops(torch.cat(stopped).double()),
            "steps": by_hops(all_taken),
            "correlation": torch.corrcoef(torch.stack((all_taken, all_hops.double())))[0, 1].item(),
        }
    return found


@torch.no_grad()
def written_out(task: Task, predict: Callable[[Tensor, int], list[Tensor]]) -> dict[str, Any]:
    """Return the accuracy by hops of a model that writes the nodes on the way."""
    right: dict[int, list[bool]] = {}
    for document in held_out(task):
        (prompt,), (completion,), (hops,) = document["prompt"], document["completion"], document["difficulty"]
        tokens = [END, *(task.tokens[word] for word in prompt.split())]
        for _ in range(hops):  # as many as it needs: a generous judge
            tokens.append(int(predict(torch.tensor([tokens]), 1)[0][0, -1].argmax()))
        right.setdefault(hops, []).append(tokens[-1] == task.tokens[completion.strip()])
    return {
        "answers": {hops: len(found) for hops, found in sorted(right.items())},
        "accuracy": {hops: {1: sum(found) / len(found)} for hops, found in sorted(right.items())},
    }


def main() -> None:
    """Train and test one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("ebt", "ar", "candidate", "whole", "steps"), default="candidate")
    parser.add_argument("--task", choices=TASKS, default="pointers")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--equal-flops", action="store_true", help="train a twin for as many FLOPs as the EBT")
    parser.add_argument("--no-lessons", action="store_true", help="train on all difficulties from the start")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, nargs="?", const=RESULTS, help="file to append the results to")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the configuration")
    args = parser.parse_args()
    torch.set_num_threads(1)
    task = TASKS[args.task]
    settings = [f"seed={args.seed}", f"model.vocab_size={4 + len(task.tokens)}", *args.overrides]
    config = load_config(ROOT / "configs" / "reasoning.yaml", settings)
    stretch(config, task, args.kind, args.layers, args.equal_flops)
    model, predict = train(config, task, args.kind, not args.no_lessons)
    trained = time.process_time()
    found = written_out(task, predict) if args.kind == "steps" else accuracy(task, predict)
    for hops, by_steps in found["accuracy"].items():
        shown = {steps: value for steps, value in by_steps.items() if steps in (1, 2, 3, 4, 5, 6, 8, 10, 16, 32)}
        print(f"{hops} hops: " + "  ".join(f"{steps}: {value:.3f}" for steps, value in shown.items()))
    if "stopped" in found:
        print(json.dumps(found["stopped"]))
    looped = args.kind in ("candidate", "whole")  # which the formulas do not count
    record = {
        "task": args.task,
        "kind": args.kind,
        "layers": args.layers,
        "seed": args.seed,
        "overrides": args.overrides,
        "equal_flops": args.equal_flops,
        "lessons": not args.no_lessons,
        "steps": config.training.max_steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_flops": None if looped else training_flops(config, task, config.training.max_steps),
        **found,
        "processor_seconds": {"training": round(trained), "all": round(time.process_time())},
    }
    if args.save:
        with args.save.open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
