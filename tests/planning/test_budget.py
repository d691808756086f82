"""Budgets by hand."""

import pytest

from tessera.errors import TesseraError
from tessera.planning.budget import best_published, parse


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("8h", 28800), ("90m", 5400), ("90min", 5400), ("2d", 172800), ("1.5h", 5400), ("30s", 30)],
)
def test_a_time_budget_is_wall_clock_time_on_any_number_of_devices(text, seconds):
    assert parse(text).seconds(1, 0) == parse(text).seconds(8, 3.0) == seconds


def test_money_and_device_hours_are_divided_among_the_devices():
    assert parse("$48").seconds(8, 3.0) == 2 * 3600
    assert parse("64gpuh").seconds(8, 0) == 8 * 3600
    assert parse("1e18").seconds(8, 3.0) is None
    with pytest.raises(TesseraError, match="--price"):
        parse("$48").seconds(8, 0)


@pytest.mark.parametrize("text", ["-8h", "8 hours", "$8h", "h", "", "0h", "8", "$0", "1e999", "nanh"])
def test_invalid_budgets_are_refused(text):
    with pytest.raises(TesseraError, match="--budget"):
        parse(text)


def test_the_best_published_model_has_the_lowest_fid_within_the_budget():
    assert "DiT-XL/2 after 400,000 steps" in best_published(7.4e19)
    assert "DiT-XL/2 after 7,000,000 steps" in best_published(1e22)
    assert "DiT-L/2" in best_published(7.2e19)  # XL/2 took 6 x 118.64e9 x 256 x 400,000 = 7.29e19
    assert "no model" in best_published(1e15)
    assert "DiT-S/8" in best_published(1e15)
