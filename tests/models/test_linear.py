"""What the tangent pass takes from the candidate pass changes no gradient, and spares what it is there to spare."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ebwm_dist.config.schema import ModelConfig
from ebwm_dist.models.energy_transformer import EnergyTransformer
from ebwm_dist.models.linear import Kept, TangentLinear
from tests.models.test_flops import FlopCounter

VARIANTS = ["default", "time_embed", "adaln"]


def setup(variant: str, dtype: torch.dtype = torch.float64) -> tuple[EnergyTransformer, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    config = ModelConfig(
        variant=variant, num_landscapes=1, dim=16, num_heads=2, num_layers=3, energy_head="bilinear", vocab_size=30
    )
    model = EnergyTransformer(config).to(dtype)
    for weight in model.parameters():  # gates of adaLN start at zero, which would hide what is behind them
        nn.init.normal_(weight, std=0.3)
    observed, candidate, tangent = torch.randn(3, 2, 7, 16, dtype=dtype)
    return model, observed, candidate, tangent


def gradients(model: EnergyTransformer, observed: Tensor, candidate: Tensor, tangent: Tensor, keep: bool):
    """Return dE/de, and the gradients of the summed derivatives to the candidate, to context and weights."""
    with torch.no_grad():
        pairs = model.context(observed, 0)
    context = tuple(tuple(x.detach().requires_grad_() for x in pair) for pair in pairs)
    _, gradient, kept = model.energy_and_gradient(candidate, context, 0, 0, keep=keep)
    leaf = candidate.detach().requires_grad_()
    _, derivative = model.energy_with_tangent(leaf, tangent, context, 0, 0, kept)
    wanted = {"candidate": leaf, **{f"context {i}": x for i, x in enumerate(sum(context, ()))}}
    wanted |= dict(model.named_parameters())
    found = torch.autograd.grad(derivative.sum(), list(wanted.values()), allow_unused=True)
    return gradient, derivative, dict(zip(wanted, found, strict=True)), kept


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_passes_that_keep_nothing(variant: str) -> None:
    model, observed, candidate, tangent = setup(variant)
    gradient, derivative, found, kept = gradients(model, observed, candidate, tangent, keep=True)
    plain_gradient, plain_derivative, expected, nothing = gradients(model, observed, candidate, tangent, keep=False)
    assert len(kept) == 3 and nothing == ()
    torch.testing.assert_close(gradient, plain_gradient, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(derivative, plain_derivative, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close((gradient * tangent).sum(-1), derivative, rtol=1e-10, atol=1e-12)
    for name, want in expected.items():
        assert (want is None) == (found[name] is None), name
        if want is not None:
            assert want.norm() > 0, name
            torch.testing.assert_close(found[name], want, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("part", range(4))
def test_every_adjoint_that_is_kept_is_used(part: int) -> None:
    """The control: an adjoint that is not the candidate pass's changes gradients."""
    model, observed, candidate, tangent = setup("default")
    with torch.no_grad():
        context = model.context(observed, 0)
    _, _, kept = model.energy_and_gradient(candidate, context, 0, 0, keep=True)
    wrong: list[Kept] = [(outputs, tuple(a * (1 + (i == part)) for i, a in enumerate(own))) for outputs, own in kept]
    found = []
    for one in (kept, tuple(wrong)):
        _, derivative = model.energy_with_tangent(candidate, tangent, context, 0, 0, one)
        found.append(torch.autograd.grad(derivative.sum(), model.blocks[0].attention.wq.weight)[0])
    assert (found[0] - found[1]).norm() > 1e-3 * found[0].norm()


def test_linear_layers_compute_four_products_instead_of_six() -> None:
    torch.manual_seed(0)
    layer, h, tangent, output, adjoint = TangentLinear(12, 8), *torch.randn(4, 2, 5, 12)
    output = layer(h).detach()
    counts = []
    for kept in ((), (output, adjoint)):
        with FlopCounter() as counter:
            pair = layer(h.requires_grad_(), tangent.requires_grad_(), *kept)
            (pair[0] + 2 * pair[1]).sum().backward()
        counts.append(counter.total / (2 * 2 * 5 * 12 * 8))
    assert counts == [6, 4]


def test_what_is_kept_has_no_graph() -> None:
    model, observed, candidate, _ = setup("default")
    with torch.no_grad():
        context = model.context(observed, 0)
    _, _, kept = model.energy_and_gradient(candidate, context, 0, 0, keep=True)
    for outputs, adjoints in kept:
        assert [x.shape[-1] for x in adjoints] == list(model.blocks.input_widths)
        assert not any(x.requires_grad for x in (*outputs, *adjoints))
