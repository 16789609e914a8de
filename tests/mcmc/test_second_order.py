"""The first-order engine against a double backward in float64."""

from __future__ import annotations

import pytest
import torch

from ebwm_dist.config import MCMCConfig, ModelConfig
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from tests.oracle import DenseOracle

VOCAB, PAD = 61, 3


def build(variant: str, update: str = "probabilities", num_steps: int = 2, **mcmc) -> EnergyBasedTransformer:
    torch.manual_seed(0)
    model = ModelConfig(
        variant=variant,
        num_landscapes=1 if variant == "default" else 2,
        vocab_size=VOCAB,
        dim=32,
        num_heads=4,
        num_layers=3,
        ffn_multiplier=1.5,
    )
    step_size = {"probabilities": 3.0, "logits": 40.0, "mirror": 3.0}[update]
    config = MCMCConfig(num_steps=num_steps, step_size=step_size, update=update, **mcmc)
    built = EnergyBasedTransformer(model, config, PAD, seed=5).double()
    for name, parameter in built.named_parameters():
        if "norm" in name:  # ones and zeros would hide a wrong gain or bias
            parameter.data += 0.3 * torch.randn_like(parameter)
        if name.endswith("bias"):
            parameter.data += 0.1 * torch.randn_like(parameter)
    return built


def batch(size: int = 2, length: int = 13) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(4, VOCAB, (size, length), generator=generator), torch.arange(7, 7 + size)


def oracle_of(model: EnergyBasedTransformer, variant: str) -> DenseOracle:
    return DenseOracle(dict(model.state_dict()), num_heads=4, variant=variant)


@pytest.mark.parametrize("update", ["probabilities", "logits", "mirror"])
@pytest.mark.parametrize("variant", ["default", "time_embed", "adaln"])
@pytest.mark.parametrize("num_steps", [1, 3])
def test_gradients_equal_a_double_backward(variant: str, update: str, num_steps: int) -> None:
    model, (tokens, ids) = build(variant, update, num_steps), batch()
    oracle = oracle_of(model, variant)
    expected = oracle.loss(tokens, model.space.start(ids, 5, 12), num_steps, update)
    expected.backward()

    output = model(tokens, ids)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert output.step_losses.mean().item() == pytest.approx(expected.item(), rel=1e-12)
    for name, parameter in model.named_parameters():
        want = oracle.w[name].grad
        if name == "transformer.time_embeddings.weight" and num_steps == 1:
            assert not want[1].any()  # the second landscape has not been visited
        error = (parameter.grad - want).norm() / want.norm()
        assert want.norm() > 0 and error < 1e-9, f"{name}: {error:.1e}"


def test_gradients_of_the_second_order_part_matter() -> None:
    """Guard the test above: without the tangent pass the blocks' gradients would be zero."""
    model, (tokens, ids) = build("default"), batch()
    oracle = oracle_of(model, "default")
    oracle.loss(tokens, model.space.start(ids, 5, 12), 2, "probabilities").backward()
    blocks = [w.grad.norm() for name, w in oracle.w.items() if ".blocks." in name]
    assert min(blocks) > 1e-4


def test_padding_counts_as_nothing() -> None:
    """Padded targets add neither loss nor gradient, and the rest is divided by the same count."""
    model, (tokens, ids) = build("default"), batch()
    full = [model(tokens[row : row + 1], ids[row : row + 1]).loss for row in range(2)]
    padded = tokens.clone()
    padded[1, 1:] = PAD
    assert model(padded, ids).loss.item() == pytest.approx(full[0].item() / 2, rel=1e-12)


def test_noise_belongs_to_the_sample() -> None:
    """A sample starts from the same noise in any batch, on any rank; other samples and seeds start elsewhere."""
    space = build("default").space
    together = space.start(torch.tensor([4, 9]), 0, 5)
    assert torch.equal(space.start(torch.tensor([9]), 0, 5)[0], together[1])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(space.start(torch.tensor([9]), 1, 5)[0], together[1])
    assert abs(together.mean()) < 0.2 and abs(together.std() - 1) < 0.2


def test_step_size_has_a_floor() -> None:
    model = build("default")
    model.space.step_size.alpha.data.fill_(-2.0)
    assert model.space.step_size().item() == pytest.approx(1e-4)


@pytest.mark.parametrize("variant", ["default", "time_embed", "adaln"])
def test_refinement_follows_training(variant: str) -> None:
    """Evaluation walks the same states as training, repeats the last landscape, and leaves no graph."""
    model, (tokens, ids) = build(variant, initial_state="zeros"), batch()
    trained = model(tokens, ids)
    result = model.evaluate(tokens, ids, num_steps=4)
    count = tokens[:, 1:].numel()
    assert torch.allclose(result.step_losses[:2].sum(-1) / count, trained.step_losses, rtol=1e-12)
    assert torch.allclose(result.energies[:2].sum(-1) / count, trained.step_energies, rtol=1e-12)
    assert not result.step_losses.requires_grad and all(p.grad is None for p in model.parameters())

    oracle = oracle_of(model, variant)
    with torch.enable_grad():
        third = oracle.loss(tokens, torch.zeros(2, 12, VOCAB).double(), 3, "probabilities") * 3
    assert result.step_losses[:3].sum().item() / count == pytest.approx(third.item(), rel=1e-9)


@pytest.mark.parametrize("variant", ["default", "time_embed", "adaln"])
def test_next_token_is_the_last_position(variant: str) -> None:
    """Refining only the last candidate gives the logits that refining all of them gives there."""
    model, (tokens, ids) = build(variant, initial_state="zeros"), batch()
    state = model.space.start(ids, 5, 13)
    for _, refined in model.refine(tokens, state, 3):
        state = refined
    assert torch.allclose(model.next_token_logits(tokens, 3, ids), state[:, -1], rtol=1e-10)
