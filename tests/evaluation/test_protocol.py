"""Scores with the same protocol, and only those, have the same fingerprint."""

import json
from pathlib import Path
from typing import Any

import pytest

from tessera.errors import TesseraError
from tessera.evaluation import protocol
from tessera.evaluation.protocol import Protocol, Score
from tessera.reporting.estimates import Estimate

PROTOCOL: dict[str, Any] = {
    "definition": {"metric": "fd", "distance": "Fréchet", "features": "pool"},
    "features": {"name": "inception", "weights": "0123", "resize": "299"},
    "reference": {"hash": "abcd", "count": 1000},
    "samples": 50_000,
    "size": (32, 32),
    "channels": 3,
    "sampling": {
        "sampler": {"kind": "ddim", "eta": 0.0},
        "num_steps": 250,
        "guidance_scale": 1.5,
        "guidance_channels": "all",
        "timestep_spacing": "uniform",
        "seeds": "0-49999",
        "class_policy": "balanced",
        "precision": "float32",
    },
}
SOURCE = {"description": "runs/a", "images": "aaaa", "reference": "here", "weights": "1111"}


def changed(**changes: Any) -> Protocol:
    """The protocol with dotted fields changed, "__" for a dot."""
    contents = json.loads(json.dumps(PROTOCOL))
    for name, value in changes.items():
        *parents, last = name.split("__")
        section = contents
        for parent in parents:
            section = section[parent]
        section[last] = value
    return Protocol(**contents)


def score(metric: str = "fd", value: float = 2.0, protocol: Protocol | None = None, **source: Any) -> Score:
    estimate = Estimate(value, value - 1, value + 1)
    return Score.from_estimate(metric, estimate, protocol or changed(), {**SOURCE, **source}, "cpu")


CHANGES: list[dict[str, Any]] = [
    {"definition__metric": "kid"},
    {"definition__features": "spatial"},
    {"definition__splits": 10},
    {"features__weights": "0124"},
    {"features__resize": "224"},
    {"features": {}},
    {"reference__hash": "abce"},
    {"reference__count": 1001},
    {"reference__count": None},
    {"samples": 49_999},
    {"size": (32, 33)},
    {"size": (33, 32)},
    {"channels": 1},
    {"sampling": None},
    {"sampling": {}},
    {"sampling__sampler": {"kind": "ancestral"}},
    {"sampling__sampler__eta": 1.0},
    {"sampling__num_steps": 249},
    {"sampling__guidance_scale": 1.500001},
    {"sampling__guidance_channels": 3},
    {"sampling__timestep_spacing": "trailing"},
    {"sampling__seeds": "1-50000"},
    {"sampling__class_policy": "uniform"},
    {"sampling__precision": "bfloat16"},
]


def test_the_order_of_fields_does_not_change_the_fingerprint():
    backwards = Protocol(**dict(reversed(PROTOCOL.items())))
    assert changed().fingerprint == Protocol(**PROTOCOL).fingerprint == backwards.fingerprint
    assert len(changed().fingerprint) == 8


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_every_change_changes_the_fingerprint_and_is_listed(change):
    other = changed(**change)
    assert other.fingerprint != changed().fingerprint
    differences = protocol.protocol_differences(score(), score(protocol=other))
    assert differences
    assert all(line.startswith(next(iter(change)).split("__")[0]) for line in differences)


def test_different_protocols_have_different_fingerprints():
    assert len({changed(**change).fingerprint for change in CHANGES}) == len(CHANGES)


def test_the_changes_cover_every_field():
    assert {next(iter(change)).split("__")[0] for change in CHANGES} == set(Protocol.model_fields)


def test_the_source_and_the_environment_do_not_change_the_fingerprint(monkeypatch):
    first = score()
    monkeypatch.setattr(protocol, "environment", lambda device: {"tessera": "99", "device": "other"})
    other = score(value=7.0, description="runs/b", images="bbbb", weights="2222")
    assert first.environment != other.environment
    assert first.fingerprint == other.fingerprint == first.protocol.fingerprint
    assert protocol.protocol_differences(first, other) == []


def test_scores_are_saved_as_json(tmp_path):
    scores = [score(), score("kid", -0.1 + 0.2, changed(sampling=None))]
    protocol.save(scores, tmp_path / "scores.json")
    for path in (tmp_path, tmp_path / "scores.json"):
        assert protocol.load(path) == scores
    assert [each.protocol.fingerprint for each in protocol.load(tmp_path)] == [each.fingerprint for each in scores]


def test_the_environment_is_recorded():
    assert {"tessera", "python", "device", "torch", "numpy"} <= set(score().environment)


@pytest.mark.parametrize("value", [0.5, -1.23456e-05, -1.23456e-100, float("inf")])
def test_columns_of_the_table_of_scores_are_separate(value):
    """Also of the longest interval: each line has the same cells, two spaces apart."""
    line = score("a_metric_of_a_long_name", value).model_copy(update={"low": value, "high": value})
    header, *lines = protocol.score_table([score(), line]).splitlines()
    columns = [header.index(name) for name in ("metric", "value", "95 %", "fingerprint")]
    cells = [[text[start:end].strip() for start, end in zip(columns, [*columns[1:], None])] for text in lines]
    assert cells[1] == [line.metric, f"{value:.5g}", f"{value:.5g} to {value:.5g}", line.fingerprint]
    assert all(text[start - 2 : start] == "  " for text in lines for start in columns[1:])


def test_comparing_scores_of_one_protocol_does_not_warn():
    table = protocol.compare([score(), score("kid", 5)], [score(value=3.5), score("kid", 1.0), score("is", 1)])
    assert "warning" not in table
    head, fd, kid = table.splitlines()
    assert head.split() == ["metric", "first", "second", "difference"]
    assert fd.split(maxsplit=3) == ["fd", "2", "3.5", "+1.5, intervals overlap"]
    assert kid.split(maxsplit=3) == ["kid", "5", "1", "-4, intervals do not overlap"]


def test_comparing_scores_of_different_protocols_warns_and_lists_the_differences():
    other = changed(samples=100, sampling__sampler__eta=0.5)
    table = protocol.compare([score()], [score(protocol=other)])
    assert "warning: fd: the protocols differ" in table
    assert f"{changed().fingerprint} and {other.fingerprint}" in table
    assert "- samples: 50000 and 100\n" in table
    assert table.endswith("- sampling.sampler.eta: 0.0 and 0.5")


def test_a_difference_of_several_metrics_is_listed_once():
    other = changed(samples=100)
    table = protocol.compare([score(), score("kid")], [score(protocol=other), score("kid", protocol=other)])
    assert table.count("samples: 50000 and 100") == 1
    assert "warning: fd, kid: the protocols differ" in table


def test_scores_without_a_common_metric_are_an_error():
    with pytest.raises(TesseraError, match="nothing to compare: the first has fd, the second kid"):
        protocol.compare([score()], [score("kid")])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read scores from"),
        ("", "cannot read scores from"),
        ("[{", "cannot read scores from"),
        ("\x00", "cannot read scores from"),
        ("{}", "does not hold a list of scores"),
        ("[1]", "is not valid"),
        ("[{}]", "is not valid"),
        ('[{"metric": "fd"}]', "protocol"),
        ('[{"format": 1, "environment": {"tessera": "0.5.0"}}]', "written by Tessera 0.5.0 in format 1; .* format 2"),
    ],
)
def test_a_damaged_file_is_one_error(tmp_path: Path, content, message):
    if content is not None:
        (tmp_path / "scores.json").write_text(content)
    with pytest.raises(TesseraError, match=message) as caught:
        protocol.load(tmp_path)
    assert "scores.json" in str(caught.value)


def test_a_truncated_file_is_one_error(tmp_path):
    protocol.save([score()], tmp_path / "scores.json")
    whole = (tmp_path / "scores.json").read_bytes()
    for length in range(0, len(whole) - 2, 100):
        (tmp_path / "scores.json").write_bytes(whole[:length])
        with pytest.raises(TesseraError, match="cannot read scores from"):
            protocol.load(tmp_path)


def test_the_name_of_the_feature_network_does_not_change_the_fingerprint():
    assert changed(features__name="by/another/path").fingerprint == changed().fingerprint
