"""Weights in the published layout give the energies that the same weights give here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ebwm_dist import load
from ebwm_dist.config.loading import load_config
from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.tokenizer import open_tokenizer
from ebwm_dist.errors import CheckpointError, UserError
from ebwm_dist.inference.hub import export_to_hub
from ebwm_dist.inference.published import import_weights, rename
from ebwm_dist.inference.settings import Thinking
from ebwm_dist.mcmc.build import build_model
from ebwm_dist.mcmc.slices import Slice
from ebwm_dist.run import Run
from tests.inference.published_weights import (
    DIM,
    LAYERS,
    VOCABULARY,
    configured,
    imported,
    published_state,
)
from tests.oracle import DenseOracle
from tests.runs import write_config
from tests.tiny_shards import DIM as DIM_OF_LATENTS


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
