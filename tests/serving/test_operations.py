"""Limits, keys, cancellation, disconnects, draining and the jobs of a process that was killed, in one process."""

import asyncio
import json

import pytest

from tessera.errors import TesseraError
from tessera.serving import gate
from tessera.serving.admission import Admission, Limits
from tessera.serving.errors import ApiError
from tessera.serving.jobs import JobFolder, JobRecord
from tessera.serving.models import ModelEntry, ModelPool, parse_models
from tessera.serving.server import check_keys

KEYS = {"ada": "a" * 20, "bob": "b" * 20}
JOB = {"condition": {"label": ["cat"]}, "seeds": [1], "settings": {"num_steps": 50}}


def as_client(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[name]}"}


class Exchange:
    """One request on the level of ASGI: `send` gives chunks of its body, `leave` disconnects."""

    def __init__(self, app, path: str, headers: dict[str, str], method: str = "POST") -> None:
        self.scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": method,
            "path": path, "raw_path": path.encode(), "query_string": b"", "scheme": "http", "root_path": "",
            "headers": [(name.encode(), value.encode()) for name, value in {"host": "127.0.0.1", **headers}.items()],
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
        }  # fmt: skip
        self.incoming, self.status, self.headers, self.body, self.reads = asyncio.Queue(), None, {}, b"", 0
        self.task = asyncio.ensure_future(app(self.scope, self._receive, self._send))

    async def _receive(self):
        self.reads += 1
        return await self.incoming.get()

    async def _send(self, message):
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        self.body += message.get("body", b"")

    def send(self, chunk: bytes, more: bool = False) -> None:
        self.incoming.put_nowait({"type": "http.request", "body": chunk, "more_body": more})

    def leave(self) -> None:
        self.incoming.put_nowait({"type": "http.disconnect"})


async def until(condition, seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


async def submit_two(client, model) -> list[str]:
    """Ids of two jobs. The second joins after the call of the first, which gets a permit."""
    first = (await client.post("/v1/jobs", json=JOB)).json()["id"]
    second = asyncio.ensure_future(client.post("/v1/jobs", json=JOB))
    await asyncio.sleep(0.05)
    model.permits.release()
    return [first, (await second).json()["id"]]


def test_cancel_and_disconnect_free_rows_within_one_step(serve, run, slow_model):
    """While a network call runs, one job is cancelled and the client of another leaves: the next call has neither."""
    body = {"prompt": "cat", "seed": 1, "num_steps": 50}

    async def work():
        async with serve(slow_model) as server:
            service, client = server.service, server.client
            slow_model.gate.clear()
            jobs = await submit_two(client, slow_model)
            exchange = Exchange(server.app, "/v1/images/generations", {"content-type": "application/json"})
            exchange.send(json.dumps(body).encode())
            while slow_model.calls[-1] != 3:
                count = len(slow_model.calls)
                slow_model.permits.release()
                await until(lambda: len(slow_model.calls) > count)  # noqa: B023
                await asyncio.sleep(0.02)
            exchange.leave()
            cancelling = asyncio.ensure_future(client.post(f"/v1/jobs/{jobs[0]}/cancel"))
            await until(lambda: sum(job.active for job in service.store.jobs.values()) == 1)
            count = len(slow_model.calls)
            slow_model.permits.release()
            await until(lambda: len(slow_model.calls) > count)
            assert slow_model.calls[-1] == 1
            slow_model.gate.set()
            record = (await cancelling).json()
            await exchange.task
            finished = (await client.get(f"/v1/jobs/{jobs[1]}/events")).text
            return record, finished, service.admission.cost, server.service.folder.read(jobs[0]).state

    record, finished, cost, state = run(work())
    assert record["state"] == state == "cancelled"
    assert '"state": "finished"' in finished
    assert cost == 0


def test_a_client_that_leaves_a_stream_cancels_its_job(serve, run, slow_model):
    body = {"prompt": "cat", "seed": 1, "num_steps": 50, "stream": True, "partial_images": 3}

    async def work():
        async with serve(slow_model) as server:
            exchange = Exchange(server.app, "/v1/images/generations", {"content-type": "application/json"})
            exchange.send(json.dumps(body).encode())
            await until(lambda: b"partial_image" in exchange.body)
            slow_model.gate.clear()
            exchange.leave()
            await exchange.task
            slow_model.gate.set()
            await until(lambda: server.service.admission.count == 0)
            (job,) = server.service.store.jobs.values()
            return job.state, len(server.service.engine.scheduler)

    assert run(work()) == ("cancelled", 0)


def test_a_full_queue_refuses_before_the_body_is_read(serve, run, slow_model):
    async def work():
        async with serve(slow_model, limits=Limits(max_queue=2)) as server:
            slow_model.gate.clear()
            jobs = await submit_two(server.client, slow_model)
            exchange = Exchange(server.app, "/v1/images/edits", {"content-length": "1000000"})
            await exchange.task
            slow_model.gate.set()
            for job in jobs:
                await server.client.get(f"/v1/jobs/{job}/events")
            again = await server.client.post("/v1/jobs", json=JOB)
            await server.client.get(f"/v1/jobs/{again.json()['id']}/events")
            return exchange, again.status_code

    exchange, again = run(work())
    assert (exchange.status, exchange.reads) == (429, 0)
    assert int(exchange.headers["retry-after"]) >= 1
    assert json.loads(exchange.body)["error"]["code"] == "queue_full"
    assert again == 202


def test_a_place_is_reserved_while_a_body_arrives(serve, run, tiny_model):
    async def work():
        async with serve(tiny_model, limits=Limits(max_queue=1)) as server:
            exchange = Exchange(server.app, "/v1/jobs", {"content-type": "application/json"})
            exchange.send(b"{", more=True)
            await until(lambda: exchange.reads == 2)
            refused = await server.client.post("/v1/jobs", json=JOB)
            exchange.leave()
            await exchange.task
            return refused.status_code, server.service.admission.count

    assert run(work()) == (429, 0)


def test_the_cost_of_the_queue_and_the_places_of_a_client():
    admission = Admission(Limits(max_job_cost=100, max_queue_cost=150, max_queue=3, max_queue_per_client=2))
    admission.measure(10.0, 1.0)
    one, two = admission.enter("a"), admission.enter("a")
    with pytest.raises(ApiError, match="you have 2 jobs"):
        admission.enter("a")
    admission.add_cost(one, 100)
    with pytest.raises(ApiError, match="no room") as refused:
        admission.add_cost(two, 100)
    assert refused.value.status_code == 429
    assert refused.value.headers == {"Retry-After": "5"}  # half of 100 at 0.1 seconds
    with pytest.raises(ApiError, match="fewer steps") as refused:
        admission.add_cost(two, 101)
    assert refused.value.status_code == 400
    admission.enter("b")
    with pytest.raises(ApiError, match="queue is full"):
        admission.enter("b")
    admission.leave(one)
    admission.leave(one)
    assert (admission.count, admission.cost) == (2, 0)


@pytest.mark.parametrize(
    ("headers", "chunks", "status"),
    [
        ({"content-length": "1001"}, [], 413),
        ({"content-length": "-1"}, [], 413),
        ({"content-length": "9" * 5000}, [], 413),
        ({}, [b"x" * 600, b"x" * 600], 413),
        ({"content-encoding": "gzip"}, [], 415),
        ({}, [b"x"], 408),
    ],
)
def test_bodies_that_are_too_large_compressed_or_slow(serve, run, tiny_model, headers, chunks, status):
    async def work():
        async with serve(tiny_model, limits=Limits(max_body_bytes=1000, body_seconds=0.2)) as server:
            exchange = Exchange(server.app, "/v1/jobs", headers)
            for chunk in chunks:
                exchange.send(chunk, more=True)
            await exchange.task
            return exchange, server.service.admission.count

    exchange, count = run(work())
    assert (exchange.status, count) == (status, 0)
    assert exchange.headers["connection"] == "close"
    assert json.loads(exchange.body)["error"]["message"]


def test_keys(serve, run, tiny_model):
    async def work():
        async with serve(tiny_model, keys=KEYS, private=True) as server:
            client = server.client
            refused = [
                await client.get("/v1/models", headers=headers)
                for headers in (
                    {}, {"Authorization": "Bearer " + "a" * 19}, {"Authorization": "Basic " + "a" * 20},
                    {"Authorization": "Bearer"}, {"Authorization": "Bearer " + "a" * 21},
                )
            ]  # fmt: skip
            refused.append(await client.post("/v1/jobs", json=JOB))
            refused.append(await client.get("/metrics"))
            job = (await client.post("/v1/jobs", json=JOB, headers=as_client("ada"))).json()
            paths = [f"/v1/jobs/{job['id']}", f"/v1/jobs/{job['id']}/events", f"/v1/jobs/{job['id']}/results/0"]
            others = [await client.get(path, headers=as_client("bob")) for path in paths]
            others.append(await client.post(f"/v1/jobs/{job['id']}/cancel", headers=as_client("bob")))
            listed = [(await client.get("/v1/jobs", headers=as_client(name))).json()["data"] for name in KEYS]
            await client.get(f"/v1/jobs/{job['id']}/events", headers=as_client("ada"))
            open_paths = [(await client.get(path)).status_code for path in ("/health", "/ready", "/")]
            return refused, job, others, listed, open_paths

    refused, job, others, listed, open_paths = run(work())
    assert {answer.status_code for answer in refused} == {401}
    assert {answer.headers["www-authenticate"] for answer in refused} == {"Bearer"}
    assert job["client"] == "ada"
    assert {answer.status_code for answer in others} == {404}
    assert [len(jobs) for jobs in listed] == [1, 0]
    assert open_paths == [200, 200, 200]


def test_pages_of_other_sites_cannot_use_the_server(serve, run, tiny_model):
    async def work():
        async with serve(tiny_model, hosts=["127.0.0.1", "localhost"]) as server:
            client = server.client
            origin = {"Origin": "http://evil.example"}
            answers = [await client.post("/v1/jobs", json=JOB, headers=origin)]
            answers.append(await client.get("/v1/models", headers={"Host": "evil.example"}))
            same = await client.post("/v1/jobs/x/cancel", headers={"Origin": "http://127.0.0.1"})
            page = await client.get("/")
            return [answer.json()["error"]["code"] for answer in answers], same.status_code, page.headers

    codes, same, headers = run(work())
    assert codes == ["wrong_origin", "wrong_host"]
    assert same == 400
    assert "default-src 'self'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/..%2fapp.py", "/v1/jobs/..%2f..%2fx",
        "/v1/jobs/job_0_000000000000000000000000/results/0",
        "/v1/jobs/job_0_000000000000000000000000/inputs/..%2fjob.json",
        "/v1/jobs/job_0_000000000000000000000000/inputs/job.json", "/v1/jobs/%00", "/v1/models/..%2f..%2fetc",
    ],
)  # fmt: skip
def test_no_path_leaves_the_folders(serve, run, tiny_model, path):
    async def work():
        async with serve(tiny_model) as server:
            (server.out / "jobs/job_0_000000000000000000000000").mkdir()
            record = JobRecord(
                id="job_0_000000000000000000000000", state="finished", model="m", client="127.0.0.1", created=1.0,
                results=["../../../secret"], inputs=["../job.json"],
            )  # fmt: skip
            server.service.folder.folder.joinpath(record.id, "job.json").write_text(record.model_dump_json())
            (server.out.parent / "secret").write_text("secret")
            return (await server.client.get(path)).status_code

    assert run(work()) in (400, 404)


def test_names_of_files():
    with pytest.raises(ValueError, match="not the file of a job"):
        JobFolder.path(JobFolder.__new__(JobFolder), "job_0_x", "job.json")


def test_jobs_of_a_killed_process(serve, run, tiny_model, tmp_path):
    folder = JobFolder(tmp_path / "served")
    ids = [f"job_0_{number:024x}" for number in range(4)]
    for job, state in zip(ids, ("submitted", "running", "finished", "cancelled")):
        folder.write(JobRecord(id=job, state=state, model="m", client="127.0.0.1", created=1.0))
    (folder.folder / ids[0] / "0.png.partial").write_bytes(b"x")
    damaged = folder.folder / f"job_0_{9:024x}"
    damaged.mkdir()
    (damaged / "job.json").write_text("{")

    async def work():
        async with serve(tiny_model) as server:
            records = [(await server.client.get(f"/v1/jobs/{job}")).json() for job in ids]
            listed = (await server.client.get("/v1/jobs", params={"limit": 3})).json()
            rest = (await server.client.get("/v1/jobs", params={"after": listed["data"][-1]["id"]})).json()
            events = (await server.client.get(f"/v1/jobs/{ids[0]}/events")).text
            return records, listed, rest, events

    records, listed, rest, events = run(work())
    assert [record["state"] for record in records] == ["failed", "failed", "finished", "cancelled"]
    assert "the server stopped" in records[0]["error"]
    assert (len(listed["data"]), listed["has_more"], len(rest["data"])) == (3, True, 1)
    assert events.endswith("\n\n")
    assert "event: end" in events
    assert not (folder.folder / ids[0] / "0.png.partial").exists()


def test_draining_finishes_accepted_jobs_and_refuses_others(serve, run, slow_model):
    async def work():
        async with serve(slow_model) as server:
            slow_model.gate.clear()
            job = (await server.client.post("/v1/jobs", json=JOB)).json()["id"]
            draining = asyncio.ensure_future(server.service.drain(30))
            await asyncio.sleep(0.05)
            refused = [await server.client.post("/v1/jobs", json=JOB), await server.client.get("/ready")]
            alive = (await server.client.get("/health")).status_code
            slow_model.gate.set()
            return await draining, refused, alive, (await server.client.get(f"/v1/jobs/{job}")).json()["state"]

    left, refused, alive, state = run(work())
    assert (left, alive, state) == (0, 200, "finished")
    assert [answer.status_code for answer in refused] == [503, 503]
    assert all(answer.headers["retry-after"] for answer in refused)


def test_after_the_deadline_jobs_fail(serve, run, slow_model):
    async def work():
        async with serve(slow_model) as server:
            slow_model.gate.clear()
            job = (await server.client.post("/v1/jobs", json=JOB)).json()["id"]
            draining = asyncio.ensure_future(server.service.drain(0.05))
            await asyncio.sleep(0.2)
            slow_model.gate.set()
            left = await draining
            return left, server.service.folder.read(job)

    left, record = run(work())
    assert (left, record.state) == (1, "failed")
    assert "the server stopped" in record.error


def test_a_network_that_fails(serve, run, make_model):
    """The jobs that shared the call fail with the reason; later ones are served."""
    model = make_model()
    original, model.broken = model.network.forward, False

    def forward(x, t, condition):
        if model.broken:
            raise RuntimeError("the device is gone")
        return original(x, t, condition)

    model.network.forward = forward

    async def work():
        async with serve(model) as server:
            model.broken = True
            failed = await server.client.post("/v1/images/generations", json={"prompt": "cat"})
            model.broken = False
            served = await server.client.post("/v1/images/generations", json={"prompt": "cat"})
            return failed, served, server.service.admission.count

    failed, served, count = run(work())
    assert (failed.status_code, served.status_code, count) == (500, 200, 0)
    assert "the device is gone" in failed.json()["error"]["message"]


def test_a_full_disk(serve, run, tiny_model, monkeypatch):
    def full(self, job, name, content):
        raise TesseraError("cannot write: no space left on device")

    async def work():
        async with serve(tiny_model) as server:
            monkeypatch.setattr(JobFolder, "write_file", full)
            answer = await server.client.post("/v1/images/generations", json={"prompt": "cat"})
            await until(lambda: server.service.admission.count == 0)
            return answer

    answer = run(work())
    assert answer.status_code == 500
    assert "no space left" in answer.json()["error"]["message"]


def test_not_ready_before_a_model_is_loaded(serve, run, tiny_model):
    async def work():
        async with serve(tiny_model, start=False) as server:
            return [
                (await server.client.get("/ready")).status_code,
                (await server.client.get("/health")).status_code,
                (await server.client.post("/v1/jobs", json=JOB)).status_code,
            ]

    assert run(work()) == [503, 503, 503]


def test_models_are_loaded_and_unloaded_by_use(serve, run, make_model):
    models = [make_model(seed=seed) for seed in range(3)]

    async def work():
        async with serve(*models, max_loaded=2) as server:
            names, loaded = [], []
            for name in ("model-0", "model-2", "model-0", "model-1", "model-1"):
                body = {"prompt": "cat", "seed": 1, "model": name, "num_steps": 2}
                assert (await server.client.post("/v1/images/generations", json=body)).status_code == 200
                names.append(name)
                loaded.append(sorted(entry.name for entry in server.service.pool.loaded))
            metrics = (await server.client.get("/metrics")).text
            return loaded, metrics

    loaded, metrics = run(work())
    zero, one, two = "model-0", "model-1", "model-2"
    assert loaded == [[zero, one], [zero, two], [zero, two], [zero, one], [zero, one]]
    assert "tessera_models_loaded 2.0" in metrics


def test_a_model_in_constant_use_does_not_keep_others_out(run, tiny_model):
    async def work():
        pool = ModelPool([ModelEntry(name, name, lambda: tiny_model) for name in "ab"], max_loaded=1)
        await pool.acquire("a")
        waiting = asyncio.ensure_future(pool.acquire("b"))
        await asyncio.sleep(0.01)
        later = asyncio.ensure_future(pool.acquire("a"))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        pool.release("a")
        (model,) = await waiting
        assert model.name == "b"
        assert not later.done()
        pool.release("b")
        await later
        with pytest.raises(TesseraError, match="needs 2 models"):
            await pool.acquire("a", "b")

    run(work())


def test_metrics_have_units_and_count_everything(serve, run, tiny_model):
    async def work():
        async with serve(tiny_model) as server:
            await server.client.post("/v1/images/generations", json={"prompt": "cat", "n": 2, "num_steps": 3})
            await server.client.post("/v1/images/generations", json={"prompt": "what"})
            return (await server.client.get("/metrics")).text

    text = run(work())
    assert 'tessera_jobs_total{model="model-0",state="finished"} 1.0' in text
    assert 'tessera_images_total{model="model-0"} 2.0' in text
    assert 'route="/v1/images/generations",status="400"} 1.0' in text
    assert "tessera_queue_pixel_steps 0.0" in text
    assert 'tessera_network_call_seconds_count{model="model-0"} 5.0' in text  # 2 of the start, and 3


def test_keys_of_a_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"# clients\nada {'a' * 16}\n\nbob {'b' * 16}\n")
    assert gate.read_keys(path) == {"ada": "a" * 16, "bob": "b" * 16}
    for text in ("ada short\n", "ada\n", f"ada {'a' * 16}\nada {'b' * 16}\n", "# nothing\n", f"ada {'ä' * 16}"):
        path.write_text(text)
        with pytest.raises(TesseraError, match="key"):
            gate.read_keys(path)
    with pytest.raises(TesseraError, match="cannot read"):
        gate.read_keys(tmp_path / "none")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.1.2.3"])
def test_this_machine_needs_no_keys(host):
    check_keys(host, {}, False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.org"])
def test_other_addresses_need_keys_or_an_explicit_flag(host):
    with pytest.raises(TesseraError, match="--keys"):
        check_keys(host, {}, False)
    check_keys(host, KEYS, False)
    check_keys(host, {}, True)


def test_names_of_models(tmp_path):
    from tessera import bundle

    for name in ("one", "two", "other/one"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / bundle.CONFIG).write_text("{}")
    one, two, other = (str(tmp_path / name) for name in ("one", "two", "other/one"))
    assert [entry.name for entry in parse_models([one, two, f"third={other}"])] == ["one", "two", "third"]
    with pytest.raises(TesseraError, match="two models have the name 'one'"):
        parse_models([one, other])
    with pytest.raises(TesseraError, match="no model at"):
        parse_models([str(tmp_path / "none")])
    with pytest.raises(TesseraError, match="one model"):
        parse_models([one, two], adapters=["x"])
    with pytest.raises(TesseraError, match="not valid"):
        parse_models([f"a b={one}"])
