"""LoRA trained on each transformer of diffusers, and loaded by diffusers' own loader."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from tessera import adapters, bundle, train
from tessera.cli import app
from tessera.conditioning import Condition
from tessera.interop import load
from tessera.models.diffusers_classes import CLASSES
from tessera.training import loop, plan_recipe
from tessera.training.recipe import read_recipe

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
diffusers.utils.logging.disable_progress_bar()
pytestmark = pytest.mark.run

FLUX, PIXART = "FluxTransformer2DModel", "PixArtTransformer2DModel"
# diffusers loads no LoRA into these
WITHOUT_LOADER = {"HunyuanDiT2DModel", "LatteTransformer3DModel", "PRXTransformer2DModel", PIXART}
IN_FAST_SUITE = {FLUX, "WanTransformer3DModel", "HunyuanDiT2DModel"}
NAMES = [
    pytest.param(name, marks=[] if name in IN_FAST_SUITE else pytest.mark.slow) for name in sorted((*CLASSES, PIXART))
]
# The layers of a last block whose output is not used.
UNUSED = {
    "SD3Transformer2DModel": r"transformer_blocks\.2\.attn\.add_q_proj",
    "QwenImageTransformer2DModel": r"transformer_blocks\.1\.(attn\.(add_q_proj|to_add_out)|txt_mlp\..*)",
}


def recipe(folder, run_dir, **training):
    """LoRA on images for five steps. The average of the weights is the weights themselves."""
    settings = {
        "init_from": str(folder), "steps": 5, "global_batch_size": 2, "condition_dropout": 0.25, "device": "cpu",
        "optimizer": {"learning_rate": 0.02}, "ema": {"decay": 0.0}, "sample_seeds": 1, "sample_every": 100,
        "sample_prompts": ["a dog"], "tensorboard": False,
    }  # fmt: skip
    return {
        "run_dir": str(run_dir),
        "data": {"kind": "shapes", "count": 8},
        "adapter": {"kind": "lora", "rank": 4, "alpha": 8},
        "sampling": {"num_steps": 1, "null_text": "empty", "guidance_scale": 2.0},
        "training": settings | training,
    }


def inputs(model):
    """Noise, a time and a prompt for the network of a model."""
    config = model.network.config
    size = (1, 8, 8) if config.is_temporal else (8, 8)
    x = torch.randn(1, config.in_channels, *size, generator=torch.Generator().manual_seed(1))
    text, mask = model.text_encoder.encode(["a red cat"])
    return x, model.diffusion.model_time(torch.tensor([0.5])), Condition(text=text, text_mask=mask)


def load_in_diffusers(folder, name, file):
    """The transformer of diffusers with a LoRA file: by the loader of its pipeline, or else by PEFT."""
    if name not in WITHOUT_LOADER:
        pipeline = getattr(diffusers, CLASSES[name].pipeline).from_pretrained(folder)
        pipeline.load_lora_weights(file.parent, weight_name=file.name)
        return pipeline.transformer
    transformer = getattr(diffusers, name).from_pretrained(folder, subfolder="transformer")
    with safe_open(file, "pt") as stored:
        header = json.loads(stored.metadata()["lora_adapter_metadata"])
    settings = {key.removeprefix("transformer."): value for key, value in header.items()}
    tensors = {key.removeprefix("transformer."): tensor for key, tensor in load_file(file).items()}
    peft.inject_adapter_in_model(peft.LoraConfig(**settings), transformer)
    assert not peft.set_peft_model_state_dict(transformer, tensors).unexpected_keys
    return transformer.eval()


def test_which_classes_have_a_loader():
    have = {name for name in (*CLASSES, PIXART) if hasattr(getattr(diffusers, name), "load_lora_adapter")}
    assert have == {*CLASSES, PIXART} - WITHOUT_LOADER
    assert all(hasattr(getattr(diffusers, CLASSES[name].pipeline), "load_lora_weights") for name in have)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_lora_of_five_steps_is_loaded_by_diffusers(folders, name, tmp_path, monkeypatch):
    folder, runs, build_run = folders(name), [], loop.build_run
    monkeypatch.setattr(loop, "build_run", lambda *args: runs.append(build_run(*args)) or runs[-1])
    with torch.enable_grad():
        run_dir = train(recipe(folder, tmp_path / "run"))
    base, trained = load.load(folder, "cpu"), load.load(run_dir, "cpu")
    # Only the adapter has changed: in the network that was trained, and in the one that is loaded from the run.
    before = base.network.state_dict()
    for network in (runs[0].network, trained.network):
        state = adapters.base_state(network)
        assert state.keys() == before.keys()
        assert all(torch.equal(tensor, before[key]) for key, tensor in state.items())
    layers = adapters.adapter_layers(trained.network, bundle.TRAINED)
    unchanged = [module.removeprefix("transformer.") for module, _, _, layer in layers if not layer.up.any()]
    assert all(re.fullmatch(UNUSED.get(name, ""), module) for module in unchanged)
    x, t, condition = inputs(trained)
    expected, without = trained.network(x, t, condition), base.network(x, t, condition)
    assert (expected - without).norm() > 0.1 * without.norm()
    file = tmp_path / "lora.safetensors"
    result = CliRunner().invoke(app, ["convert", str(run_dir), str(file), "--to", "diffusers"])
    assert result.exit_code == 0, result.exception
    theirs = load_in_diffusers(folder, name, file)
    if name == PIXART:  # a network of our own
        text = {"encoder_hidden_states": condition.text, "encoder_attention_mask": condition.text_mask}
        sizes = {"resolution": None, "aspect_ratio": None}
        got = theirs(x, timestep=t, added_cond_kwargs=sizes, **text).sample
    else:
        base.network.transformer = theirs
        got = base.network(x, t, condition)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted((*CLASSES, PIXART)))
def test_a_lora_is_trained_on_a_base_in_fewer_bits_and_planned(folders, name, tmp_path):
    settings = recipe(folders(name), tmp_path / "run", steps=2)
    settings["adapter"]["base_weights"] = "nf4"
    train(settings)
    model = bundle.load(bundle.checkpoints(tmp_path / "run")[0])
    state = adapters.adapter_state(model.network, bundle.TRAINED)
    assert any(tensor.any() for key, tensor in state.items() if key.endswith(".up"))
    cost = plan_recipe.plan_for_recipe(read_recipe(settings), "rtx4090")
    assert cost.trained_parameters == sum(tensor.numel() for tensor in state.values() if tensor.ndim)
    assert cost.memory.weights < 4 * cost.parameters


def test_a_resumed_lora_equals_an_uninterrupted_one_bit_for_bit(folders, tmp_path, whole_state, monkeypatch):
    whole = train(recipe(folders(FLUX), tmp_path / "whole", checkpoint_every=2))
    parts = recipe(folders(FLUX), tmp_path / "parts", checkpoint_every=2)
    train_step = loop.Trainer._train_step

    def stop_in_step_four(trainer, batch):
        if trainer.step == 3:
            raise RuntimeError("the machine stops")
        return train_step(trainer, batch)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_train_step", stop_in_step_four)
        with pytest.raises(RuntimeError, match="the machine stops"):
            train(parts)
    assert bundle.checkpoints(tmp_path / "parts")[0].name == "step-000000002"
    assert whole_state(train(parts)) == whole_state(whole)
