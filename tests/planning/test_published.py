"""The paper's table against the counts of the presets, and its consistency."""

import pytest

from tessera.models.presets import PRESETS
from tessera.planning import published


@pytest.mark.parametrize("model", published.MODELS, ids=lambda model: model.name)
def test_parameters_and_gmacs_are_those_of_the_preset(model):
    width, depth = PRESETS[model.name]["hidden_size"], PRESETS[model.name]["depth"]
    tokens = (32 // model.patch_size) ** 2
    block = 18 * width**2 + 15 * width  # attention 4, MLP 8, modulation 6 D^2; their biases
    patch = model.patch_size**2
    ends = (
        (4 * patch + 1) * width + (2 * width + 2) * width + (width + 1) * 8 * patch
    )  # embedding, final modulation, output
    embedders = (256 + 1) * width + (width + 1) * width + 1001 * width + tokens * width  # timestep, classes, positions
    assert depth * block + ends + embedders == model.parameters
    macs = depth * (12 * tokens * width**2 + 2 * tokens**2 * width + 6 * width**2)
    assert macs / 1e9 == pytest.approx(model.gmacs, abs=0.02 + 0.003 * model.gmacs)


def test_training_flops_are_three_forward_passes():
    model = published.XL_RUNS[-1]
    assert model.flops == pytest.approx(3 * 2 * 118.64e9 * 256 * 7_000_000)
    assert published.XL_RUNS[0] == published.MODELS[-1]
    assert published.DESIGNS[-1].fid == published.MODELS[-1].fid
