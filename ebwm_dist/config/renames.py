"""Keys and values that have new names: a user's file with an old one is refused, that of a stored run is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RENAMED_KEYS = {
    "mcmc.step_size_spread": "mcmc.step_size_jitter",
    "training.positions_per_pass": "training.position_chunk",
    "data.smallest_crop": "data.min_crop_scale",
    "evaluation.most_steps": "evaluation.max_mcmc_steps",
}
RENAMED_VALUES = {"mcmc.gradient": {"step": "truncated", "chain": "full"}}


def translate(key: str, value: Any) -> tuple[str, Any]:
    """Return a key and its value, as any version has written them, by their present names."""
    names = RENAMED_VALUES.get(key, {})
    return RENAMED_KEYS.get(key, key), names.get(value, value) if isinstance(value, str) else value


def translate_section(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a section that a checkpoint was saved with, by their present names."""
    pairs = (translate(f"{section}.{name}", value) for name, value in values.items())
    return {key.removeprefix(f"{section}."): value for key, value in pairs}
