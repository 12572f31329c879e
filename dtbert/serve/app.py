"""The service's routes: each takes a request apart, waits for its answer, and for nothing after its client has gone."""

import asyncio
import html
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, HTMLResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware.cors import CORSMiddleware

from dtbert import __version__
from dtbert.serve import problems, schemas
from dtbert.serve.guard import Guard
from dtbert.serve.problems import ProblemError
from dtbert.serve.service import Service

T = TypeVar("T")

_STATIC = Path(__file__).parent / "static"
_DESCRIPTION = """\
Question answering that drops tokens between the layers of its model, to fit any compute budget. Errors are
[RFC 9457](https://www.rfc-editor.org/rfc/rfc9457) problem documents, which say what to do."""
_REFUSALS = problems.documented(
    "invalid-request", "cannot-answer", "unreadable", "no-key", "too-large", "queue-full", "ending", "too-late"
)


def create_app(service: Service) -> FastAPI:
    """The ASGI application of a service; it closes the service when it ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="dtbert",
        version=__version__,
        description=_DESCRIPTION,
        docs_url=None,  # FastAPI's own page loads its scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
    )
    problems.install(app, service.metrics.refuse)
    _add_questions(app, service)
    _add_operations(app, service)
    _add_pages(app)
    endpoints = [path for route in app.routes if (path := getattr(route, "path", None))]
    app.add_middleware(Guard, settings=service.settings, metrics=service.metrics, endpoints=endpoints)
    if service.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=["Retry-After"],
        )
    _describe_in_openapi(app, bool(service.settings.api_keys))
    return app


def _add_questions(app: FastAPI, service: Service) -> None:
    async def in_time(request: Request, spending: schemas.Spending, work: Coroutine[Any, Any, T]) -> T:
        """What a request asks for, unless its client goes, or its deadline passes, before it is there."""
        seconds = service.settings.deadline
        if spending.deadline_ms is not None:
            seconds = min(seconds, spending.deadline_ms / 1000)  # more than the service's own is refused
        task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait((task, gone), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if gone.done():
                raise ProblemError("gone", "nothing is answered")
            raise ProblemError("too-late", f"there was no answer within {seconds:g} s")
        finally:
            task.cancel()
            gone.cancel()

    @app.post("/v1/answer", responses=_REFUSALS, tags=["questions"], summary="Answer a question")
    async def answer(asked: schemas.AnswerRequest, request: Request) -> schemas.AnswerResponse:
        return await in_time(request, asked, service.answer(asked))

    @app.post("/v1/answers", responses=_REFUSALS, tags=["questions"], summary="Answer many questions")
    async def answers(asked: schemas.AnswersRequest, request: Request) -> schemas.AnswersResponse:
        return await in_time(request, asked, service.answers(asked))

    @app.post("/v1/trace", responses=_REFUSALS, tags=["questions"], summary="What each layer keeps of a text")
    async def trace(asked: schemas.TraceRequest, request: Request) -> schemas.TraceResponse:
        return await in_time(request, asked, service.trace(asked))

    @app.get("/v1/model", responses=problems.documented("no-key"), tags=["questions"], summary="The model, the limits")
    async def model() -> schemas.ModelResponse:
        return service.model()


def _add_operations(app: FastAPI, service: Service) -> None:
    @app.get("/health/live", tags=["operation"], summary="Whether the process is well")
    async def live() -> schemas.HealthResponse:
        return schemas.HealthResponse()

    @app.get(
        "/health/ready",
        responses=problems.documented("ending"),
        tags=["operation"],
        summary="Whether it takes questions",
    )
    async def ready() -> schemas.HealthResponse:
        if not service.batcher.is_alive:
            raise ProblemError("ending", "the model takes no more questions", {"Retry-After": "1"})
        return schemas.HealthResponse()

    @app.get("/metrics", tags=["operation"], summary="Counts for Prometheus", response_class=Response)
    async def metrics() -> Response:
        return Response(await asyncio.to_thread(service.metrics.text), media_type=CONTENT_TYPE_LATEST)


def _add_pages(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def playground() -> FileResponse:
        return FileResponse(_STATIC / "playground.html")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(_STATIC / "docs.html")

    @app.get(problems.PAGE, include_in_schema=False)
    async def explained() -> HTMLResponse:
        return HTMLResponse(_problems_page())

    app.mount("/static", StaticFiles(directory=_STATIC))


def _problems_page() -> str:
    entries = "".join(
        f'<dt id="{name}"><code>{name}</code> ({kind.status})</dt>'
        f"<dd>{html.escape(kind.title)}. {html.escape(kind.advice)}</dd>"
        for name, kind in problems.KINDS.items()
    )
    page = (_STATIC / "problems.html").read_text("utf-8")
    return page.replace("<!-- problems -->", entries)


def _describe_in_openapi(app: FastAPI, with_keys: bool) -> None:
    """Add what FastAPI does not find by itself: the problem document, and the key."""
    made = app.openapi()
    schema = schemas.ProblemDocument.model_json_schema(ref_template="#/components/schemas/{model}")
    made["components"]["schemas"]["ProblemDocument"] = schema
    if with_keys:
        made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, methods in made["paths"].items():
            if path.startswith("/v1/") or path == "/metrics":
                for method in methods.values():
                    method["security"] = [{"key": []}]


async def _gone(request: Request) -> None:
    """Return when the client has gone; its body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
