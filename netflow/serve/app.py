"""The routes, and what is said when something cannot be answered."""

import hmac
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from netflow import client, metrics, wire
from netflow.access import Peer
from netflow.filelist import told
from netflow.output import gaps_json
from netflow.serve import peers
from netflow.serve.questions import QUESTIONS, Question
from netflow.shapes import Shape
from netflow.show import extras

ABOUT = """\
What `netflow` knows, for other programs: the same questions, by HTTP. Every answer names the
gaps that touch its period: no record and a lost record are different things.

Over the unix socket you are who the kernel says you are. Root, and the group that the collector
was given, see all; a slice's user sees its flows, and nothing of who is at their other end.
An error is an `application/problem+json` (RFC 9457).

A long answer is sent as it is made. One that is cut short ends without its end: JSON that does
not close, or no `{"end": true, ...}` line.
"""
_PART = 64 * 1024
_TITLES = {
    400: "Cannot be meant", 401: "Who are you?", 403: "Not allowed", 404: "No such path",
    405: "Only GET", 413: "Too long", 500: "Failed", 502: "Broken off", 503: "Not now",
}  # fmt: skip
_STATUS = {"bad": 400, "denied": 403, "busy": 503, "failed": 500}


class Problem(BaseModel):
    """Why there is no answer (RFC 9457)."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str


@dataclass(frozen=True)
class Settings:
    """Where questions go, and what is asked for over TCP."""

    source: metrics.Source
    token: str = ""


def make(settings: Settings) -> FastAPI:
    """The application."""

    def who(request: Request) -> Peer | None:
        """Who asks. Over TCP it is us, for whoever has the token."""
        peer = peers.of(request.state)
        if peer is None:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode(), settings.token.encode())
            if not settings.token or scheme.lower() != "bearer" or not right:
                raise HTTPException(
                    401, "over TCP a token is asked for", {"WWW-Authenticate": "Bearer"}
                )
        return peer

    asker = Annotated[Peer | None, Depends(who)]
    app = FastAPI(
        title="netflow", version=version("vnet"), description=ABOUT, docs_url=None, redoc_url=None,
        responses={
            status: {"model": Problem, "description": title}
            for status, title in _TITLES.items() if status not in (404, 405)
        },
    )  # fmt: skip
    for question in QUESTIONS:
        _route(app, question, settings, asker)

    @app.get("/v1/status", summary="How the collector is, what it holds, what it lost.")
    def status(peer: asker) -> dict[str, int | str]:
        return client.status(settings.source.socket, peer)

    @app.get("/v1/files", summary="The files that hold closed records.")
    def files(
        peer: asker,
        node: Annotated[list[str], Query(max_length=100, description="Of this node only.")] = [],  # noqa: B006
    ) -> list[dict[str, Any]]:
        asked = client.passed_on(wire.Files(nodes=node), peer)
        with client.asking(settings.source.socket, asked) as answer:
            columns = answer.header.columns
            return [told(dict(zip(columns, row, strict=True))) for row in answer]

    @app.get(
        "/metrics",
        summary="Metrics in Prometheus' text format (docs/metrics.md).",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    def metrics_(peer: asker) -> Response:
        return Response(metrics.text(settings.source, peer), media_type=metrics.CONTENT_TYPE)

    _errors(app)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return app


def _route(app: FastAPI, question: Question, settings: Settings, asker: Any) -> None:
    asks = question.asks

    def answer(
        which: Annotated[asks, Query()],  # type: ignore[valid-type]
        peer: asker,
    ) -> Response:
        try:
            request = which.request()  # type: ignore[attr-defined]
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        return _answer(settings, question.shape(request), request, peer, which.format)  # type: ignore[attr-defined]

    app.get(
        f"/v1/{question.path}",
        summary=question.says,
        description=asks.__doc__ if asks.__doc__ != asks.__base__.__doc__ else None,
        operation_id=question.path,
        response_class=StreamingResponse,
        responses={
            200: {
                "description": "An answer.",
                "content": {
                    "application/json": {
                        "schema": {"$ref": f"#/components/schemas/{question.answer.__name__}"}
                    },
                    "application/x-ndjson": {"schema": {"type": "string"}},
                },
            }
        },
    )(answer)


# -- answers ---------------------------------------------------------------------------


def _answer(
    settings: Settings, shape: Shape, request: wire.Question, peer: Peer | None, form: str
) -> Response:
    stack = ExitStack()
    try:
        answer = stack.enter_context(
            client.asking(settings.source.socket, client.passed_on(request, peer))
        )
        rows = (shape.made(answer.header.columns, row) for row in answer)
        # Until a row is there the collector may still refuse.
        first = next(rows, None)
    except BaseException:
        stack.close()
        raise
    lines = _lines if form == "ndjson" else _object
    parts = lines(answer, shape, first, rows)
    kind = "application/x-ndjson" if form == "ndjson" else "application/json"
    return StreamingResponse(_gathered(stack, parts), media_type=kind)


Rows = Iterator[dict[str, Any]]


def _rows(first: dict[str, Any] | None, rest: Rows) -> Rows:
    if first is not None:
        yield first
        yield from rest


def _object(answer: client.Answer, shape: Shape, first: Any, rest: Rows) -> Iterator[str]:
    """One JSON object, the same as the commands' -o json."""
    yield f'{json.dumps(gaps_json(answer.header))[:-1]}, "{shape.key}": ['
    separator = "\n"
    for made in _rows(first, rest):
        yield separator + json.dumps(made)
        separator = ",\n"
    yield f"\n], {json.dumps({'more': answer.trailer.more} | extras(answer))[1:]}\n"


def _lines(answer: client.Answer, shape: Shape, first: Any, rest: Rows) -> Iterator[str]:
    """A head, a line for each row, an end."""
    yield json.dumps(gaps_json(answer.header)) + "\n"
    count = 0
    for made in _rows(first, rest):
        count += 1
        yield json.dumps(made) + "\n"
    end = {"end": True, "rows": count, "more": answer.trailer.more} | extras(answer)
    yield json.dumps(end) + "\n"


def _gathered(stack: ExitStack, parts: Iterator[str]) -> Iterator[bytes]:
    """In parts worth sending; the collector is let go at the end, whatever the end is."""
    with stack:
        out = bytearray()
        for part in parts:
            out += part.encode()
            if len(out) >= _PART:
                yield bytes(out)
                out.clear()
        yield bytes(out)


# -- errors ----------------------------------------------------------------------------


def _problem(status: int, detail: str, headers: Any = None) -> Response:
    said = Problem(title=_TITLES.get(status, "Error"), status=status, detail=detail)
    return Response(
        said.model_dump_json(), status, headers=headers, media_type="application/problem+json"
    )


def _errors(app: FastAPI) -> None:
    def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, client.Refused)
        again = {"Retry-After": "1"} if error.why == "busy" else None
        return _problem(_STATUS[error.why], str(error), again)

    def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        found = error.errors()
        long = any(one["type"] == "string_too_long" and one["loc"][-1] == "q" for one in found)
        said = [f"{one['loc'][-1]}: {one['msg']}" for one in found]
        return _problem(413 if long else 400, "; ".join(said))

    def other(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _problem(error.status_code, error.detail, error.headers)

    handlers: list[tuple[Any, Callable[[Request, Exception], Response]]] = [
        (client.Refused, refused),
        (client.Absent, lambda _, error: _problem(503, str(error))),
        (client.ClientError, lambda _, error: _problem(502, str(error))),
        (RequestValidationError, invalid),
        (HTTPException, other),
        (Exception, lambda _, error: _problem(500, "internal error: see the log of netflow serve")),
    ]
    for kind, handler in handlers:
        app.add_exception_handler(kind, handler)


# -- the document ------------------------------------------------------------------------


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, of the routes and the models; made once."""
    if app.openapi_schema is None:
        made = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        schemas = made["components"]["schemas"]
        for question in QUESTIONS:
            own = question.answer.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas |= own.pop("$defs", {})
            schemas[question.answer.__name__] = own
        for path in made["paths"].values():
            for operation in path.values():
                # Ours are 400, and problems as all errors are.
                operation["responses"].pop("422", None)
                for status, response in operation["responses"].items():
                    if status >= "400":
                        content = response["content"]
                        content["application/problem+json"] = content.pop("application/json")
        schemas.pop("HTTPValidationError", None)
        schemas.pop("ValidationError", None)
        app.openapi_schema = made
    return app.openapi_schema
