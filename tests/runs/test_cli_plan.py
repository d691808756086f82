"""`tessera plan`: text and JSON output, budgets, errors."""

import json

import pytest

from tessera.planning.plan import count_macs_and_parameters
from tessera.training import plan_recipe
from tessera.training.recipe import read_recipe


def test_a_preset_alone_prints_its_parameters_and_multiply_adds(tessera):
    done = tessera("plan", "DiT-XL/2")
    assert done.code == 0, done.err
    assert "675,129,632" in done.out
    assert "118.62" in done.out
    facts = json.loads(tessera("plan", "DiT-XL/2", "network.input_size=64", "--json").out)
    assert facts["gmacs"] == pytest.approx(524.54, abs=0.01)
    assert facts["flops_per_sample"] == 6e9 * facts["gmacs"]


def test_a_budget_that_is_too_small_prints_the_plan_and_an_error(tessera, recipe):
    network = plan_recipe.workload(read_recipe(recipe, [])).network
    flops = 6 * count_macs_and_parameters(network)[0] * 32  # of a step with 32 samples
    done = tessera("plan", recipe, "--hardware", "h100x2", "--budget", f"{2.5 * flops:.0f}", "network.depth=6")
    assert done.code == 1
    for text in (
        "2 x NVIDIA H100",
        "fits",
        "selective",
        "images/s",
        "device hours",
        "1,000 images",
        "pays for 0 steps",
    ):
        assert text in done.out
    assert "too small for one step" in done.err
    done = tessera("plan", recipe, "--hardware", "h100", "--budget", f"{2.5 * flops:.0f}", "--json")
    assert json.loads(done.out)["budget"]["steps"] == 2
    assert "training.steps=2" in done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("DiT-XL/3",), "DiT-XL/3"),
        (("DiT-S/4", "--hardware", "h1000"), "did you mean 'h100'"),
        (("DiT-S/4", "--hardware", "h100", "--budget=-3h"), "-3h"),
        (("DiT-S/4", "--hardware", "h100", "--measure"), "--measure measures this machine"),
        (("DiT-S/4", "network.hidden_size=100"), "100"),
        (("DiT-S/8", "network.input_size=20"), "patch"),
        (("DiT-S/4", "training.micro_batch_size=3"), "micro_batch"),
        (("DiT-S/4", "--law", "nowhere.json"), "nowhere.json"),
    ],
)
def test_invalid_input_is_one_message(tessera, words, message):
    done = tessera("plan", *words)
    assert done.code == 1
    assert message in done.err
    assert "Traceback" not in done.err
