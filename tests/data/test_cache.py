"""Writing of cached latents: those of the codec, in shards written atomically and never twice."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional

from tessera.codecs import AutoencoderConfig, Codec, PixelsConfig
from tessera.data import DigitsConfig, FilesConfig
from tessera.data.buckets import BucketsConfig
from tessera.data.cache import CacheWriter, LatentStatistics, damaged_shards, scaled_statistics
from tessera.data.latents import LatentsDataset
from tessera.errors import TesseraError

CPU = torch.device("cpu")
CONFIG = AutoencoderConfig(source="halves")  # the description of the codec; nothing is loaded from it


class Halves(Codec):
    """A weighted mean of 2 x 2 pixels, larger on the left. The standard deviation is a tenth of the brightness."""

    pixel_channels = latent_channels = 3
    factor = 2

    def __init__(self, stochastic: bool = True, weight: float = 1.0) -> None:
        self.stochastic, self.weight, self.num_encoded = stochastic, weight, 0
        self.scale, self.shift = torch.tensor([2.0, 1.0, 0.5])[:, None, None], 0.25

    def to(self, device):
        return self

    def moments(self, pixels):
        self.num_encoded += len(pixels)
        kernel = torch.tensor([[0.5, 0.0], [0.25, 0.25]]).expand(3, 1, 2, 2) * self.weight
        mean = functional.conv2d(pixels, kernel, stride=2, groups=3)
        return torch.cat((mean, (mean + 2) / 10 if self.stochastic else torch.zeros_like(mean)), dim=1)

    def decode(self, latents):
        return functional.interpolate(latents, scale_factor=2)

    def fingerprint(self):
        return f"{self.weight}:{self.stochastic}"


@pytest.fixture
def images(tmp_path) -> Path:
    """Two class folders of 11 images in all, one of them damaged, another too small."""
    rng = np.random.default_rng(0)
    for number in range(11):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        side = 5 if number == 7 else 8
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(path)
        if number == 4:
            path.write_bytes(path.read_bytes()[:60])
    return tmp_path / "images"


def make(out: Path, images: Path, codec: Codec | None = None, dtype="float16", samples=4, **settings) -> CacheWriter:
    config = FilesConfig.model_validate({"path": str(images), "size": 8, **settings})
    return CacheWriter(out, config, config.open(), CONFIG, codec or Halves(), dtype, samples)


def write_all(cache: CacheWriter, batch_size: int = 3) -> LatentsDataset:
    """The cache as a data set, after all missing shards are written."""
    cache.begin()
    missing = [shard for shard, absent in cache.missing(range(len(cache))) if absent]
    assert sum(cache.write(missing, CPU, batch_size)) == sum(len(cache.indices(shard)) for shard in missing)
    assert cache.finish() is not None
    return LatentsDataset(cache.folder)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_latents_are_the_moments_of_image_and_flipped_image(images, tmp_path, dtype):
    cache = make(tmp_path / "out", images, dtype=dtype)
    dataset = write_all(cache)
    valid = [number for number in range(11) if cache.dataset.name(number).rpartition("/")[2] not in ("4.png", "7.png")]
    assert dataset.indices.tolist() == valid
    assert dataset.labels.tolist() == [cache.dataset.label(number) for number in valid]
    assert dataset.class_names == ("a", "b")
    pixels = torch.from_numpy(np.stack([cache.dataset.pixels(number) for number in valid])) / 127.5 - 1
    everything = np.arange(len(valid))
    for flip in (False, True):
        expected = Halves().moments(pixels.flip(-1) if flip else pixels).to(getattr(torch, dtype))
        moments = dataset.gather(everything, np.full(len(valid), flip))
        assert torch.equal(moments, expected)
    assert not torch.equal(moments, dataset.gather(everything, np.zeros(len(valid), bool)))


def test_invalid_samples_are_left_out_and_reported(images, tmp_path):
    dataset = write_all(make(tmp_path / "out", images))
    lines = [json.loads(line) for line in (dataset.folder / "skipped.jsonl").read_text().splitlines()]
    assert [Path(line["name"]).name for line in lines] == ["4.png", "7.png"]
    assert lines[0]["reason"].startswith("damaged")
    assert "smaller than the size: 5 x 5" in lines[1]["reason"]
    assert {line["index"] for line in lines} == set(range(11)) - set(dataset.indices.tolist())
    assert (len(dataset), json.loads((dataset.folder / "cache.json").read_text())["skipped"]) == (9, 2)


def test_without_hflip_and_with_a_deterministic_codec_only_the_mean_is_stored(images, tmp_path):
    cache = make(tmp_path / "out", images, Halves(stochastic=False), hflip=False)
    dataset = write_all(cache)
    assert dataset.gather(np.arange(9), np.zeros(9, bool)).shape == (9, 3, 4, 4)
    assert set(load_file(cache.path(0))) == {"latents", "labels", "indices"}
    statistics = dataset.statistics
    assert statistics["mode_std"] == statistics["sample_std"]
    assert cache.codec.num_encoded == 9


def test_embedded_data(tmp_path):
    config = DigitsConfig(split="judge")
    codec = Halves()
    codec.pixel_channels = codec.latent_channels = 1
    codec.moments = lambda pixels: torch.cat((pixels[:, :, ::2, ::2], pixels[:, :, 1::2, 1::2].abs()), dim=1)
    dataset = write_all(CacheWriter(tmp_path, config, config.open(), CONFIG, codec, shard_size=100), batch_size=64)
    assert len(dataset) == 500
    assert dataset.labels.tolist() == config.open().labels.tolist()


# Statistics


def test_statistics_of_all_latents(images, tmp_path):
    dataset = write_all(make(tmp_path / "out", images))
    both = [dataset.gather(np.arange(9), np.full(9, flip)) for flip in (False, True)]
    mean, deviation = torch.cat(both).double().chunk(2, dim=1)
    across = (0, 2, 3)
    np.testing.assert_allclose(dataset.statistics["mean"], mean.mean(across), rtol=1e-12)
    np.testing.assert_allclose(dataset.statistics["mode_std"], mean.std(across, correction=0), rtol=1e-12)
    samples = mean + deviation * torch.randn(4000, *mean.shape, dtype=torch.float64, generator=torch.manual_seed(0))
    np.testing.assert_allclose(dataset.statistics["sample_std"], samples.std((0, 1, 3, 4)), rtol=2e-3)


def test_scale_and_shift_from_the_statistics_give_mean_0_and_std_1(images, tmp_path):
    codec = Halves()
    dataset = write_all(make(tmp_path / "out", images, codec))
    mean, deviation = scaled_statistics(dataset.statistics, codec)
    statistics = dataset.statistics
    np.testing.assert_allclose(mean, (np.array(statistics["mean"]) - 0.25) * [2, 1, 0.5], rtol=1e-6)
    np.testing.assert_allclose(deviation, np.array(statistics["sample_std"]) * [2, 1, 0.5], rtol=1e-6)
    codec.shift = torch.tensor(statistics["mean"])[:, None, None]
    codec.scale = 1 / torch.tensor(statistics["sample_std"])[:, None, None]
    mean, deviation = scaled_statistics(statistics, codec)
    np.testing.assert_allclose(mean, 0, atol=1e-6)
    np.testing.assert_allclose(deviation, 1, rtol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_merged_statistics_are_exact_where_the_mean_is_large(offset):
    parts = torch.randn(7, 5, 4, 3, 3, dtype=torch.float64, generator=torch.manual_seed(0)) * 0.01
    parts[:, :, :2] += offset
    whole = parts.flatten(0, 1)
    merged = LatentStatistics.from_moments(parts[0, :2], 2) + LatentStatistics.from_moments(parts[0, 2:], 2)
    for part in parts[1:]:
        merged = merged + LatentStatistics.from_moments(part, 2)
    np.testing.assert_allclose(merged.mean, whole[:, :2].mean((0, 2, 3)), rtol=1e-14)
    np.testing.assert_allclose(merged.mode_std, whole[:, :2].std((0, 2, 3), correction=0), rtol=1e-6)
    assert LatentStatistics.from_json(json.loads(json.dumps(merged.to_json()))).to_json() == merged.to_json()


# Shards


def test_shards_are_the_same_bytes_in_any_order(images, tmp_path):
    whole = make(tmp_path / "one", images)
    write_all(whole)
    for shard in range(len(whole)):
        with safe_open(whole.path(shard), "np") as file:
            assert list(file.metadata()) == ["tessera"]
    first, second = make(tmp_path / "two", images), make(tmp_path / "two", images)
    assert len(first) == 3
    for cache, shards in ((first, [2, 0]), (second, [1])):
        cache.begin()
        list(cache.write(shards, CPU, 3))
        assert (cache.finish() is None) == (cache is first)
    assert content(first.folder) == content(whole.folder)


def test_existing_shards_are_not_encoded_again(images, tmp_path):
    first = make(tmp_path / "out", images)
    first.begin()
    list(first.write([1], CPU, 3))
    before = os.stat(first.path(1)).st_ino
    again = make(tmp_path / "out", images)
    write_all(again)
    assert os.stat(again.path(1)).st_ino == before
    assert again.codec.num_encoded + first.codec.num_encoded == 2 * 9
    assert write_all(third := make(tmp_path / "out", images)).folder == again.folder
    assert third.codec.num_encoded == 0


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def cut_to_nothing(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)


def change_metadata(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'\\"shard\\": 1', b'\\"shard\\": 2'))


@pytest.mark.parametrize("damage", [cut, cut_to_nothing, flip_a_bit, change_metadata, Path.unlink])
def test_a_damaged_shard_is_found_and_written_again(images, tmp_path, damage):
    cache = make(tmp_path / "out", images)
    dataset = write_all(cache)
    whole, calls = content(cache.folder), []
    assert damaged_shards(dataset, lambda done, total: calls.append((done, total))) == []
    assert calls == [(1, 3), (2, 3), (3, 3)]
    damage(cache.path(1))
    assert damaged_shards(dataset, lambda done, total: None) == ["000001.safetensors"]
    again = make(tmp_path / "out", images)
    assert [shard for shard, absent in again.missing(range(3)) if absent] == [1]
    write_all(again)
    assert content(cache.folder) == whole


def test_partial_files_of_killed_runs_are_removed_at_the_end(images, tmp_path):
    cache = make(tmp_path / "out", images)
    cache.begin()
    partial = cache.folder / "000001.safetensors.0123abcd.partial"
    partial.write_bytes(b"half")
    write_all(cache)
    assert not partial.exists()
    assert len(list(cache.folder.iterdir())) == 3 + 4


def test_a_shard_has_images_of_one_bucket(tmp_path):
    rng = np.random.default_rng(1)
    (tmp_path / "images").mkdir()
    for number in range(9):
        shape = ((8, 16), (16, 8), (12, 12))[number % 3]
        Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8)).save(tmp_path / "images" / f"{number}.png")
    buckets = BucketsConfig(multiple=4, aspect=2)
    cache = make(tmp_path / "out", tmp_path / "images", samples=2, size=[8, 16], buckets=buckets, upscale=True)
    dataset = write_all(cache)
    assert sorted(dataset.indices.tolist()) == list(range(9))
    for index, number in enumerate(dataset.indices.tolist()):
        height, width = dataset.buckets.sizes[dataset.buckets.bucket_ids[index]]
        pixels = torch.from_numpy(cache.dataset.pixels(number, (height, width)))[None] / 127.5 - 1
        moments = dataset.gather(np.array([index]), np.array([True]))
        assert torch.equal(moments, Halves().moments(pixels.flip(-1)).half())
    assert len(dataset.buckets.sizes) == 3
    different = np.array([np.flatnonzero(dataset.buckets.bucket_ids == bucket)[0] for bucket in (0, 2)])
    with pytest.raises(ValueError, match="one size"):
        dataset.gather(different, np.zeros(2, bool))


# The key


@pytest.mark.parametrize(
    "change",
    [
        {"size": 4},
        {"hflip": False},
        {"background": (0, 0, 0)},
        {"upscale": True},
        {"decoding": "fast"},
        {"buckets": BucketsConfig(multiple=4)},
        {"classes": "none"},
        {"dtype": "bfloat16"},
        {"samples": 5},
        {"codec": Halves(weight=0.5)},
    ],
)
def test_every_setting_that_changes_the_latents_changes_the_key(images, tmp_path, change):
    assert make(tmp_path, images, **change).key != make(tmp_path, images).key


def test_changed_images_change_the_key_and_moved_images_do_not(images, tmp_path):
    before = make(tmp_path, images).key
    moved = images.rename(tmp_path / "elsewhere")
    assert make(tmp_path, moved).key == before
    os.utime(moved / "a/0.png", (1e9, 1e9))
    touched = make(tmp_path, moved).key
    (moved / "b/9.png").rename(moved / "a/9.png")
    relabelled = make(tmp_path, moved).key
    (moved / "a/9.png").unlink()
    fewer = make(tmp_path, moved).key
    assert len({before, touched, relabelled, fewer}) == 4


def test_scale_and_shift_are_not_part_of_the_key(images, tmp_path):
    codec = Halves()
    codec.scale, codec.shift = 3.0, 1.0
    assert make(tmp_path, images, codec).key == make(tmp_path, images).key


# Errors


@pytest.mark.parametrize(
    ("value", "message"),
    [(1e6, r"a/0\.png are too large for float16: add --dtype bfloat16"), (float("nan"), r"a/0\.png that are NaN")],
)
def test_latents_that_cannot_be_stored_are_reported_with_the_image(images, tmp_path, value, message):
    cache = make(tmp_path / "out", images, Halves(weight=value))
    cache.begin()
    with pytest.raises(TesseraError, match=message):
        list(cache.write([0], CPU, 3))
    assert not cache.path(0).exists()


def test_data_and_codec_must_match(images, tmp_path):
    with pytest.raises(TesseraError, match=r"7 x 8 cannot be divided into squares of 2 pixels.*change data\.size"):
        make(tmp_path, images, size=[7, 8])
    with pytest.raises(TesseraError, match=r"images of 3 channels, but data\.channels is 1"):
        make(tmp_path, images, channels=1)
    with pytest.raises(TesseraError, match="no latents to cache"):
        make(tmp_path, images, PixelsConfig().build())


def test_data_without_a_valid_image_is_an_error(images, tmp_path):
    cache = make(tmp_path / "out", images, size=64)
    cache.begin()
    list(cache.write(range(len(cache)), CPU, 3))
    with pytest.raises(TesseraError, match=r"no image of .* is valid:\n.*0\.png: smaller than the size"):
        cache.finish()
