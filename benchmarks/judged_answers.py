"""Chains of an energy model, what may judge the answers that they end with, and how well it does.

Shapes: B documents, S positions, C answers of a document, A finished answers to choose from, K steps, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ebwm_dist.evaluation.uncertainty import auroc

STEPS, CANDIDATES = 16, 8
NOISES = ((2.0, 0.0), (3.0, 0.0), (4.0, 0.0), (0.0, 1.0), (0.0, 2.0), (0.0, 3.0), (2.0, 1.0))
"""Standard deviations of the noise on the start and before every step, of disturbed chains."""


class Judged:
    """A model's answers to some documents.

    Args:
        model: an energy model of tokens.
        looped: whether its output is fed back without an energy.
        documents: tokens [B, S+1], positions [B, C], answers [B, C], their difficulties [B, C], and all finished
            answers [B, C, A].
    """

    def __init__(self, model: Any, looped: bool, documents: tuple[Tensor, ...]):
        self.model, self.looped = model, looped
        tokens, self.where, self.answers, self.difficulties, self.finished = documents
        self.observed = tokens[:, :-1]

    @torch.no_grad()
    def figures(self) -> dict[str, Any]:
        """Return all measurements."""
        self.context = self.model.context_stream(self.observed, 0)
        where, answers, hops, finished = self.where, self.answers, self.difficulties, self.finished
        # 1. accuracy by difficulty and steps
        states, energies, sure = self._chains(where, 0.0, 0.0)
        predicted = torch.stack([state.argmax(-1) for state in states])  # [K+1, B, C]
        right = predicted[-1] == answers
        result: dict[str, Any] = {
            "accuracy": {k: (predicted[k] == answers).double().mean().item() for k in (1, 2, 4, 6, 8, 10, STEPS)},
            "by_difficulty": by(hops, right.double()),
        }
        # 2. the right answer among all finished ones
        embedded = self.model.space.embed_next(finished.flatten(1)).view(*finished.shape, -1)
        ranked = candidate_energies(self.model, self.context, where, embedded)
        truth = finished == answers[..., None]
        true_energy = ranked.masked_fill(~truth, 0).sum(-1)
        below = ((true_energy[..., None] < ranked) & ~truth).sum(-1) / (~truth).sum(-1)
        result["given"] = {"lower_than_wrong": below.mean().item(), "by_difficulty": by(hops, below)}
        result["given"]["auroc"] = auroc(ranked[~truth], ranked[truth])[0]
        # 3. the model's own finished answers
        done = (predicted[-1][..., None] == finished).any(-1)
        wrong = done & ~right
        result["own"] = {
            "finished": done.double().mean().item(),
            "wrong": int(wrong.sum()),
            "right": int((done & right).sum()),
        }
        result["own"] |= aurocs(scores_of(energies, sure), wrong, done & right, hops)
        unfinished = predicted[1:] != answers
        result["own"]["unfinished"] = auroc(energies[5][predicted[5] != answers], energies[5][predicted[5] == answers])[
            0
        ]
        # 4. falls up to the answer
        going = F.pad(unfinished.int().flip(0).cumsum(0).flip(0) > 0, (0, 0, 0, 0, 1, 0), value=True)[:-1]
        going &= right
        falls = energies.diff(dim=0) < 0
        result["falls"] = (falls & going).sum().item() / max(1, going.sum().item())
        result["falls_from_start"] = (energies[-1] < energies[0])[right].double().mean().item()
        # 5. best of 8 disturbed chains
        result["best_of"] = [self._best_of(*noise) for noise in NOISES]
        return result

    def _chains(self, where: Tensor, start: float, langevin: float) -> tuple[list[Tensor], Tensor, Tensor]:
        return chains(self.model, self.looped, self.context, self.observed, where, STEPS, start, langevin)

    def _best_of(self, start: float, langevin: float) -> dict[str, Any]:
        rows, c = self.where.shape
        answers, hops, finished = self.answers, self.difficulties, self.finished
        torch.manual_seed(1)
        states, energies, sure = self._chains(self.where.repeat(1, CANDIDATES), start, langevin)
        chosen = states[-1].argmax(-1).view(rows, CANDIDATES, c)
        right = chosen == answers[:, None]
        done = (chosen[..., None] == finished[:, None]).any(-1)
        votes = (chosen[:, :, None] == chosen[:, None]).sum(2)
        scores = {k: v.view(rows, CANDIDATES, c) for k, v in scores_of(energies, sure).items()}
        found: dict[str, Any] = {"noise": [start, langevin], "one": right.double().mean().item()}
        found["any"] = right.any(1).double().mean().item()
        found["majority"] = right.gather(1, votes.argmax(1)[:, None]).double().mean().item()
        found["wrong finished"] = int((done & ~right).sum())
        for name, score in scores.items():
            found[name] = right.gather(1, score.argmin(1)[:, None]).double().mean().item()
        found["auroc"] = aurocs(scores, done & ~right, done & right, hops[:, None].expand_as(done))
        return found


def candidate_energies(model: Any, context: Any, where: Tensor, embedded: Tensor) -> Tensor:
    """Return the energies [B, C, N] of embedded candidates [B, C, N, D] at positions [B, C]."""
    start = where[..., None].expand(embedded.shape[:3]).flatten(1)
    return model.transformer.energy(embedded.flatten(1, 2), context, 0, start).view(embedded.shape[:3])


def start_of(model: Any, observed: Tensor, where: Tensor) -> Tensor:
    """Return the initial logits [B, C, V] of predictions at positions [B, C]."""
    rows = torch.arange(len(where))[:, None]
    return torch.zeros(*where.shape, model.space.state_width).scatter_(-1, observed[rows, where][..., None], 10.0)


def looped_step(model: Any, z: Tensor, context: Any, where: Tensor) -> Tensor:
    """Return the next logits without an energy: the output of the blocks takes the place of -dE/de."""
    p, weight, transformer = z.softmax(-1), model.space.vocab_to_embed.weight, model.transformer
    x = p @ weight
    positions = where[:, None] + 1
    rotary = transformer.blocks.rotary(positions, x.dtype)
    for block, (keys, values) in zip(transformer.blocks, context, strict=True):
        x, _ = transformer.blocks.run(block, block.candidate, x, keys, values, rotary, positions, None)
    return p + model.space.step_size() * (transformer.norm(x) @ weight.T)


@torch.no_grad()
def chains(
    model: Any, looped: bool, context: Any, observed: Tensor, where: Tensor, steps: int, start: float, langevin: float
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return states and energies [K+1, B, C] of chains, and minus the log-probability of what each step led to.

    A step leads to the most probable token of the state that enters the next one, noise included.
    """
    z = start_of(model, observed, where)
    states, energies, unsure, before = [], [], [], z
    z = z + start * torch.randn_like(z) if start else z
    for step in range(steps + 1):
        if langevin and 0 < step < steps:
            z = z + langevin * torch.randn_like(z)
        unsure.append(-before.log_softmax(-1).gather(-1, z.argmax(-1, keepdim=True))[..., 0])
        _, energy, gradient, _ = model.descend(z, context, 0, where)
        states.append(z)
        energies.append(energy)
        if step < steps:
            z = before = looped_step(model, z, context, where) if looped else model.space.update(z, gradient)
    return states, torch.stack(energies), torch.stack(unsure)


def scores_of(energies: Tensor, unsure: Tensor) -> dict[str, Tensor]:
    """Return what may judge a chain, less being better, from its columns [K+1, ...]."""
    return {
        "energy": energies[-1],
        "path energy": energies.sum(0),
        "summed surprisal": unsure.sum(0),
        "surprisal": unsure.amax(0),
        "surprisal at the end": unsure[-1],
    }


def aurocs(scores: dict[str, Tensor], wrong: Tensor, right: Tensor, hops: Tensor) -> dict[str, Any]:
    """Return the AUROC of wrong against right answers by each score, over all and within one difficulty (mean)."""
    if not (wrong.any() and right.any()):
        return {}
    found = {}
    for name, score in scores.items():
        inside, pairs = 0.0, 0
        for n in hops.unique():
            w, r = score[wrong & (hops == n)], score[right & (hops == n)]
            if len(w) and len(r):
                inside, pairs = inside + auroc(w, r)[0] * len(w), pairs + len(w)
        found[name] = [auroc(score[wrong], score[right])[0], inside / max(1, pairs)]
    return found


def by(hops: Tensor, values: Tensor) -> dict[int, float]:
    """Return the mean of values for every difficulty."""
    return {n: values[hops == n].double().mean().item() for n in hops.unique().tolist()}
