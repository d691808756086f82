"""A subject from a few images and images that the base generated: whole commands."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import tessera as library
from tessera import adapters, bundle
from tessera.data.files import FilesConfig

pytestmark = pytest.mark.run
pytest.importorskip("sklearn")


def draw(folder, count: int, size: int = 8, caption: str | None = None) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("L", (size, size), 50 + number).save(folder / f"{number}.png")
        if caption is not None:
            (folder / f"{number}.txt").write_text(caption)


def test_generated_images_are_data_with_their_classes(tessera, trained, tmp_path):
    words = ("sample", trained, "--device", "cpu", "--out", tmp_path / "prior", "--classes")
    assert tessera(*words, "3,7", "--seeds", "0-2").code == 0
    assert tessera(*words, "5", "--seeds", "0").code == 0
    (tmp_path / "prior/class-3-seed-2.png").unlink()
    assert tessera(*words, "7", "--seeds", "0").code == 0
    rows = [json.loads(line) for line in (tmp_path / "prior/metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    data = FilesConfig(path=str(tmp_path / "prior"), size=8, channels=1).open()
    names = {data.name(index).rpartition("/")[2]: data.class_names[data.label(index)] for index in range(len(data))}
    assert names == {f"class-{c}-seed-{s}.png": c for c, s in ["30", "31", "50", "70", "71", "72"]}


def test_a_new_class_is_learned_beside_generated_images(tessera, recipe, trained, whole_state, tmp_path):
    draw(tmp_path / "mine/star", 5)
    assert tessera("classes", trained, tmp_path / "base", "--add", "star=3,8").code == 0
    assert tessera("sample", trained, "--device", "cpu", "--seeds", "0-1", "--out", tmp_path / "prior").code == 0
    paths = f"[{tmp_path / 'mine'}, {tmp_path / 'prior'}]"
    data = f"data={{kind: folder, path: {paths}, weights: [1, 1], size: 8, channels: 1}}"
    words = ("train", recipe, f"training.init_from={tmp_path / 'base'}", data, "adapter={kind: lora, rank: 2}")
    words += ("adapter.classes=star", "training.checkpoint_every=2", "training.optimizer.learning_rate=0.1")

    def train(name: str, *more: str):
        done = tessera(*words, f"run_dir={tmp_path / name}", *more)
        assert done.code == 0, done.err
        return tmp_path / name

    whole = train("whole")
    train("parts", "training.steps=2")
    assert whole_state(train("parts")) == whole_state(whole)
    # A single class is enough for an adapter.
    train("alone", f"data={{kind: folder, path: {tmp_path / 'mine'}, size: 8, channels: 1}}", "training.steps=1")
    before, after = library.load(tmp_path / "base", "cpu"), library.load(whole, "cpu")
    table = after.network.get_submodule("y_embedder.embedding_table")
    rows = table.adapters[bundle.TRAINED]["rows"]
    assert rows.numbers.tolist() == [10]
    assert rows.values.abs().min() > 0
    state = adapters.base_state(after.network)
    assert all(torch.equal(tensor, state[name]) for name, tensor in before.network.state_dict().items())
    done = tessera("sample", tmp_path / "base", "--adapter", whole, "--classes", "star", "--out", tmp_path / "s.png")
    assert done.code == 0, done.err


def test_a_word_is_learned_alone(tessera, recipe, tmp_path):
    text = ("data={kind: shapes, count: 64}", "network.block={kind: rope-swiglu, text: keys}")
    text += ("training.optimizer.learning_rate=0.01", "training.ema.decay=0.5")
    assert tessera("train", recipe, *text).code == 0
    base, words = tmp_path / "base", ("--device", "cpu", "--seeds", "0-3")
    done = tessera("classes", tmp_path / "run", base, "--add-word", "zwx=circle,square")
    assert (done.code, "zwx (mean of circle, square)" in done.out) == (0, True), done.err
    assert "words added" in tessera("info", base).out
    done = tessera("sample", tmp_path / "run", "--prompt", "a red circle", *words, "--out", tmp_path / "prior")
    assert done.code == 0, done.err
    prior = FilesConfig(path=str(tmp_path / "prior"), size=32).open()
    assert [prior.caption(index) for index in range(len(prior))] == ["a red circle"] * 4
    draw(tmp_path / "mine", 3, 32, "a red zwx")
    data = f"data={{kind: folder, path: [{tmp_path / 'mine'}, {tmp_path / 'prior'}], weights: [3, 1], size: 32}}"
    train = ("train", recipe, f"training.init_from={base}", data, "adapter={kind: words, words: zwx}")
    train += ("training.optimizer.learning_rate=1", "training.ema.decay=0.5")
    done = tessera(*train, f"run_dir={tmp_path / 'word'}", "network.block={kind: rope-swiglu, text: keys}")
    assert done.code == 0, done.err
    [file] = (bundle.checkpoints(tmp_path / "word")[0] / "adapters/adapter").glob("*.safetensors")
    values = load_file(file)
    assert values["text_embedder.embedding.rows.values"].shape == (1, 16)
    assert values["text_embedder.embedding.rows.values"].any()
    images = {}
    for name, extra in (("base", ()), ("word", ("--adapter", tmp_path / "word"))):
        prompts = ("--prompt", "a red zwx", "--prompt", "a red circle")
        assert tessera("sample", base, *prompts, *extra, *words, "--out", tmp_path / f"s-{name}").code == 0
        folder = tmp_path / f"s-{name}"
        images[name] = {path.name: np.asarray(Image.open(path)) for path in folder.glob("a-*.png")}
    for name, image in images["base"].items():
        assert (image != images["word"][name]).any() == ("zwx" in name)


def test_words_are_checked(tessera, trained, tmp_path):
    done = tessera("classes", trained, tmp_path / "new", "--add-word", "zwx")
    assert (done.code, "it has no words; --add adds a class" in done.err) == (1, True)
    done = tessera("classes", trained, tmp_path / "new", "--add-word", "zwx", "--add-word", "zwx=a")
    assert (done.code, "the new word 'zwx' twice" in done.err) == (1, True)
    assert not (tmp_path / "new").exists()
