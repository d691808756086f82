"""A score says how it was made; those that were made alike share a fingerprint, and only those."""

import json
from pathlib import Path
from typing import Any

import pytest

from tessera.errors import TesseraError
from tessera.evaluation import protocol
from tessera.evaluation.intervals import Estimate
from tessera.evaluation.protocol import Protocol, Score

PROTOCOL: dict[str, Any] = {
    "definition": {"metric": "fd", "distance": "Fréchet", "of": "pool"},
    "features": {"name": "inception", "weights": "0123", "resize": "299"},
    "reference": {"hash": "abcd", "count": 1000},
    "samples": 50_000,
    "size": (32, 32),
    "channels": 3,
    "drawing": {
        "sampler": {"kind": "ddim", "eta": 0.0},
        "steps": 250,
        "guidance": 1.5,
        "guidance_channels": "all",
        "spacing": "uniform",
        "seeds": "0-49999",
        "class policy": "balanced",
        "precision": "float32",
    },
}
SUBJECT = {"where": "runs/a", "pictures": "aaaa", "reference": "here", "weights": "1111"}


def changed(**changes: Any) -> Protocol:
    """The protocol with dotted fields changed, "__" for a dot."""
    told = json.loads(json.dumps(PROTOCOL))
    for name, value in changes.items():
        *parents, last = name.split("__")
        place = told
        for parent in parents:
            place = place[parent]
        place[last.replace("_of", " policy")] = value
    return Protocol(**told)


def score(metric: str = "fd", value: float = 2.0, told: Protocol | None = None, **subject: Any) -> Score:
    return Score.of(metric, Estimate(value, value - 1, value + 1), told or changed(), {**SUBJECT, **subject}, "cpu")


CHANGES: list[dict[str, Any]] = [
    {"definition__metric": "kid"},
    {"definition__of": "spatial"},
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
    {"drawing": None},
    {"drawing": {}},
    {"drawing__sampler": {"kind": "ancestral"}},
    {"drawing__sampler__eta": 1.0},
    {"drawing__steps": 249},
    {"drawing__guidance": 1.500001},
    {"drawing__guidance_channels": 3},
    {"drawing__spacing": "trailing"},
    {"drawing__seeds": "1-50000"},
    {"drawing__class_of": "uniform"},
    {"drawing__precision": "bfloat16"},
]


def test_equal_protocols_have_one_fingerprint_whatever_the_order_of_their_fields():
    backwards = Protocol(**dict(reversed(PROTOCOL.items())))
    assert changed().fingerprint == Protocol(**PROTOCOL).fingerprint == backwards.fingerprint
    assert len(changed().fingerprint) == 8


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_any_change_is_another_fingerprint_and_is_named(change):
    other = changed(**change)
    assert other.fingerprint != changed().fingerprint
    said = protocol.differences(score(), score(told=other))
    assert said
    assert all(line.startswith(next(iter(change)).split("__")[0]) for line in said)


def test_no_two_of_these_protocols_share_a_fingerprint():
    assert len({changed(**change).fingerprint for change in CHANGES}) == len(CHANGES)


def test_every_field_of_a_protocol_is_among_these_changes():
    assert {next(iter(change)).split("__")[0] for change in CHANGES} == set(Protocol.model_fields)


def test_what_was_scored_where_changes_nothing(monkeypatch):
    first = score()
    monkeypatch.setattr(protocol, "environment", lambda device: {"tessera": "99", "device": "other"})
    other = score(value=7.0, where="runs/b", pictures="bbbb", weights="2222")
    assert first.environment != other.environment
    assert first.fingerprint == other.fingerprint == first.protocol.fingerprint
    assert protocol.differences(first, other) == []


def test_scores_travel_as_json(tmp_path):
    scores = [score(), score("kid", -0.1 + 0.2, changed(drawing=None))]
    protocol.save(scores, tmp_path / "scores.json")
    for path in (tmp_path, tmp_path / "scores.json"):
        assert protocol.load(path) == scores
    assert [each.protocol.fingerprint for each in protocol.load(tmp_path)] == [each.fingerprint for each in scores]


def test_the_environment_is_told():
    told = score().environment
    assert {"tessera", "python", "device", "torch", "numpy"} <= set(told)


def test_comparing_scores_made_alike_does_not_warn():
    said = protocol.compared([score(), score("kid", 5)], [score(value=3.5), score("kid", 1.0), score("is", 1)])
    assert "warning" not in said
    head, fd, kid = said.splitlines()
    assert head.split() == ["metric", "first", "second", "difference"]
    assert fd.split(maxsplit=3) == ["fd", "2", "3.5", "+1.5, intervals overlap"]
    assert kid.split(maxsplit=3) == ["kid", "5", "1", "-4, intervals exclude each other"]


def test_comparing_scores_made_otherwise_warns_and_says_what_differs():
    other = changed(samples=100, drawing__sampler__eta=0.5)
    said = protocol.compared([score()], [score(told=other)])
    assert f"warning: fd: the numbers were not made alike:\n  {changed().fingerprint} and {other.fingerprint}" in said
    assert "- samples: 50000 and 100\n" in said
    assert said.endswith("- drawing.sampler.eta: 0.0 and 0.5")


def test_one_difference_of_many_metrics_is_told_once_for_all_of_them():
    other = changed(samples=100)
    said = protocol.compared([score(), score("kid")], [score(told=other), score("kid", told=other)])
    assert said.count("samples: 50000 and 100") == 1
    assert "warning: fd, kid: the numbers" in said


def test_nothing_in_common_is_an_error():
    with pytest.raises(TesseraError, match="nothing to compare: one has fd, the other kid"):
        protocol.compared([score()], [score("kid")])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot read scores from"),
        ("", "cannot read scores from"),
        ("[{", "cannot read scores from"),
        ("\x00", "cannot read scores from"),
        ("{}", "holds no list of scores"),
        ("[1]", "is not valid"),
        ("[{}]", "is not valid"),
        ('[{"metric": "fd"}]', "protocol"),
    ],
)
def test_a_damaged_file_is_one_error(tmp_path: Path, content, said):
    if content is not None:
        (tmp_path / "scores.json").write_text(content)
    with pytest.raises(TesseraError, match=said) as caught:
        protocol.load(tmp_path)
    assert "scores.json" in str(caught.value)


def test_a_file_cut_short_is_one_error(tmp_path):
    protocol.save([score()], tmp_path / "scores.json")
    whole = (tmp_path / "scores.json").read_bytes()
    for length in range(0, len(whole) - 2, 100):
        (tmp_path / "scores.json").write_bytes(whole[:length])
        with pytest.raises(TesseraError, match="cannot read scores from"):
            protocol.load(tmp_path)


def test_the_name_of_a_network_is_for_people():
    assert changed(features__name="by/another/path").fingerprint == changed().fingerprint
