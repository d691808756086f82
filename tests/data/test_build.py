"""`tessera data build`: output against Pillow, planted defects, interruptions at any time, shards of the work."""

import hashlib
import io
import json
import os
import platform
import runpy
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from tessera import storage
from tessera.data import build, index
from tessera.data.build import Builder, BuildRecipe, select, write
from tessera.data.check import scan
from tessera.data.check.scan import ScanShard
from tessera.data.files import FilesConfig, FilesDataset
from tessera.errors import TesseraError
from tessera.settings import validate

made = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "layout_files.py")))


def image(seed: int, height: int, width: int) -> Image.Image:
    """A smooth image that is like no image of another seed."""
    cells = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path) -> Path:
    """Twenty images of two classes with captions."""
    for number in range(20):
        path = tmp_path / f"images/{('cat', 'dog')[number % 2]}/{number:02d}.png"
        made.put(path, encoded(image(number, 40 + number, 60)))
        made.put(path.with_suffix(".txt"), f"animal {number}\n")
    return tmp_path / "images"


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(scan, "PART_SIZE", 4)


def recipe(sources: Any, output: Path, **changes: Any) -> BuildRecipe:
    sources = [str(each) if isinstance(each, Path) else each for each in sources]
    plain = {"size": 32, "encoding": "png", "samples_per_shard": 6}
    return validate(BuildRecipe, {"sources": sources, "output": str(output), **plain, **changes}, "the recipe")


def summary(recipe: BuildRecipe, **options: Any) -> dict[str, Any]:
    result = build.build(recipe, **options).summary
    assert result is not None
    return result


def left_out(output: Path) -> list[tuple[str, str]]:
    lines = (output / build.LEFT_OUT).read_text().splitlines()
    return [(record["name"], record["reason"]) for record in map(json.loads, lines)]


def opened(path: Path, **changes: Any) -> FilesDataset:
    return FilesConfig(path=str(path), size=32, **changes).open()


def images_of(path: Path) -> list[bytes]:
    with tarfile.open(path) as archive:
        return [archive.extractfile(each).read() for each in archive if each.name.endswith(".png")]


def outputs(output: Path) -> dict[str, bytes]:
    """All files that are written, without the recipe, which holds the name of the folder, and the work."""
    files = [path for path in output.rglob("*") if path.is_file() and build.WORK not in path.parts]
    names = {path.relative_to(output).as_posix(): path.read_bytes() for path in files}
    assert names.pop(build.RECIPE)
    return names


# What is written


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_the_output_has_the_pixels_of_pillow_and_all_texts(folder, tmp_path, form):
    result = summary(recipe([folder], tmp_path / "out", format=form))
    assert (result["samples"], result["written"], result["left_out"]) == (20, 20, {})
    assert [len(opened(tmp_path / "out" / name)) for name in result["shards"]] == [5, 5, 5, 5]
    source = opened(folder)
    for data in (opened(tmp_path / "out/index.parquet"), opened(tmp_path / "out/shards")):
        assert len(data) == 20
        assert data.class_names == ("cat", "dog")
        for row in range(20):
            path = Path(source.name(row))
            with Image.open(path) as original:
                scale = 32 / min(original.size)
                size = (round(original.width * scale), round(original.height * scale))
                expected = np.asarray(original.resize(size, Image.Resampling.LANCZOS))
            content = data.encoded(row)
            assert isinstance(content, bytes)
            np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(content))), expected)
            assert data.caption(row) == f"animal {int(path.stem)}"
            assert data.class_names[data.label(row)] == path.parent.name
    for name, digest in result["shards"].items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == digest


def test_the_index_has_sizes_and_digests_of_what_is_written(folder, tmp_path):
    summary(recipe([folder], tmp_path / "out"))
    data = opened(tmp_path / "out/index.parquet")
    for row in range(20):
        content = data.encoded(row)
        assert isinstance(content, bytes)
        shown = Image.open(io.BytesIO(content))
        assert data.shape(row) == (shown.height, shown.width)
        assert data.table["digest"][row].as_py() == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(("upscale", "sizes"), [(False, {(20, 30)}), (True, {(32, 48)})])
def test_small_images_are_enlarged_only_where_it_is_allowed(tmp_path, upscale, sizes):
    made.put(tmp_path / "images/a.png", encoded(image(1, 20, 30)))
    summary(recipe([tmp_path / "images"], tmp_path / "out", upscale=upscale, min_side=8))
    assert set(map(tuple, opened(tmp_path / "out/index.parquet", upscale=True).shapes().tolist())) == sizes


def test_transparency_orientation_and_grey(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    made.put(tmp_path / "images/a.jpg", encoded(image(1, 40, 80), "jpeg", quality=100, exif=exif))
    clear = image(2, 40, 40)
    clear.putalpha(0)
    made.put(tmp_path / "images/b.png", encoded(clear))
    options = {"background": (10, 20, 30), "size": None, "exclude": ["corrupt"]}
    summary(recipe([tmp_path / "images"], tmp_path / "out", **options))
    data = opened(tmp_path / "out/index.parquet")
    assert data.shapes().tolist() == [[80, 40], [40, 40]]
    assert np.asarray(Image.open(io.BytesIO(data.encoded(1)))).reshape(-1, 3).tolist() == [[10, 20, 30]] * 1600
    summary(recipe([tmp_path / "images"], tmp_path / "grey", **options, channels=1))
    with Image.open(io.BytesIO(opened(tmp_path / "grey/index.parquet").encoded(0))) as grey:
        assert grey.mode == "L"


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_several_captions_and_a_named_column(tmp_path, form):
    images = [encoded(image(seed, 40, 40)) for seed in range(3)]
    captions = [["one", " uno "], ["two"], []]
    parquet.write_table(pyarrow.table({"image": images, "words": captions}), made.put(tmp_path / "in.parquet"))
    source = {"path": str(tmp_path / "in.parquet"), "caption": "words"}
    summary(recipe([source], tmp_path / "out", format=form))
    for path in ("out/index.parquet", "out/shards"):
        counts, texts = opened(tmp_path / path).all_captions()
        assert (counts.tolist(), texts.to_pylist()) == ([2, 1, 0], ["one", "uno", "two"])


def test_a_shuffled_order_is_a_permutation_by_the_seed(folder, tmp_path):
    orders = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2), ("d", None)):
        summary(recipe([folder], tmp_path / name, shuffle=seed))
        data = opened(tmp_path / name / "index.parquet")
        orders.append([data.caption(row) for row in range(20)])
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == sorted(orders[3])
    assert orders[3] == [opened(folder).caption(row) for row in range(20)]


# What is left out


def test_planted_defects_and_copies_across_sources_are_named(folder, tmp_path):
    made.put(folder / "cat/empty.png", b"")
    made.put(folder / "cat/text.png", b"hello")
    made.put(folder / "cat/cut.png", encoded(image(50, 40, 40))[:700])
    made.put(folder / "cat/small.png", encoded(image(51, 31, 60)))
    made.put(folder / "cat/long.png", encoded(image(52, 40, 121)))
    tars = tmp_path / "tars"
    made.tar(
        tars / "0.tar",
        ("1.png", encoded(image(0, 40, 60))),  # the bytes of cat/00.png
        ("2.png", encoded(image(2, 84, 120))),  # cat/02.png, twice as large: it stays, and cat/02.png does not
        ("3.jpg", encoded(image(4, 22, 30), "jpeg")),  # cat/04.png at half the size: too small
        ("4.png", encoded(image(60, 40, 40))),
    )
    result = summary(recipe([folder, tars], tmp_path / "out"))
    expected = {
        "cat/empty.png": "empty",
        "cat/text.png": "no-image",
        "cat/cut.png": "truncated",
        "cat/small.png": "small",
        "cat/long.png": "extreme-aspect",
        "0.tar 1.png": "duplicates",
        "cat/02.png": "near-duplicates",
        "0.tar 3.jpg": "small",
    }
    assert dict(left_out(tmp_path / "out")) == expected
    assert (result["samples"], result["written"]) == (29, 21)
    assert sum(result["left_out"].values()) == len(expected)
    assert result["sources"] == {str(folder): 25, str(tars): 4}
    everything = summary(recipe([folder, tars], tmp_path / "all", exclude=[], min_side=1, max_aspect=None))
    assert everything["left_out"] == {"empty": 1, "no-image": 1, "truncated": 1}


def test_a_copy_of_an_image_that_is_left_out_stays(tmp_path):
    made.put(tmp_path / "a/small.png", encoded(image(1, 30, 30)))
    made.put(tmp_path / "b/large.png", encoded(image(1, 60, 60)))
    summary(recipe([tmp_path / "a", tmp_path / "b"], tmp_path / "out"))
    assert left_out(tmp_path / "out") == [("small.png", "small")]


def test_required_captions(folder, tmp_path):
    (folder / "cat/04.txt").unlink()
    (folder / "cat/06.txt").write_text(" \n")
    summary(recipe([folder], tmp_path / "out", require_captions=True))
    assert left_out(tmp_path / "out") == [("cat/04.png", "missing-captions"), ("cat/06.png", "missing-captions")]


def test_findings_of_the_check_conflicts_and_leaks(folder, tmp_path):
    made.put(folder / "cat/plain.png", encoded(Image.new("RGB", (40, 40), (9, 9, 9))))
    made.put(folder / "dog/04.png", (folder / "cat/04.png").read_bytes())
    made.put(tmp_path / "reference/x.png", (folder / "cat/06.png").read_bytes())
    exclude = ["corrupt", "blank", "conflicts", "leaks"]
    summary(recipe([folder], tmp_path / "out", exclude=exclude, reference=str(tmp_path / "reference")))
    reasons = dict(left_out(tmp_path / "out"))
    conflicts = {"cat/04.png": "conflicts", "dog/04.png": "conflicts"}
    assert reasons == {"cat/plain.png": "blank", "cat/06.png": "leaks", **conflicts}


def test_an_image_that_fails_after_it_was_measured_is_left_out(folder, tmp_path, monkeypatch):
    read = write.read_image

    def failing(file: Any, config: Any) -> Image.Image:
        if str(file).endswith("04.png"):
            raise write.InvalidSample("damaged: a disk error")
        return read(file, config)

    monkeypatch.setattr(write, "read_image", failing)
    result = summary(recipe([folder], tmp_path / "out"))
    assert (result["written"], result["left_out"]) == (19, {"damaged": 1})
    assert left_out(tmp_path / "out") == [("cat/04.png", "damaged")]
    assert len(opened(tmp_path / "out/index.parquet")) == 19


# Interruptions and shards


def build_and_die(config: BuildRecipe, module: Any, name: str, calls: int) -> None:
    """Build in another process, which ends at once, like one that is killed, when a function is called for the n-th
    time."""
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork")
    process = os.fork()
    if process == 0:
        function, count = getattr(module, name), 0

        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == calls:
                os._exit(9)
            return function(*arguments, **options)

        setattr(module, name, counted)
        try:
            build.build(config)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_a_build_that_is_killed_at_any_time_ends_with_the_same_bytes(folder, tmp_path, form):
    made.put(folder / "cat/text.png", b"hello")
    summary(recipe([folder], tmp_path / "whole", format=form))
    config = recipe([folder], tmp_path / "killed", format=form)
    moments = [(scan, "measure_sample", 6), (build, "select_samples", 1), (write, "encode", 1), (write, "encode", 9)]
    moments += [(write.ShardWriter, "_write_record", 1), (index, "write_parts", 1), (build.Builder, "_summarize", 1)]
    for module, name, calls in moments:
        build_and_die(config, module, name, calls)
        assert not (tmp_path / "killed" / build.SUMMARY).exists()
    summary(config)
    assert outputs(tmp_path / "killed") == outputs(tmp_path / "whole")
    assert not list((tmp_path / "killed").rglob("*.partial"))


def test_a_complete_build_is_left_as_it_is(folder, tmp_path):
    config = recipe([folder], tmp_path / "out")
    first = summary(config)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    times = {path: path.stat().st_mtime_ns for path in files}
    assert summary(config) == first
    assert {path: path.stat().st_mtime_ns for path in files} == times


def test_a_damaged_or_missing_shard_is_written_again(folder, tmp_path):
    config = recipe([folder], tmp_path / "out")
    summary(config)
    expected = outputs(tmp_path / "out")
    shards = sorted((tmp_path / "out/shards").iterdir())
    shards[1].unlink()
    shards[2].write_bytes(shards[2].read_bytes()[:5000])
    summary(config)
    assert outputs(tmp_path / "out") == expected


def test_shards_of_the_work_in_any_order_give_the_bytes_of_one_process(folder, tmp_path):
    made.put(folder / "cat/text.png", b"hello")
    made.put(folder / "cat/copy.png", (folder / "cat/00.png").read_bytes())
    summary(recipe([folder], tmp_path / "whole"))
    config = recipe([folder], tmp_path / "parts")
    waiting = [build.build(config, shard=ScanShard(number, 3)).waiting for number in (2, 0, 1)]
    assert waiting[:2] == [4, 2]  # of 6 parts
    assert waiting[2] == 0
    results = [build.build(config, shard=ScanShard(number, 3)) for number in (2, 0)]
    assert [result.summary is None for result in results] == [True, False]
    assert (results[0].written, results[0].shards) == (2, 4)
    assert outputs(tmp_path / "parts") == outputs(tmp_path / "whole")
    merged = recipe([folder], tmp_path / "merged")
    for number in range(3):
        build.build(merged, shard=ScanShard(number, 3))
    summary(merged)
    assert outputs(tmp_path / "merged") == outputs(tmp_path / "whole")


def test_shards_that_end_at_the_same_time_write_the_index_once(folder, tmp_path, monkeypatch):
    config, write_index, names = recipe([folder], tmp_path / "built"), Builder._write_index, []
    first = Builder(config)
    first.begin()
    first.scan(1, build.ALL, None)
    writer = first.writer()
    first.write(writer, list(range(len(writer))), 1, None)

    def slow(self, writer):
        names.append(threading.current_thread().name)
        time.sleep(0.5)
        write_index(self, writer)

    monkeypatch.setattr(Builder, "_write_index", slow)
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda number: build.build(config, shard=ScanShard(number, 3)), range(3)))
    assert len(names) == 1
    assert all(result.summary is not None for result in results)
    assert not list((tmp_path / "built").rglob("*.partial"))


def test_processes_of_two_machines_with_one_number_write_under_two_names(folder, tmp_path, monkeypatch):
    config = recipe([folder], tmp_path / "out", samples_per_shard=20)
    builder = build.Builder(config)
    builder.begin()
    builder.scan(1, build.ALL, None)
    writer = builder.writer()
    first = writer.write(0)
    next(first)
    monkeypatch.setattr(platform, "node", lambda: "other-machine")
    assert sum(writer.write(0)) == 20
    assert list(first) == []  # its last part: it ends whole, and does not lose its file to the other
    assert summary(config)["written"] == 20
    assert outputs(tmp_path / "out").keys() == {"shards/000000.tar", index.FILE, build.SUMMARY, build.LEFT_OUT}


def test_processes_give_the_bytes_of_one(folder, tmp_path):
    summary(recipe([folder], tmp_path / "one"))
    summary(recipe([folder], tmp_path / "two"), workers=2)
    assert outputs(tmp_path / "one") == outputs(tmp_path / "two")


def test_sources_and_output_in_a_bucket(folder, tmp_path, fresh_storage):
    pytest.importorskip("fsspec")
    summary(recipe([folder], tmp_path / "local"))
    address = f"file://{tmp_path}/bucket/out"
    config = validate(
        BuildRecipe,
        {**recipe([f"file://{folder}"], tmp_path).model_dump(mode="json"), "output": address},
        "the recipe",
    )
    build_and_die(config, write, "encode", 9)
    summary(config)
    local, remote = tmp_path / "local", tmp_path / "bucket/out"
    assert (remote / "left-out.jsonl").read_bytes() == b""
    for path in sorted((local / "shards").iterdir()):
        assert images_of(remote / "shards" / path.name) == images_of(path) != []
    data = FilesConfig(path=address, size=32).open()
    assert made.samples(data) == made.samples(opened(local / "index.parquet"))
    assert storage.exists(storage.locate(f"{address}/{build.SUMMARY}"))


# Captioner


@pytest.fixture(scope="module")
def blip(tmp_path_factory) -> Path:
    """A small BLIP with random weights, as transformers saves it."""
    transformers = pytest.importorskip("transformers")
    import torch

    path = tmp_path_factory.mktemp("blip")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]", "a", "red", "blue", "thing", "of", "."]
    (path / "vocab.txt").write_text("\n".join(words))
    special = ["[DEC]", "[ENC]"]
    tokenizer = transformers.BertTokenizerFast(vocab=str(path / "vocab.txt"), additional_special_tokens=special)
    text = {"vocab_size": len(words), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"intermediate_size": 16, "encoder_hidden_size": 16, "bos_token_id": 5, "pad_token_id": 0}
    text |= {"sep_token_id": 3, "eos_token_id": 3}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision |= {"image_size": 32, "patch_size": 16}
    torch.manual_seed(1)
    config = transformers.BlipConfig(text_config=text, vision_config=vision)
    network = transformers.BlipForConditionalGeneration(config)
    for parameter in network.parameters():  # zeros and small weights would describe every image in the same words
        torch.nn.init.normal_(parameter, std=0.5)
    network.save_pretrained(path)
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    transformers.BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(path)
    return path


def test_a_captioner_describes_what_has_no_caption(folder, tmp_path, blip):
    for number in range(0, 20, 2):
        (folder / f"cat/{number:02d}.txt").unlink()
    config = recipe([folder], tmp_path / "out", captioner={"source": str(blip), "max_tokens": 6, "batch_size": 4})
    summary(config)
    data = opened(tmp_path / "out/index.parquet")
    captions = [data.caption(row) for row in range(20)]
    assert captions[10:] == [f"animal {number}" for number in range(1, 20, 2)]
    from transformers import AutoProcessor, BlipForConditionalGeneration

    network, processor = BlipForConditionalGeneration.from_pretrained(blip), AutoProcessor.from_pretrained(blip)
    for row in (0, 7):
        pixels = processor(images=[Image.open(io.BytesIO(data.encoded(row)))], return_tensors="pt")
        ids = network.generate(**pixels, max_new_tokens=6, do_sample=False)
        assert (captions[row] or "") == processor.decode(ids[0], skip_special_tokens=True)
    assert len(set(captions[:10])) > 1
    replaced = recipe([folder], tmp_path / "all", captioner={"source": str(blip), "max_tokens": 6, "replace": True})
    build_and_die(replaced, write, "encode", 9)
    summary(replaced)
    data = opened(tmp_path / "all/index.parquet")
    assert not any("animal" in (data.caption(row) or "") for row in range(20))


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": []}, "sources: "),
        ({"sources": [{"path": "x", "captions": "y"}]}, r"unknown key 'captions'; did you mean 'caption'\?"),
        ({"siz": 3}, r"unknown key 'siz'; did you mean 'size'\?"),
        ({"exclude": ["smal"]}, "exclude: unknown kind 'smal'"),
        ({"exclude": ["small"]}, "exclude: 'small' has a setting of its own: set min_side"),
        ({"exclude": ["frozen"]}, "exclude frozen is for clips: set frames"),
        ({"size": None, "upscale": True}, "upscale has no effect without size"),
        ({"output": ""}, "output: "),
        ({"max_aspect": 0.5}, "max_aspect: "),
    ],
)
def test_recipes_that_are_not_valid(changes, message):
    with pytest.raises(TesseraError, match=message):
        validate(BuildRecipe, {"sources": ["x"], "output": "y", **changes}, "the recipe")


def test_sources_that_cannot_be_built(folder, tmp_path):
    with pytest.raises(TesseraError, match=r"data\.path .*nowhere does not exist"):
        build.build(recipe([tmp_path / "nowhere"], tmp_path / "out"))
    with pytest.raises(TesseraError, match=r"no sample of .*images is selected: 20 small"):
        build.build(recipe([folder], tmp_path / "none", min_side=1000))


def test_outputs_that_cannot_be_written(folder, tmp_path):
    made.put(tmp_path / "file", "text")
    with pytest.raises(TesseraError, match="file is a file; expected a folder"):
        build.build(recipe([folder], tmp_path / "file"))
    with pytest.raises(TesseraError, match=r"cannot write .*file/out"):
        build.build(recipe([folder], tmp_path / "file/out"))
    made.put(tmp_path / "mine/thesis.doc", "text")
    with pytest.raises(TesseraError, match=r"holds thesis\.doc and no recipe\.yaml"):
        build.build(recipe([folder], tmp_path / "mine"))


def test_another_recipe_or_other_sources_in_the_output(folder, tmp_path):
    summary(recipe([folder], tmp_path / "out"))
    with pytest.raises(
        TesseraError, match=r"begun with another recipe:\n  size: 32 there, 16 now\ngive another output"
    ):
        build.build(recipe([folder], tmp_path / "out", size=16))
    source = {"path": str(folder), "caption": None}
    with pytest.raises(TesseraError, match=r"sources\.1\.caption: 'auto' there, None now"):
        build.build(recipe([source], tmp_path / "out"))
    made.put(folder / "cat/new.png", encoded(image(70, 40, 40)))
    with pytest.raises(TesseraError, match=r"is complete \(20 samples\), and its sources have changed since"):
        build.build(recipe([folder], tmp_path / "out"))


def test_captions_that_change_before_the_build_is_complete(folder, tmp_path):
    config = recipe([folder], tmp_path / "out")
    build_and_die(config, write, "encode", 18)
    (folder / "cat/00.txt").write_text("another text")
    summary(config)
    assert opened(tmp_path / "out/index.parquet").caption(0) == "another text"


@pytest.mark.parametrize(("name", "problem"), [("file", "is not a folder"), ("folder", r"has no config\.json")])
def test_captioners_that_are_none(folder, tmp_path, name, problem):
    made.put(tmp_path / "file", "text")
    (tmp_path / "folder").mkdir()
    config = recipe([folder], tmp_path / "out", captioner=str(tmp_path / name))
    with pytest.raises(TesseraError, match=rf"captioner\.source .*{name} {problem}; expected a folder that holds"):
        build.build(config)
    assert not (tmp_path / "out").exists()


def test_a_text_model_is_no_captioner(folder, tmp_path):
    made.put(tmp_path / "model/config.json", json.dumps({"model_type": "bert"}))
    config = recipe([folder], tmp_path / "out", captioner=str(tmp_path / "model"))
    with pytest.raises(TesseraError, match="cannot load the captioner"):
        build.build(config)


def test_labels_that_are_not_usable(tmp_path):
    rows = pyarrow.table({"image": [encoded(image(1, 40, 40))], "label": [-3]})
    parquet.write_table(rows, made.put(tmp_path / "in.parquet"))
    with pytest.raises(TesseraError, match=r"neither class numbers nor names.*set data\.label"):
        build.build(recipe([tmp_path / "in.parquet"], tmp_path / "out"))


def test_the_selection_is_arrays(folder, tmp_path):
    builder = Builder(recipe([folder], tmp_path / "out"))
    builder.begin()
    builder.scan(1, scan.ALL, None)
    selection = select.select_samples(builder.recipe, builder._results())
    assert (selection.reason.dtype, selection.rows.dtype) == (np.int16, np.int64)
    assert [finding.count for finding in selection.findings[0].values()] == [0] * len(selection.findings[0])


def test_a_prompt_is_not_part_of_a_description(blip):
    from tessera.encoders.captioner import Captioner

    images = [image(seed, 32, 32) for seed in range(4)]
    texts = Captioner(blip, "a red", 6)(images)
    assert not any(text.startswith("a red") for text in texts)
    assert any(texts)
    assert texts == [Captioner(blip, "a red", 6)([each])[0] for each in images]
