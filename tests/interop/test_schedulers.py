"""A diffusers folder samples as diffusers does: every class of schedulers, from the same noise with the same network.

Where Tessera does not repeat a scheduler exactly, the load reports it; where it reports nothing, the images are equal.
"""

import importlib
import json
import random

import pytest
import torch

from tessera import generation
from tessera.diffusion.gaussian import GaussianDiffusionConfig
from tessera.errors import TesseraError
from tessera.interop import diffusers as interop
from tessera.interop.schedulers import CLASSES, SCALED, SchedulerConfig, sampling_config
from tessera.sampling import sampling_noise

diffusers = pytest.importorskip("diffusers")
diffusers.utils.logging.set_verbosity_error()

NETWORK = {"timestep_freq_divisor": 127, "mlp_norm_eps": 1e-5, "in_channels": 3, "depth": 1, "hidden_size": 16}
LABELS, SEEDS, STEPS = [0, 2], [3, 4], 20


@pytest.fixture
def make_folder(make_model, tmp_path):
    """A folder of DiTPipeline with a scheduler of a class. channels: of the network's output"""

    def make(kind: str, settings: dict, channels: int = 3, edit: dict | None = None):
        variance = "learned" if channels == 6 else "posterior"
        network = {**NETWORK, "out_channels": channels}
        folder = tmp_path / f"pipe-{len(list(tmp_path.iterdir()))}"
        interop.write(make_model(network, {"prediction": "epsilon", "variance": variance}), folder)
        scheduler = getattr(diffusers, kind)(**settings)
        scheduler.save_pretrained(folder / "scheduler")
        if edit is not None:
            path = folder / "scheduler" / "scheduler_config.json"
            data = json.loads(path.read_text()) | edit
            path.write_text(json.dumps({name: value for name, value in data.items() if value is not ...}))
        return folder

    return make


@torch.no_grad()
def images(folder, monkeypatch, steps: int = STEPS, learned: bool = False):
    """(Tessera's latents, diffusers') of the same noise without guidance. learned: keep the outputs of the variance"""
    model = interop.read(folder)
    *_, last = generation.generate_steps(model, LABELS, SEEDS, guidance_scale=1.0, num_steps=steps)
    network = diffusers.DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer").eval()
    kind = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    scheduler = getattr(diffusers, kind).from_pretrained(folder, subfolder="scheduler")
    noise_calls = 0

    def noise(*_, **__):
        nonlocal noise_calls
        noise_calls += 1
        return sampling_noise(torch.tensor(SEEDS), torch.full((2,), noise_calls), (3, 8, 8))

    monkeypatch.setattr(importlib.import_module(scheduler.__module__), "randn_tensor", noise, raising=False)
    scheduler.set_timesteps(steps)
    x = sampling_noise(torch.tensor(SEEDS), torch.zeros(2, dtype=torch.int64), (3, 8, 8)) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x_t = scheduler.scale_model_input(x, t)
        raw = network(x_t, timestep=t.expand(2), class_labels=torch.tensor(LABELS)).sample
        x = scheduler.step(raw if learned else raw[:, :3], t, x).prev_sample
    if kind in SCALED:
        x = x / (1 + scheduler.sigmas[-1] ** 2) ** 0.5
    return last.x, x


def relative(one, two) -> float:
    assert two.isfinite().all()
    assert two.std() > 0.01
    return float((one - two).norm() / two.norm())


def difference(folder) -> str:
    """What the load reports, without the remark about DiTPipeline."""
    text = interop.read(folder).config.provenance.not_converted or ""
    parts = text.removeprefix("of the scheduler: ").split("; ")
    return "; ".join(part for part in parts if part and not part.startswith("DiTPipeline does not scale"))


CLIP = {"clip_sample": True, "clip_sample_range": 0.7}
DYNAMIC = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 3.0}
V = {"prediction_type": "v_prediction"}
EXACT = [
    ("DDIMScheduler", {}),  # which clips
    ("DDIMScheduler", CLIP),
    ("DDIMScheduler", DYNAMIC),
    ("DDIMScheduler", {"clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False}),
    ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    ("DDIMScheduler", {"timestep_spacing": "trailing", "set_alpha_to_one": False, "prediction_type": "sample"}),
    ("DDIMScheduler", {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, **V}),
    ("DDIMParallelScheduler", CLIP),
    ("DDPMScheduler", {}),
    ("DDPMScheduler", {"variance_type": "fixed_large", "clip_sample": False, **V}),
    ("DDPMScheduler", {"variance_type": "fixed_small_log", "timestep_spacing": "trailing", **DYNAMIC}),
    ("DDPMScheduler", {"timestep_spacing": "linspace", "beta_schedule": "squaredcos_cap_v2", **V}),
    ("DDPMParallelScheduler", {"steps_offset": 1}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"timestep_spacing": "leading", "steps_offset": 1, **DYNAMIC}),
    ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing", "solver_order": 1, **V}),
    ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", **V}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}),
    ("UniPCMultistepScheduler", {}),
    ("UniPCMultistepScheduler", {"timestep_spacing": "trailing", **DYNAMIC}),
    ("UniPCMultistepScheduler", {"solver_type": "bh1", "final_sigmas_type": "sigma_min", "lower_order_final": False}),
    ("UniPCMultistepScheduler", {"timestep_spacing": "leading", "steps_offset": 1, **V}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "trailing", "final_sigmas_type": "sigma_min", **V}),
    ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "leading"}),
    ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing", **V}),
]


@pytest.mark.parametrize(("kind", "settings"), EXACT)
def test_the_images_are_those_of_diffusers(make_folder, monkeypatch, kind, settings):
    folder = make_folder(kind, settings)
    assert difference(folder) == ""
    assert relative(*images(folder, monkeypatch)) < 2e-4


def test_every_class_that_diffusers_calls_compatible_is_known():
    compatible = {each.name for each in diffusers.schedulers.scheduling_utils.KarrasDiffusionSchedulers}
    assert compatible - set(CLASSES) == {"EDMEulerScheduler"}  # which has no betas
    solved = {kind for kind, scheduler in CLASSES.items() if scheduler.nearest is None}
    assert solved == {kind for kind, _ in EXACT} | {"CogVideoXDDIMScheduler"}  # of clips: test_diffusers_folder


CHOICES = {
    "timestep_spacing": ["leading", "trailing", "linspace"],
    "steps_offset": [0, 1, 2],
    "set_alpha_to_one": [True, False],
    "clip_sample": [True, False],
    "clip_sample_range": [0.5, 1.0],
    "thresholding": [True, False, False],
    "dynamic_thresholding_ratio": [0.8, 0.995],
    "sample_max_value": [1.0, 2.0],
    "variance_type": ["fixed_small", "fixed_large", "fixed_small_log"],
    "solver_order": [1, 2, 3],
    "algorithm_type": ["dpmsolver++", "sde-dpmsolver++"],
    "lower_order_final": [True, False],
    "euler_at_final": [False, False, True],
    "final_sigmas_type": ["zero", "sigma_min"],
    "predict_x0": [True, True, False],
    "use_karras_sigmas": [False, False, True],
    "use_lu_lambdas": [False, False, True],
    "prediction_type": ["epsilon", "v_prediction", "sample"],
    "beta_schedule": ["linear", "squaredcos_cap_v2"],
}


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in EXACT}))
def test_where_nothing_is_reported_the_images_are_equal(make_folder, monkeypatch, kind):
    """Random settings of each class."""
    choose, compared = random.Random(kind), 0
    for _ in range(8):
        names = [name for name in CHOICES if name in CLASSES[kind].settings]
        settings = {name: choose.choice(CHOICES[name]) for name in names if choose.random() < 0.6}
        if kind == "UniPCMultistepScheduler" and settings.get("final_sigmas_type") != "sigma_min":
            settings["lower_order_final"] = True  # diffusers divides by 0 otherwise
        if settings.get("use_karras_sigmas"):
            settings.pop("use_lu_lambdas", None)
        if kind in SCALED and settings.get("prediction_type") == "sample":
            del settings["prediction_type"]  # which diffusers does not have there
        folder = make_folder(kind, settings)
        if not difference(folder):
            compared += 1
            assert relative(*images(folder, monkeypatch)) < 2e-4, settings
    assert compared >= 2


def test_clipping_changes_the_image(make_folder, monkeypatch):
    """Otherwise, the tests above would not detect that it is missing."""
    on, off = (images(make_folder("DDIMScheduler", {"clip_sample": clip}), monkeypatch)[0] for clip in (True, False))
    assert relative(on, off) > 0.1


def test_the_pipeline_drops_a_learned_variance_and_so_does_the_load(make_folder, monkeypatch):
    folder = make_folder("DDPMScheduler", {"clip_sample": False}, channels=6)
    sampler = interop.read(folder).config.sampling.sampler
    assert (sampler.kind, sampler.variance) == ("ancestral", "posterior")
    assert relative(*images(folder, monkeypatch)) < 2e-4
    large = make_folder("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_large"}, channels=6)
    assert interop.read(large).config.sampling.sampler.variance == "beta"
    assert relative(*images(large, monkeypatch)) < 2e-4
    learned = make_folder("DDPMScheduler", {"clip_sample": False, "variance_type": "learned_range"}, channels=6)
    assert interop.read(learned).config.sampling.sampler.variance is None
    assert relative(*images(learned, monkeypatch, learned=True)) < 2e-4


@pytest.mark.parametrize(
    ("kind", "settings", "sampler", "reported"),
    [
        ("PNDMScheduler", {}, "dpm++", "the solver of PNDMScheduler; Tessera samples with dpm++"),
        ("HeunDiscreteScheduler", {}, "heun", "the solver of HeunDiscreteScheduler"),
        ("DPMSolverSinglestepScheduler", {}, "dpm++", "the solver of DPMSolverSinglestepScheduler"),
        ("LCMScheduler", {"beta_schedule": "linear"}, "ddim", "the solver of LCMScheduler; Tessera samples with ddim"),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, "dpm++", "half of the second difference's integral"),
        ("DPMSolverMultistepScheduler", {"solver_type": "heun"}, "dpm++", "solver_type heun"),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "dpm++", "times between trained steps"),
        ("DPMSolverMultistepScheduler", {"use_beta_sigmas": True}, "dpm++", "use_beta_sigmas True"),
        ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -5.1}, "dpm++", "lambda_min_clipped -5.1"),
        ("UniPCMultistepScheduler", {"predict_x0": False}, "unipc", "predict_x0 False"),
        ("UniPCMultistepScheduler", {"disable_corrector": [0]}, "unipc", "disable_corrector [0]"),
        ("UniPCMultistepScheduler", {"solver_order": 3}, "unipc", "solver_order 3: diffusers lowers it to 2"),
        ("EulerDiscreteScheduler", {}, "euler", "Tessera rounds to trained steps"),
        ("DDIMScheduler", {"timestep_spacing": "linspace"}, "ddim", "steps back by 1000 // steps"),
        ("DDIMScheduler", {"set_alpha_to_one": False}, "ddim", "a last step that only limits x0"),
        (
            "DDPMScheduler",
            {"variance_type": "fixed_large", "steps_offset": 1},
            "ancestral",
            "adds noise after the last",
        ),
        ("DDPMScheduler", {"thresholding": True, "sample_max_value": 0.5}, "ancestral", "sample_max_value 0.5"),
    ],
)
def test_what_is_not_repeated_is_reported_by_name(make_folder, kind, settings, sampler, reported):
    read = interop.read(make_folder(kind, settings))
    assert read.config.sampling.sampler.kind == sampler
    assert reported in (read.config.provenance.not_converted or "")


@pytest.mark.parametrize("kind", ["HeunDiscreteScheduler", "LMSDiscreteScheduler", "DEISMultistepScheduler"])
def test_the_nearest_solver_is_near(make_folder, monkeypatch, kind):
    """Another method of the same equation: the images are near, not equal."""
    assert relative(*images(make_folder(kind, {"timestep_spacing": "trailing", **V}), monkeypatch, 100)) < 0.05


@pytest.mark.parametrize("spacing", ["karras", "exponential"])
def test_noise_levels_that_do_not_fall_on_steps_are_near(make_folder, monkeypatch, spacing):
    folder = make_folder("DPMSolverMultistepScheduler", {f"use_{spacing}_sigmas": True, **V})
    assert interop.read(folder).config.sampling.timestep_spacing.kind == {"exponential": "logsnr"}.get(spacing, spacing)
    assert relative(*images(folder, monkeypatch)) < 0.02


def test_settings_that_a_class_does_not_have_are_ignored_as_diffusers_does(make_folder):
    """The file of a scheduler that was made from another class's keeps the settings of both."""
    edit = {"clip_sample": True, "variance_type": "fixed_large", "skip_prk_steps": True, "set_alpha_to_one": False}
    read = interop.read(make_folder("DPMSolverMultistepScheduler", {}, edit=edit))
    assert (read.config.sampling.clipping.kind, read.config.provenance.not_converted) == ("none", None)
    assert read.config.sampling.timestep_spacing.end == "data"


def test_defaults_are_those_of_the_class(make_folder):
    dropped = {
        "clip_sample": ...,
        "timestep_spacing": ...,
        "thresholding": ...,
        "solver_order": ...,
        "solver_type": ...,
    }
    for kind, clipping, spacing in (
        ("DDIMScheduler", "range", "leading"),
        ("DDPMScheduler", "range", "leading"),
        ("UniPCMultistepScheduler", "none", "uniform"),
        ("DPMSolverMultistepScheduler", "none", "uniform"),
    ):
        sampling = interop.read(make_folder(kind, {}, edit=dropped)).config.sampling
        assert (sampling.clipping.kind, sampling.timestep_spacing.kind) == (clipping, spacing)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"clip_sample": "often"}, "clip_sample"),
        ({"dynamic_thresholding_ratio": 3}, "dynamic_thresholding_ratio"),
        ({"steps_offset": -1}, "steps_offset"),
        ({"timestep_spacing": "random"}, "timestep_spacing"),
    ],
)
def test_invalid_settings_are_named(make_folder, changes, named):
    with pytest.raises(TesseraError, match=named):
        interop.read(make_folder("DDIMScheduler", {}, edit=changes))


@pytest.mark.parametrize(
    "sampling",
    [
        {"clipping": {"kind": "range", "range": 0.8}, "timestep_spacing": "leading"},
        {"clipping": {"kind": "dynamic", "quantile": 0.9, "max_value": 2.0}, "timestep_spacing": "trailing"},
        {"timestep_spacing": {"kind": "leading", "offset": 1, "end": "first-step"}},
    ],
)
def test_an_export_keeps_clipping_and_the_grid(make_model, tmp_path, sampling):
    model = make_model(
        {**NETWORK, "out_channels": 6}, {"prediction": "epsilon"}, sampling={"num_steps": 50, **sampling}
    )
    interop.write(model, tmp_path / "pipe")
    read = interop.read(tmp_path / "pipe").config.sampling
    assert (read.clipping, read.timestep_spacing) == (
        model.config.sampling.clipping,
        model.config.sampling.timestep_spacing,
    )


def test_the_grid_of_karras_covers_the_noise_levels_of_a_process_that_ends_in_pure_noise():
    diffusion = GaussianDiffusionConfig(prediction="v", zero_terminal_snr=True)
    scheduler = SchedulerConfig(use_karras_sigmas=True, rescale_betas_zero_snr=True)
    config, _ = sampling_config(scheduler, "DPMSolverMultistepScheduler", diffusion, 20)
    assert config.timestep_spacing.sigma_max == 4096
