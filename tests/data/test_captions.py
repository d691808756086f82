"""Captions as tokens: which caption of which sample, padding, null rows, and what is counted."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest
import torch

from tessera.data import Loader, ShapesConfig
from tessera.data.captions import Captions, TextSizes, encode_captions
from tessera.data.digits import DigitsConfig
from tessera.encoders.text import TextEncoder, WordsConfig
from tessera.errors import TesseraError

made = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("layout_files.py"))))

LINES = [
    ("0.png", "a red circle"),
    ("1.png", None),
    ("2.png", "a blue square above it"),
    ("3.png", "a red circle"),
    ("4.png", ""),
]


class Lengths(TextEncoder):
    """Embeddings of three channels: the number of the word in the caption, and the length of the word twice."""

    channels, vocabulary_size, max_tokens = 3, 0, 6

    def tokenize(self, captions, cut=False):
        tokens = [[len(word) for word in caption.split()] for caption in captions]
        return [[*(ids[: self.max_tokens - 1] if cut else ids), 0] for ids in tokens]

    def embed(self, ids, mask):
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        return torch.stack((positions, ids, ids), dim=-1).float()

    def fingerprint(self):
        return "lengths"


def folder(path, lines=LINES):
    for number, (name, _) in enumerate(lines):
        made.put(path / name, made.png(number))
    for name, caption in lines:
        if caption is not None:
            made.put((path / name).with_suffix(".txt"), caption)
    return made.config(path).open()


def test_captions_of_files(tmp_path):
    captions = Captions.of(folder(tmp_path))
    assert captions.counts.tolist() == [1, 0, 1, 1, 1]
    assert captions.texts.to_pylist() == ["a red circle", "a blue square above it", ""]
    assert captions.numbers.tolist() == [0, 1, 0, 2]
    assert list(captions.text_counts()) == [("a red circle", 2), ("a blue square above it", 1), ("", 1)]


def test_captions_of_shapes_and_none():
    dataset = ShapesConfig(count=40).open()
    captions = Captions.of(dataset)
    texts = captions.texts.to_pylist()
    assert [texts[number] for number in captions.numbers] == [dataset.caption(index) for index in range(40)]
    with pytest.raises(TesseraError, match="the digits has no captions: add them as a metadata.jsonl"):
        Captions.of(DigitsConfig().open(), "the digits")


def test_data_without_captions(tmp_path):
    made.put(tmp_path / "0.png", made.png())
    with pytest.raises(TesseraError, match="data.caption=COLUMN"):
        Captions.of(made.config(tmp_path).open())


def test_ids(tmp_path):
    dataset = folder(tmp_path)
    captions = Captions.of(dataset)
    encoder = WordsConfig().with_vocabulary(captions.text_counts()).build()
    text = encode_captions(dataset, captions, encoder, seed=0)
    samples, positions = [2, 1, 0, 4], torch.arange(4)
    ids, mask = text.tokens(samples, positions), text.mask(samples, positions)
    expected, expected_mask = encoder.encode([LINES[index][1] or "" for index in samples])
    expected[1] = -1
    assert torch.equal(ids, expected)
    assert torch.equal(mask, expected_mask)
    assert ids.dtype == torch.int64
    counts = len(captions), len(captions), sum(map(len, encoder.tokenize(captions.texts.to_pylist())))
    assert text.sizes == TextSizes(0, encoder.vocabulary_size, 128, 6, *counts) == TextSizes.measure(captions, encoder)


def test_embeddings_of_true_length(tmp_path):
    dataset = folder(tmp_path)
    captions = Captions.of(dataset)
    text = encode_captions(dataset, captions, Lengths(), seed=0)
    samples, positions = [1, 0, 2], torch.arange(3)
    tokens, mask = text.tokens(samples, positions), text.mask(samples, positions)
    expected, expected_mask = Lengths().encode(["", LINES[0][1], LINES[2][1]])
    expected[~expected_mask] = 0
    expected[0] = torch.nan
    torch.testing.assert_close(tokens, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(mask, expected_mask)
    assert tokens.dtype == torch.float32
    assert text.values.values.dtype == np.float16
    assert len(text.values.values) == sum(len(ids) for ids in Lengths().tokenize(captions.texts.to_pylist()))


def test_only_null_rows(tmp_path):
    dataset = folder(tmp_path)
    text = encode_captions(dataset, Captions.of(dataset), Lengths(), seed=0)
    assert text.tokens([1, 1], torch.arange(2)).isnan().all()
    assert text.mask([1, 1], torch.arange(2)).tolist() == [[True], [True]]
    assert text.tokens([4], torch.arange(1)).tolist() == [[[0, 0, 0]]]


def test_what_is_cut_or_missing_is_reported(tmp_path):
    lines = [("0.png", "one two three four five six seven"), ("1.png", None), ("2.png", "one")]
    lines += [("3.png", lines[0][1])]
    dataset = folder(tmp_path, lines)
    reports = []
    captions = Captions.of(dataset)
    text = encode_captions(dataset, captions, Lengths(), seed=0, report=reports.append)
    assert "2 captions have more than 6 tokens and are cut (text.max_tokens)" in reports
    assert "1 of 4 samples have no caption: they are trained unconditionally" in reports
    assert torch.equal(text.tokens([0], torch.zeros(1))[0], Lengths().encode([lines[0][1]], cut=True)[0][0])


def test_a_caption_does_not_depend_on_the_batch(tmp_path):
    """Frozen encoders are run on texts of about one length together; the order of the results is that of the texts."""
    lines = [(f"{number:02}.png", " ".join(["w"] * (number * 7 % 5 + 1))) for number in range(80)]
    dataset = folder(tmp_path, lines)
    text = encode_captions(dataset, Captions.of(dataset), Lengths(), seed=0)
    for sample in range(0, 80, 9):
        expected = Lengths().encode([lines[sample][1]])[0]
        assert torch.equal(text.tokens([sample], torch.zeros(1)), expected)


def test_the_loader_reads_them():
    dataset = ShapesConfig(count=64).open()
    captions = Captions.of(dataset)
    encoder = WordsConfig().with_vocabulary(captions.text_counts()).build()
    dataset.text = encode_captions(dataset, captions, encoder, seed=3)
    loader = Loader(dataset, 8, seed=3, condition_fields=("text", "text_mask"))
    for start in (0, 8, 64, 128):
        condition = loader.load_batch(start).condition
        names = [dataset.caption(int(sample)) for sample in loader.order.batch(start)]
        ids, mask = encoder.encode(names)
        assert torch.equal(condition.text, ids)
        assert torch.equal(condition.text_mask, mask)
        assert condition.label is None


@pytest.mark.parametrize("seed", [0, 1])
def test_one_of_several_captions_by_seed_and_position(seed, tmp_path):
    """Each is chosen about equally often, whatever the batch."""
    dataset = folder(tmp_path, [("0.png", "zero"), ("1.png", "one")])
    captions = Captions(np.array([3, 1]), np.arange(4), pyarrow.array(["a", "b c", "d e f", "g"]))
    text = encode_captions(dataset, captions, Lengths(), seed=seed)
    positions = torch.arange(3000)
    lengths = text.mask([0] * 3000, positions).sum(dim=1)
    counts = torch.bincount(lengths, minlength=5)[2:].tolist()
    assert all(abs(count - 1000) < 130 for count in counts)  # 5 standard deviations
    rows = [1500, 3, 2999]
    assert text.mask([0] * 3, positions[rows]).sum(dim=1).tolist() == lengths[rows].tolist()
    other = encode_captions(dataset, captions, Lengths(), seed=seed + 1).mask([0] * 3000, positions).sum(dim=1)
    assert (other != lengths).float().mean() > 0.5
    assert text.mask([1, 1], positions[:2]).sum(dim=1).tolist() == [2, 2]
