"""The page of `tessera serve` in a real browser: the system's Chromium, driven by Playwright."""

import asyncio
import json
import os
import re
import shutil
import socket
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tessera import adapters, generation
from tessera.adapters import ControlConfig
from tessera.model import AdapterInfo
from tessera.monitoring.logger import read_log

uvicorn, playwright = pytest.importorskip("uvicorn"), pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.run,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium in PATH: install it, as in `apt-get install chromium`"),
]
ARGUMENTS = [
    "--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"
]  # fmt: skip
KEY = "a-key-of-the-tests"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def studio(browser, tmp_path):
    """Serve models in a thread, and open the page: studio(model, ...) -> page, out, open(view). It logs no errors."""
    from tessera.serving.app import create_app
    from tessera.serving.models import ModelEntry
    from tessera.serving.service import Service, ServiceOptions

    stops, problems = [], []

    def start(*models, keys=None, runs=None, loaded=None, **options):
        def load(model):
            assert loaded is None or loaded.wait(60)
            return model

        entries = [ModelEntry(f"model-{n}", f"path/{n}", partial(load, model)) for n, model in enumerate(models)]
        service = Service(entries, ServiceOptions(out=tmp_path / "served", private=bool(keys)))
        app = create_app(service, keys, runs=runs)
        listening = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1))

        async def serve():
            starting = asyncio.create_task(service.start())  # the page can be opened while models are loaded
            try:
                await server.serve(sockets=[listening])
            finally:
                await starting
                await service.close()

        thread = threading.Thread(target=lambda: asyncio.run(serve()))
        thread.start()
        while not (server.started and (service.ready or loaded)):
            assert thread.is_alive()
            time.sleep(0.01)
        context = browser.new_context(**options)
        context.set_default_timeout(120_000)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "console", lambda message: problems.append(message.text) if "Content Security" in message.text else None
        )

        def stop():
            context.close()
            server.should_exit = True
            thread.join()

        def open_view(view="generate"):
            page.goto(f"http://127.0.0.1:{listening.getsockname()[1]}/#{view}")

        stops.append(stop)
        open_view()
        return SimpleNamespace(page=page, out=tmp_path / "served", open=open_view, context=context, service=service)

    yield start
    for stop in stops:
        stop()
    assert problems == []


def field(page, label):
    return page.get_by_label(label, exact=True)


def generate(page, count):
    def is_job(response):
        return response.request.method == "POST" and response.url.endswith("/v1/jobs")

    with page.expect_response(is_job):  # the text of an earlier job may still be there
        page.get_by_role("button", name="Generate", exact=True).click()
    page.get_by_text(f"{count} of {count} finished").wait_for()


def records(out: Path) -> list[dict]:
    """The jobs in the output folder, oldest first."""
    jobs = [json.loads(path.read_text()) | {"folder": path.parent} for path in out.glob("jobs/*/job.json")]
    return sorted((job for job in jobs if job["client"] != "thumbnails"), key=lambda job: job["created"])


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_a_table_of_classes_and_seeds_has_the_images_of_generate(studio, tiny_model):
    server = studio(tiny_model)
    page = server.page
    for name in ("cat", "emu"):
        page.locator("label.class", has_text=name).click()
    page.locator("label.class img").nth(2).wait_for()  # thumbnails, which are not in the gallery
    field(page, "Seeds").fill("2")
    field(page, "First seed").fill("7")
    field(page, "Steps").fill("5")
    generate(page, 4)
    jobs = records(server.out)
    by_row = {(job["settings"][0]["classes"][0], job["seeds"][0]): pixels(job["folder"] / "0.png") for job in jobs}
    assert set(by_row) == {(0, 7), (0, 8), (2, 7), (2, 8)}
    for (label, seed), image in by_row.items():
        expected = generation.generate(tiny_model, [label], [seed], num_steps=5)[0, ..., 0]
        assert np.abs(image.astype(int) - expected).max() <= 1

    page.get_by_role("button", name="emu, seed 8: finished").click()
    detail = page.get_by_role("complementary", name="Selected image")
    assert re.search(r"Seed\s*8\s*Class\s*emu", detail.inner_text())
    strip = detail.get_by_role("group", name="Steps of this image").get_by_role("button")
    assert strip.last.get_attribute("aria-label") == "Step 5"  # the earlier ones are previews
    if strip.count() > 1:
        strip.first.click()
        detail.locator(".large img[src^='data:image/png']").wait_for()
    # Arrow keys move in the table.
    page.get_by_role("button", name="emu, seed 8: finished").focus()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowLeft")
    assert page.locator(":focus").get_attribute("aria-label") == "cat, seed 7: finished"


def test_a_page_opened_while_the_server_loads_its_model_knows_it_afterwards(studio, tiny_model):
    loaded = threading.Event()
    page = studio(tiny_model, loaded=loaded).page
    page.get_by_text("This model is loaded when it is used first").wait_for()
    loaded.set()
    page.get_by_text("none chosen: the first one").wait_for()  # the classes
    generate(page, 4)


def test_the_form_follows_the_model(studio, tiny_model, make_model, tmp_path):
    """Thumbnails are those of the chosen model, and what the form hides for it is not sent."""
    plain = make_model({"learn_null_class": False}, seed=3)
    server = studio(tiny_model, plain)
    page = server.page
    images = page.locator("label.class img")
    images.nth(2).wait_for()
    field(page, "Guidance scale").fill("2")
    old = images.first.get_attribute("src")
    field(page, "Model").select_option("model-1")
    page.wait_for_function("old => ![old, undefined].includes(document.querySelector('label.class img')?.src)", arg=old)
    assert field(page, "Guidance scale").is_disabled()
    generate(page, 4)  # which a model without guidance would refuse

    entry = server.service.pool.entries.pop("model-1")  # as on a server that is started again with other models
    page.reload()
    page.keyboard.press("Alt+2")
    page.get_by_role("button", name="cat, seed 0").click()
    page.get_by_role("button", name="Use again").click()
    page.get_by_text("This server has no model “model-1”").wait_for()
    server.service.pool.entries["model-1"] = entry


def test_an_image_to_start_from_is_not_sent_to_a_model_of_clips(studio, tiny_model, make_model, tmp_path):
    server = studio(tiny_model, make_model({"input_size": [3, 8, 8]}))
    page = server.page
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "start.png")
    page.get_by_text("Start from an image").click()
    page.locator("input[type=file]").set_input_files(tmp_path / "start.png")
    page.locator(".stack img").wait_for()
    field(page, "Model").select_option("model-1")
    field(page, "Seeds").fill("1")
    generate(page, 1)


def test_cells_show_previews_and_can_be_cancelled(studio, slow_model):
    slow_model.gate.clear()
    slow_model.permits.release(10)  # the image of the start, whose rows are few
    server = studio(slow_model)
    page = server.page
    field(page, "Seeds").fill("3")
    field(page, "Steps").fill("300")
    page.get_by_role("button", name="Generate", exact=True).click()
    while page.locator(".cell img").count() < 2:  # previews, one network call at a time
        slow_model.permits.release()
        page.wait_for_timeout(20)
    page.get_by_role("button", name="Cancel cat, seed 1").click()
    page.get_by_role("button", name="cat, seed 1: cancelled").wait_for()
    assert page.get_by_role("button", name="Cancel cat, seed 0").is_visible()
    page.get_by_role("button", name="cat, seed 2", exact=False).first.focus()
    page.keyboard.press("Delete")
    slow_model.gate.set()
    page.get_by_text("1 of 3 finished").wait_for()
    page.wait_for_function("() => !document.querySelector('.cancel')")
    assert sorted(job["state"] for job in records(server.out)) == ["cancelled", "cancelled", "finished"]

    slow_model.gate.clear()
    page.get_by_role("button", name="Generate", exact=True).click()
    page.get_by_role("button", name="Cancel all").click()
    slow_model.gate.set()
    page.get_by_text("0 of 3 finished").wait_for()


def test_a_sweep_has_equal_seeds_in_all_cells(studio, tiny_model):
    server = studio(tiny_model)
    page = server.page
    field(page, "Rows").select_option("guidance_scale")
    field(page, "Values of the rows").fill("1, 3.5")
    field(page, "Columns").select_option("num_steps")
    field(page, "Values of the columns").fill("2, 4, x")
    field(page, "Seeds").fill("1")
    page.get_by_role("button", name="Generate", exact=True).click()
    page.get_by_role("alert").get_by_text("enter numbers with commas between them").wait_for()
    field(page, "Values of the columns").fill("2, 4")
    generate(page, 4)
    jobs = [job["settings"][0] for job in records(server.out)]
    points = {(job["guidance_scales"][0], job["sampling"]["num_steps"]) for job in jobs}
    assert points == {(1, 2), (1, 4), (3.5, 2), (3.5, 4)}
    assert {tuple(job["seeds"]) for job in jobs} == {(0,)}
    headers = page.locator("table.cells th").all_inner_texts()
    assert headers == ["steps 2", "steps 4", "guidance scale 1", "guidance scale 3.5"]

    field(page, "Values of the columns").fill("2, 4000000000")  # the server refuses it, and the page shows why
    page.get_by_role("button", name="Generate", exact=True).click()
    page.get_by_role("alert").get_by_text("pixel steps").wait_for()


def test_only_the_painted_part_is_replaced(studio, tiny_model, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "start.png")
    server = studio(tiny_model)
    page = server.page
    page.get_by_text("Start from an image").click()
    page.locator("input[type=file]").set_input_files(tmp_path / "start.png")
    page.get_by_role("button", name="Paint a mask").click()
    canvas = page.locator("canvas")
    page.get_by_text("0 % is replaced").wait_for()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.7, box["y"] + box["height"] * 0.7)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + box["height"] * 0.7)
    page.mouse.up()
    canvas.focus()
    page.keyboard.press("Space")  # the brush at the center
    page.keyboard.press("Control+z")
    page.get_by_role("button", name="Use this mask").click()
    field(page, "Seeds").fill("1")
    generate(page, 1)
    (job,) = records(server.out)
    result, mask = pixels(job["folder"] / "0.png"), pixels(job["folder"] / "mask.png")
    assert mask[5, 5:8].min() == 255  # where the stroke was
    assert mask[:4].max() == 0  # and the dot at the center was undone
    assert np.array_equal(result[mask == 0], image[mask == 0])
    assert (result != image)[mask == 255].any()


def test_clips_play(studio, make_model):
    model = make_model({"input_size": [3, 8, 8]})
    server = studio(model)
    page = server.page
    field(page, "Seeds").fill("1")
    generate(page, 1)
    (job,) = records(server.out)
    with Image.open(job["folder"] / "0.png") as clip:  # an animation, which browsers play
        assert (clip.n_frames, clip.size) == (3, (8, 8))
    page.get_by_role("button", name="cat, seed 0: finished").click()
    page.locator(".large img[src*='results']").wait_for()
    assert page.get_by_text("Start from an image").count() == 0

    pytest.importorskip("av")
    body = {"condition": {"label": ["dog"]}, "seeds": [5], "settings": {"num_steps": 2}, "output_format": "mp4"}
    page.request.post(page.url.partition("#")[0] + "v1/jobs", data=body)
    page.keyboard.press("Alt+2")
    while page.get_by_text("2 of 2").count() == 0:
        page.get_by_role("button", name="Refresh").click()
    page.get_by_role("button", name="dog, seed 5").click()
    page.wait_for_function("() => document.querySelector('.large video')?.currentTime > 0")


def test_images_of_controls_are_sent(studio, make_model, tmp_path):
    model = make_model()
    config = ControlConfig.model_validate({"image": "grey"})
    adapters.attach(model.network, "grey", config.layers(model.network, ()))
    model.adapters["grey"] = AdapterInfo(settings=config.model_dump(mode="json"))
    image = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "control.png")
    server = studio(model)
    page = server.page
    page.get_by_text("Control: grey").click()
    page.locator("input[type=file]").last.set_input_files(tmp_path / "control.png")
    page.get_by_role("img", name="image of grey").wait_for()
    field(page, "Strength of grey").fill("0.5")
    field(page, "Seeds").fill("1")
    generate(page, 1)
    (job,) = records(server.out)
    assert job["parameters"]["controls"] == {"grey": {"strength": 0.5, "is_map": False}}
    assert np.array_equal(pixels(job["folder"] / "control-grey.png"), image)


def test_the_gallery_finds_images_and_uses_them_again(studio, tiny_model):
    server = studio(tiny_model, permissions=["clipboard-read", "clipboard-write"])
    page = server.page
    page.locator("label.class", has_text="dog").click()
    field(page, "Seeds").fill("2")
    field(page, "Sampler").select_option("heun")
    field(page, "Guidance scale").fill("2.5")
    generate(page, 2)
    page.get_by_role("button", name="Reset").click()
    page.keyboard.press("Alt+2")
    page.get_by_text("2 of 2").wait_for()
    field(page, "Search").fill("seed 1 heun")
    page.get_by_text("1 of 2").wait_for()
    page.get_by_role("button", name="dog, seed 1").click()

    def copied(form):
        page.get_by_text("Copy as").click()
        page.get_by_role("button", name=form).click()
        page.get_by_text(re.compile(" copied$")).last.wait_for()
        return page.evaluate("navigator.clipboard.readText()")

    command = copied("Command line")
    assert command.startswith("tessera sample path/0")
    assert "sampler=heun" in command
    assert command.splitlines()[0].endswith("--classes dog --seeds 1")
    python = copied("Python")
    assert 'tessera.generate(model, [1], seeds=[1], guidance_scale=2.5, sampler="heun")' in python
    curl = copied("curl")
    assert '"seeds":[1]' in curl
    assert '"sampler":"heun"' in curl

    page.get_by_role("button", name="Use again").click()
    page.get_by_role("button", name="Generate", exact=True).wait_for()
    assert [field(page, name).input_value() for name in ("First seed", "Sampler", "Guidance scale")] == [
        "1", "heun", "2.5"
    ]  # fmt: skip
    assert page.get_by_role("checkbox", name="dog").is_checked()

    server.open("gallery")
    page.get_by_role("button", name="dog, seed 1").click()
    page.get_by_text("The same with").click()
    page.get_by_role("button", name="Several step counts").click()
    page.get_by_text("4 of 4 finished").wait_for()
    page.keyboard.press("Alt+2")
    page.get_by_text("6 of 6").wait_for()
    page.once("dialog", lambda dialog: dialog.accept())
    page.locator(".images button").first.click()
    page.get_by_role("button", name="Delete").click()
    page.get_by_text("5 of 5").wait_for()
    assert len(records(server.out)) == 5


def test_what_the_form_has_no_field_for_is_used_again_and_can_be_removed(studio, tiny_model):
    server = studio(tiny_model)
    page = server.page
    settings = {
        "sampler": {"kind": "dpm++", "order": 3}, "clipping": {"kind": "range"}, "guidance_interval": [0.1, 0.8],
        "num_steps": 4,
    }  # fmt: skip
    request = {"seeds": [7], "condition": {"label": ["dog"]}, "settings": settings, "output_format": "webp"}
    address = f"{page.url.partition('#')[0]}v1/jobs"
    job = page.request.post(address, data=request).json()["id"]
    while page.request.get(f"{address}/{job}").json()["state"] != "finished":
        time.sleep(0.05)
    server.open("gallery")
    page.get_by_role("button", name="dog, seed 7").click()
    page.get_by_role("button", name="Use again").click()
    note = page.get_by_text("Also used, from the image:")
    assert "clipping=" in note.inner_text()
    assert "output_format=webp" in note.inner_text()
    generate(page, 1)
    first, second = (record["parameters"] for record in records(server.out))
    assert second["settings"] == first["settings"] == settings
    assert second["condition"] == {"label": [1]}
    assert second["output_format"] == "webp"

    assert page.get_by_role("checkbox", name="dog").is_checked()
    assert "order" in note.inner_text()
    field(page, "Sampler").select_option("heun")
    page.wait_for_function("!document.body.innerText.includes('order')")
    generate(page, 1)
    assert records(server.out)[-1]["parameters"]["settings"] == settings | {"sampler": "heun"}
    page.get_by_role("button", name="Remove these").click()
    note.wait_for(state="detached")
    generate(page, 1)
    latest = records(server.out)[-1]["parameters"]
    assert latest["settings"] == {"sampler": "heun", "num_steps": 4}
    assert latest["output_format"] == "png"


def test_a_run_is_watched_while_it_trains_and_its_checkpoints_compared(studio, tmp_path):
    from tessera.settings import validate
    from tessera.training import loop
    from tessera.training.recipe import Recipe

    def recipe(steps):
        data = {
            "data": {"kind": "digits"},
            "network": {"patch_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2},
            "diffusion": {"num_timesteps": 20, "schedule": "cosine", "prediction": "v"},
            "sampling": {"num_steps": 2},
            "training": {
                "steps": steps, "global_batch_size": 16, "log_every": 1, "sample_every": 2, "sample_seeds": 1,
                "checkpoint_every": 2, "tensorboard": False, "device": "cpu",
                "optimizer": {"learning_rate": 1e-3},
            },
            "run_dir": str(tmp_path / "runs/first"),
        }  # fmt: skip
        return validate(Recipe, data, "the test's recipe")

    loop.train(recipe(4))
    server = studio(runs=tmp_path / "runs")  # without a model
    page = server.page
    page.get_by_text("This server has no model yet").wait_for()
    server.open("runs")
    page.get_by_text("step 4 of 4").last.wait_for()
    figure = page.get_by_role("img", name=re.compile("^Loss: .* at step 4$"))
    figure.wait_for()
    assert figure.locator("canvas").count() == 1
    loop.train(recipe(6))  # by this thread, while the page is open
    page.get_by_text("step 6 of 6").last.wait_for()
    loss = read_log(tmp_path / "runs/first")[-1]["loss"]
    shown = page.get_by_role("img", name=re.compile("^Loss: .* at step 6$")).get_attribute("aria-label")
    assert float(shown.split()[1]) == pytest.approx(loss, rel=0.01)
    shutil.copytree(tmp_path / "runs/first", tmp_path / "runs/second")
    os.utime(tmp_path / "runs/second/log.jsonl", (time.time() + 60, time.time() + 60))
    page.get_by_role("link", name="second").wait_for()  # the list is read every ten seconds
    assert page.locator("nav li").first.inner_text().startswith("second")  # in the order of the last change
    page.wait_for_timeout(300)
    assert page.locator(".run-title h2").inner_text() == "first"  # nobody chose the other one
    field(page, "Step of the samples").fill("1")
    page.locator("img.sample-grid[src*='step-000000002.png']").wait_for()
    page.get_by_role("heading", name="Diagnostics").wait_for()

    # The page may have read the folder before the last checkpoint was written, or before the oldest was deleted.
    page.get_by_role("checkbox", name="6", exact=True).wait_for()
    page.get_by_role("checkbox", name="2", exact=True).wait_for(state="detached")
    page.get_by_role("button", name="Compare").click()
    page.get_by_text(re.compile(r"(\d+) of \1 finished")).wait_for()
    jobs = records(server.out)
    assert {job["model"] for job in jobs} == {f"first-{step}" for step in (4, 6)}
    assert sorted(job["seeds"][0] for job in jobs) == [0, 0, 1, 1, 2, 2]


def test_a_server_with_keys_asks_for_one_once(studio, tiny_model):
    server = studio(tiny_model, keys={"me": KEY})
    page = server.page
    dialog = page.get_by_role("dialog", name="API key")
    dialog.get_by_label("Key").fill("another-key-of-a-test")
    page.keyboard.press("Enter")
    dialog.get_by_text("does not accept this key").wait_for()
    dialog.get_by_label("Key").fill(KEY)
    page.keyboard.press("Enter")
    generate(page, 4)
    assert page.locator(".cell img").first.get_attribute("src").startswith("blob:")  # an <img> cannot send the key
    page.reload()
    generate(page, 4)  # without another question


def test_with_a_key_an_image_that_is_gone_does_not_leave_another_in_its_place(studio, tiny_model):
    server = studio(tiny_model, keys={"me": KEY})
    page = server.page
    page.get_by_role("dialog", name="API key").get_by_label("Key").fill(KEY)
    page.keyboard.press("Enter")
    generate(page, 4)
    page.get_by_role("button", name="cat, seed 0: finished").click()
    page.locator(".large img").wait_for()
    (gone,) = [job for job in records(server.out) if job["seeds"] == [1]]
    (gone["folder"] / "0.png").unlink()
    page.get_by_role("button", name="cat, seed 1: finished").click()
    page.get_by_role("heading", name="cat, seed 1").wait_for()
    page.wait_for_timeout(500)
    assert page.locator(".large img").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_accessible_and_fits_narrow_windows(studio, tiny_model, tmp_path, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    (tmp_path / "runs/empty").mkdir(parents=True)
    (tmp_path / "runs/empty/recipe.yaml").write_text("training: {steps: 5}\n")
    (tmp_path / "runs/empty/log.jsonl").write_text('{"step": 1, "loss": 1.0, "mse": 1.0}\n{"step": 2, "loss": 0.5}\n')
    # 1280 pixels at a zoom of 400 %, for which there must be one column without scrolling sideways.
    size = {"width": 320, "height": 640} if scheme == "dark" else {"width": 1280, "height": 800}
    server = studio(tiny_model, runs=tmp_path / "runs", color_scheme=scheme, viewport=size)
    page = server.page

    def check():
        # By the driver's protocol: the content-security-policy does not concern it.
        serious = [
            (violation["id"], [node["html"][:200] for node in violation["nodes"]])
            for violation in axe.run(page).response["violations"]
            if violation["impact"] in ("serious", "critical")
        ]
        assert serious == []
        assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")

    generate(page, 4)
    page.locator(".cell button.image").first.click()
    page.get_by_text("All settings").click()
    check()
    page.locator("body").press("?")
    page.get_by_role("dialog", name="Keyboard shortcuts").wait_for()
    check()
    page.keyboard.press("Escape")
    server.open("gallery")
    page.locator(".images button").first.click()
    check()
    server.open("runs")
    page.get_by_role("img", name=re.compile("^Loss")).wait_for()
    check()
