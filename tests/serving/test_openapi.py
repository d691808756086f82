"""schemathesis over the whole OpenAPI description: no request that it makes up causes a failure."""

import asyncio
import threading

import pytest

schemathesis = pytest.importorskip("schemathesis")
pytest.importorskip("fastapi")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402
from schemathesis.specs.openapi.checks import positive_data_acceptance  # noqa: E402
from starlette.types import Receive, Scope, Send  # noqa: E402

from tessera.serving.app import create_app  # noqa: E402
from tessera.serving.models import ModelEntry  # noqa: E402
from tessera.serving.service import Service, ServiceOptions  # noqa: E402


class InLoop:
    """The application, whose requests run in one event loop: that of the service."""

    def __init__(self, app, loop: asyncio.AbstractEventLoop) -> None:
        self.app, self.loop = app, loop

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        own = asyncio.get_running_loop()
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def receive_there():
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(receive(), own))

        async def send_there(message):
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(send(message), own))

        work = self.app(scope, receive_there, send_there)
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self.loop))


@pytest.fixture
def api(tmp_path, tiny_model):
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    service = Service([ModelEntry("model", "model", lambda: tiny_model)], ServiceOptions(out=tmp_path / "out"))
    asyncio.run_coroutine_threadsafe(service.start(), loop).result(60)
    yield schemathesis.openapi.from_asgi("/openapi.json", InLoop(create_app(service), loop))
    asyncio.run_coroutine_threadsafe(service.close(), loop).result(60)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(60)


@pytest.mark.slow
def test_no_request_that_the_description_allows_or_forbids_causes_a_failure(api):
    """All checks but one: most valid bodies ask for something that the tiny model cannot do, which is 400."""
    operations = [result.ok() for result in api.get_all_operations()]
    assert len(operations) > 12
    for operation in operations:
        modes = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
        cases = st.one_of([operation.as_strategy(generation_mode=mode) for mode in modes])

        @settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(case=cases)
        def check(case):
            case.call_and_validate(excluded_checks=[positive_data_acceptance])

        check()
