"""A training step stays on its device and never waits for it; on a GPU it computes what it does on the CPU."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from ebwm_dist.mcmc import noise
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from ebwm_dist.mcmc.schedule import StepPlan
from tests.mcmc.small_models import VARIANTS, batch, build, compare_gradients, gradients, settings
from tests.mcmc.test_embedding import frames

GPU = torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PLAN = StepPlan(3)
MODES: dict[str, dict[str, Any]] = {
    "probabilities": {},
    "logits": {"update": "logits"},
    "mirror": {"update": "mirror"},
    "last": {"loss": "last"},
    "chain": {"gradient": "full"},
    "embeddings": {"step_size": 0.7},
}
in_every_mode = pytest.mark.parametrize("mode", MODES)


def prepare(mode: str, variant: str, **changes: Any) -> tuple[EnergyBasedTransformer, Tensor, Tensor]:
    """Return a model in float64 with observed states and ids, on the CPU."""
    embedding_dim = 5 if mode == "embeddings" else None
    mcmc = settings(**{**MODES[mode], **changes})
    observed, ids = batch() if embedding_dim is None else frames(embedding_dim)
    return build(mcmc, variant, embedding_dim=embedding_dim, position_chunk=8), observed, ids


@in_every_mode
def test_no_value_is_read_from_the_device(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device `meta` that would fail, as would a tensor elsewhere; only noise is not drawn there."""
    meta = torch.device("meta")

    def draw(_: object, seed: int, ids: Tensor, draw: int, start: int, stop: int, width: int, device: Any) -> Tensor:
        assert ids.device.type == "cpu" and torch.device(device) == meta
        return torch.empty(len(ids), stop - start, width, device=device)

    monkeypatch.setattr(noise, "_draw", draw)
    model, observed, ids = prepare(mode, "time_embed", langevin_noise=0.1, step_size_jitter=1.5)
    model.to(meta)
    output = model.training_step(observed.to(meta), ids, PLAN)
    result = model.evaluate(observed.to(meta), ids, 2)
    assert output.loss.device == output.step_energies.device == result.step_losses.device == result.energies.device
    assert all(p.grad is not None and p.grad.device == meta for p in model.parameters() if p.requires_grad)


@needs_gpu
@pytest.mark.parametrize("variant", VARIANTS)
@in_every_mode
def test_a_gpu_computes_what_the_cpu_does(mode: str, variant: str) -> None:
    """From the same states: the GPU draws other noise."""
    model, observed, ids = prepare(mode, variant, initial_state="zeros")
    there = deepcopy(model).to(GPU)
    expected, output = model.training_step(observed, ids, PLAN), there.training_step(observed.to(GPU), ids, PLAN)
    torch.testing.assert_close(output.step_losses.cpu(), expected.step_losses, rtol=1e-9, atol=0)
    torch.testing.assert_close(output.step_energies.cpu(), expected.step_energies, rtol=1e-9, atol=1e-12)
    compare_gradients(model, {name: gradient.cpu() for name, gradient in gradients(there).items()})


@needs_gpu
def test_low_precision_follows_on_a_gpu() -> None:
    model, observed, ids = prepare("probabilities", "time_embed", initial_state="zeros", step_size=0.1)
    expected = model.training_step(observed, ids, PLAN).loss.item()
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        lower = deepcopy(model).to(GPU, dtype)
        assert lower.training_step(observed.to(GPU), ids, PLAN).loss.item() == pytest.approx(expected, rel=tolerance)


@needs_gpu
def test_a_step_does_not_wait_for_a_gpu() -> None:
    model, observed, ids = prepare("probabilities", "time_embed", langevin_noise=0.1, step_size_jitter=1.5)
    model.to(GPU)
    observed = observed.to(GPU)
    model.training_step(observed, ids, PLAN)  # the first one sets libraries up
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.training_step(observed, ids, PLAN)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_memory_of_a_gpu_does_not_grow_with_the_steps() -> None:
    model, observed, ids = prepare("probabilities", "default")
    model.to(GPU)
    observed = observed.to(GPU)
    peaks = []
    for num_steps in (1, 1, 16):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model.training_step(observed, ids, StepPlan(num_steps))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[2] <= 1.05 * peaks[1], peaks
