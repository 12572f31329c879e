"""Errors as RFC 9457 problem documents, which say what to do; each kind once."""

from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

MEDIA_TYPE = "application/problem+json"
# Of the page that explains them, in this service.
PAGE = "/problems"


class Kind(NamedTuple):
    """A kind of problem: its status, its title, and what to do about it."""

    status: int
    title: str
    advice: str


KINDS: dict[str, Kind] = {
    "invalid-request": Kind(422, "The request is not what it should be", "Mend the fields that `errors` names."),
    "cannot-answer": Kind(422, "The question cannot be answered", "Change the text or the option that `detail` names."),
    "too-large": Kind(413, "The request is too large", "Send less at a time, or raise the limit that `detail` names."),
    "no-key": Kind(401, "A key is needed", "Send `Authorization: Bearer KEY` with a key of the service's key file."),
    "queue-full": Kind(503, "Too much is waiting", "Ask again after the seconds of the header Retry-After."),
    "ending": Kind(503, "The service is ending", "Ask again: another process takes over, or it is started anew."),
    "too-late": Kind(504, "The deadline has passed", "Ask for a smaller budget or less text, or allow more time."),
    "gone": Kind(499, "The client has gone", "Nobody reads this: it is counted, and what it asked for is dropped."),
    "not-found": Kind(404, "There is nothing here", "See /docs for what there is."),
    "wrong-method": Kind(405, "The method is wrong", "See the header Allow for those that there are."),
    "unreadable": Kind(400, "The request cannot be read", "Send JSON in UTF-8, with `Content-Type: application/json`."),
    "defect": Kind(500, "The service has failed", "Ask again; if it fails again, its log says why."),
}
_OF_STATUS = {401: "no-key", 404: "not-found", 405: "wrong-method", 408: "too-late", 413: "too-large"}


class ProblemError(Exception):
    """What is wrong with a request.

    Args:
        name: of `KINDS`.
        detail: what came, what was expected, what to do.
        headers: of the response.
        fields: more members of the document.
    """

    def __init__(self, name: str, detail: str, headers: Mapping[str, str] | None = None, **fields: Any) -> None:
        super().__init__(detail)
        self.name, self.detail, self.headers, self.fields = name, detail, dict(headers or {}), fields

    def response(self) -> JSONResponse:
        """The document."""
        kind = KINDS[self.name]
        document = {
            "type": f"{PAGE}#{self.name}",
            "title": kind.title,
            "status": kind.status,
            "detail": self.detail,
            "advice": kind.advice,
            **self.fields,
        }
        return JSONResponse(document, kind.status, self.headers, MEDIA_TYPE)


def install(app: FastAPI, count: Callable[[str], None]) -> None:
    """Make every error of an app a problem document, and have its name counted."""

    def add(kind: type[Exception], problem_of: Callable[[Request, Any], ProblemError]) -> None:
        async def answer(request: Request, error: Exception) -> JSONResponse:
            problem = problem_of(request, error)
            count(problem.name)
            return problem.response()

        app.add_exception_handler(kind, answer)

    add(ProblemError, lambda _, problem: problem)
    add(RequestValidationError, _of_validation)
    add(HTTPException, _of_http)
    add(Exception, _of_defect)


def documented(*names: str) -> dict[int | str, dict[str, Any]]:
    """These problems for OpenAPI, by status."""
    found: dict[int | str, dict[str, Any]] = {}
    for name in names:
        kind = KINDS[name]
        before = found.get(kind.status, {}).get("description")
        text = f"{kind.title}. {kind.advice}"
        found[kind.status] = {
            "description": text if before is None else f"{before} Or: {text}",
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemDocument"}}},
        }
    return found


def _of_validation(_: Request, error: RequestValidationError) -> ProblemError:
    found = error.errors()
    if found[0]["type"] == "json_invalid":
        return ProblemError("unreadable", f"the body is not JSON: {found[0]['ctx']['error']}")
    errors = [{"pointer": _pointer(one, error.body), "detail": _said(one)} for one in found]
    first = f"{errors[0]['pointer'] or 'the body'}: {errors[0]['detail']}"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return ProblemError("invalid-request", first + more, errors=errors)


def _of_http(request: Request, error: HTTPException) -> ProblemError:
    name = _OF_STATUS.get(error.status_code, "unreadable" if error.status_code < 500 else "defect")
    detail = error.detail
    if detail == HTTPStatus(error.status_code).phrase:
        detail = f"{request.method} {request.url.path}: {detail}"
    return ProblemError(name, str(detail), error.headers)


def _of_defect(_: Request, error: Exception) -> ProblemError:
    return ProblemError("defect", f"an unexpected {type(error).__name__}")


def _said(error: Mapping[str, Any]) -> str:
    if error["type"] == "extra_forbidden":
        return "there is no such field; /docs has those that there are"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return str(error["msg"])


def _pointer(error: Mapping[str, Any], body: Any) -> str:
    """Where in the body, as a JSON pointer; of the types that a value is none of, which Pydantic names too, nothing."""
    steps = list[Any]()
    for step in error["loc"][1:]:
        if isinstance(body, dict | list) and step in (body if isinstance(body, dict) else range(len(body))):
            body = body[step]
        elif error["type"] != "missing":
            continue
        steps.append(step)
    return "".join(f"/{str(step).replace('~', '~0').replace('/', '~1')}" for step in steps)
