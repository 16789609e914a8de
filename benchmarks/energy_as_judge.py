"""Can the energy be made a judge of right against wrong among finished answers?

    python benchmarks/energy_as_judge.py --task letters --contrast 0.1 --seed 0 --out FILE

Trains the model of `configs/reasoning.yaml` on documents made as they are needed, with terms beside its loss that are
of first order in the weights: plain energies of given states, run with their gradients.

--contrast W: cross-entropy over minus the energies of the true answer and of wrong ones: the document's other answers
    and whatever the chain has predicted on its way, as one-hot distributions;
--path W:     softplus of the summed energies of whole chains from disturbed starts, right ones minus wrong ones;
--judge-only: the contrastive term alone, over all finished answers: what can one evaluation of the energy verify?
--fall W:     softplus of the rise of the energy over each step of the chain up to the answer.

Appends a line to FILE: accuracy, the rank of the right answer among finished ones, AUROC of the model's own finished
answers, best of 8 disturbed chains, and in how many steps the energy falls. Scores of a chain are its energy in the
end, the sum of its energies, and its surprisal: minus the log-probability of what its least certain step led to.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebwm_dist.config.loading import load_config
from ebwm_dist.config.schema import Config
from ebwm_dist.mcmc.build import build_model
from ebwm_dist.mcmc.schedule import plan_at
from ebwm_dist.mcmc.slices import Slice
from ebwm_dist.models.layers import Linear
from ebwm_dist.training.optimizer import build_optimizer, set_lr

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data_tools" / "tasks")]
import letters  # noqa: E402 (scripts of the data tools)
import pointers  # noqa: E402

from benchmarks.judged_answers import Judged, candidate_energies, chains, looped_step, start_of  # noqa: E402

PAD, END = 0, 3
WORDS = {
    "pointers": [*pointers.NODES, *(f"{a}<{b}" for a in pointers.NODES for b in pointers.NODES)],
    "letters": [f"{s}{p}" for s in letters.STATES.values() for p in range(letters.PLACES)]
    + [f"{p}{x}" for p in range(letters.PLACES) for x in "xyz."],
}


class Task:
    """Documents as tensors: tokens [B, S+1], positions, answers, difficulties [B, 4], finished answers [B, 4, A]."""

    def __init__(self, name: str):
        self.name, self.ids = name, {word: 4 + number for number, word in enumerate(WORDS[name])}
        self.vocab_size, self.longest = 4 + len(self.ids), 9

    def batch(self, draws: list[random.Random], most: int) -> tuple[Tensor, ...]:
        """Return documents with difficulties up to `most`."""
        make = {"pointers": pointers.document, "letters": letters.document}[self.name]
        more = (
            {"deepest": most} if self.name == "pointers" and most < 4 else {}
        )  # as in the lessons of the configuration
        rows = [self._encode(make(draw, 1, most, **more)) for draw in draws]
        return tuple(torch.tensor(column) for column in zip(*rows, strict=True))

    def _encode(self, document: dict[str, Any]) -> tuple[Any, ...]:
        tokens, where, answers = [END], [], []
        for prompt, completion in zip(document["prompt"], document["completion"], strict=True):
            tokens += [self.ids[word] for word in prompt.split()]
            where.append(len(tokens) - 1)
            answers.append(self.ids[completion.strip()])
            tokens.append(answers[-1])
        if self.name == "pointers":
            first = document["prompt"][0].split()
            finished = [self.ids[word[0]] for word in first if "<" in word and word[0] == word[2]]
        else:
            place = document["completion"][0].strip()[1]
            finished = [self.ids[state + place] for state in letters.STATES.values()]
        return tokens, where, answers, document["difficulty"], [finished] * len(answers)


class SquaredHead(Linear):
    """E = sum_j (w_j h)^2."""

    def __init__(self, dim: int, outputs: int):
        super().__init__(dim, outputs, bias=False)

    def forward(self, h: Tensor, candidate: Tensor, tangent: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Return the energy, or with a tangent energy and derivative, stacked."""
        mapped = nn.functional.linear(h, self.weight)
        if tangent is None:
            return mapped.square().sum(-1)
        mapped, d_mapped = mapped.chunk(2)
        return torch.cat((mapped.square().sum(-1), 2 * (mapped * d_mapped).sum(-1)))


class Trial:
    """A model and its training."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.task = args, Task(args.task)
        overrides = [f"seed={args.seed}", f"model.vocab_size={self.task.vocab_size}", f"model.num_layers={args.layers}"]
        overrides += [f"model.energy_head={'linear' if args.head == 'squared' else args.head}"]
        overrides += [f"training.max_steps={args.steps}", f"optimizer.lr={args.lr}"]
        overrides += [f"mcmc.num_steps_warmup={args.warmup}", f"model.dim={args.dim}", f"model.num_heads={args.heads}"]
        self.config: Config = load_config(ROOT / "configs" / "reasoning.yaml", overrides)
        torch.manual_seed(args.seed)
        self.model: Any = build_model(self.config, PAD)
        if args.head == "squared":
            self.model.transformer.head = SquaredHead(self.config.model.dim, args.outputs)
        self.visited: list[Tensor] = []
        step = self.model.space.step

        def watched(*given: Any) -> tuple[Tensor, Tensor]:
            after, loss = step(*given)
            self.visited.append(after)
            return after, loss

        self.model.space.step = watched

    def terms(self, tokens: Tensor, where: Tensor, answers: Tensor, finished: Tensor, step: int) -> dict[str, Tensor]:
        """Return the terms beside the loss, with their graphs."""
        model, args, found = self.model, self.args, {}
        if not (args.contrast or args.path or args.fall):
            return found
        context = model.context_stream(tokens[:, :-1], 0)
        on_the_way = torch.stack([state.argmax(-1) for state in self.visited] or [answers], -1)  # [B, C, K]
        if args.contrast:
            others = answers[:, None].expand(-1, answers.shape[1], -1)
            wrong = finished if args.all_finished else others
            wrong = torch.cat((wrong, on_the_way[..., -args.own :]), -1) if args.own and self.visited else wrong
            candidates = torch.cat((answers[..., None], wrong), -1)
            energies = candidate_energies(
                model, context, where, model.space.embed_next(candidates.flatten(1)).view(*candidates.shape, -1)
            )
            same = F.pad(wrong == answers[..., None], (1, 0))
            logits = (-energies / args.temperature).masked_fill(same, -torch.inf)
            found["contrast"] = args.contrast * -logits.log_softmax(-1)[..., 0].mean()
        if args.fall:
            states = [
                model.space.initial_state(
                    torch.arange(len(tokens)), 0, Slice(0, tokens.shape[1] - 1, where), tokens[:, :-1]
                )
            ]
            states += self.visited
            embedded = torch.stack([model.space.embed_state(state) for state in states], 2)
            energies = candidate_energies(model, context, where, embedded)
            rises = F.softplus((energies.diff(dim=-1) + args.margin) / args.temperature)
            going = (on_the_way != answers[..., None]).int().flip(-1).cumsum(-1).flip(-1) > 0  # not finished after it
            going = F.pad(going, (1, 0), value=True)[..., :-1]
            found["fall"] = args.fall * (rises * going).sum() / going.sum()
        if args.path and step > args.path_from:
            found["path"] = args.path * self._path_term(context, tokens, where, answers)
        return found

    def _looped_loss(self, observed: Tensor, where: Tensor, answers: Tensor, steps: int) -> Tensor:
        context = self.model.context_stream(observed, 0)
        z = start_of(self.model, observed, where)
        for _ in range(steps):
            z = looped_step(self.model, z, context, where)
        return F.cross_entropy(z.flatten(0, 1), answers.flatten())

    def _path_term(self, context: Any, tokens: Tensor, where: Tensor, answers: Tensor) -> Tensor:
        rows, copies = max(1, len(tokens) // 4), 4  # a quarter of the documents, four chains each
        tokens, where, answers = tokens[:rows], where[:rows], answers[:rows]
        pairs = tuple((k[:rows], v[:rows]) for k, v in context)
        again = tuple((k.detach().repeat(1, 1, 1, 1), v.detach()) for k, v in pairs)
        start = where.repeat(1, copies)
        noise = self.args.path_noise
        states, *_ = chains(self.model, False, again, tokens[:, :-1], start, len(self.visited), noise, noise / 4)
        right = (states[-1].argmax(-1) == answers.repeat(1, copies)).view(rows, copies, -1)
        energies = [self.model.transformer.energy(self.model.space.embed_state(s), pairs, 0, start) for s in states]
        total = torch.stack(energies).sum(0).view(rows, copies, -1) / self.args.temperature
        difference = F.softplus(total[:, :, None] - total[:, None])  # right chain i, wrong chain j
        pair = right[:, :, None] & ~right[:, None]
        return (difference * pair).sum() / pair.sum().clamp(min=1)

    def train(self) -> list[dict[str, float]]:
        """Train, and return how loss and terms went."""
        args, config, model = self.args, self.config, self.model
        optimizer, draw, log = build_optimizer(model, config), random.Random(f"train {args.seed}"), []
        size, parameters = config.training.global_batch_size, list(model.parameters())
        for step in range(1, args.steps + 1):
            most = min(4, 1 + (config.mcmc.num_steps - 1) * step // config.mcmc.num_steps_warmup)
            tokens, where, answers, _, finished = self.task.batch([draw] * size, most)
            targets = torch.full((size, tokens.shape[1] - 1), PAD).scatter(1, where, answers)
            set_lr(optimizer, config, step)
            self.visited = []
            loss = torch.zeros(())
            if args.looped:
                loss = self._looped_loss(
                    tokens[:, :-1], where, answers, plan_at(config.mcmc, args.seed, step, 0).num_steps
                )
                loss.backward()
            elif not args.judge_only:
                plan, ids = plan_at(config.mcmc, args.seed, step, 0), torch.arange(size) + step * size
                loss = model.training_step(tokens, ids, plan, targets=targets).loss
            terms = self.terms(tokens, where, answers, finished, step)
            if terms:
                torch.stack(list(terms.values())).sum().backward()
            nn.utils.clip_grad_norm_(parameters, config.optimizer.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
            if step % 100 == 0:
                log.append({"step": step, "loss": loss.item()} | {k: v.item() for k, v in terms.items()})
                print(log[-1], flush=True)
        return log


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=sorted(WORDS), default="letters")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--head", choices=("linear", "bilinear", "squared"), default="bilinear")
    parser.add_argument("--outputs", type=int, default=8)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--warmup", type=int, default=1100)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--contrast", type=float, default=0.0)
    parser.add_argument(
        "--own", type=int, default=5, help="predictions of the chain among the wrong answers, the last ones"
    )
    parser.add_argument("--all-finished", action="store_true", help="all finished answers instead of the document's")
    parser.add_argument("--judge-only", action="store_true", help="train the contrastive term alone")
    parser.add_argument("--looped", action="store_true", help="no energy: the prediction is fed back")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--fall", type=float, default=0.0)
    parser.add_argument("--margin", type=float, default=0.0)
    parser.add_argument("--path", type=float, default=0.0)
    parser.add_argument("--path-noise", type=float, default=3.0)
    parser.add_argument("--path-from", type=int, default=0)
    parser.add_argument("--documents", type=int, default=600)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--weights", type=Path, help="save the trained weights here")
    return parser


def main() -> None:
    """Train and measure one model."""
    args = parser().parse_args()
    torch.set_num_threads(1)
    began = time.process_time()
    trial = Trial(args)
    log = trial.train()
    trained = time.process_time() - began
    if args.weights:
        torch.save(trial.model.state_dict(), args.weights)
    draws = [random.Random(f"test {number}") for number in range(args.documents)]
    found = Judged(trial.model, args.looped, trial.task.batch(draws, trial.task.longest)).figures()
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "weights", "documents")}
    record = {"settings": settings, **found, "log": log[-1:], "training_seconds": trained}
    record["parameters"] = sum(p.numel() for p in trial.model.parameters())
    line = json.dumps(record, default=str)
    print(json.dumps(found, indent=1))
    if args.out:
        with args.out.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
