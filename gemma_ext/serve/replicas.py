"""Many servers behind one address: each replica of Ray Serve has an engine of its own.

Ray starts replicas where its cluster has room, replaces those that die or whose engine fails, and
gives a request to the less busy of two (it looks at requests under way). A stream stays with its
replica.
"""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING, Any

from gemma_ext.extras import require
from gemma_ext.serve.launch import Launch

if TYPE_CHECKING:
    from fastapi import FastAPI

APP = "gemma_ext"
_HEALTH_SECONDS = 5.0  # between two looks at a replica; Ray gives up on one after three bad ones


class _Replica:
    """One server; Ray replaces it when its engine has failed."""

    app: FastAPI  # of Ray's ingress

    def check_health(self) -> None:
        trouble = self.app.state.service.engine.trouble
        if trouble is not None:
            raise RuntimeError(trouble)


def deploy(
    launch: Launch,
    replicas: int,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    address: str | None = None,
    cpus: float = 1.0,
    gpus: float = 0.0,
) -> Any:
    """Starts replicas behind `host:port` and returns when all of them serve.

    Args:
        launch: of each replica; its model has to be reachable from every machine.
        replicas: how many.
        host, port: where every machine with a proxy listens.
        address: of a Ray cluster, "auto" for the running one; None starts one on this machine.
        cpus, gpus: of one replica; a share of a card is legal.

    Returns:
        the handle of Ray Serve; `ray.serve.shutdown()` ends the replicas, which answer what is
        open within `launch.settings.drain_seconds`.

    Raises:
        ValueError: fewer than one replica.
        ImportError: Ray Serve is missing.
    """
    if replicas < 1:
        raise ValueError(f"replicas: expected at least 1, got {replicas}")
    require("serving by replicas", "replicas", "ray", "grpc")
    import ray
    from ray import serve

    def build() -> FastAPI:  # a plain function is called in each replica
        return launch.app()

    if not ray.is_initialized():
        ray.init(address=address, log_to_driver=True)
    serve.start(proxy_location="EveryNode", http_options={"host": host, "port": port})
    settings = launch.settings
    deployment = serve.deployment(
        num_replicas=replicas,
        # the replica itself refuses what is too much, in the API's own form
        max_ongoing_requests=2 * launch.most_open,
        health_check_period_s=_HEALTH_SECONDS,
        graceful_shutdown_timeout_s=settings.drain_seconds + 10.0,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
    )(serve.ingress(build)(_Replica))
    return serve.run(deployment.bind(), name=APP, route_prefix="/")


def serve_replicas(launch: Launch, replicas: int, **options: Any) -> None:
    """`deploy`, until SIGTERM or Ctrl+C."""
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    deploy(launch, replicas, **options)
    ended.wait()
    from ray import serve

    serve.shutdown()
