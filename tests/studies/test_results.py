"""Results of members, read from their files."""

import math

import pytest

from tessera.studies.results import training_seconds


def test_seconds_of_training_by_hand():
    """Batches of 10. To step 4 at 20 images/s: 2 s. To step 8 at 40 images/s: 1 s more. Later the last rate holds."""
    log = [
        {"step": 4, "images_per_second": 20.0},
        {"step": 6, "fd": 1.0},
        {"step": 8, "images_per_second": 40.0},
    ]
    expected = {0: 0.0, 1: 0.5, 4: 2.0, 6: 2.5, 8: 3.0, 10: 3.5}
    for step, seconds in expected.items():
        assert training_seconds(log, 10, step) == pytest.approx(seconds)
    assert math.isnan(training_seconds([], 10, 4))
