"""`tessera train`: output, exit codes and errors."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tessera import bundle
from tessera.cli import main


def test_a_run_prints_its_folder_and_its_progress(tessera, recipe, tmp_path):
    done = tessera("train", recipe)
    assert done.code == 0
    assert done.out.strip() == str(tmp_path / "run")
    lines = done.err.splitlines()
    assert lines[1].startswith("step 1/4  loss ")
    assert lines[-2].startswith("step 4/4  loss ")
    assert "4 steps" in lines[-1]
    assert str(tmp_path / "run") in lines[-1]
    assert len(bundle.checkpoints(tmp_path / "run")) == 2  # the first and the last


def test_piped_output_is_plain_lines(command, recipe):
    done = command("train", recipe)
    assert done.code == 0, done.err
    assert "step 4/4  loss " in done.err
    assert "\x1b" not in done.err
    assert "\r" not in done.err


def test_overrides_reach_the_run(tessera, recipe, tmp_path):
    done = tessera("train", recipe, "training.steps=2", f"run_dir={tmp_path / 'other'}", "training.seed=5")
    assert done.code == 0
    training = bundle.load(bundle.checkpoints(tmp_path / "other")[0]).config.recipe["training"]
    assert (training["steps"], training["seed"]) == (2, 5)


def test_the_same_command_resumes(tessera, recipe, tmp_path):
    tessera("train", recipe, "training.steps=2")
    done = tessera("train", recipe)
    assert done.code == 0
    assert "step 2" in done.err
    assert str(tmp_path / "run") in done.err
    tessera("train", recipe, f"run_dir={tmp_path / 'whole'}")
    part, whole = (bundle.checkpoints(tmp_path / run)[0] for run in ("run", "whole"))
    assert (part / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_dry_run_prints_an_estimate_and_writes_nothing(tessera, recipe, tmp_path):
    done = tessera("train", recipe, "--dry-run", "training.steps=100000")
    assert done.code == 0
    for fact in ("network", "data", "step", "run", "peak memory", "disk"):
        assert any(line.startswith(fact) for line in done.out.splitlines()), fact
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.yaml"]


@pytest.mark.parametrize("dry", [False, True])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainin.steps=1"], "unknown key 'trainin'; did you mean 'training'?"),
        (["training.optimizer.learning_rte=1"], "did you mean 'learning_rate'?"),
        (["training.steps=x"], "training.steps"),
        (["training.steps"], "'training.steps' is not an override; write key=value"),
        (["training.steps.more=1"], "training.steps is a value, not a section"),
        (["training.steps=[1"], "cannot read the value of 'training.steps=[1' as YAML"),
        (["network.patch_size=3"], "patch"),
        (["network.num_heads=5"], "16"),
        (["network.num_classes=7"], "network.num_classes is 7"),
        (["data={kind: folder, path: nowhere}"], "data.path nowhere"),
        (["data={kind: parquet, path: nowhere.parquet}"], "data.path nowhere.parquet"),
        (["data.kind=directory"], "'directory'"),
        (["training.init_from=nowhere"], "nowhere"),
        (["training.device=cuda"], "device 'cuda' is not available here"),
        (["sampling.num_steps=21"], "21"),
        (["sampling.sampler=dimm"], "dimm"),
        (["codec={kind: pixels, channels: 3}"], "3 channels"),
        (["--resume", "nowhere"], "nowhere"),
    ],
)
def test_invalid_input_is_one_message_and_exit_code_1(tessera, recipe, tmp_path, words, message, dry):
    if "cuda" in str(words) and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    done = tessera("train", recipe, *words, *(["--dry-run"] if dry else []))
    assert done.code == 1
    assert done.out == ""
    assert message in done.err
    assert done.err.startswith("error: ")
    assert done.err.count("error:") == 1
    assert "Traceback" not in done.err
    assert not (tmp_path / "run").exists()


def test_errors_of_a_process_show_no_traceback(command, recipe):
    done = command("train", recipe, "network.patch_size=3")
    assert done.code == 1
    assert done.err.startswith("error: network is not valid:")
    assert "Traceback" not in done.err


def test_a_missing_recipe(tessera, tmp_path):
    done = tessera("train", tmp_path / "gone.yaml")
    assert (done.code, done.err.startswith(f"error: no recipe at {tmp_path / 'gone.yaml'}")) == (1, True)


@pytest.mark.parametrize("words", [["train"], ["train", "a.yaml", "--resum", "never"], ["trian"], ["train", "--batch"]])
def test_wrong_usage_is_exit_code_2(tessera, words):
    done = tessera(*words)
    assert done.code == 2
    assert "Usage:" in done.err


def test_an_existing_run_is_not_overwritten(tessera, recipe, tmp_path):
    tessera("train", recipe)
    done = tessera("train", recipe, "--resume", "never")
    assert done.code == 1
    assert done.err.splitlines()[-1].startswith("error: ")
    assert "already" in done.err


def test_an_output_that_cannot_be_written(tessera, recipe, tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = tessera("train", recipe, f"run_dir={tmp_path / 'file/run'}")
    assert done.code == 1
    assert done.err.startswith("error: cannot write")
    assert len(done.err.splitlines()) == 1


def test_a_diverging_loss(tessera, recipe):
    done = tessera("train", recipe, "training.optimizer.learning_rate=1e30", "training.steps=20")
    assert done.code == 1
    assert "error: training diverged at step" in done.err
    assert "`tessera doctor" in done.err
    assert "lower training.optimizer.learning_rate" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("go", ["--dry-run", None])
def test_folders_that_are_not_valid_data(tessera, recipe, tmp_path, go):
    def write_image(name):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)

    (tmp_path / "empty").mkdir()
    write_image("one/cat/a.png")
    write_image("mixed/cat/a.png")
    write_image("mixed/loose.png")
    write_image("bad/a.png")
    (tmp_path / "bad/a.png").write_text("no image")
    write_image("small/a.png")
    for name, message in (
        ("empty", "no images"),
        ("one", "set data.classes=none"),
        ("mixed", "class folders"),
        ("mixed/loose.png", "expected a folder"),
        ("bad", "1 of 1"),
        ("small", "16 x 16"),
    ):
        size = 16 if name == "small" else 8
        data = f"data={{kind: folder, path: {tmp_path / name}, size: {size}}}"
        done = tessera("train", recipe, data, *([go] if go else []))
        assert done.code == 1, name
        assert message in done.err
        assert "Traceback" not in done.err


def test_an_unexpected_exception_is_one_message_with_the_file_of_its_traceback(tessera, monkeypatch, tmp_path):
    def fail(*_):
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("tessera.training.recipe.read_recipe", fail)
    with pytest.raises(ZeroDivisionError):  # TESSERA_DEBUG=1
        tessera("train", "any.yaml")
    monkeypatch.setattr(os, "environ", {**os.environ, "TESSERA_DEBUG": ""})
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["tessera", "train", "any.yaml"])
    with pytest.raises(SystemExit, match="1"):
        main()
    (path,) = tmp_path.iterdir()
    assert "ZeroDivisionError: a defect" in path.read_text()


@pytest.mark.parametrize(
    ("words", "absent"),
    [
        (["--help"], {"torch", "numpy", "PIL", "pydantic", "tessera.settings"}),
        (["--version"], {"torch", "numpy", "PIL", "tessera.settings"}),  # typer itself imports pydantic for options
        (["train", "--help"], {"torch", "numpy", "PIL", "tessera.settings"}),
        (["sample", "--help"], {"torch", "numpy", "PIL", "tessera.settings"}),
    ],
)
def test_help_imports_nothing_heavy(environment, words, absent):
    code = (
        "import sys\nfrom tessera import cli\n"
        f"sys.argv = ['tessera', *{words}]\n"
        "try:\n    cli.main()\nexcept SystemExit as exit:\n    assert not exit.code\n"
        "print('\\nloaded:', *sys.modules)\n"
    )
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    output, _, loaded = process.stdout.partition("loaded:")
    assert output.strip()
    assert "tessera.cli" in loaded.split()
    assert not absent & set(loaded.split())


# Images in files


def test_damaged_images_are_skipped_and_listed(tessera, recipe, tmp_path):
    for kind in ("cat", "dog"):
        (tmp_path / "data" / kind).mkdir(parents=True)
        for number in range(4):
            pixels = np.random.default_rng(number).integers(0, 256, (20, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"data/{kind}/{number}.jpg")
    (tmp_path / "data/cat/2.jpg").write_bytes((tmp_path / "data/cat/2.jpg").read_bytes()[:200])
    done = tessera(
        "train", recipe, f"data={{kind: folder, path: {tmp_path / 'data'}, size: 8}}", "training.global_batch_size=8"
    )
    assert done.code == 0, done.err
    assert str(tmp_path / "run/skipped_samples.txt") in done.err
    lines = (tmp_path / "run/skipped_samples.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == [str(tmp_path / "data/cat/2.jpg")]
    assert bundle.load(bundle.checkpoints(tmp_path / "run")[0]).config.class_names == ("cat", "dog")


def test_tiles_train_as_nested_class_folders(tessera, recipe, tmp_path):
    archive = Path(os.environ.get("TESSERA_SHARED") or Path(__file__).parents[2] / "../shared/data") / "tiles/tiles.zip"
    if not archive.exists():
        pytest.skip("tiles.zip is absent: set TESSERA_SHARED to the folder of shared data")
    with zipfile.ZipFile(archive) as tiles:
        names = [name for name in tiles.namelist() if name.endswith(".png")]
        tiles.extractall(tmp_path / "tiles", names[::20])
    data = f"data={{kind: folder, path: {tmp_path / 'tiles'}, size: 32, upscale: true}}"
    done = tessera("train", recipe, data, "network.patch_size=8", "training.steps=2")
    assert done.code == 0, done.err
    newest = bundle.checkpoints(tmp_path / "run")[0]
    assert set(bundle.load(newest).config.class_names) == {name.split("/")[0] for name in names[::20]}
    assert all(torch.isfinite(value).all() for value in load_file(newest / "model.safetensors").values())
    assert not (tmp_path / "run/skipped_samples.txt").exists()
