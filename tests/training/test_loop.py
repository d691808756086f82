"""Whole runs: what they leave, exact resumption, interruption, errors, dry runs."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tessera import bundle, generation
from tessera.data import Loader
from tessera.errors import TesseraError
from tessera.monitoring.doctor import facts
from tessera.monitoring.logger import read_log
from tessera.monitoring.report import build_report
from tessera.training import checkpoint, dry_run, loop
from tessera.training.recipe import Recipe, read_recipe
from tessera.training.samples import num_grids


def noise_images(folder: Path, *names: str, size: int = 8) -> dict:
    """Write images of noise, and return the data section of a recipe."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return {"kind": "folder", "path": str(folder), "size": size}


def untimed(run: Path) -> list[dict]:
    """The log without timings and memory."""
    timed = ("images_per_second", "mfu", "data_wait", "memory")
    return [{name: value for name, value in record.items() if name not in timed} for record in read_log(run)]


# The files of a run


def test_a_run_without_grids_of_samples_draws_none(tiny, monkeypatch):
    recipe = tiny("run", "training.steps=4", "training.checkpoint_every=2", "training.sample_every=null")
    monkeypatch.setattr(loop, "sample_grid", lambda *args: pytest.fail("a grid was sampled"))
    run = loop.train(recipe)
    assert not list(run.glob("samples/*"))
    loop.train(recipe)  # nothing is left to do, the last grid neither
    assert num_grids(recipe) == 0
    build_report(run, Recipe)


def test_a_run_leaves_recipe_log_samples_and_checkpoints(tiny):
    run = loop.train(tiny("run", "training.steps=5", "training.checkpoint_every=2", "training.sample_every=2"))
    names = sorted(path.name for path in run.iterdir() if path.name != ".lock")
    assert names == ["checkpoints", "log.jsonl", "recipe.yaml", "samples"]
    assert [path.name for path in bundle.checkpoints(run)] == ["step-000000005", "step-000000004"]
    assert sorted(path.name for path in (run / "samples").iterdir()) == [f"step-{s:09d}.png" for s in (0, 2, 4, 5)]
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert recipe["network"]["num_classes"] == 10
    assert recipe["training"]["steps"] == 5
    model = bundle.load(bundle.checkpoints(run)[0])
    assert model.config.recipe == recipe
    assert model.config.class_names == tuple("0123456789")
    assert model.config.provenance.steps == 5


def test_the_log_has_all_metrics(tiny):
    run = loop.train(tiny("run", "training.steps=6", "training.log_every=2", "training.optimizer.warmup_steps=4"))
    records = read_log(run)
    assert [record["step"] for record in records] == [2, 4, 6]
    expected = {"step", "loss", "mse", "vb", "grad_norm", "learning_rate", "images_per_second", "epoch"}
    expected |= {"invalid_samples", "data_wait", "clipped", "skipped_steps", "rollbacks", "memory"}  # mfu: on GPUs
    assert set(records[0]) == expected
    assert [record["learning_rate"] for record in records] == pytest.approx([0.0005, 0.001, 0.001])
    assert records[-1]["epoch"] == pytest.approx(6 * 32 / 1000)
    assert all(record["images_per_second"] > 0 for record in records)


def test_no_utilization_of_a_cpu_is_reported(tiny, capsys):
    """Its peak, measured once, depends on what else the machine does at that time."""
    run = loop.train(tiny("run", "training.steps=2"))
    line = capsys.readouterr().err.splitlines()[-2]
    assert "images/s" in line
    assert "MFU" not in line
    assert "MFU" not in build_report(run, Recipe).html()
    assert "GPU utilization" not in facts(run)


def test_logged_losses_are_means_over_the_steps_since_the_last_record(tiny):
    each = read_log(loop.train(tiny("each", "training.steps=6")))
    pairs = read_log(loop.train(tiny("pairs", "training.steps=6", "training.log_every=2")))
    for index, record in enumerate(pairs):
        mean = (each[2 * index]["loss"] + each[2 * index + 1]["loss"]) / 2
        assert record["loss"] == pytest.approx(mean, rel=1e-6)


def test_the_loss_decreases(tiny):
    changes = ("training.steps=150", "training.optimizer.learning_rate=0.01", "diffusion.variance=posterior")
    losses = [record["loss"] for record in read_log(loop.train(tiny("run", *changes)))]
    assert np.mean(losses[-20:]) < 0.8 * np.mean(losses[:5])


def test_a_recipe_gives_the_same_run_bit_for_bit_and_another_seed_does_not(tiny, state):
    first, second = loop.train(tiny("first")), loop.train(tiny("second"))
    assert state(first) == state(second)
    assert state(loop.train(tiny("third", "training.seed=1"))) != state(first)


def test_health_records_do_not_change_the_training(tiny, state):
    run, other = loop.train(tiny("run", "training.health_every=1")), loop.train(tiny("other"))
    assert state(run) == state(other)
    records = read_log(run, "health.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    for record in records:
        assert record["norm_time"] > 0
        assert record["norm_labels"] > 0
        rise = record["loss_wrong_labels"] / record["loss_probe"] - 1
        assert record["cost_wrong_labels"] == pytest.approx(rise, abs=1e-5)
    assert records[0]["change_wrong_labels"] < records[-1]["change_wrong_labels"]  # the head begins at zero
    again = loop.train(tiny("again", "training.health_every=1"))
    assert read_log(again, "health.jsonl") == records


def test_the_number_of_workers_does_not_matter(tiny, state):
    one = loop.train(tiny("one", "training.num_workers=1"))
    assert state(one) == state(loop.train(tiny("many", "training.num_workers=5")))


def test_micro_batches_change_only_rounding(tiny, weights):
    whole = weights(loop.train(tiny("whole", "training.ema.decay=0")))
    parts = weights(loop.train(tiny("parts", "training.ema.decay=0", "training.micro_batch_size=8")))
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=0, atol=5e-5)


def test_a_saved_recipe_trains_the_same_model(tiny, state, tmp_path):
    first = loop.train(tiny("first"))
    again = read_recipe(first / "recipe.yaml", [f"run_dir={tmp_path / 'again'}"])
    assert state(loop.train(again)) == state(first)


def test_data_without_classes_train_an_unconditional_model(tiny, tmp_path):
    data = noise_images(tmp_path / "data", *(f"{i}.png" for i in range(5)))
    model = bundle.load(bundle.checkpoints(loop.train(tiny("run", "training.global_batch_size=4", data=data)))[0])
    assert model.config.network.num_classes == 0
    assert generation.generate(model, seeds=[0, 1]).shape == (2, 8, 8, 3)


# Resuming


@pytest.mark.parametrize("batch", [pytest.param(32, marks=pytest.mark.slow), 300])  # 300: across the end of an epoch
@pytest.mark.parametrize("decay", ["constant", "cosine", "wsd"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_is_the_same_bit_for_bit(tiny, state, monkeypatch, stop_after, batch, decay, optimizer):
    changes = (f"training.global_batch_size={batch}", f"training.optimizer.kind={optimizer}",
               f"training.optimizer.lr_schedule={decay}", "training.optimizer.warmup_steps=2",
               "training.optimizer.learning_rate=0.001", "training.steps=6",
               "training.ema={decay: 0.9, extra_decays: [0.5, 0.99], warmup: true}")  # fmt: skip
    whole = loop.train(tiny("whole", *changes))
    stop_after(3)
    recipe = tiny("part", *changes, "training.checkpoint_every=3")
    with pytest.raises(loop.Interrupted, match=r"stopped at step 4 of 6, everything is saved in .*part"):
        loop.train(recipe)
    monkeypatch.undo()
    part = loop.train(recipe)
    assert state(part) == state(whole)
    assert untimed(part) == untimed(whole)


def test_another_optimizer_and_another_ema_decay_are_reported_on_resumption(tiny, capsys):
    loop.train(tiny("run"))
    changes = ("training.steps=6", "training.optimizer=muon", "training.ema.extra_decays=[0.5]")
    run = loop.train(tiny("run", *changes))
    output = capsys.readouterr().err
    assert "changed since the checkpoint: training.optimizer.kind was adamw, is muon" in output
    assert re.search(r"not in the checkpoint.*: the optimizer state of 4 of \d+ tensors", output)
    assert re.search(r"not in the checkpoint.*: the EMA of decay 0.5", output)
    loop.train(tiny("run", *changes, "training.steps=8"))
    assert "not in the checkpoint" not in capsys.readouterr().err
    (bundle.checkpoints(run)[0] / "ema/0.5.safetensors").unlink()
    path = bundle.checkpoints(run)[0] / checkpoint.TRAINER_STATE
    path.write_text(json.dumps({**json.loads(path.read_text()), "files": {}}))
    with pytest.raises(TesseraError, match=r"ema/0\.5\.safetensors is missing"):
        loop.train(tiny("run", *changes, "training.steps=9"))


@pytest.mark.parametrize(
    "damaged", ["ema/0.5.safetensors", "model.safetensors", "config.json", "training.json", "state"]
)
def test_a_damaged_newest_checkpoint_is_replaced_by_the_previous_one(tiny, state, capsys, damaged):
    changes = ("training.ema.extra_decays=[0.5]", "training.checkpoint_every=2", "training.steps=5")
    whole = state(run := loop.train(tiny("run", *changes)))
    newest = bundle.checkpoints(run)[0]
    file = newest / damaged
    file = next(file.iterdir()) if file.is_dir() else file
    file.write_bytes(file.read_bytes()[:-10])
    loop.train(tiny("run", *changes))
    output = capsys.readouterr().err
    assert f"{newest} is damaged" in output
    assert "resuming from step 4" in output
    assert state(run) == whole


def test_resuming_a_damaged_checkpoint_by_its_path_is_an_error(tiny):
    run = loop.train(tiny("run"))
    newest = bundle.checkpoints(run)[0]
    (newest / "model.safetensors").write_bytes(b"")
    with pytest.raises(TesseraError, match=r"is damaged \(model\.safetensors has a wrong checksum\)"):
        loop.train(tiny("branch", "training.steps=6"), resume=str(newest))


def test_a_finished_run_continues_with_more_steps(tiny, state):
    whole = loop.train(tiny("whole", "training.steps=6"))
    part = loop.train(tiny("part", "training.steps=3"))
    assert loop.train(tiny("part", "training.steps=6")) == part
    assert state(part) == state(whole)
    assert [record["step"] for record in read_log(part)] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_has_nothing_to_do(tiny, state, capsys):
    run = loop.train(tiny("run"))
    before = state(run)
    assert loop.train(tiny("run")) == run
    assert "nothing left to do: 4 of 4 steps are done" in capsys.readouterr().err
    assert state(run) == before


def test_partial_files_of_a_killed_run_are_removed_and_written_again(tiny, state):
    whole = loop.train(tiny("whole", "training.steps=6"))
    run = loop.train(tiny("run", "training.steps=3"))
    half = run / "checkpoints/step-000000004.partial"
    shutil.copytree(bundle.checkpoints(run)[0], half)
    (half / "model.safetensors").write_bytes(b"half")
    (run / "samples/step-000000004.png.partial").write_bytes(b"half")
    with (run / "log.jsonl").open("a") as log:
        log.write('{"step": 4, "loss": 9}\n{"step": 5, "lo')
    loop.train(tiny("run", "training.steps=6"))
    assert state(run) == state(whole)
    assert not list(run.rglob("*.partial"))
    assert [record["step"] for record in read_log(run)] == [1, 2, 3, 4, 5, 6]
    assert read_log(run)[3]["loss"] == pytest.approx(read_log(whole)[3]["loss"])


def test_resume_never_is_an_error_for_a_folder_with_a_run(tiny, tmp_path):
    run = loop.train(tiny("run"))
    with pytest.raises(TesseraError, match=rf"{run} holds a run already: choose another run_dir="):
        loop.train(tiny("run"), resume="never")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(TesseraError, match="holds a run already"):
        loop.train(tiny("run"), resume="never")
    (tmp_path / "empty").mkdir()
    assert loop.train(tiny("empty"), resume="never") == tmp_path / "empty"


@pytest.mark.parametrize("inside", [False, True])
def test_a_run_can_be_resumed_into_another_folder(tiny, state, inside):
    whole = loop.train(tiny("whole", "training.steps=6"))
    first = loop.train(tiny("first", "training.steps=3"))
    path = bundle.checkpoints(first)[0] if inside else first
    branch = loop.train(tiny("branch", "training.steps=6"), resume=str(path))
    assert state(branch) == state(whole)
    assert [path.name for path in bundle.checkpoints(first)] == ["step-000000003", "step-000000000"]
    assert [record["step"] for record in read_log(branch)] == [4, 5, 6]


def test_resuming_an_earlier_checkpoint_than_those_of_the_folder_is_an_error(tiny, state):
    run = loop.train(tiny("run", "training.steps=4", "training.checkpoint_every=2"))
    before = state(run)
    earlier = bundle.checkpoints(run)[1]
    with pytest.raises(TesseraError, match=r"holds later checkpoints than .*step-000000002: .* another run_dir="):
        loop.train(tiny("run", "training.steps=6"), resume=str(earlier))
    assert state(run) == before


def test_a_missing_checkpoint_is_an_error(tiny, tmp_path):
    with pytest.raises(TesseraError, match=r"nothing to resume at .*gone: expected the folder"):
        loop.train(tiny("run"), resume=str(tmp_path / "gone"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("network.hidden_size=32", r"another model: network\.hidden_size was 16, is 32"),
        ("network.depth=2", r"another model: network\.depth was 1, is 2"),
        ("network.block=adaln", r"another model: network\.block\.kind was adaln-zero, is adaln"),
        ("network.patch_size=2", r"another model: network\.patch_size was 4, is 2"),
        ("diffusion.prediction=x0", r"another model: diffusion\.prediction was v, is x0"),
        ("diffusion.num_timesteps=30", r"another model: diffusion\.num_timesteps was 20, is 30"),
    ],
)
def test_resuming_with_another_network_or_diffusion_names_the_difference(tiny, state, change, message):
    run = loop.train(tiny("run"))
    before = state(run), (run / "recipe.yaml").read_text()
    with pytest.raises(TesseraError, match=message):
        loop.train(tiny("run", "training.steps=6", change))
    assert (state(run), (run / "recipe.yaml").read_text()) == before


def test_resuming_with_other_classes_is_an_error(tiny, tmp_path):
    data = noise_images(tmp_path / "data", "cat/a.png", "dog/b.png")
    loop.train(tiny("run", "training.global_batch_size=4", data=data))
    (tmp_path / "data/dog").rename(tmp_path / "data/ant")
    with pytest.raises(TesseraError, match="another model: classes was cat, dog, is ant, cat"):
        loop.train(tiny("run", "training.global_batch_size=4", "training.steps=8", data=data))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops_the_run_and_handlers_are_restored(tiny, monkeypatch, number):
    before = signal.getsignal(number)
    step = loop.train_step

    def signals(*args):
        os.kill(os.getpid(), number)
        return step(*args)

    monkeypatch.setattr(loop, "train_step", signals)
    with pytest.raises(loop.Interrupted, match="stopped at step 1 of 4") as caught:
        loop.train(tiny("run"))
    assert caught.value.exit_code == 130
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_stops_at_once(tiny, monkeypatch, tmp_path):
    def signals(*args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loop, "train_step", signals)
    with pytest.raises(KeyboardInterrupt):
        loop.train(tiny("run"))
    assert [path.name for path in bundle.checkpoints(tmp_path / "run")] == ["step-000000000"]


# Errors


def test_a_diverged_run_ends_with_a_diagnosis_and_saves_no_bad_weights(tiny, tmp_path):
    changes = ("training.steps=20", "training.checkpoint_every=1", "training.log_every=20",
               "training.keep_last=20")  # fmt: skip
    loop.train(tiny("run", *changes, "training.steps=2"))
    with pytest.raises(TesseraError) as caught:
        loop.train(tiny("run", *changes, "training.optimizer.learning_rate=1e+30"))
    message = str(caught.value)
    assert re.search(r"training diverged at step \d+: the .* is not finite, 8 steps in a row", message)
    assert re.search(r"3 rollbacks did not help; the last checkpoint is .*step-0", message)
    assert "lower training.optimizer.learning_rate" in message
    newest = bundle.checkpoints(tmp_path / "run")[0]
    assert newest.name in message
    assert all(torch.isfinite(value).all() for value in bundle.load(newest).network.state_dict().values())


def test_invalid_images_are_skipped_and_listed(tiny, state, tmp_path, capsys):
    names = [f"{kind}/{number}.png" for kind in ("cat", "dog") for number in range(6)]
    data = noise_images(tmp_path / "data", *names)
    whole = (tmp_path / "data/cat/1.png").read_bytes()
    (tmp_path / "data/cat/1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "data/cat/2.png").write_text("no image")
    Image.new("RGB", (5, 20)).save(tmp_path / "data/dog/3.png")
    changes = ("training.global_batch_size=8", "training.steps=6")
    run = loop.train(tiny("run", *changes, data=data))
    lines = dict(line.split("\t") for line in (run / "skipped_samples.txt").read_text().splitlines())
    assert {Path(name).name: reason.split(":")[0] for name, reason in lines.items()} == {
        "1.png": "damaged",
        "2.png": "not an image",
        "3.png": "smaller than the size",
    }
    assert capsys.readouterr().err.count("skipping images that cannot be used, for example") == 1
    again = loop.train(tiny("again", *changes, "training.num_workers=5", data=data))
    assert state(again) == state(run)


def test_an_invalid_image_is_listed_once_over_all_resumptions(tiny, tmp_path):
    data = noise_images(tmp_path / "data", *(f"{i}.png" for i in range(6)))
    (tmp_path / "data/2.png").write_text("no image")
    for steps in (2, 4, 6):
        run = loop.train(tiny("run", "training.global_batch_size=6", f"training.steps={steps}", data=data))
    assert len((run / "skipped_samples.txt").read_text().splitlines()) == 1


def test_data_without_a_valid_image_are_one_error(tiny, tmp_path):
    data = {**noise_images(tmp_path / "data", "a.png", "b.png"), "size": 16}
    with pytest.raises(TesseraError, match=r"no valid image among 2 of 2; the last, .*\.png: smaller than the siz"):
        loop.train(tiny("run", "training.global_batch_size=4", data=data))


def test_a_run_dir_below_a_file_cannot_be_written(tiny, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for name in ("file", "file/run"):
        with pytest.raises(TesseraError, match=r"cannot write .*file"):
            loop.train(tiny(name))
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc, which root cannot write to")
@pytest.mark.parametrize("train", [loop.train, dry_run.dry_run])
def test_a_run_dir_that_cannot_be_written_is_an_error(tiny, train):
    with pytest.raises(TesseraError, match="cannot write"):
        train(tiny().model_copy(update={"run_dir": "/proc/run"}))


# Latents


@pytest.fixture
def autoencoder(tmp_path) -> Path:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=2, norm_num_groups=2,
        up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16, scaling_factor=0.5, force_upcast=False,
    ).save_pretrained(tmp_path / "vae")  # fmt: skip
    return tmp_path / "vae"


def test_a_run_on_latents_holds_its_codec_and_can_be_moved(tiny, tmp_path, autoencoder):
    data = noise_images(tmp_path / "data", "cat/a.png", "dog/b.png", size=16)
    codec = {"kind": "autoencoder-kl", "source": str(autoencoder)}
    run = loop.train(tiny("run", "training.global_batch_size=2", "training.steps=2", data=data, codec=codec))
    model = bundle.load(bundle.checkpoints(run)[0])
    assert (model.config.network.input_size, model.config.network.in_channels) == ((8, 8), 2)
    before = generation.generate(model, [0, 1], [5])
    assert before.shape == (2, 16, 16, 3)
    run.rename(tmp_path / "moved")
    shutil.rmtree(autoencoder)
    shutil.rmtree(tmp_path / "data")
    newest = bundle.checkpoints(tmp_path / "moved")[0]
    assert "../../codec" in (newest / "config.json").read_text()
    assert (generation.generate(bundle.load(newest), [0, 1], [5]) == before).all()
    bundle.save(bundle.load(newest), tmp_path / "alone")
    shutil.rmtree(tmp_path / "moved")
    assert (generation.generate(bundle.load(tmp_path / "alone"), [0, 1], [5]) == before).all()


def test_a_run_on_latents_resumes_bit_for_bit(tiny, tmp_path, autoencoder, state):
    data = noise_images(tmp_path / "data", "cat/a.png", "dog/b.png", size=16)
    sections = {"data": data, "codec": {"kind": "autoencoder-kl", "source": str(autoencoder)}}
    whole = loop.train(tiny("whole", "training.global_batch_size=2", "training.steps=4", **sections))
    for steps in (2, 4):
        part = loop.train(tiny("part", "training.global_batch_size=2", f"training.steps={steps}", **sections))
    assert state(part) == state(whole)


def test_a_partly_copied_codec_is_copied_again(tiny, tmp_path, autoencoder, monkeypatch):
    data = noise_images(tmp_path / "data", "cat/a.png", "dog/b.png", size=16)
    recipe = tiny(
        "run", "training.global_batch_size=2", data=data, codec={"kind": "autoencoder-kl", "source": str(autoencoder)}
    )
    copy = shutil.copyfile

    def killed(source, target):
        if str(target).endswith(".safetensors"):
            raise KeyboardInterrupt
        copy(source, target)

    monkeypatch.setattr(bundle.shutil, "copyfile", killed)
    with pytest.raises(KeyboardInterrupt):
        loop.train(recipe)
    monkeypatch.undo()
    run = loop.train(recipe)
    assert sorted(path.name for path in (run / "codec").iterdir()) == sorted(
        path.name for path in autoencoder.iterdir()
    )


def test_a_size_that_is_no_multiple_of_the_codec_factor_is_an_error(tiny, tmp_path, autoencoder):
    data = noise_images(tmp_path / "data", "cat/a.png", "dog/b.png", size=17)
    with pytest.raises(TesseraError, match=r"data\.size 17 x 17 is not a multiple of 2, as the codec needs"):
        loop.train(tiny("run", data=data, codec={"kind": "autoencoder-kl", "source": str(autoencoder)}))


def test_a_missing_autoencoder_is_an_error(tiny, tmp_path):
    pytest.importorskip("diffusers")
    codec = {"kind": "autoencoder-kl", "source": str(tmp_path / "gone")}
    with pytest.raises(TesseraError, match="cannot load the autoencoder"):
        loop.train(tiny("run", codec=codec))


# Dry runs


def test_a_dry_run_writes_nothing_and_estimates_the_run(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    estimate = dry_run.dry_run(tiny("run", "training.steps=1000"))
    assert list(tmp_path.iterdir()) == []
    assert estimate.images == 1000
    training = 1000 * estimate.seconds_per_step
    assert training < estimate.seconds < training + 60  # with the grids of samples
    assert estimate.parameters > 1000
    assert estimate.peak_bytes > 2**20
    text = str(estimate)
    assert re.search(r"network +[\d,]+ parameters", text)
    assert re.search(r"step +[\d.]+ ms", text)
    assert re.search(r"run +\d+ ", text)
    assert re.search(r"peak memory +[\d,]+ MiB", text)


def test_a_dry_run_counts_invalid_images(tiny, tmp_path):
    data = noise_images(tmp_path / "data", *(f"{i}.png" for i in range(6)))
    for name in ("2.png", "5.png"):
        (tmp_path / "data" / name).write_text("no image")
    estimate = dry_run.dry_run(tiny("run", "training.global_batch_size=6", data=data))
    assert (estimate.images, estimate.invalid_samples) == (6, 2)
    assert "6 images, 2 invalid so far" in str(estimate)


@pytest.mark.parametrize("changes", [(), ("training.optimizer.kind=muon", "training.ema.extra_decays=[0.9, 0.5]")])
def test_the_estimated_size_of_a_checkpoint_is_right(tiny, changes):
    estimate = dry_run.dry_run(tiny("run", *changes))
    newest = bundle.checkpoints(loop.train(tiny("run", *changes)))[0]
    files = [file for file in newest.rglob("*") if file.is_file()]
    assert estimate.checkpoint_bytes == pytest.approx(sum(file.stat().st_size for file in files), rel=0.01)


def test_a_dry_run_does_not_change_an_existing_run(tiny, state):
    run = loop.train(tiny("run"))
    before = state(run), sorted(run.rglob("*"))
    dry_run.dry_run(tiny("run", "training.steps=10"))
    assert (state(run), sorted(run.rglob("*"))) == before


@pytest.mark.parametrize(
    ("name", "changes", "resume"),
    [
        ("new", ["data={kind: folder, path: nowhere}"], "auto"),
        ("new", ["network.patch_size=3"], "auto"),
        ("new", ["network.num_classes=3"], "auto"),
        ("new", ["sampling.num_steps=99"], "auto"),
        ("new", ["training.init_from=nowhere"], "auto"),
        ("new", [], "nowhere"),
        ("old", ["network.hidden_size=32", "training.steps=9"], "auto"),
        ("old", [], "never"),
    ],
)
def test_a_dry_run_has_the_errors_of_the_run(tiny, name, changes, resume):
    loop.train(tiny("old"))
    messages = []
    for train in (loop.train, dry_run.dry_run):
        with pytest.raises(TesseraError) as caught:
            train(tiny(name, *changes), resume)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_a_dry_run_checks_that_the_run_dir_can_be_written(tiny, tmp_path, name):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TesseraError, match=r"cannot write to run_dir=.*: .*file is a file"):
        dry_run.dry_run(tiny(name))


def test_a_dry_run_checks_the_free_disk_space(tiny, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(TesseraError, match=r"checkpoints need .* GiB, the disk has 0\.00 GiB free"):
        dry_run.dry_run(tiny())


def test_with_a_changed_batch_size_the_run_continues_at_the_next_sample(tiny, capsys, monkeypatch):
    loop.train(tiny("run", "training.steps=3", "training.global_batch_size=32"))
    positions = []
    load_batch = Loader.load_batch
    monkeypatch.setattr(
        Loader, "load_batch", lambda self, position: positions.append(position) or load_batch(self, position)
    )
    folder = loop.train(tiny("run", "training.steps=5", "training.global_batch_size=16"))
    assert sorted(positions)[:2] == [96, 112]
    state = checkpoint.read_state(bundle.checkpoints(folder)[0])
    assert (state.step, state.position) == (5, 128)
    assert "changed since the checkpoint: training.global_batch_size was 32, is 16" in capsys.readouterr().err
