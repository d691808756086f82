"""Fixtures for every test: small networks with random weights, and models that sample in milliseconds."""

import base64
import gc
import json
import os
import runpy
import signal
import warnings
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import settings as hypothesis_settings
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

from tessera import bundle, storage
from tessera.bundle import BundleConfig, Model

hypothesis_settings.register_profile("tessera", deadline=None)  # benchmarks/ measure speed, tests do not
hypothesis_settings.load_profile("tessera")
torch.set_num_threads(1)  # for tiny tensors, more threads are slower
if hasattr(os, "register_at_fork"):
    # torch drops its thread pool in a forked process and makes a new one at the first use. Two threads that do so at
    # the same time fail with "Invalid thread pool!"; here the process has only one thread.
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
# A shell that runs the tests in the background makes them and their child processes ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


SHAPES = {
    "dit": {"patch_size": 2, "depth": 2, "hidden_size": 32, "num_heads": 2},
    "unet": {"model_channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_levels": (2,)},
}


@torch.no_grad()
def _randomise(network: nn.Module, seed: int = 0) -> nn.Module:
    """Set every trained weight to a normal number, because the zeros of a new network would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.requires_grad:
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return network.eval()


@pytest.fixture
def randomise() -> Callable[..., nn.Module]:
    return _randomise


@pytest.fixture(scope="session")
def processes() -> SimpleNamespace:
    """The functions of `processes.py`: `together(2, function, ...)` and `start`."""
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork")
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("processes.py"))))


@pytest.fixture
def fresh_storage(tmp_path, monkeypatch) -> None:
    """Copies of remote files in a folder of the test, and nothing known of earlier ones."""
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "_known", {})
    monkeypatch.setattr(storage, "_stored", {})
    monkeypatch.setattr(storage, "_folders", set())


def _whole_state(run: Path) -> dict[str, bytes]:
    newest = bundle.checkpoints(run)[0]
    reader = HuggingFaceStorageReader(str(newest / "state"))
    tensors = {
        name: torch.empty(tuple(metadata.size), dtype=metadata.properties.dtype)
        for name, metadata in reader.read_metadata().state_dict_metadata.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning that there is only one process
        load(tensors, storage_reader=reader, no_dist=True)
    weights = bundle.trained_weights(newest, bundle.load_config(newest))
    for path in (weights, *newest.glob("ema/*.safetensors")):
        tensors |= {f"{path.relative_to(newest)}/{name}": tensor for name, tensor in load_file(path).items()}
    position = json.loads((newest / "training.json").read_text())
    values = {name: json.dumps(position[name]).encode() for name in ("step", "position", "spike_detector")}
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()} | values


@pytest.fixture
def whole_state() -> Callable[[Path], dict[str, bytes]]:
    """The bytes of everything in a run's newest checkpoint, independent of which rank wrote which part."""
    return _whole_state


@pytest.fixture
def make_model() -> Callable[..., Model]:
    """Make a model of 8 x 8 pixels with random weights. Sections of its configuration may be changed."""

    def make(network=None, diffusion=None, codec=None, seed: int = 0, **changes) -> Model:
        network = {
            "kind": "dit",
            "input_size": 8,
            "in_channels": 1,
            "out_channels": 2,
            "num_classes": 3,
            **(network or {}),
        }
        network = SHAPES["unet" if network["kind"] == "unet" else "dit"] | network
        # With x0 prediction, the images of an untrained network stay in the range of pixels.
        diffusion = {"prediction": "x0", **(diffusion or {})}
        config = BundleConfig.model_validate(
            {
                "network": network,
                "diffusion": diffusion,
                "codec": codec or {"kind": "pixels", "channels": network["in_channels"]},
                "sampling": {"num_steps": 6},
                "class_names": ("cat", "dog", "emu")[: network["num_classes"]],
                **changes,
            }
        )
        return Model(config, _randomise(config.network.build(), seed))

    return make


@pytest.fixture
def tiny_model(make_model) -> Model:
    """A gray-scale model of three classes (cat, dog, emu) with learned variance. It samples with DDIM in 6 steps."""
    return make_model()


@pytest.fixture(scope="session")
def autoencoder_folder(tmp_path_factory) -> Path:
    """A saved AutoencoderKL with 4 latent channels, a factor of 2 and tiles of 16 pixels. Do not write to it."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    autoencoder = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        scaling_factor=0.5,
    )
    folder = tmp_path_factory.mktemp("autoencoder")
    autoencoder.save_pretrained(folder)
    return folder


class Page(HTMLParser):
    """A parsed HTML page: tags, links, alt texts, text by section, text of code blocks."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.links, self.alts, self.codes = [], [], [], []
        self.text, self.sections, self._section, self._inside = "", {"": ""}, "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        self.alts += [value for name, value in attrs if name == "alt"]
        self.codes += [""] if tag == "code" else []
        self._inside = tag if tag in ("h2", "code", "style") else self._inside

    def handle_endtag(self, tag):
        self._inside = "" if tag == self._inside else self._inside

    def handle_data(self, data):
        if self._inside == "h2":
            self._section = data
        if self._inside == "code":
            self.codes[-1] += data
        if self._inside != "style":
            self.text += data
            self.sections[self._section] = self.sections.get(self._section, "") + data

    def images(self, start: str = "") -> list[bytes]:
        """The embedded images whose alt text begins with `start`."""
        pairs = zip(self.links, self.alts)
        return [base64.b64decode(link.partition(",")[2]) for link, alt in pairs if alt.startswith(start)]


@pytest.fixture
def read_page() -> type[Page]:
    return Page


@pytest.fixture
def svg_text() -> Callable[[bytes], list[str]]:
    """Read the texts of an SVG image, which must be valid XML."""

    def read(image: bytes) -> list[str]:
        return ["".join(node.itertext()) for node in ElementTree.fromstring(image).iter() if node.tag.endswith("}text")]

    return read


# Whole commands, trainings, processes, compilation and statistics: what `make test-fast` leaves out.
RUNS = {
    "runs", "data/test_cache.py", "data/test_check.py", "data/test_check_messy.py", "data/test_similarity.py",
    "evaluation/test_distances.py", "evaluation/test_features.py", "evaluation/test_shape_reader.py",
    "evaluation/test_suite.py", "models/test_later_blocks.py", "models/test_matching.py", "monitoring/test_report.py",
    "planning/test_plan.py", "sampling/test_orders.py", "serving/test_server.py",
    "studies/test_report.py", "studies/test_runner.py",
    "studies/test_tune.py", "training/test_buckets.py", "training/test_codec.py", "training/test_loop.py",
    "training/test_parallel.py", "training/test_recovery.py", "training/test_scores.py", "training/test_unet.py",
}  # fmt: skip


def pytest_collection_finish() -> None:
    gc.freeze()  # ten thousand tests and all their modules: otherwise every full collection visits them


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    for item in items:
        path = item.path.relative_to(tests)
        if path.parts[0] in RUNS or path.as_posix() in RUNS:
            item.add_marker("run")


@pytest.fixture
def text_encoder_folder(tmp_path) -> Path:
    """A random T5 of 16 channels with a tokenizer of whole words, in the layout of diffusers."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    folder = tmp_path / "text-encoder"
    words = ["<pad>", "</s>", "<unk>", "a", "small", "large", "red", "blue", "circle", "square", "left", "right", "of"]
    model = tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 40}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder / "tokenizer")
    config = transformers.T5Config(vocab_size=len(words), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    network = _randomise(transformers.T5EncoderModel(config))
    network.save_pretrained(folder / "text_encoder")
    return folder
