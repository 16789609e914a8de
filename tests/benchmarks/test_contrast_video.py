"""The documentation of video shows what both objectives made of frames."""

from __future__ import annotations

from pathlib import Path

from benchmarks.contrast_video import CONTRAST, DATA, RESULTS, table
from ebwm_dist.config.loading import load_config
from ebwm_dist.files import read_records

ROOT = Path(__file__).parents[2]


def test_the_documentation_holds_what_was_measured() -> None:
    page = (ROOT / "docs" / "video.md").read_text()
    assert "\n".join(table(read_records(RESULTS))) in page, "run `python -m benchmarks.contrast_video`"


def test_both_objectives_are_configurations() -> None:
    for config, settings in DATA.values():
        for more in ((), CONTRAST):
            load_config(ROOT / "configs" / f"{config}.yaml", [*settings, *more])
