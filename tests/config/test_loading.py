from __future__ import annotations

import os
from pathlib import Path

import pytest

from ebwm_dist.config.loading import load_config, save_config
from ebwm_dist.config.renames import RENAMED_KEYS, translate_section
from ebwm_dist.config.schema import Config, ModelConfig
from ebwm_dist.errors import ConfigError

MODEL_KEYS = (
    "kind, variant, num_landscapes, embedding_dim, vocab_size, dim, num_layers, num_heads, ffn_multiplier, norm_eps, "
    "rope_base, tie_embeddings, energy_head, add_most_recent, block_size, block_shape, prefix, num_classes"
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
        ("model.dim=abc", "model.dim = abc: expected an integer"),
        ("model.dim='128'", "model.dim = '128': expected an integer"),
        ("model.dim=true", "model.dim = true: expected an integer"),
        ("model.dim=1.5", "model.dim = 1.5: expected an integer"),
        ("model.dim=null", "model.dim = null: expected an integer"),
        ("model.dim.x=1", "model.dim = {'x': 1}: expected an integer"),
        ("training.stop_after=soon", "training.stop_after = soon: expected an integer or null"),
        ("optimizer.lr=fast", "optimizer.lr = fast: expected a finite number"),
        ("optimizer.lr=.inf", "optimizer.lr = .inf: expected a finite number"),
        ("optimizer.lr=.nan", "optimizer.lr = .nan: expected a finite number"),
        ("optimizer.betas=0.9", "optimizer.betas = 0.9: expected a list of 2 numbers"),
        ("optimizer.betas=[0.9]", "optimizer.betas = [0.9]: expected a list of 2 numbers"),
        ("optimizer.betas=[0.9,x]", "optimizer.betas = [0.9, x]: expected a list of 2 numbers"),
        ("data.path=", "data.path = : expected a non-empty string"),
        ("data.path=''", "data.path = '': expected a non-empty string"),
        ("model=3", f"model = 3: expected a section with the keys {MODEL_KEYS}"),
        ("model=", f"model = None: expected a section with the keys {MODEL_KEYS}"),
        ("deepspeed=3", "deepspeed = 3: expected a section"),
        ("model.kind=gpt", "model.kind = gpt: allowed are 'ebt', 'ar', 'dit'"),
        ("model.kind=3", "model.kind = 3: allowed are 'ebt', 'ar', 'dit'"),
        ("wandb.mode=off", "wandb.mode = off: allowed are 'disabled', 'offline', 'online'"),
        ("zero.stage=4", "zero.stage = 4: allowed are 0, 1, 2, 3"),
        (
            "training.activation_checkpointing=all",
            "training.activation_checkpointing = all: allowed are 'none', 'block'",
        ),
        ("mcmc.step_size=automatic", "mcmc.step_size = automatic: expected a finite number or 'auto'"),
        ("mcmc.step_size=0", "mcmc.step_size = 0: must be more than 0"),
        ("mcmc.step_size_jitter=0.5", "mcmc.step_size_jitter = 0.5: must be at least 1"),
        ("mcmc.langevin_noise=-3", "mcmc.langevin_noise = -3: must be at least 0"),
        ("mcmc.replay_fraction=0", "mcmc.replay_fraction = 0: must be more than 0 and at most 1"),
        ("training.micro_batch_size=0", "training.micro_batch_size = 0: must be at least 1"),
        ("model.dim=-8", "model.dim = -8: must be at least 1"),
        ("model.vocab_size=0", "model.vocab_size = 0: must be at least 2"),
        ("optimizer.lr=0", "optimizer.lr = 0: must be more than 0"),
        ("optimizer.betas=[0.9,1]", "optimizer.betas = [0.9, 1]: must be at least 0 and less than 1"),
        ("optimizer.final_lr_ratio=2", "optimizer.final_lr_ratio = 2: must be at least 0 and at most 1"),
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
        f"{path}: modle = {{dim: 3}}: unknown key; did you mean 'model'? the top level has"
    )


def test_error_names_the_file_that_holds_the_value(tmp_path: Path) -> None:
    base = write(tmp_path, "model: {dim: wide}\n", "base.yaml")
    path = write(tmp_path, "extends: base.yaml\nmodel: {num_heads: 2}\n")
    assert error_of(path) == f"{base}: model.dim = wide: expected an integer"


def test_interpolations_are_checked_by_their_value(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 0\noptimizer: {lr: '${seed}'}\n")
    assert error_of(path) == f"{path}: optimizer.lr = 0: must be more than 0"
    path = write(tmp_path, "data: {path: '${nowhere}'}\n")
    assert error_of(path) == f"{path}: data.path: Interpolation key 'nowhere' not found"


def test_missing_file(tmp_path: Path) -> None:
    assert error_of(tmp_path / "no.yaml") == f"{tmp_path / 'no.yaml'}: no such file"
    assert "cannot be read" in error_of(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nmodel: [1\nrun_dir: x\n", "line 3: not valid YAML: expected ',' or ']', but got ':'"),
        ("seed: 1\nseed: 2\n", "line 2: not valid YAML: found duplicate key seed"),
        ("seed: 1\n\tmodel: 2\n", "line 2: not valid YAML: found character '\\t' that cannot start any token"),
        ("- 1\n", "expected `key: value` lines"),
        ("3\n", "expected `key: value` lines"),
    ],
)
def test_bad_yaml(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    assert error_of(path) == f"{path}: {message}"


def test_bad_yaml_in_an_override(tmp_path: Path) -> None:
    message = error_of(write(tmp_path, ""), "optimizer.betas=[1")
    assert message.startswith("command line: optimizer.betas=[1: not valid YAML: ")


WRITTEN = [
    "0012", "2024_10_05", "2024-10-05", "1e5", "0x1F", "12:30:45", "off", "yes", "null", "~", "3.0", "1_000", ".inf",
    "runs/lr[1]", "=",
]  # fmt: skip


@pytest.mark.parametrize("text", WRITTEN)
def test_strings_keep_what_was_written(tmp_path: Path, text: str) -> None:
    """On the command line, in a file, in the file of a run, and as the name of a folder in a mixture."""
    config = load_config(write(tmp_path, ""), [f"run_dir={text}", f"data.path={text}"])
    assert (config.run_dir, config.data.path) == (text, text)
    optional = None if text in ("null", "~") else text
    assert load_config(write(tmp_path, ""), [f"wandb.name={text}"]).wandb.name == optional
    assert load_config(write(tmp_path, f"wandb: {{name: '{text}'}}\n")).wandb.name == text
    file = write(tmp_path, f"run_dir: {text}\ndata:\n  mixture:\n    {text}: 0012.5\n".replace("0012.5", "12.5"))
    config = load_config(file)
    assert config.run_dir == text and config.data.mixture == {text: 12.5}
    config.wandb.name = text
    config.deepspeed = {"csv_monitor": {"job_name": text}}
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(
    ("written", "expected"),
    [("'a b'", "a b"), ('"null"', "null"), ("a: b #c", "a: b #c"), ("{a}", "{a}"), ("*x", "*x"), ("[", "[")],
)
def test_a_string_needs_quotes_for_nothing_on_the_command_line(tmp_path: Path, written: str, expected: str) -> None:
    assert load_config(write(tmp_path, ""), [f"wandb.name={written}"]).wandb.name == expected


MIXTURE = "data: {mixture: {a: 1, b: 2}}\ndeepspeed: {timers: {x: 1}, dump_state: true}\n"


def test_a_mapping_replaces_the_one_before(tmp_path: Path) -> None:
    base = write(tmp_path, MIXTURE, "base.yaml")
    assert load_config(base, ["data.mixture={c: 3}"]).data.mixture == {"c": 3.0}
    assert load_config(base, ["data.mixture={}"]).data.mixture == {}
    assert load_config(base, ["data={mixture: {c: 3}}"]).data.mixture == {"c": 3.0}
    assert load_config(base, ["deepspeed={dump_state: false}"]).deepspeed == {"dump_state": False}
    assert load_config(base, ["deepspeed={}"]).deepspeed == {}
    child = write(tmp_path, "extends: base.yaml\ndata: {mixture: {c: 3}}\ndeepspeed: {timers: {y: 1}}\n")
    config = load_config(child)
    assert (config.data.mixture, config.deepspeed) == ({"c": 3.0}, {"timers": {"y": 1}})


def test_a_name_inside_a_mapping_keeps_the_others(tmp_path: Path) -> None:
    base = write(tmp_path, MIXTURE)
    overrides = ["data.mixture.b=3", "data.mixture.data/v1.2=0.5", "deepspeed.timers.y=2"]
    config = load_config(base, overrides)
    assert config.data.mixture == {"a": 1.0, "b": 3.0, "data/v1.2": 0.5}
    assert config.deepspeed == {"timers": {"x": 1, "y": 2}, "dump_state": True}
    assert load_config(base).data.mixture == {"a": 1.0, "b": 2.0}


def test_a_weight_may_be_a_schedule(tmp_path: Path) -> None:
    base = write(tmp_path, "data: {mixture: {a: [[0, 1], [1e5, 0]], b: 2}}\n", "base.yaml")
    config = load_config(base, ["data.mixture.c/v1.2=[[1000, 0], [2000, .5]]"])
    assert config.data.mixture == {"a": [(0, 1.0), (100_000, 0.0)], "b": 2.0, "c/v1.2": [(1000, 0.0), (2000, 0.5)]}
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    expected = "names, and a finite number or points [[sample, weight], ...] for each"
    for wrong in ("[0, 1]", "[[0, 1, 2]]", "[[1.5, 1]]", "high", "[[0, nan]]"):
        assert error_of(base, f"data.mixture={{a: {wrong}}}").endswith(expected)
    for wrong in ("-1", "[[0, -1], [9, 2]]", "[[-5, 1]]"):
        assert error_of(base, f"data.mixture={{a: {wrong}}}").endswith("must be at least 0")
    assert "the weight of a must be more than 0 somewhere" in error_of(base, "data.mixture.a=[]")


def test_a_path_that_a_mixture_would_hide_is_refused(tmp_path: Path) -> None:
    base = write(tmp_path, MIXTURE, "base.yaml")
    hidden = "to train on data.path alone, set data.mixture={} too"
    message = f"command line: data.path = x: would not be read, as {base} sets data.mixture; {hidden}"
    assert error_of(base, "data.path=x") == message
    child = write(tmp_path, "extends: base.yaml\ndata: {path: x}\n")
    assert error_of(child) == f"{child}: {message.removeprefix('command line: ')}"
    assert "command line sets data.mixture" in error_of(base, "data.mixture={a: 1}", "data.path=x")
    for overrides in (["data.path=x", "data.mixture={}"], ["data.mixture={}", "data.path=x"]):
        config = load_config(base, overrides)
        assert (config.data.path, config.data.mixture) == ("x", {})
    config = load_config(base, ["data.path=x", "data.mixture={c: 1}"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


OLD = {
    "mcmc.step_size_spread": ("mcmc.step_size_jitter", "2.0", 2.0),
    "training.positions_per_pass": ("training.position_chunk", "64", 64),
    "data.smallest_crop": ("data.min_crop_scale", "1", 1.0),
    "evaluation.most_steps": ("evaluation.max_mcmc_steps", "3", 3),
}


def test_every_renamed_key_is_tested() -> None:
    assert {old: new for old, (new, _, _) in OLD.items()} == RENAMED_KEYS


@pytest.mark.parametrize("old", OLD)
def test_an_old_key_is_refused_unless_it_is_stored(tmp_path: Path, old: str) -> None:
    new, written, value = OLD[old]
    section, name = old.split(".")
    path = write(tmp_path, f"{section}: {{{name}: {written}}}\n")
    message = f"{old} = {written}: this key is now {new}"
    assert error_of(path) == f"{path}: {message}"
    assert error_of(write(tmp_path, "", "empty.yaml"), f"{old}={written}") == f"command line: {message}"
    found = load_config(path, stored=True)
    assert getattr(getattr(found, section), new.split(".")[1]) == value


@pytest.mark.parametrize(("old", "new"), [("step", "truncated"), ("chain", "full")])
def test_an_old_value_is_refused_unless_it_is_stored(tmp_path: Path, old: str, new: str) -> None:
    path = write(tmp_path, f"mcmc: {{gradient: {old}}}\n")
    message = f"mcmc.gradient = {old}: this value is now {new!r}"
    assert error_of(path) == f"{path}: {message}"
    assert error_of(write(tmp_path, "", "empty.yaml"), f"mcmc.gradient={old}") == f"command line: {message}"
    assert load_config(path, stored=True).mcmc.gradient == new


def test_settings_in_a_checkpoint_are_translated() -> None:
    saved = {"num_steps": 2, "step_size_spread": 2.0, "gradient": "chain", "loss": "mean"}
    expected = {"num_steps": 2, "step_size_jitter": 2.0, "gradient": "full", "loss": "mean"}
    assert translate_section("mcmc", saved) == expected == translate_section("mcmc", expected)


def test_extends_chain(tmp_path: Path) -> None:
    write(tmp_path, "seed: 1\nmodel: {dim: 128, num_heads: 2, num_layers: 3}\n", "base.yaml")
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub", "extends: ../base.yaml\nseed: 2\nmodel: {num_layers: 4}\n", "middle.yaml")
    config = load_config(write(tmp_path, "extends: sub/middle.yaml\nmodel: {num_heads: 4}\n"))
    assert (config.seed, config.model.dim, config.model.num_heads, config.model.num_layers) == (2, 128, 4, 4)


def test_extends_errors(tmp_path: Path) -> None:
    path = write(tmp_path, "extends: [a.yaml, b.yaml]\n")
    assert error_of(path) == f"{path}: extends = [a.yaml, b.yaml]: expected the name of one YAML file"
    path = write(tmp_path, "extends: gone.yaml\n")
    assert error_of(path) == f"{path}: extends = 'gone.yaml': {tmp_path / 'gone.yaml'}: no such file"
    assert "extends = x: unknown key" in error_of(write(tmp_path, ""), "extends=x")


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
