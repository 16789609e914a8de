"""Every way to refine and to train, against a double backward through one step or the whole chain, in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from ebwm_dist.mcmc import vocabulary
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from ebwm_dist.mcmc.schedule import StepPlan
from tests.mcmc.small_models import (
    LENGTH,
    PAD,
    UPDATES,
    VARIANTS,
    VOCAB,
    batch,
    build,
    check_finite_differences,
    check_slices,
    check_training_step,
    compare_gradients,
    expect,
    gradients,
    oracle_of,
    settings,
)

MODES = list(itertools.product(["truncated", "full"], ["mean", "last"]))
in_every_mode = pytest.mark.parametrize(("gradient", "loss"), MODES)


def fill(model: EnergyBasedTransformer, observed: Tensor) -> None:
    """Put a record for each row of `observed` into the replay buffer, of states other than any start."""
    state = 0.5 * torch.randn(len(observed), LENGTH, model.space.state_width).double()
    model.replay.push(observed, torch.arange(100, 100 + len(observed)), model.space.compress(state))


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("variant", VARIANTS)
@in_every_mode
def test_gradients_equal_a_double_backward(gradient: str, loss: str, variant: str, update: str) -> None:
    mcmc = settings(update, num_steps=3, gradient=gradient, loss=loss)
    check_training_step(build(mcmc, variant, position_chunk=4), mcmc, *batch())


@pytest.mark.parametrize(("num_steps", "position_chunk"), [(1, 5), (2, 1), (4, 5), (4, 128), (3, LENGTH)])
@in_every_mode
def test_any_number_of_steps_and_positions(gradient: str, loss: str, num_steps: int, position_chunk: int) -> None:
    """Four steps on two landscapes of the `time_embed` variant visit the last one three times."""
    mcmc = settings("mirror", num_steps=num_steps, gradient=gradient, loss=loss)
    model = build(mcmc, "time_embed", position_chunk=position_chunk)
    check_training_step(model, mcmc, *batch())


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tied": ({}, {"tied": True}),
    "fixed alpha": ({"learn_step_size": False}, {}),
    "zeros": ({"initial_state": "zeros"}, {}),
    "spread": ({"step_size_jitter": 2.0}, {}),
    "langevin": ({"langevin_noise": 0.7}, {}),
    "checkpointed": ({}, {"activation_checkpointing": "block"}),
}
# Every option in every mode; rules and variants take turns.
CASES = [
    (option, *mode, *turn)
    for (option, mode), turn in zip(
        itertools.product(OPTIONS, MODES), itertools.cycle(zip(UPDATES, VARIANTS, strict=True)), strict=False
    )
]


@pytest.mark.parametrize(("option", "gradient", "loss", "update", "variant"), CASES)
def test_options(option: str, gradient: str, loss: str, update: str, variant: str) -> None:
    changes, arguments = OPTIONS[option]
    mcmc = settings(update, gradient=gradient, loss=loss, **changes)
    check_training_step(build(mcmc, variant, position_chunk=4, **arguments), mcmc, *batch())


@pytest.mark.parametrize("update", UPDATES)
@in_every_mode
def test_options_together(gradient: str, loss: str, update: str) -> None:
    """Also with padding, replayed rows and smaller steps."""
    mcmc = settings(
        update,
        gradient=gradient,
        loss=loss,
        step_size_jitter=2.0,
        langevin_noise=0.7,
        learn_step_size=False,
        replay_size=8,
    )
    model = build(mcmc, "time_embed", tied=True, position_chunk=5, activation_checkpointing="block")
    tokens, ids = batch()
    fill(model, tokens.roll(3, dims=1).repeat(2, 1))
    tokens[0, 7:] = PAD
    check_training_step(model, mcmc, tokens, ids, StepPlan(3, step_size_scale=0.4))


@pytest.mark.parametrize("update", UPDATES)
@in_every_mode
def test_slices_of_the_vocabulary_products(
    gradient: str, loss: str, update: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows that meet the vocabulary at once divide neither the batch nor the positions."""
    monkeypatch.setattr(vocabulary, "SLICE_ELEMENTS", 3 * VOCAB)
    mcmc = settings(update, gradient=gradient, loss=loss)
    check_training_step(build(mcmc, position_chunk=4), mcmc, *batch())


@in_every_mode
def test_padding_and_plan(gradient: str, loss: str) -> None:
    mcmc = settings(gradient=gradient, loss=loss)
    tokens, ids = batch()
    check_training_step(build(mcmc, position_chunk=4), mcmc, tokens, ids, StepPlan(3, step_size_scale=0.25))
    tokens[0, 7:] = PAD
    check_training_step(build(mcmc, position_chunk=4), mcmc, tokens, ids)


@in_every_mode
def test_replayed_rows_count_like_any_other(gradient: str, loss: str) -> None:
    """Rows are replayed once there are enough, from the kept states, and the final states of all rows are kept."""
    mcmc = settings(gradient=gradient, loss=loss, replay_size=3, replay_fraction=1.0, langevin_noise=0.2)
    model, (tokens, ids) = build(mcmc, position_chunk=4), batch()
    expected = expect(oracle_of(model), model, mcmc, tokens, ids)
    assert len(expected.state) == 2
    check_training_step(model, mcmc, tokens, ids)
    assert len(model.replay) == 2
    kept = model.replay.state_dict()
    assert torch.equal(kept["observed"], tokens) and torch.equal(kept["sample_ids"], ids)
    expanded = model.space.expand(kept["state"]).softmax(-1)
    assert torch.allclose(expanded, expected.state.softmax(-1), atol=1e-2)

    model.zero_grad()
    assert len(expect(oracle_of(model), model, mcmc, tokens, ids).state) == 4
    check_training_step(model, mcmc, tokens, ids)
    assert len(model.replay) == 3


def test_every_sequence_is_in_the_buffer_once() -> None:
    """Replayed rows return with the state that they have been refined to, in place of the earlier one."""
    mcmc = settings(replay_size=64)
    model, states = build(mcmc), {}
    for number in range(4):
        tokens, ids = batch(4)
        model.training_step((tokens + number) % VOCAB, ids + 4 * number, StepPlan(2))
        kept = model.replay.state_dict()
        rows = [tuple(row) for row in kept["observed"].tolist()]
        assert len(set(rows)) == len(rows) == 4 * (number + 1)
        before, states = states, dict(zip(rows, kept["state"]["values"], strict=True))
        assert sum(not torch.equal(states[row], value) for row, value in before.items()) == (2 if number else 0)


@pytest.mark.parametrize(("top_k", "kept"), [(10, 4), (11, 0), (VOCAB, 0)])
def test_a_buffer_of_another_top_k_is_not_restored(top_k: int, kept: int) -> None:
    model, other = build(settings(replay_size=8, replay_top_k=10)), build(settings(replay_size=8, replay_top_k=top_k))
    model.training_step(*batch(4), StepPlan(1))
    other.load_extra_state(model.extra_state())
    assert len(other.replay) == kept
    other.training_step(*batch(4), StepPlan(1))


@in_every_mode
def test_the_slices_do_not_matter(gradient: str, loss: str) -> None:
    mcmc = settings(num_steps=3, gradient=gradient, loss=loss, step_size_jitter=1.5, langevin_noise=0.3)
    check_slices(lambda positions: build(mcmc, "time_embed", position_chunk=positions), *batch())


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("loss", ["mean", "last"])
def test_chain_gradients_equal_finite_differences(loss: str, update: str) -> None:
    """The chain's gradient is the derivative of the loss, without any oracle: along a random direction of weights."""
    mcmc = settings(update, num_steps=3, gradient="full", loss=loss, langevin_noise=0.3, step_size_jitter=1.5)
    check_finite_differences(build(mcmc, "adaln", position_chunk=4), *batch())


@pytest.mark.parametrize("update", UPDATES)
def test_modes_differ_only_where_they_should(update: str) -> None:
    """With one step all modes are the same; with more, each has a gradient of its own."""

    def gradient_of(num_steps: int, gradient: str, loss: str) -> Tensor:
        model = build(settings(update, gradient=gradient, loss=loss))
        model.training_step(*batch(), StepPlan(num_steps))
        return torch.cat([g.flatten() for g in gradients(model).values()])

    for (mode, one), (other, another) in itertools.combinations([(m, gradient_of(1, *m)) for m in MODES], 2):
        assert (one - another).norm() < 1e-10 * one.norm(), (mode, other)
    for (mode, one), (other, another) in itertools.combinations([(m, gradient_of(3, *m)) for m in MODES], 2):
        assert (one - another).norm() > 1e-2 * max(one.norm(), another.norm()), (mode, other)


@in_every_mode
def test_the_second_order_part_matters(gradient: str, loss: str) -> None:
    """Guard the tests above: most of the oracle's gradient of the blocks is there, and none of it is first order."""
    mcmc = settings(num_steps=3, gradient=gradient, loss=loss)
    model = build(mcmc)
    oracle = oracle_of(model)
    expect(oracle, model, mcmc, *batch()).loss.backward()
    assert min(leaf.grad.norm() for name, leaf in oracle.w.items() if ".blocks." in name) > 1e-4


@in_every_mode
def test_the_truncated_objective_trains_on_the_last_step_alone(gradient: str, loss: str) -> None:
    """`last` with `step` is one step from the state that the earlier ones have led to; no other mode is."""
    mcmc = settings(num_steps=3, gradient=gradient, loss=loss)
    model, (tokens, ids) = build(mcmc), batch()
    state = expect(oracle_of(model), model, mcmc, tokens, ids, StepPlan(2)).state.detach()
    oracle = oracle_of(model)
    oracle.refine(tokens, state, 1).loss.backward()
    model.training_step(tokens, ids, StepPlan(3))
    errors = [(p.grad - oracle.w[name].grad).norm() / p.grad.norm() for name, p in model.named_parameters()]
    assert (max(errors).item() < 1e-9) == ((gradient, loss) == ("truncated", "last"))


@in_every_mode
def test_gradients_accumulate(gradient: str, loss: str) -> None:
    model = build(settings(gradient=gradient, loss=loss), position_chunk=4)
    for _ in range(2):
        model.training_step(*batch(), StepPlan(2))
    twice = gradients(model)
    model.training_step(*batch(), StepPlan(2))
    compare_gradients(model, {name: gradient / 2 for name, gradient in twice.items()}, tolerance=1e-12)


@in_every_mode
def test_the_number_of_targets_divides_every_gradient_once(gradient: str, loss: str) -> None:
    model = build(settings(num_steps=3, gradient=gradient, loss=loss), "time_embed", position_chunk=4)
    plain_output = model.training_step(*batch(), StepPlan(3))
    plain = gradients(model)
    output = model.training_step(*batch(), StepPlan(3), num_targets=8 * 2 * LENGTH)
    compare_gradients(model, {name: gradient / 8 for name, gradient in plain.items()}, tolerance=1e-12)
    for value, other in zip(output[:4], plain_output[:4], strict=True):
        assert torch.allclose(value, other / 8, rtol=1e-12)


@in_every_mode
def test_weights_are_used_only_inside_the_passes(gradient: str, loss: str) -> None:
    """Every use of a module that owns weights is within a call of `forward`, which is what engines wrap."""
    model = build(settings(gradient=gradient, loss=loss), "adaln", position_chunk=4)
    inside, outside = [], []
    names = {module: name for name, module in model.named_modules()}

    def forward(*args: Any) -> Any:
        inside.append(args[0])
        result = model(*args)
        inside.pop()
        return result

    for module in model.modules():
        if list(module.parameters(recurse=False)):
            module.register_forward_pre_hook(lambda module, _: None if inside else outside.append(names[module]))
    model.training_step(*batch(), StepPlan(2), forward=forward)
    assert not outside
    through_forward = gradients(model)
    model.training_step(*batch(), StepPlan(2))
    compare_gradients(model, through_forward, tolerance=1e-12)
