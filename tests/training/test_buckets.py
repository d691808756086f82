"""Training on images of many shapes: each batch has one size, on any number of ranks, and runs resume exactly."""

import numpy as np
import pytest
import torch
from PIL import Image

import tessera
from tessera import generation
from tessera.errors import TesseraError
from tessera.monitoring.logger import read_log
from tessera.training import loop
from tessera.training.recipe import Recipe
from tessera.training.run import build_run


def train(recipe: Recipe) -> None:
    loop.train(recipe)


@pytest.fixture
def images(tmp_path):
    """A folder of 2 x 30 images, tall, wide and square, all larger than 16 x 16."""
    random = np.random.default_rng(0)
    folder = tmp_path / "images"
    for label in ("a", "b"):
        (folder / label).mkdir(parents=True)
        for number in range(30):
            height, width = [(32, 16), (16, 32), (24, 24), (16, 20)][number % 4]
            pixels = random.integers(0, 256, (height, width, 3), np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{number}.png")
    return folder


@pytest.fixture
def data(images):
    return {
        "kind": "files", "path": str(images), "size": 16, "hflip": True,
        "buckets": {"multiple": 4, "aspect": 2.0},
    }  # fmt: skip


def test_each_batch_has_one_size_and_all_sizes_occur(tiny, data):
    run = build_run(tiny("run", "training.global_batch_size=8", data=data))
    assert run.loader.buckets is not None
    sizes = set()
    batches = run.loader.batches()
    for _ in range(12):
        batch = next(batches)
        assert batch.pixels.shape[0] == 8
        sizes.add(tuple(batch.pixels.shape[2:]))
    batches.close()
    assert sizes == set(run.loader.buckets.sizes)
    assert len(sizes) >= 3
    assert all(height != width for height, width in sizes - {(16, 16)})


def test_one_and_two_ranks_have_the_same_losses(tiny, data, processes, tmp_path):
    changes = (
        "training.global_batch_size=8",
        "training.steps=6",
        "training.log_every=1",
        "training.checkpoint_every=100",
    )
    processes.together(1, train, tiny("one", *changes, data=data))
    processes.together(2, train, tiny("two", *changes, data=data))
    one, two = (read_log(tmp_path / name) for name in ("one", "two"))
    assert [record["loss"] for record in one] == pytest.approx([record["loss"] for record in two], rel=1e-5)


def test_a_resumed_run_ends_bit_for_bit_the_same(tiny, data, weights, tmp_path):
    changes = ("training.global_batch_size=8", "training.checkpoint_every=3")
    train(tiny("whole", *changes, "training.steps=7", data=data))
    train(tiny("parts", *changes, "training.steps=3", data=data))
    train(tiny("parts", *changes, "training.steps=7", data=data))
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_the_model_samples_in_any_of_its_sizes(tiny, data, tmp_path):
    train(tiny("run", "training.global_batch_size=8", "training.steps=2", data=data))
    model = tessera.load(tmp_path / "run")
    samples = generation.generate(model, classes=[0], seeds=[0], num_steps=2, guidance_scale=1.0, size=(20, 12))
    assert samples.shape == (1, 20, 12, 3)


def test_buckets_that_the_patch_size_does_not_divide_are_an_error(tiny, data):
    data["buckets"]["multiple"] = 3
    with pytest.raises(TesseraError, match=r"data\.buckets\.multiple is 3, .* multiples of 4: set .*=4"):
        build_run(tiny("run", data=data))
