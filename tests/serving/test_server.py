"""The server as a process: the openai client, SIGTERM under load, SIGKILL and restart, slow and broken connections."""

import base64
import concurrent.futures
import io
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tessera import bundle, cli, generation

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))[..., None]


class Server:
    """`tessera serve` of a model on a free port of loopback."""

    def __init__(self, program: Callable, folder: Path, *words: str) -> None:
        self.out, self.log, output = folder / "out", folder / "log", folder / f"address-{time.monotonic_ns()}"
        serve = ["serve", str(folder / "model"), "--port", "0", "--out", str(self.out), *words]
        self.process = program(serve, output, self.log)
        while self.process.is_alive():
            try:
                self.address = output.read_text().strip() if output.exists() else ""
                if not self.address:
                    time.sleep(0.02)
                    continue
                if httpx.get(f"{self.address}/ready", timeout=10).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def post(self, path: str = "/v1/images/generations", **body) -> "httpx.Response":
        return httpx.post(self.address + path, json=body, timeout=60)

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def wait(self) -> int | None:
        self.process.join(60)
        return self.process.exitcode

    def end(self, number: int = signal.SIGTERM) -> int | None:
        self.send_signal(number)
        return self.wait()


@pytest.fixture
def start(tmp_path, tiny_model, processes):
    bundle.save(tiny_model, tmp_path / "model")
    servers = []

    def started(*words: str) -> Server:
        servers.append(Server(processes.program, tmp_path, *words))
        return servers[-1]

    yield started
    for server in servers:
        server.process.kill()
        server.process.join()


def test_the_openai_client(start, tiny_model):
    openai = pytest.importorskip("openai")
    server = start()
    client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="not needed")
    assert [model.id for model in client.models.list()] == ["model"]
    extra = {"seed": 4, "num_steps": 3, "guidance_scale": 2.0}
    answer = client.images.generate(model="model", prompt="dog", n=2, size="8x8", extra_body=extra)
    expected = generation.generate(tiny_model, ["dog"], [4, 5], num_steps=3, guidance_scale=2.0)
    for item, image in zip(answer.data, expected, strict=True):
        assert np.abs(pixels(base64.b64decode(item.b64_json)).astype(int) - image).max() <= 1
    stream = client.images.generate(prompt="cat", stream=True, partial_images=2, extra_body={"num_steps": 20})
    kinds = [event.type for event in stream]
    assert kinds[-1] == "image_generation.completed"
    assert set(kinds[:-1]) == {"image_generation.partial_image"}
    image = base64.b64decode(answer.data[0].b64_json)
    edited = client.images.edit(image=("a.png", image), prompt="cat", extra_body={"strength": 0.5, "seed": 1})
    assert edited.data[0].b64_json
    with pytest.raises(openai.BadRequestError, match="nearest names: 'dog'"):
        client.images.generate(prompt="doog")
    with pytest.raises(openai.NotFoundError, match="unknown model"):
        client.images.generate(prompt="dog", model="other")
    assert server.end() == 0


def test_sigterm_under_load_loses_no_accepted_request(start):
    server = start("--drain-seconds", "60")
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        waiting = [pool.submit(server.post, prompt="cat", seed=seed, num_steps=300) for seed in range(12)]
        jobs = [server.post("/v1/jobs", condition={"label": ["cat"]}, settings={"num_steps": 400}).json()["id"]]
        while len(records := list_jobs(server)) < 13:
            time.sleep(0.01)
        assert {record["state"] for record in records} != {"finished"}
        server.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        refused = None
        try:
            refused = server.post(prompt="cat", num_steps=2).status_code
        except httpx.TransportError:  # it has ended already
            refused = 503
        answers = [each.result() for each in waiting]
    assert [answer.status_code for answer in answers] == [200] * 12
    assert refused == 503
    assert server.wait() == 0
    assert {record["state"] for record in list_jobs(server)} == {"finished"}
    assert jobs[0] in {record["id"] for record in list_jobs(server)}


def list_jobs(server: Server) -> list[dict]:
    return [json.loads(path.read_text()) for path in server.out.glob("jobs/*/job.json")]


def test_after_sigkill_finished_jobs_are_there_and_others_say_so(start):
    server = start()
    done = server.post(prompt="cat", num_steps=2).json()["job"]
    body = {"condition": {"label": ["cat"]}, "seeds": list(range(200)), "settings": {"num_steps": 1000}}
    job = server.post("/v1/jobs", **body).json()["id"]
    assert server.end(signal.SIGKILL) == -signal.SIGKILL
    again = start()
    finished = httpx.get(f"{again.address}/v1/jobs/{done}").json()
    lost = httpx.get(f"{again.address}/v1/jobs/{job}").json()
    image = httpx.get(f"{again.address}/v1/jobs/{done}/results/0")
    assert (finished["state"], lost["state"]) == ("finished", "failed")
    assert "the server stopped" in lost["error"]
    assert image.content.startswith(b"\x89PNG")
    assert again.end() == 0


def test_a_deadline_and_a_second_signal(start):
    server = start("--drain-seconds", "0.3")
    body = {"condition": {"label": ["cat"]}, "seeds": list(range(200)), "settings": {"num_steps": 1000}}
    job = server.post("/v1/jobs", **body).json()["id"]
    assert server.end() == 0
    (record,) = list_jobs(server)
    assert (record["id"], record["state"]) == (job, "failed")
    again = start("--drain-seconds", "1000")
    again.post("/v1/jobs", **body)
    again.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert again.end(signal.SIGINT) == 0


def test_clients_that_send_slowly_or_nonsense_or_leave(start):
    """None of them takes a place for long, and the server serves on."""
    server = start("--max-queue", "4")
    messages = [
        b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{",
        b"POST /v1/images/edits HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"\x00\x01\x02 nonsense\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n" + b"X: " + b"y" * 100_000 + b"\r\n\r\n",
    ]
    for _ in range(4):
        for message in messages:
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                connection.sendall(message)
                time.sleep(0.01)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000000\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")
    codes = []
    thread = threading.Thread(target=lambda: codes.append(server.post(prompt="cat", num_steps=2).status_code))
    thread.start()
    thread.join(30)
    assert codes == [200]
    assert "Traceback" not in server.log.read_text()
    assert server.end() == 0


def test_errors_at_the_start(tmp_path, tiny_model, monkeypatch, capsys):
    monkeypatch.setattr(logging.root, "handlers", [])  # the command sets its own, which end with this test
    monkeypatch.setattr(logging.root, "level", logging.root.level)
    bundle.save(tiny_model, tmp_path / "model")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("{}")
    busy = socket.create_server(("127.0.0.1", 0))
    cases = {
        "no model at": [str(tmp_path / "nothing")],
        "--keys FILE": [str(tmp_path / "model"), "--host", "0.0.0.0"],
        "cannot listen": [str(tmp_path / "model"), "--port", str(busy.getsockname()[1])],
        "config.json": [str(tmp_path / "broken"), "--port", "0"],
        "two models have the name": [str(tmp_path / "model"), str(tmp_path / "model")],
    }
    for message, words in cases.items():
        monkeypatch.setattr(sys, "argv", ["tessera", "serve", "--out", str(tmp_path / "out"), *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 1
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
    busy.close()
