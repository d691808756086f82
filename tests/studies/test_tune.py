"""Tuning: what is tried, what counts as no worse, and a search that goes on where it was interrupted."""

import json

import numpy as np
import pytest
import torch

from tessera import bundle, generation
from tessera.data import DigitsConfig
from tessera.errors import TesseraError
from tessera.evaluation.features import load_extractor
from tessera.reporting.estimates import Estimate
from tessera.evaluation.protocol import Protocol, Score
from tessera.sampling import DDIM, Ancestral, FirstBlockCaching, Heun, SamplingConfig
from tessera.sampling.timesteps import timestep_grid
from tessera.settings import validate
from tessera.studies.tuning import result, search_space, trials
from tessera.studies.tuning import tuner as tuner_module
from tessera.studies.tuning.trials import Trial
from tessera.studies.tuning.tuner import Tuner, TuningConfig

pytest.importorskip("sklearn")
BASELINE = ["sampler=ancestral", "num_steps=12"]
SOON = {"num_samples": 50, "batch_size": 50, "budget": 60}


@pytest.fixture(scope="session")
def digits():
    return load_extractor("digits", torch.device("cpu"))


@pytest.fixture
def tuner(tiny_model, digits, tmp_path):
    """A tuner of a tiny model whose baseline takes 12 ancestral steps; what it says is in .said."""

    def make(model=tiny_model, folder=tmp_path / "tune", **tuning) -> Tuner:
        said: list[str] = []
        asked = validate(TuningConfig, {"search": ["steps"], **SOON, **tuning}, "the test")
        made = Tuner(model, DigitsConfig(), digits, folder, asked, BASELINE, said.append)
        made.said = said
        return made

    return make


def trial(fd: float, seconds: float = 1.0, pulls=None, steps: int = 10, stage: str = "steps") -> Trial:
    pulls = np.zeros(100) if pulls is None else pulls
    measured = Estimate.normal(fd, float(np.std(pulls, ddof=1)) / 10)
    return Trial(SamplingConfig(num_steps=steps), stage, len(pulls), measured, 2.0 * steps, seconds, pulls, [])


# What is tried


@pytest.mark.parametrize("process", [{}, {"kind": "flow", "prediction": "velocity"}])
def test_every_solver_is_tried_on_every_grid_at_as_many_calls(make_model, process):
    outputs = {"out_channels": 1} if process else {}
    model = make_model(network=outputs, diffusion={"variance": "learned"} if not process else None)
    if process:
        config = model.config.model_dump() | {"diffusion": process}
        model = bundle.Model(bundle.BundleConfig.model_validate(config), model.network)
    present = SamplingConfig(num_steps=6)
    found = search_space.solver_candidates(model, present)
    assert {config.sampler.calls_per_step * config.num_steps for config in found} == {10}
    assert len({config.model_dump_json() for config in found}) == len(found)
    kinds = {config.sampler.kind for config in found}
    assert {"ddim", "heun", "dpm++", "unipc"} <= kinds
    assert "euler" not in kinds
    grids = [config.timestep_spacing for config in found if config.sampler == DDIM()]
    visited = {tuple(timestep_grid(grid, 10, model.diffusion).tolist()) for grid in grids}
    assert len(visited) == len(grids) >= 4
    assert {config.timestep_spacing.kind for config in found[: len(search_space.solvers())]} == {"uniform"}


def test_guidance_is_tried_around_the_present_and_off(tiny_model):
    scales = {
        config.guidance_scale
        for config in search_space.guidance_candidates(tiny_model, SamplingConfig(guidance_scale=4.0))
    }
    assert {1.0, 2.5, 4.0, 5.5} <= scales
    assert all(config.guidance_scale > 1 for config in search_space.guidance_candidates(tiny_model, SamplingConfig()))


def test_settings_are_told_in_a_line():
    config = SamplingConfig(
        sampler={"kind": "dpm++", "order": 3}, timestep_spacing="karras", num_steps=8, guidance_scale=1.5
    )  # pyright: ignore
    assert config.summary() == "dpm++, 8 steps, karras, guidance 1.5, order 3"
    config = SamplingConfig(
        guidance_scale=2, guidance_interval=(0.2, 0.8), caching={"kind": "first-block", "threshold": 0.7}
    )  # pyright: ignore
    found = config.summary()
    assert (
        found == "ddim, 50 steps, uniform, guidance 2, guidance interval (0.2, 0.8), caching first-block, threshold 0.7"
    )


# What counts as no worse


def test_a_difference_is_paired_picture_by_picture():
    numbers = np.random.default_rng(0)
    shared, own = numbers.normal(size=(2, 400))
    baseline, alike, apart = trial(2, pulls=shared), trial(3, pulls=shared + 0.01 * own), trial(3, pulls=own)
    assert alike.difference_to(baseline).value == apart.difference_to(baseline).value == 1
    assert alike.difference_to(baseline).high - 1 == pytest.approx(1.96 * 0.01 / 20, rel=0.1)
    assert apart.difference_to(baseline).high - 1 == pytest.approx(1.96 * 2**0.5 / 20, rel=0.1)


def test_no_worse_is_within_chance_and_within_the_margin():
    noise = np.random.default_rng(0).normal(size=100)
    baseline = trial(2)
    assert trial(2.05, pulls=noise).is_acceptable(baseline, 0.05)
    assert not trial(2.15, pulls=noise).is_acceptable(baseline, 0.05), "chance may explain it, but the margin is passed"
    assert not trial(2.05, pulls=0.1 * noise).is_acceptable(baseline, 0.05), "within the margin, but no chance"
    assert trial(1.0).is_acceptable(baseline, 0.0)


def test_the_frontier_is_what_nothing_beats():
    a, b, c, d = trial(5, 1), trial(3, 2), trial(4, 3), trial(1, 4)
    assert trials.frontier([d, c, b, a]) == [a, b, d]


def test_finalists_are_the_fastest_no_worse_and_the_best():
    baseline = trial(2, 9, steps=99)
    fast, better, slower, best, bad = (
        trial(fd, seconds, steps=steps)
        for steps, (fd, seconds) in enumerate([(1.9, 1), (1.8, 2), (1.85, 3), (1.0, 8), (7, 0.1)], start=1)
    )
    assert trials.finalists([bad, slower, best, better, fast], baseline, 0) == [fast, better, best]
    assert trials.finalists([bad], baseline, 0) == [bad]


@pytest.mark.parametrize(
    ("select", "others", "chosen", "noted"),
    [
        ("fastest-equal", [(1.9, 2, 1), (2.0, 1, 2), (3.0, 0.5, 3)], 2, False),
        ("fastest-equal", [(3.0, 0.5, 3)], None, True),
        ("fastest-equal", [(1.0, 10, 3)], None, True),
        ("best", [(1.9, 2, 1), (2.0, 1, 2)], 1, False),
        ("best", [(2.1, 2, 1)], None, True),
        ("none", [(1.0, 1, 1)], None, False),
    ],
)
def test_one_is_chosen_by_what_fresh_seeds_say(tuner, select, others, chosen, noted):
    told = tuner(select=select)
    told.baseline = trial(2, 9, steps=99)
    told.folder.mkdir()
    checked = [told.baseline, *(trial(fd, seconds, steps=steps) for fd, seconds, steps in others)]
    outcome = told.chosen(checked)
    assert (None if outcome.chosen is None else outcome.chosen.sampling.num_steps) == chosen
    assert bool(outcome.notes) == noted
    assert json.loads((told.folder / "results.json").read_text())["chosen"] == (
        outcome.chosen.name if outcome.chosen else None
    )


# A search


def test_a_trial_counts_calls_and_scores_as_an_evaluation_does(tuner, tmp_path):
    told = tuner()
    told.begin()
    plain = told.trial(SamplingConfig(num_steps=6), "steps")
    assert (plain.calls, plain.count, len(plain.pulls)) == (6, 50, 50)
    assert told.trial(SamplingConfig(num_steps=6, guidance_scale=2), "steps").calls == 12
    assert told.trial(SamplingConfig(num_steps=4, sampler=Heun()), "steps").calls == 7
    assert told.trial(SamplingConfig(num_steps=6), "check").count == 100
    half = plain.fd.high - plain.fd.value
    assert half == pytest.approx(1.96 * np.std(plain.pulls, ddof=1) / 50**0.5, rel=1e-3)
    assert plain.scores[0].protocol.sampling["num_steps"] == 6
    assert not list((tmp_path / "tune/trials").glob("*.work"))


def test_an_interrupted_search_goes_on_and_ends_the_same(tuner, tmp_path):
    whole = tuner(folder=tmp_path / "whole").run()
    part = tuner(folder=tmp_path / "part")

    def interrupted(text: str) -> None:
        part.said.append(text)
        if len(part.said) == 3:
            raise KeyboardInterrupt

    part.say = interrupted
    with pytest.raises(KeyboardInterrupt):
        part.run()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "part/trials").glob("*.json")}
    assert 3 == len(kept) < len(list((tmp_path / "whole/trials").glob("*.json")))
    after = tuner(folder=tmp_path / "part").run()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert [(each.name, each.fd) for each in after.trials] == [(each.name, each.fd) for each in whole.trials]
    results = json.loads((tmp_path / "part/results.json").read_text())
    assert [each["name"] for each in results["trials"]] == [each.name for each in whole.trials]
    assert results["checked"][0]["count"] == 100
    result.plot(after, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 10_000
    frontier, check = result.format_result(after).split("\n\n")
    assert "baseline: ancestral, 12 steps, uniform" in frontier
    assert len(check.splitlines()) == 2 + len(after.checked)


def test_the_baseline_of_a_folder_stays_when_the_model_s_settings_change(tuner, tiny_model, digits):
    tuner().begin()
    later = Tuner(tiny_model, DigitsConfig(), digits, tuner().folder, TuningConfig(), log=lambda text: None)
    assert later.baseline_sampling == SamplingConfig(sampler=Ancestral(), num_steps=12) != tiny_model.config.sampling
    later.claim()
    other = Tuner(
        tiny_model, DigitsConfig(), digits, tuner().folder, TuningConfig(), ["num_steps=7"], lambda text: None
    )
    with pytest.raises(TesseraError, match=r"holds other work: baseline\.num_steps was 12, is 7"):
        other.claim()


def test_the_same_command_goes_on_when_its_choice_was_written(tuner, make_model):
    """What the model draws with now is no part of the baseline that the same words stand for."""
    first = tuner()
    first.begin()
    chosen = make_model(sampling={"sampler": "heun", "num_steps": 3, "guidance_scale": 2.0})
    again = tuner(model=chosen)
    assert again.present == first.present
    again.begin()


def test_what_cannot_be_guided_is_not(tuner, make_model):
    model = make_model(network={"num_classes": 0})
    told = tuner(model=model, search=["guidance"])
    assert told.run().trials == []


def test_what_a_model_cannot_draw_is_told_and_left_out(tuner):
    told = tuner()
    told.begin()
    assert told.attempt("steps", SamplingConfig(num_steps=2000)) is None
    assert "is left out: num_steps is 2000" in told.said[-1]


@pytest.mark.parametrize("stage", ["guidance", "caching"])
def test_a_stage_alone_goes_on_from_the_baseline(tuner, stage):
    told = tuner(search=[stage])
    tried = []
    told.attempt = lambda *words: tried.append(words)
    told.search()
    assert {name for name, _ in tried} == {stage}
    assert {config.sampler for _, config in tried} == {Ancestral()}
    assert {config.num_steps for _, config in tried} == ({12} if stage == "guidance" else {12, 24})


def test_a_search_for_nothing_is_refused():
    with pytest.raises(TesseraError, match="nothing to search: name some of solver, steps, guidance, caching"):
        validate(TuningConfig, {"search": []}, "the test")


def test_caching_is_looked_at_once_within_the_time_and_what_can_be_drawn(tuner):
    plain = SamplingConfig(num_steps=6, caching=FirstBlockCaching(threshold=0))
    told = tuner()
    told.begin()
    looked = []
    reuses, told.reuses = told.reuses, lambda config: looked.append(config) or reuses(config)
    assert told.attempt("caching", search_space.with_changes(plain, num_steps=2000)) is None
    assert "is left out: num_steps is 2000" in told.said[-1]
    told.left = lambda stage: -1.0
    assert told.attempt("caching", plain) is None
    assert (looked, told.skipped) == ([], {"caching": 1})
    del told.left
    assert told.attempt("caching", plain) is told.attempt("caching", plain) is None
    assert looked == [plain]
    again = tuner()
    again.reuses = told.reuses
    again.begin()
    assert again.attempt("caching", plain) is None
    assert (looked, len(again.trials)) == ([plain], 0)


def test_caching_that_reuses_nothing_is_not_tried(tuner):
    told = tuner()
    told.begin()
    plain = SamplingConfig(num_steps=6)
    never, always = (
        search_space.with_changes(plain, caching=FirstBlockCaching(threshold=threshold)) for threshold in (0, 1e9)
    )
    assert not told.reuses(never)
    assert told.reuses(always)
    found = told.attempt("caching", always)
    assert found is not None
    assert found.calls == (6 + 1) / 2, "of the two blocks the first is computed in 6 steps, the second in 1"


def test_stages_end_with_their_time(tuner):
    told = tuner(budget=0.5)
    told.begin()
    assert told.baseline.calls == 12
    told.left = lambda stage: -1.0
    told.search()
    assert (told.trials, told.skipped) == ([], {"steps": len(tuner_module.CALLS) - 1})  # the baseline is one of them


def test_a_budget_that_the_baseline_alone_would_take_is_refused(tuner):
    with pytest.raises(TesseraError, match=r"ancestral, 12 steps, uniform.*give --budget \d+ \(minutes\), or a"):
        tuner(budget=1e-4).run()
    assert not tuner().folder.exists()


# Written down


def test_each_checkpoint_of_a_run_has_a_folder_of_its_own(tiny_model, tmp_path):
    for step in (10, 20):
        bundle.save(tiny_model, tmp_path / f"run/checkpoints/step-{step:09d}")
        assert result.default_folder(tmp_path / "run") == tmp_path / f"run/tune/step-{step:09d}"
    assert result.default_folder(bundle.checkpoints(tmp_path / "run")[0]).name == "tune-step-000000020"


def test_settings_are_written_into_a_bundle(tiny_model, tmp_path):
    bundle.save(tiny_model, tmp_path / "model")
    weights = (tmp_path / "model/model.safetensors").read_bytes()
    chosen = SamplingConfig(sampler=DDIM(eta=0.5), num_steps=7)
    result.write_settings(tmp_path / "model", chosen, "by a test", tiny_model.network)
    read = bundle.load(tmp_path / "model")
    assert read.config == tiny_model.config.model_copy(
        update={"sampling": chosen, "provenance": bundle.Provenance(sampling_chosen="by a test")}
    )
    assert (tmp_path / "model/model.safetensors").read_bytes() == weights
    assert "ddim, 7 steps" in (tmp_path / "model/README.md").read_text()
    assert (
        generation.generate(read, [0]) == generation.generate(tiny_model, [0], sampler=DDIM(eta=0.5), num_steps=7)
    ).all()


def test_the_note_says_when_by_what_and_both_scores():
    protocol = Protocol(definition={}, features={"name": "mine"}, reference={}, samples=100, size=(8, 8), channels=1)
    score = Score.from_estimate("fd", Estimate(1, 0.9, 1.1), protocol, {}, "cpu")
    chosen = Trial(SamplingConfig(num_steps=7), "check", 100, Estimate(1, 0.9, 1.1), 7, 0.25, np.zeros(100), [score])
    baseline = trial(2.0, 4.0, steps=50)
    told = result.provenance_text(
        tuner_module.TuningResult(baseline, [chosen], [baseline, chosen], chosen, [], TuningConfig())
    )
    for part in ("fd 1 (0.9 to 1.1), 0.25 s", "before (ddim, 50 steps, uniform): fd 2", "4 s", "100 pictures", "mine"):
        assert part in told
