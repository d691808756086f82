"""Cached latents as they are read: rows of the shards by memory map, of the right cache or of none."""

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
from tessera.data.latents import LatentsDataset, cache_key, cache_spec, open_cache
from tessera.errors import TesseraError


class Named(Codec):
    """A codec that is nothing but its fingerprint."""

    pixel_channels, latent_channels, factor = 1, 2, 2

    def __init__(self, name: str = "f" * 64) -> None:
        self.name = name

    def fingerprint(self):
        return self.name

    def to(self, device):
        return self

    def moments(self, pixels):
        raise AssertionError("nothing is encoded here")

    decode = moments


DATA = DigitsConfig(split="judge")


def lay_out(
    folder: Path, counts=(5, 0, 9, 2), dtype=torch.float16, hflip=False, config=DATA, codec=None, finished=True
) -> Path:
    """A cache of random latents [4, 3, 5], laid out by hand."""
    told = cache_spec(config, codec or Named(), config.open()) | {"hflip": flip, "dtype": str(dtype)[6:]}
    home = folder / cache_key(told)
    home.mkdir(parents=True)
    (home / "plan.json").write_text(json.dumps({"facts": told, "told": {"codec": "autoencoder x", "data": "digits"}}))
    draw, shards, labels, numbers = torch.Generator().manual_seed(0), [], [], []
    for shard, count in enumerate(counts):
        rows = {"labels": torch.arange(count, dtype=torch.int32) % 3, "numbers": 100 * shard + torch.arange(count)}
        for name in ("latents", "mirrored") if flip else ("latents",):
            rows[name] = torch.randn(count, 4, 3, 5, generator=draw).to(dtype)
        path = home / f"{shard:06d}.safetensors"
        save_file(rows, path, {"tessera": "{}"})
        shards.append({"file": path.name, "count": count, "size": [6, 10], "bytes": path.stat().st_size})
        labels.append(rows["labels"])
        numbers.append(rows["numbers"])
    save_file({"labels": torch.cat(labels), "numbers": torch.cat(numbers)}, home / "samples.safetensors")
    if finished:
        cache = {"class_names": ["x", "y", "z"], "statistics": {}, "shards": shards}
        (home / "cache.json").write_text(json.dumps(cache))
    return home


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_are_those_of_the_shards_in_any_order(tmp_path, dtype):
    home = lay_out(tmp_path, dtype=dtype, hflip=True)
    source = LatentsDataset(home)
    shards = [load_file(path) for path in sorted(home.glob("0*.safetensors"))]
    whole = torch.stack([torch.cat([shard[name] for shard in shards]) for name in ("latents", "mirrored")])
    draw = np.random.default_rng(0)
    for length in (1, 7, 40):
        indices, mirrored = draw.integers(0, 16, length), draw.integers(0, 2, length).astype(bool)
        found = source.gather(indices, mirrored)
        assert (found.dtype, found.shape) == (dtype, (length, 4, 3, 5))
        assert torch.equal(found, whole[mirrored.astype(int), indices])
    assert len(source) == 16
    assert source.labels.tolist() == torch.cat([shard["labels"] for shard in shards]).tolist()
    assert [source.label(index) for index in (0, 6, 15)] == [0, 1, 1]
    assert [source.name(index) for index in (4, 5)] == ["digits sample 4", "digits sample 200"]
    assert source.class_names == ("x", "y", "z")
    assert source.buckets.sizes == [(6, 10)]


@pytest.mark.parametrize("wrong", [-1, 16])
def test_samples_that_are_not_there_are_an_error(tmp_path, wrong):
    with pytest.raises(IndexError):
        LatentsDataset(lay_out(tmp_path)).gather(np.array([3, wrong]), np.zeros(2, bool))


def test_mirrored_latents_that_were_not_cached_are_an_error(tmp_path):
    with pytest.raises(IndexError):
        LatentsDataset(lay_out(tmp_path)).gather(np.array([3]), np.ones(1, bool))


def test_a_source_may_be_pickled(tmp_path):
    source = LatentsDataset(lay_out(tmp_path))
    indices, straight = np.array([15, 0, 5]), np.zeros(3, bool)
    before = source.gather(indices, straight)
    pickled = pickle.dumps(source)
    assert len(pickled) < 1000  # its maps do not travel
    assert torch.equal(pickle.loads(pickled).gather(indices, straight), before)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="this system does not tell which files are open")
def test_open_shards_hold_no_file_handles(tmp_path):
    source = LatentsDataset(lay_out(tmp_path, counts=(2,) * 200))
    before = len(os.listdir("/proc/self/fd"))
    source.gather(np.arange(400), np.zeros(400, bool))
    assert len(source._maps) == 200
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_shard_that_was_cut_short_is_refused(tmp_path):
    home = lay_out(tmp_path)
    path = home / "000002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TesseraError, match=r"000002\.safetensors is damaged: \d+ bytes of \d+; run the same"):
        LatentsDataset(home)
    path.unlink()
    with pytest.raises(TesseraError, match=r"000002\.safetensors is damaged: no bytes"):
        LatentsDataset(home)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"class_names": [], "statistics": {}, "shards": 3}'])
def test_a_damaged_cache_json_is_refused(tmp_path, content):
    home = lay_out(tmp_path)
    (home / "cache.json").write_text(content)
    with pytest.raises(TesseraError, match=r"cache\.json is damaged"):
        LatentsDataset(home)


# Which cache


def test_the_cache_of_this_data_and_codec_is_found_among_others(tmp_path):
    lay_out(tmp_path, config=DigitsConfig(split="model"))
    lay_out(tmp_path, codec=Named("e" * 64))
    home = lay_out(tmp_path)
    assert open_cache(tmp_path, DATA, Named(), DATA.open()).folder == home


def test_a_cache_of_mirror_images_serves_without_them_but_not_the_other_way(tmp_path):
    home = lay_out(tmp_path, hflip=True)
    assert open_cache(tmp_path, DATA, Named(), DATA.open()).folder == home


def test_a_cache_of_images_that_are_not_at_hand_is_taken_at_its_word(tmp_path):
    home = lay_out(tmp_path)
    assert open_cache(tmp_path, DATA, Named(), None).folder == home
    with pytest.raises(TesseraError, match="codec was ffffffff"):
        open_cache(tmp_path, DATA, Named("e" * 64), None)


def test_other_caches_are_refused_with_what_differs_and_what_to_do(tmp_path):
    lay_out(tmp_path)
    other = DigitsConfig(split="model")
    with pytest.raises(TesseraError) as refused:
        open_cache(tmp_path, other, Named("e" * 64), other.open(), "tessera data cache r.yaml")
    said = str(refused.value)
    assert "codec was ffffffff (autoencoder x), is eeeeeeee; data was " in said
    assert " (digits), is " in said
    assert said.endswith("\nmake it: tessera data cache r.yaml")


def test_settings_of_images_that_differ_are_named(tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    config = FilesConfig(path=str(tmp_path), size=(8, 8), hflip=False)
    lay_out(tmp_path / "caches", config=config)
    for change, said in (
        ({"size": (4, 4)}, "images.size was [8, 8], is [4, 4]"),
        ({"hflip": True}, "flip was False, is True"),
        ({"background": (0, 0, 0)}, "images.background was [255, 255, 255], is [0, 0, 0]"),
    ):
        with pytest.raises(TesseraError) as refused:
            open_cache(tmp_path / "caches", config.model_copy(update=change), Named(), config.open())
        assert said in str(refused.value)


def test_no_cache_and_an_unfinished_one_are_refused(tmp_path):
    with pytest.raises(TesseraError, match="there is none\nmake it: tessera data cache RECIPE"):
        open_cache(tmp_path, DATA, Named(), DATA.open())
    lay_out(tmp_path, finished=False)
    with pytest.raises(TesseraError, match="begun, but not finished"):
        open_cache(tmp_path, DATA, Named(), DATA.open())
