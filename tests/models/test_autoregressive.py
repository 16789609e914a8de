"""The autoregressive twins: their losses in plain words, their gradients, and what they may look at."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ebwm_dist.config.schema import Config, ModelConfig
from ebwm_dist.mcmc.build import build_model
from ebwm_dist.models.autoregressive import AutoregressiveTransformer

DIM, LENGTH = 16, 7
WIDTHS = pytest.mark.parametrize("width", [DIM, 10], ids=["as wide", "projected"])


def build(width: int, kind: str = "ar") -> AutoregressiveTransformer:
    torch.manual_seed(0)
    model = ModelConfig(kind=kind, embedding_dim=width, dim=DIM, num_heads=2, num_layers=2)
    built = build_model(Config(model=model), pad_id=None)
    assert isinstance(built, AutoregressiveTransformer)
    return built.double()


def frames(width: int) -> Tensor:
    """Return embeddings [B, S+1, E], some of which are so far from any prediction that the loss is linear there."""
    return 2 * torch.randn(3, LENGTH + 1, width, generator=torch.Generator().manual_seed(1)).double()


@WIDTHS
def test_the_loss_is_smooth_l1_on_the_next_embedding(width: int) -> None:
    model, observed = build(width), frames(width)
    error = (model.predict(observed[:, :-1]) - observed[:, 1:]).abs()
    assert (error < 1).any() and (error > 1).any()
    losses = torch.where(error < 1, error.square() / 2, error - 0.5)
    assert torch.allclose(model.summed_loss(observed[:, :-1], observed[:, 1:]) / losses[..., 0].numel(), losses.mean())
    result = model.evaluate(observed, torch.arange(3), num_steps=5)
    assert torch.allclose(result.step_losses, losses.mean(-1).sum(-1)[None])
    assert result.energies is None and result.tokens.tolist() == [LENGTH] * 3


@pytest.mark.parametrize("padding", [0, 6])
def test_the_loss_of_tokens_is_the_mean_cross_entropy_over_the_targets(padding: int) -> None:
    torch.manual_seed(0)
    config = Config(model=ModelConfig(kind="ar", vocab_size=41, dim=DIM, num_heads=2, num_layers=2))
    model = build_model(config, pad_id=3).double()
    tokens = torch.randint(4, 41, (3, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    tokens[0, LENGTH + 1 - padding :] = 3
    logits, targets = model.predict(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
    expected = F.cross_entropy(logits, targets, ignore_index=3)
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    output = model.training_step(tokens, torch.arange(3))
    assert torch.allclose(output.loss, expected) and torch.allclose(output.step_losses, expected)
    for weight, gradient in zip(model.parameters(), wanted, strict=True):
        assert torch.allclose(weight.grad, gradient)


def test_the_head_runs_at_chosen_targets_only() -> None:
    torch.manual_seed(0)
    config = Config(model=ModelConfig(kind="ar", vocab_size=41, dim=DIM, num_heads=2, num_layers=2))
    model = build_model(config, pad_id=3).double()
    tokens, rows = torch.randint(4, 41, (3, LENGTH + 1), generator=torch.Generator().manual_seed(1)), []
    targets = tokens[:, 1:].clone()
    targets[0], targets[1, :3], targets[2, 5:] = 3, 3, 3
    model.head.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].flatten(0, -2).shape[0]))
    expected = F.cross_entropy(model.predict(tokens[:, :-1]).flatten(0, 1), targets.flatten(), ignore_index=3)
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    output = model.training_step(tokens, torch.arange(3), targets=targets)
    assert torch.allclose(output.loss, expected)
    for weight, gradient in zip(model.parameters(), wanted, strict=True):
        assert torch.allclose(weight.grad, gradient)
    found = model.evaluate(tokens, torch.arange(3), 1, targets)
    assert found.tokens.tolist() == [0, 4, 5] and found.step_losses[0, 0] == 0
    assert torch.allclose(found.step_losses.sum() / 9, expected)
    assert rows == [3 * LENGTH, 9, 9]


def test_a_micro_batch_may_have_no_target() -> None:
    config = Config(model=ModelConfig(kind="ar", vocab_size=41, dim=DIM, num_heads=2, num_layers=2))
    model, tokens = build_model(config, pad_id=3), torch.randint(4, 41, (3, LENGTH + 1))
    output = model.training_step(tokens, torch.arange(3), targets=torch.full((3, LENGTH), 3), num_targets=5)
    assert output.loss == 0 and all(not weight.grad.any() for weight in model.parameters())


@WIDTHS
def test_gradients_equal_finite_differences(width: int) -> None:
    model, observed = build(width), frames(width)
    output = model.training_step(observed, torch.arange(3), num_targets=50)
    assert output.loss == output.step_losses[0] and not output.loss.requires_grad
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        start, direction, h = weight.detach().clone(), torch.randn_like(weight), 1e-6
        ends = []
        for sign in (1, -1):
            weight.data = start + sign * h * direction
            ends.append(model.summed_loss(observed[:, :-1], observed[:, 1:]).item() / 50)
        weight.data = start
        slope = (ends[0] - ends[1]) / (2 * h)
        assert (weight.grad * direction).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-9), name


@WIDTHS
def test_nobody_sees_the_future(width: int) -> None:
    model, observed, position = build(width), frames(width), 4
    before = model.predict(observed)
    observed[:, position] += 1
    touched = (model.predict(observed) != before).any(-1)
    assert not touched[:, :position].any() and touched[:, position:].all()


@WIDTHS
@pytest.mark.parametrize("kind", ["ar", "ebt"])
def test_bf16_weights_take_embeddings_in_fp32(kind: str, width: int) -> None:
    """As under bf16 training: losses and states stay in float32, and are near those of float32 weights."""
    model = ModelConfig(kind=kind, embedding_dim=width, dim=DIM, num_heads=2, num_layers=2)
    config = Config(model=model)
    config.mcmc.step_size = 1.0
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        network = build_model(config, pad_id=None).to(dtype)
        loss = network.training_step(frames(width).float(), torch.arange(3), network.plan(1, 0)).loss
        assert loss.dtype == torch.float32
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
