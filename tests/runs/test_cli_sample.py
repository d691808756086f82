"""`tessera sample` and `tessera info`: images with the settings that reproduce them."""

import re
import shlex
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from tessera import bundle, generation
from tessera.data.images import ImagesConfig, center_crop, load_image
from tessera.images import read_settings


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_one_image_per_class_and_seed_and_a_grid(tessera, trained, tmp_path):
    done = tessera("sample", trained, "--classes", "3,7", "--per-class", "2", "--out", tmp_path / "s")
    assert done.code == 0, done.err
    assert done.out.strip() == f"4 images and grid.png in {tmp_path / 's'}"
    names = [f"class-{c}-seed-{s}.png" for c in (3, 7) for s in (0, 1)]
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == sorted([*names, "grid.png", "metadata.jsonl"])
    model = bundle.load(bundle.checkpoints(trained)[0])
    expected = generation.generate(model, [3, 3, 7, 7], [0, 1, 0, 1])
    for name, image in zip(names, expected):
        np.testing.assert_array_equal(pixels(tmp_path / "s" / name), image[..., 0])
    assert Image.open(tmp_path / "s/grid.png").size == (2 * 64 + 1, 2 * 64 + 1)


def test_all_classes_by_default_where_they_are_few(tessera, trained, tmp_path):
    assert tessera("sample", trained, "--out", tmp_path / "s").code == 0
    assert len(list((tmp_path / "s").glob("class-*-seed-0.png"))) == 10


def test_the_grid_alone(tessera, trained, tmp_path):
    done = tessera("sample", trained, "--classes", "1", "--seeds", "0-3", "--out", tmp_path / "deep/grid.png")
    assert (done.code, done.out.strip()) == (0, str(tmp_path / "deep/grid.png"))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["grid.png"]


def test_a_png_holds_the_settings(tessera, trained, tmp_path):
    tessera("sample", trained, "--classes", "4", "--seeds", "9", "guidance_scale=2.5", "--out", tmp_path / "s")
    settings = read_settings(tmp_path / "s/class-4-seed-9.png")
    assert settings["model"] == str(trained)
    assert (settings["classes"], settings["seeds"]) == ([4], [9])
    assert settings["sampling"]["guidance_scale"] == 2.5
    assert settings["sampling"]["num_steps"] == 3


@pytest.mark.parametrize(
    "words",
    [
        ["--precision", "auto"],
        ["guidance_scale=3.123456789", "num_steps=5", "timestep_spacing=trailing"],
        ["sampler=ancestral", "guidance_channels=1", "guidance_scale=2.0"],
        ["sampler=ddim", "sampler.eta=0.5", "--size", "8x16"],
        ["sampler=unipc", "sampler.variant=bh1", "timestep_spacing=karras", "timestep_spacing.rho=5.5"],
        ["--precision", "bfloat16"],
        ["--codec", "pixels"],
    ],
)
def test_info_of_an_image_prints_the_command_that_reproduces_it(tessera, trained, tmp_path, monkeypatch, words):
    run = tmp_path / "a run's folder"  # needs quoting
    shutil.copytree(trained, run)
    tessera("sample", run, "--classes", "3,8", "--seeds", "5,11", *words, "--out", tmp_path / "first")
    monkeypatch.chdir(tmp_path)
    for name in ("class-8-seed-11.png", "grid.png"):
        info = tessera("info", tmp_path / "first" / name)
        assert info.code == 0
        command = shlex.split(info.out, comments=True)
        assert command[:3] == ["tessera", "sample", str(run)]
        assert set(words) <= set(command)  # numbers to the last digit
        assert tessera(*command[1:]).code == 0
        np.testing.assert_array_equal(pixels(tmp_path / "samples" / name), pixels(tmp_path / "first" / name))
        shutil.rmtree(tmp_path / "samples")
    assert read_settings(tmp_path / "first/grid.png")["seeds"] == [5, 11]


def test_overrides_reach_every_sampling_setting_and_the_last_one_wins(tessera, trained, tmp_path):
    words = ["sampler=dpm++", "sampler.order=3", "guidance_scale=2.5", "timestep_spacing=karras"]
    words += ["num_steps=5", "--classes", "1", "num_steps=4"]
    assert tessera("sample", trained, *words, "--out", tmp_path / "s").code == 0
    settings = read_settings(tmp_path / "s/class-1-seed-0.png")["sampling"]
    assert settings["sampler"] == {"kind": "dpm++", "order": 3}
    assert settings["timestep_spacing"] == {"kind": "karras", "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}
    assert (settings["num_steps"], settings["guidance_scale"]) == (4, 2.5)
    model = bundle.load(bundle.checkpoints(trained)[0])
    expected = generation.generate(
        model,
        [1],
        num_steps=4,
        guidance_scale=2.5,
        sampler={"kind": "dpm++", "order": 3},
        timestep_spacing="karras",
    )
    np.testing.assert_array_equal(pixels(tmp_path / "s/class-1-seed-0.png"), expected[0, ..., 0])


def test_the_printed_command_runs_in_a_shell(command, trained, tmp_path):
    """The only test here in its own process."""
    assert command("sample", trained, "--classes", "2", "--seeds", "7", "--out", tmp_path / "first").code == 0
    info = command("info", tmp_path / "first/class-2-seed-7.png")
    assert info.out.startswith("tessera sample ")
    weights = read_settings(tmp_path / "first/class-2-seed-7.png")["weights"]
    assert f"# weights {weights}" in info.out
    assert weights in command("info", trained).out
    assert command(*shlex.split(info.out, comments=True)[1:], cwd=tmp_path).code == 0
    reproduced = tmp_path / "samples/class-2-seed-7.png"
    np.testing.assert_array_equal(pixels(reproduced), pixels(tmp_path / "first/class-2-seed-7.png"))


def test_a_seed_gives_the_same_image_alone_and_in_a_batch(tessera, trained, tmp_path):
    tessera("sample", trained, "--classes", "all", "--seeds", "0-4", "--batch-size", "7", "--out", tmp_path / "many")
    tessera("sample", trained, "--classes", "6", "--seeds", "3", "--out", tmp_path / "one")
    many, one = (pixels(tmp_path / folder / "class-6-seed-3.png").astype(int) for folder in ("many", "one"))
    assert np.abs(many - one).max() <= 1


def test_info_of_a_model_counts_its_parameters(tessera, trained):
    done = tessera("info", trained)
    assert done.code == 0
    facts = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in done.out.splitlines())
    weights = load_file(bundle.checkpoints(trained)[0] / "model.safetensors")
    assert facts["parameters"] == f"{sum(value.numel() for value in weights.values()):,}"
    assert facts["classes"] == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert re.fullmatch("[0-9a-f]{16}", facts["weights"])
    assert facts["steps"] == "4"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--classes", "10"], "class 10 is out of range"),
        (["--classes", "-1"], "class -1 is out of range"),
        (["--classes", "cat"], "unknown class 'cat'"),
        (["--classes", ""], "unknown class ''"),
        (["sampler=dimm"], "unknown sampler 'dimm'; did you mean 'ddim'?"),
        (["sampler.eta=2"], "less than or equal to 1"),
        (["timestep_spacing.kind=karas"], "unknown timestep_spacing 'karas'; did you mean 'karras'?"),
        (["sampler=dpm++", "sampler.oder=3"], "unknown key 'oder'; did you mean 'order'?"),
        (["nun_steps=3"], "unknown key 'nun_steps'; did you mean 'num_steps'?"),
        (["num_steps"], "'num_steps' is not an override; write key=value, for example num_steps=20"),
        (["sampler="], "sampling is not valid:\n  sampler: expected the name of a kind, or a mapping that has one"),
        (["caching=frist-block"], "caching: unknown caching 'frist-block'; did you mean 'first-block'?"),
        (["guidance_scale=.nan"], "guidance_scale: Input should be a finite number"),
        (["sampler={kind: sde, strength: .inf}"], "strength: Input should be a finite number"),
        (["num_steps.more=3"], "num_steps is a value, not a section"),
        (["num_steps=0"], "num_steps"),
        (["num_steps=21"], "21"),
        (["timestep_spacing=odd"], "timestep_spacing"),
        (["guidance_channels=some"], "guidance_channels"),
        (["--seeds", "5-"], "--seeds 5- is not valid: write 0-15 or 1,5,9"),
        (["--seeds", "9-5"], "--seeds 9-5 is not valid"),
        (["--seeds", "a"], "--seeds a is not valid"),
        (["--seeds", "1,,2"], "--seeds 1,,2 is not valid"),
        (["--seeds", "-3"], "--seeds -3 is not valid"),
        (["--seeds", "²"], "--seeds ² is not valid"),
        (["--seeds", "99999999999999999999"], "is not valid"),
        (["--seeds", "0-99999999999"], "more than 1,000,000 images"),
        (["--seeds", "1,2,3", "--per-class", "2"], "--seeds has 3 seeds, but --per-class is 2"),
        (["--num-samples", "3", "--seeds", "1"], "leave out --classes, --prompt"),
        (["--size", "8y8"], "--size 8y8 is not valid: write 256 or 256x384"),
        (["--size", "8x"], "--size 8x is not valid"),
        (["--size", "10"], "10 x 10"),
        (["--size", "0"], "0 x 0"),
        (["--device", "gpu"], "device 'gpu' is not available here"),
        (["--codec", "nowhere"], "nowhere"),
        (["--num-heads", "7"], "7"),
    ],
)
def test_invalid_input_is_one_message_and_writes_nothing(tessera, trained, tmp_path, words, message):
    done = tessera("sample", trained, *words, "--out", tmp_path / "s")
    assert done.code == 1
    assert done.err.startswith("error: ")
    assert message in done.err
    assert "Traceback" not in done.err
    assert done.out == ""
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("verb", ["sample", "info"])
def test_damaged_models(tessera, trained, tmp_path, verb):
    broken = tmp_path / "broken"
    shutil.copytree(bundle.checkpoints(trained)[0], broken)
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    empty = tmp_path / "empty"
    empty.mkdir()
    unweighted = tmp_path / "unweighted"
    shutil.copytree(broken, unweighted)
    (unweighted / "model.safetensors").unlink()
    damaged = tmp_path / "damaged"
    shutil.copytree(bundle.checkpoints(trained)[0], damaged)
    (damaged / "config.json").write_text("{")
    other = tmp_path / "other"
    shutil.copytree(bundle.checkpoints(trained)[0], other)
    (other / "config.json").write_text(
        (other / "config.json").read_text().replace('"hidden_size": 16', '"hidden_size": 32')
    )
    for path, message in (
        (tmp_path / "gone", "gone"),
        (empty, "empty"),
        (broken, "model.safetensors"),
        (unweighted, "model.safetensors is missing"),
        (damaged, "config.json"),
        (other, "other"),
    ):
        done = tessera(verb, path)
        assert done.code == 1, path
        assert done.err.startswith("error: ")
        assert message in done.err
        assert "Traceback" not in done.err


def test_images_without_settings(tessera, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no image")
    for name, message in (
        ("plain.png", "holds no settings"),
        ("text.png", "cannot read"),
        ("gone.png", "cannot read"),
    ):
        done = tessera("info", tmp_path / name)
        assert (done.code, message in done.err, done.err.count("\n")) == (1, True, 1), name


def test_images_that_cannot_be_written(tessera, trained, tmp_path):
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
    done = tessera("sample", tmp_path / "run", "--per-class", "3", "--out", tmp_path / "s")
    assert done.code == 0, done.err
    names = sorted(path.name for path in (tmp_path / "s").iterdir())
    assert names == ["grid.png", "metadata.jsonl", "seed-0.png", "seed-1.png", "seed-2.png"]
    done = tessera("sample", tmp_path / "run", "--classes", "1", "--out", tmp_path / "t")
    assert (done.code, done.err) == (1, "error: this model is unconditional: leave --classes out\n")
    done = tessera("sample", tmp_path / "run", "guidance_scale=2", "--out", tmp_path / "t")
    assert (done.code, "guid" in done.err) == (1, True)


def test_version_and_usage(tessera):
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", tessera("--version").out)
    assert tessera("sample").code == 2
    assert tessera("sample", "x", "--batch-size", "many").code == 2
    assert tessera("sample", "x", "--per-class", "0").code == 2
    assert tessera("sample", "x", "--precision", "float16").code == 2


# Initial images, masks and guidance models


def save_noise(path, size=(8, 8), mode="L", seed=0):
    """Write an image of noise."""
    numbers = np.random.default_rng(seed).integers(0, 256, (*size, len(Image.new(mode, (1, 1)).getbands())), np.uint8)
    Image.fromarray(numbers[..., 0] if numbers.shape[-1] == 1 else numbers, mode).save(path)
    return path


def test_info_of_an_image_with_an_initial_image_a_mask_and_a_guidance_model(tessera, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image, guide = save_noise(tmp_path / "an image.png", (8, 12)), bundle.checkpoints(trained)[-1]
    mask = np.zeros((8, 12), np.uint8)
    mask[:, 6:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    words = ["--init-image", image, "--size", "8x12", "--strength", 0.8, "--mask", tmp_path / "mask.png"]
    words += ["--guidance-model", guide, "guidance_scale=2.0"]
    words += ["guidance_interval=[0.1, 0.9]", "guidance_schedule=cosine", "caching=first-block"]
    done = tessera("sample", trained, "--classes", "3", "--seeds", "5", *words, "--out", tmp_path / "first")
    assert done.code == 0, done.err
    assert re.search(r"; caching computed \d+% of the blocks", done.out)
    first = pixels(tmp_path / "first/class-3-seed-5.png")
    assert (first[:, :6] == pixels(image)[:, :6]).all()
    assert (first[:, 6:] != pixels(image)[:, 6:]).any()
    command = shlex.split(tessera("info", tmp_path / "first/class-3-seed-5.png").out, comments=True)
    assert tessera(*command[1:]).code == 0
    np.testing.assert_array_equal(pixels(tmp_path / "samples/class-3-seed-5.png"), first)


def test_guidance_by_routed_tokens(tessera, trained, recipe, tmp_path, monkeypatch):
    """Of a run that was trained so; the command of an image repeats it."""
    monkeypatch.chdir(tmp_path)
    settings = ["training.token_routing={}", "network.depth=3", "training.ema.decay=0", "run_dir=routed-run"]
    assert tessera("train", recipe, *settings).code == 0
    words = ["--guidance-model", "routed", "guidance_scale=4"]
    done = tessera("sample", "routed-run", "--classes", "3", "--seeds", "5", *words, "--out", "first")
    assert done.code == 0, done.err
    command = shlex.split(tessera("info", "first/class-3-seed-5.png").out, comments=True)
    assert command[command.index("--guidance-model") + 1] == "routed"
    assert tessera(*command[1:]).code == 0
    np.testing.assert_array_equal(pixels("samples/class-3-seed-5.png"), pixels("first/class-3-seed-5.png"))
    done = tessera("sample", trained, "--classes", "3", *words)
    assert (done.code, done.out) == (1, "")
    assert "not trained with training.token_routing" in done.err


def test_a_changed_initial_image_is_used(tessera, trained, tmp_path):
    command = ["sample", trained, "--classes", "3", "--init-image", tmp_path / "a.png", "--strength", "0.3"]
    results = []
    for seed in (0, 1):
        save_noise(tmp_path / "a.png", seed=seed)
        assert tessera(*command, "--out", tmp_path / "s").code == 0
        results.append(pixels(tmp_path / "s/class-3-seed-0.png"))
    assert (results[0] != results[1]).any()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--strength", "0.5"], "--strength needs --init-image"),
        (["--mask", "gray.png"], "--mask needs --init-image"),
        (["--init-image", "gone.png"], "cannot read --init-image gone.png"),
        (["--init-image", "text.png"], "cannot read --init-image text.png"),
        (["--init-image", "gray.png", "--mask", "transparent.png"], "transparent.png has transparent pixels"),
        (["--init-image", "number.tif"], "cannot read --init-image number.tif: floating-point values from 0 to 255"),
        (["--init-image", "gray.png", "--size", "7x8"], "7 x 8"),
        (["--init-image", "gray.png", "--strength", "2"], "strength is 2.0"),
        (["--init-image", "gray.png", "--strength", "0.001"], "strength 0.001"),
        (
            ["--init-image", "gray.png", "--mask", "odd.png"],
            "--mask odd.png has 7 x 8 pixels (height x width), but --init-image gray.png has 8 x 8",
        ),
        (["--guidance-model", "run"], "guid"),
        (["--guidance-model", "gone"], "gone"),
        (["--guidance-model", "bare.pt"], "to a bundle first"),
        (
            ["--init-image", "gray.png", "--npz", "many.npz"],
            "leave out --guidance-model, --init-image, --strength, --mask, --control and given frames",
        ),
    ],
)
def test_images_and_guidance_models_that_do_not_fit(tessera, trained, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    save_noise("gray.png")
    save_noise("transparent.png", mode="LA")
    Image.fromarray(np.full((8, 8), 255, np.float32) * np.eye(8, dtype=np.float32)).save("number.tif")
    save_noise("odd.png", size=(7, 8))
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "bare.pt").write_text("no weights")
    words = [trained if word == "run" else word for word in words]
    done = tessera("sample", trained, "--classes", "1", *words, "--out", tmp_path / "s")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: ")
    assert message in done.err
    assert not (tmp_path / "s").exists()


def test_without_a_compiler_images_are_generated_all_the_same(tessera, trained, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr("torch.compile", broken)
    done = tessera("sample", trained, "--classes", "1", "--compile", "--out", tmp_path / "s")
    assert (done.code, done.err) == (0, "continuing without compilation: no C++ compiler\n")


@pytest.mark.parametrize("kind", ["turned", "color", "transparent", "print", "sixteen", "palette"])
def test_an_initial_image_is_read_as_training_reads_it(tessera, trained, tmp_path, kind):
    """The mask keeps all of it, so the result is what was read."""
    path, exif = tmp_path / ("a.jpg" if kind == "print" else "a.png"), Image.Exif()
    exif[0x0112] = 6
    color = Image.open(save_noise(tmp_path / "color.png", mode="RGB"))
    match kind:
        case "turned":
            save_noise(path)
            Image.open(path).save(path, exif=exif)
        case "color":
            color.save(path)
        case "transparent":
            save_noise(path, mode="RGBA")
        case "print":
            color.convert("CMYK").save(path, exif=exif)
        case "sixteen":
            Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(path)
        case "palette":
            color.quantize(9).save(path, transparency=2)
    Image.new("RGBA", (8, 8), (0, 0, 0, 255)).save(tmp_path / "keep.png")
    words = ["--init-image", path, "--mask", tmp_path / "keep.png", "--out", tmp_path / "s"]
    done = tessera("sample", trained, "--classes", "3", *words)
    assert done.code == 0, done.err
    expected = load_image(path, ImagesConfig(size=(8, 8), channels=1))[0]
    np.testing.assert_array_equal(pixels(tmp_path / "s/class-3-seed-0.png").squeeze(), expected)


def test_an_initial_image_of_another_size_is_cropped_as_in_training(tessera, trained, tmp_path):
    photo = np.tile(np.linspace(0, 255, 40, dtype=np.uint8), (30, 1))
    Image.fromarray(photo).save(tmp_path / "photo.png")
    Image.fromarray(np.zeros((30, 40), np.uint8)).save(tmp_path / "keep.png")
    words = [
        "sample",
        trained,
        "--classes",
        "3",
        "--init-image",
        tmp_path / "photo.png",
        "--mask",
        tmp_path / "keep.png",
    ]
    for name, size, more in (("own", (8, 8), []), ("wide", (8, 16), ["--size", "8x16"])):
        assert tessera(*words, *more, "--out", tmp_path / name).code == 0
        expected = np.asarray(center_crop(Image.fromarray(photo), size))
        np.testing.assert_array_equal(pixels(tmp_path / name / "class-3-seed-0.png").squeeze(), expected)
