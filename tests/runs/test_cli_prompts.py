"""`tessera sample` with prompts: files, captions in the grid, settings in the PNG, and errors."""

import re
import shlex

import numpy as np
import pytest
from PIL import Image

from tessera import bundle, generation
from tessera.encoders.text import WordsConfig
from tessera.images import read_settings

WORDS = ("a", "red", "blue", "circle", "square")


@pytest.fixture
def text_model(make_model):
    """A model of texts of at most 8 tokens."""
    text = WordsConfig(vocabulary=WORDS, max_tokens=8)
    network = {
        "block": {"kind": "rope-swiglu", "text": "keys"},
        "num_classes": 0,
        "vocabulary_size": text.build().vocabulary_size,
        "text_tokens": 8,
    }
    return make_model(network, class_names=(), text=text.model_dump())


@pytest.fixture
def folder(text_model, tmp_path):
    bundle.save(text_model, tmp_path / "model")
    return tmp_path / "model"


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_every_prompt_with_every_seed(tessera, folder, text_model, tmp_path):
    out = tmp_path / "s"
    words = ["--prompt", "a red circle", "--prompt", "a blue/square", "--seeds", "3-4", "guidance_scale=2"]
    done = tessera("sample", folder, *words, "--out", out)
    assert done.code == 0, done.err
    stems = ["a-red-circle", "a-blue%2Fsquare"]
    names = [f"{stem}-seed-{seed}.png" for stem in stems for seed in (3, 4)]
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, "grid.png", "metadata.jsonl"])
    prompts = ["a red circle", "a red circle", "a blue/square", "a blue/square"]
    expected = generation.generate(text_model, prompts=prompts, seeds=[3, 4, 3, 4], guidance_scale=2)
    assert (expected[0] != expected[2]).any()
    for name, image in zip(names, expected):
        np.testing.assert_array_equal(pixels(out / name), image[..., 0])
    settings = read_settings(out / names[2])
    assert (settings["prompts"], settings["seeds"], settings["classes"]) == (["a blue/square"], [3], None)
    assert read_settings(out / "grid.png")["prompts"] == ["a red circle", "a blue/square"]
    assert Image.open(out / "grid.png").size == (2 * 64 + 1, 2 * (64 + 16))  # a line of text above each row


def test_info_gives_the_command_that_reproduces_an_image(tessera, folder, tmp_path):
    words = ["--prompt", "a 'red' circle", "--negative-prompt", "blue", "guidance_scale=3", "--seeds", "5"]
    assert tessera("sample", folder, *words, "--out", tmp_path / "a").code == 0
    first = next((tmp_path / "a").glob("*-seed-5.png"))
    command = shlex.split(tessera("info", first).out.splitlines()[0])
    assert tessera(*command[1:], "--out", tmp_path / "b").code == 0
    np.testing.assert_array_equal(pixels(tmp_path / "b" / first.name), pixels(first))
    assert tessera("sample", folder, *words[:2], *words[4:], "--out", tmp_path / "c").code == 0
    assert (pixels(tmp_path / "c" / first.name) != pixels(first)).any()  # the negative prompt has an effect


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "a red circle\n\n a blue square \n"),
        ("p.csv", "prompt,seed,guidance_scale,negative_prompt\na red circle,7,,\na blue square,,3.5,red\n"),
        (
            "p.jsonl",
            '{"prompt": "a red circle", "seed": 7}\n'
            '{"prompt": "a blue square", "guidance_scale": 3.5, "negative_prompt": "red"}\n',
        ),
    ],
)
def test_prompts_from_a_file(tessera, folder, text_model, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    words = ["--prompts", tmp_path / name, "--seeds", "1", "guidance_scale=2", "--out", tmp_path / "s"]
    done = tessera("sample", folder, *words)
    assert done.code == 0, done.err
    is_text = name == "p.txt"
    first = pixels(tmp_path / "s" / f"a-red-circle-seed-{1 if is_text else 7}.png")
    second = pixels(tmp_path / "s/a-blue-square-seed-1.png")
    own = {} if is_text else {"negative_prompts": ["red"]}
    prompts = ["a red circle"], ["a blue square"]
    expected = generation.generate(text_model, prompts=prompts[0], seeds=[1 if is_text else 7], guidance_scale=2)
    np.testing.assert_array_equal(first, expected[0][..., 0])
    scale = 2 if is_text else 3.5
    expected = generation.generate(text_model, prompts=prompts[1], seeds=[1], guidance_scale=scale, **own)
    np.testing.assert_array_equal(second, expected[0][..., 0])


def test_an_empty_prompt_is_a_text_like_others_and_null_text_may_be_one(tessera, folder, text_model, tmp_path):
    done = tessera("sample", folder, "--prompt", "", "--out", tmp_path / "s")
    assert done.code == 0, done.err
    assert (tmp_path / "s/empty-seed-0.png").exists()
    words = ["--prompt", "a red circle", "guidance_scale=2", "null_text=empty", "--out", tmp_path / "e"]
    assert tessera("sample", folder, *words).code == 0
    request = {"prompts": ["a red circle"], "guidance_scale": 2}
    expected = generation.generate(text_model, **request, negative_prompts=[""])
    np.testing.assert_array_equal(pixels(tmp_path / "e/a-red-circle-seed-0.png"), expected[0][..., 0])
    assert (generation.generate(text_model, **request) != expected).any()


def test_captions_of_data_are_the_prompts_of_a_number_of_samples(tessera, folder, text_model, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (8, 8)).save(data / "one.png")
    (data / "one.txt").write_text("a red circle")
    words = ["--num-samples", "2", "--captions", data, "--out", tmp_path / "s"]
    done = tessera("sample", folder, *words)
    assert done.code == 0, done.err
    expected = generation.generate(text_model, prompts=["a red circle"], seeds=[0, 1])
    for seed in (0, 1):
        np.testing.assert_array_equal(pixels(tmp_path / f"s/a-red-circle-seed-{seed}.png"), expected[seed][..., 0])


def test_long_prompts_are_cut_on_request(tessera, folder, text_model, tmp_path):
    long = "a red circle a blue square a red square"
    done = tessera("sample", folder, "--prompt", long, "--cut-prompts", "--out", tmp_path / "s")
    assert done.code == 0
    assert "cut to 8 of 10 tokens: 'a red circle a blue" in done.err
    same = "a red circle a blue square a"
    expected = generation.generate(text_model, prompts=[same])
    np.testing.assert_array_equal(pixels(next((tmp_path / "s").glob("*-seed-0.png"))), expected[0][..., 0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], 'this model needs prompts: give --prompt "a red circle"'),
        (["--classes", "3"], "this model needs prompts"),
        (["--prompt", "a", "--classes", "3"], "conditioned on text, not on classes: leave --classes out"),
        (
            ["--prompt", "a red circle a blue square a red square"],
            "a text has 10 tokens, and the text encoder takes at",
        ),
        (["--prompt", "a", "--negative-prompt", "b"], "negative prompts have no effect at guidance_scale 1"),
        (["--negative-prompt", "b"], "--negative-prompt needs a prompt"),
        (["--num-samples", "3", "--prompt", "a"], "--num-samples sets classes, prompts and seeds"),
        (["--num-samples", "3"], "this model needs a prompt for each image"),
        (["--prompt", "a", "--captions", "data"], "--captions needs --num-samples"),
        (["--prompts", "missing.txt"], "cannot read --prompts missing.txt"),
        (["--prompts", "empty.txt"], "has no prompt: expected one in each line"),
        (["--prompts", "wrong.csv"], "expected prompt, negative_prompt, guidance_scale, seed, of which the first must"),
        (["--prompts", "number.jsonl"], "number.jsonl, prompt 1: .* seed a whole number"),
        (["--prompts", "damaged.jsonl"], "damaged.jsonl, line 2: "),
    ],
)
def test_invalid_input_is_one_message_and_writes_nothing(tessera, folder, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "wrong.csv").write_text("text\na red circle\n")
    (tmp_path / "number.jsonl").write_text('{"prompt": "a", "seed": "x"}\n')
    (tmp_path / "damaged.jsonl").write_text('"a red circle"\n{"prompt": \n')
    done = tessera("sample", folder, *words, "--out", tmp_path / "s")
    assert done.code == 1
    assert len(done.err.splitlines()) == 1
    assert re.search(message, done.err), done.err
    assert not (tmp_path / "s").exists()


def test_prompts_for_a_class_model_are_an_error(tessera, trained, tmp_path):
    done = tessera("sample", trained, "--prompt", "a seven", "--out", tmp_path / "s")
    assert done.code == 1
    assert "this model takes no prompts: it is conditioned on its classes: give --classes instead" in done.err


def test_info_and_tune_take_another_text_encoder(tessera, make_model, text_encoder_folder, trained, tmp_path):
    network = {
        "block": {"kind": "rope-swiglu", "text": "keys"}, "num_classes": 0, "text_channels": 16, "text_tokens": 8,
    }  # fmt: skip
    bundle.save(make_model(network, class_names=()), tmp_path / "model")
    assert "text encoder  not known" in tessera("info", tmp_path / "model").out
    done = tessera("info", tmp_path / "model", "--text-encoder", text_encoder_folder)
    assert f"text encoder  folder ({text_encoder_folder})" in done.out, done.err
    done = tessera("tune", trained, "--text-encoder", text_encoder_folder)
    assert (done.code, "not conditioned on text: leave out the text encoder" in done.err) == (1, True)
