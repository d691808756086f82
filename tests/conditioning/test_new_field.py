"""A new kind of conditioning is one field of `Condition`: everything else passes it on without knowing it.

The fields here are added by a subclass, and a network records what reaches it. Each test sends them through one part
and fails if that part drops, ignores or mixes them up.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tessera import generation
from tessera.bundle import BundleConfig, Model
from tessera.conditioning import Condition, ConditionField, condition_field
from tessera.data import Loader
from tessera.data.digits import DigitsConfig
from tessera.errors import TesseraError
from tessera.evaluation import suite
from tessera.evaluation.features import load_extractor
from tessera.generation import SampleRequest
from tessera.generation.bulk import BulkSamples, bulk_request, generate_shards
from tessera.models.dit import DiT, DiTConfig
from tessera.runtime import Distributed
from tessera.sampling import DenoiserRows, Guidance, RowDenoiser
from tessera.studies.tuning.tuner import Tuner, TuningConfig
from tessera.training.recipe import Recipe
from tessera.training.run import build_run
from tessera.training.step import train_step

CPU = torch.device("cpu")


class NotesField(ConditionField):
    """A list of numbers for each image, of any length: float32 [B, L]."""

    def example(self, num_rows: int, network: Any) -> Tensor:
        return torch.ones(num_rows, 3)

    def load(self, dataset: Any, samples: Sequence[int], positions: Tensor) -> Tensor:
        return torch.tensor([[float(sample), 1.0] for sample in samples])

    def encode(self, inputs: Sequence[Sequence[float]], model: Any) -> Tensor:
        rows = [torch.as_tensor(row, dtype=torch.float32) for row in inputs]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def default_inputs(self, seeds: Sequence[int], policy: str, model: Any) -> list[list[float]]:
        return [[1.0 + seed % 7, 0.5] for seed in seeds]

    def hint(self, model: Any) -> str:
        return "condition={'notes': [[1.0, 2.0]]}"


class ToneField(ConditionField):
    """One of a few whole numbers, int64 [B]; -1 for none."""

    dtype, null, discrete = torch.int64, -1, True

    def example(self, num_rows: int, network: Any) -> Tensor:
        return torch.zeros(num_rows, dtype=torch.int64)

    def load(self, dataset: Any, samples: Sequence[int], positions: Tensor) -> Tensor:
        return torch.tensor([sample % 5 for sample in samples])

    def encode(self, inputs: Sequence[int], model: Any) -> Tensor:
        return torch.tensor(list(inputs))

    def default_inputs(self, seeds: Sequence[int], policy: str, model: Any) -> list[int]:
        return [seed % 5 for seed in seeds]


@dataclass(frozen=True)
class NotesCondition(Condition):
    extra: Tensor | None = condition_field(NotesField())


@dataclass(frozen=True)
class ToneCondition(Condition):
    extra: Tensor | None = condition_field(ToneField())


class ExtraEmbedder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(1, width)
        self.seen: list[list[float]] = []

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.normal_(self.linear.weight, std=0.3)

    def forward(self, extra: Tensor) -> Tensor:
        amount = extra.float() if extra.ndim == 1 else extra.sum(dim=1)
        self.seen.append(amount.tolist())
        return self.linear(amount[:, None])


class ExtraConfig(DiTConfig):
    condition_type: ClassVar[type[Condition]] = NotesCondition

    @property
    def condition_fields(self) -> tuple[str, ...]:
        return (*super().condition_fields, "extra")

    def build(self) -> "ExtraDiT":
        return ExtraDiT(self)


class ToneConfig(ExtraConfig):
    condition_type: ClassVar[type[Condition]] = ToneCondition


class ExtraDiT(DiT):
    def __init__(self, config: ExtraConfig) -> None:
        nn.Module.__init__(self)
        object.__setattr__(self, "_extra_width", config.hidden_size)
        super().__init__(config)

    def reset_parameters(self) -> None:
        if not hasattr(self, "extra_embedder"):
            self.extra_embedder = ExtraEmbedder(self.config.hidden_size)
        super().reset_parameters()

    def embed_condition(self, t, condition, grid):
        context = super().embed_condition(t, condition, grid)
        extra = self.extra_embedder(condition.extra)[:, None]
        return replace(context, c=context.c + extra, cond_tokens=torch.cat((context.cond_tokens, extra), dim=1))


SIZES = {
    "input_size": 8, "in_channels": 1, "out_channels": 1, "num_classes": 10, "patch_size": 4, "depth": 2,
    "hidden_size": 32, "num_heads": 2,
}  # fmt: skip
CONFIGS = pytest.mark.parametrize("config_type", [ExtraConfig, ToneConfig], ids=["notes", "tone"])


def value(config_type: type[ExtraConfig], number: int) -> Any:
    """An input whose amount is the number."""
    return number if config_type is ToneConfig else [number - 0.5, 0.5]


@pytest.fixture
def make(randomise):
    def build(config_type: type[ExtraConfig], **changes: Any) -> Model:
        network = config_type.model_validate({**SIZES, **changes})
        config = BundleConfig(
            network=network, diffusion={"kind": "flow"}, codec={"kind": "pixels", "channels": 1},
            sampling={"num_steps": 4, "sampler": "ddim"},
        )  # fmt: skip
        assert type(config.network) is config_type
        return Model(config, randomise(network.build()))

    return build


def seen(model: Model) -> set[float]:
    """All amounts that the network was given since the last time."""
    amounts = {round(amount, 3) for call in model.network.extra_embedder.seen for amount in call}
    model.network.extra_embedder.seen.clear()
    return amounts


def different(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.abs(one.astype(int) - other.astype(int)).max() > 2)


def recipe_of(config_type: type[ExtraConfig], run_dir, **training: Any) -> Recipe:
    """A recipe on digits whose network has the new field."""
    data = {
        "data": {"kind": "digits"}, "codec": "pixels", "diffusion": {"kind": "flow"}, "run_dir": str(run_dir),
        "network": {key: SIZES[key] for key in ("patch_size", "depth", "hidden_size", "num_heads")},
        "training": {"steps": 2, "global_batch_size": 8, "device": "cpu", "tensorboard": False, **training},
    }  # fmt: skip
    recipe = Recipe.model_validate(data)
    network = config_type.model_validate(data["network"])
    return recipe.model_copy(update={"network": network})


@CONFIGS
def test_the_loader_reads_it(config_type):
    dataset = DigitsConfig().open()
    loader = Loader(dataset, 6, seed=0, condition_type=config_type.condition_type, condition_fields=("label", "extra"))
    samples = loader.order.batch(0).tolist()
    condition = next(loader.batches()).condition
    assert type(condition) is config_type.condition_type
    assert condition.label.tolist() == [dataset.label(sample) for sample in samples]
    expected = [[float(s), 1.0] for s in samples] if config_type is ExtraConfig else [s % 5 for s in samples]
    assert condition.extra.tolist() == expected


@CONFIGS
def test_training_steps_learn_it_and_drop_it(config_type, tmp_path):
    run = build_run(recipe_of(config_type, tmp_path, condition_dropout=0.3, field_dropout={"extra": 0.3}))
    embedder, state = run.network.extra_embedder, run.state
    before = embedder.linear.weight.clone()
    # A new DiT ignores its modulation until the second step.
    totals, batches = [], run.loader.batches()
    for _ in range(30):
        batch = next(batches)
        train_step(state, batch, run.objective, 8, accumulation_steps=2)
        expected = batch.condition.extra
        totals += zip([amount for call in embedder.seen for amount in call], expected.tolist(), strict=True)
        embedder.seen.clear()
    assert not torch.equal(before, embedder.linear.weight)
    amounts = [(got, sum(given) if isinstance(given, list) else float(given)) for got, given in totals]
    null = -1.0 if config_type is ToneConfig else 0.0
    dropped = [got == null and given != null for got, given in amounts]
    assert all(got == given for (got, given), lost in zip(amounts, dropped) if not lost)
    rate = sum(dropped) / sum(given != null for _, given in amounts)
    assert rate == pytest.approx(1 - 0.7 * 0.7, abs=0.1)  # of 240: both dropouts, each by itself


@CONFIGS
def test_a_whole_run(config_type, tmp_path):
    """Loop, grid of samples, evaluation during training, probe and checkpoint."""
    from tessera.training import loop

    recipe = recipe_of(
        config_type, tmp_path / "run", sample_every=1, checkpoint_every=2, health_every=1, log_every=1
    )  # fmt: skip
    evaluation = recipe.evaluation.model_copy(update={"at": (2,), "num_samples": 50, "metrics": ("fd",)})
    loop.train(recipe.model_copy(update={"evaluation": evaluation}))
    assert list((tmp_path / "run/evaluation").glob("step-*.json"))
    assert list((tmp_path / "run/samples").glob("*.png"))


@CONFIGS
def test_generated_images_depend_on_it_alone_and_in_a_batch(config_type, make):
    """Also with precomputed modulation, which a CPU uses."""
    model = make(config_type)
    values = [value(config_type, number) for number in (1, 2, 3)]
    images = generation.generate(model, [4], [7], condition={"extra": values})
    assert seen(model) == {1.0, 2.0, 3.0}
    assert different(images[0], images[1])
    assert different(images[1], images[2])
    for row in range(3):
        alone = generation.generate(model, [4], [7], condition={"extra": [values[row]]})
        assert not different(alone[0], images[row])


@torch.no_grad()
@CONFIGS
def test_modulation_is_precomputed_only_for_what_has_a_key(config_type, make, monkeypatch):
    from tessera.generation import denoiser

    model, tables = make(config_type), []
    original = denoiser.PrecomputedModulation

    def recorded(*args):
        tables.append(args)
        return original(*args)

    recorded.table_bytes = original.table_bytes
    monkeypatch.setattr(denoiser, "PrecomputedModulation", recorded)
    request = SampleRequest([1, 2], {"label": [4, 4], "extra": [value(config_type, 1), value(config_type, 3)]}, 2.0)
    images = generation.generate_request(model, request)
    assert len(tables) == (config_type is ToneConfig)
    monkeypatch.setattr(denoiser, "MODULATION_TABLE_BYTES", -1)
    assert not different(generation.generate_request(model, request), images)


@torch.no_grad()
@CONFIGS
def test_guidance_has_a_scale_for_it(config_type, make):
    """cond + (s - 1) (cond - all null) + (e - 1) (cond - extra null), from three outputs of the network."""
    model = make(config_type)
    network, x, t = model.network, torch.randn(2, 1, 8, 8), torch.tensor([0.3, 0.8])
    rules = config_type.condition_type.rules()["extra"]
    extra = rules.encode([value(config_type, 2), value(config_type, 3)], None)
    condition = config_type.condition_type(label=torch.tensor([1, 2]), extra=extra)
    time = model.diffusion.model_time(t)
    cond, bare, without = (network(x, time, each) for each in (condition, condition.null(), condition.null(["extra"])))
    assert condition.null(["extra"]).label.tolist() == [1, 2]
    conditions = [condition, condition.null(), condition.null(["extra"])]
    rows = DenoiserRows.build(conditions, Guidance.build(2, torch.tensor([[2.0, 4.0]])), [network] * 3, x)
    raw, _ = RowDenoiser([network] * 3, model.diffusion).raw(x, t, rows)
    expected = cond + (cond - bare) + 3 * (cond - without)
    torch.testing.assert_close(raw, expected, rtol=1e-4, atol=1e-4)
    # and as a setting
    options = {"condition": {"extra": [value(config_type, 2)]}, "guidance_scale": 2.0}
    plain = generation.generate(model, [4], [7], **options)
    guided = generation.generate(model, [4], [7], guidance_scales={"extra": 4.0}, **options)
    assert different(plain, guided)


@CONFIGS
def test_caching_keeps_it(config_type, make):
    model, caching = make(config_type, depth=3), {"kind": "first-block", "threshold": 0.3}
    values = [value(config_type, number) for number in (1, 4)]
    options = {"guidance_scale": 2.0, "num_steps": 10, "caching": caching}
    images = generation.generate(model, [4], [7], condition={"extra": values}, **options)
    assert different(images[0], images[1])
    for row in range(2):
        alone = generation.generate(model, [4], [7], condition={"extra": [values[row]]}, **options)
        assert not different(alone[0], images[row])


@CONFIGS
def test_bulk_sampling_chooses_it_and_records_it(config_type, make, tmp_path):
    model = make(config_type)
    request = bulk_request(model, 12, "balanced")
    samples = BulkSamples(model, request, tmp_path / "a", batch_size=5)
    generate_shards(samples, Distributed())
    rules = config_type.condition_type.rules()["extra"]
    inputs = rules.default_inputs(range(12), "balanced", model.config)
    expected = generation.generate(model, [i % 10 for i in range(12)], range(12), condition={"extra": inputs})
    assert not different(samples.shard(0).images, expected)
    # Another value is another protocol, and other images.
    other = replace(request, condition={**request.condition, "extra": inputs[::-1]})
    changed = BulkSamples(model, other, tmp_path / "b", batch_size=5)
    assert changed.sampling_protocol != samples.sampling_protocol
    assert different(changed.shard(0).images, expected)
    with pytest.raises(TesseraError, match="holds other work"):
        BulkSamples(model, other, tmp_path / "a").begin(Distributed())


@CONFIGS
def test_evaluation_and_tuning_sample_with_it(config_type, make, tmp_path):
    model, data = make(config_type), DigitsConfig()
    expected = {0.0, 1.0, 2.0, 3.0, 4.0} if config_type is ToneConfig else {number + 1.5 for number in range(7)}
    extractor = load_extractor("digits", CPU)
    samples = BulkSamples(model, bulk_request(model, 60, "balanced"), tmp_path / "samples")
    evaluation = suite.evaluate(samples, data, extractor, tmp_path, ["fd"])
    assert [score.metric for score in evaluation.scores] == ["fd"]
    assert seen(model) == expected
    tuner = Tuner(model, data, extractor, tmp_path / "tune", TuningConfig(num_samples=60), log=lambda text: None)
    tuner.claim()
    trial = tuner.trial(model.config.sampling, "baseline")
    assert trial.fd.value == pytest.approx(evaluation.scores[0].value)
    assert seen(model) == expected


@torch.no_grad()
@CONFIGS
def test_rows_with_different_values_share_network_calls(config_type, make):
    model = make(config_type)
    sampler = generation.ContinuousSampler(model)
    notes = value(config_type, 2) if config_type is ToneConfig else [1.0, 0.5, 0.5]  # longer than the other
    requests = [
        SampleRequest([1], {"label": [3], "extra": [value(config_type, 1)]}, 2.0),
        SampleRequest([2], {"label": [5], "extra": [notes]}, settings={"guidance_scales": {"extra": 3.0}}),
    ]
    done = {}
    sampler.add(requests[0], ["0"])
    done |= sampler.step()
    sampler.add(requests[1], ["1"])
    while sampler.batch.num_rows:
        done |= sampler.step()
    for number, request in enumerate(requests):
        *_, last = generation.sample_steps(model, request.resolve(model))
        torch.testing.assert_close(done[str(number)], last.x[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ({}, r"this model needs classes: it has 10 classes; .*; extra: condition=\{'notes'"),
        ({"label": [1]}, r"this model needs extra: condition=\{'notes'"),
        ({"label": [1], "extra": [[1.0]], "mood": [3]}, "is conditioned on extra, classes: leave out mood"),
        ({"label": [1, 2, 3], "extra": [[1.0], [2.0]]}, "3 images are requested, but there are 2 extra"),
        ({"label": [1], "extra": []}, "nothing to generate"),
    ],
)
def test_wrong_conditions(condition, words, make):
    with pytest.raises(TesseraError, match=words):
        generation.generate(make(ExtraConfig), condition=condition)


def test_a_scale_for_a_condition_that_the_model_does_not_have(make):
    with pytest.raises(TesseraError, match="guidance_scales has mood; .* with a null value: label, extra"):
        generation.generate(make(ExtraConfig), [1], condition={"extra": [[1.0]]}, guidance_scales={"mood": 2.0})


def test_values_of_some_rows_only_are_an_error():
    rows = NotesCondition(label=torch.tensor([1]), extra=torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"with and without NotesCondition\.extra"):
        Condition.cat((rows, NotesCondition(label=torch.tensor([1]))))
