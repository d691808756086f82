"""Official PixArt files and diffusers' transformers: exact in both directions."""

import runpy
from pathlib import Path

import pytest
import torch

from tessera.conditioning import Condition
from tessera.errors import TesseraError
from tessera.interop import load, official, pixart

GOLDEN = runpy.run_path(str(Path(__file__).parents[1] / "reference/test_pixart.py"))
FILES = ["alpha", "alpha_ms", "sigma"]


def official_state(golden) -> dict[str, torch.Tensor]:
    """The official state dict of the reference numbers."""
    network = golden.network()
    state = {pixart.to_official(name): tensor for name, tensor in network.state_dict().items()}
    return {"pos_embed": golden["pos_embed"], **state}


@torch.no_grad()
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("wrapped", [False, True])
def test_an_official_file_is_loaded_exactly_and_written_byte_for_byte(name, wrapped, tmp_path):
    golden = GOLDEN["Golden"](name)
    state, path = official_state(golden), tmp_path / f"{name}.pth"
    torch.save({"state_dict": state, "epoch": 3} if wrapped else state, path)
    model = load.load(path, "cpu", num_heads=golden.config["num_heads"])
    got = model.network(golden["x"], golden["t"].float(), golden.condition(model.network))
    assert GOLDEN["error"](got, golden["forward"]) < 1e-5
    config = model.config.network
    assert (config.position_base, config.text_tokens) == (golden.config["input_size"] // 2, 6)
    assert config.position_scale == golden.config.get("lewei_scale", golden.config.get("pe_interpolation"))
    assert config.size_conditions == (name == "alpha_ms")
    assert config.block.compressed_layers == ((1,) if name == "sigma" else ())
    official.write(model, tmp_path / "again.pth")
    again = torch.load(tmp_path / "again.pth", weights_only=True)["state_dict"]
    assert set(again) == set(state)
    assert all(torch.equal(again[key], state[key]) for key in state)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("pos_embed"), "has no pos_embed, which determines the token grid"),
        (lambda state: state.update(pos_embed=state["pos_embed"] + 0.1), "is not a position table of PixArt"),
        (lambda state: state.pop("y_embedder.y_embedding"), "it has no y_embedder.y_embedding"),
    ],
)
def test_incomplete_files(change, words, tmp_path):
    state = official_state(GOLDEN["Golden"]("alpha"))
    change(state)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(TesseraError, match=words):
        load.load(tmp_path / "x.pth", "cpu", num_heads=4)


def test_the_heads_are_asked_for(tmp_path):
    torch.save(official_state(GOLDEN["Golden"]("alpha")), tmp_path / "x.pth")
    with pytest.raises(TesseraError, match="width 96, and weights do not determine the heads: pass num_heads"):
        load.load(tmp_path / "x.pth", "cpu")


@torch.no_grad()
@pytest.mark.parametrize(
    ("sample_size", "sizes", "scale"), [(8, False, None), (16, False, 2.0), (128, True, 0.5), (8, True, None)]
)
def test_a_transformer_of_diffusers_gives_the_same_output(sample_size, sizes, scale):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=24,
        num_layers=2,
        sample_size=sample_size,
        patch_size=8 if sample_size == 128 else 2,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=96,
        caption_channels=32,
        interpolation_scale=scale,
        use_additional_conditions=sizes,
    ).eval()
    for parameter in theirs.parameters():
        parameter.normal_(std=0.06)
    config, state = pixart.from_diffusers(dict(theirs.config), theirs.state_dict(), "a test")
    network = config.build().eval()
    network.load_state_dict(state)
    x, t = torch.randn(2, 4, sample_size, sample_size), torch.tensor([7.0, 900.0])
    text, mask = torch.randn(2, 6, 32), torch.arange(6) < torch.tensor([[6], [3]])
    size = torch.tensor([[512.0, 640.0, 0.8], [256.0, 256.0, 1.0]])
    conditions = (
        {"resolution": size[:, :2], "aspect_ratio": size[:, 2:]}
        if sizes
        else {"resolution": None, "aspect_ratio": None}
    )
    expected = theirs(
        x, encoder_hidden_states=text, encoder_attention_mask=mask, timestep=t, added_cond_kwargs=conditions
    ).sample  # fmt: skip
    got = network(x, t, Condition(text=text, text_mask=mask, size=size if sizes else None))
    assert float((got - expected).norm() / expected.norm()) < 1e-5
    assert config.null_fields == ()


def test_settings_of_diffusers_that_are_not_supported():
    config = {"norm_type": "ada_norm", "sample_size": 8, "patch_size": 2}
    with pytest.raises(TesseraError, match="ada_norm"):
        pixart.from_diffusers(config, {}, "a test")
