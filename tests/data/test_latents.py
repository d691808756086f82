"""Reading of cached latents: rows of the shards by memory map, from the right cache or none."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tessera.codecs import Codec
from tessera.data import DigitsConfig
from tessera.data.files import FilesConfig
from tessera.data.latents import FORMAT, LatentsDataset, cache_key, cache_spec, open_cache
from tessera.errors import TesseraError


class FingerprintOnly(Codec):
    """A codec with nothing but a fingerprint."""

    pixel_channels, latent_channels, factor = 1, 2, 2

    def __init__(self, name: str = "f" * 64) -> None:
        self.name = name

    def fingerprint(self):
        return self.name

    def to(self, device):
        return self

    def moments(self, pixels):
        raise AssertionError("encoding is not expected")

    decode = moments


DATA = DigitsConfig(split="judge")


def write_cache(
    folder: Path, counts=(5, 0, 9, 2), dtype=torch.float16, hflip=False, config=DATA, codec=None, finished=True
) -> Path:
    """A cache of random latents [4, 3, 5], written without CacheWriter."""
    spec = cache_spec(config, codec or FingerprintOnly(), config.open()) | {
        "hflip": hflip,
        "dtype": str(dtype)[6:],
        "format": FORMAT,
    }
    home = folder / cache_key(spec)
    home.mkdir(parents=True)
    (home / "plan.json").write_text(json.dumps({"spec": spec, "names": {"codec": "autoencoder x", "data": "digits"}}))
    generator, shards, labels, indices = torch.Generator().manual_seed(0), [], [], []
    for shard, count in enumerate(counts):
        rows = {"labels": torch.arange(count, dtype=torch.int32) % 3, "indices": 100 * shard + torch.arange(count)}
        for name in ("latents", "flipped") if hflip else ("latents",):
            rows[name] = torch.randn(count, 4, 3, 5, generator=generator).to(dtype)
        path = home / f"{shard:06d}.safetensors"
        save_file(rows, path, {"tessera": "{}"})
        shards.append({"file": path.name, "count": count, "size": [6, 10], "bytes": path.stat().st_size})
        labels.append(rows["labels"])
        indices.append(rows["indices"])
    save_file({"labels": torch.cat(labels), "indices": torch.cat(indices)}, home / "samples.safetensors")
    if finished:
        cache = {"class_names": ["x", "y", "z"], "statistics": {}, "shards": shards}
        (home / "cache.json").write_text(json.dumps(cache))
    return home


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_equal_those_of_the_shards_in_any_order(tmp_path, dtype):
    home = write_cache(tmp_path, dtype=dtype, hflip=True)
    source = LatentsDataset(home)
    shards = [load_file(path) for path in sorted(home.glob("0*.safetensors"))]
    whole = torch.stack([torch.cat([shard[name] for shard in shards]) for name in ("latents", "flipped")])
    rng = np.random.default_rng(0)
    for length in (1, 7, 40):
        indices, flip = rng.integers(0, 16, length), rng.integers(0, 2, length).astype(bool)
        moments = source.gather(indices, flip)
        assert (moments.dtype, moments.shape) == (dtype, (length, 4, 3, 5))
        assert torch.equal(moments, whole[flip.astype(int), indices])
    assert len(source) == 16
    assert source.labels.tolist() == torch.cat([shard["labels"] for shard in shards]).tolist()
    assert [source.label(index) for index in (0, 6, 15)] == [0, 1, 1]
    assert [source.name(index) for index in (4, 5)] == ["digits sample 4", "digits sample 200"]
    assert source.class_names == ("x", "y", "z")
    assert source.buckets.sizes == [(6, 10)]


@pytest.mark.parametrize("wrong", [-1, 16])
def test_indices_out_of_range_are_an_error(tmp_path, wrong):
    with pytest.raises(IndexError):
        LatentsDataset(write_cache(tmp_path)).gather(np.array([3, wrong]), np.zeros(2, bool))


def test_flipped_latents_that_were_not_cached_are_an_error(tmp_path):
    with pytest.raises(IndexError):
        LatentsDataset(write_cache(tmp_path)).gather(np.array([3]), np.ones(1, bool))


def test_a_data_set_can_be_pickled(tmp_path):
    source = LatentsDataset(write_cache(tmp_path))
    indices, straight = np.array([15, 0, 5]), np.zeros(3, bool)
    before = source.gather(indices, straight)
    pickled = pickle.dumps(source)
    assert len(pickled) < 1000  # without its memory maps
    assert torch.equal(pickle.loads(pickled).gather(indices, straight), before)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="this system does not list open files")
def test_open_shards_hold_no_file_handles(tmp_path):
    source = LatentsDataset(write_cache(tmp_path, counts=(2,) * 200))
    before = len(os.listdir("/proc/self/fd"))
    source.gather(np.arange(400), np.zeros(400, bool))
    assert len(source._maps) == 200
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_truncated_shard_is_an_error(tmp_path):
    home = write_cache(tmp_path)
    path = home / "000002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TesseraError, match=r"000002\.safetensors is damaged: \d+ bytes of \d+; run the same"):
        LatentsDataset(home)
    path.unlink()
    with pytest.raises(TesseraError, match=r"000002\.safetensors is damaged: no bytes"):
        LatentsDataset(home)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"class_names": [], "statistics": {}, "shards": 3}'])
def test_a_damaged_cache_json_is_an_error(tmp_path, content):
    home = write_cache(tmp_path)
    (home / "cache.json").write_text(content)
    with pytest.raises(TesseraError, match=r"cache\.json.*run the same `tessera data cache` again"):
        LatentsDataset(home)


# Which cache


def test_the_cache_of_this_data_and_codec_is_selected(tmp_path):
    write_cache(tmp_path, config=DigitsConfig(split="model"))
    write_cache(tmp_path, codec=FingerprintOnly("e" * 64))
    home = write_cache(tmp_path)
    assert open_cache(tmp_path, DATA, FingerprintOnly(), DATA.open()).folder == home


def test_a_cache_with_flips_can_be_read_without_them(tmp_path):
    home = write_cache(tmp_path, hflip=True)
    assert open_cache(tmp_path, DATA, FingerprintOnly(), DATA.open()).folder == home


def test_a_cache_can_be_read_without_its_images(tmp_path):
    home = write_cache(tmp_path)
    assert open_cache(tmp_path, DATA, FingerprintOnly(), None).folder == home
    with pytest.raises(TesseraError, match="codec was ffffffff"):
        open_cache(tmp_path, DATA, FingerprintOnly("e" * 64), None)


def test_other_caches_are_an_error_with_the_differences(tmp_path):
    write_cache(tmp_path)
    other = DigitsConfig(split="model")
    with pytest.raises(TesseraError) as error:
        open_cache(tmp_path, other, FingerprintOnly("e" * 64), other.open(), "tessera data cache r.yaml")
    message = str(error.value)
    assert "codec was ffffffff (autoencoder x), is eeeeeeee; data was " in message
    assert " (digits), is " in message
    assert message.endswith("\ncreate it: tessera data cache r.yaml")


def test_different_image_settings_are_reported(tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    config = FilesConfig(path=str(tmp_path), size=(8, 8), hflip=False)
    write_cache(tmp_path / "caches", config=config)
    for change, message in (
        ({"size": (4, 4)}, "images.size was [8, 8], is [4, 4]"),
        ({"hflip": True}, "hflip was False, is True"),
        ({"background": (0, 0, 0)}, "images.background was [255, 255, 255], is [0, 0, 0]"),
    ):
        with pytest.raises(TesseraError) as error:
            open_cache(tmp_path / "caches", config.model_copy(update=change), FingerprintOnly(), config.open())
        assert message in str(error.value)


def test_no_cache_and_an_unfinished_one_are_errors(tmp_path):
    with pytest.raises(TesseraError, match="there is none\ncreate it: tessera data cache RECIPE"):
        open_cache(tmp_path, DATA, FingerprintOnly(), DATA.open())
    write_cache(tmp_path, finished=False)
    with pytest.raises(TesseraError, match="not finished"):
        open_cache(tmp_path, DATA, FingerprintOnly(), DATA.open())


def test_a_cache_of_another_format_is_an_error(tmp_path):
    home = write_cache(tmp_path)
    (home / "plan.json").write_text(json.dumps({"facts": {"format": 1}}))
    for read in (lambda: LatentsDataset(home), lambda: open_cache(tmp_path, DATA, FingerprintOnly(), DATA.open())):
        with pytest.raises(TesseraError, match=f"has format 1.* reads format {FORMAT} only.*delete it"):
            read()
