"""The HTTP interface in one process: images equal those of `tessera sample`, and nothing is ignored."""

import asyncio
import base64
import io
import json
import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tessera import adapter_files, adapters, bundle, clips, generation
from tessera.adapters import ControlConfig, LoRAConfig
from tessera.cli import app as cli
from tessera.data.clips import read_clip
from tessera.encoders.text import WordsConfig
from tessera.generation.image_settings import sample_command
from tessera.images import read_settings
from tessera.model import AdapterInfo
from tessera.serving.admission import Limits
from tessera.serving.models import parse_models

PATHS = ("jobs", "images/generations")


def pixels(content: bytes) -> np.ndarray:
    image = np.asarray(Image.open(io.BytesIO(content)))
    return image[..., None] if image.ndim == 2 else image


def decoded(item: dict) -> np.ndarray:
    return pixels(base64.b64decode(item["b64_json"]))


def close(one: np.ndarray, other: np.ndarray) -> bool:
    """Within one gray level."""
    return one.shape == other.shape and int(np.abs(one.astype(int) - other).max()) <= 1


def events(text: str) -> list[tuple[str, dict]]:
    blocks = [block.split("\n") for block in text.strip().split("\n\n") if not block.startswith(":")]
    return [(first.removeprefix("event: "), json.loads(second.removeprefix("data: "))) for first, second in blocks]


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    return buffer.getvalue()


def as_text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def test_an_image_is_that_of_generate(serve, run, tiny_model):
    async def work():
        async with serve(tiny_model) as server:
            body = {"prompt": "dog", "n": 3, "seed": 5, "steps": 4, "cfg_scale": 2.5, "sampler": "dpm++"}
            return (await server.client.post("/v1/images/generations", json=body)).json()

    answer = run(work())
    expected = generation.generate(tiny_model, ["dog"], [5, 6, 7], num_steps=4, guidance_scale=2.5, sampler="dpm++")
    assert [item["seed"] for item in answer["data"]] == [5, 6, 7]
    assert all(close(decoded(item), image) for item, image in zip(answer["data"], expected, strict=True))
    assert (answer["size"], answer["quality"], answer["output_format"]) == ("8x8", "4 steps", "png")
    assert answer["usage"]["output_tokens"] == 3 * 16


def test_mixed_requests_share_calls_and_each_is_as_alone(serve, run, slow_model):
    bodies = [
        {
            "prompt": ["cat", "dog", "2"][number % 3], "seed": number, "steps": [3, 5, 8][number % 3],
            "guidance_scale": [1.0, 2.0, 4.0, 1.0][number % 4], "sampler": ["ddim", "heun", "unipc"][number % 3],
        }
        for number in range(8)
    ]  # fmt: skip

    async def work():
        async with serve(slow_model) as server:
            slow_model.calls.clear()
            slow_model.gate.clear()
            posts = [server.client.post("/v1/images/generations", json=body) for body in bodies]
            tasks = [asyncio.ensure_future(post) for post in posts]
            while server.service.admission.count < 8 or len(server.service.engine.scheduler) < 1:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            slow_model.gate.set()
            return [(await task).json() for task in tasks]

    answers = run(work())
    assert max(slow_model.calls) >= 8
    slow_model.calls.clear()
    for body, answer in zip(bodies, answers, strict=True):
        label = {"2": "emu"}.get(body["prompt"], body["prompt"])
        options = {"num_steps": body["steps"], "guidance_scale": body["guidance_scale"], "sampler": body["sampler"]}
        expected = generation.generate(slow_model, [label], [body["seed"]], **options)
        assert close(decoded(answer["data"][0]), expected[0])


def test_at_a_fixed_number_of_rows_bits_do_not_depend_on_company(serve, run, make_model):
    model = make_model({"hidden_size": 64, "num_heads": 4})
    bodies = [{"prompt": "cat", "seed": n, "steps": 3 + n % 4, "guidance_scale": 1.0 + n % 3} for n in range(9)]

    async def work():
        async with serve(model, rows_per_call=4) as server:
            alone = [(await server.client.post("/v1/images/generations", json=body)).json() for body in bodies]
            posts = [server.client.post("/v1/images/generations", json=body) for body in bodies]
            together = [answer.json() for answer in await asyncio.gather(*posts)]
            return alone, together

    for one, other in zip(*run(work()), strict=True):
        assert (decoded(one["data"][0]) == decoded(other["data"][0])).all()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": "dgo"}, "nearest names: 'dog'"),
        ({"prompt": "7"}, "class 7 is out of range"),
        ({"prompt": "cat", "quality": "hd"}, "quality"),
        ({"prompt": "cat", "background": "transparent"}, "background"),
        ({"prompt": "cat", "style": "vivid"}, "unknown key 'style'"),
        ({"prompt": "cat", "n": 11}, "less than or equal to 10"),
        ({"prompt": "cat", "steps": 3, "num_steps": 3}, "num_steps is given twice"),
        ({"prompt": "cat", "num_steps": 3, "settings": {"num_steps": 4}}, "num_steps is given twice"),
        ({"prompt": "cat", "guidance_scale": 2, "settings": {"guidance_scale": 4}}, "guidance_scale is given twice"),
        ({"prompt": "cat", "size": "9x9"}, "multiples of 2"),
        ({"prompt": "cat", "negative_prompt": "dog", "guidance_scale": 2}, "not conditioned on prompts"),
        ({"prompt": "cat", "sampler": "dppm"}, "dppm"),
        ({"prompt": "cat", "settings": {"num_stps": 3}}, "did you mean 'num_steps'"),
        ({"prompt": "cat", "partial_images": 2}, "stream=true"),
        ({"prompt": "cat", "stream": True, "n": 2}, "one image"),
        ({"prompt": "cat", "output_compression": 50}, "for jpeg and webp"),
        ({"prompt": "cat", "label": "dog"}, "not both"),
        ({"prompt": "cat", "seed": 2**63 - 1, "n": 2}, "leaves no 2 seeds"),
        ({"prompt": "cat", "seed": -1}, "seed"),
        ({"prompt": "cat", "num_steps": 10**6, "n": 10, "size": "1024x1024"}, "pixel steps"),
        ({}, "prompt"),
    ],
)
def test_what_has_no_effect_or_no_meaning_is_refused(serve, run, tiny_model, body, message):
    async def work():
        async with serve(tiny_model) as server:
            answer = await server.client.post("/v1/images/generations", json=body)
            assert server.service.admission.count == 0
            assert server.service.pool.entries["model-0"].users == 0
        assert not list(server.out.glob("jobs/*"))
        return answer

    answer = run(work())
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


def test_an_unknown_model_and_path_and_method(serve, run, tiny_model):
    async def work():
        async with serve(tiny_model) as server:
            client = server.client
            answers = [await client.post("/v1/images/generations", json={"prompt": "cat", "model": "x"})]
            answers += [await client.get("/v1/nothing"), await client.put("/v1/jobs"), await client.get("/v1/models/x")]
            return [(answer.status_code, answer.json()["error"]["code"]) for answer in answers]

    codes = ["model_not_found", "not_found", "method_not_allowed", "model_not_found"]
    assert run(work()) == list(zip([404, 404, 405, 404], codes))


def test_a_body_without_its_type_is_explained(serve, run, tiny_model):
    async def work():
        async with serve(tiny_model) as server:  # as curl sends it without a header
            headers = {"content-type": "application/x-www-form-urlencoded"}
            return [
                await server.client.post(f"/v1/{path}", content=b'{"prompt": "cat"}', headers=headers) for path in PATHS
            ]

    for answer in run(work()):
        assert answer.status_code == 400
        assert "Content-Type: application/json" in answer.json()["error"]["message"]


def test_a_stream_has_its_first_preview_within_two_steps(serve, run, tiny_model):
    async def work():
        async with serve(tiny_model) as server:
            body = {"prompt": "cat", "seed": 3, "steps": 12, "stream": True, "partial_images": 3}
            return (await server.client.post("/v1/images/generations", json=body)).text

    stream = events(run(work()))
    names = [name for name, _ in stream]
    assert names == ["image_generation.partial_image"] * (len(stream) - 1) + ["image_generation.completed"]
    assert 1 <= len(stream) - 1 <= 3
    assert [data["partial_image_index"] for _, data in stream[:-1]] == list(range(len(stream) - 1))
    steps = list(generation.generate_steps(tiny_model, ["cat"], [3], num_steps=12))
    assert close(decoded(stream[-1][1]), generation.decode(tiny_model, steps[-1].x)[0])
    assert all(data["type"] == name for name, data in stream)


def test_previews_of_a_job_are_the_predicted_images(serve, run, slow_model):
    """The preview after the first of two steps is what one step from the noise predicts."""

    async def work():
        async with serve(slow_model) as server:
            slow_model.gate.clear()
            body = {"condition": {"label": ["cat"]}, "seeds": [4], "settings": {"num_steps": 2}, "preview_every": 1}
            job = (await server.client.post("/v1/jobs", json=body)).json()["id"]
            reading = asyncio.ensure_future(server.client.get(f"/v1/jobs/{job}/events"))
            await asyncio.sleep(0.1)
            for _ in range(2):
                slow_model.gate.set()
                await asyncio.sleep(0.1)
            return events((await reading).text)

    stream = run(work())
    previews = [data for name, data in stream if name == "preview"]
    (expected,) = generation.generate(slow_model, ["cat"], [4], num_steps=1)
    if previews:  # changes in quick succession are one
        assert close(decoded(previews[0]), expected)
    assert [name for name, _ in stream if name in ("result", "end")] == ["result", "end"]


def test_a_job_from_submission_to_deletion(serve, run, tiny_model):
    async def work():
        async with serve(tiny_model) as server:
            client = server.client
            body = {"condition": {"label": ["cat", 2]}, "seeds": [1, 2], "settings": {"num_steps": 3}}
            submitted = await client.post("/v1/jobs", json=body)
            assert submitted.status_code == 202
            job = submitted.json()["id"]
            stream = events((await client.get(f"/v1/jobs/{job}/events")).text)
            assert stream[-1][0] == "end"
            record = (await client.get(f"/v1/jobs/{job}")).json()
            files = [await client.get(f"/v1/jobs/{job}/results/{row}") for row in range(3)]
            listed = (await client.get("/v1/jobs")).json()
            saved = server.service.folder.path(job, "1.png")
            settings = read_settings(saved)
            deleted = await client.delete(f"/v1/jobs/{job}")
            gone = await client.get(f"/v1/jobs/{job}")
            return record, files, listed, settings, deleted.status_code, gone.status_code, saved.parent.exists()

    record, files, listed, settings, deleted, gone, exists = run(work())
    assert (record["state"], record["steps"], record["results"]) == ("finished", [3, 3], ["0.png", "1.png"])
    expected = generation.generate(tiny_model, ["cat", "emu"], [1, 2], num_steps=3)
    assert all(close(pixels(file.content), image) for file, image in zip(files, expected))
    assert files[2].status_code == 404
    assert [job["id"] for job in listed["data"]] == [record["id"]]
    assert settings["class_names"] == ["emu"]
    assert settings["seeds"] == [2]
    assert settings == record["settings"][1]
    assert (deleted, gone, exists) == (200, 404, False)


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_other_formats(serve, run, tiny_model, output_format):
    async def work():
        async with serve(tiny_model) as server:
            body = {"prompt": "cat", "seed": 1, "output_format": output_format, "output_compression": 80}
            return (await server.client.post("/v1/images/generations", json=body)).json()

    content = base64.b64decode(run(work())["data"][0]["b64_json"])
    assert Image.open(io.BytesIO(content)).format == output_format.upper()


def test_a_url_of_the_result(serve, run, tiny_model):
    async def work():
        async with serve(tiny_model) as server:
            body = {"prompt": "cat", "seed": 1, "response_format": "url"}
            answer = (await server.client.post("/v1/images/generations", json=body)).json()
            return (await server.client.get(answer["data"][0]["url"])).content

    (expected,) = generation.generate(tiny_model, ["cat"], [1])
    assert close(pixels(run(work())), expected)


def test_an_edit_changes_the_transparent_part_of_the_mask(serve, run, tiny_model):
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (8, 8), np.uint8)
    mask = np.zeros((8, 8, 4), np.uint8)
    mask[:, :4, 3] = 255  # the right half is transparent

    async def work():
        async with serve(tiny_model) as server:
            data = {"prompt": "dog", "seed": "3", "steps": "4", "guidance_scale": "2"}
            files = {"image": ("a.png", png(image)), "mask": ("m.png", png(mask))}
            answers = [await server.client.post("/v1/images/edits", data=data, files=files)]
            del files["mask"]
            data["strength"] = "0.5"
            answers.append(await server.client.post("/v1/images/edits", data=data, files=files))
            return [answer.json() for answer in answers]

    masked, whole = (decoded(answer["data"][0]) for answer in run(work()))
    area = np.zeros((8, 8), bool)
    area[:, 4:] = True
    options = {"num_steps": 4, "guidance_scale": 2.0, "init_image": image[..., None]}
    expected = generation.generate(tiny_model, ["dog"], [3], mask=area, **options)[0]
    assert close(masked, expected)
    assert (masked[:, :4, 0] == image[:, :4]).all()
    assert close(whole, generation.generate(tiny_model, ["dog"], [3], strength=0.5, **options)[0])


@pytest.mark.parametrize(
    ("data", "files", "status", "message"),
    [
        ({"prompt": "cat"}, {}, 415, "multipart"),
        ({"prompt": "cat"}, {"mask": b"x"}, 400, "the file image is missing"),
        ({"prompt": "cat"}, {"image": b"no image"}, 400, "no image that can be read"),
        ({"prompt": "cat"}, {"picture": b"x"}, 400, "picture is no file"),
        ({"prompt": "cat", "image": "text"}, {"mask": b"x"}, 400, "must be a file"),
        ({"prompt": "cat", "strength": "2"}, {"image": "good"}, 400, "strength is 2.0"),
        ({"prompt": "cat", "input_fidelity": "high"}, {"image": "good"}, 400, "unknown key 'input_fidelity'"),
        ({"prompt": "cat", "settings": "{"}, {"image": "good"}, 400, "not valid JSON"),
        ({"prompt": "cat"}, {"image": "good", "mask": "good"}, 400, "nowhere fully transparent"),
        ({"prompt": "cat"}, {"image": "bomb"}, 400, "pixels: at most"),
    ],
)  # fmt: skip
def test_edits_that_are_refused(serve, run, tiny_model, data, files, status, message):
    contents = {"good": png(np.zeros((8, 8), np.uint8)), "bomb": png(np.zeros((600, 600), np.uint8))}
    files = {name: (f"{name}.png", contents.get(content, content)) for name, content in files.items()}

    async def work():
        async with serve(tiny_model, limits=Limits(max_pixels=2**18)) as server:
            return await server.client.post("/v1/images/edits", data=data, files=files)

    answer = run(work())
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"condition": {"label": [None]}}, "condition.label.0"),
        ({"condition": {"label": [[1, 2]]}}, "cannot take this request"),
        ({"condition": {"label": [1.5]}}, "whole number"),
        ({"condition": {"size": [1]}}, "size"),
        ({}, "classes"),
        ({"condition": {"label": ["cat"]}, "settings": {"model": "x"}}, "unknown setting 'model'"),
        ({"condition": {"label": ["cat"]}, "settings": {"overrides": "x"}}, "overrides is a list"),
        ({"condition": {"label": ["cat"]}, "settings": {"num_steps": 0}}, "num_steps"),
        ({"condition": {"label": ["cat", "dog"]}, "seeds": [1, 2, 3]}, "3 images are requested"),
        ({"condition": {"label": ["cat"]}, "init_image": "%%%"}, "not base64"),
        ({"condition": {"label": ["cat"]}, "init_image": "data:image/png,x"}, "without base64"),
        ({"condition": {"label": ["cat"]}, "mask": ""}, "needs an image"),
        ({"condition": {"label": ["cat"]}, "strength": 0.5}, "needs an image"),
        ({"condition": {"label": ["cat"]}, "controls": {"edges": {"image": ""}}}, "no image that can be read"),
        ({"condition": {"label": ["cat"]}, "size": [8]}, "size"),
        ({"condition": {"label": ["cat"]}, "guidance_model": "model-0"}, "guidance_scale other than 1"),
    ],
)  # fmt: skip
def test_jobs_that_are_refused(serve, run, tiny_model, body, message):
    async def work():
        async with serve(tiny_model) as server:
            answer = await server.client.post("/v1/jobs", json=body)
            assert server.service.admission.count == 0
            return answer

    answer = run(work())
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_every_setting_of_a_request(serve, run, make_model):
    """Autoguidance, a mask, per-image scales, an interval, bfloat16 and caching, as from Python."""
    model, weak = make_model({"depth": 3}), make_model({"depth": 1}, seed=2)
    image = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    mask = np.zeros((8, 8), np.uint8)
    mask[2:6] = 255
    settings = {"num_steps": 5, "guidance_interval": [0.1, 0.9], "caching": {"kind": "first-block", "threshold": 0.2}}
    body = {
        "model": "model-0", "guidance_model": "model-1", "condition": {"label": ["cat", "emu"]}, "seeds": [1, 2],
        "guidance_scale": [1.5, 3], "settings": {**settings, "overrides": ["sampler=dpm++"]}, "strength": 0.9,
        "init_image": as_text(png(image)), "mask": "data:image/png;base64," + as_text(png(mask)),
    }  # fmt: skip

    async def work():
        async with serve(model, weak) as server:
            record = (await server.client.post("/v1/jobs", json=body)).json()
            await server.client.get(f"/v1/jobs/{record['id']}/events")
            results = [(await server.client.get(f"/v1/jobs/{record['id']}/results/{row}")).content for row in range(2)]
            original = (await server.client.get(f"/v1/jobs/{record['id']}/inputs/init-image.png")).content
            return (await server.client.get(f"/v1/jobs/{record['id']}")).json(), results, original

    record, results, original = run(work())
    expected = generation.generate(
        model, ["cat", "emu"], [1, 2], guidance_scale=[1.5, 3.0], guidance_model=weak, init_image=image[..., None],
        mask=mask > 0, strength=0.9, **settings, overrides=["sampler=dpm++"],
    )  # fmt: skip
    assert all(close(pixels(content), image) for content, image in zip(results, expected, strict=True))
    assert (pixels(original)[..., 0] == image).all()
    options = record["settings"][0]["options"]
    assert options["mask"].endswith("mask.png")
    assert options["guidance-model"] == "path/1"


def test_guidance_by_routed_tokens(serve, run, make_model):
    """As from Python; in one batch with others, and refused by a model that was trained without routes."""
    model = make_model({"depth": 4, "block": "rope-swiglu"})
    recipe = {"training": {"token_routing": {}}}
    model = replace(model, config=model.config.model_copy(update={"recipe": recipe}))
    body = {"condition": {"label": ["cat", "emu"]}, "guidance_model": "routed", "guidance_scale": 3, "seeds": [1, 2]}

    async def work():
        async with serve(model, make_model()) as server:
            refused = await server.client.post("/v1/jobs", json={"model": "model-1", **body})
            records = [(await server.client.post("/v1/jobs", json=body)).json() for _ in range(2)]
            results = []
            for record in records:
                await server.client.get(f"/v1/jobs/{record['id']}/events")
                results += [
                    (await server.client.get(f"/v1/jobs/{record['id']}/results/{row}")).content for row in (0, 1)
                ]
            return refused, (await server.client.get(f"/v1/jobs/{records[0]['id']}")).json(), results

    refused, record, results = run(work())
    assert refused.status_code == 400
    assert "training.token_routing" in refused.json()["error"]["message"]
    expected = generation.generate(model, ["cat", "emu"], [1, 2], guidance_scale=3.0, guidance_model=model.routed)
    assert all(close(pixels(content), image) for content, image in zip(results, [*expected, *expected], strict=True))
    assert record["settings"][0]["options"]["guidance-model"] == "routed"


def test_models_of_text(serve, run, make_model):
    """Prompts of different lengths share calls; a model of text and classes takes both."""
    text = WordsConfig(vocabulary=("a", "red", "blue", "circle", "square"), max_tokens=8)
    network = {"block": {"kind": "rope-swiglu", "text": "keys"}, "text_tokens": 8}
    network["vocabulary_size"] = text.build().vocabulary_size
    model = make_model(network, text=text.model_dump())
    prompts = ["a red circle", "a blue square square a red circle"]

    async def work():
        async with serve(model) as server:
            more = {"seed": 1, "steps": 4, "guidance_scale": 3, "negative_prompt": "red", "class": "dog"}
            bodies = [{**more, "prompt": prompt} for prompt in [*prompts, "a green circle"]]
            posts = [server.client.post("/v1/images/generations", json=body) for body in bodies]
            return [answer.json() for answer in await asyncio.gather(*posts)]

    *answers, unknown_word = run(work())
    assert "green" in unknown_word["error"]["message"]
    for answer, prompt in zip(answers, prompts, strict=True):
        options = {"prompts": [prompt], "negative_prompts": ["red"], "num_steps": 4, "guidance_scale": 3.0}
        assert close(decoded(answer["data"][0]), generation.generate(model, ["dog"], [1], **options)[0])


def test_controls(serve, run, make_model):
    """A job with a control image and one without share a model with a control."""
    model = make_model()
    config = ControlConfig.model_validate({"image": "grey"})
    adapters.attach(model.network, "grey", config.layers(model.network, ()))
    model.adapters["grey"] = AdapterInfo(settings=config.model_dump(mode="json"))
    image = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    body = {"condition": {"label": ["cat"]}, "seeds": [1], "settings": {"num_steps": 3}}
    control = {"grey": {"image": as_text(png(image)), "strength": 0.5}}

    async def work():
        async with serve(model) as server:
            posts = [server.client.post("/v1/jobs", json=each) for each in ({**body, "controls": control}, body)]
            jobs = [answer.json()["id"] for answer in await asyncio.gather(*posts)]
            for job in jobs:
                await server.client.get(f"/v1/jobs/{job}/events")
            return [(await server.client.get(f"/v1/jobs/{job}/results/0")).content for job in jobs]

    controlled, plain = map(pixels, run(work()))
    options = {"num_steps": 3}
    controls = {"grey": generation.ControlInput(image[..., None], 0.5)}
    assert close(controlled, generation.generate(model, ["cat"], [1], controls=controls, **options)[0])
    assert close(plain, generation.generate(model, ["cat"], [1], **options)[0])


@pytest.mark.parametrize("output_format", ["png", "webp", "mp4"])
def test_clips_are_those_of_the_command_line(serve, run, make_model, tmp_path, output_format):
    """The settings of the file give a command; the clip that it writes is the same."""
    pytest.importorskip("av")
    model = make_model({"input_size": [3, 8, 8], "in_channels": 3, "out_channels": 6})
    bundle.save(model, tmp_path / "model")
    body = {"condition": {"label": ["dog"]}, "seeds": [3], "settings": {"num_steps": 3}, "preview_every": 1}
    body |= {"output_format": output_format, "fps": 4}

    async def work():
        async with serve(bundle.load(tmp_path / "model")) as server:
            job = (await server.client.post("/v1/jobs", json=body)).json()["id"]
            stream = events((await server.client.get(f"/v1/jobs/{job}/events")).text)
            return stream, await server.client.get(f"/v1/jobs/{job}/results/0")

    stream, result = run(work())
    previews = {data["output_format"] for name, data in stream if name == "preview"}
    assert previews <= {"webp" if output_format == "mp4" else output_format}
    assert result.headers["content-type"] == f"{'video' if output_format == 'mp4' else 'image'}/{output_format}"
    path = tmp_path / f"served.{output_format}"
    path.write_bytes(result.content)
    settings = clips.read_settings(path)
    words = shlex.split(sample_command({**settings, "model": str(tmp_path / "model")}), comments=True)
    assert CliRunner().invoke(cli, [*words[1:], "--out", str(tmp_path / "samples")]).exit_code == 0
    (expected,) = (tmp_path / "samples").glob(f"*3.{output_format.replace('png', 'webp')}")
    frames = [read_clip(each, 4, channels=3).astype(int) for each in (path, expected)]
    assert frames[0].shape == (3, 8, 8, 3)
    assert np.abs(frames[0] - frames[1]).max() <= (3 if output_format == "mp4" else 1)  # H.264 may differ by more


def test_the_command_reads_the_model_as_the_server_did(serve, run, make_model, tmp_path):
    """A server's --adapter is part of the command that is stored with its images."""
    model, folder = make_model(), tmp_path / "style"
    bundle.save(model, tmp_path / "model")
    layers = LoRAConfig(rank=2).layers(model.network, ())
    adapters.attach(model.network, "style", layers)
    state = {name: torch.randn_like(tensor) for name, tensor in adapters.adapter_state(model.network, "style").items()}
    adapter_files.write(AdapterInfo(), state, folder / adapter_files.WEIGHTS)

    async def work(entry):
        async with serve(entry, out=tmp_path / "out") as server:
            body = {"condition": {"label": ["dog"]}, "seeds": [3], "settings": {"num_steps": 3}}
            job = (await server.client.post("/v1/jobs", json=body)).json()["id"]
            await server.client.get(f"/v1/jobs/{job}/events")
            return (await server.client.get(f"/v1/jobs/{job}/results/0")).content

    (entry,) = parse_models([str(tmp_path / "model")], adapters=[f"{folder}:0.5"])
    served = run(work(entry))
    (tmp_path / "served.png").write_bytes(served)
    words = shlex.split(sample_command(read_settings(tmp_path / "served.png") or {}), comments=True)
    assert words[words.index("--adapter") + 1] == f"{folder}:0.5"
    for name, command in (("same", words), ("without", [w for w in words if w not in ("--adapter", f"{folder}:0.5")])):
        done = CliRunner().invoke(cli, [*command[1:], "--out", str(tmp_path / name)])
        assert done.exit_code == 0, done.output
    (same,), (without,) = ((tmp_path / name).glob("*3.png") for name in ("same", "without"))
    assert close(pixels(same.read_bytes()), pixels(served))
    assert not close(pixels(without.read_bytes()), pixels(served))


@pytest.mark.parametrize(
    ("network", "body", "message"),
    [
        ({}, {"output_format": "mp4"}, "mp4 is for files of clips"),
        ({}, {"fps": 8}, "fps is for files of clips"),
        ({"input_size": [3, 8, 8]}, {"output_format": "jpeg", "fps": 8}, "leave it out for JPEGs"),
        ({"input_size": [3, 8, 8]}, {"output_format": "mp4", "output_compression": 80}, "leave it out for mp4"),
        ({"input_size": [3, 8, 8]}, {"output_format": "gif"}, "output_format"),
    ],
)
def test_formats_that_are_refused(serve, run, make_model, network, body, message):
    async def work():
        async with serve(make_model(network)) as server:
            return await server.client.post("/v1/jobs", json={"condition": {"label": ["cat"]}, **body})

    answer = run(work())
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_the_description_of_models(serve, run, tiny_model):
    async def work():
        async with serve(tiny_model) as server:
            return (await server.client.get("/v1/models")).json()

    (model,) = run(work())["data"]
    assert model["id"] == "model-0"
    assert model["facts"]["classes"] == ["cat", "dog", "emu"]
    assert model["facts"]["size"] == [8, 8]


def test_a_client_that_leaves_while_thumbnails_are_submitted_takes_no_place(serve, run, slow_model):
    from tessera.serving.studio_api import _thumbnails

    async def work():
        async with serve(slow_model) as server:
            service = server.service
            slow_model.calls.clear()
            slow_model.gate.clear()  # the engine is busy, so a job waits to be accepted
            await server.client.post("/v1/jobs", json={"condition": {"label": ["cat"]}, "settings": {"num_steps": 2}})
            while not slow_model.calls:
                await asyncio.sleep(0.01)
            (loaded,) = await service.pool.acquire("model-0")
            service.pool.release("model-0")
            first = asyncio.ensure_future(anext(_thumbnails(service, loaded, [0, 1])))
            while service.admission.count < 2:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            places = service.admission.count
            slow_model.gate.set()
            return places

    assert run(work()) == 1


def test_the_events_of_all_jobs_end_after_a_job_that_is_refused(serve, run, tiny_model):
    from tessera.serving.jobs_api import _all_events

    async def work():
        async with serve(tiny_model) as server:
            events = _all_events(server.service, "127.0.0.1")
            assert await anext(events) == b": open\n\n"
            body = {"condition": {"label": ["cat"]}, "settings": {"sampler": "jump"}}
            assert (await server.client.post("/v1/jobs", json=body)).status_code == 400
            server.service.draining = True
            async with asyncio.timeout(10):
                return b"".join([each async for each in events])

    assert b"event: end" in run(work())
