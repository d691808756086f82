"""Several servers with one output folder, and the same application on a Ray cluster of two nodes."""

import asyncio
import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from tessera import bundle, generation
from tessera.errors import TesseraError

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")

from tessera.serving.peers import PeerRouter  # noqa: E402
from tessera.serving.server import ServerOptions  # noqa: E402
from tessera.serving.service import ServiceOptions  # noqa: E402

JOB = {"condition": {"label": ["cat"]}, "seeds": [1], "settings": {"num_steps": 200}}


def test_a_job_is_found_from_every_replica(serve, run, slow_model, tmp_path):
    async def work():
        options = {"out": tmp_path / "shared"}
        async with serve(slow_model, replica="a", **options) as one, serve(slow_model, replica="b", **options) as two:
            routers = [PeerRouter(server.app, server.service) for server in (one, two)]
            for router in routers:
                await router.listen("127.0.0.1")
            transport = httpx.ASGITransport(app=routers[1])
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as other:
                slow_model.gate.clear()
                job = (await one.client.post("/v1/jobs", json=JOB)).json()["id"]
                slow_model.permits.release()
                while (await one.client.get(f"/v1/jobs/{job}")).json()["state"] != "running":
                    await asyncio.sleep(0.01)
                running = (await other.get(f"/v1/jobs/{job}")).json()
                slow_model.gate.set()
                events = (await other.get(f"/v1/jobs/{job}/events")).text
                finished = (await other.get(f"/v1/jobs/{job}")).json()
                image = (await other.get(f"/v1/jobs/{job}/results/0")).content
                slow_model.gate.clear()
                second = (await one.client.post("/v1/jobs", json=JOB)).json()["id"]
                cancelling = asyncio.ensure_future(other.post(f"/v1/jobs/{second}/cancel"))
                await asyncio.sleep(0.05)
                slow_model.gate.set()
                cancelled = (await cancelling).json()
                address = json.loads((tmp_path / "shared/replicas/a.json").read_text())["address"]
                async with httpx.AsyncClient() as stranger:
                    refused = (await stranger.get(f"{address}/v1/jobs")).status_code
                slow_model.gate.clear()
                third = (await one.client.post("/v1/jobs", json=JOB)).json()["id"]
                await routers[0].close()  # as if the first server were gone
                lost = (await other.get(f"/v1/jobs/{third}")).json()
                slow_model.gate.set()
                await routers[1].close()
            return running, events, finished, image, cancelled, refused, lost

    running, events, finished, image, cancelled, refused, lost = run(work())
    assert running["state"] == "running"
    assert "event: end" in events
    assert (finished["state"], cancelled["state"], lost["state"]) == ("finished", "cancelled", "failed")
    assert image.startswith(b"\x89PNG")
    assert refused == 403


def test_what_replicas_need(tiny_model, tmp_path, monkeypatch):
    from tessera.cli.serve import check_installed
    from tessera.serving.ray_deployment import Deployment, start

    deployment = Deployment([str(tmp_path)], ServiceOptions(out=tmp_path / "out"), ServerOptions(port=0))
    with pytest.raises(TesseraError, match="--port that is not 0"):
        start(deployment, 2)
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    check_installed()
    with pytest.raises(TesseraError, match=r"needs ray: pip install 'tessera\[ray\]'"):
        check_installed(with_ray=True)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@pytest.mark.slow
def test_the_command_serves_with_replicas_and_ends_after_accepted_jobs(tmp_path, tiny_model):
    pytest.importorskip("ray.serve")
    bundle.save(tiny_model, tmp_path / "model")
    words = [sys.executable, "-m", "tessera", "serve", str(tmp_path / "model"), "--replicas", "2"]
    words += ["--port", str(free_port()), "--out", str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    try:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        assert address, (tmp_path / "log").read_text()
        with httpx.Client(base_url=address, timeout=120) as client:
            image = client.post("/v1/images/generations", json={"prompt": "dog", "seed": 1, "num_steps": 3}).json()
            jobs = [client.post("/v1/jobs", json=JOB).json()["id"] for _ in range(8)]
        server.send_signal(signal.SIGTERM)
        assert server.wait(120) == 0
    finally:
        server.kill()
    content = base64.b64decode(image["data"][0]["b64_json"])
    (expected,) = generation.generate(tiny_model, ["dog"], [1], num_steps=3)
    assert np.abs(np.asarray(Image.open(io.BytesIO(content))).astype(int) - expected[..., 0]).max() <= 1
    assert len({job.split("_")[1] for job in jobs}) == 2
    states = [json.loads((tmp_path / f"out/jobs/{job}/job.json").read_text())["state"] for job in jobs]
    assert states == ["finished"] * len(jobs)


@pytest.mark.slow
def test_a_ray_cluster_of_two_nodes(tmp_path, tiny_model, monkeypatch):
    """Requests are spread over replicas on both nodes; every job is found from any of them."""
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.serve")
    from ray import serve as ray_serve
    from ray.cluster_utils import Cluster

    from tessera.serving.ray_deployment import SPREAD, Deployment, start

    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv(*SPREAD)
    bundle.save(tiny_model, tmp_path / "model")
    port = free_port()
    node = {"num_cpus": 2, "object_store_memory": 80_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    cluster.add_node(**node)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        deployment = Deployment(
            [str(tmp_path / "model")], ServiceOptions(out=tmp_path / "out"), ServerOptions("127.0.0.1", port)
        )
        start(deployment, 2)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            jobs = [client.post("/v1/jobs", json=JOB).json()["id"] for _ in range(12)]
            assert len({job.split("_")[1] for job in jobs}) == 2
            for job in jobs:
                assert "event: end" in client.get(f"/v1/jobs/{job}/events").text
                assert client.get(f"/v1/jobs/{job}").json()["state"] == "finished"
            image = client.post("/v1/images/generations", json={"prompt": "cat", "seed": 1, "num_steps": 3})
            assert image.status_code == 200
            assert client.post("/v1/images/generations", json={"prompt": "cot"}).status_code == 400
    finally:
        ray_serve.shutdown()
        ray.shutdown()
        cluster.shutdown()
        time.sleep(1)
