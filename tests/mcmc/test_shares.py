"""Shares of the positions of the same sequences: what they compute adds up to the whole step, in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from ebwm_dist.mcmc.schedule import StepPlan
from ebwm_dist.mcmc.slices import Share, Slice, slices
from tests.mcmc.small_models import LENGTH, PAD, UPDATES, VARIANTS, batch, build, gradients, settings
from tests.mcmc.test_embedding import embedding_settings, frames
from tests.mcmc.test_targets import CHOSEN, chosen_targets

Build = Callable[[], EnergyBasedTransformer]
NOISE = {"langevin_noise": 0.5, "step_size_jitter": 2.0}
COUNTS = (2, 3, 5)
MODES = [("truncated", "mean"), ("truncated", "last"), ("full", "ramp")]


def check(build_model: Build, counts: tuple[int, ...], *batches: Any, steps: int = 2, **arguments: Any) -> None:
    """Compare the sums over shares to one process, over one training step after the other."""
    whole = build_model()
    expected = [(whole.training_step(*b, StepPlan(steps), **arguments), gradients(whole)) for b in batches]
    for count in counts:
        models = [build_model() for _ in range(count)]
        for number, model in enumerate(models):
            model.share_positions(Share(number, count))
        for b, (wanted, of_whole) in zip(batches, expected, strict=True):
            outputs = [model.training_step(*b, StepPlan(steps), **arguments) for model in models]
            for name in ("loss", "step_losses", "step_energies", "step_gradient_norms"):
                total = sum(getattr(output, name) for output in outputs)
                torch.testing.assert_close(total, getattr(wanted, name), rtol=1e-10, atol=1e-12, msg=name)
            parts = [gradients(model) for model in models]
            assert all(part.keys() == of_whole.keys() for part in parts)
            for name, want in of_whole.items():
                got = sum(part[name] for part in parts)
                assert (got - want).norm() <= 1e-9 * want.norm() + 1e-13, (count, name)


@pytest.mark.parametrize(("gradient", "loss"), MODES)
@pytest.mark.parametrize(("variant", "update"), list(zip(VARIANTS, UPDATES, strict=True)))
def test_shares_add_up(gradient: str, loss: str, variant: str, update: str) -> None:
    mcmc = settings(update, gradient=gradient, loss=loss, **NOISE)
    check(lambda: build(mcmc, variant, position_chunk=4), COUNTS if variant == "adaln" else (3,), batch(), steps=3)


@pytest.mark.parametrize(("gradient", "loss"), MODES)
def test_shares_of_chosen_targets_add_up(gradient: str, loss: str) -> None:
    tokens, ids = batch()
    mcmc = settings(gradient=gradient, loss=loss, **NOISE)
    check(lambda: build(mcmc, position_chunk=2), COUNTS, (tokens, ids), targets=chosen_targets(tokens))


@pytest.mark.parametrize("initial_state", ["random_noise", "most_recent_embedding"])
@pytest.mark.parametrize(("gradient", "loss"), MODES)
def test_shares_of_embeddings_add_up(gradient: str, loss: str, initial_state: str) -> None:
    mcmc = embedding_settings(gradient=gradient, loss=loss, initial_state=initial_state, **NOISE)
    check(lambda: build(mcmc, "time_embed", embedding_dim=10, position_chunk=3), (3,), frames(10))


def batches(number: int, embeddings: bool) -> list[tuple[Tensor, Tensor]]:
    observed, ids = frames(10, 4) if embeddings else batch(4)
    return [(observed.roll(step, 1), ids + 4 * step) for step in range(number)]


@pytest.mark.parametrize(
    ("gradient", "targets"), [("truncated", "all"), ("full", "chosen"), ("truncated", "embeddings")]
)
def test_replayed_sequences_go_on_in_every_share(gradient: str, targets: str) -> None:
    """A buffer smaller than what comes, so that records are drawn, return and fall out."""
    changes = {"gradient": gradient, "replay_size": 7, "replay_top_k": 64, **NOISE}
    mcmc = embedding_settings(**changes) if targets == "embeddings" else settings(**changes)
    width = 10 if targets == "embeddings" else None
    chosen = chosen_targets(batch()[0]).repeat(2, 1) if targets == "chosen" else None
    given = batches(4, targets == "embeddings")
    check(
        lambda: build(mcmc, embedding_dim=width, position_chunk=4),
        (2, 3) if targets == "all" else (3,),
        *given,
        targets=chosen,
    )


def held(model: EnergyBasedTransformer) -> dict[str, Any]:
    return model.extra_state()["replay"]


def test_a_record_that_is_not_finite_in_one_share_leaves_all() -> None:
    """Otherwise the processes would go on with other sequences than one another."""
    mcmc, (observed, ids) = embedding_settings(replay_size=8), frames(10, 4)
    models = [build(mcmc, embedding_dim=10) for _ in range(2)]
    found: list[Tensor] = []
    for number, model in enumerate(models):
        model.share_positions(Share(number, 2), lambda finite: found.append(finite) or finite)
        observed = observed.clone()
        observed[2, 1] = torch.nan if number else 1.0  # position 1 is in the first piece, which share 0 has
        model.training_step(observed, ids, StepPlan(1))
    assert [flags.tolist() for flags in found] == [[True] * 4, [True, True, False, True]]
    agreed = torch.stack(found).all(0)
    for model in models:
        model.replay.load_state_dict({})
        model.share_positions(model.share, lambda _: agreed)
        model.training_step(*frames(10, 4), StepPlan(1))
        assert held(model)["sample_ids"].tolist() == [7, 8, 10]


@pytest.mark.parametrize(("ranks", "counts"), [((1, 2), (1, 2)), ((2, 4), (2, 1)), ((6, 6), (3, 2)), ((4, 2), (4, 2))])
def test_records_go_to_other_shares(ranks: tuple[int, int], counts: tuple[int, int]) -> None:
    """`ranks` and `counts` before and after: states of all positions are the same in whatever shares they are held."""
    mcmc = embedding_settings(replay_size=64)

    def run(world: int, count: int) -> list[EnergyBasedTransformer]:
        models = [build(mcmc, embedding_dim=10, position_chunk=3) for _ in range(world)]
        for rank, model in enumerate(models):
            model.share_positions(Share(rank % count, count))
        return models

    before, after = run(ranks[0], counts[0]), run(ranks[1], counts[1])
    for step, rank in itertools.product(range(2), range(len(before))):
        group = rank // counts[0]
        observed, ids = frames(10, 2)
        before[rank].training_step(observed + group, ids + 100 * group + 10 * step, StepPlan(1))
    states = [model.extra_state() for model in before]
    for rank, model in enumerate(after):
        model.load_extra_state(model.reshard_extra_state(states, rank, len(after)))
    again = [model.extra_state() for model in after]
    back = [model.reshard_extra_state(again, rank, len(before))["replay"] for rank, model in enumerate(before)]
    groups = after[:: counts[1]]
    assert sorted(itertools.chain(*(held(model)["sample_ids"].tolist() for model in groups))) == sorted(
        itertools.chain(*(held(model)["sample_ids"].tolist() for model in before[:: counts[0]]))
    )
    for rank, model in enumerate(after):
        own = sum(len(piece) for piece in model.share.pieces(LENGTH))
        assert {x.shape[1] for x in held(model)["state"].values()} == {own}
        assert torch.equal(held(model)["sample_ids"], held(groups[rank // counts[1]])["sample_ids"])
    by_id = [
        {int(i): {n: x[row] for n, x in held(m)["state"].items()} for row, i in enumerate(held(m)["sample_ids"])}
        for m in before
    ]
    for rank, state in enumerate(back):
        for row, i in enumerate(state["sample_ids"].tolist()):
            (wanted,) = (
                records[i] for k, records in enumerate(by_id) if i in records and k % counts[0] == rank % counts[0]
            )
            assert all(torch.equal(x[row], wanted[name]) for name, x in state["state"].items())


def test_a_run_without_records_goes_to_other_shares() -> None:
    model = build(settings(replay_size=4))
    model.share_positions(Share(1, 2))
    assert model.reshard_extra_state([{}, {}], 1, 2) == {"replay": {}}
    assert model.extra_state() == {"replay": {}, "position_parallel": 2}
    model.share_positions(Share())
    assert model.reshard_extra_state([{"replay": {}, "position_parallel": 2}] * 2, 0, 1) == {"replay": {}}
    assert model.extra_state() == {"replay": {}}


def refined(where: Slice) -> list[int]:
    return [*range(where.start, where.stop)] if where.index is None else where.positions[0].tolist()


def test_shares_are_equal() -> None:
    """Every position is in one share; shares have as many slices, about as many positions and as much context."""
    for count, positions in itertools.product(range(1, 9), range(1, 70)):
        if count > max(1, positions // 2):
            continue
        for size in (1, 2, 3, 7, 16, 128):
            dealt = [[*Share(number, count).slices(positions, size, 1)] for number in range(count)]
            parts = [[p for where in part for p in refined(where)] for part in dealt]
            assert sorted(itertools.chain(*parts)) == [*range(positions)]
            assert parts == [[*itertools.chain(*Share(n, count).pieces(positions))] for n in range(count)]
            assert len({len(part) for part in dealt}) == 1
            widths = [len(refined(where)) for part in dealt for where in part]
            assert min(widths) >= 1 and max(widths) <= max(size, 2)
            lengths = [len(part) for part in parts]
            assert max(lengths) - min(lengths) <= 2
            if positions % (2 * count) == 0:
                assert len(set(lengths)) == 1 and len({sum(part) for part in parts}) == 1
    assert [(where.start, where.stop) for where in Share(0, 2).slices(256, 64, 3)] == [(0, 64), (192, 256)]
    assert [(where.start, where.stop) for where in Share(1, 2).slices(256, 127, 3)] == [(64, 128), (128, 192)]
    (both,) = Share(1, 2).slices(256, 128, 3)
    assert both.positions.tolist() == [[*range(64, 192)]] * 3
    assert [*Share().slices(300, 128, 1)] == [*slices(300, 128)]


def test_chosen_positions_take_turns() -> None:
    for count in (1, 2, 3):
        parts = torch.stack([Share(number, count).chosen(CHOSEN) for number in range(count)])
        assert torch.equal(parts.sum(0).bool(), CHOSEN) and torch.equal(parts.sum(0), CHOSEN.int())
        assert (parts.sum(-1).amax(0) - parts.sum(-1).amin(0)).max() <= 1


def test_every_share_makes_as_many_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those without a target: ranks that hold parts of the weights would wait for one another."""
    tokens, ids = batch()
    only = tokens[:, 1:].clone()
    only[:, torch.arange(LENGTH) != 4] = PAD
    for targets in (None, chosen_targets(tokens), only):
        for count in (3, 5):
            passes = []
            for number in range(count):
                model, calls = build(settings(), position_chunk=2), list[str]()
                model.share_positions(Share(number, count))

                def forward(method: Callable[..., Any], *args: Any, model: Any = model, calls: Any = calls) -> Any:
                    calls.append(method.__name__)
                    return model(method, *args)

                model.training_step(tokens, ids, StepPlan(2), targets=targets, forward=forward)
                passes.append(calls)
            assert all(calls == passes[0] for calls in passes)
