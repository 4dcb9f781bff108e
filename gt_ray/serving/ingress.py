"""The Ingress deployment: the HTTP interface (DESIGN.md section 5) over the generators.

GET  /v1/info                          pair, checkpoints, limits, how to fine-tune
GET  /v1/roots/{hash}                  root file of the TinyLM or the LLM
POST /v1/updates:check|generate|try    answered at once (routes.py)
...  /v1/updates, /v1/rounds           kept between requests (keeping.py)
GET  /, /page/{file}                   the page (page/)
GET  /healthz                          whether a generator is warm
"""

from __future__ import annotations

import asyncio
import logging
import time
from importlib import import_module
from importlib.metadata import version

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gt_ray.serving import keeping, metrics, page, problems, routes
from gt_ray.serving.backend import Backend
from gt_ray.serving.problems import busy, documented
from gt_ray.serving.service import Service
from gt_ray.serving.settings import ServeSettings

HEALTH_S = 5.0
logger = logging.getLogger("ray.serve")
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Observed:
    """Counts and logs every answer, and adds headers. Plain ASGI, which is faster than `@api.middleware`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        try:
            await self.app(scope, receive, observed)
        finally:
            route = getattr(scope.get("route"), "path_format", "none")
            metrics.REQUESTS.inc(tags={"route": route, "status": str(status)})
            # Serve's access log names the application's prefix alone.
            told = {"path": route, "status": status, "ms": round(1000 * (time.perf_counter() - start), 1)}
            logger.info("answered", extra=told)


def make_api(service: Service | None) -> FastAPI:
    """The application; without a service, to read its OpenAPI."""
    api = FastAPI(
        title="gt-ray delta generation",
        version=version("gt-ray"),
        summary="Send the update of a small fine-tuned model, get the adapter of a large one.",
        docs_url=None,  # it would load its scripts from elsewhere
        redoc_url=None,
    )
    api.state.service = service
    problems.install(api)

    api.add_middleware(Observed)
    security = [Depends(HTTPBearer(auto_error=False, description="a token, where the service asks for one"))]
    for router in (routes.router, keeping.router):
        api.include_router(router, dependencies=security)
    api.include_router(page.router)

    @api.get("/healthz", responses=documented(503, 504))
    async def healthz(serving: routes.Serving) -> dict[str, str]:
        """Whether a generator is warm."""
        try:
            async with asyncio.timeout(HEALTH_S):
                await serving.backend.checkpoints()
        except TimeoutError as error:
            raise busy("no generator is ready", 5) from error
        return {"status": "ready"}

    return api


# Requests wait here, where that costs next to nothing, as many as `max_requests` and `max_held_mb` let in. In Serve's
# proxy each polls, and what is refused comes back: with 200 and 256 it came to a stand under load (docs/lab-notes.md).
@serve.deployment(name="Ingress", max_ongoing_requests=2000, max_queued_requests=16, graceful_shutdown_timeout_s=60)
@serve.ingress()
class Ingress:
    """One replica of the HTTP interface."""

    def __init__(self, settings: ServeSettings, generator: DeploymentHandle, trial: DeploymentHandle | None) -> None:
        import_module("peft")  # seconds, which the first request would wait for
        self.service = Service(settings, Backend(generator, trial, settings.time_limit_s))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve."""
        return make_api(self.service)
