"""Plans of whole recipes, against what runs hold and the paper's table."""

import pytest
import torch

from tessera.errors import TesseraError
from tessera.models.presets import PRESETS
from tessera.planning import budget, hardware, published
from tessera.planning.plan import Split, budget_outcomes, counts, divided, memory_of, plan
from tessera.planning.trace import Sizes
from tessera.settings import apply_overrides, validate
from tessera.training import plan_recipe
from tessera.training.recipe import Recipe
from tessera.training.run import build_run
from tessera.training.step import train_step

TINY = {
    "run_dir": "unused",
    "data": {"kind": "digits"},
    "network": {"patch_size": 2, "hidden_size": 32, "depth": 2, "num_heads": 2},
    "sampling": {"num_steps": 5, "guidance_scale": 2},
    "training": {"steps": 40, "global_batch_size": 16, "sample_every": 20, "checkpoint_every": 10, "tensorboard": False},
}


def tiny(*changes: str) -> Recipe:
    return validate(Recipe, apply_overrides(TINY, list(changes)), "the test's recipe")


@pytest.mark.parametrize("published", published.MODELS, ids=lambda one: one.name)
def test_the_twelve_presets_are_the_paper_s(published):
    macs, parameters = counts(plan_recipe.preset_recipe(published.name, []).network)
    assert parameters == published.parameters
    assert macs / 1e9 == pytest.approx(published.gmacs, abs=0.025)


@pytest.mark.parametrize(
    ("network", "changes"),
    [
        ({}, ("training.ema.extra_decays=[0.9,0.5]",)),
        ({"block": "rope-swiglu"}, ("training.optimizer.kind=muon",)),
        ({"kind": "unet", "model_channels": 16, "num_res_blocks": 1}, ("data.kind=shapes", "training.global_batch_size=4")),
    ],
    ids=["three averages", "muon", "u-net"],
)
def test_what_stays_from_step_to_step_is_what_a_run_holds(network, changes, tmp_path):
    base = {} if "kind" in network else TINY["network"]
    told = apply_overrides(TINY | {"network": base | network, "run_dir": str(tmp_path / "run")}, list(changes))
    recipe = validate(Recipe, told, "the test's recipe")
    made = plan_recipe.plan_for_recipe(recipe, "h100")
    run = build_run(recipe)
    batches = run.loader.batches()
    train_step(run.state, next(batches), run.objective, run.recipe.training.global_batch_size, run.accumulation_steps)
    batches.close()
    weights = sum(parameter.nbytes for parameter in run.network.parameters())
    memories = (held for told in run.state.optimizer.state.values() for held in told.values())
    assert made.parameters == sum(parameter.numel() for parameter in run.network.parameters())
    assert made.gmacs == run.macs / 1e9
    assert made.memory.weights == weights
    assert made.memory.averages == weights * len(recipe.training.ema.decays)
    assert made.memory.moments == sum(held.nbytes for held in memories if isinstance(held, torch.Tensor))


def test_the_numbers_of_a_plan_follow_from_one_another():
    small = hardware.find("h100x2").model_copy(update={"memory": 3 * 2**20, "usable": 1.0})
    made = plan_recipe.plan_for_recipe(tiny("evaluation.at=[10]", "evaluation.num_samples=30"), small, alternatives=True)
    assert made.flops == 6 * made.gmacs * 1e9 * 16 * 40
    assert made.seconds == 40 * made.step_seconds
    assert made.images_per_second == pytest.approx(16 / made.step_seconds)
    assert made.device_hours == pytest.approx(2 * (made.seconds + made.scoring_seconds) / 3600)
    assert made.cost == pytest.approx(3 * made.device_hours)
    assert made.split == Split(devices=2, rows=8, rounds=1, shards=1)
    drawing = made.work.drawing
    assert drawing.grids == 3 * 10 * 4  # at steps 0, 20 and 40: ten classes, four seeds
    assert drawing.scored == 2 * 30  # at step 10 and at the end
    assert drawing.calls == 2 * 5  # guidance asks twice
    assert made.checkpoint_bytes == made.memory.weights + made.memory.averages + made.memory.moments
    assert made.disk_bytes == 4 * made.checkpoint_bytes  # two, the best, and the one being written
    assert made.work.images == 1000
    told = {(choice.precision, choice.recompute, choice.shards): choice.memory.at_most for choice in made.choices}
    assert len(told) == 2 * 3 * 2
    assert told["bfloat16", "none", 1] == made.memory_bytes
    assert told["float32", "blocks", 2] < told["float32", "none", 1]
    assert made.largest_model is None  # 3 MiB are too few for S/8
    assert made.largest_batch is not None
    most = 2 * made.largest_batch  # on two devices
    assert plan_recipe.plan_for_recipe(tiny(f"training.global_batch_size={most}"), small).fits
    assert not plan_recipe.plan_for_recipe(tiny(f"training.global_batch_size={most + 4}"), small).fits
    assert made.facts()["memory"]["at_most"] == made.memory_bytes


def test_rounds_need_less_memory_for_the_same_batch():
    whole = plan_recipe.plan_for_recipe(tiny("training.global_batch_size=64"), "h100")
    rounds = plan_recipe.plan_for_recipe(tiny("training.global_batch_size=64", "training.micro_batch_size=16"), "h100")
    assert rounds.split == Split(1, 16, 4, 1)
    assert rounds.memory_bytes < whole.memory_bytes
    assert rounds.flops == whole.flops


def test_a_deep_network_is_told_from_shallow_ones():
    recipe = tiny("network.depth=7", "training.precision=bfloat16")
    made = plan_recipe.plan_for_recipe(recipe, "h100")
    config = made.work.network
    step = made.work.step(config, 16, 1, torch.bfloat16, "none")
    assert made.memory == memory_of(step.sizes, made.split, 7)


def test_what_a_budget_buys_by_hand():
    made = plan_recipe.plan_for_recipe(tiny(), "h100x2")
    hours = budget.parse("1h")
    assert budget_outcomes(made, hours).steps == int((3600 - made.scoring_seconds) / made.step_seconds)
    assert (
        budget_outcomes(made, budget.parse("$6")).steps == budget_outcomes(made, hours).steps
    )  # two devices for an hour
    assert budget_outcomes(made, budget.parse("2gpuh")).steps == budget_outcomes(made, hours).steps
    flops = budget_outcomes(made, budget.parse(f"{20.5 * made.flops_per_step:.0f}"))
    assert (flops.steps, flops.samples, flops.enough) == (20, 320, False)
    assert flops.flops == 20 * made.flops_per_step
    assert budget_outcomes(made, hours).enough


def test_sharding_divides_what_stays():
    sizes = Sizes(weights=800, averages=800, moments=1600, gradients=800, kept=5000, peak=5400)
    whole, parts = memory_of(sizes, Split(4, 8, 1, 1), 10), memory_of(sizes, Split(4, 8, 1, 4), 10)
    assert whole.at_most == 3200 + 5400
    assert parts.at_most == 800 + 5000 + 2 * 80  # a quarter of all; two blocks are whole at once
    assert parts.gradients == 200


def test_impossible_work_is_named():
    work = plan_recipe.workload(tiny("training.fsdp=3"))
    with pytest.raises(TesseraError, match="groups of 3"):
        divided(work, 4)
    with pytest.raises(TesseraError, match="too small for 32 devices"):
        divided(work, 32)
    with pytest.raises(TesseraError, match="not divisible by heads"):
        plan_recipe.preset_recipe("DiT-S/2", ["network.num_heads=7"])
    with pytest.raises(TesseraError, match="patch 3 does not divide"):
        plan_recipe.workload(tiny("network.patch_size=3"))
    with pytest.raises(TesseraError, match="neither a recipe nor a preset"):
        plan_recipe.resolve_target("DiT-M/2", [])


def test_this_machine_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path))
    made = plan_recipe.plan_for_recipe(tiny(), "cpu")
    assert 0 < made.step_seconds < 60
    assert made.precision == "float32"
    assert list((tmp_path / "machines").glob("*.json"))
    assert plan(made.work, made.hardware, alternatives=False).step_seconds == made.step_seconds


def test_presets_are_all_planned_as_networks():
    assert all(plan_recipe.is_preset(name) for name in PRESETS)
    assert not plan_recipe.is_preset("recipes/digits.yaml")
