"""The number and the size of the MCMC steps follow the configuration and nothing else."""

from collections import Counter
from itertools import pairwise

import pytest
import torch

from ebwm_dist.config.launch import notes
from ebwm_dist.config.schema import Config, MCMCConfig, TrainingConfig
from ebwm_dist.mcmc.schedule import StepPlan, plan_at


def test_constant_without_options():
    mcmc = MCMCConfig(num_steps=3)
    assert {plan_at(mcmc, 0, step, micro) for step in range(1, 50) for micro in range(3)} == {StepPlan(3, 1.0)}
    assert mcmc.max_mcmc_steps == 3


def test_number_of_steps_is_drawn_evenly_from_the_range():
    mcmc = MCMCConfig(num_steps=2, max_num_steps=4)
    counts = Counter(plan_at(mcmc, 5, step, micro).num_steps for step in range(1, 1001) for micro in range(3))
    assert set(counts) == {2, 3, 4} and mcmc.max_mcmc_steps == 4
    assert all(abs(count - 1000) < 6 * (3000 * 2 / 9) ** 0.5 for count in counts.values())


def test_seed_step_and_micro_step_change_the_draw_and_nothing_else_does():
    mcmc = MCMCConfig(num_steps=2, max_num_steps=5)

    def steps(seed, micro_step):
        return [plan_at(mcmc, seed, step, micro_step).num_steps for step in range(1, 101)]

    first = steps(0, 0)
    torch.manual_seed(1)
    assert steps(0, 0) == first
    for other in (steps(1, 0), steps(0, 1)):
        assert 5 < sum(a == b for a, b in zip(first, other, strict=True)) < 50
    assert 5 < sum(a == b for a, b in pairwise(first)) < 50


def test_number_of_steps_grows_from_one():
    mcmc = MCMCConfig(num_steps=4, num_steps_warmup=90)
    steps = [plan_at(mcmc, 0, step, 0).num_steps for step in range(1, 101)]
    assert steps == [1] * 29 + [2] * 30 + [3] * 30 + [4] * 11


def test_the_drawn_number_grows_too():
    mcmc = MCMCConfig(num_steps=3, max_num_steps=5, num_steps_warmup=100)
    drawn = [plan_at(MCMCConfig(num_steps=3, max_num_steps=5), 0, step, 0).num_steps for step in range(1, 201)]
    steps = [plan_at(mcmc, 0, step, 0).num_steps for step in range(1, 201)]
    assert steps[:20] == [1] * 20 and steps[99:] == drawn[99:]
    assert set(steps[49:52]) <= {2, 3} and set(steps[60:80]) >= {2, 3}
    assert all(low <= high for low, high in zip(steps, drawn, strict=True))


@pytest.mark.parametrize(("step", "scale"), [(1, 0.1), (5, 0.5), (10, 1.0), (11, 1.0)])
def test_step_size_grows_to_its_full_size(step, scale):
    assert plan_at(MCMCConfig(step_size_warmup=10), 0, step, 0).step_size_scale == pytest.approx(scale)


def test_warm_ups_longer_than_the_run_end_with_it() -> None:
    mcmc = MCMCConfig(num_steps=4, num_steps_warmup=100, step_size_warmup=100)
    config = Config(mcmc=mcmc, training=TrainingConfig(max_steps=10))
    assert [line.partition(" is more")[0] for line in notes(config)[-2:]] == [
        "mcmc.num_steps_warmup = 100",
        "mcmc.step_size_warmup = 100",
    ]
    plans = [plan_at(config.mcmc_of_run, 0, step, 0) for step in (1, 5, 10)]
    assert plans == [StepPlan(1, 0.1), StepPlan(2, 0.5), StepPlan(4, 1.0)]
