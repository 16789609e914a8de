"""Every configuration in configs/ loads, survives saving, and an autoregressive twin differs in its kind only."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import pytest

from ebwm_dist.config.loading import load_config, save_config
from ebwm_dist.config.schema import MCMCConfig

CONFIGS = Path(__file__).parents[2] / "configs"
SIZES = {  # layers, heads, width, peak learning rate as published
    "4xs": (2, 2, 128, 2.4e-3),
    "3xs": (4, 4, 256, 1.8e-3),
    "xxs": (6, 6, 384, 1.2e-3),
    "xs": (12, 6, 384, 9e-4),
    "small": (12, 12, 768, 6e-4),
    "medium": (24, 16, 1024, 3e-4),
    "large": (24, 16, 1536, 2.5e-4),
    "xl": (24, 32, 2048, 2e-4),
}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_loads_and_reads_back_equal(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes(size: str) -> None:
    config = load_config(CONFIGS / f"ebt_{size}.yaml")
    model = config.model
    assert (model.num_layers, model.num_heads, model.dim, config.optimizer.lr) == SIZES[size]
    assert (model.variant, model.num_landscapes, config.mcmc.num_steps) == ("time_embed", 2, 2)
    assert (config.mcmc.step_size, config.mcmc.step_size_lr_multiplier) == (500.0, 1500.0)
    assert (config.training.global_batch_size, config.data.sequence_length) == (256, 256)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("ar_*.yaml")), ids=lambda path: path.stem)
def test_twins_differ_in_kind_folder_and_rate_only(path: Path) -> None:
    name = re.sub(r"_\d+layers$", "", path.name.removeprefix("ar_").removesuffix(".yaml"))
    others = [CONFIGS / f"{prefix}{name}.yaml" for prefix in ("", "ebt_", "ebwm_")]
    twin, config = asdict(load_config(path)), asdict(load_config(next(other for other in others if other.exists())))
    if path.stem.endswith("layers"):  # deeper twins of a model with one
        assert twin["model"].pop("num_layers") > config["model"].pop("num_layers")
    assert (twin["model"].pop("kind"), config["model"].pop("kind")) == ("ar", "ebt")
    assert twin.pop("run_dir") != config.pop("run_dir")
    if (CONFIGS / f"ebwm_{name}_s2.yaml").exists():  # the published rates of video, a third of the twin's
        assert twin["optimizer"].pop("lr") > config["optimizer"].pop("lr")
    assert twin == config


@pytest.mark.parametrize("size", [*SIZES, "1b"])
def test_s2_is_another_recipe_for_the_same_size(size: str) -> None:
    config = load_config(CONFIGS / f"ebt_{size}_s2.yaml")
    assert config.mcmc == MCMCConfig(
        num_steps=2,
        max_num_steps=3,
        step_size=5.0,
        learn_step_size=False,
        step_size_jitter=2.0,
        langevin_noise=3.0,
        loss="last",
        replay_size=192,
        replay_fraction=0.5,
    )
    s1 = load_config(CONFIGS / f"ebt_{size}.yaml")
    assert (s1.model.num_landscapes, config.model.num_landscapes) == (2, 1)
    s1.model.num_landscapes, s1.mcmc, s1.run_dir = 1, config.mcmc, config.run_dir
    assert config == s1


@pytest.mark.parametrize("size", ["xxs", "small", "large"])
def test_published_video_recipes(size: str) -> None:
    config, s2 = (load_config(CONFIGS / f"ebwm_video_{size}{suffix}.yaml") for suffix in ("", "_s2"))
    model = config.model
    assert (model.num_layers, model.num_heads, model.dim) == SIZES[size][:3]
    assert config.optimizer.lr == pytest.approx(SIZES[size][3] / 3, rel=0.001)  # a third of the twin's
    assert load_config(CONFIGS / f"ar_video_{size}.yaml").optimizer.lr == SIZES[size][3]
    assert (model.variant, model.num_landscapes, model.embedding_dim) == ("time_embed", 2, 4 * 28 * 28)
    assert config.mcmc == MCMCConfig(num_steps=2, step_size=30_000.0, step_size_lr_multiplier=90_000.0)
    assert (config.training.global_batch_size, config.data.sequence_length) == (64, 15)
    assert [(c.training.stop_after, c.training.max_steps) for c in (config, s2)] == [
        (100_000, 1_000_000),
        (60_000, 1_000_000),
    ]
    text = load_config(CONFIGS / f"ebt_{size}_s2.yaml").mcmc
    text.step_size, text.langevin_noise = 3000.0, 1.0
    assert s2.mcmc == text
    config.model.num_landscapes, config.mcmc, config.run_dir = 1, s2.mcmc, s2.run_dir
    config.training.stop_after = s2.training.stop_after
    assert s2 == config


def test_every_run_has_a_folder_of_its_own() -> None:
    folders = [load_config(path).run_dir for path in CONFIGS.glob("*.yaml") if not path.stem.endswith("_base")]
    assert len(set(folders)) == len(folders)
