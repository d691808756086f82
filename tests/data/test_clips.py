"""Decoding of clips by presentation time, and data sets of them in every layout."""

import json
import pickle
import runpy
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image

from tessera.data import FilesConfig, Loader, index
from tessera.data.buckets import Buckets, BucketsConfig, assign_buckets
from tessera.data.cache import CacheWriter
from tessera.data.clips import Span, count_frames, load_clip, open_frames
from tessera.data.images import ImagesConfig, InvalidSample
from tessera.data.latents import open_cache
from tessera.errors import TesseraError

made = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("clip_files.py"))))
clip, grey, levels, shown, video = made.clip, made.grey, made.levels, made.shown, made.video

KINDS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif", ".webp", ".png", "")

WHOLE = Span()


def config(frames=4, **settings):
    return ImagesConfig(**{"size": (16, 16), "channels": 1, "frames": frames, **settings})


def read(source, span=WHOLE, **settings):
    return shown(load_clip(source, config(**settings), span)[0])


def data(path, frames=4, **settings):
    return FilesConfig(**{"path": str(path), "size": (16, 16), "channels": 1, "frames": frames, **settings}).open()


# One file


@pytest.mark.parametrize("suffix", KINDS)
def test_every_kind_of_file_has_its_frames_in_order(tmp_path, suffix):
    path = clip(tmp_path / f"clip{suffix}")
    assert read(path) == levels(8)[:4]
    assert read(path, frames=8) == levels(8)
    if suffix:
        assert read(path.read_bytes(), frames=8) == levels(8)
    assert count_frames(path, config(), Span()) == 8


@pytest.mark.parametrize("suffix", KINDS[:-1])
@pytest.mark.parametrize(("fps", "expected"), [(5, [0, 2, 4, 6]), (20, [0, 0, 1, 1, 2, 2]), (10, range(8))])
def test_clips_are_resampled_by_the_nearest_timestamp(tmp_path, suffix, fps, expected):
    path = clip(tmp_path / f"clip{suffix}")  # of 10 fps; between two frames at the same distance: the earlier
    assert count_frames(path, config(fps=fps), Span()) == 8 * fps / 10
    expected = [20 + 20 * number for number in expected]
    assert read(path, frames=len(expected), fps=fps) == expected


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_variable_frame_rate_is_read_by_time(tmp_path, suffix):
    times = [0, 0.1, 0.2, 0.9, 1.0, 1.1]
    path = clip(tmp_path / f"phone{suffix}", 6, times=times)
    expected = [0, 1, 2, 2, 2, 2, 2, 2, 2, 3, 4]  # a frame is shown until the next one begins
    assert read(path, frames=11, fps=10) == [20 + 20 * number for number in expected]
    assert read(path, frames=6) == levels(6)


def test_durations_of_an_animation_are_times(tmp_path):
    path = clip(tmp_path / "clip.webp", 3, milliseconds=[100, 500, 100])
    assert read(path, frames=7, fps=10) == [20, 40, 40, 40, 40, 40, 60]
    assert count_frames(path, config(fps=10), Span()) == 7


def test_rotation_is_applied(tmp_path):
    frames = np.zeros((4, 32, 48, 3), np.uint8)
    frames[:, :, :24] = 240  # the left half is bright
    path = video(tmp_path / "phone.mp4", frames, rotated=True)
    with open_frames(path) as opened:
        image = opened.read([0])[0]
        assert opened.rotation in (90, 270)
    assert (image.height, image.width) == (48, 32)
    pixels = np.asarray(image.convert("L"))
    assert pixels[:20].mean() > 200  # turned clockwise, left is up
    assert pixels[-20:].mean() < 40


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
@pytest.mark.parametrize(
    ("span", "expected"),
    [
        (Span(start=0.3), [3, 4, 5, 6]),
        (Span(start=0.25), [3, 4, 5, 6]),  # not the frame before
        (Span(first=2), [2, 3, 4, 5]),
        (Span(start=0.1, end=0.5), [1, 2, 3, 4]),
    ],
)
def test_a_part_of_a_file(tmp_path, suffix, span, expected):
    path = clip(tmp_path / f"clip{suffix}")
    assert read(path, span) == [20 + 20 * number for number in expected]


def test_seeking_to_a_late_part_of_a_long_video(tmp_path):
    values = [int(20 + 200 * abs(np.sin(number))) // 10 * 10 for number in range(300)]
    path = clip(tmp_path / "long.mp4", values=values, fps=25)
    assert read(path, Span(start=10)) == values[250:254]
    assert read(path, Span(first=290), frames=8) == values[290:298]


def test_short_clips(tmp_path):
    path = clip(tmp_path / "short.gif", 3)
    with pytest.raises(InvalidSample, match=r"too short: 3 of 5 frames \(data.short=pad or loop uses short clips\)"):
        read(path, frames=5)
    pixels, own = load_clip(path, config(5, short="pad"), Span())
    assert (shown(pixels), own) == ([20, 40, 60, 60, 60], 3)
    pixels, own = load_clip(path, config(5, short="loop"), Span())
    assert (shown(pixels), own) == ([20, 40, 60, 20, 40], 3)
    still = tmp_path / "still.png"
    Image.fromarray(grey([80])[0]).save(still)
    assert read(still, frames=1) == [80]


def test_the_order_of_frames_in_a_folder_is_that_of_their_numbers(tmp_path):
    path = clip(tmp_path / "frames", values=list(range(0, 240, 20)))  # frame-10 after frame-9
    assert read(path, frames=12) == list(range(0, 240, 20))
    assert read(path, Span(fps=20), frames=3, fps=10) == [0, 40, 80]


# What cannot be read


def damaged(tmp_path, kind):
    path = tmp_path / f"damaged{'.mp4' if kind != 'half gif' else '.gif'}"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not a video " * 100)
    elif kind == "audio":
        import av

        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=8000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.rate = 8000
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    else:
        clip(path, values=[20 * (number % 12) for number in range(40)])
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("empty", "empty"),
        ("text", "not an image, an animation or a video"),
        ("audio", "has no video stream"),
        ("half", "its end is missing"),
        ("half gif", "damaged|too short"),
    ],
)
def test_damaged_files_are_invalid_samples(tmp_path, kind, words):
    pytest.importorskip("av")
    path = damaged(tmp_path, kind)
    for source in (path, path.read_bytes()):
        with pytest.raises(InvalidSample, match=words):
            read(source, frames=30)


def test_a_truncated_stream_is_invalid_where_frames_are_missing(tmp_path):
    path = clip(tmp_path / "whole.mkv", values=[20 * (number % 12) for number in range(60)])
    content = path.read_bytes()
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(content[: len(content) * 2 // 3])
    assert read(cut, frames=8) == [20 * number for number in range(8)]
    with pytest.raises(InvalidSample, match="too short|cannot be decoded"):
        read(cut, frames=60)


@pytest.mark.parametrize(
    ("span", "words"),
    [
        (Span(start=5), "no frame from 5 s on: it has 0.8 s"),
        (Span(start=0.4, end=0.2), "expected 0 <= start < end"),
        (Span(start=float("nan")), "expected 0 <= start < end"),
        (Span(fps=0.0), "states 0 fps"),
        (Span(fps=1e9), r"states 1e\+09 fps"),
    ],
)
def test_impossible_parts(tmp_path, span, words):
    with pytest.raises(InvalidSample, match=words):
        read(clip(tmp_path / "clip.gif"), span)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"fps": 8}, "fps has no effect on images"),
        ({"short": "pad"}, "short has no effect on images"),
        ({"stride": 2}, "stride has no effect on images"),
        ({"buckets": {"frames": [4]}}, "buckets.frames has no effect on images"),
        ({"kind": "frame-folders"}, "kind frame-folders is for clips"),
        ({"frames": 8, "buckets": {"frames": [4]}}, "the longest of buckets.frames is 4, but frames is 8"),
        ({"frames": 8, "fps": 0}, "greater than 0"),
        ({"frames": 8, "fps": 1e9}, "less than or equal to 1000"),
        ({"frames": 0}, "greater than 0"),
    ],
)
def test_settings_without_effect_are_errors(settings, words):
    with pytest.raises(ValueError, match=words):
        FilesConfig(path="x", **settings)


def test_clips_are_not_flipped_unless_the_recipe_sets_it():
    assert not FilesConfig(path="x", frames=4).hflip
    assert FilesConfig(path="x", frames=4, hflip=True).hflip
    assert FilesConfig(path="x").hflip


# Layouts


def test_folders_of_clips_are_classes_with_captions_beside_them(tmp_path):
    for name in ("walk/a.mp4", "walk/b.gif", "jump/c.webp"):
        clip(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(f"the {name}")
    dataset = data(tmp_path)
    assert dataset.class_names == ("jump", "walk")
    captions = [dataset.caption(number) for number in range(3)]
    assert captions == ["the jump/c.webp", "the walk/a.mp4", "the walk/b.gif"]
    assert [shown(dataset.pixels(number)) for number in range(3)] == [levels(4)] * 3
    assert dataset.sizes().tolist() == [[8, 32, 48]] * 3
    again = pickle.loads(pickle.dumps(dataset))
    assert shown(again.pixels(1)) == levels(4)


def test_videos_without_frames_set_are_an_error_with_advice(tmp_path):
    clip(tmp_path / "a.mp4")
    with pytest.raises(TesseraError, match="contains no images .* it has 1 videos: set data.frames"):
        FilesConfig(path=str(tmp_path)).open()


def test_folders_of_frames(tmp_path):
    for name in ("cat/one", "cat/two", "dog/three"):
        clip(tmp_path / name)
    (tmp_path / "cat/one.txt").write_text("a cat")
    dataset = data(tmp_path, kind="frame-folders")
    assert (len(dataset), dataset.class_names, dataset.caption(0)) == (3, ("cat", "dog"), "a cat")
    assert shown(dataset.pixels(2)) == levels(4)
    assert dataset.name(2) == str(tmp_path / "dog/three")
    assert not [note for note in dataset.notes if note.severity != "note"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_list_of_parts_of_clips(tmp_path, suffix):
    clip(tmp_path / "videos/a.mp4", 12)
    clip(tmp_path / "videos/frames", 8)
    rows = [
        {"path": "videos/a.mp4", "start": 0.0, "end": 0.6, "fps": 10.0, "caption": "the beginning"},
        {"path": "videos/a.mp4", "start": 0.6, "end": 1.2, "fps": 10.0, "caption": "the end"},
        {"path": "videos/frames", "start": None, "end": None, "fps": 20.0, "caption": "frames"},
        {"path": "videos/a.mp4", "start": 3.0, "end": 4.0, "fps": 10.0, "caption": "nothing"},
    ]
    path = tmp_path / f"clips{suffix}"
    if suffix == ".csv":
        lines = [",".join("" if value is None else str(value) for value in row.values()) for row in rows]
        path.write_text("\n".join([",".join(rows[0]), *lines]))
    elif suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        parquet.write_table(pa.Table.from_pylist(rows), path)
    dataset = data(path, fps=10)
    assert len(dataset) == 4
    assert dataset.caption(1) == "the end"
    assert shown(dataset.pixels(0)) == [20, 40, 60, 80]
    assert shown(dataset.pixels(1)) == [140, 160, 180, 200]
    assert shown(dataset.pixels(2)) == [20, 60, 100, 140]
    with pytest.raises(InvalidSample, match="no frame from 3 s on"):
        dataset.pixels(3)
    index.write(dataset.table, tmp_path / "index.parquet")
    again = data(tmp_path / "index.parquet", fps=10)
    for number in range(2):
        assert np.array_equal(again.pixels(number), dataset.pixels(number))
    assert index.fingerprint(again.table) == index.fingerprint(dataset.table)
    column = dataset.table.schema.get_field_index("start")
    other = dataset.table.set_column(column, "start", pa.array([0.1, 0.6, None, 3.0]))
    assert index.fingerprint(other)["samples"] != index.fingerprint(dataset.table)["samples"]


def test_tars_of_clips(tmp_path):
    source = clip(tmp_path / "files/a.mp4")
    (tmp_path / "files/a.json").write_text('{"caption": "a clip", "label": "one"}')
    with tarfile.open(tmp_path / "clips.tar", "w") as tar:
        tar.add(source, "0001.mp4")
        tar.add(tmp_path / "files/a.json", "0001.json")
        tar.add(clip(tmp_path / "files/b.webp"), "0002.webp")
    dataset = data(tmp_path / "clips.tar", classes="none")
    assert (len(dataset), dataset.caption(0)) == (2, "a clip")
    assert [shown(dataset.pixels(number)) for number in range(2)] == [levels(4)] * 2


@pytest.mark.parametrize("column", ["video", "image", "bytes"])
def test_tables_of_clips(tmp_path, column):
    contents = [clip(tmp_path / f"files/{number}.webp", 5 + number).read_bytes() for number in range(3)]
    values = [{"bytes": content, "path": None} for content in contents] if column != "bytes" else contents
    table = pa.table({column: values, "text": ["a", "b", "c"], "group": ["x", "x", "y"]})
    parquet.write_table(table, tmp_path / "train.parquet")
    dataset = data(tmp_path / "train.parquet", label="group")
    assert (len(dataset), dataset.class_names, dataset.caption(2)) == (3, ("x", "y"), "c")
    assert shown(dataset.pixels(2)) == levels(4)
    assert dataset.lengths().tolist() == [5, 6, 7]


# Windows, buckets and batches


def test_several_clips_of_a_file(tmp_path):
    clip(tmp_path / "long.gif", 11)
    clip(tmp_path / "short.gif", 2)
    dataset = data(tmp_path, stride=3)
    assert len(dataset) == 4
    assert dataset.path_sizes == [4]
    starts = [shown(dataset.pixels(number))[0] for number in range(3)]
    assert starts == [20, 80, 140]
    with pytest.raises(InvalidSample, match="too short: 2 of 4"):
        dataset.pixels(3)
    assert shown(pickle.loads(pickle.dumps(dataset)).pixels(1)) == [80, 100, 120, 140]
    index.write(dataset.table, tmp_path / "index.parquet")
    assert shown(data(tmp_path / "index.parquet").pixels(2)) == [140, 160, 180, 200]
    with pytest.raises(TesseraError, match="lists several clips of a file already"):
        data(tmp_path / "index.parquet", stride=3)


def test_clips_get_the_longest_bucket_that_they_cover():
    sizes = BucketsConfig(aspect=1, frames=(1, 4, 8)).sizes((8, 32, 32))
    spatial = [size for size in sizes if size[1:] == (32, 32)]
    assert [size[0] for size in spatial] == [1, 4, 8]
    shapes = np.array([[9, 40, 40], [8, 40, 40], [7, 40, 40], [1, 40, 40], [100, 40, 40], [0, 0, 0]])
    chosen = [spatial[number][0] for number in assign_buckets(shapes, spatial)]
    assert chosen == [8, 8, 4, 1, 8, 1]
    # A bucket with too few clips passes them to a shorter one, not to a longer one.
    assert [spatial[number][0] for number in assign_buckets(shapes, spatial, min_samples=2)] == [8, 8, 1, 1, 8, 1]


def test_images_and_clips_in_one_run(tmp_path):
    for number in range(6):
        clip(tmp_path / f"clips/{number}.gif", 5)
        Image.fromarray(grey([200])[0]).save(tmp_path / f"{number}.png")
    dataset = data(tmp_path, classes="none", buckets={"frames": [1, 4], "aspect": 1})
    sizes = BucketsConfig(frames=(1, 4), aspect=1).sizes((4, 16, 16))
    buckets = Buckets.assign(dataset.sizes(), sizes, min_samples=2)
    loader = Loader(dataset, 2, seed=0, buckets=buckets, condition_fields=())
    shapes = {}
    for number in range(6):
        batch = loader.load_batch(2 * number)
        shapes[tuple(batch.pixels.shape[1:])] = batch.pixels
    assert set(shapes) == {(1, 1, 16, 16), (1, 4, 16, 16)}
    assert shown(shapes[1, 1, 16, 16][0].numpy()) == [200]
    assert shown(shapes[1, 4, 16, 16][0].numpy()) == levels(4)
    assert not loader.invalid_samples


def test_short_clips_are_skipped_or_padded_and_named(tmp_path):
    for number in range(3):
        clip(tmp_path / f"{number}.gif", 5)
    clip(tmp_path / "short.gif", 2)
    loader = Loader(data(tmp_path), 4, seed=0, condition_fields=())
    loader.load_batch(0)
    reason = "too short: 2 of 4 frames (data.short=pad or loop uses short clips)"
    assert loader.invalid_samples == {str(tmp_path / "short.gif"): reason}
    loader = Loader(data(tmp_path, short="pad"), 4, seed=0, condition_fields=())
    batch = loader.load_batch(0)
    assert loader.short_samples == {str(tmp_path / "short.gif"): "2 of 4 frames"}
    assert batch.own_frames is not None
    assert sorted(batch.own_frames.tolist()) == [2, 4, 4, 4]
    again = loader.load_batch(0).own_frames  # from memory
    assert again is not None
    assert torch.equal(again, batch.own_frames)
    loader = Loader(data(tmp_path, short="loop"), 4, seed=0, condition_fields=())
    assert loader.load_batch(0).own_frames is None
    assert loader.short_samples == {str(tmp_path / "short.gif"): "2 of 4 frames"}


# The latent cache


@pytest.fixture
def tiny_codec(tmp_path):
    """A codec with random weights that halves height and width three times."""
    from safetensors.torch import save_file

    from tessera.codecs import TinyConfig
    from tessera.codecs.tiny import Pair

    torch.manual_seed(0)
    folder = tmp_path / "codec"
    folder.mkdir()
    network = Pair(latent_channels=4, pool=False)
    for name in ("encoder", "decoder"):
        save_file(dict(getattr(network, name).state_dict()), folder / f"some_{name}.safetensors")
    return TinyConfig(source=str(folder))


def write_cache(folder, config, codec_config):
    dataset = config.open()
    writer = CacheWriter(folder, config, dataset, codec_config, codec_config.build(), shard_size=2)
    writer.begin()
    list(writer.write(range(len(writer)), torch.device("cpu"), batch_size=2))
    writer.finish()
    return dataset


def cached(folder, config, codec_config):
    return open_cache(folder, config, codec_config.build(), config.open())


def test_cached_latents_are_those_of_the_clips(tmp_path, tiny_codec):
    for number in range(5):
        clip(tmp_path / f"data/{number}.gif", 2 if number == 3 else 5)
    config = FilesConfig(path=str(tmp_path / "data"), size=(16, 16), frames=4, short="pad", caption=None)
    dataset = write_cache(tmp_path / "cache", config, tiny_codec)
    latents = cached(tmp_path / "cache", config, tiny_codec)
    assert latents.own_frames is not None
    assert latents.own_frames.tolist() == [4, 4, 4, 2, 4]
    moments = latents.gather(np.array([3, 0]), np.array([False, False]))
    assert moments.shape == (2, 4, 4, 2, 2)
    pixels = torch.from_numpy(np.stack([dataset.pixels(3), dataset.pixels(0)])).float() / 127.5 - 1
    expected = tiny_codec.build().encode(pixels)
    torch.testing.assert_close(moments.float(), expected, rtol=2e-3, atol=2e-3)
    loader = Loader(latents, 5, seed=0, condition_fields=())
    batch = loader.load_batch(0)
    assert batch.own_frames is not None
    assert sorted(batch.own_frames.tolist()) == [2, 4, 4, 4, 4]


def test_lengths_and_images_have_shards_of_their_own(tmp_path, tiny_codec):
    for number in range(3):
        clip(tmp_path / f"data/{number}.gif", 5)
        Image.fromarray(grey([200])[0]).save(tmp_path / f"data/{number}.png")
    config = FilesConfig(
        path=str(tmp_path / "data"), size=(16, 16), frames=4, caption=None, buckets={"frames": [1, 4], "aspect": 1}
    )
    write_cache(tmp_path / "cache", config, tiny_codec)
    latents = cached(tmp_path / "cache", config, tiny_codec)
    assert latents.buckets.sizes == [(1, 16, 16), (4, 16, 16)]
    assert sorted(latents.buckets.bucket_ids.tolist()) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    "changes",
    [{"frames": 3}, {"fps": 5}, {"short": "loop"}, {"stride": 2}, {"buckets": {"frames": [2, 4], "aspect": 1}}],
    ids=str,
)
def test_a_cache_of_other_clips_is_refused(tmp_path, tiny_codec, changes):
    clip(tmp_path / "data/a.gif", 8)
    settings = {"path": str(tmp_path / "data"), "size": (16, 16), "frames": 4, "caption": None}
    write_cache(tmp_path / "cache", FilesConfig(**settings), tiny_codec)
    name = next(iter(changes))
    with pytest.raises(TesseraError, match=f"(?s)no cache in .* images.{name}"):
        cached(tmp_path / "cache", FilesConfig(**settings | changes), tiny_codec)


def test_a_cache_of_changed_clips_is_refused(tmp_path, tiny_codec):
    clip(tmp_path / "data/a", 8)
    config = FilesConfig(path=str(tmp_path / "data"), size=(16, 16), frames=4, kind="frame-folders", caption=None)
    write_cache(tmp_path / "cache", config, tiny_codec)
    assert len(cached(tmp_path / "cache", config, tiny_codec)) == 1
    Image.fromarray(grey([200], (64, 64))[0]).save(tmp_path / "data/a/frame-2.png")
    with pytest.raises(TesseraError, match="(?s)no cache in .* data was"):
        cached(tmp_path / "cache", config, tiny_codec)
