"""Samples of digits: what is measured of them, and the documentation's table of what was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.image_samples import RESULTS, measure, spread, table
from ebwm_dist.files import read_records
from ebwm_dist.prepare.sample_images import digits

DOCUMENT = Path(__file__).parents[2] / "docs" / "images.md"


def test_the_documentation_holds_what_was_measured() -> None:
    missing = [line for line in table(read_records(RESULTS)) if line not in DOCUMENT.read_text()]
    assert not missing, "run `python -m benchmarks.image_samples`"


def test_samples_are_measured_beside_held_out_images() -> None:
    made = digits()
    images, classes = made["images"].reshape(-1, 64) / (255 / 16), made["labels"]
    trained, held_out = (images[300:], classes[300:]), (images[:300], classes[:300])
    found = measure(held_out, trained, held_out)
    assert found["of_class"] == found["held_out_of_class"] > 0.9
    assert found["diversity"] == found["nearest"] == 1.0
    means = np.stack([trained[0][trained[1] == number].mean(0) for number in range(10)]).repeat(2, 0)
    alike = measure((means, np.arange(10).repeat(2)), trained, held_out)
    assert alike["of_class"] == 1.0 and alike["diversity"] == 0.0 and 0.5 < alike["nearest"] < 1.5
    assert measure((trained[0][:50], (trained[1][:50] + 1) % 10), trained, held_out)["of_class"] == 0.0
    assert measure(trained, trained, held_out)["nearest"] == 0.0


def test_the_spread_is_that_of_pairs() -> None:
    images = np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0], [0.0, 2.0]])
    assert spread(images, np.array([0, 0, 1, 1])) == pytest.approx((5 + 1) / 2)


def test_seeds_share_a_row() -> None:
    records = [{"name": "a", "passes": 3, "of_class": share, "diversity": 0.5, "nearest": 1.0} for share in (0.9, 1.0)]
    assert list(table(records))[2:] == ["| a | 3 | 2 | 95.0 ± 7.1 | 0.50 ± 0.00 | 1.00 ± 0.00 |"]
