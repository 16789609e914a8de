"""Noise is reproducible from its coordinates alone, and unrelated between them."""

import pytest
import torch

from ebwm_dist.mcmc.noise import BLOCK, INITIAL, LANGEVIN, STEP_SIZE, mix_seed, normal, uniform

POSITIONS = 3 * BLOCK + 5
IDS = torch.tensor([0, 7, 2**63 - 1])
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("draw", [normal, uniform])
@pytest.mark.parametrize("width", [1, 3, 40])
@pytest.mark.parametrize("size", [1, 7, BLOCK, BLOCK + 1, 2 * BLOCK])
def test_slices_join_to_the_whole(draw, width, size, device):
    device = torch.device(device)
    whole = draw(3, IDS, LANGEVIN, 0, POSITIONS, width, device)
    assert whole.shape == (3, POSITIONS, width) and whole.dtype == torch.float32 and whole.device.type == device.type
    slices = [draw(3, IDS, LANGEVIN, i, min(i + size, POSITIONS), width, device) for i in range(0, POSITIONS, size)]
    assert torch.equal(torch.cat(slices, 1), whole)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("draw", [normal, uniform])
def test_a_sample_does_not_depend_on_its_batch(draw, device):
    device = torch.device(device)
    whole = draw(3, IDS, INITIAL, 0, POSITIONS, 4, device)
    for row, sample_id in zip(whole, IDS, strict=True):
        assert torch.equal(draw(3, sample_id[None], INITIAL, 0, POSITIONS, 4, device)[0], row)
    assert torch.equal(draw(3, IDS.flip(0), INITIAL, 0, POSITIONS, 4, device), whole.flip(0))


@pytest.mark.parametrize("draw", [normal, uniform])
def test_every_coordinate_changes_the_noise(draw):
    rows = [
        draw(seed, torch.tensor([sample]), index, start, start + BLOCK, 8).flatten()
        for seed in (0, 1)
        for sample in (0, 1)
        for index in (INITIAL, STEP_SIZE, LANGEVIN, LANGEVIN + 1)
        for start in (0, BLOCK)
    ]
    correlation = torch.corrcoef(torch.stack(rows)) - torch.eye(len(rows))
    assert correlation.abs().max() < 6 / (BLOCK * 8) ** 0.5  # six standard deviations


def test_global_generator_is_left_alone():
    before = torch.get_rng_state()
    normal(0, IDS, INITIAL, 0, 40, 3)
    uniform(0, IDS, INITIAL, 0, 40, 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_moments():
    x = normal(0, torch.arange(20), INITIAL, 5, 5 + 2 * BLOCK, 50)
    assert x.mean().abs() < 0.02 and (x.std() - 1).abs() < 0.02
    x = uniform(0, torch.arange(20), INITIAL, 5, 5 + 2 * BLOCK, 50)
    assert (x.mean() - 0.5).abs() < 0.01 and x.min() >= 0 and x.max() < 1 and (x.var() - 1 / 12).abs() < 0.002


def test_empty_slice():
    assert normal(0, IDS, INITIAL, 4, 4, 3).shape == (3, 0, 3)


def test_seeds_do_not_collide_and_the_order_counts():
    seeds = {mix_seed(a, b, c) for a in range(20) for b in range(20) for c in range(20)}
    assert len(seeds) == 20**3 and all(0 <= seed < 2**63 for seed in seeds)
    assert mix_seed(1, 2) != mix_seed(2, 1) and mix_seed(0) != mix_seed(0, 0)
    ones = sum(seed.bit_count() for seed in seeds) / len(seeds)
    assert abs(ones - 31.5) < 0.3
