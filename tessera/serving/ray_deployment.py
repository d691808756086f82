"""The server on Ray Serve: replicas in several processes or on several machines behind one address.

Ray starts, watches and replaces the replicas and spreads the requests over them. Each replica is a whole server; the
output folder must be shared by all machines. See `PeerRouter` for how jobs are found.
"""

import contextlib
import logging
import os
import re
import signal
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.routing import Mount

from tessera.errors import TesseraError
from tessera.serving.app import create_app
from tessera.serving.gate import LOOPBACK_NAMES
from tessera.serving.models import parse_models
from tessera.serving.peers import PeerRouter
from tessera.serving.server import ServerOptions, check_keys, log_json
from tessera.serving.service import Service, ServiceOptions

logger = logging.getLogger(__name__)
APPLICATION = "tessera"
# Otherwise all requests go to the replica on the machine of the proxy. A running cluster needs it from its start.
SPREAD = "RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING", "0"
ONGOING = 1000  # requests in one replica; its own queue refuses earlier


@dataclass(frozen=True)
class Deployment:
    """What every replica needs. model_options: of `parse_models`"""

    models: Sequence[str]
    service: ServiceOptions
    server: ServerOptions = field(default_factory=ServerOptions)
    keys: Mapping[str, str] = field(default_factory=dict)
    model_options: Mapping[str, Any] = field(default_factory=dict)

    def absolute(self) -> "Deployment":
        """With paths that hold in any working directory."""
        words = []
        for word in self.models:
            name, equals, path = word.partition("=")
            is_named = equals and "/" not in name and not Path(word).expanduser().exists()
            path = Path(path if is_named else word).expanduser().resolve()
            words.append(f"{name}={path}" if is_named else str(path))
        return replace(self, models=words, service=replace(self.service, out=self.service.out.resolve()))


class Replica:
    """The class of the deployment."""

    service: Service | None = None  # of this process

    async def check_health(self) -> None:
        """Called by Ray, which replaces the replica after an error."""
        if Replica.service is not None and not Replica.service.engine.alive:
            raise RuntimeError("the engine has stopped")


def build_replica(deployment: Deployment) -> Any:
    """The ASGI application of one replica, built where it runs."""
    import ray
    from ray import serve

    log_json()
    name = re.sub(r"[^a-z0-9]", "", serve.get_replica_context().replica_id.unique_id.lower())[:8]
    service = Service(
        parse_models(deployment.models, **deployment.model_options), replace(deployment.service, replica=name)
    )
    Replica.service = service
    server = deployment.server
    hosts = None if deployment.keys or server.without_keys else sorted(LOOPBACK_NAMES | {server.host})
    router = PeerRouter(create_app(service, deployment.keys, hosts), service)

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        await service.start()
        await router.listen(ray.util.get_node_ip_address())
        yield
        await service.drain(server.drain_seconds)
        await router.close()
        await service.close()

    return Starlette(routes=[Mount("/", router)], lifespan=lifespan)


def make_application(deployment: Deployment, replicas: int, autoscaling: Mapping[str, Any] | None = None) -> Any:
    """The application for `serve.run`. autoscaling: Ray's autoscaling_config instead of a fixed number of replicas"""
    from ray import serve

    deployment = deployment.absolute()
    check_keys(deployment.server.host, deployment.keys, deployment.server.without_keys)

    def build() -> Any:
        return build_replica(deployment)

    wants_gpu = deployment.model_options.get("device", "auto") == "cuda"
    settings: dict[str, Any] = {"autoscaling_config": dict(autoscaling)} if autoscaling else {"num_replicas": replicas}
    return serve.deployment(
        name="server",
        max_ongoing_requests=ONGOING,
        graceful_shutdown_timeout_s=deployment.server.drain_seconds + 10,
        ray_actor_options={"num_cpus": 1, "num_gpus": 1 if wants_gpu else 0},
        **settings,
    )(serve.ingress(build)(Replica)).bind()


def start(deployment: Deployment, replicas: int, autoscaling: Mapping[str, Any] | None = None) -> None:
    """Start the replicas in the cluster of RAY_ADDRESS, or on this machine. Returns when requests reach them."""
    server = deployment.server
    if not server.port:
        raise TesseraError("--replicas need a --port that is not 0: all machines listen at the same one")
    import ray
    from ray import serve

    application = make_application(deployment, replicas, autoscaling)
    os.environ.setdefault(*SPREAD)
    if not ray.is_initialized():
        ray.init(logging_level=logging.WARNING)
    serve.start(http_options={"host": server.host, "port": server.port})
    try:
        serve.run(application, name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        raise TesseraError(f"the replicas could not start: {error}") from None
    while True:  # the proxies learn their routes a moment later
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"http://{server.host}:{server.port}/ready", timeout=10).status_code == 200:
                return
        time.sleep(0.1)


def run(deployment: Deployment, replicas: int) -> None:
    """Serve with replicas until a signal. Then accepted jobs are finished, and other applications of the cluster stay.

    Raises TesseraError.
    """
    from ray import serve

    start(deployment, replicas)
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # after the start, in which Ray sets a handler of its own
        signal.signal(number, lambda *_: stopped.set())
    print(f"http://{deployment.server.host}:{deployment.server.port}", flush=True)
    stopped.wait()
    serve.delete(APPLICATION)
