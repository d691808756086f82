"""Official PixArt files: exact in both directions."""

import runpy
from pathlib import Path

import pytest
import torch

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


def refused(model, path) -> str:
    with pytest.raises(TesseraError) as caught:
        official.write(model, path)
    return str(caught.value)


def test_what_the_file_cannot_record_is_refused_or_reported(tmp_path):
    model = GOLDEN["small_model"]
    path = tmp_path / "x.pth"
    assert "no windows" in refused(model(block={"kind": "pixart", "window_layers": [1], "window_size": 2}), path)
    assert "this network embeds ids" in refused(model(vocabulary_size=300, text_channels=0), path)
    assert "this network has none" in refused(model(null_embedding=False), path)
    compressed = model(block={"kind": "pixart", "compression": "uniform", "compressed_layers": [1]})
    message = refused(compressed, path)
    assert "compression=uniform" in message
    assert "convert to a bundle, or pass approximate=True" in message
    assert not path.exists()
    assert "approximate: block is pixart compression=uniform" in official.write(compressed, path, approximate=True)
    assert "exists already" in refused(model(), path)
    assert "ends in .pt" in refused(model(), tmp_path / "x.npz")
    message = official.write(model(), tmp_path / "y.pth")
    assert message.endswith("state dict of 47 tensors\n4 heads: the file cannot record this number")


def test_the_published_encoder_rule_and_settings(tmp_path):
    """By the number of text tokens: alpha's prompts are in lower case, sigma's autoencoder is another one."""
    for tokens, variant in ((120, "alpha"), (300, "sigma")):
        golden = GOLDEN["Golden"]("alpha")
        state = official_state(golden)
        state["y_embedder.y_embedding"] = torch.zeros(tokens, 4096)
        state["y_embedder.y_proj.fc1.weight"] = torch.zeros(96, 4096)
        torch.save(state, tmp_path / f"{variant}.pth")
        config = load.load(tmp_path / f"{variant}.pth", "cpu", num_heads=4).config
        assert config.text.model_dump(exclude_defaults=True) == {
            "source": "hub:PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers",
            "max_tokens": tokens,
            **({"lower_case": True} if variant == "alpha" else {}),
        }
        assert (config.codec.source == "stabilityai/sd-vae-ft-ema") == (variant == "alpha")
        assert (config.sampling.sampler.kind, config.sampling.num_steps) == ("dpm++", 20)
        assert (config.sampling.guidance_scale, config.sampling.null_text) == (4.5, "embedding")
