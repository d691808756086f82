"""The Inception network of FID: features of torch-fidelity, the resize, and the file of its weights."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch

from tessera.errors import TesseraError
from tessera.evaluation import inception
from tessera.evaluation.inception import Inception, load, resize_like_tensorflow

# Of torch-fidelity 0.4.0 (FeatureExtractorInceptionV3) with the weights and images below: every 32nd of "2048", every
# 32nd of the first seven maps of Mixed_6d.branch1x1 in the order H, W, C, every 16th of "logits_unbiased".
PEER = np.load(Path(__file__).parents[1] / "reference" / "inception.npz")
STEP = {"pool": 32, "spatial": 32, "logits": 16}
SIZES = [(32, 32), (64, 48), (299, 299), (400, 310)]


def _normal(name: str, shape: tuple[int, ...]) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(key=zlib.crc32(name.encode())))
    return generator.standard_normal(shape, dtype=np.float32)


def _weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Weights by formula; activations stay in a normal range."""
    noise = _normal(name, shape)
    if name.endswith("running_var"):
        value = np.exp(0.2 * noise)
    elif name.endswith("bn.weight"):
        value = 1 + 0.1 * noise
    elif noise.ndim == 1:
        value = 0.1 * noise
    else:
        value = noise * ((1 if name.startswith("fc") else 2) / np.prod(shape[1:])) ** 0.5
    return torch.from_numpy(value.astype(np.float32))


def _images(height: int, width: int) -> torch.Tensor:
    generator = np.random.Generator(np.random.Philox(key=zlib.crc32(f"{height}x{width}".encode())))
    return torch.from_numpy(generator.integers(0, 256, (2, 3, height, width), dtype=np.uint8))


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in Inception().state_dict().items()}
    return {name: _weight(name, shape) for name, shape in shapes.items() if shape}  # the counters have none


@pytest.fixture(scope="module")
def file(weights, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(weights, path)
    return path


@pytest.fixture(scope="module")
def network(file) -> Inception:
    return load(file, sha256="")


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_features_are_those_of_torch_fidelity(network, size):
    features = network(_images(*size))
    for kind, width in network.widths.items():
        assert features[kind].shape == (2, width)
        assert features[kind].dtype == torch.float32
        peer = PEER[f"{kind}-{size[0]}x{size[1]}"]
        ours = features[kind][:, :: STEP[kind]].numpy()
        assert np.linalg.norm(ours - peer) < 1e-5 * np.linalg.norm(peer)


def test_fusing_changes_only_rounding(network, weights):
    plain = Inception()
    plain.load_state_dict(weights, strict=False)
    images = _images(32, 32)
    expected, actual = plain(images), network(images)
    for kind in network.widths:
        assert (actual[kind] - expected[kind]).norm() < 1e-5 * expected[kind].norm()
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())


def test_gray_images_are_expanded_to_three_channels(network):
    gray = _images(32, 32)[:, :1]
    assert torch.equal(network(gray)["pool"], network(gray.repeat(1, 3, 1, 1))["pool"])


@pytest.fixture
def low_precision() -> Iterator[list]:
    """The backends of convolutions, set to less than float32."""
    backends = [torch.backends.cudnn.conv, torch.backends.mkldnn.conv]
    before = [backend.fp32_precision for backend in backends]
    for backend, precision in zip(backends, ["tf32", "bf16"]):
        backend.fp32_precision = precision
    yield backends
    for backend, precision in zip(backends, before):
        backend.fp32_precision = precision


def test_precision_settings_are_overridden_and_restored(network, low_precision):
    precisions = []
    hook = network.Mixed_6a.register_forward_hook(
        lambda *_: precisions.extend(backend.fp32_precision for backend in low_precision)
    )
    images = _images(32, 32)
    expected = network(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = network(images)
    hook.remove()
    assert precisions == ["ieee"] * 4
    assert [backend.fp32_precision for backend in low_precision] == ["tf32", "bf16"]
    assert torch.equal(actual["logits"], expected["logits"])


@pytest.mark.parametrize(
    "images",
    [torch.zeros(1, 3, 8, 8), torch.zeros(1, 8, 8, 3, dtype=torch.uint8), torch.zeros(3, 8, 8, dtype=torch.uint8)],
    ids=["float", "channels last", "no batch"],
)
def test_images_of_another_type_or_shape_are_an_error(network, images):
    with pytest.raises(TesseraError, match=r"expected torch.uint8 \[B, C, H, W\]"):
        network(images)


def _by_hand(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """TensorFlow 1's formula, pixel by pixel in single precision: image float32 [H, W] -> [height, width]."""

    def neighbors(i: int, old: int, new: int) -> tuple[int, int, np.float32]:
        position = np.float32(i) * (np.float32(old) / np.float32(new))
        low = int(np.floor(position))
        return low, min(low + 1, old - 1), position - np.float32(low)

    out = np.empty((height, width), np.float32)
    for i in range(height):
        top, bottom, down = neighbors(i, image.shape[0], height)
        for j in range(width):
            left, right, across = neighbors(j, image.shape[1], width)
            above = image[top, left] + (image[top, right] - image[top, left]) * across
            below = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * across
            out[i, j] = above + (below - above) * down
    return out


@pytest.mark.parametrize(
    ("old", "new"),
    [((5, 7), (13, 11)), ((16, 9), (5, 4)), ((3, 20), (17, 6)), ((1, 1), (4, 3)), ((6, 6), (6, 6))],
    ids=["larger", "smaller", "one of each", "one pixel", "the same"],
)
def test_the_resize_is_that_of_tensorflow_to_the_bit(old, new):
    x = torch.from_numpy(_normal("resize", (2, 2, *old))) * 100
    expected = np.stack([[_by_hand(channel, *new) for channel in image] for image in x.numpy()])
    np.testing.assert_array_equal(resize_like_tensorflow(x, new).numpy(), expected)


def test_the_weights_are_read_from_the_cache_of_torch_hub(file, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / inception.FILE).symlink_to(file)
    digest = load(file, sha256="").weights
    assert load(sha256=digest).weights == digest


def test_without_internet_the_error_has_url_and_path(tmp_path, monkeypatch):
    def offline(*_):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(TesseraError, match=f"no route to host(?s:.*)copy https(?s:.*){tmp_path}"):
        load()


def test_another_file_is_an_error(file):
    with pytest.raises(TesseraError, match="has the sha256 .*, expected 6726825d"):
        load(file)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(TesseraError, match=r"cannot read .*nowhere\.pth"):
        load(tmp_path / "nowhere.pth")


def test_tensors_that_do_not_fit_are_listed(weights, tmp_path):
    wrong = dict(weights)
    del wrong["Mixed_5b.branch1x1.conv.weight"]
    wrong |= {"AuxLogits.fc.weight": torch.zeros(2), "fc.bias": torch.zeros(1000)}
    torch.save(wrong, tmp_path / "wrong.pth")
    with pytest.raises(TesseraError) as error:
        load(tmp_path / "wrong.pth", sha256="")
    assert "missing Mixed_5b.branch1x1.conv.weight (64, 192, 1, 1)" in str(error.value)
    assert "unexpected AuxLogits.fc.weight (2,)" in str(error.value)
    assert "fc.bias is (1000,), expected (1008,)" in str(error.value)


def test_a_file_without_a_state_dict_is_an_error(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(TesseraError, match="does not hold a state dict"):
        load(tmp_path / "list.pth", sha256="")
