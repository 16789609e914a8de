"""Weights in the published layout give the energies that the same weights give here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ebwm_dist.config.loading import load_config
from ebwm_dist.config.schema import Config
from ebwm_dist.errors import CheckpointError
from ebwm_dist.inference.published import import_weights
from ebwm_dist.mcmc.slices import Slice
from ebwm_dist.run import Run
from tests.oracle import DenseOracle
from tests.runs import write_config

DIM, VOCABULARY, LAYERS, LANDSCAPES = 32, 320, 2, 2


class PublishedBlock(nn.Module):
    """A block whose parameters are named and shaped as in the published code."""

    def __init__(self, adaln: bool):
        super().__init__()
        self.attention = nn.ModuleDict({f"w{c}": nn.Linear(DIM, DIM, bias=False) for c in "qkvo"})
        self.feed_forward = nn.ModuleDict({f"w{n}": nn.Linear(DIM, DIM, bias=False) for n in (1, 2, 3)})
        self.attention_norm, self.ffn_norm = (nn.RMSNorm(DIM) for _ in range(2))
        if adaln:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(DIM, 6 * DIM))


def published_state(variant: str) -> dict[str, Tensor]:
    """Return random weights as that code's Lightning checkpoints hold them."""
    torch.manual_seed(0)
    transformer = nn.Module()
    transformer.layers = nn.ModuleList(PublishedBlock(variant == "adaln") for _ in range(LAYERS))
    transformer.norm = nn.RMSNorm(DIM)
    model = nn.Module()
    model.embeddings = nn.Embedding(VOCABULARY, DIM)
    model.transformer = transformer
    if variant == "ar":
        model.output = nn.Linear(DIM, VOCABULARY, bias=False)
    else:
        model.alpha = nn.Parameter(torch.tensor(0.5))
        model.langevin_dynamics_noise_std = nn.Parameter(torch.tensor(0.0))
        model.vocab_to_embed = nn.Linear(VOCABULARY, DIM, bias=False)
        transformer.final_layer = nn.Linear(DIM, 1, bias=False)
    if variant in ("time_embed", "adaln"):
        transformer.time_embeddings = nn.Embedding(LANDSCAPES, DIM)
    if variant == "adaln":
        transformer.final_layer = nn.Module()
        transformer.final_layer.linear = nn.Linear(DIM, 1, bias=False)
        transformer.final_layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(DIM, 2 * DIM))
    for name, parameter in model.named_parameters():
        if "norm" in name:  # so that mixed-up norms would show
            nn.init.normal_(parameter)
    trainer = nn.Module()
    trainer.model = model
    return trainer.state_dict()


def configured(folder: Path, variant: str) -> Config:
    overrides = ["model.kind=ar"] if variant == "ar" else [f"model.variant={variant}"]
    if variant in ("time_embed", "adaln"):
        overrides.append(f"model.num_landscapes={LANDSCAPES}")
    return load_config(write_config(folder), overrides)


def imported(folder: Path, variant: str, content: Any) -> Path:
    torch.save(content, folder / "last.ckpt")
    return import_weights(folder / "last.ckpt", configured(folder, variant), 0, folder / "imported")


@pytest.mark.parametrize("variant", ["default", "time_embed", "adaln"])
def test_energies(variant: str, tmp_path: Path) -> None:
    """Against the dense reference, which is given the published weights one by one."""
    state = published_state(variant)
    content = {"state_dict": state, "epoch": 3, "hyper_parameters": {"lr": 1e-3}}
    model = Run(imported(tmp_path, variant, content)).model.double()
    theirs = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    final = "transformer.final_layer.linear." if variant == "adaln" else "transformer.final_layer."
    reference: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        name = name.replace("transformer.layers.", "transformer.blocks.").replace(
            "adaLN_modulation.1", "modulation.linear"
        )
        name = name.replace(final, "transformer.head.").replace(
            "transformer.final_layer.modulation", "transformer.modulation"
        )
        reference[name if name.startswith("transformer.") else f"space.{name}"] = tensor
    reference["space.vocab_to_embed.weight"] = theirs["vocab_to_embed.weight"].T
    reference["space.step_size.alpha"] = theirs["alpha"][None]
    exact = {name: tensor.double() for name, tensor in reference.items()}
    oracle = DenseOracle(exact, num_heads=2, variant=variant, pad_id=0)
    tokens = torch.randint(4, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    start = model.space.initial_state(torch.arange(2), model.seed, Slice(0, 8), tokens[:, :-1])
    _, energies, _ = model.evaluate(tokens, torch.arange(2), 3)
    expected = oracle.refine(tokens, start, 3).step_energies
    torch.testing.assert_close(energies[:3].mean(-1) / 8, expected, rtol=1e-9, atol=1e-9)


def test_autoregressive_and_compiled(tmp_path: Path) -> None:
    state = published_state("ar")
    compiled = {name.replace("model.", "model._orig_mod.", 1): tensor for name, tensor in state.items()}
    model = Run(imported(tmp_path, "ar", {"state_dict": compiled})).model
    assert torch.equal(model.head.weight, state["model.output.weight"])
    assert torch.equal(model.blocks[1].ffn_norm.weight, state["model.transformer.layers.1.ffn_norm.weight"])


def test_video(tmp_path: Path) -> None:
    """Frames have no embedding table, and where they are wider than the model a projection."""
    state = published_state("default")
    for name in ("embeddings", "vocab_to_embed"):
        del state[f"model.{name}.weight"]
    torch.save(state, tmp_path / "tokens.ckpt")
    projection = nn.Linear(48, DIM)
    state |= {f"model.encoder_down_projection.{name}": x for name, x in projection.state_dict().items()}
    state["model.image_encoder.conv.weight"] = torch.ones(1)  # is frozen, and not the model's
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    video = ["model.embedding_dim=48", "mcmc.initial_state=most_recent_embedding"]
    config = load_config(write_config(tmp_path), video)
    run = Run(import_weights(tmp_path / "last.ckpt", config, 0, tmp_path / "imported"))
    assert run.sample_format["kind"] == "latents" and "pad_id" not in run.sample_format
    assert torch.equal(run.model.space.projection.weight, projection.weight)
    frames = torch.randn(2, 17, 48, generator=torch.Generator().manual_seed(1))
    losses, energies, _ = run.model.evaluate(frames, torch.arange(2), 2)
    assert losses.isfinite().all() and (energies[-1] < energies[0]).all()
    with pytest.raises(CheckpointError, match="missing space.projection"):
        import_weights(tmp_path / "tokens.ckpt", config, 0, tmp_path / "other")


def test_names_that_do_not_fit_are_all_told(tmp_path: Path) -> None:
    state = published_state("default")
    with pytest.raises(CheckpointError, match=r"does not have: model.more.bias, model.more.weight$"):
        imported(
            tmp_path,
            "default",
            {"state_dict": {**state, "model.more.weight": torch.ones(1), "model.more.bias": torch.ones(1)}},
        )
    without = {name: tensor for name, tensor in state.items() if "w2" not in name and "alpha" not in name}
    missing = r"missing space.step_size.alpha, transformer.blocks.0.feed_forward.w2.weight, transformer.blocks.1"
    with pytest.raises(CheckpointError, match=missing):
        imported(tmp_path, "default", without)
    with pytest.raises(CheckpointError, match=r"missing transformer.time_embeddings.weight$"):
        imported(tmp_path, "time_embed", state)
    assert not (tmp_path / "imported").exists()


class Intruder:
    def __reduce__(self) -> Any:
        return print, ("executed",)


def test_nothing_in_a_file_is_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckpointError, match=r"last.ckpt is not a file of weights alone"):
        imported(tmp_path, "default", {"state_dict": published_state("default"), "hyper_parameters": Intruder()})
    assert "executed" not in capsys.readouterr().out
    (tmp_path / "last.ckpt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"last.ckpt is not a file of weights alone"):
        import_weights(tmp_path / "last.ckpt", configured(tmp_path, "default"), 0, tmp_path / "imported")
