"""The ASGI application: routes, and one shape for every error."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from softprompts.server import handlers, texts
from softprompts.server.edge import Edge
from softprompts.server.failures import ApiError
from softprompts.server.service import Service

__all__ = ["build_app"]


def build_app(service: Service) -> Starlette:
    """Make the application of one service.

    Args:
        service: With an engine that somebody else starts and stops.
    """
    routes = [
        Route("/v1/completions", texts.completions, methods=["POST"]),
        Route("/v1/chat/completions", texts.chat, methods=["POST"]),
        Route("/v1/models", handlers.models, methods=["GET"]),
        Route("/v1/models/{name:path}", handlers.model, methods=["GET"]),
        Route("/v1/load_prompt", handlers.load_prompt, methods=["POST"]),
        Route("/v1/unload_prompt", handlers.unload_prompt, methods=["POST"]),
        Route("/v1/engine", handlers.engine, methods=["GET"]),
        Route("/health", handlers.health, methods=["GET"]),
        Route("/ready", handlers.ready, methods=["GET"]),
        Route("/version", handlers.version, methods=["GET"]),
        Route("/metrics", handlers.metrics, methods=["GET"]),
        Route("/openapi.json", handlers.schema, methods=["GET"]),
        Route("/", handlers.page, methods=["GET"]),
        Route("/static/{name}", handlers.page, methods=["GET"]),
    ]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Edge, service=service)],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error},
    )
    app.state.service = service
    return app


async def _api_error(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    request.state.log["error"] = error.code
    return error.response()


async def _http_error(request: HttpRequest, error: Exception) -> Response:
    """What the router itself refuses."""
    assert isinstance(error, HTTPException)
    texts_of = {404: ("there is nothing at this address", "not_found"), 405: ("not with this method", "wrong_method")}
    text, code = texts_of.get(error.status_code, (str(error.detail), "refused"))
    response = ApiError(error.status_code, text, code).response()
    response.headers.update(error.headers or {})
    return response
