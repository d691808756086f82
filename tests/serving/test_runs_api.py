"""Runs below the folder of --runs: their state, and that nothing outside the folder is read."""

import asyncio
import json

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")

from tessera.errors import TesseraError  # noqa: E402
from tessera.serving.app import create_app  # noqa: E402
from tessera.serving.runs_api import curve  # noqa: E402
from tessera.serving.service import Service, ServiceOptions  # noqa: E402


def write_run(folder, *records, steps=10, **files):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(f"training: {{steps: {steps}}}\nnetwork: {{num_classes: 3}}\n")
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, content in files.items():
        path = folder / "samples" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


@pytest.fixture
def get(tmp_path):
    """The answers to requests, one after the other, of a server with the runs in tmp_path / "runs"."""

    def request(*paths, method="GET"):
        async def work():
            service = Service([], ServiceOptions(out=tmp_path / "served"))
            app = create_app(service, runs=tmp_path / "runs")
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
                answers = [await client.request(method, path) for path in paths]
            service.files.shutdown()
            return answers

        return asyncio.run(work())

    return request


def test_runs_are_listed_newest_first_with_their_steps(get, tmp_path):
    import os

    write_run(tmp_path / "runs/old", {"step": 10, "loss": 1.0})
    write_run(tmp_path / "runs/group/new", {"step": 3, "loss": 1.0}, {"loss": 2.0})
    for path in (tmp_path / "runs/old").iterdir():
        os.utime(path, (1e9, 1e9))
    runs = get("/v1/runs")[0].json()["data"]
    assert [(run["name"], run["step"], run["steps"], run["live"]) for run in runs] == [
        ("group/new", 3, 10, True), ("old", 10, 10, False)
    ]  # fmt: skip


def test_the_state_of_a_run_has_its_curves_and_samples(get, tmp_path):
    records = [{"step": step, "loss": 1 / step, "mse": 1.0, "grad_norm": float("nan")} for step in range(1, 5)]
    image = b"\x89PNG of a test"
    write_run(tmp_path / "runs/a", *records, **{"step-000000002": image, "step-000000004": image})
    state, file = get("/v1/runs/state?run=a", "/v1/runs/samples/step-000000002.png?run=a")
    state = state.json()
    assert state["series"]["loss"] == {"steps": [1, 2, 3, 4], "values": [1, 1 / 2, 1 / 3, 1 / 4]}
    assert "grad_norm" not in state["series"]  # never finite
    assert [samples["step"] for samples in state["samples"]] == [2, 4]
    assert state["classes"] == 3
    assert file.content == image


@pytest.mark.parametrize("name", ["..", "../outside", "/etc", "link", "missing", "a/../../outside", "a\0b"])
def test_nothing_outside_the_folder_is_a_run(get, tmp_path, name):
    write_run(tmp_path / "outside", {"step": 1, "loss": 1.0, "mse": 1.0}, **{"step-000000001": b"secret"})
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/link").symlink_to(tmp_path / "outside")
    query = httpx.QueryParams(run=name)
    answers = get(
        f"/v1/runs/state?{query}", f"/v1/runs/findings?{query}", f"/v1/runs/samples/step-000000001.png?{query}",
        f"/v1/runs/events?{query}",
    )  # fmt: skip
    assert [answer.status_code for answer in answers] == [404] * 4
    assert get("/v1/runs")[0].json()["data"] == []
    assert get(f"/v1/runs/models?{query}&step=1", method="POST")[0].status_code == 404


def test_files_of_a_run_are_its_samples_only(get, tmp_path):
    write_run(tmp_path / "runs/a", {"step": 1, "loss": 1.0}, **{"step-000000001": b"image"})
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "runs/a/samples/step-000000002.png").symlink_to(tmp_path / "secret.png")
    names = ("step-000000002.png", "..%2Frecipe.yaml", "%2E%2E%2Frecipe.yaml", "recipe.yaml", "step-000000003.png")
    answers = get(*(f"/v1/runs/samples/{name}?run=a" for name in names))
    assert {answer.status_code for answer in answers} == {404}


def test_a_run_of_another_version_and_a_missing_folder_are_explained(get, tmp_path):
    write_run(tmp_path / "runs/a", {"step": 1, "loss": 1.0, "mse": 1.0})
    (tmp_path / "runs/a/recipe.yaml").write_text("training: [not, a, recipe")
    answer = get("/v1/runs/state?run=a")[0]
    assert answer.status_code == 400
    assert "recipe.yaml" in answer.json()["error"]["message"]
    service = Service([], ServiceOptions(out=tmp_path / "served"))
    with pytest.raises(TesseraError, match="--runs .* is not a folder"):
        create_app(service, runs=tmp_path / "nowhere")
    service.files.shutdown()


def test_long_curves_are_averaged():
    assert curve([(step, float(step)) for step in range(1, 1001)], points=4).model_dump() == {
        "steps": [250, 500, 750, 1000], "values": [125.5, 375.5, 625.5, 875.5]
    }  # fmt: skip
    assert curve([], points=4).steps == []


def test_checkpoints_of_runs_with_similar_names_are_different_models(tmp_path):
    """a/b and a-b would both be a-b-5; the letters of other alphabets are not those of names of models."""
    names = ["a/b", "a-b", "läufe"]
    for name in names:
        write_run(tmp_path / "runs" / name, {"step": 5, "loss": 1.0})
        checkpoint = tmp_path / "runs" / name / "checkpoints/step-000000005"
        checkpoint.mkdir(parents=True)
        (checkpoint / "config.json").write_text("{}")

    async def work():
        service = Service([], ServiceOptions(out=tmp_path / "served"))
        service.ready = True
        transport = httpx.ASGITransport(app=create_app(service, runs=tmp_path / "runs"))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            answers = [
                await client.post("/v1/runs/models", params={"run": name, "step": 5}) for name in [*names, *names]
            ]
        service.files.shutdown()
        return [answer.json()["id"] for answer in answers], service.pool.entries

    ids, entries = asyncio.run(work())
    assert ids[:3] == ids[3:]
    for name, model in zip(names, ids):
        assert entries[model].path == str(tmp_path / "runs" / name / "checkpoints/step-000000005")
