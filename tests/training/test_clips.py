"""Runs on clips: from a data set with frames to samples."""

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image

import tessera
from tessera import bundle
from tessera.data import FilesConfig, Loader
from tessera.data.buckets import BucketsConfig
from tessera.errors import TesseraError
from tessera.settings import Settings, validate
from tessera.training import codec, dry_run, loop
from tessera.training.objective import compute_loss, prepare_batch
from tessera.training.run import build_run


class RampsConfig(Settings):
    """Clips in memory whose frames become brighter (class 0) or darker (class 1)."""

    kind: Literal["ramps"] = "ramps"
    frames: int | None = 4
    size: tuple[int, int] = (8, 8)
    channels: Literal[1, 3] = 1
    hflip: bool = False
    description: str = "ramps"

    def open(self) -> Any:
        return Ramps(self)


class Ramps:
    class_names: tuple[str, ...] = ("up", "down")
    text: Any = None
    image_sizes: Any = None

    def __init__(self, config: RampsConfig) -> None:
        self.config, self.reads = config, 0

    def __len__(self) -> int:
        return 40

    def label(self, index: int) -> int:
        return index % 2

    def name(self, index: int) -> str:
        return f"ramp {index}"

    def pixels(self, index: int) -> np.ndarray:
        self.reads += 1
        levels = np.arange(self.config.frames or 1) * 40 + index
        levels = levels[::-1] if index % 2 else levels
        shape = (self.config.channels, len(levels), *self.config.size)
        return np.broadcast_to(levels[None, :, None, None], shape).astype(np.uint8)


@pytest.fixture
def recipe(tiny):
    """A recipe of ramps with dotted changes."""

    def make(*changes: str, data: Any = None, **sections: Any):
        return tiny("run", *changes, **sections).model_copy(update={"data": data or RampsConfig()})

    return make


def test_the_size_of_the_network_follows_from_the_frames(recipe):
    run = build_run(recipe())
    assert run.recipe.network.input_size == (4, 8, 8)
    batch = next(run.loader.batches())
    assert batch.pixels.shape == (32, 1, 4, 8, 8)
    assert batch.pixels.dtype == torch.uint8


def test_a_network_for_images_is_an_error(recipe):
    with pytest.raises(TesseraError, match="network.input_size"):
        build_run(recipe("network.input_size=[8, 8]"))


def test_small_data_sets_of_clips_stay_in_memory():
    dataset = Ramps(RampsConfig())
    loader = Loader(dataset, 8, seed=0)
    first = [loader.load_batch(position).pixels for position in range(0, 40, 8)]
    reads = dataset.reads
    again = [loader.load_batch(position).pixels for position in range(0, 40, 8)]
    assert dataset.reads == reads == 40
    assert all(torch.equal(one, other) for one, other in zip(first, again))


@pytest.mark.parametrize("source", ["tiny-pair", "kl"])
def test_a_codec_of_images_encodes_each_frame_by_itself(recipe, tmp_path, autoencoder_folder, source):
    pytest.importorskip("diffusers")
    codec = {"kind": "autoencoder-kl", "source": str(autoencoder_folder), "scale": (1.0, 2.0, 3.0, 4.0)}
    if source == "tiny-pair":
        from safetensors.torch import save_file

        from tessera.codecs.tiny import Pair

        torch.manual_seed(0)
        network = Pair(latent_channels=4, pool=True)
        for name in ("encoder", "decoder"):
            weights = {key: tensor.contiguous() for key, tensor in getattr(network, name).state_dict().items()}
            save_file(weights, tmp_path / f"some_{name}.safetensors")
        codec = {"kind": "autoencoder-tiny", "source": str(tmp_path), "scale": (1.0, 2.0, 3.0, 4.0)}
    data = RampsConfig(size=(16, 16), channels=3)
    run = build_run(recipe("network.patch_size=1", data=data, codec=codec))
    codec = run.ema_model.codec
    assert run.recipe.network.input_size == (4, 16 // codec.factor, 16 // codec.factor)
    clips = torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(2, 4, *run.recipe.network.input_size) if codec.stochastic else None
    latents = codec.encode(clips, noise)
    for frame in range(4):
        alone = codec.encode(clips[:, :, frame], None if noise is None else noise[:, :, frame])
        torch.testing.assert_close(latents[:, :, frame], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(codec.decode(latents)[:, :, 2], codec.decode(latents[:, :, 2]), rtol=1e-4, atol=1e-5)


@pytest.mark.run
def test_a_run_trains_samples_and_resumes(recipe):
    run_dir = loop.train(recipe("training.steps=2"))
    run_dir = loop.train(recipe("training.steps=4"))
    model = tessera.load(run_dir)
    clips = tessera.generate(model, [0, "down"], seeds=[3])
    assert clips.shape == (2, 4, 8, 8, 1)
    sheet = Image.open(run_dir / "samples/step-000000004.png")
    assert sheet.size == (4 * 32, 2 * 32 + 1)  # two clips below each other, each a row of four frames
    animation: Any = Image.open(run_dir / "samples/step-000000004.webp")
    assert animation.n_frames == 4
    assert len(bundle.checkpoints(run_dir)) == 2


@pytest.mark.parametrize("times", ["shared", "mixed"])
def test_padding_has_no_loss(recipe, times):
    run = build_run(recipe(f"training.frame_times={times}"))
    batch = run.loader.load_batch(0)
    own = torch.tensor([1, 2, 3, 4] * 8)

    def losses(pixels):
        x0, condition, position = prepare_batch(replace(batch, pixels=pixels), run.objective, torch.device("cpu"))

        def noise_only(x, t, condition):  # an output that does not depend on the padding
            return torch.zeros(len(x), run.recipe.network.out_channels, *x.shape[2:])

        return compute_loss(noise_only, x0, condition, position, run.objective, own)[0]

    other = batch.pixels.clone()
    other[torch.arange(4)[None, :].expand(32, 4)[:, None] >= own[:, None, None]] = 255
    first, second = losses(batch.pixels), losses(other)
    torch.testing.assert_close(first.total, second.total, rtol=0, atol=0)
    assert bool(first.total.isfinite().all())
    assert not torch.equal(losses(255 - batch.pixels).total, first.total)


@pytest.mark.run
def test_short_clips_of_files_are_padded_and_listed(recipe, tmp_path):
    for number in range(6):
        frames = [Image.new("L", (8, 8), 40 * step + number) for step in range(4 if number else 2)]
        frames[0].save(tmp_path / f"{number}.gif", save_all=True, append_images=frames[1:], duration=100)
    data = FilesConfig(path=str(tmp_path), size=(8, 8), channels=1, frames=4, short="pad", caption=None)
    run_dir = loop.train(recipe("training.global_batch_size=6", "run_dir=" + str(tmp_path / "run"), data=data))
    assert (run_dir / "short_clips.txt").read_text() == f"{tmp_path / '0.gif'}\t2 of 4 frames\n"
    assert not (run_dir / "skipped_samples.txt").exists()


@pytest.mark.run
def test_images_and_clips_of_several_lengths_in_one_run(recipe, tmp_path):
    for number in range(4):
        frames = [Image.new("L", (8, 8), 40 * step + number) for step in range(6)]
        for count in (2, 6):
            name = tmp_path / f"data/{count}-{number}.gif"
            name.parent.mkdir(exist_ok=True)
            frames[0].save(name, save_all=True, append_images=frames[1:count], duration=100)
        frames[0].save(tmp_path / f"data/{number}.png")
    buckets = BucketsConfig(frames=(1, 2, 4), aspect=1, multiple=4)
    data = FilesConfig(path=str(tmp_path / "data"), size=(8, 8), channels=1, frames=4, buckets=buckets, caption=None)
    changes = ("training.global_batch_size=4", "training.steps=6", "network.patch_size=2")
    run = build_run(recipe(*changes, data=data))
    assert run.loader.buckets is not None
    assert [size[0] for size in run.loader.buckets.sizes] == [1, 2, 4]
    shapes = {tuple(run.loader.load_batch(4 * number).pixels.shape[2:]) for number in range(6)}
    assert shapes == {(1, 8, 8), (2, 8, 8), (4, 8, 8)}
    run_dir = loop.train(recipe(*changes, data=data))
    assert not (run_dir / "skipped_samples.txt").exists()


@pytest.mark.run
def test_a_dry_run_estimates_a_run_of_clips(recipe):
    assert "per forward pass" in str(dry_run.dry_run(recipe()))


def test_codecs_and_controls_are_trained_on_images(recipe, tiny, tmp_path):
    settings = {"run_dir": "run", "data": {"path": "x", "size": 32, "frames": 4}}
    with pytest.raises(TesseraError, match="leave out data.frames"):
        codec.train_codec(validate(codec.CodecRecipe, settings, "the recipe"))
    with pytest.raises(TesseraError, match="a control image is made of an image, and the data are clips"):
        tiny("run", data=settings["data"], training={"init_from": "m"}, adapter={"kind": "control", "image": "edges"})
