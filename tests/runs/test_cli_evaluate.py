"""`tessera evaluate`: scores, interruption, several processes, and errors."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tessera import generation
from tessera.data import DigitsConfig
from tessera.evaluation import protocol

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def real() -> np.ndarray:
    from tessera.data.digits import DigitsConfig

    return DigitsConfig(split="ceiling").open().images.transpose(0, 2, 3, 1)


@pytest.fixture
def samples(real, tmp_path) -> Path:
    """A folder of 60 digits."""
    (tmp_path / "samples").mkdir()
    for number, image in enumerate(real[:60]):
        Image.fromarray(image[..., 0]).save(tmp_path / f"samples/{number:03d}.png")
    return tmp_path / "samples"


def scores(folder: Path) -> dict[str, tuple]:
    """Value, fingerprint and hash of the images of each metric."""
    return {each.metric: (each.value, each.fingerprint, each.source["images"]) for each in protocol.load(folder)}


# Scoring


def test_a_model_is_scored_against_its_training_data(tessera, trained, tmp_path):
    done = tessera("evaluate", trained, "--num-samples", "60", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    head, *lines, last = done.out.splitlines()
    assert head.split() == ["metric", "value", "95", "%", "interval", "fingerprint"]
    values = scores(tmp_path / "out")
    assert set(values) == {"fd", "kid", "precision", "recall", "density", "coverage", "authenticity", "accuracy"}
    assert [line.split("  ")[0] for line in lines] == list(values)
    assert all(line.endswith(fingerprint) for line, (_, fingerprint, _) in zip(lines, values.values()))
    assert last.startswith("60 samples against ")
    assert (tmp_path / "out/report.html").exists()
    assert "note: 60 samples of 48" not in done.err
    first = protocol.load(tmp_path / "out")[0].protocol
    assert (first.samples, first.sampling["num_steps"], first.sampling["class_policy"]) == (60, 3, "uniform")


def test_a_shipped_model_is_scored_by_its_name(tessera, tmp_path):
    words = ("--num-samples", "10", "--metrics", "oracle", "--out", tmp_path / "out", "num_steps=2")
    done = tessera("evaluate", "dit-digits", *words)
    assert done.code == 0, done.err
    assert done.out.splitlines()[1].startswith("accuracy ")
    missing = tessera("evaluate", "dit-digit", *words)
    assert missing.code == 1
    assert missing.err.startswith("error: dit-digit does not exist: ")
    assert "or dit-digits, emoji, sprites)" in missing.err


def test_score_is_the_default_command(tessera, samples, tmp_path):
    words = (samples, "--reference", "digits", "--metrics", "kid,fd")
    assert tessera("evaluate", *words, "--out", tmp_path / "a").code == 0
    assert tessera("evaluate", "score", *words, "--out", tmp_path / "b").code == 0
    assert tessera("evaluate", *words[1:], samples, "--out", tmp_path / "c").code == 0
    assert scores(tmp_path / "a") == scores(tmp_path / "b") == scores(tmp_path / "c")
    assert list(scores(tmp_path / "a")) == ["kid", "fd"]


def test_a_folder_an_npz_and_a_data_set_of_the_same_images_score_the_same(
    tessera, samples, real, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "packed.npz", real[:60])
    np.savez(tmp_path / "whole.npz", DigitsConfig(split="ceiling").open().images.transpose(0, 2, 3, 1))
    for target in ("samples", "packed.npz", "whole.npz", "digits:ceiling"):
        done = tessera("evaluate", target, "--reference", "digits", "--metrics", "fd")
        assert done.code == 0, done.err
    results = [scores(tmp_path / "evaluation" / name) for name in ("samples", "packed", "whole", "digits-ceiling")]
    assert results[0] == results[1] != results[2] == results[3]


def test_statistics_replace_the_reference_data(tessera, samples, tmp_path):
    done = tessera("evaluate", "stats", "digits", "--out", tmp_path / "stats.npz")
    assert done.code == 0, done.err
    assert done.out.startswith("1000 images (0 invalid), features tessera/digits: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples", "stats.npz"]
    for reference, out in (("digits", "a"), (tmp_path / "stats.npz", "b")):
        words = ("--metrics", "fd,kid,prdc", "--features", "digits", "--reference", reference, "--out", tmp_path / out)
        assert tessera("evaluate", samples, *words).code == 0
    ours, theirs = scores(tmp_path / "a"), scores(tmp_path / "b")
    for metric, (value, *hashes) in ours.items():
        assert theirs[metric][0] == pytest.approx(value, abs=1e-9)
        assert list(theirs[metric][1:]) == hashes
    done = tessera("evaluate", "stats", "digits", "--out", tmp_path / "stats.npz")
    assert (done.code, "exists already" in done.err) == (1, True)


def test_a_feature_network_is_trained_and_used(tessera, samples, tmp_path):
    words = ("evaluate", "train-features", "digits", "--out", tmp_path / "net", "--steps", "5", "--width", "8")
    done = tessera(*words)
    assert done.code == 0, done.err
    assert f"--features {tmp_path / 'net'}" in done.out
    assert tessera(*words).err.startswith(f"error: {tmp_path / 'net'} exists already")
    words = ("--reference", "digits", "--features", tmp_path / "net", "--metrics", "kid", "--out", tmp_path / "out")
    assert tessera("evaluate", samples, *words).code == 0
    (score,) = protocol.load(tmp_path / "out")
    assert score.protocol.features["name"] == "net"


def test_compare_lists_the_differences_of_the_protocols(tessera, samples, tmp_path):
    for out, count in (("a", 60), ("b", 50), ("c", 60)):
        words = ("--reference", "digits", "--metrics", "fd,kid", "--num-samples", count, "--out", tmp_path / out)
        assert tessera("evaluate", samples, *words).code == 0
    done = tessera("evaluate", "compare", tmp_path / "a", tmp_path / "b/scores.json")
    assert done.code == 0
    assert "warning: fd, kid" in done.out
    assert "60 and 50" in done.out
    done = tessera("evaluate", "compare", tmp_path / "a", tmp_path / "c")
    assert "warning" not in done.out
    assert "intervals overlap" in done.out


# Interruption and several processes


def evaluate_words(trained: Path, out: Path, count: int) -> list[str]:
    words = [
        "evaluate",
        trained,
        "--num-samples",
        count,
        "--metrics",
        "fd,kid,prdc,oracle",
        "--out",
        out,
        "--device",
        "cpu",
    ]
    return [str(word) for word in words]


def test_a_killed_evaluation_resumes_with_the_same_scores(tessera, start, trained, tmp_path):
    words = evaluate_words(trained, tmp_path / "part", 1500)
    process = start(*words)
    while process.poll() is None and not (tmp_path / "part/samples/000001.npy").exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "part/samples").glob("*.npy")}
    assert 2 <= len(shards) < 6
    assert tessera(*words).code == 0
    assert all(path.stat().st_mtime_ns == before for path, before in shards.items())
    assert tessera(*evaluate_words(trained, tmp_path / "whole", 1500)).code == 0
    assert scores(tmp_path / "part") == scores(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one(tessera, environment, trained, tmp_path):
    words = evaluate_words(trained, tmp_path / "two", 400)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tessera"]
    done = subprocess.run([*torchrun, *words], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("400 samples against") == 1
    assert tessera(*evaluate_words(trained, tmp_path / "one", 400)).code == 0
    one, two = scores(tmp_path / "one"), scores(tmp_path / "two")
    assert list(one) == list(two)
    for metric, (value, *hashes) in one.items():
        assert two[metric][0] == pytest.approx(value, rel=1e-9, abs=1e-9)
        assert list(two[metric][1:]) == hashes


def test_other_settings_in_the_folder_are_refused(tessera, trained, tmp_path):
    assert tessera(*evaluate_words(trained, tmp_path / "out", 20), "--metrics", "kid").code == 0
    done = tessera(*evaluate_words(trained, tmp_path / "out", 20), "--metrics", "kid", "num_steps=2")
    assert done.code == 1
    assert "num_steps was 3, is 2" in done.err
    assert "--out" in done.err


# Bulk sampling


def test_many_images_in_one_npz(tessera, trained, tmp_path):
    words = ("sample", trained, "--num-samples", "30", "--class-policy", "balanced", "--npz", tmp_path / "s.npz")
    done = tessera(*words)
    assert (done.code, done.out.strip()) == (0, f"30 images in {tmp_path / 's.npz'}")
    assert [path.name for path in tmp_path.iterdir()] == ["s.npz"]
    with np.load(tmp_path / "s.npz") as file:
        assert file["arr_1"].tolist() == [number % 10 for number in range(30)]
        assert file["arr_0"].shape == (30, 8, 8, 1)
    assert "exists already" in tessera(*words).err
    done = tessera("evaluate", tmp_path / "s.npz", "--reference", "digits", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    model = tessera(
        "evaluate", trained, "--num-samples", "30", "--class-policy", "balanced", "--out", tmp_path / "model"
    )
    assert model.code == 0
    assert {metric: value for metric, (value, _, _) in scores(tmp_path / "out").items()} == pytest.approx(
        {metric: value for metric, (value, _, _) in scores(tmp_path / "model").items()}
    )


def test_an_interrupted_sample_generates_only_missing_images(tessera, trained, tmp_path, monkeypatch):
    words = ("sample", trained, "--num-samples", "12", "--batch-size", "4", "--out", tmp_path / "s")
    assert tessera(*words).code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "s").glob("*.png")}
    names = sorted((path for path in before if "seed" in path.name), key=lambda p: int(p.stem.rpartition("-")[2]))
    assert [int(path.stem.rpartition("-")[2]) for path in names] == list(range(12))
    for path in names[5:9]:
        path.unlink()
    names[2].write_bytes(before[names[2]][:60])  # cut short
    seeds, original = [], generation.generate_request
    monkeypatch.setattr(generation, "generate_request", lambda *a, **k: seeds.extend(a[1].seeds) or original(*a, **k))
    assert tessera(*words).code == 0
    assert seeds == [2, 5, 6, 7, 8]
    for path, content in before.items():
        now, then = (np.asarray(Image.open(source)).astype(int) for source in (path, _file(tmp_path, content)))
        assert np.abs(now - then).max() <= 1
    seeds.clear()
    assert tessera(*words).code == 0
    assert seeds == []
    assert tessera(*words, "guidance_scale=2").code == 0
    assert len(seeds) == 12


def _file(folder: Path, content: bytes) -> Path:
    (folder / "then.png").write_bytes(content)
    return folder / "then.png"


# Help


@pytest.mark.parametrize("verb", ["", "score", "stats", "train-features", "compare"])
def test_help_imports_nothing_heavy(environment, verb):
    code = (
        "import sys; from tessera import cli\n"
        f"sys.argv = ['tessera', 'evaluate', *{verb.split()}, '--help']\n"
        "try: cli.main()\n"
        "except SystemExit as exit: assert not exit.code\n"
        "print('loaded:', *sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    output, loaded = done.stdout.split("loaded:")
    assert "Usage: tessera evaluate" in output
    assert not {"torch", "numpy", "PIL", "tessera.settings"} & set(loaded.split())


# Errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{empty}", "--reference", "digits"], "no images"),
        (["{cut}", "--reference", "digits"], "cut.npz"),
        (["{samples}", "--features", "digits", "--reference", "{cut}"], "cut.npz"),
        (["{samples}", "--reference", "digits", "--metrics", "fdd"], "unknown metric 'fdd'; did you mean 'fd'?"),
        (["{samples}", "--reference", "digits", "--metrics", ""], "name at least one metric"),
        (["{samples}", "--reference", "digits", "--features", "digitz"], "did you mean 'digits'?"),
        (["{samples}", "--reference", "digits", "--features", "{samples}/x.pth"], "x.pth"),
        (["{samples}"], "--reference DATA"),
        (["{samples}", "--features", "digits", "--reference", "{gone}"], "no data at {gone}"),
        (["{samples}", "--features", "digits", "--reference", "{gone}.npz"], "no data at {gone}"),
        (["{gone}", "--reference", "digits"], "{gone}"),
        (["{gone}.npz", "--reference", "digits"], "{gone}.npz"),
        (
            ["{samples}", "num_steps=5", "--reference", "digits"],
            "is not a model, so sampling options do not apply: remove key",
        ),
        (["{samples}", "--reference", "digits", "--seed", "2"], "remove --seed"),
        (["{samples}", "--reference", "digits", "--num-samples", "61"], "61"),
        (["{samples}", "--features", "digits", "--reference", "shapes"], "size differ"),
        (["{samples}", "--reference", "digits", "--size", "8y8"], "--size 8y8 is not valid"),
        (["{samples}", "--reference", "digits", "--class-policy", "odd"], "--class-policy"),
        (["{samples}", "--reference", "digits", "--device", "gpu"], "device 'gpu' is not available"),
        (
            [
                "{model}",
                "--num-samples",
                "9",
                "--metrics",
                "oracle",
                "--features",
                "digits",
                "--reference",
                "{samples}",
            ],
            "oracle",
        ),
        (["{model}", "--num-samples", "19", "--metrics", "is,fd"], "at least 20"),
        (["{model}", "--num-samples", "20", "num_steps=99"], "99"),
        (["{model}", "--num-samples", "20", "sampler=dimm"], "did you mean 'ddim'?"),
        (["{model}", "--num-samples", "20", "guidance_scale=.nan"], "guidance_scale"),
        (["{model}", "--num-samples", "20", "--size", "12"], "size differ"),
        (["{model}", "--num-samples", "20", "--seed", "99999999999999999999"], "--seed"),
        (["{model}", "--num-samples", "99999999999999"], "--num-samples"),
        (["stats", "digits", "--out", "stats.txt"], "must end in .npz"),
        (["stats", "{gone}", "--out", "stats.npz", "--features", "digits"], "no data at {gone}"),
        (["stats", "{samples}", "--out", "stats.npz", "--features", "digits", "--size", "8"], "3 channels"),
        (["train-features", "{samples}", "--out", "net", "--size", "8", "--grayscale"], "classes"),
        (["train-features", "{samples}", "--out", "net"], "--size 256"),
        (["train-features", "digits", "--out", "net", "--width", "12"], "width: Input should be a multiple of 8"),
        (["compare", "{samples}", "{samples}"], "cannot read"),
        (["compare", "{gone}", "{gone}"], "cannot read"),
    ],
)
def test_invalid_input_is_one_message(tessera, trained, samples, real, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "cut.npz", real[:30])
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:900])
    paths = {name: tmp_path / name for name in ("empty", "samples", "gone")}
    paths |= {"model": trained, "cut": tmp_path / "cut.npz"}
    done = tessera("evaluate", *(word.format(**paths) for word in words))
    assert done.code in (1, 2)  # 2: an invalid value of an option
    assert message.format(**paths) in done.err
    assert "Traceback" not in done.err
    assert done.out == ""
    if done.code == 1:
        assert done.err.count("error: ") == 1


def test_a_model_without_recorded_training_data(tessera, trained, tmp_path):
    from tessera import bundle

    copy = shutil.copytree(bundle.checkpoints(trained)[0], tmp_path / "model")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "recipe": None}))
    done = tessera("evaluate", copy, "--num-samples", "20")
    assert done.code == 1
    assert "give --reference DATA" in done.err


def test_an_output_that_cannot_be_written(tessera, samples, tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = tessera("evaluate", samples, "--reference", "digits", "--out", tmp_path / "file/out")
    assert done.code == 1
    assert done.err.startswith(f"error: cannot write {tmp_path / 'file/out'}")
