"""Options of the PixArt block that no published file has: windows, relative positions and stochastic depth."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tessera.codecs import PixelsConfig
from tessera.conditioning import Condition
from tessera.data import Batch
from tessera.diffusion import FlowMatchingConfig
from tessera.errors import TesseraError
from tessera.models.pixart import PixArt, PixArtAttention, PixArtConfig, from_windows, relative_positions, to_windows
from tessera.settings import validate
from tessera.training import parallel
from tessera.training.objective import TrainingObjective, prepare_batch, probe_inputs
from tessera.training.optimizers import AdamWConfig
from tessera.training.parallel import ParallelContext
from tessera.training.step import TrainState, train_step

WIDTH, HEADS = 24, 2
SMALL = {
    "kind": "pixart", "input_size": 8, "depth": 3, "hidden_size": 24, "num_heads": 2, "text_channels": 8,
    "text_tokens": 4, "position_base": 4,
}  # fmt: skip


def attention(window_size: int, position_grid: tuple[int, ...] = ()) -> PixArtAttention:
    torch.manual_seed(0)
    module = PixArtAttention(WIDTH, HEADS, False, None, window_size, position_grid).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def by_loops(module: PixArtAttention, x: np.ndarray, height: int, width: int, side: int) -> np.ndarray:
    """One image [h w, D] by the formulas, one query at a time. side: of the windows"""
    parameters = {name: value.detach().numpy() for name, value in module.named_parameters()}
    rows, columns = -(-height // side), -(-width // side)
    padded = np.zeros((rows * side, columns * side, WIDTH))
    padded[:height, :width] = x.reshape(height, width, WIDTH)
    qkv = (padded @ parameters["qkv.weight"].T + parameters["qkv.bias"]).reshape(*padded.shape[:2], 3, HEADS, -1)
    result = np.zeros_like(padded)
    for y in range(len(padded)):
        for z in range(padded.shape[1]):
            keys = [(y // side * side + i, z // side * side + j) for i in range(side) for j in range(side)]
            heads = []
            for head in range(HEADS):
                q = qkv[y, z, 0, head]
                logits = np.array([q @ qkv[i, j, 1, head] / math.sqrt(len(q)) for i, j in keys])
                if "rel_pos_h" in parameters:
                    tables = parameters["rel_pos_h"], parameters["rel_pos_w"]
                    logits += [q @ tables[0][y - i + side - 1] + q @ tables[1][z - j + side - 1] for i, j in keys]
                weights = np.exp(logits - logits.max())
                values = np.array([qkv[i, j, 2, head] for i, j in keys])
                heads.append(weights / weights.sum() @ values)
            result[y, z] = parameters["proj.weight"] @ np.concatenate(heads) + parameters["proj.bias"]
    return result[:height, :width].reshape(-1, WIDTH)


@torch.no_grad()
@pytest.mark.parametrize("grid", [(8, 8), (4, 8), (5, 7), (3, 2)])
@pytest.mark.parametrize("relative", [False, True])
def test_windows_and_relative_positions_are_those_of_the_formulas(grid, relative):
    module = attention(4, (4, 4) if relative else ())
    x = torch.randn(2, grid[0] * grid[1], WIDTH, dtype=torch.float64)
    expected = [by_loops(module, each.numpy(), *grid, side=4) for each in x]
    assert np.abs(module(x, grid).numpy() - np.stack(expected)).max() < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("grid", [(8, 8), (5, 7), (3, 2)])
@pytest.mark.parametrize("size", [0, 4])
@pytest.mark.parametrize("resized", [False, True])
def test_they_are_those_of_transformers_vitdet(grid, size, resized):
    vitdet = pytest.importorskip("transformers.models.vitdet.modeling_vitdet")
    config = vitdet.VitDetConfig(hidden_size=WIDTH, num_attention_heads=HEADS, use_relative_position_embeddings=True)
    side = (size, size) if size else grid
    tables = (6, 6) if resized else side
    module, theirs = attention(size, tables), vitdet.VitDetAttention(config, tables).double()
    theirs.load_state_dict(module.state_dict())
    x = torch.randn(2, grid[0] * grid[1], WIDTH, dtype=torch.float64)
    image = x.unflatten(1, grid)
    if size:
        windows, padded = vitdet.window_partition(image, size)
        expected = vitdet.window_unpartition(theirs(windows)[0], size, padded, grid)
    else:
        expected = theirs(image)[0]
    assert torch.allclose(module(x, grid), expected.flatten(1, 2), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("old", "new"), [(4, 7), (7, 4), (1, 3)])
def test_a_table_for_another_side_is_interpolated(old, new):
    table = torch.randn(2 * old - 1, 3, dtype=torch.float64)
    index = (np.arange(2 * new - 1) + 0.5) * (2 * old - 1) / (2 * new - 1) - 0.5
    expected = np.stack([np.interp(index, np.arange(2 * old - 1), column) for column in table.T.numpy()], axis=1)
    resized = relative_positions(table, new)
    for q in range(new):
        for k in range(new):
            assert np.allclose(resized[q, k], expected[q - k + new - 1], rtol=0, atol=1e-12)


def test_windows_are_joined_again():
    x = torch.randn(3, 35, 2)
    windows = to_windows(x, (5, 7), 4)
    assert windows.shape == (3 * 4, 16, 2)
    assert torch.equal(windows[0].unflatten(0, (4, 4)), x[0].unflatten(0, (5, 7))[:4, :4])
    assert (windows[3].unflatten(0, (4, 4))[1:] == 0).all()
    assert torch.equal(from_windows(windows, (5, 7), 4), x)


def network(**block) -> PixArt:
    torch.manual_seed(0)
    return validate(PixArtConfig, {**SMALL, "block": {"kind": "pixart", **block}}, "a test").build()


def inputs(rows: int = 2) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(rows, 4, 8, generator=generator)
    condition = Condition(text=text, text_mask=torch.ones(rows, 4, dtype=torch.bool))
    return torch.randn(rows, 4, 8, 8, generator=generator), torch.full((rows,), 300.0), condition


@torch.no_grad()
def test_fresh_relative_positions_and_a_window_of_the_whole_grid_have_no_effect():
    plain = network()
    plain.final_layer.linear.weight.normal_()

    def output(**block):
        built = network(**block)
        assert not built.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
        return built(*inputs())

    expected = plain(*inputs())
    assert torch.allclose(output(window_layers=(1,), relative_positions=True), expected, atol=1e-5)
    assert torch.allclose(output(window_layers=(0, 2), window_size=4), expected, atol=1e-5)
    assert not torch.allclose(output(window_layers=(1,), window_size=2), expected, atol=1e-3)


def test_relative_positions_get_gradients_in_their_blocks_alone():
    built = network(window_layers=(0, 2), window_size=2, relative_positions=True)
    names = [name for name, _ in built.named_parameters() if "rel_pos" in name]
    assert names == [f"blocks.{number}.attn.rel_pos_{axis}" for number in (0, 2) for axis in "hw"]
    built.final_layer.linear.weight.data.normal_()
    built(*inputs()).square().sum().backward()
    parameters = dict(built.named_parameters())
    assert all(parameters[name].shape == (3, 12) and parameters[name].grad.abs().sum() > 0 for name in names)


@pytest.mark.parametrize(
    "block",
    [
        {"window_layers": (1,), "window_size": 3},
        {"window_layers": (0, 2), "window_size": 2, "relative_positions": True},
        {"window_layers": (2,), "relative_positions": True, "compressed_layers": (1,)},
    ],
)
def test_macs_match_pytorchs_counter(block):
    with torch.device("meta"):
        built = network(**block)
        x, t, condition = torch.empty(1, 4, 8, 8), torch.empty(1), inputs(1)[2].to("meta")
    with FlopCounterMode(display=False) as counter:
        built(x, t, condition)
    assert built.macs() == counter.get_total_flops() // 2


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"window_size": 4}, r"these need window_layers; got window_layers \[\], window_size 4"),
        ({"window_layers": [1]}, "window_layers needs window_size, relative_positions or both"),
        ({"window_layers": [1], "window_size": 2, "compressed_layers": [0, 1]}, r"blocks \[1\] are in window_layers"),
        ({"window_layers": [3], "window_size": 2}, r"window_layers \[3\]: expected numbers from 0 to 2"),
        ({"compressed_layers": [-1]}, r"compressed_layers \[-1\]: expected numbers from 0 to 2"),
    ],
)
def test_wrong_settings(block, words):
    with pytest.raises(TesseraError, match=words):
        network(**block)


# Stochastic depth


def dropping(randomise, drop_path: float = 0.6, **changes) -> PixArt:
    config = validate(PixArtConfig, {**SMALL, "block": {"kind": "pixart", "drop_path": drop_path}, **changes}, "a test")
    return randomise(config.build())


@torch.no_grad()
def test_a_branch_is_left_out_or_scaled_row_by_row(randomise):
    built = dropping(randomise)
    x, t, condition = inputs(6)
    uniform = torch.rand(6, 6, generator=torch.Generator().manual_seed(3))
    got = built(x, t, replace(condition, uniform=uniform))
    left_out = 0
    for row in range(6):
        tokens, context = built.embed(x[row : row + 1], t[:1], condition[row : row + 1])
        for number, block in enumerate(built.blocks):
            kept = 1 - (0.0, 0.3, 0.6)[number]
            attention, mlp = (float(value < kept) / kept for value in uniform[row, 2 * number : 2 * number + 2])
            left_out += (attention == 0) + (mlp == 0)
            modulation = (context.shared_modulation + block.adaLN_modulation.table.flatten()).chunk(6, dim=-1)
            shift1, scale1, gate1, shift2, scale2, gate2 = modulation
            tokens = tokens + attention * gate1 * block.attn(block.norm1(tokens) * (1 + scale1) + shift1, (4, 4))
            tokens = tokens + block.cross_attn(tokens, context.text, context.text_mask)
            tokens = tokens + mlp * gate2 * block.mlp(block.norm2(tokens) * (1 + scale2) + shift2)
        assert torch.allclose(got[row], built.head(tokens, context)[0], atol=1e-4)
    assert left_out > 5
    assert torch.equal(built(x, t, condition), dropping(randomise, 0.0)(x, t, condition))


def test_the_rate_grows_linearly_and_the_mean_is_kept(randomise):
    built = dropping(randomise, 0.4, depth=5)
    scales = built._branch_scales(torch.rand(20_000, 10, generator=torch.Generator().manual_seed(0)))
    assert torch.allclose((scales == 0).float().mean(dim=(0, 2)), torch.linspace(0, 0.4, 5), atol=0.01)
    assert torch.allclose(scales.mean(dim=0), torch.ones(5, 2), atol=0.02)


def text_batch(count: int, start: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(start)
    pixels = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)
    condition = Condition(
        text=torch.randn(count, 4, 8, generator=generator), text_mask=torch.ones(count, 4, dtype=torch.bool)
    )
    return Batch(pixels, condition, torch.arange(start, start + count))


def training_objective(network: PixArt) -> TrainingObjective:
    return TrainingObjective(
        diffusion=FlowMatchingConfig().build(), codec=PixelsConfig(channels=1).build(), hflip=False,
        condition_dropout=0.2, null_fields=("text",), seed=7, dtype=None,
        uniform_numbers=network.config.uniform_numbers,
    )  # fmt: skip


def test_training_leaves_out_by_seed_and_position_alone(randomise):
    """Micro-batches and restarts change nothing; the probe leaves out nothing."""
    built = dropping(randomise, in_channels=1, out_channels=1)
    objective, cpu = training_objective(built), torch.device("cpu")
    whole = prepare_batch(text_batch(12), objective, cpu)[1].uniform
    assert whole.shape == (12, 6)
    assert torch.equal(prepare_batch(text_batch(12)[5:9], objective, cpu)[1].uniform, whole[5:9])
    assert not torch.equal(prepare_batch(text_batch(12), replace(objective, seed=8), cpu)[1].uniform, whole)
    assert probe_inputs(text_batch(12), objective, cpu)[1].uniform is None
    before = {name: value.clone() for name, value in built.state_dict().items()}
    gradients = []
    for uniform_numbers, parts in ((6, 1), (6, 3), (0, 1)):
        optimizer = torch.optim.SGD(list(parallel.trained_parameters(built).items()), lr=1.0)
        state = TrainState(built, built, optimizer, AdamWConfig(), ParallelContext())
        train_step(state, text_batch(12), replace(objective, uniform_numbers=uniform_numbers), 12, parts)
        gradients.append({name: before[name] - value for name, value in built.state_dict().items()})
        built.load_state_dict(before)
    for name, one in gradients[0].items():
        assert torch.allclose(gradients[1][name], one, rtol=1e-4, atol=1e-5)
    assert any(not torch.allclose(gradients[2][name], one, rtol=0.1) for name, one in gradients[0].items())


@torch.no_grad()
def test_text_that_is_prepared_once_gives_the_same_output(randomise):
    built = dropping(randomise, 0.0)
    x, t, condition = inputs(3)
    condition = replace(condition, text_mask=torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool))
    for each in (condition, condition.null()):
        assert torch.equal(built(x, t, built.prepare(each)), built(x, t, each))
