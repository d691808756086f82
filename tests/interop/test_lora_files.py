"""Adapter files of other programs: there and back, against PEFT, diffusers and the formulas of LyCORIS."""

import json
import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from tessera import adapter_files, adapters, bundle
from tessera.cli import app
from tessera.conditioning import Condition
from tessera.errors import TesseraError
from tessera.interop import adapter_conversion, load, lora_files
from tessera.interop.lora_names import diffusers_names
from tessera.model import AdapterInfo
from tessera.models import DiTConfig, PixArtConfig
from tessera.models.diffusers_network import DiffusersConfig

SIZES = {"input_size": (8, 8), "in_channels": 2, "out_channels": 4, "hidden_size": 32, "num_heads": 2, "patch_size": 2}
NETWORKS = {
    "pixart": PixArtConfig(depth=2, text_channels=16, text_tokens=4, position_base=4, position_scale=1, **SIZES),
    "dit": DiTConfig(depth=2, num_classes=3, **SIZES),
    "rope-swiglu": DiTConfig(depth=2, num_classes=3, block={"kind": "rope-swiglu"}, **SIZES),
}
SMALL_DIT = {**SIZES, "depth": 2, "num_classes": 3, "in_channels": 1, "out_channels": 2}
FORMATS = {"peft": "peft", "diffusers": "lora.safetensors", "kohya": "kohya.safetensors"}
LORAS = {
    "lora": adapters.LoRAConfig(rank=4, alpha=8),
    "dora": adapters.LoRAConfig(rank=4, alpha=2, dora=True),
    "q, v": adapters.LoRAConfig(rank=4, alpha=1, projections=("q", "v")),
    "q, v dora": adapters.LoRAConfig(rank=4, alpha=4, projections=("q", "v"), dora=True),
    "modulation": adapters.LoRAConfig(rank=2, where="adaLN_modulation|qkv|t_embedder"),
}
ATTENTION = ("attn1.to_q", "attn1.to_k", "attn1.to_v")


@pytest.fixture
def network(randomise):
    """A tiny PixArt."""
    return randomise(NETWORKS["pixart"].build())


@pytest.fixture
def dit(randomise):
    return randomise(NETWORKS["dit"].build())


def filled(network, config) -> dict[str, torch.Tensor]:
    """The state dict of an adapter with random values."""
    layers = config.layers(network, ("a", "b", "c"))
    generator = torch.Generator().manual_seed(2)
    state = {}
    for module, by_kind in layers.items():
        for kind, layer in by_kind.items():
            for key, tensor in layer.state_dict().items():
                noise = torch.randn(tensor.shape, generator=generator)
                changed = {"scale": tensor, "numbers": tensor, "magnitude": tensor + noise.abs() / 4}.get(
                    key, noise / 4
                )
                state[f"{module}.{kind}.{key}".removeprefix(".")] = changed
    return state


@torch.no_grad()
def output(network, state=None):
    """The output of a network with an adapter."""
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(3, network.config.in_channels, 8, 8, generator=generator), torch.tensor([10.0, 500.0, 900.0])
    if network.config.uses_text:
        condition = Condition(text=torch.randn(3, 4, 16, generator=generator))
    else:
        condition = Condition(label=torch.tensor([0, 1, -1]))
    if state is None:
        return network(x, t, condition)
    adapters.attach(network, "style", adapters.layers_from_state(network, state, "test"))
    try:
        return network(x, t, condition)
    finally:
        adapters.detach(network)


def effect(network, state) -> torch.Tensor:
    change = output(network, state) - output(network)
    assert change.norm() > 0.01 * output(network).norm()
    return change


def random(*shape, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 2


def pair(name, rank, size, width, seed=3, form=("lora_A.weight", "lora_B.weight")):
    return {f"{name}.{form[0]}": random(rank, width, seed=seed), f"{name}.{form[1]}": random(size, rank, seed=seed + 1)}


def stored(tmp_path, tensors, name="x.safetensors", **header):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata=header or None)
    return path


# There and back


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("config", LORAS.values(), ids=LORAS)
@pytest.mark.parametrize("kind", NETWORKS)
def test_there_and_back(kind, config, to, tmp_path, randomise):
    if kind == "rope-swiglu" and config.projections == () and config.where is not None:
        config = adapters.LoRAConfig(rank=2, where="qkv|fc1")
    network = randomise(NETWORKS[kind].build())
    state = filled(network, config)
    path = tmp_path / FORMATS[to]
    if to == "diffusers" and kind == "rope-swiglu":
        with pytest.raises(TesseraError, match="has no name for this layer"):
            lora_files.write(path, state, network, to)
        assert not path.exists()
        return
    lora_files.write(path, state, network, to)
    read = lora_files.read(path, network)
    if config.dora:  # lengths that had no place are computed, and layers may be joined
        torch.testing.assert_close(effect(network, read), effect(network, state), rtol=1e-4, atol=1e-5)
    else:
        assert read.keys() == state.keys()
        assert torch.equal(output(network, read), output(network, state))
    effect(network, state)
    with pytest.raises(TesseraError, match="exists already"):
        lora_files.write(path, state, network, to)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ranks=st.lists(st.integers(1, 6), min_size=3, max_size=3),
    scales=st.lists(st.floats(0.01, 8), min_size=3, max_size=3),
    to=st.sampled_from(sorted(FORMATS)),
    projections=st.lists(st.sampled_from([None, 0, 1, 2]), min_size=1, max_size=3, unique=True),
)
def test_any_ranks_and_scales(ranks, scales, to, projections, network, tmp_path_factory):
    state = {}
    for rank, scale, projection in zip(ranks, scales, projections):
        name = f"blocks.0.attn.qkv.lora{'' if projection is None else f'_{projection}'}"
        size = 96 if projection is None else 32
        state |= {f"{name}.down": random(rank, 32, seed=rank), f"{name}.up": random(size, rank, seed=rank + 9)}
        state[f"{name}.scale"] = torch.tensor(scale)
    state |= {"blocks.1.mlp.fc2.lora.down": random(2, 128), "blocks.1.mlp.fc2.lora.up": random(32, 2)}
    state["blocks.1.mlp.fc2.lora.scale"] = torch.tensor(scales[0])
    path = tmp_path_factory.mktemp("any") / FORMATS[to]
    lora_files.write(path, state, network, to)
    read = lora_files.read(path, network)
    # Of the whole: with large ranks and scales, single elements differ by the rounding of much larger sums.
    expected = output(network, state)
    assert torch.linalg.vector_norm(output(network, read) - expected) < 1e-4 * torch.linalg.vector_norm(expected)
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    tensors = load_file(file)
    stored_ranks = {
        len(tensor) for key, tensor in tensors.items() if key.endswith(("lora_A.weight", "lora_down.weight"))
    }
    assert len(stored_ranks) == 1
    alphas = {float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha")}
    assert alphas == (stored_ranks if to == "kohya" else set())


def test_a_fused_layer_is_split_by_copies_of_down_and_parts_of_up(network, tmp_path):
    state = filled(network, LORAS["lora"])
    lora_files.write(tmp_path / "x.safetensors", state, network, "diffusers")
    tensors = load_file(tmp_path / "x.safetensors")
    up = state["blocks.0.attn.qkv.lora.up"] * 2
    for number, name in enumerate(ATTENTION):
        prefix = f"transformer.transformer_blocks.0.{name}"
        assert torch.equal(tensors[f"{prefix}.lora_A.weight"], state["blocks.0.attn.qkv.lora.down"])
        assert torch.equal(tensors[f"{prefix}.lora_B.weight"], up[32 * number : 32 * number + 32])


def test_split_layers_are_fused_block_by_block(network, tmp_path):
    state = filled(network, LORAS["q, v"])
    lora_files.write(tmp_path / "x.safetensors", state, network, "kohya")
    tensors = load_file(tmp_path / "x.safetensors")
    name = "lora_unet_blocks_0_attn_qkv"
    change = tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]
    expected = torch.zeros(96, 32)
    for number in (0, 2):
        part = f"blocks.0.attn.qkv.lora_{number}"
        expected[32 * number : 32 * number + 32] = state[f"{part}.up"] @ state[f"{part}.down"] / 4
    torch.testing.assert_close(change, expected)
    assert tensors[f"{name}.lora_down.weight"].shape == (8, 32)


# Other programs read what is written


@pytest.mark.parametrize("name", ["lora", "dora", "q, v dora"])
def test_peft_on_our_network_computes_the_same(name, tmp_path, randomise):
    peft = pytest.importorskip("peft")
    network = randomise(NETWORKS["rope-swiglu"].build())
    state = filled(network, LORAS[name])
    lora_files.write(tmp_path / "peft", state, network, "peft")
    expected = output(network, state)
    wrapped = peft.PeftModel.from_pretrained(network, tmp_path / "peft")
    torch.testing.assert_close(output(wrapped.get_base_model()), expected, rtol=1e-4, atol=1e-5)
    assert (expected - output(randomise(NETWORKS["rope-swiglu"].build()))).norm() > 0.1


@pytest.mark.parametrize("config", [LORAS["lora"], LORAS["q, v"], LORAS["dora"]], ids=["lora", "q, v", "dora"])
def test_peft_on_the_transformer_of_diffusers_computes_the_same(config, tmp_path):
    peft, diffusers = pytest.importorskip("peft"), pytest.importorskip("diffusers")
    torch.manual_seed(0)
    settings = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8}
    theirs = diffusers.PixArtTransformer2DModel(**settings, cross_attention_dim=32, caption_channels=16).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.15)
    theirs.save_pretrained(tmp_path / "transformer")
    model = load.load(tmp_path / "transformer", "cpu")
    state = filled(model.network, config)
    lora_files.write(tmp_path / "peft", state, model.network, "peft")
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path / "peft")
    x, t, text = random(2, 4, 8, 8), torch.tensor([10.0, 700.0]), random(2, 3, 16, seed=5)
    adapters.attach(model.network, "style", adapters.layers_from_state(model.network, state, "test"))
    sizes = {"resolution": None, "aspect_ratio": None}
    with torch.no_grad():
        result = wrapped(x, encoder_hidden_states=text, timestep=t, added_cond_kwargs=sizes).sample
        expected = model.network(x, t, Condition(text=text))
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4)


def test_what_peft_itself_saves_is_read(network, tmp_path, randomise):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["attn.qkv", "mlp.fc1"], rank_pattern={"mlp.fc1": 2},
        alpha_pattern={"^blocks.1.mlp.fc1": 3}, use_rslora=True, init_lora_weights=False, use_dora=True,
    )  # fmt: skip
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(randomise(NETWORKS["pixart"].build()), config).eval()
    wrapped.save_pretrained(tmp_path / "peft")
    read = lora_files.read(tmp_path / "peft", network)
    assert float(read["blocks.1.mlp.fc1.lora.scale"]) == pytest.approx(3 / math.sqrt(2))
    assert float(read["blocks.0.mlp.fc1.lora.scale"]) == pytest.approx(6 / math.sqrt(2))
    torch.testing.assert_close(output(network, read), output(wrapped.get_base_model()), rtol=1e-4, atol=1e-5)
    effect(network, read)


# The layouts of each program


def layouts():
    """(tensors, header, alpha, scale) of one change of q and v of block 0, as each program writes it."""
    forms = {"peft": ("lora_A.weight", "lora_B.weight"), "kohya": ("lora_down.weight", "lora_up.weight")}
    old, bare = ("lora.down.weight", "lora.up.weight"), ("lora_A", "lora_B")

    def both(names, form):
        return {k: v for n, name in enumerate(names) for k, v in pair(name, 4, 32, 32, 10 * n, form).items()}

    q_and_v = [f"transformer_blocks.0.attn1.{name}" for name in ("to_q", "to_v")]
    flat = [name.replace(".", "_") for name in q_and_v]
    header = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 2})}
    kohya = both([f"lora_unet_{name}" for name in flat], forms["kohya"])
    alphas = {f"lora_unet_{name}.alpha": torch.tensor(2.0) for name in flat}
    official = both([f"unet.base_model.model.{name}" for name in q_and_v], forms["peft"])
    diffusers = both([f"transformer.{name}" for name in q_and_v], forms["peft"])
    processors = [f"transformer.transformer_blocks.0.attn1.processor.{name}_lora" for name in ("to_q", "to_v")]
    return {
        "diffusers": (diffusers, {}, None, 1),
        "diffusers with a header": (diffusers, header, None, 0.5),
        "diffusers and alpha of the user": (diffusers, {}, 8, 2),
        "old diffusers": (both([f"unet.{name}" for name in q_and_v], old), {}, None, 1),
        "processors": (both(processors, ("down.weight", "up.weight")), {}, None, 1),
        "ai-toolkit": (both([f"transformer.{name}" for name in q_and_v], bare), {"software": "ai-toolkit"}, None, 1),
        "kohya": (kohya | alphas, {"ss_network_alpha": "Dynamic"}, None, 0.5),
        "kohya with a header": (kohya, {"ss_network_alpha": "2.0"}, None, 0.5),
        "kohya without alpha": (kohya, {}, None, 1),
        "official PixArt script": (official, {}, 8, 2),
        "compiled": ({key.replace("blocks.", "blocks._orig_mod."): v for key, v in diffusers.items()}, {}, None, 1),
        "compiled kohya": ({key.replace("blocks_", "blocks__orig_mod_"): v for key, v in kohya.items()}, {}, None, 1),
        "lycoris": (both([f"lycoris_{name}" for name in flat], forms["kohya"]), {}, None, 1),
        "no prefix": (both(q_and_v, forms["peft"]), {}, None, 1),
        "adapter name": ({key.replace(".weight", ".default.weight"): v for key, v in official.items()}, {}, 4, 1),
    }


@pytest.mark.parametrize("layout", layouts())
def test_layouts(layout, network, tmp_path):
    tensors, header, alpha, scale = layouts()[layout]
    read = lora_files.read(stored(tmp_path, tensors, **header), network, alpha)
    expected = {}
    for n, number in enumerate((0, 2)):
        name = f"blocks.0.attn.qkv.lora_{number}"
        down, up = pair("x", 4, 32, 32, 10 * n).values()
        expected |= {f"{name}.down": down, f"{name}.up": up, f"{name}.scale": torch.tensor(float(scale))}
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[key], expected[key]) for key in expected)


@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model.", "base_model.model.", ""])
def test_official_names(prefix, network, tmp_path):
    for name, ours in (("t_block.1", "shared.adaLN_modulation.1"), ("blocks.1.cross_attn.kv_linear", None)):
        size = network.get_submodule(ours or name).out_features
        stored_name = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
        read = lora_files.read(stored(tmp_path, pair(stored_name, 4, size, 32)), network, 4)
        assert set(read) == {f"{ours or name}.lora.{key}" for key in ("down", "up", "scale")}


def test_one_embedder_here_is_one_in_each_block_of_diffusers(dit, tmp_path):
    state = filled(dit, LORAS["modulation"])
    lora_files.write(tmp_path / "x.safetensors", state, dit, "diffusers")
    tensors = load_file(tmp_path / "x.safetensors")
    name = "transformer.transformer_blocks.{}.norm1.emb.timestep_embedder.linear_1.lora_B.weight"
    assert torch.equal(tensors[name.format(0)], tensors[name.format(1)])
    tensors[name.format(1)] = tensors[name.format(1)] + 1
    with pytest.raises(TesseraError, match="the base has one layer for both"):
        lora_files.read(stored(tmp_path, tensors, "y.safetensors"), dit)
    tensors = {key: tensor for key, tensor in tensors.items() if "blocks.1.norm1.emb" not in key}
    with pytest.raises(TesseraError, match=r"1 layers for t_embedder\.mlp\.0 of the base, expected 2"):
        lora_files.read(stored(tmp_path, tensors, "z.safetensors"), dit)


# LyCORIS, by its formulas


def lycoris_layers():
    """(tensors, change of the weight) of a map of 32 x 32."""
    a, b, c, d = random(32, 4, seed=1), random(4, 32, seed=2), random(32, 4, seed=3), random(4, 32, seed=4)
    w1, w2, w2_a, w2_b = random(4, 8, seed=5), random(8, 4, seed=6), random(8, 2, seed=7), random(2, 4, seed=8)
    w1_a, w1_b = random(4, 2, seed=9), random(2, 8, seed=10)
    alpha = {"alpha": torch.tensor(1.0)}

    def kron(x, y):
        return (x[:, None, :, None] * y[None, :, None, :]).reshape(32, 32)

    return {
        "loha": ({"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, **alpha}, (a @ b) * (c @ d) / 4),
        "lokr whole": ({"lokr_w1": w1, "lokr_w2": w2, **alpha}, kron(w1, w2)),
        "lokr w2": ({"lokr_w1": w1, "lokr_w2_a": w2_a, "lokr_w2_b": w2_b, **alpha}, kron(w1, w2_a @ w2_b) / 2),
        "lokr w1": ({"lokr_w1_a": w1_a, "lokr_w1_b": w1_b, "lokr_w2": w2, **alpha}, kron(w1_a @ w1_b, w2) / 2),
        "lokr both": (
            {"lokr_w1_a": w1_a, "lokr_w1_b": w1_b, "lokr_w2_a": w2_a, "lokr_w2_b": w2_b},
            kron(w1_a @ w1_b, w2_a @ w2_b),
        ),
        "full": ({"diff": a @ b}, a @ b),
        "lora": ({"lora_up.weight": a, "lora_down.weight": b, **alpha}, a @ b / 4),
    }


@torch.no_grad()
@pytest.mark.parametrize("lengths", [None, "rows", "columns"])
@pytest.mark.parametrize("kind", lycoris_layers())
def test_lycoris(kind, lengths, network, tmp_path):
    tensors, change = lycoris_layers()[kind]
    module = network.blocks[0].attn.proj
    weight = module.weight + change
    if lengths is not None and kind != "full":
        axis = 1 if lengths == "rows" else 0
        scale = module.weight.norm(dim=axis, keepdim=True)
        scale = scale + random(32).abs().view_as(scale)
        tensors = tensors | {"dora_scale": scale}
        weight = weight * (scale / weight.norm(dim=axis, keepdim=True))
    tensors = {f"lycoris_blocks_0_attn_proj.{key}": tensor for key, tensor in tensors.items()}
    tensors["lycoris_blocks_0_attn_proj.diff_b"] = random(32, seed=20)
    path = stored(tmp_path, tensors)
    read = lora_files.read(path, network)
    layers = adapters.layers_from_state(network, read, "test")
    adapters.attach(network, "style", layers)
    x = random(5, 32, seed=30)
    result = module(x)
    originals = adapters.merge(network)
    merged = module(x)
    adapters.unmerge(network, originals)
    expected = x @ weight.T + module.bias + random(32, seed=20)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)
    # There and back in the form of kohya; the others have no such layers.
    lora_files.write(tmp_path / "back.safetensors", read, network, "kohya")
    back = lora_files.read(tmp_path / "back.safetensors", network)
    torch.testing.assert_close(output(network, back), output(network, read), rtol=1e-5, atol=1e-6)
    for to in ("peft", "diffusers"):
        with pytest.raises(TesseraError, match="has no such change"):
            lora_files.write(tmp_path / FORMATS[to], read, network, to)


def test_a_bias_of_peft_and_of_parts_of_a_map(network, tmp_path):
    name = "transformer.transformer_blocks.0.attn1.to_v"
    tensors = {**pair(name, 4, 32, 32), f"{name}.lora_B.bias": random(32, seed=8)}
    header = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 2})}
    read = lora_files.read(stored(tmp_path, tensors, **header), network)
    bias = read["blocks.0.attn.qkv.bias.values"]
    assert torch.equal(bias, torch.cat([torch.zeros(64), random(32, seed=8) / 2]))


# What is refused


def refused(tensors, match, network, tmp_path, alpha=None, **header):
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    with pytest.raises(TesseraError, match=match) as error:
        lora_files.read(stored(tmp_path, tensors, **header), network, alpha)
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    return str(error.value)


PROJ = "transformer.transformer_blocks.0.attn1.to_out.0"
GOOD = pair(PROJ, 4, 32, 32)
HEADER = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 2})}
BAD = {
    "no layer": ({**GOOD, **pair("transformer.blocks.9.x", 4, 32, 32)}, r"unexpected transformer\.blocks\.9\.x"),
    "text encoder": ({**GOOD, **pair("lora_te1_x", 4, 32, 32)}, "the base has no such layer"),
    "norm": ({**GOOD, f"{PROJ}.w_norm": random(32)}, "w_norm: Tessera reads no such tensor"),
    "no adapter": ({"blocks.0.attn.qkv.weight": random(96, 32)}, "is not an adapter: it has no tensor of LoRA"),
    "a without b": ({f"{PROJ}.lora_A.weight": random(4, 32)}, "it has no up"),
    "b without a": ({f"{PROJ}.lora_B.weight": random(32, 4)}, "it has no down"),
    "alpha alone": ({**GOOD, f"{PROJ}.diff_b": random(32), "transformer.transformer_blocks.1.attn1.to_out.0.alpha":
                     torch.tensor(1.0)}, "alpha is there without"),
    "ranks": ({**GOOD, f"{PROJ}.lora_A.weight": random(3, 32)}, r"\(3, 32\) and \(32, 4\) do not have one rank"),
    "size": (pair(PROJ, 4, 48, 32), "changes a map of 48 x 32, and the base has 32 x 32"),
    "rank too large": (pair(PROJ, 40, 32, 32), "rank 40 is larger than the map itself"),
    "nan": ({**GOOD, f"{PROJ}.lora_A.weight": torch.full((4, 32), torch.nan)}, "numbers that are not finite"),
    "whole numbers": ({**GOOD, f"{PROJ}.lora_A.weight": torch.ones(4, 32, dtype=torch.int8)}, "is torch.int8"),
    "convolution": ({**GOOD, f"{PROJ}.lora_A.weight": random(4, 32, 3, 3)}, "do not have one rank"),
    "alpha of two numbers": ({**GOOD, f"{PROJ}.alpha": random(2)}, r"its alpha is \(2,\)"),
    "alpha of zero": ({**GOOD, f"{PROJ}.alpha": torch.tensor(0.0)}, "its alpha is 0, expected a positive number"),
    "magnitude": ({**GOOD, f"{PROJ}.dora_scale": random(5, 1)}, r"dora_scale is \(5, 1\), expected lengths of rows"),
    "two kinds": ({**GOOD, f"{PROJ}.lokr_w1": random(4, 8), f"{PROJ}.lokr_w2": random(8, 4)}, "of lokr and lora"),
    "lokr": ({f"{PROJ}.lokr_w1": random(4, 8), f"{PROJ}.lokr_w2": random(8, 8)}, "its product is 32 x 64"),
    "lokr without w2": ({f"{PROJ}.lokr_w1": random(4, 8)}, "needs other tensors"),
    "loha": ({f"{PROJ}.hada_w1_a": random(32, 4), f"{PROJ}.hada_w1_b": random(4, 32)}, r"it has no loha\.w2_a"),
    "diff": ({f"{PROJ}.diff": random(32, 3)}, r"diff is \(32, 3\), expected \(32, 32\)"),
    "twice": ({**GOOD, **pair(f"unet.{PROJ[12:]}", 4, 32, 32)}, "2 layers for blocks.0.attn.proj"),
    "twice by wrappers": ({**GOOD, f"_orig_mod.{PROJ}.lora_A.weight": random(4, 32, seed=9)}, "two tensors named"),
    "twice in one layer": ({**GOOD, f"{PROJ}.lora_down.weight": random(4, 32, seed=9)}, "two tensors for one place"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_files(case, network, tmp_path):
    refused(*BAD[case], network, tmp_path)


def test_all_faults_are_counted(network, tmp_path):
    tensors = {**GOOD}
    for number in range(12):
        tensors |= pair(f"transformer.extra.{number}", 4, 32, 32)
    assert "and 4 more" in refused(tensors, "does not fit this model", network, tmp_path)


def test_alphas(network, tmp_path):
    alpha = {f"{PROJ}.alpha": torch.tensor(4.0)}
    message = refused({**GOOD, **alpha}, "its alpha is 4 as a tensor", network, tmp_path, **HEADER)
    assert "2 in the header" in message
    refused(GOOD, "alpha is 0; expected a positive number", network, tmp_path, alpha=0)
    refused(GOOD, "the file states alpha 2, not 8", network, tmp_path, alpha=8, **HEADER)
    assert float(lora_files.read(stored(tmp_path, GOOD, **HEADER), network, 2)[f"{OURS}.scale"]) == 0.5
    bad = {"lora_adapter_metadata": json.dumps({"transformer.r": 8, "transformer.lora_alpha": 2})}
    refused(GOOD, "its rank is 4, and the configuration of the file states 8", network, tmp_path, **bad)
    refused(GOOD, "is damaged", network, tmp_path, lora_adapter_metadata="{")
    official = {key.replace("transformer.", "unet.base_model.model.", 1): tensor for key, tensor in GOOD.items()}
    message = refused(official, "alpha stands nowhere", network, tmp_path)
    assert "--alpha 8" in message
    assert "--alpha 4" in message


OURS = "blocks.0.attn.proj.lora"


def test_configurations_of_peft(network, tmp_path):
    folder = tmp_path / "peft"
    tensors = {key.replace("transformer.", "base_model.model.", 1): tensor for key, tensor in GOOD.items()}
    stored(tmp_path, tensors, "peft/adapter_model.safetensors")
    with pytest.raises(TesseraError, match=r"has no adapter_config\.json"):
        lora_files.read(folder, network)
    for change, match in (
        ({"peft_type": "LOKR"}, "peft_type to LOKR"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out to True"),
        ({"bias": "all"}, "bias to all"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights to pissa"),
        ({"something_new": 3}, "something_new to 3"),
        ({"use_dora": True}, "states DoRA, and it has no magnitude"),
        ({"alpha_pattern": {"(": 3}}, "which is no regular expression"),
        ({"lora_alpha": -1}, "lora_alpha"),
        ({"rank_pattern": {"to_out.0": 3}}, "states 3"),
    ):
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, **change}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(TesseraError, match=match):
            lora_files.read(folder, network)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "lora_dropout": 0.1, "target_modules": ["to_out.0"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    for path in (folder, folder / "adapter_model.safetensors"):
        assert float(lora_files.read(path, network)[f"{OURS}.scale"]) == 0.5


def test_paths(network, tmp_path):
    with pytest.raises(TesseraError, match="there is nothing at"):
        lora_files.read(tmp_path / "none", network)
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(TesseraError, match="is not an adapter: expected a file"):
        lora_files.read(tmp_path / "x.txt", network)
    with pytest.raises(TesseraError, match="is not an adapter: expected a file"):
        lora_files.read(tmp_path, network)
    (tmp_path / "x.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(TesseraError, match="is damaged"):
        lora_files.read(tmp_path / "x.safetensors", network)
    torch.save(GOOD, tmp_path / "pytorch_lora_weights.bin")
    assert float(lora_files.read(tmp_path, network)[f"{OURS}.scale"]) == 1
    state = filled(network, LORAS["lora"])
    with pytest.raises(TesseraError, match="ends in .safetensors"):
        lora_files.write(tmp_path / "folder", state, network, "kohya")
    with pytest.raises(TesseraError, match="kohya"):
        lora_files.write(tmp_path / "folder", state, network, "koya")


def test_what_a_format_cannot_hold_is_named(dit, tmp_path):
    state = filled(dit, adapters.DiffFitConfig())
    for to in FORMATS:
        with pytest.raises(TesseraError, match="has no such change") as error:
            lora_files.write(tmp_path / FORMATS[to], state, dit, to)
        assert "mlp.fc2.scale" in str(error.value) or "and" in str(error.value)
        assert not (tmp_path / FORMATS[to]).exists()
    biases = {key: tensor for key, tensor in state.items() if ".bias." in key}
    lora_files.write(tmp_path / "x.safetensors", biases, dit, "kohya")
    assert torch.equal(output(dit, lora_files.read(tmp_path / "x.safetensors", dit)), output(dit, biases))


@pytest.mark.parametrize("how", ["channels", "copy", "tokens"])
def test_controls_are_no_lora(how, dit, tmp_path):
    state = filled(dit, adapters.ControlConfig(how=how, rank=None if how == "copy" else 2))
    for to in FORMATS:
        with pytest.raises(TesseraError, match=f"{to} has no such change"):
            lora_files.write(tmp_path / FORMATS[to], state, dit, to)


def test_lengths_of_columns_only_for_a_whole_map(network, tmp_path):
    name = "lora_unet_blocks_0_attn_qkv"
    tensors = {
        **pair(name, 4, 96, 32, form=("lora_down.weight", "lora_up.weight")),
        f"{name}.dora_scale": random(1, 32).abs(),
    }
    read = lora_files.read(stored(tmp_path, tensors), network)
    with pytest.raises(TesseraError, match="lengths of columns are only"):
        lora_files.write(tmp_path / "y.safetensors", read, network, "diffusers")
    lora_files.write(tmp_path / "y.safetensors", read, network, "kohya")
    assert torch.equal(output(network, lora_files.read(tmp_path / "y.safetensors", network)), output(network, read))


def test_names_of_diffusers_are_those_of_its_own_network(network):
    diffusers = pytest.importorskip("diffusers")
    settings = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8}
    with torch.device("meta"):
        theirs = diffusers.PixArtTransformer2DModel(**settings, cross_attention_dim=32, caption_channels=16)
    assert set(diffusers_names(network)) == {
        name for name, module in theirs.named_modules() if isinstance(module, nn.Linear)
    }


# Commands


@pytest.fixture
def files(make_model, tmp_path):
    """A bundle, and an adapter of it as a folder of Tessera."""
    model = make_model(SMALL_DIT)
    bundle.save(model, tmp_path / "base")
    state = filled(model.network, LORAS["lora"])
    info = AdapterInfo(summary="LoRA of rank 4", base=bundle.weights_hash(model.network))
    adapter_files.write(info, state, tmp_path / "style" / adapter_files.WEIGHTS)
    return tmp_path, model, state


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize("to", FORMATS)
def test_convert_and_info(to, files):
    folder, model, state = files
    result = run("convert", folder / "style", folder / FORMATS[to], "--to", to, "--base", folder / "base")
    assert result.exit_code == 0, result.output
    assert "rank and alpha 4" in result.output
    facts = run("info", folder / FORMATS[to]).output
    assert "rank " in facts
    names = {"peft": "of diffusers, such as base_model", "diffusers": "of diffusers, such as transformer."}
    assert names.get(to, "of an official network, such as lora_unet_blocks_0_attn_proj") in facts
    assert "LoRA (" in facts
    back = run("convert", folder / FORMATS[to], folder / "back", "--to", "adapter", "--base", folder / "base")
    assert back.exit_code == 0, back.output
    assert "LoRA of rank 4 (8 layers)" in run("info", folder / "back").output
    info, read = adapter_files.read(folder / "back")
    assert info.base is None
    assert torch.equal(output(model.network, read), output(model.network, state))
    loaded = load.load(folder / "base", "cpu", adapters=[f"{folder / FORMATS[to]}:1"])
    assert torch.equal(output(loaded.network), output(model.network, state))


@pytest.mark.parametrize("case", BAD)
def test_info_of_bad_files_is_facts_or_an_error(case, tmp_path):
    path = stored(tmp_path, BAD[case][0])
    result = run("info", path)
    assert result.exit_code == 0 or isinstance(result.exception, TesseraError), result.exception


def test_an_adapter_in_a_bundle_knows_its_base(files):
    folder, model, state = files
    loaded = load.load(folder / "base", "cpu", adapters=[str(folder / "style")])
    bundle.save(loaded, folder / "both")
    target = folder / "x.safetensors"
    adapter_conversion.convert(folder / "both" / "adapters" / "style", target, "kohya")
    read = lora_files.read(target, model.network)
    assert torch.equal(output(model.network, read), output(model.network, state))
    # A run, or its checkpoint, is a model, too: the target decides.
    (folder / "both" / "adapters" / "style").rename(folder / "both" / "adapters" / bundle.TRAINED)
    config = (folder / "both" / "config.json").read_text().replace('"style"', f'"{bundle.TRAINED}"')
    (folder / "both" / "config.json").write_text(config)
    result = run("convert", folder / "both", folder / "y.safetensors", "--to", "diffusers")
    assert result.exit_code == 0, result.exception
    read = lora_files.read(folder / "y.safetensors", model.network)
    assert torch.equal(output(model.network, read), output(model.network, state))


def test_what_convert_refuses(files, make_model):
    folder, _, _ = files
    bundle.save(make_model(SMALL_DIT, seed=1), folder / "other")
    style, base, target = folder / "style", ["--base", folder / "base"], folder / "x.safetensors"
    for words, match in (
        ((style, target, "--to", "kohya"), "pass base (--base MODEL)"),
        ((style, target, "--to", "kohya", "--base", folder / "other"), "was trained on other weights"),
        ((style, target, "--to", "kohya", "--alpha", "8", *base), "leave out alpha"),
        ((style, target, "--to", "official", *base), "unknown format of this adapter"),
        ((folder / "base", target, "--to", "kohya", *base), "is not an adapter that Tessera can read"),
        ((folder / "base", folder / "new", "--to", "bundle", *base), "--base and --alpha are for adapters"),
        ((folder / "none", target, "--to", "kohya", *base), "there is nothing at"),
    ):
        result = run("convert", *words)
        assert result.exit_code == 1, words
        assert match in str(result.exception)
        assert not target.exists()
    result = run("convert", style, target, "--to", "kohya", "--base", folder / "other", "--any-base")
    assert result.exit_code == 0, result.output


# The loaders of diffusers


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("SD3Transformer2DModel", "diffusers"),
        ("FluxTransformer2DModel", "diffusers"),
        ("FluxTransformer2DModel", "kohya"),
        ("SanaTransformer2DModel", "diffusers"),
        ("WanTransformer3DModel", "diffusers"),
    ],
)
def test_diffusers_itself_loads_what_is_written(name, to, tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("diffusers")
    pipelines = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("diffusers_pipelines.py"))))
    pipeline = pipelines.PIPELINES[name]()
    config = DiffusersConfig(class_name=name, settings=dict(pipeline.transformer.config))
    network = config.build().eval()
    network.transformer.load_state_dict(pipeline.transformer.state_dict())
    state = filled(network, adapters.LoRAConfig(rank=2, alpha=4))
    file = tmp_path / "pytorch_lora_weights.safetensors"
    lora_files.write(file, state, network, to)
    read = lora_files.read(file, network)
    assert read.keys() == state.keys()
    x = random(2, config.in_channels, *((1,) if len(config.input_size) == 3 else ()), 8, 8)
    tokens = sum(part.rows or 4 for part in config.text_parts)
    condition = Condition(text=random(2, tokens, config.text_channels, seed=7))

    def evaluate():
        with torch.no_grad():
            return network(x, torch.tensor([0.3, 0.9]) * 1000, condition)

    before = evaluate()
    adapters.attach(network, "style", adapters.layers_from_state(network, state, "test"))
    expected = evaluate()
    adapters.detach(network)
    adapters.attach(network, "style", adapters.layers_from_state(network, read, "test"))
    assert torch.equal(evaluate(), expected)
    adapters.detach(network)
    assert torch.equal(evaluate(), before)
    assert (expected - before).norm() > 0.01 * before.norm()
    if to == "kohya":
        return  # its names are those that other programs have for diffusers' layers
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    network.transformer = pipeline.transformer
    torch.testing.assert_close(evaluate(), expected, rtol=1e-4, atol=1e-4)
