"""Configuration: error messages with path and nearest key, overrides, presets, YAML."""

import math
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BeforeValidator, Field, PositiveInt, ValidationError

from tessera.diffusion.gaussian import GaussianDiffusionConfig
from tessera.errors import TesseraError
from tessera.models.dit import DiTConfig
from tessera.sampling import SamplingConfig
from tessera.settings import Settings, apply_overrides, expand_kind, read_yaml, to_yaml, unknown_name, validate


class Round(Settings):
    kind: Literal["round"] = "round"
    radius: float = 1.0


class Square(Settings):
    kind: Literal["square"] = "square"
    side: float = 2.0


class Inner(Settings):
    steps: PositiveInt = 10
    rate: float = 1e-4
    name: str = "plain"


class Outer(Settings):
    inner: Inner = Inner()
    shape: Annotated[Round | Square, BeforeValidator(expand_kind), Field(discriminator="kind")] = Round()
    sizes: tuple[int, ...] = (1, 2)
    needed: int


def fault(data, kind=Outer) -> str:
    with pytest.raises(TesseraError) as caught:
        validate(kind, data, "recipe.yaml")
    return str(caught.value)


# Errors


def test_an_unknown_key_is_reported_with_its_path_and_the_nearest_key():
    text = fault({"needed": 1, "inner": {"stpes": 3}})
    assert text.startswith("recipe.yaml is not valid:\n")
    assert "inner: unknown key 'stpes'; did you mean 'steps'?" in text


def test_a_key_without_a_near_match_lists_all_keys():
    assert "unknown key 'zzz'; known: name, rate, steps" in fault({"needed": 1, "inner": {"zzz": 3}})


def test_a_wrong_type_is_reported_with_the_value():
    text = fault({"needed": 1, "inner": {"steps": "many"}})
    assert "inner.steps: " in text
    assert "integer" in text
    assert "(got 'many')" in text


def test_a_value_out_of_range():
    text = fault({"needed": 1, "inner": {"steps": 0}})
    assert "inner.steps: " in text
    assert "greater than 0" in text


def test_a_missing_key():
    assert "needed: Field required" in fault({})


def test_all_errors_are_listed_together():
    text = fault({"inner": {"steps": 0, "rate": "fast"}})
    for path in ("inner.steps", "inner.rate", "needed"):
        assert path in text


@pytest.mark.parametrize("data", [[1, 2], "text", None, 3])
def test_data_that_is_not_a_mapping_is_an_error(data):
    assert "top level" in fault(data)


def test_an_unknown_kind_lists_the_known():
    text = fault({"needed": 1, "shape": "circle"})
    assert "circle" in text
    assert "round" in text
    assert "square" in text


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("rund", "shape: unknown shape 'rund'; did you mean 'round'?"),
        ({"kind": "zzz"}, "shape: unknown shape 'zzz'; known: round, square"),
        ({"radius": 3}, "shape: expected the name of a kind"),
        (None, "shape: expected the name of a kind, or a mapping that has one as `kind` (got None)"),
        (5, "(got 5)"),
    ],
)
def test_an_invalid_choice_does_not_mention_union_tags(shape, message):
    text = fault({"needed": 1, "shape": shape})
    assert message in text
    assert "tag" not in text


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, "nan"])
def test_numbers_are_finite(number):
    assert "inner.rate: Input should be a finite number" in fault({"needed": 1, "inner": {"rate": number}})


def test_settings_cannot_be_changed():
    with pytest.raises(ValidationError):
        Inner().steps = 3


def test_defaults_are_validated():
    class Wrong(Settings):
        steps: PositiveInt = 0

    with pytest.raises(ValidationError):
        Wrong()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ddmi", "unknown sampler 'ddmi'; did you mean 'ddim'?"),
        ("xyz", "unknown sampler 'xyz'; known: ancestral, ddim"),
    ],
)
def test_unknown_name(name, expected):
    assert unknown_name("sampler", name, ["ddim", "ancestral"]) == expected


# Choices and presets


def test_a_kind_alone_selects_its_defaults():
    assert validate(Outer, {"needed": 1, "shape": "square"}, "").shape == Square()
    assert validate(Outer, {"needed": 1, "shape": {"kind": "square", "side": 3}}, "").shape == Square(side=3)
    assert "unknown key 'radius'" in fault({"needed": 1, "shape": {"kind": "square", "radius": 3}})


def test_choices_of_the_core_configurations():
    assert validate(GaussianDiffusionConfig, {"schedule": "cosine"}, "").schedule.kind == "cosine"
    assert validate(DiTConfig, {"block": "in-context"}, "").block.kind == "in-context"
    assert validate(SamplingConfig, {"sampler": "ancestral"}, "").sampler.kind == "ancestral"
    assert validate(SamplingConfig, {"sampler": {"kind": "ddim", "eta": 1}}, "").sampler.eta == 1


def test_a_preset_sets_defaults_that_can_be_changed():
    config = validate(DiTConfig, {"preset": "DiT-B/4"}, "")
    assert (config.depth, config.hidden_size, config.num_heads, config.patch_size) == (12, 768, 12, 4)
    config = validate(DiTConfig, {"preset": "DiT-B/4", "depth": 3, "patch_size": 8, "input_size": [16, 24]}, "")
    assert (config.depth, config.hidden_size, config.num_heads, config.patch_size) == (3, 768, 12, 8)
    assert config.input_size == (16, 24)
    assert "preset" not in config.model_dump()


def test_an_unknown_preset_suggests_the_nearest():
    assert "unknown preset 'DiT-B4'; did you mean 'DiT-B/4'?" in fault({"preset": "DiT-B4"}, DiTConfig)


# Overrides


def test_overrides_change_nested_sections_of_a_copy():
    data = {"training": {"steps": 10, "seed": 0}, "name": "a"}
    got = apply_overrides(data, ["training.steps=1000", "name=b", "network.block.kind=adaln"])
    assert got == {"training": {"steps": 1000, "seed": 0}, "name": "b", "network": {"block": {"kind": "adaln"}}}
    assert data == {"training": {"steps": 10, "seed": 0}, "name": "a"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        ("3", 3),
        ("0.5", 0.5),
        ("true", True),
        ("null", None),
        ("[1, 2]", [1, 2]),
        ("{kind: ddim, eta: 1}", {"kind": "ddim", "eta": 1}),
        ("plain", "plain"),
        ("a=b", "a=b"),
        ("nan", "nan"),
        ("infinity", "infinity"),
        ("'1e-4'", "1e-4"),
        ('"12"', "12"),
        ("", None),
    ],
)
def test_values_are_read_as_yaml_with_exponents(text, value):
    result = apply_overrides({}, [f"key={text}"])["key"]
    assert result == value
    assert type(result) is type(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_that_python_prints_is_read_back(number):
    assert apply_overrides({}, [f"key={number!r}"])["key"] == number


def test_another_kind_drops_the_fields_of_the_one_it_replaces():
    data = {"diffusion": {"kind": "gaussian", "schedule": {"kind": "linear", "start": 1e-3}, "num_timesteps": 100}}
    for override in ("diffusion.schedule.kind=cosine", "diffusion.schedule=cosine"):
        diffusion = apply_overrides(data, [override])["diffusion"]
        assert validate(GaussianDiffusionConfig, diffusion, "").schedule.kind == "cosine"
        assert diffusion["num_timesteps"] == 100


def test_the_same_kind_keeps_its_fields():
    data = {"schedule": {"kind": "linear", "start": 1e-3}}
    assert apply_overrides(data, ["schedule.kind=linear"]) == data


def test_a_field_of_a_choice_given_by_its_kind_alone():
    assert apply_overrides({"schedule": "cosine"}, ["schedule.offset=0.1"]) == {
        "schedule": {"kind": "cosine", "offset": 0.1}
    }


def test_later_overrides_win():
    assert apply_overrides({}, ["a.b=1", "a.b=2"]) == {"a": {"b": 2}}


@pytest.mark.parametrize(
    ("data", "assignment", "words"),
    [
        ({}, "steps", "write key=value"),
        ({}, "=3", "write key=value"),
        ({}, "key=[1, 2", "cannot read the value of 'key=[1, 2'"),
        ({"steps": 3}, "steps.more=1", "steps is a value, not a section"),
        ({"a": {"b": [1]}}, "a.b.c=1", "a.b is a value, not a section"),
    ],
)
def test_malformed_overrides(data, assignment, words):
    with pytest.raises(TesseraError) as caught:
        apply_overrides(data, [assignment])
    assert words in str(caught.value)


# YAML


def test_settings_survive_yaml(tmp_path):
    for name in ("émeu: #1", "1e-4", "12"):
        settings = Outer(needed=3, inner=Inner(rate=1e-7, name=name), shape=Square(side=math.pi), sizes=())
        path = tmp_path / "recipe.yaml"
        path.write_text(to_yaml(settings), encoding="utf-8")
        assert validate(Outer, read_yaml(path), "") == settings


@pytest.mark.parametrize(
    "settings",
    [
        DiTConfig(input_size=(16, 24), preset="DiT-S/8", block="cross-attention"),
        GaussianDiffusionConfig(schedule="cosine", prediction="v", variance="beta"),
        SamplingConfig(sampler={"kind": "ddim", "eta": 0.3}, guidance_scale=4.0, guidance_channels=3),
    ],
    ids=lambda settings: type(settings).__name__,
)
def test_core_configurations_survive_yaml(tmp_path, settings):
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(settings), encoding="utf-8")
    assert validate(type(settings), read_yaml(path), "") == settings


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: [1, 2", "not readable as YAML"),
        (b"\xff\xfe\xfa", "not readable as YAML"),
        (b"- 1\n- 2\n", "holds list"),
        (b"", "holds NoneType"),
    ],
)
def test_unreadable_recipes(tmp_path, content, words):
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(TesseraError, match=words):
        read_yaml(tmp_path / "recipe.yaml")


def test_a_missing_recipe(tmp_path):
    with pytest.raises(TesseraError, match="no recipe at"):
        read_yaml(tmp_path / "recipe.yaml")
    with pytest.raises(TesseraError, match="not readable"):
        read_yaml(tmp_path)
