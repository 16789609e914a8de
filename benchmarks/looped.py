"""Is it the energy, or the iteration? Twins of the pointer task that iterate without an energy.

    python benchmarks/looped.py --kind candidate --seed 0 --save

Trains on the documents, curriculum and schedule of `configs/reasoning.yaml`, made as they are needed:

- `ebt`: the model of that configuration;
- `candidate`: its weights and passes, where the output of the blocks takes the place of -dE/de: the prediction is fed
  back, there is no energy and no second order;
- `whole`: a looped transformer: the whole sequence goes through the same block in every step, embeddings added again;
- `steps`: an autoregressive model that writes its steps out, every node on the way being a token of its answer.

Prints accuracy by hops after every number of steps; `--save` appends it to benchmarks/results/looped.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebwm_dist.config.loading import load_config
from ebwm_dist.config.schema import Config
from ebwm_dist.mcmc.build import build_model
from ebwm_dist.mcmc.schedule import plan_at
from ebwm_dist.training.optimizer import build_optimizer, set_lr

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "data_tools" / "tasks"))
import pointers  # noqa: E402 (a script of the data tools)

RESULTS = ROOT / "benchmarks" / "results" / "looped.jsonl"
PAD, END, MAX_HOPS, TEST_STEPS, TEST_DOCUMENTS = 0, 3, 4, 16, 500
WORDS = [*pointers.NODES, *(f"{a}<{b}" for a in pointers.NODES for b in pointers.NODES)]
TOKENS = {word: 4 + number for number, word in enumerate(WORDS)}


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
            seen, rotary, mask = self.transformer._positions(x, keys_values, 0)
            for block, (keys, values) in zip(self.transformer.blocks, seen, strict=True):
                x = self.transformer.blocks.run(block, block.candidate, x, keys, values, rotary, mask, None)
            logits = p + self.space.step_size() * (self.transformer.norm(x) @ weight.T)
            states.append(logits)
        return states


class LoopedWhole(nn.Module):
    """A looped transformer: the sequence goes through the same blocks in every step."""

    def __init__(self, config: Config):
        super().__init__()
        config.model.kind = "ar"
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


def encode(document: dict[str, Any]) -> tuple[list[int], list[int], list[int]]:
    """Return tokens [S+1], targets [S] and difficulties [S] of a document."""
    tokens, targets, hops = [END], [], []
    for prompt, completion, difficulty in zip(
        document["prompt"], document["completion"], document["difficulty"], strict=True
    ):
        given, answer = ([TOKENS[word] for word in text.split()] for text in (prompt, completion))
        tokens += given + answer
        targets += [PAD] * len(given) + answer
        hops += [-1] * (len(given) + len(answer) - 1) + [difficulty]
    return [*tokens, END], [*targets, END], [*hops, -1]


def batch(documents: list[dict[str, Any]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, targets and difficulties of documents, filled up to the longest."""
    columns = [list(column) for column in zip(*map(encode, documents), strict=True)]
    length = max(map(len, columns[1]))
    fill = [(PAD, length + 1), (PAD, length), (-1, length)]
    rows = [[row + [x] * (n - len(row)) for row in c] for c, (x, n) in zip(columns, fill, strict=True)]
    return tuple(torch.tensor(column) for column in rows)  # type: ignore[return-value]


def hops_at(config: Config, step: int) -> int:
    """Return the hops of the curriculum at an optimizer step: no more than every number of MCMC steps reaches."""
    mcmc = config.mcmc
    grown = 1 + (mcmc.num_steps - 1) * step // mcmc.num_steps_warmup
    return min(MAX_HOPS, grown)


def train(config: Config, kind: str) -> tuple[nn.Module, Callable[[Tensor, int], list[Tensor]]]:
    """Train a model and return it, and what computes its logits after every step."""
    torch.manual_seed(config.seed)
    if kind == "steps":
        config.model.kind = "ar"
    model: Any = {"candidate": LoopedCandidate, "whole": LoopedWhole}.get(kind, lambda c: build_model(c, PAD))(config)
    optimizer = build_optimizer(model, config)
    draw = random.Random(f"train {config.seed}")
    size, parameters = config.training.global_batch_size, list(model.parameters())
    for step in range(1, config.training.max_steps + 1):
        documents = [pointers.document(draw, 1, hops_at(config, step), kind == "steps") for _ in range(size)]
        tokens, targets, _ = batch(documents)
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
        if step % 200 == 0:
            print(f"step {step} | loss {loss.item():.4f}", flush=True)

    @torch.no_grad()
    def predict(context: Tensor, steps: int) -> list[Tensor]:
        if hasattr(model, "chain"):
            return list(model.chain(context, steps))
        if kind == "steps":
            return [model.predict(context)]
        ((_, states),) = model.refine_slices(context, steps, torch.arange(len(context)))
        return [state for _, state in states][1:]

    return model, predict


def accuracy(predict: Callable[[Tensor, int], list[Tensor]]) -> dict[int, dict[int, float]]:
    """Return the accuracy by hops after every number of steps."""
    documents = [pointers.document(random.Random(f"test {number}"), 1, 9, False) for number in range(TEST_DOCUMENTS)]
    tokens, targets, hops = batch(documents)
    found: dict[int, dict[int, float]] = {}
    for steps, state in enumerate(predict(tokens[:, :-1], TEST_STEPS), 1):
        right = state.argmax(-1) == targets
        for difficulty in range(1, pointers.MOST_HOPS + 1):
            found.setdefault(difficulty, {})[steps] = right[hops == difficulty].float().mean().item()
    return found


@torch.no_grad()
def written_out(predict: Callable[[Tensor, int], list[Tensor]]) -> dict[int, dict[int, float]]:
    """Return the accuracy by hops of a model that writes the nodes on the way, each after its own ones."""
    right: dict[int, list[bool]] = {}
    for number in range(TEST_DOCUMENTS):
        document = pointers.document(random.Random(f"test {number}"), 1, 9, False)
        tokens = [END]
        for prompt, completion, hops in zip(
            document["prompt"], document["completion"], document["difficulty"], strict=True
        ):
            tokens += [TOKENS[word] for word in prompt.split()]
            for _ in range(hops):  # as many as it needs: a generous judge
                tokens.append(int(predict(torch.tensor([tokens]), 1)[0][0, -1].argmax()))
            right.setdefault(hops, []).append(tokens[-1] == TOKENS[completion.strip()])
    return {hops: {1: sum(found) / len(found)} for hops, found in sorted(right.items())}


def main() -> None:
    """Train and test one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("ebt", "candidate", "whole", "steps"), default="candidate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="optimizer steps; default: those of the configuration")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(
        ROOT / "configs" / "reasoning.yaml", [f"seed={args.seed}", f"model.vocab_size={4 + len(WORDS)}"]
    )
    config.training.max_steps = args.steps or config.training.max_steps
    start = time.perf_counter()
    model, predict = train(config, args.kind)
    found = written_out(predict) if args.kind == "steps" else accuracy(predict)
    for hops, by_steps in found.items():
        shown = {steps: value for steps, value in by_steps.items() if steps in (1, 2, 3, 4, 5, 6, 8, 10, 16)}
        print(f"{hops} hops: " + "  ".join(f"{steps}: {value:.3f}" for steps, value in shown.items()))
    record = {
        "kind": args.kind,
        "seed": args.seed,
        "steps": config.training.max_steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "accuracy": found,
        "seconds": time.perf_counter() - start,
    }
    if args.save:
        with RESULTS.open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
