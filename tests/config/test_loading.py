from __future__ import annotations

import os
from pathlib import Path

import pytest

from ebwm_dist.config.loading import load_config, save_config
from ebwm_dist.config.schema import Config, ModelConfig
from ebwm_dist.errors import ConfigError

MODEL_KEYS = (
    "kind, variant, num_landscapes, embedding_dim, vocab_size, dim, num_layers, num_heads, ffn_multiplier, norm_eps, "
    "rope_base, tie_embeddings"
)


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "# nothing\n")) == Config()


def test_values_come_from_file_then_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {dim: 128, num_heads: 4}\nseed: 1\n")
    config = load_config(path, ["seed=2", "model.num_heads=2", "seed=3"])
    assert (config.model.dim, config.model.num_heads, config.seed) == (128, 2, 3)
    assert config.model.num_layers == ModelConfig().num_layers


def test_tree_holds_plain_values(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "optimizer: {betas: [0, 0.95]}\ndeepspeed: {timers: {a: [1]}}\n"))
    assert type(config) is Config
    assert config.optimizer.betas == (0.0, 0.95)
    assert type(config.optimizer.betas) is tuple
    assert type(config.deepspeed["timers"]) is dict
    assert type(config.deepspeed["timers"]["a"]) is list


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.max_steps=1e6", 1_000_000),
        ("training.max_steps=2_000_000", 2_000_000),
        ("training.stop_after=null", None),
        ("training.stop_after=7", 7),
        ("training.step_timeout=5", 5.0),
        ("wandb.name=42", "42"),
        ("wandb.name=a=b", "a=b"),
        ("wandb.name=${run_dir}", "runs/default"),
        ("data.sequence_length=${training.global_batch_size}", 256),
    ],
)
def test_accepted_values(tmp_path: Path, override: str, expected: object) -> None:
    config = load_config(write(tmp_path, ""), [override])
    section, name = override.split("=")[0].split(".")
    value = getattr(getattr(config, section), name)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.dmi=3", f"model.dmi = 3: unknown key; did you mean 'dim'? model has {MODEL_KEYS}"),
        ("model.qqq=3", f"model.qqq = 3: unknown key; model has {MODEL_KEYS}"),
        ("model.dim=abc", "model.dim = 'abc': expected an integer"),
        ("model.dim='128'", "model.dim = '128': expected an integer"),
        ("model.dim=true", "model.dim = True: expected an integer"),
        ("model.dim=1.5", "model.dim = 1.5: expected an integer"),
        ("model.dim=null", "model.dim = None: expected an integer"),
        ("model.dim.x=1", "model.dim = {'x': 1}: expected an integer"),
        ("training.stop_after=soon", "training.stop_after = 'soon': expected an integer or null"),
        ("optimizer.lr=fast", "optimizer.lr = 'fast': expected a finite number"),
        ("optimizer.lr=.inf", "optimizer.lr = inf: expected a finite number"),
        ("optimizer.lr=.nan", "optimizer.lr = nan: expected a finite number"),
        ("optimizer.betas=0.9", "optimizer.betas = 0.9: expected a list of 2 numbers"),
        ("optimizer.betas=[0.9]", "optimizer.betas = [0.9]: expected a list of 2 numbers"),
        ("optimizer.betas=[0.9,x]", "optimizer.betas = [0.9, 'x']: expected a list of 2 numbers"),
        ("data.path=[a]", "data.path = ['a']: expected a string"),
        ("model=3", f"model = 3: expected a section with the keys {MODEL_KEYS}"),
        ("model=", f"model = None: expected a section with the keys {MODEL_KEYS}"),
        ("deepspeed=3", "deepspeed = 3: expected a section"),
        ("model.kind=gpt", "model.kind = 'gpt': allowed are 'ebt', 'ar'"),
        ("model.kind=3", "model.kind = 3: allowed are 'ebt', 'ar'"),
        ("wandb.mode=off", "wandb.mode = False: allowed are 'disabled', 'offline', 'online'"),
        ("zero.stage=4", "zero.stage = 4: allowed are 0, 1, 2, 3"),
        (
            "training.activation_checkpointing=all",
            "training.activation_checkpointing = 'all': allowed are 'none', 'block'",
        ),
        ("mcmc.step_size_jitter=0.5", "mcmc.step_size_jitter = 0.5: must be at least 1"),
        ("mcmc.langevin_noise=-3", "mcmc.langevin_noise = -3.0: must be at least 0"),
        ("mcmc.replay_fraction=0", "mcmc.replay_fraction = 0.0: must be more than 0 and at most 1"),
        ("training.micro_batch_size=0", "training.micro_batch_size = 0: must be at least 1"),
        ("model.dim=-8", "model.dim = -8: must be at least 1"),
        ("model.vocab_size=0", "model.vocab_size = 0: must be at least 2"),
        ("optimizer.lr=0", "optimizer.lr = 0.0: must be more than 0"),
        ("optimizer.betas=[0.9,1]", "optimizer.betas = [0.9, 1.0]: must be at least 0 and less than 1"),
        ("optimizer.final_lr_ratio=2", "optimizer.final_lr_ratio = 2.0: must be at least 0 and at most 1"),
        ("model.dim", "no '=' in 'model.dim'; expected key=value, as in optimizer.lr=1e-3"),
        ("=3", "empty name in the key of '=3'; expected key=value, as in optimizer.lr=1e-3"),
        ("model..dim=3", "empty name in the key of 'model..dim=3'; expected key=value, as in optimizer.lr=1e-3"),
        (
            "deepspeed.bf16.enabled=true",
            "deepspeed.bf16 = {'enabled': True}: cannot be set here; set training.precision",
        ),
    ],
)
def test_refused_overrides(tmp_path: Path, override: str, message: str) -> None:
    assert error_of(write(tmp_path, ""), override) == f"command line: {message}"


def test_unknown_top_level_key_names_the_sections(tmp_path: Path) -> None:
    path = write(tmp_path, "modle: {dim: 3}\n")
    assert error_of(path).startswith(
        f"{path}: modle = {{'dim': 3}}: unknown key; did you mean 'model'? the top level has"
    )


def test_error_names_the_file_that_holds_the_value(tmp_path: Path) -> None:
    base = write(tmp_path, "model: {dim: wide}\n", "base.yaml")
    path = write(tmp_path, "extends: base.yaml\nmodel: {dim: 128}\n")
    assert error_of(path) == f"{base}: model.dim = 'wide': expected an integer"


def test_interpolations_are_checked_by_their_value(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 0\noptimizer: {lr: '${seed}'}\n")
    assert error_of(path) == f"{path}: optimizer.lr = 0.0: must be more than 0"
    path = write(tmp_path, "data: {path: '${nowhere}'}\n")
    assert error_of(path) == f"{path}: data.path: Interpolation key 'nowhere' not found"


def test_missing_file(tmp_path: Path) -> None:
    assert error_of(tmp_path / "no.yaml") == f"{tmp_path / 'no.yaml'}: no such file"
    assert "cannot be read" in error_of(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nmodel: [1\nrun_dir: x\n", "line 3: not valid YAML: did not find expected ',' or ']'"),
        ("seed: 1\nseed: 2\n", "line 2: not valid YAML: found duplicate key seed"),
        ("seed: 1\n\tmodel: 2\n", "line 2: not valid YAML: found a tab character that violates indentation"),
        ("- 1\n", "expected `key: value` lines, got a list"),
    ],
)
def test_bad_yaml(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    assert error_of(path) == f"{path}: {message}"


def test_file_that_is_a_mere_number(tmp_path: Path) -> None:
    path = write(tmp_path, "3\n")
    assert error_of(path) == f"{path}: expected `key: value` lines"


def test_bad_yaml_in_an_override(tmp_path: Path) -> None:
    message = error_of(write(tmp_path, ""), "optimizer.betas=[1")
    assert message.startswith("command line: optimizer.betas=[1: not valid YAML: ")


def test_extends_chain(tmp_path: Path) -> None:
    write(tmp_path, "seed: 1\nmodel: {dim: 128, num_heads: 2, num_layers: 3}\n", "base.yaml")
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub", "extends: ../base.yaml\nseed: 2\nmodel: {num_layers: 4}\n", "middle.yaml")
    config = load_config(write(tmp_path, "extends: sub/middle.yaml\nmodel: {num_heads: 4}\n"))
    assert (config.seed, config.model.dim, config.model.num_heads, config.model.num_layers) == (2, 128, 4, 4)


def test_extends_errors(tmp_path: Path) -> None:
    path = write(tmp_path, "extends: [a.yaml, b.yaml]\n")
    assert error_of(path) == f"{path}: extends = ['a.yaml', 'b.yaml']: expected the name of one YAML file"
    path = write(tmp_path, "extends: gone.yaml\n")
    assert error_of(path) == f"{path}: extends = 'gone.yaml': {tmp_path / 'gone.yaml'}: no such file"
    assert "extends = 'x': unknown key" in error_of(write(tmp_path, ""), "extends=x")


def test_extends_cycle(tmp_path: Path) -> None:
    a = write(tmp_path, "extends: b.yaml\n", "a.yaml")
    b = write(tmp_path, "extends: a.yaml\n", "b.yaml")
    assert error_of(a) == f"{b}: extends = 'a.yaml': files extend each other: {a} -> {b} -> {a}"
    assert "files extend each other" in error_of(write(tmp_path, "extends: run.yaml\n"))


def test_saved_configuration_reads_back_equal(tmp_path: Path) -> None:
    overrides = ["training.stop_after=5", "deepspeed.zero_optimization.overlap_comm=false", "optimizer.lr=1e-5"]
    config = load_config(write(tmp_path, ""), overrides)
    saved = tmp_path / "deep" / "config.yaml"
    save_config(config, saved)
    assert load_config(saved) == config
    assert os.listdir(saved.parent) == ["config.yaml"]


def test_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = tmp_path / "config.yaml"
    save_config(Config(seed=1), saved)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_config(Config(seed=2), saved)
    assert load_config(saved).seed == 1
    assert os.listdir(tmp_path) == ["config.yaml"]
