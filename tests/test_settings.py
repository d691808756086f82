"""Configuration: error messages with path and nearest key, overrides, presets, YAML."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BeforeValidator, Field, PositiveInt, ValidationError

from tessera import settings
from tessera.diffusion.gaussian import GaussianDiffusionConfig
from tessera.errors import TesseraError
from tessera.models.dit import DiTConfig
from tessera.sampling import SamplingConfig
from tessera.settings import (
    KeysOf,
    Settings,
    apply_overrides,
    expand_kind,
    read_yaml,
    to_yaml,
    unknown_name,
    validate,
)  # fmt: skip
from tessera.training.recipe import Recipe, read_recipe


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


# The type of a field decides whether its value is text or YAML

TEXTS = [
    "set #3", "2024_11_28", "2024-11-28", "2024-13-45", "007", "1e5", "0x10", "1_000", "12:30:45", "[x]", "[a, b",
    "{x}", "yes", "No", "off", "~", "Null", "true", ".inf", "key: value", "a: b: c", "- a", "#3", " a", "a ", "a\tb",
    "'quoted'", '"quoted"', "it's", "&a", "*a", "!!int 3", "%TAG", "@x", "`x`", "|", ">", "?", "a=b", "=",
    "café/日本", "C:\\new", "a\nb",
]  # fmt: skip


class FolderChoice(Settings):
    kind: Literal["folder"] = "folder"
    place: str = ""
    size: int = 1


class NumberChoice(Settings):
    kind: Literal["number"] = "number"
    place: int = 0


class Texts(Settings):
    text: str = ""
    maybe: str | None = "x"
    path: Path = Path()
    annotated: Annotated[str, Field(min_length=1)] = "x"
    several: str | list[str] = ""
    names: tuple[str, ...] = ()
    table: dict[str, str] = {}
    numbers: dict[str, float] = {}
    word: Literal["on", "off"] = "on"
    mixed: float | Literal["off"] = "off"
    count: int | None = None
    inner: Inner = Inner()
    choice: Annotated[FolderChoice | NumberChoice, BeforeValidator(expand_kind), Field(discriminator="kind")] = (
        FolderChoice()
    )
    other: Annotated[dict[str, Any], KeysOf(Inner)] = {}


def read(*overrides: str, data: dict | None = None) -> Texts:
    return validate(Texts, apply_overrides(data or {}, overrides, Texts), "the command line")


@pytest.mark.parametrize("text", [*TEXTS, "null"])
def test_a_value_of_a_text_field_is_taken_as_it_is(text):
    got = read(
        f"text={text}", f"annotated={text}", f"path={text}", f"several={text}", f"table.x={text}", f"inner.name={text}",
        "choice=folder", f"choice.place={text}", f"other.name={text}",
    )  # fmt: skip
    assert (got.text, got.annotated, got.path, got.several, got.table) == (text, text, Path(text), text, {"x": text})
    assert (got.inner.name, got.other) == (text, {"name": text})
    assert got.choice == FolderChoice(place=text)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_any_text_is_taken_as_it_is(text):
    assert read(f"text={text}").text == text
    assert read(f"maybe={text}").maybe == (None if text == "null" else text)


@pytest.mark.parametrize("text", TEXTS)
def test_only_null_unsets_a_text(text):
    assert read(f"maybe={text}").maybe == text
    assert read("maybe=null").maybe is None
    assert read("count=null", data={"count": 3}).count is None


def test_lists_and_mappings_of_texts_are_yaml_whose_items_are_texts():
    assert read("names=[007, yes, 'a, b', 1e5, null]").names == ("007", "yes", "a, b", "1e5", "null")
    assert read("several=[007, yes]").several == ["007", "yes"]
    assert read("several=[007]").several == "[007]"  # a list of one is never needed
    assert read("table={007: yes, b: 2024-01-01, c: 'x y'}").table == {"007": "yes", "b": "2024-01-01", "c": "x y"}
    assert read("numbers={7: 1e3}").numbers == {"7": 1000.0}
    assert read("inner={name: 007, steps: 7}").inner == Inner(name="007", steps=7)
    assert read("other={name: 007, steps: 7}").other == {"name": "007", "steps": 7}


def test_the_kind_of_a_choice_decides():
    assert read("choice={kind: folder, place: 007}").choice == FolderChoice(place="007")
    assert read("choice={kind: number, place: 7}").choice == NumberChoice(place=7)
    assert read("choice=number", "choice.place=7").choice == NumberChoice(place=7)
    assert read("choice.place=7", data={"choice": "number"}).choice == NumberChoice(place=7)
    assert read("choice.place=7", data={"choice": {"kind": "folder"}}).choice == FolderChoice(place="7")


def test_words_and_numbers():
    assert read("word=off").word == read("mixed=off").mixed == "off"
    assert read("mixed=1e3").mixed == 1000.0
    assert read("count=0x10").count == 16


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("text=", "'text=' has no value: give one, or null"),
        ("word=maybe", "word: "),
        ("word=yes", "(got 'yes')"),
        ("count=7 #3", "cannot read the value of 'count=7 #3' as YAML"),
        ("inner.steps=7 apples", "inner.steps: "),
        ("count=2024-13-45", "cannot read the value of 'count=2024-13-45' as YAML"),
        ("count=!!int x", "cannot read the value of 'count=!!int x'"),
        ("count=" + "[" * 5000, "cannot read the value of 'count=[[["),
        ("text=caf\udce9", "not valid UTF-8"),
    ],
)
def test_an_error_names_the_field(override, words):
    with pytest.raises(TesseraError) as caught:
        read(override)
    assert words in str(caught.value)


def test_text_in_a_file_is_the_text_that_stands_there(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "text: 007\nmaybe: 2024-11-28\npath: 1e5\nseveral: [yes, 'x: y']\nnames: [null, ~]\ntable: {1: 2}\n"
        "inner: {name: 1_000, steps: 7}\nchoice: {kind: folder, place: no, size: 0x10}\nmixed: 1e3\n"
    )
    assert validate(Texts, read_yaml(path, Texts), "") == Texts(
        text="007", maybe="2024-11-28", path=Path("1e5"), several=["yes", "x: y"], names=("null", "~"), mixed=1000.0,
        table={"1": "2"}, inner=Inner(name="1_000", steps=7), choice=FolderChoice(place="no", size=16),
    )  # fmt: skip
    path.write_text("text: ''\nmaybe: ~\ninner: {name: }")
    data = read_yaml(path, Texts)
    assert data == {"text": "", "maybe": None, "inner": {"name": None}}
    with pytest.raises(TesseraError, match="inner.name: expected text: put it in quotes"):
        validate(Texts, data, "")


def test_a_number_for_a_text_in_python_is_an_error_that_names_the_field():
    with pytest.raises(TesseraError, match=r"text: expected text: put it in quotes.*\(got 7\)"):
        validate(Texts, {"text": 7}, "")


@pytest.mark.parametrize("content", ["a: 1\nb: 2\na: 3\n", "inner: {x: 1, x: 2}", "a: 1\n'a': 2"])
def test_a_repeated_key_is_an_error(tmp_path, content):
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(TesseraError, match=r"the key '[ax]' is repeated \(line \d, column \d+\)$"):
        read_yaml(tmp_path / "recipe.yaml")


def test_anchors_and_merged_keys_are_read(tmp_path):
    (tmp_path / "recipe.yaml").write_text("inner: &i {name: x, steps: 3}\nother: {<<: *i, steps: 4}\n")
    assert read_yaml(tmp_path / "recipe.yaml", Texts)["other"] == {"name": "x", "steps": 4}


def test_paths_and_names_of_a_recipe(tmp_path):
    path = tmp_path / "odd.yaml"
    path.write_text("data: {path: 007, size: 32, cache: 1e5}\nnetwork: {preset: DiT-S/8}\nrun_dir: 2024_11_28\n")
    recipe = read_recipe(path)
    assert (recipe.run_dir, recipe.data.path, recipe.data.cache) == ("2024_11_28", "007", "1e5")
    recipe = read_recipe(path, ["data.path=set #3", "data.cache=null", "run_dir=null", "network.preset=null"])
    assert (recipe.run_dir, recipe.data.path, recipe.data.cache) == ("null", "set #3", None)
    assert recipe.network == DiTConfig()
    assert read_recipe(path, ["data.path=[a, 007]", ("run_dir", "'x'")]).data.path == ["a", "007"]
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(recipe), encoding="utf-8")
    assert read_yaml(again, Recipe) == read_yaml(again)
    assert read_recipe(again) == recipe


@pytest.mark.parametrize(
    ("words", "section"),
    [
        (["data.path=a", "data.kind=files"], {"kind": "files", "path": "a"}),
        (["data.kind=files", "data.path=a"], {"kind": "files", "path": "a"}),
        (["data.path=a", "data.size=8", "data.kind=files"], {"kind": "files", "path": "a", "size": 8}),
        (["data.path=a", "data={kind: parquet}", "data.kind=files"], {"kind": "files"}),
        (["data.kind=digits", "data.path=a", "data.kind=files"], {"kind": "files", "path": "a"}),
    ],
)
def test_a_field_of_the_command_line_stays_whatever_the_place_of_the_kind(words, section):
    assert apply_overrides({"data": {"kind": "parquet", "label": "label"}}, words) == {"data": section}


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


def test_recipes_that_come_with_the_package_are_known_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("recipes/modern.yaml")
    assert settings.find_recipe(path) == settings.RECIPES / "modern.yaml"
    assert settings.find_recipe(Path("modern.yaml")) == Path("modern.yaml")
    assert settings.find_recipe(Path("recipes/gone.yaml")) == Path("recipes/gone.yaml")
    path.parent.mkdir()
    path.write_text("network: mine")
    assert settings.read_yaml(path) == {"network": "mine"}  # a file of the user's comes first
