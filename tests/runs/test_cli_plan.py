"""`tessera plan`: what a run takes, told to people and to programs; budgets and impossible settings in one message."""

import json

import pytest

from tessera.planning.plan import counts
from tessera.training import plan_recipe
from tessera.training.recipe import read_recipe


def test_a_preset_alone_tells_its_parameters_and_multiply_adds(tessera):
    done = tessera("plan", "DiT-XL/2")
    assert done.code == 0, done.err
    assert "675,129,632" in done.out
    assert "118.62" in done.out
    told = json.loads(tessera("plan", "DiT-XL/2", "network.input_size=64", "--json").out)
    assert told["gmacs"] == pytest.approx(524.54, abs=0.01)
    assert told["flops_per_sample"] == 6e9 * told["gmacs"]


def test_a_budget_that_is_too_small_ends_with_the_plan_that_says_why(tessera, recipe):
    network = plan_recipe.workload(read_recipe(recipe, [])).network
    flops = 6 * counts(network)[0] * 32  # of a step of 32
    done = tessera("plan", recipe, "--hardware", "h100x2", "--budget", f"{2.5 * flops:.0f}", "network.depth=20")
    assert done.code == 1
    for said in ("2 x NVIDIA H100", "fits", "selective", "images/s", "device hours", "1,000 images", "buys 0 steps"):
        assert said in done.out
    assert "too small for one step" in done.err
    done = tessera("plan", recipe, "--hardware", "h100", "--budget", f"{2.5 * flops:.0f}", "--json")
    assert json.loads(done.out)["budget"]["steps"] == 2
    assert "training.steps=2" in done.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("DiT-XL/3",), "neither a recipe nor a preset"),
        (("DiT-S/4", "--hardware", "h1000"), "did you mean 'h100'"),
        (("DiT-S/4", "--hardware", "h100", "--budget=-3h"), "not understood"),
        (("DiT-S/4", "--hardware", "h100", "--measure"), "--measure measures this machine"),
        (("DiT-S/4", "network.hidden_size=100"), "not divisible by heads"),
        (("DiT-S/8", "network.input_size=20"), "patch 8 does not divide"),
        (("DiT-S/4", "training.micro_batch_size=3"), "not a multiple of micro_batch"),
        (("DiT-S/4", "--law", "nowhere.json"), "there is no law"),
    ],
)
def test_what_cannot_be_is_named_in_one_message(tessera, words, said):
    done = tessera("plan", *words)
    assert done.code == 1
    assert said in done.err
    assert "Traceback" not in done.err
