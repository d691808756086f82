"""Tuning: candidates, acceptance, an interrupted search, and the settings that are written."""

import json

import numpy as np
import pytest
import torch

from tessera import bundle, generation
from tessera.data import DigitsConfig
from tessera.errors import TesseraError
from tessera.evaluation.features import load_extractor
from tessera.evaluation.protocol import Protocol, Score
from tessera.reporting.estimates import Estimate
from tessera.sampling import DDIM, Ancestral, FirstBlockCaching, Heun, SamplingConfig
from tessera.sampling.timesteps import timestep_grid
from tessera.settings import validate
from tessera.studies.tuning import result, search_space, trials
from tessera.studies.tuning import tuner as tuner_module
from tessera.studies.tuning.trials import Trial
from tessera.studies.tuning.tuner import Tuner, TuningConfig

pytest.importorskip("sklearn")
BASELINE = ["sampler=ancestral", "num_steps=12"]
QUICK = {"num_samples": 50, "batch_size": 50, "budget": 60}


@pytest.fixture(scope="session")
def digits():
    return load_extractor("digits", torch.device("cpu"))


@pytest.fixture
def tuner(tiny_model, digits, tmp_path):
    """Tuners of a tiny model whose baseline takes 12 ancestral steps. The log is in `.lines`."""

    def make(model=tiny_model, folder=tmp_path / "tune", **tuning) -> Tuner:
        lines: list[str] = []
        config = validate(TuningConfig, {"search": ["steps"], **QUICK, **tuning}, "the test")
        tuner = Tuner(model, DigitsConfig(), digits, folder, config, BASELINE, lines.append)
        tuner.lines = lines
        return tuner

    return make


def trial(fd: float, seconds: float = 1.0, influences=None, steps: int = 10, stage: str = "steps") -> Trial:
    influences = np.zeros(100) if influences is None else influences
    measured = Estimate.normal(fd, float(np.std(influences, ddof=1)) / 10)
    return Trial(
        SamplingConfig(num_steps=steps), stage, len(influences), measured, 2.0 * steps, seconds, influences, []
    )


# Candidates


@pytest.mark.parametrize("process", [{}, {"kind": "flow", "prediction": "velocity"}])
def test_every_solver_is_a_candidate_with_every_spacing_at_equal_calls(make_model, process):
    outputs = {"out_channels": 1} if process else {}
    model = make_model(network=outputs, diffusion={"variance": "learned"} if not process else None)
    if process:
        config = model.config.model_dump() | {"diffusion": process}
        model = bundle.Model(bundle.BundleConfig.model_validate(config), model.network)
    baseline = SamplingConfig(num_steps=6)
    candidates = search_space.solver_candidates(model, baseline)
    assert {config.sampler.calls_per_step * config.num_steps for config in candidates} == {10}
    assert len({config.model_dump_json() for config in candidates}) == len(candidates)
    kinds = {config.sampler.kind for config in candidates}
    assert {"ddim", "heun", "dpm++", "unipc"} <= kinds
    assert "euler" not in kinds
    spacings = [config.timestep_spacing for config in candidates if config.sampler == DDIM()]
    visited = {tuple(timestep_grid(spacing, 10, model.diffusion).tolist()) for spacing in spacings}
    assert len(visited) == len(spacings) >= 4
    assert {config.timestep_spacing.kind for config in candidates[: len(search_space.solvers())]} == {"uniform"}


def test_guidance_candidates_surround_the_current_scale(tiny_model):
    scales = {
        config.guidance_scale
        for config in search_space.guidance_candidates(tiny_model, SamplingConfig(guidance_scale=4.0))
    }
    assert {1.0, 2.5, 4.0, 5.5} <= scales
    assert all(config.guidance_scale > 1 for config in search_space.guidance_candidates(tiny_model, SamplingConfig()))


def test_the_summary_of_settings_is_one_line():
    solver = {"kind": "dpm++", "order": 3}
    settings = {"sampler": solver, "timestep_spacing": "karras", "num_steps": 8, "guidance_scale": 1.5}
    assert SamplingConfig.model_validate(settings).summary() == "dpm++, 8 steps, karras, guidance 1.5, order 3"
    caching = {"kind": "first-block", "threshold": 0.7}
    settings = {"guidance_scale": 2, "guidance_interval": (0.2, 0.8), "caching": caching}
    expected = "ddim, 50 steps, uniform, guidance 2, guidance interval (0.2, 0.8), caching first-block, threshold 0.7"
    assert SamplingConfig.model_validate(settings).summary() == expected


# Acceptance


def test_a_difference_is_paired_by_sample():
    random = np.random.default_rng(0)
    shared, own = random.normal(size=(2, 400))
    baseline, similar, different = (
        trial(2, influences=shared),
        trial(3, influences=shared + 0.01 * own),
        trial(3, influences=own),
    )
    assert similar.difference_to(baseline).value == different.difference_to(baseline).value == 1
    assert similar.difference_to(baseline).high - 1 == pytest.approx(1.96 * 0.01 / 20, rel=0.1)
    assert different.difference_to(baseline).high - 1 == pytest.approx(1.96 * 2**0.5 / 20, rel=0.1)


def test_an_acceptable_cachedis_within_chance_and_within_the_tolerance():
    noise = np.random.default_rng(0).normal(size=100)
    baseline = trial(2)
    assert trial(2.05, influences=noise).is_acceptable(baseline, 0.05)
    assert not trial(2.15, influences=noise).is_acceptable(baseline, 0.05), "not significant, but above the tolerance"
    assert not trial(2.05, influences=0.1 * noise).is_acceptable(baseline, 0.05), (
        "within the tolerance, but significant"
    )
    assert trial(1.0).is_acceptable(baseline, 0.0)


def test_the_frontier_is_not_beaten_in_time_and_fd():
    a, b, c, d = trial(5, 1), trial(3, 2), trial(4, 3), trial(1, 4)
    assert trials.frontier([d, c, b, a]) == [a, b, d]


def test_finalists_are_the_fastest_acceptable_and_the_best():
    baseline = trial(2, 9, steps=99)
    fast, better, slower, best, bad = (
        trial(fd, seconds, steps=steps)
        for steps, (fd, seconds) in enumerate([(1.9, 1), (1.8, 2), (1.85, 3), (1.0, 8), (7, 0.1)], start=1)
    )
    assert trials.select_finalists([bad, slower, best, better, fast], baseline, 0) == [fast, better, best]
    assert trials.select_finalists([bad], baseline, 0) == [bad]


@pytest.mark.parametrize(
    ("select", "others", "chosen", "has_note"),
    [
        ("fastest-equal", [(1.9, 2, 1), (2.0, 1, 2), (3.0, 0.5, 3)], 2, False),
        ("fastest-equal", [(3.0, 0.5, 3)], None, True),
        ("fastest-equal", [(1.0, 10, 3)], None, True),
        ("best", [(1.9, 2, 1), (2.0, 1, 2)], 1, False),
        ("best", [(2.1, 2, 1)], None, True),
        ("none", [(1.0, 1, 1)], None, False),
    ],
)
def test_the_choice_follows_the_final_comparison(tuner, select, others, chosen, has_note):
    search = tuner(select=select)
    search.baseline = trial(2, 9, steps=99)
    search.folder.mkdir()
    finalists = [search.baseline, *(trial(fd, seconds, steps=steps) for fd, seconds, steps in others)]
    outcome = search.choose(finalists)
    assert (None if outcome.chosen is None else outcome.chosen.sampling.num_steps) == chosen
    assert bool(outcome.notes) == has_note
    assert json.loads((search.folder / "results.json").read_text())["chosen"] == (
        outcome.chosen.name if outcome.chosen else None
    )


# A search


def test_a_trial_counts_calls_and_has_the_scores_of_an_evaluation(tuner, tmp_path):
    search = tuner()
    search.claim()
    plain = search.trial(SamplingConfig(num_steps=6), "steps")
    assert (plain.calls, plain.num_samples, len(plain.influences)) == (6, 50, 50)
    assert search.trial(SamplingConfig(num_steps=6, guidance_scale=2), "steps").calls == 12
    assert search.trial(SamplingConfig(num_steps=4, sampler=Heun()), "steps").calls == 7
    assert search.trial(SamplingConfig(num_steps=6), "final").num_samples == 100
    half = plain.fd.high - plain.fd.value
    assert half == pytest.approx(1.96 * np.std(plain.influences, ddof=1) / 50**0.5, rel=1e-3)
    assert plain.scores[0].protocol.sampling["num_steps"] == 6
    assert not list((tmp_path / "tune/trials").glob("*.work"))


def test_an_interrupted_search_resumes_with_equal_results(tuner, tmp_path):
    whole = tuner(folder=tmp_path / "whole").run()
    part = tuner(folder=tmp_path / "part")

    def interrupted(text: str) -> None:
        part.lines.append(text)
        if len(part.lines) == 3:
            raise KeyboardInterrupt

    part.log = interrupted
    with pytest.raises(KeyboardInterrupt):
        part.run()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "part/trials").glob("*.json")}
    assert 3 == len(times) < len(list((tmp_path / "whole/trials").glob("*.json")))
    after = tuner(folder=tmp_path / "part").run()
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert [(each.name, each.fd) for each in after.trials] == [(each.name, each.fd) for each in whole.trials]
    results = json.loads((tmp_path / "part/results.json").read_text())
    assert [each["name"] for each in results["trials"]] == [each.name for each in whole.trials]
    assert results["finalists"][0]["num_samples"] == 100
    result.plot(after, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 10_000
    frontier, final = result.format_result(after).split("\n\n")
    assert "baseline: ancestral, 12 steps, uniform" in frontier
    assert len(final.splitlines()) == 2 + len(after.finalists)


def test_the_baseline_of_a_folder_stays_when_the_model_s_settings_change(tuner, tiny_model, digits):
    tuner().claim()
    later = Tuner(tiny_model, DigitsConfig(), digits, tuner().folder, TuningConfig(), log=lambda text: None)
    assert later.baseline_sampling == SamplingConfig(sampler=Ancestral(), num_steps=12) != tiny_model.config.sampling
    later.claim()
    other = Tuner(
        tiny_model, DigitsConfig(), digits, tuner().folder, TuningConfig(), ["num_steps=7"], lambda text: None
    )
    with pytest.raises(TesseraError, match=r"holds other work: baseline\.num_steps was 12, is 7"):
        other.claim()


def test_the_same_command_resumes_after_its_choice_was_written(tuner, make_model):
    """The model's new settings do not change the baseline of the folder."""
    first = tuner()
    first.claim()
    chosen = make_model(sampling={"sampler": "heun", "num_steps": 3, "guidance_scale": 2.0})
    again = tuner(model=chosen)
    assert again.baseline_sampling == first.baseline_sampling
    again.claim()


def test_unconditional_models_have_no_guidance_candidates(tuner, make_model):
    model = make_model(network={"num_classes": 0})
    search = tuner(model=model, search=["guidance"])
    assert search.run().trials == []


def test_unsupported_candidates_are_logged_and_left_out(tuner):
    search = tuner()
    search.claim()
    assert search.try_candidate("steps", SamplingConfig(num_steps=2000)) is None
    assert "is left out: num_steps is 2000" in search.lines[-1]


@pytest.mark.parametrize("stage", ["guidance", "caching"])
def test_a_single_stage_starts_from_the_baseline(tuner, stage):
    search = tuner(search=[stage])
    candidates = []
    search.try_candidate = lambda *args: candidates.append(args)
    search.search()
    assert {name for name, _ in candidates} == {stage}
    assert {config.sampler for _, config in candidates} == {Ancestral()}
    assert {config.num_steps for _, config in candidates} == ({12} if stage == "guidance" else {12, 24})


def test_an_empty_search_is_refused():
    with pytest.raises(TesseraError, match="nothing to search: expected some of solver, steps, guidance, caching"):
        validate(TuningConfig, {"search": []}, "the test")


def test_the_effect_of_caching_is_checked_once_within_the_budget(tuner):
    plain = SamplingConfig(num_steps=6, caching=FirstBlockCaching(threshold=0))
    search = tuner()
    search.claim()
    checked = []
    has_effect, search.caching_has_effect = (
        search.caching_has_effect,
        lambda config: checked.append(config) or has_effect(config),
    )
    assert search.try_candidate("caching", search_space.with_changes(plain, num_steps=2000)) is None
    assert "is left out: num_steps is 2000" in search.lines[-1]
    search.seconds_left = lambda stage: -1.0
    assert search.try_candidate("caching", plain) is None
    assert (checked, search.skipped) == ([], {"caching": 1})
    del search.seconds_left
    assert search.try_candidate("caching", plain) is search.try_candidate("caching", plain) is None
    assert checked == [plain]
    again = tuner()
    again.caching_has_effect = search.caching_has_effect
    again.claim()
    assert again.try_candidate("caching", plain) is None
    assert (checked, len(again.trials)) == ([plain], 0)


def test_caching_without_effect_is_not_a_trial(tuner):
    search = tuner()
    search.claim()
    plain = SamplingConfig(num_steps=6)
    never, always = (
        search_space.with_changes(plain, caching=FirstBlockCaching(threshold=threshold)) for threshold in (0, 1e9)
    )
    assert not search.caching_has_effect(never)
    assert search.caching_has_effect(always)
    cached = search.try_candidate("caching", always)
    assert cached is not None
    assert cached.calls == (6 + 1) / 2, "the first block runs in 6 steps, the second in 1"


def test_a_stage_ends_when_its_time_is_over(tuner):
    search = tuner(budget=0.5)
    search.claim()
    assert search.baseline.calls == 12
    search.seconds_left = lambda stage: -1.0
    search.search()
    assert (search.trials, search.skipped) == (
        [],
        {"steps": len(tuner_module.CALLS) - 1},
    )  # the baseline is one of them


def test_a_budget_below_the_time_of_the_baseline_is_refused(tuner):
    message = r"ancestral, 12 steps, uniform.*give --budget \d+ \(minutes\)"
    with pytest.raises(TesseraError, match=message + r", or --num-samples from 50 to 50$"):
        tuner(budget=1e-4, num_samples=51).run()
    with pytest.raises(TesseraError, match=message + "$"):  # fewer samples than 50 are not allowed
        tuner(budget=1e-4, num_samples=50).run()
    assert not tuner().folder.exists()


# Output


def test_each_checkpoint_of_a_run_has_its_own_folder(tiny_model, tmp_path):
    for step in (10, 20):
        bundle.save(tiny_model, tmp_path / f"run/checkpoints/step-{step:09d}")
        assert result.default_folder(tmp_path / "run") == tmp_path / f"run/tune/step-{step:09d}"
    assert result.default_folder(bundle.checkpoints(tmp_path / "run")[0]).name == "tune-step-000000020"


def test_settings_are_written_into_a_bundle(tiny_model, tmp_path):
    bundle.save(tiny_model, tmp_path / "model")
    weights = (tmp_path / "model/model.safetensors").read_bytes()
    sampling = SamplingConfig(sampler=DDIM(eta=0.5), num_steps=7)
    result.write_settings(tmp_path / "model", sampling, "by a test", tiny_model.network)
    model = bundle.load(tmp_path / "model")
    assert model.config == tiny_model.config.model_copy(
        update={"sampling": sampling, "provenance": bundle.Provenance(sampling_chosen="by a test")}
    )
    assert (tmp_path / "model/model.safetensors").read_bytes() == weights
    assert "ddim, 7 steps" in (tmp_path / "model/README.md").read_text()
    assert (
        generation.generate(model, [0]) == generation.generate(tiny_model, [0], sampler=DDIM(eta=0.5), num_steps=7)
    ).all()


def test_the_provenance_has_both_scores_and_the_features():
    protocol = Protocol(definition={}, features={"name": "mine"}, reference={}, samples=100, size=(8, 8), channels=1)
    score = Score.from_estimate("fd", Estimate(1, 0.9, 1.1), protocol, {}, "cpu")
    chosen = Trial(SamplingConfig(num_steps=7), "final", 100, Estimate(1, 0.9, 1.1), 7, 0.25, np.zeros(100), [score])
    baseline = trial(2.0, 4.0, steps=50)
    text = result.provenance_text(
        tuner_module.TuningResult(baseline, [chosen], [baseline, chosen], chosen, [], TuningConfig())
    )
    for part in (
        "fd 1 (0.9 to 1.1), 0.25 s per image",
        "before (ddim, 50 steps, uniform): fd 2",
        "4 s",
        "100 samples",
        "mine",
    ):
        assert part in text
