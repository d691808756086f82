"""The screenshots of docs/how-to/studio.md: the shipped models and a training, in the system's Chromium.

    python docs/screenshots.py          # about three minutes; writes docs/figures/studio-*.webp

Needs the extras `serve` and `dev`, and Chromium.
"""

import io
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from tessera.files import atomic_write

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs/figures"
TESSERA = [sys.executable, "-m", "tessera"]
NAMES = ["smiling cat with heart-eyes", "snowman", "rocket", "birthday cake"]
SIZE = {"width": 1280, "height": 800}
STEPS = 1500  # of the training; the screenshot is of step 200 or a later one


def save(page: Page, name: str) -> None:
    # Rounded corners and icons have few colors: without loss, WebP is smaller than with it, and text stays sharp.
    buffer = io.BytesIO()
    Image.open(io.BytesIO(page.screenshot())).convert("RGB").save(buffer, "WEBP", lossless=True)
    atomic_write(FIGURES / f"studio-{name}.webp", buffer.getvalue())


def finish(page: Page, images: int) -> None:
    page.get_by_role("button", name="Generate", exact=True).click()
    page.get_by_text(f"{images} of {images} finished").wait_for()


def show_table(page: Page) -> None:
    page.get_by_label("Model", exact=True).select_option("emoji")
    page.get_by_label("Prompt", exact=True).fill("\n".join(NAMES))
    page.get_by_label("Seeds", exact=True).fill("1")
    page.get_by_label("Rows", exact=True).select_option("condition")
    page.get_by_label("Columns", exact=True).select_option("guidance_scale")
    page.get_by_label("Values of the columns", exact=True).fill("1, 2, 3, 5")
    finish(page, 16)
    page.locator(".cell img").nth(2).click()
    page.get_by_role("button", name="Use again").wait_for()
    page.locator("form.panel").evaluate("form => form.scrollTo(0, 0)")
    save(page, "generate")


def fill_gallery(page: Page) -> None:
    page.get_by_label("Prompt", exact=True).fill("red apple\nblue heart\nowl\nfire engine\nhamburger\npenguin")
    page.get_by_label("Seeds", exact=True).fill("4")
    page.get_by_label("Columns", exact=True).select_option("seed")
    finish(page, 24)


def show_gallery(page: Page) -> None:
    page.locator(".gallery img, .results img").nth(10).click()
    page.wait_for_function(  # images below the window are loaded when they are scrolled to
        "[...document.images].every(i => i.getBoundingClientRect().top > innerHeight || (i.complete && i.naturalWidth))"
    )
    page.get_by_role("button", name="Use again").wait_for()
    save(page, "gallery")


def show_run(page: Page) -> None:
    page.get_by_text(re.compile(rf"step ([2-9]\d\d|1[0-5]\d\d) of {STEPS}")).last.wait_for()
    page.get_by_role("img", name=re.compile("^Loss: ")).wait_for()
    page.get_by_role("img", name=re.compile("^Score")).first.wait_for()
    save(page, "runs")


def main() -> None:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        sys.exit("no Chromium in PATH: install it, as in `apt-get install chromium`")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        (Path(folder) / "runs").mkdir()
        serve = [*TESSERA, "serve", "emoji", "dit-digits", "--port", str(port), "--out", f"{folder}/served"]
        train = [
            *TESSERA, "train", str(ROOT / "recipes/digits.yaml"), f"run_dir={folder}/runs/digits",
            f"training.steps={STEPS}", "training.log_every=5", "evaluation.every=50", "evaluation.metrics=[fd,kid]",
            "evaluation.num_samples=200", "training.sample_every=50",
            "network.hidden_size=96", "network.depth=4", "network.num_heads=3",
        ]  # fmt: skip
        processes = [subprocess.Popen([*serve, "--runs", f"{folder}/runs"], cwd=folder)]
        try:
            browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport=SIZE, color_scheme="light")  # pyright: ignore[reportArgumentType]
            page.set_default_timeout(300_000)
            url = f"http://127.0.0.1:{port}/"
            wait_for_server(port, processes[0])
            page.goto(f"{url}#generate")
            show_table(page)
            fill_gallery(page)
            page.emulate_media(color_scheme="dark")
            page.goto(f"{url}#gallery")
            show_gallery(page)
            processes.append(subprocess.Popen(train, cwd=folder))
            page.emulate_media(color_scheme="light")
            page.goto(f"{url}#runs")
            show_run(page)
            browser.close()
        finally:
            for process in reversed(processes):
                process.terminate()
                process.wait()


def wait_for_server(port: int, process: subprocess.Popen) -> None:
    for _ in range(600):
        if process.poll() is not None:
            sys.exit("the server did not start: see above")
        with socket.socket() as connection:
            if connection.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    sys.exit("the server did not start within two minutes")


if __name__ == "__main__":
    main()
