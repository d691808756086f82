"""Plans of whole recipes, against real runs and the paper's table."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tessera import bundle
from tessera.cli.plan import format_plan
from tessera.errors import TesseraError
from tessera.evaluation.toy import feature_network
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


ADAPTERS = {
    "lora": ({"kind": "lora", "rank": 2}, ()),
    "nf4, three EMAs": ({"kind": "lora", "rank": 2, "base_weights": "nf4"}, ("training.ema.extra_decays=[0.9,0.5]",)),
    "some blocks": ({"kind": "lora", "rank": 2, "where": r"blocks\.5\.attn"}, ()),
    "difffit": ({"kind": "difffit"}, ()),
    "classes": ({"kind": "classes", "classes": ["3"]}, ()),
    "copied blocks": ({"kind": "control", "how": "copy"}, ()),
    "copied blocks, nf4": ({"kind": "control", "how": "copy", "base_weights": "nf4"}, ()),
    "more channels": ({"kind": "control", "how": "channels", "rank": 2}, ()),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """An untrained model of six blocks in a bundle."""
    network = tiny_recipe("network.depth=6").network.model_copy(
        update={"input_size": (8, 8), "in_channels": 1, "out_channels": 2, "num_classes": 10}
    )
    settings = {"diffusion": {}, "codec": {"kind": "pixels", "channels": 1}, "class_names": tuple("0123456789")}
    config = bundle.BundleConfig.model_validate({"network": network.model_dump(), **settings})
    folder = tmp_path_factory.mktemp("base") / "model"
    bundle.save(bundle.Model(config, network.build()), folder)
    return folder


def adapter_recipe(base, adapter, *overrides: str) -> Recipe:
    settings = {name: value for name, value in TINY.items() if name != "network"} | {"adapter": adapter}
    words = [f"training.init_from={base}", *overrides]
    return validate(Recipe, apply_overrides(settings, words), "the test's recipe")


@pytest.mark.parametrize(
    ("adapter", "overrides"),
    [
        pytest.param(
            *values, id=name, marks=[] if name in ("lora", "copied blocks, nf4", "classes") else pytest.mark.slow
        )
        for name, values in ADAPTERS.items()
    ],
)
def test_the_plan_of_an_adapter_is_that_of_its_run(adapter, overrides, base, tmp_path):
    """Only what is trained has gradients, averages and optimizer state; a checkpoint holds nothing else."""
    recipe = adapter_recipe(base, adapter, f"run_dir={tmp_path / 'run'}", *overrides)
    cost = plan_recipe.plan_for_recipe(recipe, "rtx4090")
    run = build_run(recipe)
    batches = run.loader.batches()
    train_step(run.state, next(batches), run.objective, run.recipe.training.global_batch_size, run.accumulation_steps)
    batches.close()
    own = {id(parameter) for parameter in run.network.parameters()}
    trained = [parameter for parameter in run.network.parameters() if parameter.requires_grad]
    averages = [each for network in run.ema.networks.values() for each in network.parameters() if id(each) not in own]
    assert cost.trained_parameters == sum(parameter.numel() for parameter in trained)
    assert cost.parameters == sum(parameter.numel() for parameter in bundle.load(base).network.parameters())
    assert cost.memory.weights == sum(parameter.nbytes for parameter in run.network.parameters())
    assert cost.memory.ema == sum(parameter.nbytes for parameter in averages)
    assert cost.memory.gradients == sum(parameter.nbytes for parameter in trained)
    state = [value for values in run.state.optimizer.state.values() for value in values.values()]
    assert cost.memory.optimizer == sum(value.nbytes for value in state)
    assert cost.checkpoint_bytes == sum(each.nbytes for each in (*trained, *averages, *state))
    base_bytes = sum(tensor.nbytes for tensor in bundle.load(base).network.state_dict().values())
    assert cost.disk_bytes == 3 * cost.checkpoint_bytes + base_bytes


def test_activations_of_an_adapter_begin_at_its_first_block(base):
    """Below it there is no backward pass, and weights without gradients need no inputs."""
    whole = plan_recipe.plan_for_recipe(adapter_recipe(base, {"kind": "lora", "rank": 2}), "rtx4090").memory
    last = adapter_recipe(base, {"kind": "lora", "rank": 2, "where": r"blocks\.5\."})
    assert plan_recipe.plan_for_recipe(last, "rtx4090").memory.activations < 0.3 * whole.activations
    full = plan_recipe.plan_for_recipe(tiny_recipe("network.depth=6"), "rtx4090").memory
    assert whole.activations < full.activations
    assert whole.gradients < 0.2 * full.gradients


def test_an_adapter_on_several_devices_copies_its_base_in_the_ema(base):
    recipe = adapter_recipe(base, {"kind": "lora", "rank": 2})
    one, two = (plan_recipe.plan_for_recipe(recipe, name).memory for name in ("h100", "h100x2"))
    assert two.ema - one.ema == 4 * plan_recipe.plan_for_recipe(recipe, "h100").parameters


def test_the_lora_recipe_is_planned_without_model_data_and_codec():
    path = Path(__file__).parents[2] / "recipes" / "lora.yaml"
    words = ["network.preset=DiT-XL/2", "adapter.base_weights=nf4", "training.activation_checkpointing=blocks"]
    cost = plan_recipe.plan_for_recipe(read_recipe(path, words), "rtx4090")
    assert (cost.parameters, cost.trained_parameters) == (675_129_632, 28 * 16 * 1152 * (4 + 2 + 5 + 5))
    assert cost.workload.network.input_size == (32, 32)
    assert cost.memory_bytes < 2**30
    text = format_plan(cost)
    assert "adapter      LoRA of rank 16: 8,257,536 parameters (1.2%), the base in nf4" in text
    assert "training.init_from=MODEL is not on this machine" in text
    assert f"{cost.memory.loading / 2**30:.3g} GiB while loading" in text


def test_a_plan_for_a_cpu_counts_the_copies_of_a_checkpoint(base):
    """The weights and the optimizer state are copied and serialized, averages are copied, while training continues."""
    gpu = hardware.find("h100")
    cpu = gpu.model_copy(update={"device": "cpu"})
    for recipe in (tiny_recipe(), adapter_recipe(base, {"kind": "lora", "rank": 2})):
        recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"precision": "float32"})})
        there, here = (plan_recipe.plan_for_recipe(recipe, each, alternatives=False) for each in (gpu, cpu))
        averages = here.memory.ema
        assert here.memory.saving == 2 * here.checkpoint_bytes - averages
        assert (there.memory.saving, "copies for a checkpoint" in format_plan(there)) == (0, False)
        assert "copies for a checkpoint" in format_plan(here)
        assert here.memory.peak == there.memory.peak + here.memory.saving


def test_a_preset_is_planned_with_an_adapter():
    cost = plan_recipe.plan_for_recipe(plan_recipe.preset_recipe("DiT-S/2", ["adapter.kind=lora"]), "rtx4090")
    assert cost.to_dict()["adapter"]["trained_parameters"] == cost.trained_parameters == 12 * 16 * 384 * 16


def test_classes_that_the_base_does_not_have_are_refused(base):
    recipe = adapter_recipe(base, {"kind": "lora", "rank": 2}, "data.kind=shapes")
    with pytest.raises(TesseraError, match="an adapter keeps the 10 classes of its base"):
        plan_recipe.plan_for_recipe(recipe, "rtx4090")


def test_metrics_that_read_clips_need_no_features_of_the_reference():
    """The law of lanes: 50,000 clips of the reference would take far longer than the samples."""
    path = Path(__file__).parents[2] / "recipes" / "lanes.yaml"
    words = ["evaluation.every=1000", "evaluation.metrics=[law]", "evaluation.num_samples=64"]
    sampling = plan_recipe.workload(read_recipe(path, words)).sampling
    assert sampling.extracted_images == sampling.scored_images == 3 * 64
    assert sampling.extractor_macs < 10
    assert plan_recipe.workload(read_recipe(path, [*words, "evaluation.metrics=[fd]"])).sampling.extractor_macs > 1e6


def test_the_cost_of_scoring_follows_the_feature_network_and_the_reference(tmp_path):
    """A network of one's own is much smaller than Inception; statistics need no features of the reference."""
    config = feature_network.FeatureConfig(size=(8, 8), channels=1, num_classes=2, width=8)
    feature_network.save(config.build(), tmp_path / "features")
    np.savez(tmp_path / "stats.npz", mu=np.zeros(16), sigma=np.eye(16))
    words = ["evaluation.every=20", "evaluation.metrics=[fd]", "evaluation.num_samples=64"]

    def sampling(*more: str):
        return plan_recipe.workload(tiny_recipe(*words, *more)).sampling

    with_images = sampling(f"evaluation.features={tmp_path / 'features'}")
    # stem 8 x 8, 1 to 8 channels; 4 x 4, 8 to 16; two convolutions 16 to 16; 2 classes
    assert with_images.extractor_macs == 64 * 9 * 8 + 16 * 9 * (8 * 16 + 2 * 16 * 16) + 16 * 2
    assert with_images.extracted_images == with_images.scored_images + 1000 == 2 * 64 + 1000
    assert sampling("evaluation.features=owner/name").extractor_macs == 5.7e9
    statistics = sampling(
        f"evaluation.reference={tmp_path / 'stats.npz'}", f"evaluation.features={tmp_path / 'features'}"
    )
    assert statistics.extracted_images == statistics.scored_images == 2 * 64
