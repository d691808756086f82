"""data.weights=classes: every class equally often, whatever the number of its images; exact after a resumption."""

import numpy as np
import pytest
from PIL import Image

from tessera.data.files import FilesConfig
from tessera.errors import TesseraError
from tessera.training import loop
from tessera.training.recipe import infer_pixel_channels
from tessera.training.run import build_run, files_dataset

COUNTS = {"cat": 2, "dog": 9, "owl": 5}
BATCH = "training.global_batch_size=6"


@pytest.fixture
def images(tmp_path):
    for label, count in COUNTS.items():
        for number in range(count):
            path = tmp_path / "data" / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            shade = number * 10 + 80 * list(COUNTS).index(label)
            Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(path)
    return {"path": str(tmp_path / "data"), "size": 8, "weights": "classes"}


def test_every_batch_has_as_many_images_of_each_class_and_every_image_occurs(tiny, images):
    run = build_run(infer_pixel_channels(tiny("run", BATCH, data=images)))
    batches = [run.loader.order.batch(start) for start in range(0, 6 * 30, 6)]
    source = files_dataset(run.loader.dataset)
    assert source is not None
    labels = source.labels
    assert all(np.bincount(labels[batch]).tolist() == [2, 2, 2] for batch in batches)
    occurrences = np.bincount(np.concatenate(batches), minlength=16)
    for label, count in enumerate(COUNTS.values()):
        own = occurrences[labels == label]
        assert (own.sum(), own.max() - own.min() <= 1) == (60, True), count


def test_a_resumed_run_has_the_same_end(tiny, state, images):
    whole = loop.train(tiny("whole", BATCH, "training.steps=6", data=images))
    resumed = loop.train(tiny("resumed", BATCH, "training.steps=3", data=images))
    resumed = loop.train(tiny("resumed", BATCH, "training.steps=6", data=images))
    assert state(whole) == state(resumed)


def test_data_without_classes_are_refused(tiny, images):
    data = {**images, "classes": "none"}
    with pytest.raises(TesseraError, match="balances classes, and the data have no classes: leave it out"):
        build_run(infer_pixel_channels(tiny("run", BATCH, data=data)))


def test_classes_and_buckets_exclude_each_other(images):
    with pytest.raises(ValueError, match="weights and buckets exclude each other"):
        FilesConfig.model_validate({**images, "buckets": {}})
    with pytest.raises(ValueError, match="weights"):
        FilesConfig.model_validate({**images, "weights": "class"})
