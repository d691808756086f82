"""Distillation: the targets against closed forms and derivatives, and students that are trained, saved and resumed."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tessera import bundle, generation
from tessera.bundle import BundleConfig, Model
from tessera.codecs import PixelsConfig
from tessera.conditioning import Condition
from tessera.diffusion import FlowMatchingConfig, GaussianDiffusionConfig
from tessera.diffusion.gaussian import CosineBetas
from tessera.errors import TesseraError
from tessera.interop import official
from tessera.models.dit import DiTConfig
from tessera.monitoring import report
from tessera.sampling import SamplingConfig
from tessera.times import expand
from tessera.training import loop
from tessera.training.distillation import AlphaFlow, Distillation, DistillationConfig, MeanFlow, Shortcut, Teacher
from tessera.training.recipe import Recipe, read_recipe
from tessera.training.run import build_run
from tessera.training.students import distillation_recipe

MEAN, STD = 0.7, 0.5  # of data that are one normal distribution, whose paths are known
FLOW = {"kind": "flow"}
STUDENT = ("training.steps=4", "sampling.num_steps=1")


class NormalData(torch.nn.Module):
    """The best network for normal data, under a diffusion process: E[eps - x0 | x], or E[eps | x]."""

    def __init__(self, process, times_of, prediction: str) -> None:
        super().__init__()
        self.process, self.times_of, self.prediction = process, times_of, prediction

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        t = self.times_of(t)
        alpha, sigma = expand(self.process.alpha(t), x), expand(self.process.sigma(t), x)
        variance = alpha**2 * STD**2 + sigma**2
        x0 = MEAN + alpha * STD**2 / variance * (x - alpha * MEAN)
        eps = sigma / variance * (x - alpha * MEAN)
        return {"velocity": eps - x0, "epsilon": eps}[self.prediction]


def std(t: Tensor) -> Tensor:
    return ((1 - t) ** 2 * STD**2 + t**2).sqrt()


def exact_end(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Where the probability flow of normal data leads from x at t: the same quantile."""
    t, s = (each.view(-1, 1, 1, 1).double() for each in (t, s))
    return (1 - s) * MEAN + std(s) / std(t) * (x - (1 - t) * MEAN)


def exact_average(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    return (x - exact_end(x, t, s)) / (t - s).view(-1, 1, 1, 1).double()


def exact_velocity(x: Tensor, t: Tensor) -> Tensor:
    return NormalData(FlowMatchingConfig().build(), lambda t: t, "velocity")(x, t, Condition())


def points(count: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    times = torch.rand(count, 2, generator=generator, dtype=torch.float64).sort(dim=1).values
    x = torch.randn(count, 2, 4, 4, generator=generator, dtype=torch.float64)
    return x, times[:, 1] * 0.9 + 0.1, times[:, 0] * 0.9


def made(diffusion, network) -> Model:
    config = BundleConfig(network=DiTConfig(), diffusion=diffusion, codec=PixelsConfig())
    return Model(config, network)


@pytest.mark.parametrize(
    ("config", "prediction"),
    [
        (FlowMatchingConfig(), "velocity"),
        (FlowMatchingConfig(path="gvp", prediction="epsilon", loss="epsilon"), "epsilon"),
        (GaussianDiffusionConfig(schedule=CosineBetas(), prediction="epsilon", variance="posterior"), "epsilon"),
    ],
    ids=["flow", "gvp", "gaussian"],
)
def test_the_velocity_of_every_process_is_that_of_the_linear_path(config, prediction):
    """One distribution of data has one probability flow, whatever process its network was trained with."""
    process = config.build()
    grid = torch.linspace(1e-4, 1, 20001, dtype=torch.float64)
    network_times = process.model_time(grid)
    order = network_times.argsort()

    def times_of(t: Tensor) -> Tensor:  # the inverse of model_time
        return grid[order][torch.searchsorted(network_times[order], t.contiguous()).clamp(max=len(grid) - 1)]

    model = made(config, NormalData(process, times_of, prediction))
    teacher = Teacher(model, SamplingConfig())
    x, t, _ = points()
    expected = exact_velocity(x, t)
    error = (teacher.velocity(x, t, Condition()) - expected).abs().amax() / expected.abs().amax()
    assert error < (1e-3 if config.kind == "flow" else 1e-2)  # the times of a Gaussian process are whole numbers


def test_heuns_method_finds_the_exact_average():
    flow = FlowMatchingConfig()
    network = NormalData(flow.build(), lambda t: t.double() / 1000, "velocity")
    teacher = Teacher(made(flow, network), SamplingConfig())
    x, t, s = points()
    errors = [
        (teacher.average_velocity(x, t, s, Condition(), steps) - exact_average(x, t, s)).abs().amax()
        for steps in (8, 16, 32)
    ]
    assert errors[2] < 1e-3
    assert 3 < errors[0] / errors[1] < 5  # second order
    assert 3 < errors[1] / errors[2] < 5


def test_the_exact_average_is_the_fixed_point_of_shortcut_and_mean_flow():
    x, t, s = points()
    exact, v, progress = exact_average(x, t, s), exact_velocity(x, t), torch.zeros(len(t))
    halves = Shortcut().target(exact_average, x, t, s, v, progress)
    torch.testing.assert_close(halves, exact)
    by_derivative = MeanFlow().target(exact_average, x, t, s, v, progress)
    torch.testing.assert_close(by_derivative, exact)


def test_alpha_flow_is_between_flow_matching_and_mean_flow():
    x, t, s = points()
    exact, v, progress = exact_average(x, t, s), exact_velocity(x, t), torch.zeros(len(t))

    def target(alpha: float) -> Tensor:
        return AlphaFlow(start=alpha, end=alpha).target(exact_average, x, t, s, v, progress)

    torch.testing.assert_close(target(1 - 1e-9), v)
    errors = [float((target(alpha) - exact).abs().amax()) for alpha in (0.2, 0.1, 0.05)]
    assert 3 < errors[0] / errors[1] < 5  # second order: the error of one Euler step over alpha (t - s)
    assert 3 < errors[1] / errors[2] < 5


def test_derivative_finite_difference_and_discrete_target_agree_on_a_network(randomise):
    """float64. The discrete target of a small alpha is u + alpha times the error that mean-flow removes."""
    config = DiTConfig(
        input_size=(4, 4), in_channels=2, out_channels=2, num_classes=3, patch_size=2, depth=2, hidden_size=16,
        num_heads=2, step_size_embedding=True,
    )  # fmt: skip
    network = randomise(config.build()).double()
    network.t_embedder.double()
    flow = FlowMatchingConfig().build()
    x, t, s = points(4)
    condition, v = Condition(label=torch.tensor([0, 1, 2, 0])), torch.randn_like(x)
    distillation = Distillation(DistillationConfig(teacher="-"), None, flow, 0, 1, None)  # pyright: ignore[reportArgumentType]

    def average(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return distillation.average(network, x, t, s, condition).double()

    progress = torch.zeros(len(t))
    with torch.no_grad():
        by_derivative = MeanFlow().target(average, x, t, s, v, progress)
        delta = 2e-5  # the network's times are up to 1000, in float32
        difference = (average(x + delta * v, t + delta, s) - average(x - delta * v, t - delta, s)) / (2 * delta)
        by_difference = v - (t - s).view(-1, 1, 1, 1) * difference
        alpha = 4e-5
        discrete = AlphaFlow(start=alpha, end=alpha).target(average, x, t, s, v, progress)
        by_limit = average(x, t, s) + (discrete - average(x, t, s)) / alpha
    scale = by_derivative.abs().amax()
    assert (by_difference - by_derivative).abs().amax() / scale < 2e-2
    assert (by_limit - by_derivative).abs().amax() / scale < 6e-2


def test_a_step_of_length_0_is_the_flow_network_bit_for_bit(make_model):
    network = make_model({"step_size_embedding": True, "block": "rope-swiglu"}).network
    x, t, condition = torch.randn(5, 1, 8, 8), torch.rand(5) * 1000, Condition(label=torch.tensor([0, 1, 2, 0, 1]))
    with torch.no_grad():
        plain = network(x, t, condition)
        assert torch.equal(network(x, t, replace(condition, step_size=torch.zeros(5))), plain)
        assert not torch.equal(network(x, t, replace(condition, step_size=torch.full((5,), 0.5))), plain)
        network.step_size_embedder.reset_parameters()  # as a student begins
        assert torch.equal(network(x, t, replace(condition, step_size=torch.rand(5))), plain)


def test_steps_of_training_cover_those_of_sampling():
    uniform = torch.rand(20000, 2, generator=torch.Generator().manual_seed(0))
    for rule in (AlphaFlow(), MeanFlow(), Shortcut()):
        t, s = rule.steps(uniform)
        assert bool((s < t).all())
        assert float(s.min()) >= 0
        assert float(t.max()) <= 1
        assert ((t > 0.9) & (s < 0.1)).double().mean() > 0.015  # one step from noise to data
        for count in (1, 2, 4):
            for k in range(count):
                near = ((t - (1 - k / count)).abs() < 0.1) & ((s - (1 - (k + 1) / count)).abs() < 0.1)
                assert near.double().mean() > 0.01, (rule.kind, count, k)
    t, s = Shortcut(smallest=8).steps(uniform)
    assert set((t - s).tolist()) == {1.0, 0.5, 0.25}
    assert bool((t / (t - s) % 1 == 0).all())


def test_alpha_falls_on_a_straight_line_in_logarithms():
    rule = AlphaFlow(start=1.0, end=0.01, falling=0.5)
    expected = torch.tensor([1.0, 0.1, 0.01, 0.01], dtype=torch.float64)
    torch.testing.assert_close(rule.alpha(torch.tensor([0, 0.25, 0.5, 1.0])), expected)


# Runs


@pytest.fixture
def teacher(tiny):
    return loop.train(tiny("teacher", "training.steps=6", "diffusion=flow", "sampling.guidance_scale=2"))


def distilled(teacher, name: str, *overrides: str):
    return loop.train(distillation_recipe(str(teacher), str(teacher.parent / name), [*STUDENT, *overrides]))


@pytest.mark.run
@pytest.mark.parametrize(
    "target",
    ["alpha-flow", pytest.param("mean-flow", marks=pytest.mark.slow), pytest.param("shortcut", marks=pytest.mark.slow)],
)
def test_a_student_resumes_bit_for_bit(teacher, state, target):
    setting = f"training.distillation.target={target}"
    whole = distilled(teacher, "whole", setting)
    distilled(teacher, "part", setting, "training.steps=2")
    part = distilled(teacher, "part", setting)
    if target != "alpha-flow":  # whose alpha depends on the number of steps
        assert state(part) == state(whole)
    model = bundle.load(bundle.checkpoints(part)[0])
    assert model.config.network.takes_step_size
    assert model.config.sampling.sampler.kind == "jump"
    assert generation.generate(model, [1], [0]).shape == (1, 8, 8, 1)
    assert generation.generate(model, [1], [0], sampler="euler", num_steps=3).shape == (1, 8, 8, 1)


@pytest.mark.run
def test_the_targets_come_from_the_weight_average(teacher):
    """A change of the average changes the targets of steps alone, and those that current weights have not at all."""
    run = build_run(distillation_recipe(str(teacher), str(teacher.parent / "student"), STUDENT))
    by_average, network, average = run.objective.distillation, run.network, run.ema.network
    assert by_average is not None
    by_current = replace(by_average, ema=None)
    batch = run.loader.load_batch(0)
    x0 = batch.pixels.float() / 127.5 - 1
    noise = torch.randn_like(x0)

    @torch.no_grad()
    def loss(distillation: Distillation, network) -> Tensor:
        return distillation.loss(network, x0, noise, batch.condition, batch.position)[0].mse

    before = loss(by_current, network)
    assert torch.equal(loss(by_average, network), before)  # the average begins as the network
    for parameter, trained in zip(average.parameters(), network.parameters()):
        if trained.requires_grad:  # both share the others
            parameter.mul_(1.5)
    after, (t, s) = loss(by_average, network), by_average.times(batch.position)
    assert torch.equal(after[t == s], before[t == s])  # the teacher's velocity
    assert (after[t > s] != before[t > s]).all()
    assert torch.equal(loss(by_current, network), before)
    assert torch.equal(loss(by_average, average), loss(by_current, average))
    settings = (*STUDENT, "training.distillation.target_weights=current")
    other = build_run(distillation_recipe(str(teacher), str(teacher.parent / "other"), settings))
    assert other.objective.distillation is not None
    assert other.objective.distillation.ema is None


@pytest.mark.run
def test_a_student_begins_as_the_guided_teacher_would(teacher):
    """Before its first step, a student has the weights of the teacher's average, and learns its guided velocity."""
    student = distilled(teacher, "student", "training.optimizer.learning_rate=1e-12", "training.ema.decay=0")
    old, new = (bundle.load(bundle.checkpoints(run)[0]) for run in (teacher, student))
    weights = new.network.state_dict()
    for name, value in old.network.state_dict().items():
        torch.testing.assert_close(weights[name], value)
    assert set(weights) - set(old.network.state_dict()) == {
        "step_size_embedder.mlp.0.weight", "step_size_embedder.mlp.2.weight",
    }  # fmt: skip


@pytest.mark.run
def test_a_quarter_of_the_teachers_flops_by_default(tiny):
    teacher = loop.train(tiny("teacher", "training.steps=100", "diffusion=flow", "sampling.guidance_scale=2"))
    recipe = distillation_recipe(str(teacher), str(teacher.parent / "student"))
    assert recipe.training.steps == 13
    assert recipe.training.optimizer.learning_rate == 0.25 * 1e-3  # the teacher's
    run = build_run(recipe)
    own = run.network.macs()
    # forward and backward, the teacher with and without its condition, and the target of three quarters of the samples
    assert run.macs == pytest.approx(
        (3 * own + 2 * bundle.load(bundle.checkpoints(teacher)[0]).network.macs() + 0.75 * own) / 3
    )
    assert 0.2 < 13 * run.macs / (100 * own) < 0.26


@pytest.mark.run
def test_the_error_of_the_average_velocity_is_logged_and_reported(teacher, tmp_path, capsys):
    student = distilled(teacher, "student", "training.health_every=2")
    assert capsys.readouterr().err.count("error of the average velocity, relative to the teacher's path: ") == 2
    errors = [json.loads(line)["average_velocity_error"] for line in (student / "health.jsonl").open()]
    assert [set(each) for each in errors] == [{"1 to 0", "1 to 0.5", "0.5 to 0", "0.75 to 0.5"}] * 2
    assert all(value > 0 for each in errors for value in each.values())
    report.write(student, Recipe, tmp_path / "report.html")
    assert "Error of the average velocity" in (tmp_path / "report.html").read_text()


def test_the_error_of_an_exact_network_is_0(randomise):
    flow = FlowMatchingConfig()
    network = NormalData(flow.build(), lambda t: t.double() / 1000, "velocity")
    teacher = Teacher(made(flow, network), SamplingConfig())
    distillation = Distillation(DistillationConfig(teacher="-"), teacher, flow.build(), 0, 1, None)

    def exact(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        t = t.double() / 1000
        assert condition.step_size is not None
        return exact_average(x, t, t - condition.step_size)

    x = torch.randn(6, 2, 4, 4, dtype=torch.float64)
    errors = distillation.errors(exact, MEAN + STD * x, torch.randn_like(x), Condition())
    assert max(errors.values()) < 1e-6
    wrong = distillation.errors(network, MEAN + STD * x, torch.randn_like(x), Condition())
    assert min(wrong.values()) > 1e-3


@pytest.mark.run
def test_a_student_is_not_exported_to_formats_without_a_step_size(teacher, tmp_path):
    model = bundle.load(bundle.checkpoints(distilled(teacher, "student"))[0])
    with pytest.raises(TesseraError, match="convert it to a bundle"):
        official.write(model, tmp_path / "model.pt")
    bundle.save(model, tmp_path / "bundle")
    again = bundle.load(tmp_path / "bundle")
    assert (generation.generate(model, [1], [0]) == generation.generate(again, [1], [0])).all()


@pytest.mark.run
def test_a_gaussian_model_can_be_a_teacher(tiny):
    teacher = loop.train(tiny("gaussian", "diffusion.prediction=epsilon"))
    model = bundle.load(bundle.checkpoints(distilled(teacher, "student"))[0])
    assert model.config.diffusion.kind == "flow"
    assert generation.generate(model, [1], [0]).shape == (1, 8, 8, 1)


@pytest.mark.run
def test_what_cannot_be_distilled_is_refused(teacher, tiny):
    student = distilled(teacher, "student")
    with pytest.raises(TesseraError, match="was distilled already"):
        distilled(student, "again")
    with pytest.raises(TesseraError, match="no condition may be dropped"):
        distilled(teacher, "dropped", "training.condition_dropout=0.1")
    with pytest.raises(TesseraError, match="flow matching on a linear path"):
        distilled(teacher, "other", "diffusion=gaussian")
    with pytest.raises(TesseraError, match=r"set sampling\.guidance_scale=1"):
        distilled(teacher, "guided", "sampling.guidance_scale=2")
    with pytest.raises(TesseraError, match="use a power of two"):
        distilled(teacher, "three", "training.distillation.target=shortcut", "sampling.num_steps=3")
    with pytest.raises(TesseraError, match="the sampler jump needs a network"):
        generation.generate(bundle.load(bundle.checkpoints(teacher)[0]), [1], [0], sampler="jump")
    plain = loop.train(
        tiny("plain", "diffusion=flow", "network.learn_null_class=false", "training.condition_dropout=0")
    )
    with pytest.raises(TesseraError, match="needs a teacher with an unconditional output"):
        distilled(plain, "no-null", "training.distillation.guidance_scale=2")


@pytest.mark.run
def test_a_student_has_the_classes_of_its_teacher(teacher, tmp_path):
    """The same number of classes in another order would be learned under wrong names."""
    for number in (1, 0, *range(2, 10)):
        folder = tmp_path / "data" / f"class-{number}"
        folder.mkdir(parents=True)
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(folder / "a.png")
    data = {"kind": "folder", "path": str(tmp_path / "data"), "size": 8, "channels": 1}
    training = {"steps": 2, "global_batch_size": 4, "device": "cpu", "distillation": {"teacher": str(teacher)}}
    recipe = read_recipe({"run_dir": str(tmp_path / "student"), "data": data, "training": training})
    with pytest.raises(TesseraError, match="'class-0' has another number in the teacher or is not in it"):
        build_run(recipe)


def test_every_batch_has_the_same_number_of_velocities_in_long_trainings():
    """Positions above 2^24 are no float32."""
    config = DistillationConfig(teacher="", instantaneous=0.25)
    distillation = Distillation(config, None, FlowMatchingConfig().build(), 0, 2**27, None)  # pyright: ignore
    for first in (0, 2**24, 2**26):
        t, s = distillation.times(torch.arange(first, first + 64))
        assert (t == s).view(-1, 4).sum(dim=1).tolist() == [1] * 16


def test_velocities_are_trained_at_all_times():
    """Also near 1 and 0, where every sampling begins and ends, and the teacher's own times are rare."""
    distillation = Distillation(DistillationConfig(teacher=""), None, FlowMatchingConfig().build(), 0, 4000, None)  # pyright: ignore
    t, s = distillation.times(torch.arange(4000))
    times = t[t == s]
    counts = torch.histc(times.float(), 10, 0, 1) / len(times)
    edges = torch.linspace(0, 1, 11, dtype=torch.float64)
    expected = (2 / torch.pi * edges.sqrt().asin()).diff()
    assert (counts - expected).abs().max() < 0.03
    assert counts.min() > 0.04


@pytest.mark.run
def test_another_teacher_is_refused_when_a_run_resumes(teacher, tiny):
    distilled(teacher, "student", "training.steps=2")
    recipe = bundle.load_config(bundle.checkpoints(teacher.parent / "student")[0]).recipe
    assert recipe is not None
    digest = recipe["training"]["distillation"]["teacher_hash"]
    other = loop.train(tiny("other", "training.steps=3", "diffusion=flow"))
    with pytest.raises(TesseraError, match="has other weights"):
        distilled(other, "student", f"training.distillation.teacher_hash={digest}")
