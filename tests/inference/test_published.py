"""Weights in the published layout give the energies that the same weights give here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ebwm_dist import load
from ebwm_dist.config.loading import load_config
from ebwm_dist.config.schema import Config
from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.tokenizer import open_tokenizer
from ebwm_dist.errors import CheckpointError, UserError
from ebwm_dist.inference.hub import export_to_hub
from ebwm_dist.inference.published import import_weights, rename
from ebwm_dist.inference.settings import Thinking
from ebwm_dist.mcmc.build import build_model
from ebwm_dist.mcmc.slices import Slice
from ebwm_dist.run import Run
from tests.oracle import DenseOracle
from tests.runs import write_config
from tests.tiny_shards import DIM as DIM_OF_LATENTS
from tests.tiny_shards import make_tiny_latents, tiny_latents

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


def published_video() -> dict[str, Tensor]:
    """Return random weights of an energy model of latents."""
    state = published_state("default")
    for name in ("embeddings", "vocab_to_embed"):
        del state[f"model.{name}.weight"]
    projection = nn.Linear(DIM_OF_LATENTS, DIM)
    return state | {f"model.encoder_down_projection.{name}": x for name, x in projection.state_dict().items()}


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


def test_with_its_tokenizer_it_writes_text(tiny: Manifest, tmp_path: Path) -> None:
    """Also exported for a hub; one of another size is refused, and so is any for frames."""
    torch.save({"state_dict": published_state("default")}, tmp_path / "last.ckpt")
    (tmp_path / "mine.model").write_bytes((tiny.folder / "tokenizer.model").read_bytes())
    tokenizer, config = open_tokenizer(tmp_path / "mine.model"), configured(tmp_path, "default")
    out = import_weights(tmp_path / "last.ckpt", config, 0, tmp_path / "imported", tokenizer=tokenizer)
    text = load(out).generate("kalo", 4)[0].text
    export_to_hub(Run(out), tmp_path / "hub", Thinking(), None)
    for folder in (out, tmp_path / "hub"):
        found = Run(folder).tokenizer
        assert found is not None and found.special == tokenizer.special
        assert found.decode(found.encode("ka lo")) == "ka lo"
        assert load(folder).generate("kalo", 4)[0].text == text
    config.model.vocab_size = 321
    with pytest.raises(UserError, match="mine.model has 320 tokens, the model has model.vocab_size = 321: name"):
        import_weights(tmp_path / "last.ckpt", config, 0, tmp_path / "other", tokenizer=tokenizer)
    with pytest.raises(UserError, match=r"--pad-id 321: must be a token, from 0 to 320"):
        import_weights(tmp_path / "last.ckpt", config, 321, tmp_path / "other")
    config.model.embedding_dim = DIM_OF_LATENTS
    with pytest.raises(UserError, match="--tokenizer: this is a model of frames"):
        import_weights(tmp_path / "last.ckpt", config, 0, tmp_path / "other", tokenizer=tokenizer)


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
    run = Run(import_weights(tmp_path / "last.ckpt", config, 0, tmp_path / "imported", latent_scale=1.0))
    assert run.sample_format["kind"] == "latents" and "pad_id" not in run.sample_format
    assert torch.equal(run.model.space.projection.weight, projection.weight)
    frames = torch.randn(2, 17, 48, generator=torch.Generator().manual_seed(1))
    losses, energies, _ = run.model.evaluate(frames, torch.arange(2), 2)
    assert losses.isfinite().all() and (energies[-1] < energies[0]).all()
    with pytest.raises(CheckpointError, match="missing space.projection"):
        import_weights(tmp_path / "tokens.ckpt", config, 0, tmp_path / "other", latent_scale=1.0)


def rotated(x: Tensor) -> Tensor:
    """Rotate the interleaved pairs of [B, H, S, d] by their positions."""
    width = x.shape[-1]
    angles = torch.arange(x.shape[2])[:, None] * 10000 ** (-torch.arange(0, width, 2, dtype=x.dtype) / width)
    even, odd = x[..., ::2], x[..., 1::2]
    pairs = even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()
    return torch.stack(pairs, -1).flatten(-2)


def next_frames(w: dict[str, Tensor], frames: Tensor, heads: int) -> Tensor:
    """Return what the published autoregressive model says of the frames [B, S, E] that follow, from its weights."""
    x = frames
    if "encoder_down_projection.weight" in w:
        x = functional.linear(x, w["encoder_down_projection.weight"], w.get("encoder_down_projection.bias"))
    for number in range(LAYERS):
        block = {name.partition(f"layers.{number}.")[2]: tensor for name, tensor in w.items()}
        h = functional.rms_norm(x, x.shape[-1:], block["attention_norm.weight"], 1e-5)
        q, k, v = ((h @ block[f"attention.w{c}.weight"].T).unflatten(-1, (heads, -1)).transpose(1, 2) for c in "qkv")
        h = functional.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        x = x + h.transpose(1, 2).flatten(-2) @ block["attention.wo.weight"].T
        h = functional.rms_norm(x, x.shape[-1:], block["ffn_norm.weight"], 1e-5)
        gate, value = (h @ block[f"feed_forward.w{n}.weight"].T for n in (1, 3))
        x = x + (functional.silu(gate) * value) @ block["feed_forward.w2.weight"].T
    x = functional.rms_norm(x, x.shape[-1:], w["transformer.norm.weight"], 1e-5) @ w["output.weight"].T
    if "encoder_up_projection.weight" in w:
        x = functional.linear(x, w["encoder_up_projection.weight"], w.get("encoder_up_projection.bias"))
    return x


def autoregressive_frames(projection: str) -> dict[str, Tensor]:
    """Return random weights (float64) of a model of frames as wide as itself, or of projected ones."""
    state = published_state("ar")
    del state["model.embeddings.weight"]
    state["model.output.weight"] = torch.randn(DIM, DIM) / DIM**0.5
    if projection != "none":
        down, up = nn.Linear(48, DIM), nn.Linear(DIM, 48)
        if projection == "tied":  # which cannot have biases
            state["model.encoder_down_projection.weight"] = down.weight.detach()
            state["model.encoder_up_projection.weight"] = down.weight.detach().T
        else:
            for name, linear in (("down", down), ("up", up)):
                nn.init.normal_(linear.bias)
                state |= {f"model.encoder_{name}_projection.{key}": x for key, x in linear.state_dict().items()}
    return {name: tensor.double() for name, tensor in state.items()}


@pytest.mark.parametrize("projection", ["none", "biased", "tied"])
def test_autoregressive_video(projection: str, tmp_path: Path) -> None:
    """Predictions of DINOv2's embeddings, which are as wide as the model, and of the autoencoder's, which are not."""
    state, width = autoregressive_frames(projection), DIM if projection == "none" else 48
    config = load_config(write_config(tmp_path), ["model.kind=ar", f"model.embedding_dim={width}"])
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    scale = None if projection == "none" else 0.18215
    run = Run(import_weights(tmp_path / "last.ckpt", config, 0, tmp_path / "imported", latent_scale=scale))
    model = build_model(config, None).double()
    model.load_state_dict(rename(state, "ar", True, "last.ckpt"))
    frames = torch.randn(2, 7, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    theirs = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    expected = next_frames(theirs, frames, heads=2)
    torch.testing.assert_close(model.predict(frames), expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(run.model.predict(frames.float()), expected.float(), rtol=1e-4, atol=1e-4)
    del state["model.output.weight"]
    with pytest.raises(CheckpointError, match=r"missing .*head.weight"):
        torch.save({"state_dict": state}, tmp_path / "part.ckpt")
        import_weights(tmp_path / "part.ckpt", config, 0, tmp_path / "part", latent_scale=scale)


S1_TEXT = {
    "modality": "NLP",
    "model_name": "ebt",
    "ebt_type": "time_embed",
    "embedding_dim": DIM,
    "num_transformer_blocks": LAYERS,
    "multiheaded_attention_heads": 2,
    "ffn_dim_multiplier": None,
    "context_length": 16,
    "mcmc_num_steps": 2,
    "randomize_mcmc_num_steps": 0,
    "denoising_initial_condition": "random_noise",
    "langevin_dynamics_noise": 0.0,
    "normalize_initial_condition": True,
    "normalize_initial_condition_only_first_step": False,
    "vocab_to_embed_uses_prob_dist": False,
    "ebt_norm": "rms",
    "ebt_act_func": "silu",
    "clamp_futures_grad": False,
    "absolute_clamp": 0.0,
    "sharpen_predicted_distribution": 0.0,
    "gaussian_random_noise_scaling": 1,
    "peak_learning_rate": 1.2e-3,  # says nothing of the model
}
"""Hyper-parameters as a Lightning checkpoint carries them, of the small model here."""


def test_settings_that_fit(tmp_path: Path) -> None:
    content = {"state_dict": published_state("time_embed"), "hyper_parameters": S1_TEXT}
    assert Run(imported(tmp_path, "time_embed", content)).config.model.num_heads == 2


@pytest.mark.parametrize(
    ("given", "overrides", "reason"),
    [
        ({"multiheaded_attention_heads": 4}, [], "multiheaded_attention_heads = 4 makes model.num_heads 4, not 2"),
        ({}, ["model.num_heads=4"], "multiheaded_attention_heads = 2 makes model.num_heads 2, not 4"),
        ({"num_transformer_blocks": 3}, [], "makes model.num_layers 3, not 2"),
        ({"embedding_dim": 64}, [], "makes model.dim 64, not 32"),
        ({"ffn_dim_multiplier": 2.0}, [], "makes model.ffn_multiplier 2.0, not 1.0"),
        ({"context_length": 256}, [], "context_length = 256 makes data.sequence_length 256, not 16"),
        ({"model_name": "baseline_transformer"}, [], "makes model.kind 'ar', not 'ebt'"),
        ({"model_name": "dit"}, [], "model_name = 'dit' makes model.kind None, not 'ebt'"),
        ({"modality": "VID"}, [], "modality = 'VID' makes a model of frames True, not False"),
        ({"ebt_type": "adaln_zero"}, [], "makes model.variant 'adaln', not 'time_embed'"),
        ({"mcmc_num_steps": 3}, [], "mcmc_num_steps = 3 makes model.num_landscapes 3, not 2; .*MCMC steps 3, not 2"),
        ({"randomize_mcmc_num_steps": 2}, [], "mcmc_num_steps = 2 makes the most MCMC steps 4, not 2"),
        ({"denoising_initial_condition": "zeros"}, [], "makes mcmc.initial_state 'zeros', not 'random_noise'"),
        ({"langevin_dynamics_noise": 3.0}, [], "makes mcmc.langevin_noise 3.0, not 0.0"),
        ({"vocab_to_embed_uses_prob_dist": True}, [], "makes model.tie_embeddings True, not False"),
        ({"normalize_initial_condition": False}, [], "normalize_initial_condition = False, here models only have True"),
        ({"ebt_norm": "dyt"}, [], "ebt_norm = 'dyt', here models only have 'rms'"),
        ({"clamp_futures_grad": True}, [], "clamp_futures_grad = True, here models only have False"),
        ({}, ["model.add_most_recent=true"], "model.add_most_recent = True, the published code only has False"),
        ({}, ["mcmc.update=mirror"], "mcmc.update = 'mirror', the published code only has 'probabilities'"),
        ({}, ["model.norm_eps=1e-6", "model.num_heads=8"], r"model.norm_eps = 1e-06, .*; multihead\S+ = 2 makes"),
    ],
)
def test_settings_that_contradict_the_weights_are_refused(
    given: dict[str, Any], overrides: list[str], reason: str, tmp_path: Path
) -> None:
    """Also those that no shape shows, of which the energies would be others."""
    config = load_config(
        write_config(tmp_path), ["model.variant=time_embed", f"model.num_landscapes={LANDSCAPES}", *overrides]
    )
    content = {"state_dict": published_state("time_embed"), "hyper_parameters": S1_TEXT | given}
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=f"last.ckpt is not of the configured model: .*{reason}") as error:
        import_weights(tmp_path / "last.ckpt", config, 0, tmp_path / "imported")
    assert "\n" not in str(error.value) and not (tmp_path / "imported").exists()


@pytest.mark.parametrize(
    ("given", "scale", "std"),
    [
        ({"backbone_type": "vae", "sdxl_vae_standardization": False}, None, 0.18215),  # S1
        ({"backbone_type": "vae", "sdxl_vae_standardization": True}, None, 1.0),  # S2
        ({"backbone_type": "vae", "sdxl_vae_standardization": True}, 0.18215, 1.0),
        ({"backbone_type": "vae"}, 1.0, 0.18215),
        ({"backbone_type": "dinov2"}, None, 1.0),
    ],
)
def test_latents_keep_their_scale(given: dict[str, Any], scale: float | None, std: float, tmp_path: Path) -> None:
    """Shards hold latents of the autoencoder times 0.18215; a model trained without that factor sees them without."""
    latents = make_tiny_latents(tmp_path / "latents")
    torch.save({"state_dict": published_video(), "hyper_parameters": given}, tmp_path / "last.ckpt")
    overrides = [f"model.embedding_dim={DIM_OF_LATENTS}", "data.sequence_length=2", f"data.path={latents.folder}"]
    config = load_config(write_config(tmp_path), overrides)
    run = Run(import_weights(tmp_path / "last.ckpt", config, 0, tmp_path / "imported", latent_scale=scale))
    (batch,) = run.validation_data().batches(len(tiny_latents("val")), len(tiny_latents("val")))
    stored = torch.from_numpy(tiny_latents("val").astype("float32"))
    torch.testing.assert_close(batch.observed, stored / std, rtol=1e-6, atol=0)


def test_a_scale_that_is_not_known_or_another_is_refused(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path), [f"model.embedding_dim={DIM_OF_LATENTS}"])
    torch.save({"state_dict": published_video()}, tmp_path / "bare.ckpt")
    with pytest.raises(CheckpointError, match=r"does not say at which scale its latents were: give --latent-scale 1 "):
        import_weights(tmp_path / "bare.ckpt", config, 0, tmp_path / "imported")
    settings = {"backbone_type": "vae", "sdxl_vae_standardization": True}
    torch.save({"state_dict": published_video(), "hyper_parameters": settings}, tmp_path / "s2.ckpt")
    with pytest.raises(CheckpointError, match=r"was trained on latents times 0.18215, not 1$"):
        import_weights(tmp_path / "s2.ckpt", config, 0, tmp_path / "imported", latent_scale=1.0)


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
    with pytest.raises(CheckpointError, match=r"last.ckpt is not a file of weights and plain values"):
        imported(tmp_path, "default", {"state_dict": published_state("default"), "hyper_parameters": Intruder()})
    assert "executed" not in capsys.readouterr().out
    (tmp_path / "last.ckpt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"last.ckpt is not a file of weights and plain values"):
        import_weights(tmp_path / "last.ckpt", configured(tmp_path, "default"), 0, tmp_path / "imported")
