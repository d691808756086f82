"""Near pairs against all pairs; the hash against SciPy's cosine transform."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tessera.data.check import similarity
from tessera.data.check.scan import measure_sample
from tessera.data.images import ImagesConfig

CONFIG = ImagesConfig(size=(1, 1))


def flipped(hashes: np.ndarray, generator: np.random.Generator, bits: int) -> np.ndarray:
    """The hashes with so many different bits of each changed."""
    changed = hashes.copy()
    for row in range(len(changed)):
        for bit in generator.choice(64, bits, replace=False):
            changed[row] ^= np.uint64(1) << np.uint64(bit)
    return changed


def test_the_hash_is_that_of_scipys_cosine_transform():
    scipy_fft = pytest.importorskip("scipy.fft")
    for seed in range(20):
        grey = np.random.default_rng(seed).integers(0, 256, (similarity.SIDE, similarity.SIDE))
        low = scipy_fft.dctn(grey.astype(np.float64), type=2)[:8, :8].ravel()
        bits = low > np.median(low[1:])
        bits[0] = False
        assert similarity.perceptual_hash(grey) == int("".join("01"[bit] for bit in bits.astype(int)), 2)


@given(st.integers(0, 2**32 - 1))
def test_near_pairs_are_all_pairs_that_are_near(seed):
    generator = np.random.default_rng(seed)
    hashes = generator.integers(0, 2**64, 60, dtype=np.uint64)
    hashes = np.concatenate((hashes, *(flipped(hashes[:20], generator, bits) for bits in range(8))))
    apart = np.bitwise_count(hashes[:, None] ^ hashes)
    expected = {(i, j) for i, j in zip(*np.nonzero(apart <= similarity.BITS)) if i < j}
    result = [pair for chunk in similarity.near_pairs(hashes) for pair in zip(*chunk)]
    assert set(result) == expected


def test_leaders_have_no_leader_and_every_follower_looks_like_its_leader():
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 2**64, 300, dtype=np.uint64)
    colors = generator.integers(0, 256, (300, 192), dtype=np.uint8)
    hashes = np.concatenate((hashes, flipped(hashes, generator, 3), flipped(hashes, generator, 4), hashes))
    colors = np.concatenate((colors, colors, 255 - colors, colors))  # the third part is near by its hash alone
    leader = similarity.leaders(hashes, colors)
    assert (leader[leader] == leader).all()
    assert (leader <= np.arange(len(leader))).all()
    follows = np.flatnonzero(leader != np.arange(len(leader)))
    assert (np.bitwise_count(hashes[follows] ^ hashes[leader[follows]]) <= similarity.BITS).all()
    assert similarity.same_colors(colors, follows, leader[follows]).all()
    assert follows.tolist() == [*range(300, 600), *range(900, 1200)]
    assert (leader[follows] == follows % 300).all()


def test_a_chain_of_steps_does_not_join_its_ends():
    steps = np.array([0, 0b111, 0b111111, 0b111111111], np.uint64)  # 3 bits apart each, the ends 9
    colors = np.tile(np.arange(192, dtype=np.uint8), (4, 1))
    assert similarity.leaders(steps, colors).tolist() == [0, 0, 2, 2]


def test_followers_of_a_former_leader_are_compared_with_its_leader():
    """1 and 2 have the same hash. 1 looks like 0, so it is no longer a leader; 2 looks like 1, but not like 0."""
    ramp = np.arange(192.0)
    hashes = np.array([0, 1, 1], np.uint64)
    colors = np.stack((ramp, ramp + 24 * (ramp > 170), ramp + 24 * (ramp > 170) + 24 * (ramp < 20))).astype(np.uint8)
    assert similarity.same_colors(colors, np.array([0, 1]), np.array([1, 2])).all()
    assert not similarity.same_colors(colors, np.array([0]), np.array([2])).any()
    assert similarity.leaders(hashes, colors).tolist() == [0, 0, 2]


def test_thousands_of_one_hash_and_different_colors_end_soon():
    generator = np.random.default_rng(0)
    colors = generator.integers(0, 256, (5000, 192), dtype=np.uint8)
    colors[4000:] = colors[:1000]
    leader = similarity.leaders(np.zeros(5000, np.uint64), colors)
    assert leader[4000 : 4000 + similarity.LEADERS].tolist() == list(range(similarity.LEADERS))
    assert (leader[similarity.LEADERS : 4000] == np.arange(similarity.LEADERS, 4000)).all()


@pytest.mark.parametrize(
    "change",
    [
        lambda image: (image, "JPEG", {"quality": 70}),
        lambda image: (image, "BMP", {}),
        lambda image: (image.resize((384, 256), Image.Resampling.BICUBIC), "PNG", {}),
        lambda image: (image.resize((96, 64), Image.Resampling.LANCZOS), "WEBP", {"quality": 85}),
    ],
    ids=["jpeg", "bmp", "twice", "half, webp"],
)
def test_the_same_image_in_another_file_is_similar_and_others_are_not(change):
    """Images with the spectrum of photos: amplitudes fall as 1 / frequency."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(192), np.fft.fftfreq(128)))
    frequency[0, 0] = 1
    originals, changed = [], []
    for seed in range(20):
        noise = np.random.default_rng(seed).standard_normal((3, 128, 192))
        pixels = np.fft.ifft2(np.fft.fft2(noise) / frequency).real
        pixels = 128 + 45 * pixels / pixels.std()
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
        for results, (variant, kind, options) in ((originals, (image, "PNG", {})), (changed, change(image))):
            buffer = io.BytesIO()
            variant.save(buffer, kind, **options)
            results.append(measure_sample(buffer.getvalue(), "", CONFIG))
    both = originals + changed
    hashes = np.array([one.hash for one in both], np.uint64)
    colors = np.stack([np.frombuffer(one.color_grid, np.uint8) for one in both])
    assert {tuple(pair) for pair in similarity.pairs(hashes, colors).tolist()} == {(row, row + 20) for row in range(20)}


def test_appearances_are_equal_for_equal_images_only():
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 2**64, 100_000, dtype=np.uint64)
    colors = generator.integers(0, 256, (100_000, 192), dtype=np.uint8)
    hashes[50_000:] = hashes[:50_000]
    colors[50_000:] = colors[:50_000]
    changed = np.arange(75_000, 100_000)  # in one bit of one cell
    colors[changed, generator.integers(0, 192, 25_000)] ^= 1
    values = similarity.appearances(hashes, colors)
    equal = (values[:50_000] == values[50_000:]).all(axis=1)
    assert equal[:25_000].all()
    assert not equal[25_000:].any()
    assert len(np.unique(values, axis=0)) == 75_000
