"""What stands before every route: keys, the size of bodies, the headers that browsers obey, and the counts."""

import asyncio
import time
from collections.abc import Iterable

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dtbert.serve.metrics import Metrics
from dtbert.serve.problems import ProblemError
from dtbert.serve.settings import Settings

# A page of the service loads its own files, talks to the service, and does nothing else.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = [
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
]


class Guard:
    """ASGI middleware around a service.

    Args:
        app: what is guarded.
        settings: keys, and how large a body may be.
        metrics: told of each request.
        endpoints: paths that are counted by their own name.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics, endpoints: Iterable[str]) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._endpoints = frozenset(endpoints)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, sent = time.monotonic(), 500, False

        async def answer(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status, sent = message["status"], True
                message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
            await send(message)

        try:
            refused = self._refused(scope)
            if refused is None:
                await self._app(scope, self._limited(receive), answer)
            else:
                self._metrics.refuse(refused.name)
                await refused.response()(scope, receive, answer)
        finally:
            endpoint = scope["path"] if scope["path"] in self._endpoints else "other"
            self._metrics.requests.labels(endpoint, str(status) if sent else "500").inc()
            if status < 400:
                self._metrics.seconds.labels(endpoint).observe(time.monotonic() - began)

    def _refused(self, scope: Scope) -> ProblemError | None:
        """Why a request is not let in: said before its body is read."""
        headers = dict(scope["headers"])
        if self._settings.api_keys and (scope["path"].startswith("/v1/") or scope["path"] == "/metrics"):
            kind, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
            if kind.lower() != "bearer" or not self._settings.knows(key.strip()):
                said = "the key is not one of this service's" if key else "the header Authorization is missing"
                return ProblemError("no-key", said, {"WWW-Authenticate": "Bearer"})
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self._settings.max_body:
            return ProblemError("too-large", self._too_large(f"has {int(length):,} bytes"))
        return None

    def _limited(self, receive: Receive) -> Receive:
        """A body that does not say how long it is may not be longer, either; and none may be waited for for ever."""
        size, whole, until = 0, False, asyncio.get_running_loop().time() + self._settings.deadline

        async def limited() -> Message:
            nonlocal size, whole
            try:
                async with asyncio.timeout_at(None if whole else until):
                    message = await receive()
            except TimeoutError:
                said = f"the body was not there within {self._settings.deadline:g} s"
                raise HTTPException(408, said) from None
            whole = not message.get("more_body", False)
            size += len(message.get("body", b""))
            if size > self._settings.max_body:
                raise HTTPException(413, self._too_large("is longer"))
            return message

        return limited

    def _too_large(self, found: str) -> str:
        return f"the body {found}, this service takes {self._settings.max_body:,} bytes (`--max-body`): send less"
