"""Training an adapter, resuming it, sampling with it, merging it: whole commands."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import tessera as library
from tessera import adapter_files, adapters, bundle
from tessera.checkpoint_files import read_header
from tessera.errors import TesseraError
from tessera.interop.adapters import find_file

pytestmark = pytest.mark.run
pytest.importorskip("sklearn")

ADAPTER = ("adapter.kind=lora", "adapter.rank=2", "data.split=judge", "training.checkpoint_every=2")


@pytest.fixture
def base(tessera, recipe, tmp_path):
    assert tessera("train", recipe).code == 0
    return tmp_path / "run"


@pytest.fixture
def adapt(tessera, recipe, base, tmp_path):
    """Train an adapter on the base into a folder of tmp_path."""

    def run(name: str, *words: str):
        done = tessera("train", recipe, f"run_dir={tmp_path / name}", f"training.init_from={base}", *ADAPTER, *words)
        assert done.code == 0, done.err
        return tmp_path / name

    return run


def images(folder) -> dict[str, bytes]:
    import numpy as np
    from PIL import Image

    return {path.name: np.asarray(Image.open(path)).tobytes() for path in sorted(folder.glob("*.png"))}


def test_only_the_adapter_is_trained_and_stored(adapt, base):
    folder = bundle.checkpoints(adapt("lora"))[0]
    assert not (folder / bundle.WEIGHTS).exists()
    before, model = library.load(base, "cpu"), library.load(folder, "cpu")
    state = adapters.base_state(model.network)
    assert all(torch.equal(tensor, state[name]) for name, tensor in before.network.state_dict().items())
    layers = [layer for _, _, _, layer in adapters.adapter_layers(model.network, bundle.TRAINED)]
    assert layers
    assert all(layer.up.any() for layer in layers)
    saved = load_file(next((folder / "state").glob("*.safetensors")))
    assert all(".adapters.adapter.lora." in name for name in saved)
    sizes = {path: path.stat().st_size for path in folder.rglob("*.safetensors")}
    trained = sum(parameter.numel() for layer in layers for parameter in layer.parameters())
    overhead = 200 * len(saved)  # of names in the headers
    assert sum(sizes.values()) <= 4 * trained * (1 + 3) + 2 * overhead  # the average; weights and two moments
    info = adapter_files.read_info(folder / "adapters/adapter")
    assert info.base == bundle.weights_hash(before.network)
    assert (info.summary, info.provenance.steps) == ("LoRA of rank 2", 4)


@pytest.mark.parametrize(
    "kind",
    [
        ("adapter.dora=true",),
        ("adapter={kind: difffit}",),
        ("training.ema.extra_decays=0.5",),
        ("adapter.base_weights=nf4", "training.activation_checkpointing=blocks"),
    ],
)
def test_a_resumed_adapter_equals_an_uninterrupted_one_bit_for_bit(adapt, whole_state, kind):
    whole = adapt("whole", *kind)
    adapt("parts", *kind, "training.steps=2")
    parts = adapt("parts", *kind)
    assert whole_state(parts) == whole_state(whole)
    names = [path.relative_to(whole) for path in whole.glob("checkpoints/step-000000004/**/*.safetensors")]
    assert len(names) >= 2
    for name in names:
        one, other = load_file(whole / name), load_file(parts / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_an_adapter_trained_on_a_quantized_base_fits_the_whole_one(tessera, adapt, base, tmp_path):
    """Its fingerprint is that of the float32 base, whose copy is in the run, and into which it is merged."""
    run = adapt("nf4", "adapter.base_weights=nf4")
    assert torch.equal(
        load_file(run / "base" / bundle.WEIGHTS)["blocks.0.attn.qkv.weight"],
        library.load(base, "cpu").network.state_dict()["blocks.0.attn.qkv.weight"],
    )
    attached = library.load(base, "cpu", adapters=[str(run)])
    assert {tensor.dtype for tensor in attached.network.state_dict().values()} == {torch.float32}
    other = adapt("float32")
    state, whole = (
        adapters.adapter_state(library.load(folder, "cpu").network, bundle.TRAINED) for folder in (run, other)
    )
    assert any(not torch.equal(state[name], whole[name]) for name in state)  # it was trained on other weights
    assert tessera("convert", base, tmp_path / "merged", "--to", "bundle", "--adapter", run).code == 0
    merged = library.load(tmp_path / "merged", "cpu")
    adapters.merge(attached.network)
    for name, tensor in attached.network.state_dict().items():
        torch.testing.assert_close(merged.network.state_dict()[name], tensor, rtol=0, atol=1e-6)


def test_a_dry_run_and_a_plan_describe_an_adapter(tessera, recipe, base):
    words = (f"training.init_from={base}", *ADAPTER, "adapter.base_weights=int8")
    done = tessera("train", recipe, "--dry-run", "run_dir=other", *words)
    assert done.code == 0, done.err
    planned = tessera("plan", recipe, "--hardware", "h100", *words)
    trained = 2 * (16 + 48) + 2 * (16 + 16) + 2 * 2 * (16 + 64)  # qkv, proj, fc1 and fc2 of rank 2
    assert f"{trained} parameters are trained" in done.out
    assert f"LoRA of rank 2: {trained} parameters" in planned.out
    assert "the base in int8" in planned.out
    assert "for the base" in done.out


def test_the_run_and_the_base_with_the_adapter_generate_the_same_images(tessera, adapt, base, tmp_path):
    run = adapt("lora")
    words = ("--classes", "3,5", "--seeds", "0-1", "--device", "cpu")
    assert tessera("sample", run, *words, "--out", tmp_path / "a").code == 0
    assert tessera("sample", base, "--adapter", run, *words, "--out", tmp_path / "b").code == 0
    assert tessera("sample", base, "--adapter", f"x={run}:0", *words, "--out", tmp_path / "c").code == 0
    assert tessera("sample", base, *words, "--out", tmp_path / "d").code == 0
    a, b, c, d = (images(tmp_path / name) for name in "abcd")
    assert a == b
    assert c == d
    command = tessera("info", tmp_path / "c" / "class-3-seed-0.png").out
    assert f"--adapter x={run}:0" in command


def test_merging_gives_the_same_function(tessera, adapt, base, tmp_path):
    run = adapt("lora", "training.optimizer.learning_rate=0.1")
    done = tessera("convert", base, tmp_path / "merged", "--to", "bundle", "--adapter", f"{run}:0.5")
    assert done.code == 0
    assert "adapters are merged into its weights: run (0.5)" in done.out.replace("lora (0.5)", "run (0.5)")
    merged = library.load(tmp_path / "merged", "cpu")
    attached = library.load(base, "cpu", adapters=[f"{run}:0.5"])
    assert adapters.attached(attached.network) == {"lora": 0.5}
    assert not adapters.attached(merged.network)
    before = library.load(base, "cpu").network.state_dict()
    adapters.merge(attached.network)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in merged.network.state_dict().items())
    assert bundle.weights_hash(merged.network) == bundle.weights_hash(attached.network)


def test_an_adapter_is_one_file_that_can_be_moved(tessera, adapt, base, tmp_path):
    run, style = adapt("lora"), tmp_path / "my:0.5" / "style.safetensors"
    assert tessera("convert", run, style, "--to", "adapter").code == 0
    assert "LoRA of rank 2" in tessera("info", style).out
    attached = library.load(base, "cpu", adapters=[str(style)])
    moved, trained = adapters.adapter_state(attached.network, "style"), adapter_files.read(find_file(run))[1]
    assert moved.keys() == trained.keys()
    assert all(torch.equal(tensor, moved[name]) for name, tensor in trained.items())
    assert tessera("convert", run, style, "--to", "adapter").err.startswith(f"error: {style} exists already")
    folder = tessera("convert", run, tmp_path / "peft.safetensors", "--to", "peft").err
    assert "an adapter for peft is a folder" in folder
    unknown = tessera("convert", run, tmp_path / "x", "--to", "koya").err
    assert "kohya" in unknown


def test_an_adapter_of_a_grey_model_takes_size_and_channels_from_its_base(adapt, base, tmp_path):
    from PIL import Image

    (tmp_path / "images").mkdir()
    for number in range(12):
        Image.new("RGB", (20, 16), (number, 90, 200)).save(tmp_path / "images" / f"{number}.png")
    run = adapt("lora", "data={kind: folder, path: " + str(tmp_path / "images") + "}", "data.split=null")
    config = bundle.load_config(bundle.checkpoints(run)[0])
    assert config.network == library.load(base, "cpu").config.network


def test_scores_with_and_without_an_adapter_have_their_own_folders(tessera, adapt, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = adapt("lora")
    words = ("num_steps=1", "--reference", "digits", "--num-samples", "20", "--metrics", "fd", "--device", "cpu")
    assert tessera("evaluate", "score", base, *words).code == 0
    assert tessera("evaluate", "score", base, *words, "--adapter", f"{run}:0.5").code == 0
    assert {path.name for path in (tmp_path / "evaluation").iterdir()} == {"run", "run+lora-0.5"}
    refused = tessera("tune", base, "--adapter", run)
    assert "give --save-to FOLDER" in refused.err


def test_a_saved_model_keeps_its_adapters(adapt, base, tmp_path):
    model = library.load(base, "cpu", adapters={str(adapt("lora")): 0.25})
    library.save(model, tmp_path / "saved")
    again = library.load(tmp_path / "saved", "cpu")
    assert adapters.attached(again.network) == {"lora": 0.25}
    assert bundle.weights_hash(again.network) == bundle.weights_hash(model.network)
    assert again.adapters["lora"].summary == "LoRA of rank 2"


def test_a_second_adapter_trains_on_top_of_a_merged_first(adapt, tessera, recipe, tmp_path):
    first = adapt("first", "training.optimizer.learning_rate=0.1")
    second = adapt("second", f"training.init_from={first}")
    model = library.load(first, "cpu")
    adapters.merge(model.network)
    info = adapter_files.read_info(bundle.checkpoints(second)[0] / "adapters/adapter")
    assert info.base == bundle.weights_hash(model.network)
    refused = tessera("sample", first / "base", "--adapter", second, "--classes", "1", "--device", "cpu")
    assert f"use it with that model, {second / 'base'}" in refused.err


def test_data_keep_the_classes_of_the_base(adapt, base, tmp_path):
    """Images of some of its classes are matched by name; of others they are refused; without classes they have none."""
    from PIL import Image

    for name in ("7", "3"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(20):
            Image.new("L", (8, 8), number).save(tmp_path / "images" / name / f"{number}.png")
    data = ("data={kind: folder, size: 8, channels: 1, path: " + str(tmp_path / "images") + "}",)
    adapted = library.load(adapt("lora", *data), "cpu")
    assert adapted.config.class_names == tuple("0123456789")
    (tmp_path / "one").mkdir()
    (tmp_path / "images/3").rename(tmp_path / "one/3")
    one = ("data={kind: folder, size: 8, channels: 1, path: " + str(tmp_path / "one") + "}",)
    assert library.load(adapt("one-class", *one), "cpu").config.class_names == tuple("0123456789")
    (tmp_path / "one/3").rename(tmp_path / "images/3")
    flat = ("data={kind: folder, size: 8, channels: 1, path: " + str(tmp_path / "images/3") + "}",)
    assert library.load(adapt("flat", *flat), "cpu").config.class_names == tuple("0123456789")
    (tmp_path / "images/7").rename(tmp_path / "images/cat")
    with pytest.raises(AssertionError, match="the data have 1 others, such as cat"):
        adapt("other", *data)


def test_bad_adapters_are_refused_and_the_base_stays(adapt, base, tessera, recipe, tmp_path):
    run = adapt("lora")
    assert tessera("train", recipe, f"run_dir={tmp_path / 'other'}", "training.seed=1").code == 0
    file, source = tmp_path / "bad.safetensors", bundle.checkpoints(run)[0] / "adapters/adapter/adapter.safetensors"
    renamed = {name.replace("qkv", "kqv"): tensor for name, tensor in load_file(source).items()}
    save_file(renamed, file, read_header(source))
    for spec, model, message in (
        (f"{run}", tmp_path / "other", "was trained on other weights"),
        (f"{file}", base, "unexpected blocks.0.attn.kqv.lora.down"),
        (f"{tmp_path / 'nothing'}", base, "there is nothing at"),
        (f"{base}", base, "is not an adapter that Tessera can read"),
        (f"{run}:strong", base, "there is nothing at"),
    ):
        done = tessera(
            "sample", model, "--adapter", spec, "--classes", "1", "--device", "cpu", "--out", tmp_path / "out"
        )
        assert done.code != 0
        assert message in done.err
    twice = tessera("sample", base, "--adapter", run, "--adapter", run, "--classes", "1", "--device", "cpu")
    assert "two adapters with the name 'lora'" in twice.err
    any_base = ("--any-base", "--classes", "1", "--device", "cpu", "--out", tmp_path / "any")
    assert tessera("sample", tmp_path / "other", "--adapter", run, *any_base).code == 0
    (run / "base" / bundle.WEIGHTS).unlink()
    with pytest.raises(TesseraError, match="its base is missing"):
        library.load(run, "cpu")


def test_an_adapter_needs_a_model_and_resuming_needs_the_same_adapter(tessera, recipe, adapt, tmp_path):
    done = tessera("train", recipe, "adapter=lora")
    assert "set training.init_from=MODEL" in done.err
    adapt("lora")
    words = (f"run_dir={tmp_path / 'lora'}", f"training.init_from={tmp_path / 'run'}", *ADAPTER, "training.steps=6")
    done = tessera("train", recipe, *words, "adapter.rank=3")
    assert "cannot resume" in done.err
    assert "adapter" in done.err


def test_info_tells_of_adapters(tessera, adapt):
    facts = tessera("info", adapt("lora")).out
    assert "adapter (LoRA of rank 2, " in facts
    assert "strength 1)" in facts


def test_muon_needs_a_matrix_to_train(tessera, recipe, base, tmp_path):
    words = (f"run_dir={tmp_path / 'lora'}", f"training.init_from={base}", *ADAPTER, "training.optimizer.kind=muon")
    assert "set training.optimizer.kind=adamw" in tessera("train", recipe, *words).err
