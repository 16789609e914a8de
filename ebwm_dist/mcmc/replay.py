"""The replay buffer: final states of earlier refinements, so that later ones start where those ended.

Shapes: B batch, S positions, V vocabulary, K kept tokens, E width of an embedding state.

Sequences that are drawn leave the buffer, and return with their new final states: each is there once, and its
refinement goes on over several replays. The published buffer draws without removal and stores fresh sequences only,
so that its states are those of a single refinement.

A whole distribution over tokens, as the published buffer keeps it, takes 4 V bytes a position. Here it is reduced to
the probabilities of its `mcmc.replay_top_k` most probable tokens, and of all others together; an embedding state is
kept in float16. Positions are always dimension 1, so the compact forms of slices are joined there. Processes that share
the positions of a sequence hold the same records in the same order, each with the states of its own positions.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ebwm_dist.mcmc.noise import mix_seed
from ebwm_dist.mcmc.slices import Share

# Below this softmax gives 0, whatever the dtype; and unlike -inf it stays finite when it is computed with.
_LOWEST = torch.finfo(torch.float16).min

Compact = dict[str, Tensor]
"""The compact form of states; every tensor starts with [B, S]."""

ReplayedSequences = tuple[Tensor, Tensor, Compact]
"""What was observed, the sample's id, and the compact final state; with or without a batch dimension."""


def compress_logits(logits: Tensor, top_k: int) -> Compact:
    """Return the compact form of `logits` [B, S, V], up to a constant per position, which softmax does not see.

    Its `indices` [B, S, K] and `values` [B, S, K] are those of the K = min(top_k, V) largest logits, less the largest;
    `rest` [B, S] is the logit that gives the others together the probability that they have. Positions without a
    distribution (nan, inf, or nothing but -inf) give values that are not finite.
    """
    vocab_size = logits.shape[-1]
    values, indices = logits.topk(min(top_k, vocab_size))
    largest = values[..., :1]
    # Summed without the kept ones: the difference of two sums near 1 would be lost to rounding.
    rest = logits.scatter(-1, indices, -math.inf).logsumexp(-1) - math.log(max(1, vocab_size - top_k))
    return {
        # As 16 bits without a sign, for which torch has few operations: `expand_logits` takes the sign off again.
        "indices": indices.to(torch.int16 if vocab_size <= 1 << 16 else torch.int32),
        "values": (values - largest).clamp(min=_LOWEST).half(),
        "rest": (rest - largest.squeeze(-1)).clamp(min=_LOWEST).half(),
    }


def expand_logits(compact: Compact, vocab_size: int, dtype: torch.dtype) -> Tensor:
    """Return logits [B, S, V] in `dtype` from their compact form."""
    indices = compact["indices"].long()
    if compact["indices"].dtype == torch.int16:
        indices &= 0xFFFF
    logits = compact["rest"].to(dtype)[..., None].repeat(1, 1, vocab_size)
    return logits.scatter_(-1, indices, compact["values"].to(dtype))


class ReplayBuffer:
    """The last `capacity` records, first in, first out, in the memory of the CPU."""

    def __init__(self, capacity: int):
        self._records: deque[ReplayedSequences] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self._records)

    def push(
        self,
        observed: Tensor,
        sample_ids: Tensor,
        state: Compact,
        agree: Callable[[Tensor], Tensor] = lambda finite: finite,
    ) -> None:
        """Add records in place of the oldest; those whose state is not finite are left out.

        Args:
            observed: tokens [B, S+1], or embeddings [B, S+1, E].
            sample_ids: ids [B].
            state: the compact form of their final states.
            agree: which states are finite here [B] -> which are finite on all processes that share their positions.
        """
        observed, sample_ids = observed.detach().cpu(), sample_ids.cpu()
        state = {name: tensor.detach().cpu() for name, tensor in state.items()}
        finite = torch.stack([tensor.flatten(1).isfinite().all(1) for tensor in state.values()]).all(0)
        for i in agree(finite).nonzero().flatten().tolist():
            # Copies: a view would keep the whole batch in memory.
            row = {name: tensor[i].clone() for name, tensor in state.items()}
            self._records.append((observed[i].clone(), sample_ids[i].clone(), row))

    def take(self, count: int, seed: int) -> ReplayedSequences | None:
        """Remove `count` records at random, as determined by `seed` and the content of the buffer alone.

        The ids returned are new ones, hashed from the records' own and the seed, so that a replayed refinement draws
        other noise than the first.

        Returns:
            (observed, sample_ids, state) as they were pushed, on the CPU; None while there are fewer than `count`.
        """
        if count > len(self):
            return None
        generator = torch.Generator().manual_seed(mix_seed(seed))
        chosen = torch.randperm(len(self), generator=generator)[:count].tolist()
        observed, sample_ids, state = _stacked([self._records[i] for i in chosen])
        for i in sorted(chosen, reverse=True):
            del self._records[i]
        return observed, torch.tensor([mix_seed(seed, sample_id) for sample_id in sample_ids.tolist()]), state

    def state_dict(self) -> dict[str, Any]:
        """Return all records as tensors; `torch.load(weights_only=True)` reads them back."""
        if not self._records:
            return {}
        observed, sample_ids, state = _stacked(list(self._records))
        return {"observed": observed, "sample_ids": sample_ids, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Hold the records of `state_dict`, of which a smaller buffer keeps the newest."""
        self._records.clear()
        if state_dict:
            self.push(**state_dict)


def reshard(states: list[dict[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
    """Return the part of `rank` when the records of several buffers are distributed over `world_size` ranks.

    Ranks take turns in the order of the records' age, so that every rank gets some of every age, the newest last.

    Args:
        states: the `ReplayBuffer.state_dict` of every rank of the run so far, in their order.
        rank: which part to return.
        world_size: number of parts.
    """
    counts = [len(state["sample_ids"]) if state else 0 for state in states]
    order = sorted((number - count, buffer, number) for buffer, count in enumerate(counts) for number in range(count))
    if not order[rank::world_size]:
        return {}
    records: list[ReplayedSequences] = []
    for _, buffer, number in order[rank::world_size]:
        state = states[buffer]
        compact = {name: tensor[number] for name, tensor in state["state"].items()}
        records.append((state["observed"][number], state["sample_ids"][number], compact))
    observed, sample_ids, compact = _stacked(records)
    return {"observed": observed, "sample_ids": sample_ids, "state": compact}


def join_positions(states: Sequence[dict[str, Any]], shares: Sequence[Share]) -> dict[str, Any]:
    """Return whole records from the `ReplayBuffer.state_dict` of all `shares` of their positions, in order."""
    first = states[0]
    if len(states) == 1 or not first:
        return first
    length = sum(_positions(state) for state in states)
    order = torch.tensor([*chain.from_iterable(chain(*(share.pieces(length) for share in shares)))]).argsort()
    joined = {name: torch.cat([x["state"][name] for x in states], 1)[:, order] for name in first["state"]}
    return {**first, "state": joined}


def share_positions(state: dict[str, Any], share: Share) -> dict[str, Any]:
    """Return the records of a `ReplayBuffer.state_dict` with the states of this share of the positions alone."""
    if share.count == 1 or not state:
        return state
    own = torch.tensor([*chain(*share.pieces(_positions(state)))])
    return {**state, "state": {name: x[:, own] for name, x in state["state"].items()}}


def _positions(state: dict[str, Any]) -> int:
    """Return how many positions the states of a `ReplayBuffer.state_dict` have."""
    return next(iter(state["state"].values())).shape[1]


def _stacked(records: list[ReplayedSequences]) -> ReplayedSequences:
    observed, sample_ids, states = zip(*records, strict=True)
    return (
        torch.stack(observed),
        torch.stack(sample_ids),
        {name: torch.stack([state[name] for state in states]) for name in states[0]},
    )
