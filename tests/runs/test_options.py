"""Options that several commands share."""

import pytest

from tessera.cli import options
from tessera.cli.options import ProgressLines, parse_shard, parse_size
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


def test_progress_lines_estimate_the_remaining_time(capsys, monkeypatch):
    clock = iter([0.0, 1.0, 11.0, 12.0, 31.0])
    monkeypatch.setattr(options.time, "monotonic", lambda: next(clock))
    report = ProgressLines("encoding")
    for done in (100, 110, 112, 130):  # 100 existed before
        report(done, 160)
    assert capsys.readouterr().err == "encoding: 110 of 160, 55 s left\nencoding: 130 of 160, 31 s left\n"
