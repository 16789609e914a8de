"""What one micro-batch keeps in memory and asks of sharded parameters, from a step on the meta device.

A step without data runs the passes that training will run, so nothing here has to follow a change of the model. What it
costs is proportional to the rows, and linear in the number of layers and of positions that are refined together: a few
small steps give the coefficients, and a large model on any micro-batch is a sum.

Shapes: B rows of a micro-batch, S positions, C positions of a slice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ebwm_dist.config.launch import check_libraries
from ebwm_dist.config.schema import Config
from ebwm_dist.mcmc.build import Model, build_model
from ebwm_dist.mcmc.contrast import Contrast
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from ebwm_dist.mcmc.schedule import StepPlan
from ebwm_dist.mcmc.second_order import Refinement
from ebwm_dist.mcmc.slices import Slice
from ebwm_dist.mcmc.vocabulary import SLICE_ELEMENTS, TokenMatrix
from ebwm_dist.models.passes import P, T
from ebwm_dist.planning.live_bytes import LiveBytes, UndrawnWeights

PERSISTENT = 100_000
"""Parameters below this number of elements are kept whole by ZeRO-3, once they have been gathered in a step."""
_LAYERS = (2, 3)
"""Numbers of layers that are measured: of one layer the context stream has only half."""

_FEW_TOKENS = 1
"""The vocabulary with which blocks are measured."""
_MOVED = ("gathered", "gathers", "gradients", "operations")
_ENERGIES = ("energy_of_observed", "energy_of_state")
"""The passes of a contrast, which differentiate energies."""
_PASSES = ("context_stream", "descend", "step", "step_with_loss", "tangent", *_ENERGIES, "finish")

Quantities = dict[str, float]


@dataclass(frozen=True)
class Footprint:
    """Of one micro-batch: bytes that are alive beside weights and gradients, and how much of the parameters moves."""

    context: float
    """Keys, values and activations of the context streams, held while slices are refined."""
    context_peak: float
    """At most, while the context streams are computed, and at their backward."""
    slice: float
    """Beside the context, at most in the passes through the blocks of a slice; of a twin, in its only pass."""
    vocabulary: float
    """What the states, their embedding and read-out, and losses need beyond that."""
    gathered: float
    """Numbers that sharded parameters gather."""
    gathers: float
    """Calls that gather them, one for each parameter."""
    gradients: float
    """Numbers of gradients that the backwards end with."""
    backwards: float
    """Backwards that end with gradients."""
    operations: float
    """Operations that are launched one by one."""

    @property
    def activations(self) -> float:
        """Return the peak in bytes."""
        return max(self.context_peak, self.context + self.slice + self.vocabulary)


class FootprintModel:
    """The footprints of a configuration, for any micro-batch and slice."""

    def __init__(self, config: Config):
        check_libraries(config)
        length, one_pass = config.data.sequence_length, config.model.kind != "ebt"
        usual = _whole(config, config.training.position_chunk)
        self._positions = (length, length) if one_pass else (_whole(config, usual // 2), _whole(config, 2 * usual))
        self._blocks = {
            (layers, positions): _measure_blocks(config, layers, positions)
            for layers in _LAYERS
            for positions in sorted(set(self._positions))
        }
        self._measured_states = cache(partial(_measure_states, _meta_model(config, num_layers=1), config))
        self._rows_together = max(1, SLICE_ELEMENTS // (config.model.embedding_dim or config.model.vocab_size))

    def of(self, config: Config) -> Footprint:
        """Return the footprint of a micro-batch of `config`, in which only `training`'s sizes may be others."""
        training, model, mcmc = config.training, config.model, config.mcmc
        rows = training.micro_batch_size + mcmc.replayed_rows(training.micro_batch_size)
        blocks = config.data.sequence_length // model.block_size
        share = -(-blocks // training.position_parallel) * model.block_size
        positions = min(_whole(config, training.position_chunk), share)
        slices = -(-share // positions)
        known = self._at(model.num_layers, positions)
        if model.kind != "ebt":
            of_twin = {what: known[f"{what} summed_loss"] for what in _MOVED}
            return Footprint(0.0, 0.0, rows * known["peak summed_loss"], 0.0, backwards=1.0, **of_twin)
        contrast = mcmc.objective == "contrastive"
        steps, chained = (mcmc.num_steps + mcmc.max_mcmc_steps) / 2, mcmc.gradient == "full"
        trained = 1.0 if mcmc.loss == "last" and not chained else steps
        landscapes = min(mcmc.num_steps, model.num_landscapes)
        context = known["context"]
        states, waiting = self._states(rows * positions), 0.0
        if chained:  # the states of all steps wait for their backwards, each with its embedding, and the last upstream
            waiting = (mcmc.max_mcmc_steps - 1) * states["visited"] + states["state"]
        backward = max(known[f"peak {name}"] for name in ("tangent", *_ENERGIES))
        passes = max(
            rows * (known["peak descend"] - context) + states["state"],
            rows * (backward - context) + (1 if contrast else 4 if chained else 2) * states["state"],
        )
        between = max(rows * known["kept"] + states["step"], states["embedding"])
        others = (landscapes - 1) * context

        def moved(what: str) -> float:
            each = {name: known[f"{what} {name}"] for name in _PASSES}
            in_slice = steps * each["descend"] + trained * (each["step_with_loss"] + each["tangent"])
            if contrast:
                in_slice = steps * (each["descend"] + each["step"]) + sum(each[name] for name in _ENERGIES)
            elif what != "gradients":  # a step without a backward is the first half of one with it
                in_slice += (steps if chained else steps - trained) * each["step_with_loss"] / 2
            return landscapes * (each["context_stream"] + each["finish"]) + slices * in_slice

        return Footprint(
            context=rows * landscapes * context,
            context_peak=rows * (others + max(known["peak context_stream"], known["peak finish"])),
            slice=waiting + passes,
            vocabulary=max(0.0, between - passes),
            backwards=landscapes + slices * (2 + mcmc.num_negatives if contrast else 2 * trained),
            **{what: moved(what) for what in _MOVED},
        )

    def _states(self, count: int) -> Quantities:
        """Return the quantities of so many states: linear as long as all are worked on together, and beyond that."""
        most = self._rows_together
        ends = (max(1, most // 2), most) if count <= most else (2 * most, 4 * most)
        low, high = (self._measured_states(end) for end in ends)
        share = (count - ends[0]) / max(1, ends[1] - ends[0])
        return {name: (1 - share) * low[name] + share * high[name] for name in low}

    def _at(self, layers: int, positions: int) -> Quantities:
        """Return the quantities of a sequence at a number of layers and of positions: linear in both."""
        (few, more), (short, long) = _LAYERS, self._positions
        depth = (layers - few) / (more - few)
        part = 0.0 if long == short else (positions - short) / (long - short)
        found: Quantities = {}
        for name in self._blocks[few, short]:
            shallow, deep = (
                (1 - part) * self._blocks[number, short][name] + part * self._blocks[number, long][name]
                for number in _LAYERS
            )
            found[name] = (1 - depth) * shallow + depth * deep
        return found


def _meta_model(config: Config, **model: Any) -> Model:
    """Build the model without memory and without noise, which needs a generator that the meta device does not have."""
    mcmc = replace(
        config.mcmc,
        num_steps=1,
        max_num_steps=None,
        initial_state="zeros",
        langevin_noise=0.0,
        step_size_jitter=1.0,
        replay_size=0,
    )
    config = replace(config, model=replace(config.model, num_landscapes=1, **model), mcmc=mcmc)
    with torch.device("meta"), UndrawnWeights():
        built = build_model(config, pad_id=0)
        built.to(torch.bfloat16 if config.training.precision == "bf16" else torch.float32)
        for p in built.parameters():
            p.grad = torch.zeros_like(p)
    return built


def _whole(config: Config, positions: int) -> int:
    """Return the positions of a slice of at most so many, in whole blocks and at least one."""
    size = config.model.block_size
    return min(config.data.sequence_length, max(1, positions // size) * size)


def _measure_blocks(config: Config, layers: int, positions: int) -> Quantities:
    """Return bytes and numbers of one MCMC step of one sequence on one landscape, in its last slice.

    The vocabulary of an energy model is left out of the bytes.
    """
    length, width, energies = config.data.sequence_length, config.model.embedding_dim, config.model.kind == "ebt"
    vocabulary = config.model.vocab_size if not energies or width is not None else _FEW_TOKENS
    model = _meta_model(config, num_layers=layers, vocab_size=vocabulary)
    if energies and config.training.attention == "fused":
        model.fuse_attention()
    with torch.device("meta"):
        tokens = config.model.prefix_length + length
        observed = torch.zeros(1, tokens, dtype=torch.long) if width is None else torch.zeros(1, tokens, width)
        ids = torch.zeros(1, device="cpu", dtype=torch.long)
        with LiveBytes() as live:
            recorder = _Recorder(model, live, config.model.vocab_size // vocabulary)
            if not isinstance(model, EnergyBasedTransformer):
                model.training_step(observed, ids, forward=recorder.forward, backward=recorder.backward)
                return recorder.found
            where, layout = Slice(length - positions, length), model.layout
            context, targets = layout.context(observed), layout.targets(observed)
            recent = layout.most_recent(context)
            passes = recorder.forward, recorder.backward
            objective = Contrast if config.mcmc.objective == "contrastive" else Refinement
            refinement = objective(model, StepPlan(1), context, targets, ids, 1.0, *passes)
            recorder.found["context"] = live.now
            refinement.refine(partial(model.space.initial_state, ids, 0, where, recent), where)
            recorder.last = "finish"
            refinement.finish()
    return recorder.found


def _measure_states(model: Model, config: Config, count: int) -> Quantities:
    """Return bytes of `count` states, and at most in a step and in the backward of their embedding."""
    assert isinstance(model, EnergyBasedTransformer)
    space, mcmc = model.space, config.mcmc
    chained = mcmc.gradient == "full"
    with torch.device("meta"), LiveBytes() as live:
        state = torch.zeros(1, count, space.state_width, dtype=space.state_dtype)
        size, dtype = live.now, space.step_size.alpha.dtype
        embedded = space.embed_state(state)
        gradient = torch.zeros(1, count, config.model.dim, dtype=dtype, requires_grad=True)
        visited = live.now
        targets = torch.zeros(1, count, dtype=torch.long) if config.model.embedding_dim is None else state
        upstream = torch.zeros_like(state) if chained else None
        leaf = state.detach().requires_grad_(chained)
        live.peak = live.now
        if mcmc.objective == "contrastive":
            _after, _ = space.step(leaf, gradient, 1.0, targets)
        else:
            objective, _after, _ = space.step_with_loss(leaf, gradient, 1.0, targets, 1.0, upstream)
            objective.backward()
        step, live.peak = live.peak, live.now
        space.embed_state_with_grad(leaf, embedded).backward(torch.zeros_like(embedded))
        return {"state": size, "visited": visited, "step": step, "embedding": live.peak}


class _Recorder:
    """Runs the passes of a step, and notes what each has at most in memory and moves of the parameters."""

    def __init__(self, model: nn.Module, live: LiveBytes, vocabularies: int):
        """Count matrices of the vocabulary as that many of those that the model has."""
        self.model, self.live, self.vocabularies = model, live, vocabularies
        matrices = (module for module in model.modules() if isinstance(module, TokenMatrix))
        self._of_tokens = {p for matrix in matrices for p in matrix.parameters()}
        self.found: Quantities = {
            f"{what} {name}": 0.0 for what in ("peak", *_MOVED) for name in (*_PASSES, "summed_loss")
        }
        self.found["peak between"] = 0.0
        self.last = ""
        """The pass that runs, or has run last."""
        for module in model.modules():
            sizes = [self._numbers(p) for p in module.parameters(recurse=False)]
            if own := [size for size in sizes if size >= PERSISTENT]:
                module.register_forward_hook(partial(self._used, own))
        for p in filter(lambda p: p.requires_grad, model.parameters()):
            p.register_post_accumulate_grad_hook(self._reduced)

    def forward(self, method: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a pass."""
        self.last = method.__name__
        if self.last in ("step", "step_with_loss"):
            self.found["kept"] = self.live.now - self.found["context"]
        return self._noting(partial(self.model, method, *args, **kwargs))

    def backward(self, scalar: Tensor) -> None:
        """Go backward from what the last pass has returned, or at the end through the context streams."""
        self._noting(scalar.backward)

    def _noting(self, action: Callable[[], Any]) -> Any:
        self._note("peak between")
        before = self.live.operations
        result = action()
        self._note(f"peak {self.last}")
        self._count("operations", self.live.operations - before)
        return result

    def _note(self, name: str) -> None:
        self.found[name] = max(self.found.get(name, 0.0), self.live.peak)
        self.live.peak = self.live.now

    def _used(self, sizes: list[int], module: nn.Module, args: Any, output: Any) -> None:
        """Count what a module gathers: in its forward, and where that has a graph, once more in its backward."""
        done: list[bool] = []

        def gather() -> None:
            self._count("gathered", sum(sizes))
            self._count("gathers", len(sizes))

        def backward(gradient: Tensor) -> None:
            if not done:
                done.append(True)
                gather()

        gather()

        for x in tree_leaves(output):
            if isinstance(x, Tensor) and x.requires_grad:
                x.register_hook(backward)

    def _reduced(self, parameter: Tensor) -> None:
        self._count("gradients", self._numbers(parameter))

    def _numbers(self, parameter: Tensor) -> int:
        return parameter.numel() * (self.vocabularies if parameter in self._of_tokens else 1)

    def _count(self, what: str, numbers: int) -> None:
        name = f"{what} {self.last}"
        self.found[name] = self.found.get(name, 0.0) + numbers
