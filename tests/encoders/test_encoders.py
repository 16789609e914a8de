"""Encoders: what comes out is what a plain computation gives, and weights are read from disk or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ebwm_dist.encoders import build_encoder
from ebwm_dist.errors import DataError, UserError

MODEL = "shufflenet_v2_x0_5"


def frames(count: int, height: int = 32, width: int = 32) -> torch.Tensor:
    """Return random frames `[N, H, W, 3]`."""
    return torch.randint(256, (count, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_pixels_of_the_frames_own_size_come_back_exactly() -> None:
    images = frames(70)  # more than one batch
    for spec in ("pixels:32", "pixels:32/8"):
        encoder = build_encoder(spec, height=32, width=32)
        embeddings = encoder.encode(images)
        assert embeddings.shape == (70, encoder.embedding_dim) and encoder.embedding_dim == 3 * 32 * 32
        assert embeddings.dtype == torch.float32 and embeddings.abs().max() <= 1
        assert torch.equal(encoder.decode(embeddings), images)


def test_pixels_are_means_of_their_blocks_row_by_row_or_patch_by_patch() -> None:
    images = frames(2, 24, 36)
    means = images.float().view(2, 12, 2, 12, 3, 3).mean((2, 4))  # blocks of 2 x 3 pixels
    plain = build_encoder("pixels:12", height=24, width=36).encode(images)
    torch.testing.assert_close(plain, (means / 127.5 - 1).flatten(1))
    patches = build_encoder("pixels:12/4", height=24, width=36).encode(images)
    third = means[:, 0:4, 8:12].flatten(1) / 127.5 - 1
    torch.testing.assert_close(patches[:, 2 * 48 : 3 * 48], third)
    assert build_encoder("pixels:12").encode(images[:0]).shape == (0, 432)


@pytest.mark.parametrize(
    ("spec", "weights", "message"),
    [
        ("pixel:16", None, "is not known; it is one of pixels:SIZE"),
        ("pixels", None, "is not pixels:SIZE"),
        ("pixels:0", None, "is not pixels:SIZE"),
        ("pixels:16/5", None, "patch size 5 does not divide 16"),
        ("pixels:16", "w", "has no weights"),
        ("sd_vae:big", None, "takes nothing or the size of patches"),
        ("sd_vae", None, "needs weights.*none were given"),
        ("dinov2", "gone", "needs weights.*gone is not that"),
        (f"torchvision:{MODEL}", "gone.pth", "needs weights.*gone.pth is not that"),
        ("torchvision:resnet", None, "no such classifier; it has resnet101"),
    ],
)
def test_wrong_specs_and_missing_weights_are_refused(spec: str, weights: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_encoder(spec, weights)


def test_the_identity_follows_spec_and_weights(tmp_path: Path) -> None:
    assert build_encoder("pixels:16").sha256 == build_encoder("pixels:16", height=32).sha256
    assert build_encoder("pixels:16").sha256 != build_encoder("pixels:16/8").sha256


@pytest.fixture(scope="module")
def state_dict(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a state dict of a small classifier with random weights, saved as torchvision's are."""
    from torchvision import models

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / f"{MODEL}.pth"
    torch.save(models.get_model(MODEL, weights=None).state_dict(), path)
    return path


def test_a_torchvision_model_gives_what_enters_its_last_layer(state_dict: Path) -> None:
    from torchvision import models

    encoder = build_encoder(f"torchvision:{MODEL}", state_dict, 64, 48)
    images = frames(3, 64, 48)
    whole = models.get_model(MODEL, weights=None)
    whole.load_state_dict(torch.load(state_dict, weights_only=True))
    entered: list[torch.Tensor] = []
    whole.fc.register_forward_hook(lambda _module, inputs, _output: entered.append(inputs[0]))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        whole.eval()(((images / 255 - mean) / std).permute(0, 3, 1, 2))
    assert encoder.embedding_dim == entered[0].shape[1] == 1024 and not encoder.decodable
    torch.testing.assert_close(encoder.encode(images), entered[0])

    assert not any(p.requires_grad for p in encoder.parameters())
    assert not torch.nn.ModuleList([encoder]).train()[0].training
    with pytest.raises(UserError, match="cannot be decoded"):
        encoder.decode(entered[0])
    with pytest.raises(UserError, match="cannot take frames of 0 x 48"):
        build_encoder(f"torchvision:{MODEL}", state_dict, 0, 48)


def test_bf16_is_close_and_gives_float32(state_dict: Path) -> None:
    full = build_encoder(f"torchvision:{MODEL}", state_dict, 32, 32).encode(frames(2))
    half = build_encoder(f"torchvision:{MODEL}", state_dict, 32, 32, precision="bf16").encode(frames(2))
    assert half.dtype == torch.float32 and not torch.equal(full, half)
    assert torch.nn.functional.cosine_similarity(full, half).min() > 0.99
    with pytest.raises(UserError, match="precision 'fp8' is not one of fp32, bf16"):
        build_encoder("pixels:16", precision="fp8")


def test_foreign_and_damaged_state_dicts_are_refused(state_dict: Path, tmp_path: Path) -> None:
    spec = f"torchvision:{MODEL}"
    state = torch.load(state_dict, weights_only=True)
    lacking = {key: value for key, value in state.items() if key != "conv5.0.weight"}
    for name, content, message in (
        ("lacking", lacking, "does not hold the weights of shufflenet.*conv5.0.weight"),
        ("list", [1, 2], "holds list"),
        ("code", Path("code"), "is not a state dict that can be read"),  # pickled objects are not loaded
    ):
        torch.save(content, tmp_path / name)
        with pytest.raises(DataError, match=message):
            build_encoder(spec, tmp_path / name)
    (tmp_path / "cut").write_bytes(state_dict.read_bytes()[:1000])
    with pytest.raises(DataError, match="is not a state dict that can be read"):
        build_encoder(spec, tmp_path / "cut")


@pytest.mark.slow  # importing these libraries takes longer than all tests of this file
def test_the_autoencoder_is_read_from_a_folder_as_the_hub_lays_it_out(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.25,
    ).eval()
    vae.save_pretrained(tmp_path / "vae")
    assert {path.name for path in (tmp_path / "vae").iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    encoder = build_encoder("sd_vae", tmp_path / "vae", 32, 48)
    images = frames(3, 32, 48)
    with torch.no_grad():
        posterior = vae.encode(images.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist
        reconstructed = vae.decode(posterior.mode()).sample
    embeddings = encoder.encode(images)
    assert encoder.embedding_dim == 4 * 4 * 6
    torch.testing.assert_close(embeddings.view(3, 4, 4, 6), posterior.mode() * 0.25)
    expected = ((reconstructed + 1) * 127.5).clamp(0, 255).permute(0, 2, 3, 1)
    assert encoder.decodable and (encoder.decode(embeddings).float() - expected).abs().max() <= 0.51

    patches = build_encoder("sd_vae:2", tmp_path / "vae", 32, 48)
    rows = patches.encode(images)
    assert patches.embedding_dim == 96 and patches.sha256 != encoder.sha256
    of_patch = posterior.mode()[:, :, 2:4, 4:6] * 0.25  # the last of the second row of patches
    torch.testing.assert_close(rows.view(3, 6, 2, 2, 4)[:, 5], of_patch.permute(0, 2, 3, 1))
    assert torch.equal(patches.decode(rows), encoder.decode(embeddings))
    with pytest.raises(UserError, match="multiples of 24, not 32 x 48"):
        build_encoder("sd_vae:3", tmp_path / "vae", 32, 48)
    with pytest.raises(UserError, match="takes nothing or the size of patches"):
        build_encoder("sd_vae:two", tmp_path / "vae", 32, 48)

    half = build_encoder("sd_vae", tmp_path / "vae", 32, 48, precision="bf16").encode(images)
    assert torch.nn.functional.cosine_similarity(embeddings, half).min() > 0.99
    with pytest.raises(UserError, match="multiples of 8, not 32 x 36"):
        build_encoder("sd_vae", tmp_path / "vae", 32, 36)
    _check_refusals("sd_vae", tmp_path / "vae", "encoder.conv_in.weight")


@pytest.mark.slow
def test_dinov2_is_read_from_a_folder_as_the_hub_lays_it_out(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    model = transformers.Dinov2Model(config).eval()
    model.save_pretrained(tmp_path / "dino")
    assert {path.name for path in (tmp_path / "dino").iterdir()} == {"config.json", "model.safetensors"}
    encoder = build_encoder("dinov2", tmp_path / "dino", 28, 42)
    images = frames(3, 28, 42)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = model(pixel_values=((images / 255 - mean) / std).permute(0, 3, 1, 2)).pooler_output
    torch.testing.assert_close(encoder.encode(images), expected)
    assert encoder.embedding_dim == 24 and not encoder.decodable
    patches = build_encoder("dinov2:patches", tmp_path / "dino", 28, 42)
    with torch.no_grad():
        states = model(pixel_values=((images / 255 - mean) / std).permute(0, 3, 1, 2)).last_hidden_state
    torch.testing.assert_close(patches.encode(images).view(3, 6, 24), states[:, 1:])
    assert patches.embedding_dim == 6 * 24 and patches.sha256 != encoder.sha256
    with pytest.raises(UserError, match="takes nothing or 'patches' after a colon"):
        build_encoder("dinov2:large", tmp_path / "dino", 28, 42)
    with pytest.raises(UserError, match="multiples of 14, not 28 x 32"):
        build_encoder("dinov2", tmp_path / "dino", 28, 32)
    _check_refusals("dinov2", tmp_path / "dino", "layernorm.weight")


def _check_refusals(kind: str, folder: Path, key: str) -> None:
    """Check that a changed file changes the identity, and that lacking and damaged files are refused."""
    from safetensors.torch import load_file, save_file

    (weights,) = folder.glob("*.safetensors")
    state = load_file(weights)
    sizes = {"height": 28, "width": 28} if kind == "dinov2" else {"height": 32, "width": 32}
    before = build_encoder(kind, folder, **sizes).sha256
    save_file({**state, key: state[key] + 1}, weights, metadata={"format": "pt"})
    assert build_encoder(kind, folder, **sizes).sha256 != before

    save_file({k: v for k, v in state.items() if k != key}, weights, metadata={"format": "pt"})
    with pytest.raises(DataError, match=f"does not hold all weights of .*: {key}, ... are missing"):
        build_encoder(kind, folder, **sizes)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(DataError, match="that .* can load"):
        build_encoder(kind, folder, **sizes)
    weights.unlink()
    with pytest.raises(UserError, match="needs weights"):
        build_encoder(kind, folder, **sizes)


@pytest.mark.slow
def test_a_state_dict_in_safetensors(state_dict: Path, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(torch.load(state_dict, weights_only=True), tmp_path / "w.safetensors")
    spec = f"torchvision:{MODEL}"
    one, other = (build_encoder(spec, path, 32, 32) for path in (state_dict, tmp_path / "w.safetensors"))
    assert torch.equal(one.encode(frames(2)), other.encode(frames(2)))
