from __future__ import annotations

from dataclasses import fields, is_dataclass

import pytest

from ebwm_dist.config.schema import Config
from ebwm_dist.config.values import KEYS, SECTIONS, Plain, typed
from ebwm_dist.errors import ConfigError


def test_every_key_is_there_and_every_default_is_accepted() -> None:
    config = Config()
    sections = {field.name: getattr(config, field.name) for field in fields(config)}
    sections = {name: section for name, section in sections.items() if is_dataclass(section)}
    assert set(SECTIONS) == {"", *sections}
    assert set(KEYS) == {"run_dir", "seed", "deepspeed"} | {
        f"{name}.{field.name}" for name, section in sections.items() for field in fields(section)
    }
    for name, key in KEYS.items():
        assert typed(name, key.default) == key.default, name


def test_every_number_has_limits() -> None:
    for name, key in KEYS.items():
        is_number = "int" in str(key.type) or "float" in str(key.type)
        assert ("limits" in key.metadata) == (is_number and "choices" not in key.metadata), name


@pytest.mark.parametrize(
    ("name", "written", "value"),
    [
        ("training.max_steps", "1e6", 1_000_000),
        ("training.max_steps", "2_000_000", 2_000_000),
        ("optimizer.lr", "1e-3", 1e-3),
        ("optimizer.lr", "1.E-3", 1e-3),
        ("optimizer.lr", ".5", 0.5),
        ("optimizer.weight_decay", "0", 0.0),
        ("training.compile", "True", True),
        ("training.compile", "off", False),
        ("training.stop_after", "~", None),
        ("wandb.name", "", None),
    ],
)
def test_meaning_of_a_scalar(name: str, written: str, value: object) -> None:
    found = typed(name, Plain(written))
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("written", ["0012", "2024_10_05", "1_00", "0x10", "1:30", "2024-10-05", "٣", "1__000", ""])
def test_only_decimal_numbers_are_numbers(written: str) -> None:
    with pytest.raises(ConfigError, match="^seed = .*: expected an integer$"):
        typed("seed", Plain(written))
    with pytest.raises(ConfigError, match="^optimizer.lr = .*: expected a finite number$"):
        typed("optimizer.lr", Plain(written))


def test_free_mappings_hold_what_json_can_hold() -> None:
    section = {name: Plain(name) for name in ("1e5", "12", "012", "2024-10-05", "yes", "null", "a")}
    found = typed("deepspeed", {"timers": {**section, "quoted": "12", "list": [Plain("1.5")]}})["timers"]
    assert found == {
        "1e5": 1e5, "12": 12, "012": "012", "2024-10-05": "2024-10-05", "yes": True, "null": None, "a": "a",
        "quoted": "12", "list": [1.5],
    }  # fmt: skip
    assert {type(found["012"]), type(found["a"])} == {str}
