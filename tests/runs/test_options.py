"""Options that several commands share."""

import pytest

from tessera.cli import options
from tessera.cli.options import ProgressLines, parse_sample_size, parse_shard, parse_size
from tessera.errors import TesseraError


def test_shards_count_from_1_on_the_command_line():
    assert parse_shard(None) == (0, 1)
    assert [parse_shard(text) for text in ("1/3", "2/3", "3/3")] == [(0, 3), (1, 3), (2, 3)]


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2", "1/2/3", ""])
def test_invalid_shards(text):
    with pytest.raises(TesseraError, match=f"--shard {text} is not valid: write I/N"):
        parse_shard(text)


@pytest.mark.parametrize(
    ("text", "size"), [(None, None), ("256", (256, 256)), ("256x384", (256, 384)), ("8X4", (8, 4))]
)
def test_sizes(text, size):
    assert parse_size(text) == size
    assert parse_sample_size(text) == size


def test_sizes_of_clips():
    assert parse_sample_size("16x256x384") == (16, 256, 384)
    for text in ("16x256x", "16x256x384x3", "axbxc"):
        with pytest.raises(TesseraError, match=f"--size {text} is not valid: .* or 16x256x384"):
            parse_sample_size(text)


@pytest.mark.parametrize("text", ["", "256x", "x256", "256x3x4", "wide"])
def test_invalid_sizes(text):
    with pytest.raises(TesseraError, match="is not valid: write 256 or 256x384"):
        parse_size(text)


def test_progress_lines_estimate_the_remaining_time(capsys, monkeypatch):
    clock = iter([0.0, 1.0, 11.0, 12.0, 31.0])
    monkeypatch.setattr(options.time, "monotonic", lambda: next(clock))
    report = ProgressLines("encoding")
    for done in (100, 110, 112, 130):  # 100 existed before
        report(done, 160)
    assert capsys.readouterr().err == "encoding: 110 of 160, 55 s left\nencoding: 130 of 160, 31 s left\n"


def test_progress_lines_count_the_first_item_if_none_existed(capsys, monkeypatch):
    clock = iter([0.0, 0.0, 20.0, 40.0])
    monkeypatch.setattr(options.time, "monotonic", lambda: next(clock))
    report = ProgressLines("planning")
    for done in (0, 1, 2):
        report(done, 4)
    assert capsys.readouterr().err == "planning: 1 of 4, 1 min 0 s left\nplanning: 2 of 4, 40 s left\n"
