"""The file of a study: its members, their settings, and invalid settings."""

import pytest

from tessera.errors import TesseraError
from tessera.studies.study import members, read_study


def test_members_are_every_combination_for_each_seed(write_study):
    study = write_study("axes.patch.2.network.patch_size=2", "axes.patch.4.network.patch_size=4", "seeds=[0,3]")
    result = list(members(study))
    names = ["S-2", "S-4", "L-2", "L-4"]
    assert [member.name for member in result] == [f"{name}-seed{seed}" for seed in (0, 3) for name in names]
    last = result[-1]
    assert (last.values, last.seed) == ({"size": "L", "patch": "4"}, 3)
    assert last.overrides == {"network.hidden_size": 32, "network.patch_size": 4, "training.seed": 3}
    assert [member.name for member in members(write_study("seeds=[5]"))] == ["S", "L"]


def test_settings_may_be_nested_or_dotted_and_a_kind_comes_first(write_study, tmp_path):
    study = write_study("set.training.optimizer={learning_rate: 0.01, kind: muon}", "set.training.global_batch_size=16")
    assert list(study.set.items()) == [
        ("training.optimizer.kind", "muon"),
        ("training.optimizer.learning_rate", 0.01),
        ("training.global_batch_size", 16),
    ]
    # Settings of an axis are behind those of all members: another kind drops the settings of the kind before.
    study = write_study("set.network.hidden_size=64", "axes={kind: {u: {network: {kind: unet}}, d: {}}}")
    assert list(next(members(study)).overrides) == ["network.hidden_size", "network.kind", "training.seed"]
    study = write_study("set.network.depth=2", "axes={k: {p: {network: {kind: pixart, depth: 3}}}}")
    assert list(next(members(study)).overrides) == ["network.kind", "network.depth", "training.seed"]
    path = tmp_path / "numbers.yaml"
    axes = "{patch: {2: {network: {patch_size: 2}}, 4: }}"
    path.write_text(f"question: q\nrecipe: tiny.yaml\naxes: {axes}\nbudget: {{steps: 1}}")
    assert read_study(path).axes == {"patch": {"2": {"network.patch_size": 2}, "4": {}}}
    assert read_study(path).output == "runs/numbers"
    assert read_study(path).recipe == str(tmp_path / "tiny.yaml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["axes={}"], "at least one axis with at least one value"),
        (["axes.size={}"], "at least one axis with at least one value"),
        (["budget.flops=1e9"], "set either budget.steps or budget.flops"),
        (["seeds=[]"], "expected at least one, and no duplicates"),
        (["seeds=[1, 1]"], "expected at least one, and no duplicates"),
        (["axes.size.S/2.network.hidden_size=16"], "the value 'S/2' becomes part of a folder's name"),
        (["set.training.steps=5"], "training.steps cannot be set for a member: set budget.steps or budget.flops"),
        (["axes.size.S.training.seed=5"], "training.seed cannot be set for a member: set seeds"),
        (["compare={axis: sizes, baseline: S}"], "unknown axis 'sizes'; did you mean 'size'?"),
        (["compare={axis: size, baseline: M}"], "unknown value 'M'"),
        (["recipe=nowhere.yaml"], "there is no recipe at"),
        (["budget"], "write key=value, for example budget.steps=500"),
        (["questions=1"], "unknown key 'questions'; did you mean 'question'?"),
    ],
)
def test_invalid_studies_are_refused(write_study, words, message):
    with pytest.raises(TesseraError) as caught:
        write_study(*words)
    assert message in str(caught.value)


def test_a_missing_study_is_refused(tmp_path):
    with pytest.raises(TesseraError, match="there is no study"):
        read_study(tmp_path / "nothing.yaml")


def test_a_recipe_is_no_study_and_the_message_names_the_command(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data: digits\ntraining: {steps: 3}\n")
    with pytest.raises(TesseraError, match="is the recipe of one run") as caught:
        read_study(path)
    assert f"`tessera train {path}`" in str(caught.value)
