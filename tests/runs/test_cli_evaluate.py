"""`tessera evaluate`: the same scores whatever interrupts or shares out the work, and errors in one message."""

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

from tessera.data import DigitsConfig
from tessera.evaluation import protocol
from tessera.generation import pipeline

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def real() -> np.ndarray:
    from tessera.data.digits import DigitsConfig

    return DigitsConfig(split="ceiling").open().images.transpose(0, 2, 3, 1)


@pytest.fixture
def samples(real, tmp_path) -> Path:
    """A folder of 60 digits."""
    (tmp_path / "samples").mkdir()
    for number, picture in enumerate(real[:60]):
        Image.fromarray(picture[..., 0]).save(tmp_path / f"samples/{number:03d}.png")
    return tmp_path / "samples"


def scores(folder: Path) -> dict[str, tuple]:
    """Value, fingerprint and hash of the pictures by metric."""
    return {each.metric: (each.value, each.fingerprint, each.subject["pictures"]) for each in protocol.load(folder)}


# Scoring


def test_a_model_is_scored_against_what_it_learned_from(tessera, trained, tmp_path):
    done = tessera("evaluate", trained, "--count", "60", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    head, *lines, last = done.out.splitlines()
    assert head.split() == ["metric", "value", "95", "%", "interval", "fingerprint"]
    told = scores(tmp_path / "out")
    assert set(told) == {"fd", "kid", "precision", "recall", "density", "coverage", "authenticity", "as asked"}
    assert [line.split("  ")[0] for line in lines] == list(told)
    assert all(line.endswith(fingerprint) for line, (_, fingerprint, _) in zip(lines, told.values()))
    assert last.startswith("60 samples against the digits of scikit-learn, split model; report in ")
    assert (tmp_path / "out/report.html").exists()
    assert "note: 60 samples of 48" not in done.err
    first = protocol.load(tmp_path / "out")[0].protocol
    assert (first.samples, first.sampling["steps"], first.sampling["class policy"]) == (60, 3, "uniform")


def test_score_is_the_word_that_may_be_left_out(tessera, samples, tmp_path):
    words = (samples, "--reference", "digits", "--metrics", "kid,fd")
    assert tessera("evaluate", *words, "--out", tmp_path / "a").code == 0
    assert tessera("evaluate", "score", *words, "--out", tmp_path / "b").code == 0
    assert tessera("evaluate", *words[1:], samples, "--out", tmp_path / "c").code == 0
    assert scores(tmp_path / "a") == scores(tmp_path / "b") == scores(tmp_path / "c")
    assert list(scores(tmp_path / "a")) == ["kid", "fd"]


def test_a_folder_an_npz_and_data_of_the_same_pictures_score_the_same(tessera, samples, real, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "packed.npz", real[:60])
    np.savez(tmp_path / "whole.npz", DigitsConfig(split="ceiling").open().images.transpose(0, 2, 3, 1))
    for target in ("samples", "packed.npz", "whole.npz", "digits:ceiling"):
        done = tessera("evaluate", target, "--reference", "digits", "--metrics", "fd")
        assert done.code == 0, done.err
    told = [scores(tmp_path / "evaluation" / name) for name in ("samples", "packed", "whole", "digits-ceiling")]
    assert told[0] == told[1] != told[2] == told[3]


def test_statistics_stand_for_the_data(tessera, samples, tmp_path):
    done = tessera("evaluate", "stats", "digits", "--out", tmp_path / "stats.npz")
    assert done.code == 0, done.err
    assert done.out.startswith("1000 pictures (0 could not be used), features tessera/digits: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples", "stats.npz"]
    for told, out in (("digits", "a"), (tmp_path / "stats.npz", "b")):
        words = ("--metrics", "fd,kid,prdc", "--features", "digits", "--reference", told, "--out", tmp_path / out)
        assert tessera("evaluate", samples, *words).code == 0
    ours, theirs = scores(tmp_path / "a"), scores(tmp_path / "b")
    for metric, (value, *told) in ours.items():
        assert theirs[metric][0] == pytest.approx(value, abs=1e-9)
        assert list(theirs[metric][1:]) == told
    done = tessera("evaluate", "stats", "digits", "--out", tmp_path / "stats.npz")
    assert (done.code, "exists already" in done.err) == (1, True)


def test_features_of_ones_own_are_learned_and_used(tessera, samples, tmp_path):
    words = ("evaluate", "train-features", "digits", "--out", tmp_path / "net", "--steps", "5", "--width", "8")
    done = tessera(*words)
    assert done.code == 0, done.err
    assert f"--features {tmp_path / 'net'}" in done.out
    assert tessera(*words).err.startswith(f"error: {tmp_path / 'net'} exists already")
    words = ("--reference", "digits", "--features", tmp_path / "net", "--metrics", "kid", "--out", tmp_path / "out")
    assert tessera("evaluate", samples, *words).code == 0
    (score,) = protocol.load(tmp_path / "out")
    assert score.protocol.features["name"] == "net"


def test_comparing_says_what_differs(tessera, samples, tmp_path):
    for out, count in (("a", 60), ("b", 50), ("c", 60)):
        words = ("--reference", "digits", "--metrics", "fd,kid", "--count", count, "--out", tmp_path / out)
        assert tessera("evaluate", samples, *words).code == 0
    done = tessera("evaluate", "compare", tmp_path / "a", tmp_path / "b/scores.json")
    assert done.code == 0
    assert "warning: fd, kid: the numbers were not made alike" in done.out
    assert "- samples: 60 and 50" in done.out
    done = tessera("evaluate", "compare", tmp_path / "a", tmp_path / "c")
    assert "warning" not in done.out
    assert "+0, intervals overlap" in done.out


# Interrupted, and shared out


def drawn_words(trained: Path, out: Path, count: int) -> list[str]:
    words = ["evaluate", trained, "--count", count, "--metrics", "fd,kid,prdc,oracle", "--out", out, "--device", "cpu"]
    return [str(word) for word in words]


def test_killed_while_drawing_the_same_command_gives_the_same_scores(tessera, start, trained, tmp_path):
    words = drawn_words(trained, tmp_path / "part", 1500)
    process = start(*words)
    while process.poll() is None and not (tmp_path / "part/samples/000001.npy").exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "part/samples").glob("*.npy")}
    assert 2 <= len(kept) < 6
    assert tessera(*words).code == 0
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    assert tessera(*drawn_words(trained, tmp_path / "whole", 1500)).code == 0
    assert scores(tmp_path / "part") == scores(tmp_path / "whole")


def test_two_processes_give_the_scores_of_one(tessera, environment, trained, tmp_path):
    words = drawn_words(trained, tmp_path / "two", 400)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tessera"]
    done = subprocess.run([*torchrun, *words], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("400 samples against") == 1
    assert tessera(*drawn_words(trained, tmp_path / "one", 400)).code == 0
    one, two = scores(tmp_path / "one"), scores(tmp_path / "two")
    assert list(one) == list(two)
    for metric, (value, *told) in one.items():
        assert two[metric][0] == pytest.approx(value, rel=1e-9, abs=1e-9)
        assert list(two[metric][1:]) == told


def test_other_settings_in_the_folder_are_refused(tessera, trained, tmp_path):
    assert tessera(*drawn_words(trained, tmp_path / "out", 20), "--metrics", "kid").code == 0
    done = tessera(*drawn_words(trained, tmp_path / "out", 20), "--metrics", "kid", "--steps", "2")
    assert done.code == 1
    assert "holds other work: drawing.steps was 3, is 2. Give another --out, or remove it" in done.err


# tessera sample, of many


def test_many_pictures_in_one_npz(tessera, trained, tmp_path):
    words = ("sample", trained, "--total", "30", "--class-policy", "balanced", "--npz", tmp_path / "s.npz")
    done = tessera(*words)
    assert (done.code, done.out.strip()) == (0, f"30 pictures in {tmp_path / 's.npz'}")
    assert [path.name for path in tmp_path.iterdir()] == ["s.npz"]
    with np.load(tmp_path / "s.npz") as file:
        assert file["arr_1"].tolist() == [number % 10 for number in range(30)]
        assert file["arr_0"].shape == (30, 8, 8, 1)
    assert "exists already" in tessera(*words).err
    done = tessera("evaluate", tmp_path / "s.npz", "--reference", "digits", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    model = tessera("evaluate", trained, "--count", "30", "--class-policy", "balanced", "--out", tmp_path / "model")
    assert model.code == 0
    assert {metric: value for metric, (value, _, _) in scores(tmp_path / "out").items()} == pytest.approx(
        {metric: value for metric, (value, _, _) in scores(tmp_path / "model").items()}
    )


def test_an_interrupted_sample_draws_what_is_missing_alone(tessera, trained, tmp_path, monkeypatch):
    words = ("sample", trained, "--total", "12", "--batch", "4", "--out", tmp_path / "s")
    assert tessera(*words).code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "s").iterdir()}
    names = sorted((path for path in before if path.name != "grid.png"), key=lambda p: int(p.stem.rpartition("-")[2]))
    assert [int(path.stem.rpartition("-")[2]) for path in names] == list(range(12))
    for path in names[5:9]:
        path.unlink()
    names[2].write_bytes(before[names[2]][:60])  # cut short
    drawn, original = [], pipeline.generate
    monkeypatch.setattr(pipeline, "generate", lambda *a, **k: drawn.extend(a[2]) or original(*a, **k))
    assert tessera(*words).code == 0
    assert drawn == [2, 5, 6, 7, 8]
    for path, content in before.items():
        now, then = (np.asarray(Image.open(source)).astype(int) for source in (path, _file(tmp_path, content)))
        assert np.abs(now - then).max() <= 1
    drawn.clear()
    assert tessera(*words).code == 0
    assert drawn == []
    assert tessera(*words, "--guidance", "2").code == 0
    assert len(drawn) == 12


def _file(folder: Path, content: bytes) -> Path:
    (folder / "then.png").write_bytes(content)
    return folder / "then.png"


# Help


@pytest.mark.parametrize("verb", ["", "score", "stats", "train-features", "compare"])
def test_help_needs_nothing_heavy(environment, verb):
    code = (
        "import sys; from tessera import cli\n"
        f"sys.argv = ['tessera', 'evaluate', *{verb.split()}, '--help']\n"
        "try: cli.main()\n"
        "except SystemExit as leaving: assert not leaving.code\n"
        "print('loaded:', *sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shown, loaded = done.stdout.split("loaded:")
    assert "Usage: tessera evaluate" in shown
    assert not {"torch", "numpy", "PIL", "tessera.settings"} & set(loaded.split())


# Errors


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{empty}", "--reference", "digits"], "holds no images"),
        (["{cut}", "--reference", "digits"], "cut.npz is truncated or no .npz file"),
        (["{samples}", "--features", "digits", "--reference", "{cut}"], "cut.npz is truncated or no .npz file"),
        (["{samples}", "--reference", "digits", "--metrics", "fdd"], "unknown metric 'fdd'; did you mean 'fd'?"),
        (["{samples}", "--reference", "digits", "--metrics", ""], "name at least one metric"),
        (["{samples}", "--reference", "digits", "--features", "digitz"], "did you mean 'digits'?"),
        (["{samples}", "--reference", "digits", "--features", "{samples}/x.pth"], "x.pth"),
        (["{samples}"], "say what {samples} is to be compared with: --reference DATA"),
        (["{samples}", "--features", "digits", "--reference", "{gone}"], "no data at {gone}"),
        (["{samples}", "--features", "digits", "--reference", "{gone}.npz"], "no data at {gone}"),
        (["{gone}", "--reference", "digits"], "there is nothing at {gone}: give a model"),
        (["{gone}.npz", "--reference", "digits"], "there is nothing at {gone}.npz"),
        (["{samples}", "--reference", "digits", "--steps", "5"], "is no model: leave out what is of drawing (--"),
        (["{samples}", "--reference", "digits", "--guidance", "2"], "is no model: leave out what is of drawing (--"),
        (["{samples}", "--reference", "digits", "--count", "61"], "61 pictures are asked for, but"),
        (["{samples}", "--features", "digits", "--reference", "shapes"], "size differ"),
        (["{samples}", "--reference", "digits", "--size", "8y8"], "--size 8y8 is not understood"),
        (["{samples}", "--reference", "digits", "--class-policy", "odd"], "--class-policy is odd"),
        (["{samples}", "--reference", "digits", "--device", "gpu"], "device 'gpu' is not available"),
        (
            ["{model}", "--count", "9", "--metrics", "oracle", "--features", "digits", "--reference", "{samples}"],
            "oracle needs",
        ),
        (["{model}", "--count", "19", "--metrics", "is,fd"], "needs at least 20"),
        (["{model}", "--count", "20", "--steps", "99"], "this model was trained with 20"),
        (["{model}", "--count", "20", "--sampler", "dimm"], "did you mean 'ddim'?"),
        (["{model}", "--count", "20", "--guidance", "nan"], "--guidance is nan"),
        (["{model}", "--count", "20", "--size", "10"], "size differ"),
        (["{model}", "--count", "20", "--seed", "99999999999999999999"], "--seed"),
        (["{model}", "--count", "99999999999999"], "--count"),
        (["stats", "digits", "--out", "stats.txt"], "must end in .npz"),
        (["stats", "{gone}", "--out", "stats.npz", "--features", "digits"], "no data at {gone}"),
        (["stats", "{samples}", "--out", "stats.npz", "--features", "digits", "--size", "8"], "has 3 channels, but"),
        (["train-features", "{samples}", "--out", "net", "--size", "8", "--grey"], "has no classes"),
        (["train-features", "{samples}", "--out", "net"], "--size 256"),
        (["train-features", "digits", "--out", "net", "--width", "12"], "width: Input should be a multiple of 8"),
        (["compare", "{samples}", "{samples}"], "cannot read scores from"),
        (["compare", "{gone}", "{gone}"], "cannot read scores from"),
    ],
)
def test_what_cannot_be_is_one_message(tessera, trained, samples, real, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "cut.npz", real[:30])
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:900])
    places = {name: tmp_path / name for name in ("empty", "samples", "gone")}
    places |= {"model": trained, "cut": tmp_path / "cut.npz"}
    done = tessera("evaluate", *(word.format(**places) for word in words))
    assert done.code in (1, 2)  # 2: of a flag, as every command of this kind says it
    assert said.format(**places) in done.err
    assert "Traceback" not in done.err
    assert done.out == ""
    if done.code == 1:
        assert done.err.count("error: ") == 1


def test_a_model_that_does_not_say_what_it_was_trained_on(tessera, trained, tmp_path):
    from tessera import bundle

    copy = shutil.copytree(bundle.checkpoints(trained)[0], tmp_path / "model")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "recipe": None}))
    done = tessera("evaluate", copy, "--count", "20")
    assert done.code == 1
    assert done.err.startswith("error: this model does not say what it was trained on: give --reference DATA")


def test_an_output_that_cannot_be_written(tessera, samples, tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = tessera("evaluate", samples, "--reference", "digits", "--out", tmp_path / "file/out")
    assert done.code == 1
    assert done.err.startswith(f"error: cannot write {tmp_path / 'file/out'}")
