"""Numbers as text."""

import pytest

from tessera.reporting.text import format_bytes, format_duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (42, "42 s"), (59.9, "59 s"), (200, "3 min 20 s"), (18600, "5 h 10 min"), (183600, "2 d 3 h")],
)
def test_durations_have_two_units(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (24.4 * 2**30, "24.4 GiB"), (1010 * 2**20, "1,010 MiB")],
)
def test_bytes_have_three_digits(count, text):
    assert format_bytes(count) == text
