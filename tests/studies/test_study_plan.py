"""The plan of a study: marks and budgets in steps, refused studies, and shards."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera import bundle, generation
from tessera.errors import TesseraError
from tessera.settings import read_yaml
from tessera.studies import study, study_plan
from tessera.studies.study import Budget, Marks

pytest.importorskip("sklearn")
GPU = "h100"  # rates from a table: nothing is measured


@pytest.fixture
def fixed_cost(monkeypatch, cost):
    monkeypatch.setattr(study_plan, "plan_for_recipe", lambda recipe, hardware: cost)


def make_plan(config, previous=None):
    return study_plan.plan_study(config, study_plan.resolve_members(config), previous, GPU)


def test_marks_and_budget_become_steps():
    """By hand: a step of 100 FLOPs."""
    assert study_plan.training_steps(Budget(flops=1040), 100) == 10
    assert study_plan.training_steps(Budget(flops=1060), 100) == 11
    assert study_plan.training_steps(Budget(flops=3), 100) == 1
    assert study_plan.training_steps(Budget(steps=7), 100) == 7
    assert study_plan.evaluation_steps(Marks(flops=(240, 260, 20, 5000), steps=(3, 8, 20)), 100, 10) == (1, 2, 3, 8, 10)
    assert study_plan.evaluation_steps(Marks(steps=(10,)), 100, 10) == (10,)
    assert study_plan.evaluation_steps(Marks(), 100, 10) == (10,)


def test_members_train_to_the_step_nearest_to_a_flops_budget(write_study, fixed_cost):
    """A block of width D with N = 2 x 2 tokens has 12 N D^2 + 2 N^2 D multiply-adds; embedding and head have more."""
    plan = make_plan(write_study("budget={flops: 3e8}", "marks={flops: [1e8, 2e8]}"))
    for member in plan.members.values():
        step = 6 * member.macs * 32
        assert member.flops_per_step == step
        assert abs(member.flops - 3e8) <= step / 2
        first, second, last = member.recipe.evaluation.at
        assert abs(first * step - 1e8) <= step / 2
        assert abs(second * step - 2e8) <= step / 2
        assert last == member.steps == member.recipe.training.steps
        assert member.recipe.evaluation.every is None
    small, large = plan.members.values()
    assert small.steps > large.steps
    assert small.macs > 4 * (12 * 16**2 + 2 * 4 * 16)


@pytest.mark.parametrize("words", [(), ("sampler=heun",), ("guidance_scale=2", "guidance_interval=[0.2, 0.7]")])
def test_sampling_macs_count_the_network_evaluations_of_a_model(write_study, untrained, words):
    config = write_study(*(f"set.sampling.{word}" for word in words))
    prepared = study_plan.resolve_members(config)[0]
    plan = study_plan.sampling_macs(prepared.recipe, 1.0, (5,))
    network = prepared.recipe.network.build()
    model = untrained(network, prepared.recipe)
    rows: list[int] = []
    network.blocks[0].register_forward_pre_hook(lambda block, args: rows.append(len(args[0])))
    for steps in (3, 5):
        rows.clear()
        generation.generate(model, [0], [0], num_steps=steps)
        assert plan[steps] == sum(rows)


@pytest.fixture
def untrained():
    def build(network, recipe):
        config = bundle.BundleConfig(
            network=recipe.network, diffusion=recipe.diffusion, codec=recipe.codec, sampling=recipe.sampling
        )
        return bundle.Model(config, network, recipe.codec.build())

    return build


def test_seeds_have_equal_cost(write_study):
    plan = make_plan(write_study("seeds=[0, 1]"))
    assert list(plan.members) == ["S-seed0", "L-seed0", "S-seed1", "L-seed1"]
    for name in "SL":
        one, other = (plan.members[f"{name}-seed{seed}"] for seed in (0, 1))
        assert one.recipe.training.seed == 0
        assert other.recipe.training.seed == 1
        assert one.model_copy(update={"seed": 1, "recipe": other.recipe}) == other
        assert one.seconds > 0
        assert one.evaluation_seconds > 0
        assert one.parameters == sum(p.numel() for p in one.recipe.network.build().parameters())
    table = study_plan.format_plan(plan)
    assert all(name in table for name in plan.members)
    assert f"{plan.members['L-seed1'].parameters:,}" in table
    assert "4 members" in table
    assert study_plan.StudyPlan.model_validate_json(plan.model_dump_json()) == plan


def test_progress_counts_what_is_planned(write_study, fixed_cost):
    config = write_study("seeds=[0, 1, 2]")
    calls = []
    study_plan.plan_study(
        config, study_plan.resolve_members(config), None, GPU, lambda done, total: calls.append((done, total))
    )
    assert calls == [(0, 2), (1, 2)]


def test_invalid_members_are_listed_before_anything_starts(write_study, tmp_path):
    config = write_study(
        "axes.size.M.network.hidden_size=33",
        "axes.size.G={sampling.guidance_scale: 2, network.learn_null_class: false}",
    )
    with pytest.raises(TesseraError) as caught:
        study_plan.resolve_members(config)
    message = str(caught.value)
    assert message.startswith("2 members of the study are invalid:")
    assert "M: " in message
    assert "33" in message
    assert "G: " in message
    assert "learn_null_class" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["axes.size.G.sampling.guidance_scale=2"], "sampling.guidance_scale is 1.0 and 2.0"),
        (["axes.size.G.evaluation.num_samples=50"], "evaluation.num_samples is 40 and 50"),
        (["axes.size.G.data.split=judge"], "evaluation.reference.split is model and judge"),
        (["set.evaluation.metrics=[fd_inf]"], "features needs at least"),
        (["set.evaluation.features=nothing"], "unknown features 'nothing'"),
        (["sampling_steps=[50]"], "steps"),
        (["axes.patch={a-b: {}, b: {}}", "axes.size={S: {}, S-a: {}}"], "two members have the name S-a-b"),
    ],
)
def test_unequal_or_impossible_evaluations_are_refused(write_study, words, message):
    with pytest.raises(TesseraError) as caught:
        study_plan.resolve_members(write_study(*words))
    assert message in str(caught.value)


def test_a_study_over_its_limits_is_refused(write_study, fixed_cost):
    config = write_study("limit_minutes=1e-9")
    plan = make_plan(config)
    with pytest.raises(TesseraError, match="limit_minutes is 1e-09") as caught:
        study_plan.check_limits(config, plan)
    allowed = int(str(caught.value).rpartition("limit_minutes=")[2])
    assert allowed >= plan.seconds / 60 > allowed - 10
    study_plan.check_limits(write_study(f"limit_minutes={allowed}"), plan)
    large = plan.members["L"].model_copy(update={"fits": False})
    with pytest.raises(TesseraError, match="these members do not fit in memory: L\n"):
        study_plan.check_limits(write_study(), study_plan.StudyPlan(members={**plan.members, "L": large}))
    study_plan.check_limits(write_study(f"limit_minutes={plan.seconds / 60 * 1.01}"), plan)


def test_a_study_may_grow_but_not_change(write_study, fixed_cost, tmp_path):
    config = write_study()
    first = make_plan(config)
    study_plan.write_plan(config, first)
    assert study_plan.read_plan(tmp_path / "out") == first
    assert study.Study.model_validate(read_yaml(tmp_path / "out/study.yaml")) == config
    moved = first.members["S"].model_copy(update={"seconds": 1234.0})
    before = study_plan.StudyPlan(members={**first.members, "S": moved})
    grown = make_plan(write_study("axes.size.M.network.hidden_size=24", "question=Another?", "limit_minutes=9"), before)
    assert grown.members["S"].seconds == 1234  # as planned before it started
    assert list(grown.members) == ["S", "L", "M"]
    with pytest.raises(
        TesseraError, match=r"in member S training.global_batch_size was 32, is 16; .*give the study another output="
    ):
        make_plan(write_study("set.training.global_batch_size=16"), first)
    with pytest.raises(TesseraError, match=r"L is not in this one, whose members are S"):
        make_plan(write_study("axes={size: {S: {network.hidden_size: 16}}}"), first)
    (tmp_path / "out/plan.json").write_text("{")
    with pytest.raises(TesseraError, match="cannot read"):
        study_plan.read_plan(tmp_path / "out")


COSTS = st.lists(st.floats(1, 1e6), min_size=1, max_size=40)


@given(COSTS, st.integers(1, 12))
def test_shards_have_equal_work(member, costs, count):
    """Longest first, each to the shard with the least work, which had at most the mean before its last member."""
    plan = study_plan.StudyPlan.model_construct(
        members={f"m{number}": member.model_copy(update={"macs": cost}) for number, cost in enumerate(costs)}
    )
    shards = [study_plan.shard_members(plan, (index, count)) for index in range(count)]
    assert sorted(name for shard in shards for name in shard) == sorted(plan.members)
    assert all(names == [name for name in plan.members if name in names] for names in shards)
    cost = {name: member.total_flops for name, member in plan.members.items()}
    fullest = max(shards, key=lambda names: sum(cost[name] for name in names))
    last = min(cost[name] for name in fullest)
    assert sum(cost[name] for name in fullest) <= (sum(cost.values()) + (count - 1) * last) / count * (1 + 1e-9)


@pytest.fixture(scope="module")
def member(tmp_path_factory):
    """A member whose training is nearly all of its cost."""
    folder = tmp_path_factory.mktemp("one")
    (folder / "tiny.yaml").write_text(
        "data: {kind: digits}\nnetwork: {patch_size: 4, hidden_size: 16, depth: 1, num_heads: 2}\n"
        "evaluation: {num_samples: 40}\ntraining: {device: cpu}\n"
    )
    (folder / "study.yaml").write_text(
        f"question: q\nrecipe: tiny.yaml\noutput: {folder / 'out'}\naxes: {{a: {{b: {{}}}}}}\nbudget: {{steps: 3}}\n"
    )
    config = study.read_study(folder / "study.yaml")
    prepared = study_plan.resolve_members(config)[0]
    plan = study_plan.MemberPlan(
        values={"a": "b"}, seed=0, recipe=prepared.recipe, parameters=prepared.parameters, macs=1,
        training_macs=1,        sampling_macs={50: 0}, memory_bytes=1, fits=True, seconds=1, evaluation_seconds=0,
    )  # fmt: skip
    assert plan.total_flops == plan.flops == 6 * 256 * 3
    return plan
