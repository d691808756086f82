"""A service with a tiny model, and a client of its application in the same process."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")

from tessera.serving.app import create_app  # noqa: E402
from tessera.serving.models import ModelEntry  # noqa: E402
from tessera.serving.service import Service, ServiceOptions  # noqa: E402


@pytest.fixture
def serve(tmp_path) -> Callable:
    """`async with serve(model, ...) as server`: server.client, server.service, server.app."""

    @contextlib.asynccontextmanager
    async def running(*models, keys=None, hosts=None, start=True, **options) -> AsyncIterator[SimpleNamespace]:
        entries = [
            model if isinstance(model, ModelEntry) else ModelEntry(f"model-{n}", f"path/{n}", lambda model=model: model)
            for n, model in enumerate(models)
        ]
        service = Service(entries, ServiceOptions(out=options.pop("out", tmp_path / "served"), **options))
        app = create_app(service, keys, hosts)
        if start:
            await service.start()
        transport = httpx.ASGITransport(app=app)
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60) as client:
                yield SimpleNamespace(client=client, service=service, app=app, out=service.options.out)
        finally:
            if start:
                await service.close()

    return running


@pytest.fixture
def run() -> Callable:
    """Run a coroutine; no task may be left."""

    async def checked(work):
        result = await work
        await asyncio.sleep(0)
        assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []
        return result

    return lambda work: asyncio.run(checked(work))


@pytest.fixture
def slow_model(make_model):
    """A model whose network calls wait for `model.gate`, an Event that is set at first, or for a permit each.

    `model.calls` are the sizes of calls that have begun.
    """
    import threading

    model = make_model()
    original, model.gate, model.calls = model.network.forward, threading.Event(), []
    model.permits = threading.Semaphore(0)
    model.gate.set()

    def forward(x, t, condition):
        model.calls.append(len(x))
        while not model.gate.is_set() and not model.permits.acquire(timeout=0.01):
            pass
        return original(x, t, condition)

    model.network.forward = forward
    yield model
    model.gate.set()
