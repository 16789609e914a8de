"""Errors of predicted frames against their definitions."""

from __future__ import annotations

import pytest
import torch

from ebwm_dist.config.schema import Config, MCMCConfig, ModelConfig
from ebwm_dist.data.loading.stream import Batch
from ebwm_dist.encoders.preprocessing import FramePreprocessor
from ebwm_dist.evaluation.frames import frame_errors, similarity
from ebwm_dist.mcmc.build import build_model
from ebwm_dist.mcmc.diffusion import DiffusionModel


def frames(seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (2, 9, 8, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_similarity() -> None:
    """Of one window, by hand; of a frame with itself; of flat frames, whose structure is the same."""
    a, b = frames(0)[:, :7, :7], frames(1)[:, :7, :7]
    x, y = (v.double().permute(0, 3, 1, 2).flatten(2) for v in (a, b))
    mx, my = x.mean(-1), y.mean(-1)
    covariance = ((x - mx[..., None]) * (y - my[..., None])).mean(-1)
    c1, c2 = 2.55**2, 7.65**2
    by_hand = (2 * mx * my + c1) / (mx**2 + my**2 + c1) * (2 * covariance + c2)
    by_hand /= x.var(-1, correction=0) + y.var(-1, correction=0) + c2
    torch.testing.assert_close(similarity(a, b), by_hand.mean(-1))
    torch.testing.assert_close(similarity(frames(0), frames(0)), torch.ones(2).double())
    dark, bright = (torch.full((1, 8, 8, 3), value, dtype=torch.uint8) for value in (50, 150))
    assert similarity(dark, bright).item() == pytest.approx((2 * 50 * 150 + c1) / (50**2 + 150**2 + c1))


@pytest.mark.parametrize("patches", [1, 4])
@pytest.mark.parametrize("kind", ["ebt", "ar", "dit"])
def test_errors_of_every_step(kind: str, patches: int) -> None:
    """Rows that only fill up do not count, and the last step's error is the loss that the model reports.

    A frame's error is the mean over its patches.
    """
    torch.manual_seed(0)
    width = 12 // patches
    config = Config(
        model=ModelConfig(
            kind=kind, embedding_dim=width, dim=16, num_heads=2, num_layers=1, block_size=patches, prefix="block"
        ),
        mcmc=MCMCConfig(num_steps=2, step_size=0.5),
    )
    model = build_model(config, None)
    frames = torch.randn(3, 6, 12)
    observed = frames.unflatten(2, (patches, width)).flatten(1, 2)
    batch = Batch(frames, torch.arange(3), [""] * 3, torch.tensor([True, True, False]))
    preprocess = FramePreprocessor(torch.device("cpu"), frame_tokens=patches)
    found = frame_errors(model, [batch], 2, preprocess).figures()["frames"]
    assert list(found) == ["copy", *{"ebt": "012", "ar": "1", "dit": ["3", "10", "50"]}[kind]]
    if isinstance(model, DiffusionModel):
        predicted = model.sample(model.layout.context(observed[:2]), torch.arange(2), 0, 3)
        truth = frames[:2, 1:].unflatten(2, (patches, width)).flatten(1, 2)
        assert found["3"]["mse"] == pytest.approx((predicted - truth).square().mean().item(), rel=1e-5)
    else:
        losses, _, tokens = model.evaluate(observed[:2], torch.arange(2), 2)
        for step, loss in enumerate(losses, 1):
            assert found[str(step)]["smooth_l1"] == pytest.approx((loss.sum() / tokens.sum()).item(), rel=1e-5)
    difference = (frames[:2, :-1] - frames[:2, 1:]).double()
    assert found["copy"]["mse"] == pytest.approx(difference.square().mean().item(), rel=1e-5)
    assert set(found["copy"]) == {"mse", "smooth_l1", "mse_minus_copy"}
    *_, last = found.values()
    assert last["mse_minus_copy"][0] == pytest.approx(last["mse"] - found["copy"]["mse"], rel=1e-5)
    assert last["mse_minus_copy"][1] > 0
