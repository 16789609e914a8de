"""Every kind of model of `benchmarks/looped.py` trains and is tested, and iterates as an EBT does."""

from __future__ import annotations

import pytest
import torch

from benchmarks import looped
from ebwm_dist.config.loading import load_config

QUICK = [
    "training.max_steps=3",
    "training.global_batch_size=4",
    "training.micro_batch_size=4",
    "mcmc.num_steps_warmup=2",
    "optimizer.warmup_steps=1",
]


@pytest.mark.parametrize("kind", ["ebt", "ar", "candidate", "whole", "steps"])
def test_kinds_train_and_are_tested(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looped, "TEST_DOCUMENTS", 60)
    task = looped.TASKS["pointers"]
    vocabulary = f"model.vocab_size={4 + len(task.tokens)}"
    config = load_config(looped.ROOT / "configs" / "reasoning.yaml", [vocabulary, *QUICK])
    looped.stretch(config, task, kind, 1, equal_flops=False)
    _, predict = looped.train(config, task, kind)
    found = looped.written_out(task, predict) if kind == "steps" else looped.accuracy(task, predict)
    assert sum(found["answers"].values()) == 60 and ("stopped" in found) == (kind not in ("ar", "steps"))
    if kind == "candidate":  # a candidate sees the observed tokens up to its own position, and no later ones
        tokens, _, _ = looped.batch(looped.held_out(task)[:2], task.tokens)
        before, after = (predict(one, 3)[-1] for one in (tokens, torch.cat((tokens[:, :9], tokens[:, 9:] * 0 + 5), 1)))
        assert torch.equal(before[:, :9], after[:, :9]) and not torch.equal(before[:, 9:], after[:, 9:])


def test_equal_flops_stretch_a_twin() -> None:
    task = looped.TASKS["pointers"]
    settings = [f"model.vocab_size={4 + len(task.tokens)}"]
    ebt, twin = (load_config(looped.ROOT / "configs" / "reasoning.yaml", settings) for _ in range(2))
    looped.stretch(twin, task, "ar", 2, equal_flops=True)
    steps = twin.training.max_steps
    assert looped.training_flops(twin, task, steps) == pytest.approx(looped.training_flops(ebt, task, 2400), rel=1e-3)
    assert twin.mcmc.num_steps_warmup == pytest.approx(steps * 1800 / 2400, abs=1)
