"""`tessera sample` and `tessera info`: pictures that say how to make them again."""

import re
import shlex
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from tessera import bundle
from tessera.data.images import centre_crop
from tessera.generation import pipeline
from tessera.images import read_settings
from tessera.sampling import SAMPLERS, SPACINGS


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_a_picture_for_each_class_and_seed_and_a_grid(tessera, trained, tmp_path):
    done = tessera("sample", trained, "--classes", "3,7", "--count", "2", "--out", tmp_path / "s")
    assert done.code == 0, done.err
    assert done.out.strip() == f"4 pictures and grid.png in {tmp_path / 's'}"
    names = [f"class-{c}-seed-{s}.png" for c in (3, 7) for s in (0, 1)]
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == sorted([*names, "grid.png"])
    model = bundle.load(bundle.checkpoints(trained)[0])
    expected = pipeline.generate(model, [3, 3, 7, 7], [0, 1, 0, 1])
    for name, picture in zip(names, expected):
        np.testing.assert_array_equal(pixels(tmp_path / "s" / name), picture[..., 0])
    assert Image.open(tmp_path / "s/grid.png").size == (2 * 64 + 1, 2 * 64 + 1)


def test_all_classes_by_default_where_they_are_few(tessera, trained, tmp_path):
    assert tessera("sample", trained, "--out", tmp_path / "s").code == 0
    assert len(list((tmp_path / "s").glob("class-*-seed-0.png"))) == 10


def test_the_grid_alone(tessera, trained, tmp_path):
    done = tessera("sample", trained, "--classes", "1", "--seeds", "0-3", "--out", tmp_path / "deep/grid.png")
    assert (done.code, done.out.strip()) == (0, str(tmp_path / "deep/grid.png"))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["grid.png"]


def test_a_png_holds_the_settings(tessera, trained, tmp_path):
    tessera("sample", trained, "--classes", "4", "--seeds", "9", "--guidance", "2.5", "--out", tmp_path / "s")
    said = read_settings(tmp_path / "s/class-4-seed-9.png")
    assert said["model"] == str(trained)
    assert (said["classes"], said["seeds"]) == ([4], [9])
    assert said["sampling"]["guidance"] == 2.5
    assert said["sampling"]["steps"] == 3


@pytest.mark.parametrize(
    "words",
    [
        ["--precision", "auto"],
        ["--guidance", "3.123456789", "--steps", "5", "--spacing", "trailing"],
        ["--sampler", "ancestral", "--guidance-channels", "1", "--guidance", "2.0"],
        ["--eta", "0.5", "--size", "8x16"],
        ["--sampler", "unipc", "--set", "sampler.variant=bh1", "--set", "spacing=karras", "--set", "spacing.rho=5.5"],
        ["--precision", "bfloat16"],
        ["--codec", "pixels"],
    ],
)
def test_info_of_a_picture_is_the_command_that_makes_it_again(tessera, trained, tmp_path, monkeypatch, words):
    run = tmp_path / "a run's folder"  # needs quoting
    shutil.copytree(trained, run)
    tessera("sample", run, "--classes", "3,8", "--seeds", "5,11", *words, "--out", tmp_path / "first")
    monkeypatch.chdir(tmp_path)
    for name in ("class-8-seed-11.png", "grid.png"):
        told = tessera("info", tmp_path / "first" / name)
        assert told.code == 0
        command = shlex.split(told.out, comments=True)
        assert command[:3] == ["tessera", "sample", str(run)]
        for flag, value in zip(words[::2], words[1::2]):  # to the last digit
            assert (
                value in [word for at, word in enumerate(command) if command[at - 1] == flag]
                or value == "spacing=karras"
            )
        assert tessera(*command[1:]).code == 0
        np.testing.assert_array_equal(pixels(tmp_path / "samples" / name), pixels(tmp_path / "first" / name))
        shutil.rmtree(tmp_path / "samples")
    assert read_settings(tmp_path / "first/grid.png")["seeds"] == [5, 11]


def test_guidance_told_twice_is_drawn_as_it_is_recorded(tessera, trained, tmp_path):
    words = ["--guidance", "2", "--set", "guidance=3"]
    assert tessera("sample", trained, "--classes", "1", *words, "--out", tmp_path / "s").code == 0
    path = tmp_path / "s/class-1-seed-0.png"
    assert read_settings(path)["sampling"]["guidance"] == 3
    expected = pipeline.generate(bundle.load(bundle.checkpoints(trained)[0]), [1], guidance=3.0)
    np.testing.assert_array_equal(pixels(path), expected[0, ..., 0])


def test_set_reaches_every_setting_and_comes_last(tessera, trained, tmp_path):
    words = ["--sampler", "dpm++", "--set", "sampler.order=3", "--set", "guidance=2.5", "--set", "spacing=karras"]
    words += ["--set", "steps=4", "--steps", "5"]
    assert tessera("sample", trained, "--classes", "1", *words, "--out", tmp_path / "s").code == 0
    said = read_settings(tmp_path / "s/class-1-seed-0.png")["sampling"]
    assert said["sampler"] == {"kind": "dpm++", "order": 3}
    assert said["spacing"] == {"kind": "karras", "smallest": 0.002, "largest": 80.0, "rho": 7.0}
    assert (said["steps"], said["guidance"]) == (4, 2.5)
    model = bundle.load(bundle.checkpoints(trained)[0])
    expected = pipeline.generate(
        model, [1], steps=4, guidance=2.5, sampler={"kind": "dpm++", "order": 3}, spacing="karras"
    )
    np.testing.assert_array_equal(pixels(tmp_path / "s/class-1-seed-0.png"), expected[0, ..., 0])


def test_help_names_every_sampler_and_spacing(tessera):
    said = " ".join(tessera("sample", "--help").out.split())
    assert all(re.search(rf"(?<![\w+-]){re.escape(kind)}(?![\w+-])", said) for kind in [*SAMPLERS, *SPACINGS]), said


def test_the_printed_command_runs_in_a_shell(command, trained, tmp_path):
    """The one test of this page in a process of its own."""
    assert command("sample", trained, "--classes", "2", "--seeds", "7", "--out", tmp_path / "first").code == 0
    told = command("info", tmp_path / "first/class-2-seed-7.png")
    assert told.out.startswith("tessera sample ")
    weights = read_settings(tmp_path / "first/class-2-seed-7.png")["weights"]
    assert f"# weights {weights}" in told.out
    assert weights in command("info", trained).out
    assert command(*shlex.split(told.out, comments=True)[1:], cwd=tmp_path).code == 0
    again = tmp_path / "samples/class-2-seed-7.png"
    np.testing.assert_array_equal(pixels(again), pixels(tmp_path / "first/class-2-seed-7.png"))


def test_a_seed_is_the_same_picture_alone_and_in_a_batch(tessera, trained, tmp_path):
    tessera("sample", trained, "--classes", "all", "--seeds", "0-4", "--batch", "7", "--out", tmp_path / "many")
    tessera("sample", trained, "--classes", "6", "--seeds", "3", "--out", tmp_path / "one")
    many, one = (pixels(tmp_path / folder / "class-6-seed-3.png").astype(int) for folder in ("many", "one"))
    assert np.abs(many - one).max() <= 1


def test_info_of_a_model_tells_its_parameters(tessera, trained):
    done = tessera("info", trained)
    assert done.code == 0
    facts = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in done.out.splitlines())
    weights = load_file(bundle.checkpoints(trained)[0] / "model.safetensors")
    assert facts["parameters"] == f"{sum(value.numel() for value in weights.values()):,}"
    assert facts["classes"] == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert re.fullmatch("[0-9a-f]{16}", facts["weights"])
    assert facts["steps"] == "4"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--classes", "10"], "class 10 is out of range: this model knows 10 classes, 0 to 9"),
        (["--classes", "-1"], "class -1 is out of range"),
        (["--classes", "cat"], "unknown class 'cat'"),
        (["--classes", ""], "unknown class ''"),
        (["--sampler", "dimm"], "unknown sampler 'dimm'; did you mean 'ddim'?"),
        (["--sampler", "ancestral", "--eta", "1"], "--eta belongs to ddim, not to ancestral"),
        (["--eta", "2"], "less than or equal to 1"),
        (["--set", "sampler=dpmm++"], "unknown sampler 'dpmm++'; did you mean 'dpm++'?"),
        (["--set", "spacing.kind=karas"], "unknown spacing 'karas'; did you mean 'karras'?"),
        (["--sampler", "dpm++", "--set", "sampler.oder=3"], "unknown key 'oder'; did you mean 'order'?"),
        (["--set", "stops=3"], "unknown key 'stops'; did you mean 'steps'?"),
        (["--set", "steps"], "'steps' is not an override; write key=value, for example steps=20"),
        (
            ["--set", "sampler="],
            "sampling is not valid:\n  sampler: expected the name of a kind, or a mapping that has one",
        ),
        (["--set", "caching=frist-block"], "caching: unknown caching 'frist-block'; did you mean 'first-block'?"),
        (["--set", "guidance=.nan"], "guidance: Input should be a finite number"),
        (["--set", "sampler={kind: sde, strength: .inf}"], "strength: Input should be a finite number"),
        (["--set", "steps.more=3"], "steps is a value, not a section"),
        (["--steps", "0"], "steps"),
        (["--steps", "21"], "steps is 21; this model was trained with 20, so give 1 to 20"),
        (["--spacing", "odd"], "spacing"),
        (["--guidance", "nan"], "--guidance is nan"),
        (["--guidance-channels", "some"], "guidance_channels"),
        (["--seeds", "5-"], "--seeds 5- is not understood; write 0-15 or 1,5,9"),
        (["--seeds", "9-5"], "--seeds 9-5 is not understood"),
        (["--seeds", "a"], "--seeds a is not understood"),
        (["--seeds", "1,,2"], "--seeds 1,,2 is not understood"),
        (["--seeds", "-3"], "--seeds -3 is not understood"),
        (["--seeds", "²"], "--seeds ² is not understood"),
        (["--seeds", "99999999999999999999"], "is not understood"),
        (["--seeds", "0-99999999999"], "asks for more than 1,000,000 pictures"),
        (["--seeds", "1,2,3", "--count", "2"], "--seeds names 3 seeds, --count says 2"),
        (["--size", "8y8"], "--size 8y8 is not understood; write 256 or 256x384"),
        (["--size", "8x"], "--size 8x is not understood"),
        (["--size", "10"], "size 10 x 10 does not fit: height and width must be multiples of 4 pixels"),
        (["--size", "0"], "size 0 x 0 does not fit"),
        (["--precision", "float16"], "--precision is float16; expected float32, bfloat16 or auto"),
        (["--device", "gpu"], "device 'gpu' is not available here"),
        (["--codec", "nowhere"], "nowhere"),
        (["--heads", "7"], "says heads 2, not 7"),
    ],
)
def test_bad_input_is_one_message_and_draws_nothing(tessera, trained, tmp_path, words, said):
    done = tessera("sample", trained, *words, "--out", tmp_path / "s")
    assert done.code == 1
    assert done.err.startswith("error: ")
    assert said in done.err
    assert "Traceback" not in done.err
    assert done.out == ""
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("verb", ["sample", "info"])
def test_models_that_are_none(tessera, trained, tmp_path, verb):
    broken = tmp_path / "broken"
    shutil.copytree(bundle.checkpoints(trained)[0], broken)
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    empty = tmp_path / "empty"
    empty.mkdir()
    unweighted = tmp_path / "unweighted"
    shutil.copytree(broken, unweighted)
    (unweighted / "model.safetensors").unlink()
    spoilt = tmp_path / "spoilt"
    shutil.copytree(bundle.checkpoints(trained)[0], spoilt)
    (spoilt / "config.json").write_text("{")
    other = tmp_path / "other"
    shutil.copytree(bundle.checkpoints(trained)[0], other)
    (other / "config.json").write_text((other / "config.json").read_text().replace('"width": 16', '"width": 32'))
    for path, said in (
        (tmp_path / "gone", "gone"),
        (empty, "empty"),
        (broken, "model.safetensors is damaged or no safetensors file"),
        (unweighted, "model.safetensors is missing"),
        (spoilt, "config.json"),
        (other, "holds another architecture than its configuration says"),
    ):
        done = tessera(verb, path)
        assert done.code == 1, path
        assert done.err.startswith("error: ")
        assert said in done.err
        assert "Traceback" not in done.err


def test_pictures_that_do_not_say_how_they_were_made(tessera, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no image")
    for name, said in (
        ("plain.png", "does not say how it was made"),
        ("text.png", "cannot read"),
        ("gone.png", "cannot read"),
    ):
        done = tessera("info", tmp_path / name)
        assert (done.code, said in done.err, done.err.count("\n")) == (1, True, 1), name


def test_pictures_that_cannot_be_written(tessera, trained, tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = tessera("sample", trained, "--classes", "1", "--out", tmp_path / "file/s")
    assert done.code == 1
    assert done.err.startswith("error: cannot write")
    assert "Traceback" not in done.err


def test_an_unconditional_model(tessera, recipe, tmp_path):
    (tmp_path / "data").mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"data/{number}.png")
    data = f"data={{kind: folder, path: {tmp_path / 'data'}, size: 8}}"
    assert tessera("train", recipe, data, "training.global_batch_size=4").code == 0
    done = tessera("sample", tmp_path / "run", "--count", "3", "--out", tmp_path / "s")
    assert done.code == 0, done.err
    names = sorted(path.name for path in (tmp_path / "s").iterdir())
    assert names == ["grid.png", "seed-0.png", "seed-1.png", "seed-2.png"]
    done = tessera("sample", tmp_path / "run", "--classes", "1", "--out", tmp_path / "t")
    assert (done.code, done.err) == (1, "error: this model is unconditional: leave --classes out\n")
    done = tessera("sample", tmp_path / "run", "--guidance", "2", "--out", tmp_path / "t")
    assert (done.code, "cannot be guided" in done.err) == (1, True)


def test_version_and_usage(tessera):
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", tessera("--version").out)
    assert tessera("sample").code == 2
    assert tessera("sample", "x", "--steps", "many").code == 2
    assert tessera("sample", "x", "--count", "0").code == 2


# From a picture, away from a guide


def saved(path, size=(8, 8), mode="L", seed=0):
    """A picture of noise in a file."""
    numbers = np.random.default_rng(seed).integers(0, 256, (*size, len(Image.new(mode, (1, 1)).getbands())), np.uint8)
    Image.fromarray(numbers[..., 0] if numbers.shape[-1] == 1 else numbers, mode).save(path)
    return path


def test_info_of_a_picture_that_began_in_another_and_was_led_away(tessera, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image, guide = saved(tmp_path / "a picture.png", (8, 12)), bundle.checkpoints(trained)[-1]
    mask = np.zeros((8, 12), np.uint8)
    mask[:, 6:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    words = ["--from", image, "--size", "8x12", "--strength", 0.8, "--mask", tmp_path / "mask.png"]
    words += ["--guide", guide, "--guidance", "2.0"]
    for change in ("guidance_interval=[0.1, 0.9]", "guidance_schedule=cosine", "caching=first-block"):
        words += ["--set", change]
    done = tessera("sample", trained, "--classes", "3", "--seeds", "5", *words, "--out", tmp_path / "first")
    assert done.code == 0, done.err
    assert re.search(r"; caching computed \d+% of the blocks", done.out)
    first = pixels(tmp_path / "first/class-3-seed-5.png")
    assert (first[:, :6] == pixels(image)[:, :6]).all()
    assert (first[:, 6:] != pixels(image)[:, 6:]).any()
    command = shlex.split(tessera("info", tmp_path / "first/class-3-seed-5.png").out, comments=True)
    assert tessera(*command[1:]).code == 0
    np.testing.assert_array_equal(pixels(tmp_path / "samples/class-3-seed-5.png"), first)


def test_another_picture_of_the_same_name_is_drawn_from_anew(tessera, trained, tmp_path):
    command = ["sample", trained, "--classes", "3", "--from", tmp_path / "a.png", "--strength", "0.3"]
    drawn = []
    for seed in (0, 1):
        saved(tmp_path / "a.png", seed=seed)
        assert tessera(*command, "--out", tmp_path / "s").code == 0
        drawn.append(pixels(tmp_path / "s/class-3-seed-0.png"))
    assert (drawn[0] != drawn[1]).any()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--strength", "0.5"], "--strength belongs to --from"),
        (["--mask", "grey.png"], "--mask belongs to --from"),
        (["--from", "gone.png"], "cannot read --from gone.png"),
        (["--from", "text.png"], "cannot read --from text.png"),
        (["--from", "colour.png"], "has the mode RGB; expected grey, as this model draws"),
        (["--from", "transparent.png"], "has the mode LA"),
        (["--from", "grey.png", "--size", "7x8"], "size 7 x 8 does not fit"),
        (["--from", "grey.png", "--strength", "2"], "strength is 2.0; expected more than 0"),
        (["--from", "grey.png", "--strength", "0.001"], "strength 0.001 leaves no step"),
        (
            ["--from", "grey.png", "--mask", "odd.png"],
            "--mask odd.png is 7 x 8 pixels (height x width), but --from grey.png is 8 x 8",
        ),
        (["--guide", "run"], "a guide needs guidance other than 1: give --guidance 2"),
        (["--guide", "gone"], "gone"),
        (["--guide", "bare.pt"], "convert it to a bundle first"),
        (["--from", "grey.png", "--npz", "many.npz"], "leave out --guide, --from, --strength and --mask"),
    ],
)
def test_pictures_and_guides_that_do_not_fit(tessera, trained, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    saved("grey.png")
    saved("colour.png", mode="RGB")
    saved("transparent.png", mode="LA")
    saved("odd.png", size=(7, 8))
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "bare.pt").write_text("no weights")
    words = [trained if word == "run" else word for word in words]
    done = tessera("sample", trained, "--classes", "1", *words, "--out", tmp_path / "s")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: ")
    assert said in done.err
    assert not (tmp_path / "s").exists()


def test_without_a_compiler_it_draws_all_the_same(tessera, trained, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr("torch.compile", broken)
    done = tessera("sample", trained, "--classes", "1", "--compile", "--out", tmp_path / "s")
    assert (done.code, done.err) == (0, "not compiled, drawing without: no C++ compiler\n")


def test_a_picture_of_another_size_is_cropped_as_in_training(tessera, trained, tmp_path):
    photo = np.tile(np.linspace(0, 255, 40, dtype=np.uint8), (30, 1))
    Image.fromarray(photo).save(tmp_path / "photo.png")
    Image.fromarray(np.zeros((30, 40), np.uint8)).save(tmp_path / "keep.png")
    words = ["sample", trained, "--classes", "3", "--from", tmp_path / "photo.png", "--mask", tmp_path / "keep.png"]
    for name, size, more in (("own", (8, 8), []), ("told", (8, 16), ["--size", "8x16"])):
        assert tessera(*words, *more, "--out", tmp_path / name).code == 0
        expected = np.asarray(centre_crop(Image.fromarray(photo), size))
        np.testing.assert_array_equal(pixels(tmp_path / name / "class-3-seed-0.png").squeeze(), expected)
