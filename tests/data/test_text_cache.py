"""Cached embeddings of captions: the same numbers as encoding them, in any number of processes, never a stale cache."""

import pickle
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tessera.data import text_cache
from tessera.data.cache import damaged_shards, write_in_processes
from tessera.data.captions import Captions, encode_captions
from tessera.data.text_cache import CachedTokens, TextCacheWriter, open_text_cache
from tessera.encoders.text import FolderConfig
from tessera.errors import TesseraError

made = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("layout_files.py"))))
CPU = torch.device("cpu")
WORDS = ["small", "large", "red", "blue", "circle", "square", "left", "right", "of"]
TEXTS = [" ".join(WORDS[number % 7 : number % 7 + 1 + number % 3]) + " a" * (number // 21) for number in range(60)]


def table(folder: Path, captions=None) -> Path:
    texts = captions or [[text, f"a {text}"] if number % 5 == 0 else [text] for number, text in enumerate(TEXTS)]
    return made.table(folder / "a.parquet", *range(len(texts)), caption=texts)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(text_cache, "TEXTS_PER_SHARD", 16)


@pytest.fixture
def data(tmp_path):
    return made.open_data(table(tmp_path / "data"))


@pytest.fixture
def writer(tmp_path, data, text_encoder_folder) -> TextCacheWriter:
    config = FolderConfig(source=str(text_encoder_folder), max_tokens=5)
    return TextCacheWriter(tmp_path / "cache", Captions.of(data), config, config.build(), "the data")


def write(writer: TextCacheWriter) -> dict:
    writer.begin()
    missing = [shard for shard, absent in writer.missing(range(len(writer))) if absent]
    assert sum(writer.write(missing, CPU, 32)) == sum(len(writer.indices(shard)) for shard in missing)
    summary = writer.finish()
    assert summary is not None
    return summary


def test_the_cache_holds_what_encoding_gives(writer, data, tmp_path, small_shards):
    summary = write(writer)
    captions, encoder = writer.captions, writer.config.build()
    assert len(summary["shards"]) == len(writer) > 2
    assert summary["count"] == len(captions)
    cached = open_text_cache(tmp_path / "cache", captions, encoder)
    read = encode_captions(data, captions, encoder, 0, cached)
    computed = encode_captions(data, captions, encoder, 0)
    positions = torch.arange(60)
    for samples in (range(60), [59, 0, 30]):
        tokens = read.tokens(samples, positions[: len(samples)])
        torch.testing.assert_close(tokens, computed.tokens(samples, positions[: len(samples)]), rtol=1e-3, atol=1e-3)
        assert torch.equal(
            read.mask(samples, positions[: len(samples)]), computed.mask(samples, positions[: len(samples)])
        )
    assert read.sizes == computed.sizes
    assert (cached.is_cut == computed.values.is_cut).all()
    assert 0 < cached.is_cut.sum() == summary["cut"]
    assert len(cached) == len(captions)
    sizes = sum(np.prod(cached[number].shape) * 2 for number in range(len(cached)))
    files = sum((cached.folder / shard["file"]).stat().st_size for shard in cached.shards)
    assert files < sizes + 2000 * len(cached.shards)  # of true length, float16
    copy = pickle.loads(pickle.dumps(cached))
    assert (copy[17] == cached[17]).all()


def test_the_encoder_is_not_loaded_to_train_on_a_cache(writer, data, tmp_path, monkeypatch):
    write(writer)
    encoder = writer.config.build()
    text = encode_captions(
        data, writer.captions, encoder, 0, open_text_cache(tmp_path / "cache", writer.captions, encoder)
    )
    text.tokens(range(60), torch.arange(60))
    known, mask = text.encoder.encode([TEXTS[0], TEXTS[3]])  # as the prompts of a grid of samples
    assert "network" not in encoder.__dict__
    expected, expected_mask = encoder.encode([TEXTS[0], TEXTS[3]])
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(known[mask], expected[mask], rtol=2e-3, atol=2e-3)
    assert torch.equal(text.encoder.encode(["of of"])[0], encoder.encode(["of of"])[0])
    long = next(text for text, is_cut in zip(writer.captions.texts.to_pylist(), text.values.is_cut) if is_cut)
    cut, _ = text.encoder.encode([long, "of of"])  # a training caption is cut as in training
    torch.testing.assert_close(cut[0], encoder.encode([long], cut=True)[0][0], rtol=2e-3, atol=2e-3)
    with pytest.raises(TesseraError, match="takes at most 5"):
        text.encoder.encode([f"{long} of"])


def test_processes_and_interruptions_give_the_same_bytes(writer, small_shards, tmp_path):
    write(writer)
    files = {path.name: path.read_bytes() for path in sorted(writer.folder.iterdir())}
    (writer.folder / "000001.safetensors").unlink()
    damaged = writer.folder / "000002.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    (writer.folder / text_cache.SUMMARY).unlink()
    assert [shard for shard, absent in writer.missing(range(len(writer))) if absent] == [1, 2]
    assert writer.finish() is None
    write(writer)
    assert {path.name: path.read_bytes() for path in sorted(writer.folder.iterdir())} == files
    assert damaged_shards(CachedTokens(writer.folder), lambda done, total: None) == []


@pytest.mark.slow
@pytest.mark.run
def test_several_processes(writer, tmp_path, monkeypatch):
    write(writer)
    files = {path.name: path.read_bytes() for path in sorted(writer.folder.iterdir())}
    for path in writer.folder.glob("0*"):
        path.unlink()
    shards = [0] * 2  # both processes write the only shard
    assert sum(write_in_processes(writer, shards, 2, 32)) == 2 * len(writer.captions)
    writer.finish()
    assert {path.name: path.read_bytes() for path in sorted(writer.folder.iterdir())} == files


def test_a_stale_cache_is_not_used(writer, tmp_path, text_encoder_folder):
    write(writer)
    folder, captions = tmp_path / "cache", writer.captions
    changed = Captions.of(made.open_data(table(tmp_path / "other", [["a red circle"]] * 60)))
    with pytest.raises(
        TesseraError, match=r"captions was .{8} \(the data\), is .{8}; number of captions was \d+, is 1\n"
    ):
        open_text_cache(folder, changed, writer.encoder)
    longer = FolderConfig(source=str(text_encoder_folder), max_tokens=6).build()
    with pytest.raises(TesseraError, match=r"text encoder was .{8} \(.*text-encoder\), is .{8}\n.*tessera data cache"):
        open_text_cache(folder, captions, longer)
    weights = text_encoder_folder / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(TesseraError, match="text encoder was"):
        open_text_cache(folder, captions, writer.config.build())
    with pytest.raises(TesseraError, match="there is none\ncreate it"):
        open_text_cache(tmp_path / "absent", captions, writer.encoder)


def test_a_cache_that_is_not_finished_or_damaged(writer, tmp_path):
    writer.begin()
    with pytest.raises(TesseraError, match="not finished"):
        open_text_cache(tmp_path / "cache", writer.captions, writer.encoder)
    write(writer)
    (writer.folder / "000000.safetensors").write_bytes(b"short")
    with pytest.raises(TesseraError, match="is damaged: 5 bytes of"):
        open_text_cache(tmp_path / "cache", writer.captions, writer.encoder)
