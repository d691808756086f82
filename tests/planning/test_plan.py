"""Plans of whole recipes, against real runs and the paper's table."""

from pathlib import Path

import pytest
import torch

from tessera.cli.plan import format_plan
from tessera.errors import TesseraError
from tessera.models.presets import PRESETS
from tessera.planning import budget, hardware, published
from tessera.planning.plan import (
    BatchLayout,
    budget_outcome,
    count_macs_and_parameters,
    device_memory,
    divide_batch,
    plan,
)
from tessera.planning.trace import StepMemory
from tessera.settings import apply_overrides, validate
from tessera.training import plan_recipe
from tessera.training.recipe import Recipe, read_recipe
from tessera.training.run import build_run
from tessera.training.step import train_step

TINY = {
    "run_dir": "unused",
    "data": {"kind": "digits"},
    "network": {"patch_size": 2, "hidden_size": 32, "depth": 2, "num_heads": 2},
    "sampling": {"num_steps": 5, "guidance_scale": 2},
    "training": {
        "steps": 40,
        "global_batch_size": 16,
        "sample_every": 20,
        "checkpoint_every": 10,
        "tensorboard": False,
    },
}


def tiny_recipe(*overrides: str) -> Recipe:
    return validate(Recipe, apply_overrides(TINY, list(overrides)), "the test's recipe")


@pytest.mark.parametrize("model", published.MODELS, ids=lambda model: model.name)
def test_the_presets_have_the_size_and_cost_of_the_paper(model):
    macs, parameters = count_macs_and_parameters(plan_recipe.preset_recipe(model.name, []).network)
    assert parameters == model.parameters
    assert macs / 1e9 == pytest.approx(model.gmacs, abs=0.025)


@pytest.mark.parametrize(
    ("network", "overrides"),
    [
        ({}, ("training.ema.extra_decays=[0.9,0.5]",)),
        ({"block": "rope-swiglu"}, ("training.optimizer.kind=muon",)),
        (
            {"kind": "unet", "model_channels": 16, "num_res_blocks": 1},
            ("data.kind=shapes", "training.global_batch_size=4"),
        ),
    ],
    ids=["three EMAs", "muon", "u-net"],
)
def test_planned_weights_ema_and_optimizer_state_are_those_of_a_run(network, overrides, tmp_path):
    base = {} if "kind" in network else TINY["network"]
    settings = apply_overrides(TINY | {"network": base | network, "run_dir": str(tmp_path / "run")}, list(overrides))
    recipe = validate(Recipe, settings, "the test's recipe")
    cost = plan_recipe.plan_for_recipe(recipe, "h100")
    run = build_run(recipe)
    batches = run.loader.batches()
    train_step(run.state, next(batches), run.objective, run.recipe.training.global_batch_size, run.accumulation_steps)
    batches.close()
    weights = sum(parameter.nbytes for parameter in run.network.parameters())
    state = (value for values in run.state.optimizer.state.values() for value in values.values())
    assert cost.parameters == sum(parameter.numel() for parameter in run.network.parameters())
    assert cost.gmacs == run.macs / 1e9
    assert cost.memory.weights == weights
    assert cost.memory.ema == weights * len(recipe.training.ema.decays)
    assert cost.memory.optimizer == sum(value.nbytes for value in state if isinstance(value, torch.Tensor))


def test_the_numbers_of_a_plan_agree():
    small = hardware.find("h100x2").model_copy(update={"memory": 3 * 2**20, "usable": 1.0})
    cost = plan_recipe.plan_for_recipe(
        tiny_recipe("evaluation.at=[10]", "evaluation.num_samples=30"), small, alternatives=True
    )
    assert cost.flops == 6 * cost.gmacs * 1e9 * 16 * 40
    assert cost.seconds == 40 * cost.step_seconds
    assert cost.images_per_second == pytest.approx(16 / cost.step_seconds)
    assert cost.device_hours == pytest.approx(2 * (cost.seconds + cost.evaluation_seconds) / 3600)
    assert cost.cost == pytest.approx(3 * cost.device_hours)
    assert cost.layout == BatchLayout(devices=2, micro_batch_size=8, accumulation_steps=1, shards=1)
    sampling = cost.workload.sampling
    assert sampling.grid_images == 3 * 10 * 4  # at steps 0, 20 and 40: ten classes, four seeds
    assert sampling.scored_images == 2 * 30  # at step 10 and at the end
    assert sampling.calls_per_image == 2 * 5  # guidance counts twice
    assert cost.checkpoint_bytes == cost.memory.weights + cost.memory.ema + cost.memory.optimizer
    assert cost.disk_bytes == 4 * cost.checkpoint_bytes  # two, the best, and the one being written
    assert cost.workload.num_images == 1000
    peaks = {
        (alternative.precision, alternative.activation_checkpointing, alternative.shards): alternative.memory.peak
        for alternative in cost.alternatives
    }
    assert len(peaks) == 2 * 3 * 2
    assert peaks["bfloat16", "none", 1] == cost.memory_bytes
    assert peaks["float32", "blocks", 2] < peaks["float32", "none", 1]
    assert cost.largest_model is None  # S/8 needs more than 3 MiB
    assert cost.largest_batch is not None
    largest = 2 * cost.largest_batch  # on two devices
    assert plan_recipe.plan_for_recipe(tiny_recipe(f"training.global_batch_size={largest}"), small).fits
    assert not plan_recipe.plan_for_recipe(tiny_recipe(f"training.global_batch_size={largest + 4}"), small).fits
    assert cost.to_dict()["memory"]["peak"] == cost.memory_bytes


def test_accumulation_needs_less_memory_for_the_same_batch():
    whole = plan_recipe.plan_for_recipe(tiny_recipe("training.global_batch_size=64"), "h100")
    rounds = plan_recipe.plan_for_recipe(
        tiny_recipe("training.global_batch_size=64", "training.micro_batch_size=16"), "h100"
    )
    assert rounds.layout == BatchLayout(1, 16, 4, 1)
    assert rounds.memory_bytes < whole.memory_bytes
    assert rounds.flops == whole.flops


def test_a_deep_network_is_extrapolated_from_shallow_ones():
    recipe = tiny_recipe("network.depth=7", "training.precision=bfloat16")
    cost = plan_recipe.plan_for_recipe(recipe, "h100")
    config = cost.workload.network
    step = cost.workload.trace_step(config, 16, 1, torch.bfloat16, "none")
    assert cost.memory == device_memory(step.memory, 1, 7)


def test_steps_of_a_budget_by_hand():
    cost = plan_recipe.plan_for_recipe(tiny_recipe(), "h100x2")
    hours = budget.parse("1h")
    assert budget_outcome(cost, hours).steps == int((3600 - cost.evaluation_seconds) / cost.step_seconds)
    assert (
        budget_outcome(cost, budget.parse("$6")).steps == budget_outcome(cost, hours).steps
    )  # two devices for an hour
    assert budget_outcome(cost, budget.parse("2gpuh")).steps == budget_outcome(cost, hours).steps
    flops = budget_outcome(cost, budget.parse(f"{20.5 * cost.flops_per_step:.0f}"))
    assert (flops.steps, flops.samples, flops.enough) == (20, 320, False)
    assert flops.flops == 20 * cost.flops_per_step
    assert budget_outcome(cost, hours).enough


def test_sharding_divides_weights_and_optimizer_state():
    memory = StepMemory(weights=800, ema=800, optimizer=1600, gradients=800, activations=5000, peak=5400)
    whole, parts = device_memory(memory, 1, 10), device_memory(memory, 4, 10)
    assert whole.peak == 3200 + 5400
    assert parts.peak == 800 + 5000 + 2 * 80  # a quarter of the state; two gathered blocks
    assert parts.gradients == 200


def test_impossible_workloads_are_refused():
    work = plan_recipe.workload(tiny_recipe("training.fsdp=3"))
    with pytest.raises(TesseraError, match="groups of 3"):
        divide_batch(work, 4)
    with pytest.raises(TesseraError, match="too small for 32 devices"):
        divide_batch(work, 32)
    with pytest.raises(TesseraError, match="not divisible by num_heads"):
        plan_recipe.preset_recipe("DiT-S/2", ["network.num_heads=7"])
    with pytest.raises(TesseraError, match="patch_size 3 does not divide"):
        plan_recipe.workload(tiny_recipe("network.patch_size=3"))
    with pytest.raises(TesseraError, match="neither a recipe nor a preset"):
        plan_recipe.resolve_target("DiT-M/2", [])


def test_this_machine_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path))
    cost = plan_recipe.plan_for_recipe(tiny_recipe(), "cpu")
    assert 0 < cost.step_seconds < 60
    assert cost.precision == "float32"
    assert list((tmp_path / "machines").glob("*.json"))
    assert plan(cost.workload, cost.hardware, alternatives=False).step_seconds == cost.step_seconds


def test_presets_are_not_paths():
    assert all(plan_recipe.is_preset(name) for name in PRESETS)
    assert not plan_recipe.is_preset("recipes/digits.yaml")


def test_the_pixart_recipe_is_planned_without_its_data_and_encoder():
    recipe = read_recipe(Path(__file__).parents[2] / "recipes" / "pixart.yaml", [])
    cost = plan_recipe.plan_for_recipe(recipe, "h100x8")
    assert (cost.parameters, cost.fits) == (610_856_096, True)  # the recipe's 610.9M
    assert cost.workload.text.startswith("folder (hub:PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers): 4096 channels")
    assert "960 KiB of embeddings for each caption" in cost.workload.text
    assert cost.to_dict()["text"] == cost.workload.text
    assert f"text         {cost.workload.text}" in format_plan(cost).splitlines()
