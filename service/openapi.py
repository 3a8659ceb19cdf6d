"""What can be asked, and how: the description that clients and fuzzers read (OpenAPI 3.1), and a page of it.

Both are made from the rooms, the table of bodies and the family of errors, so a sixth model and
a new error describe themselves.
"""

import base64
import hashlib
from collections.abc import Iterable
from html import escape
from typing import Any, Final

from service import errors
from service.batcher import Priority
from service.bodies import READERS
from service.errors import QuintetError
from service.models import MODELS
from service.models.spec import NUMPY_TYPES, Room
from service.version import VERSION

Schema = dict[str, Any]

PEOPLE_ERRORS: Final[tuple[type[QuintetError], ...]] = (
    errors.BadInput,
    errors.Unauthenticated,
    errors.NotFound,
    errors.WrongMethod,
    errors.BodyTooLarge,
    errors.UnsupportedMediaType,
    errors.Overloaded,
    errors.InternalError,
    errors.Unavailable,
    errors.DeadlineExceeded,
)
"""What may become of a request, besides an answer."""

MACHINE_ERRORS: Final = (*PEOPLE_ERRORS, errors.NotSupported)
ADMIN_ERRORS: Final = (*MACHINE_ERRORS, errors.Forbidden)

TEXT: Final[Schema] = {"type": "string"}
NUMBER: Final[Schema] = {"type": "number"}
CONFIDENCE: Final[Schema] = {"type": "number", "minimum": 0, "maximum": 1}
BINARY: Final[Schema] = {"type": "string", "format": "binary"}
BASE64: Final[Schema] = {"type": "string", "contentEncoding": "base64"}


def _list_of(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


def _object(properties: Schema, *, optional: Iterable[str] = (), is_open: bool = False) -> Schema:
    required = [name for name in properties if name not in set(optional)]
    return {
        "type": "object",
        "properties": properties,
        **({"required": required} if required else {}),
        **({} if is_open else {"additionalProperties": False}),
    }


def _json(schema: Schema, **more: Any) -> Schema:
    return {"application/json": {"schema": schema, **more}}


# ---- bodies, by what a room takes ----

JSON_BODIES: Final[dict[str, Schema]] = {
    "pictures": _object({"images": _list_of(BASE64, minItems=1)}),
    "texts": _object({"texts": _list_of(TEXT, minItems=1)}),
    "digits": _object(
        {
            "digits": _list_of({"type": "integer", "minimum": 0, "maximum": 9}, minItems=1),
            "seed": {"type": "integer", "minimum": 0, "maximum": 2**63 - 1},
        },
        optional=("digits", "seed"),
    ),
}
FORM: Final = _object({"images": _list_of(BINARY, minItems=1)})


def _body(room: Room) -> Schema:
    content: Schema = {}
    for kind in (kind.decode() for kind in READERS[room.takes] if kind):
        if kind == "application/json":
            content[kind] = {"schema": JSON_BODIES[room.takes]}
        elif kind == "multipart/form-data":
            content[kind] = {"schema": FORM}
        else:
            content[kind] = {"schema": TEXT if kind.startswith("text/") else BINARY}
    return {"content": content, "required": room.takes != "digits"}


# ---- predictions, by what a room gives ----


def _prediction(room: Room) -> Schema:
    names = {tensor.name for tensor in room.outputs}
    if names == {"label", "probabilities"}:
        probabilities = _object(dict.fromkeys(room.labels, CONFIDENCE))
        label = {"type": "string", "enum": list(room.labels)}
        return _object({"label": label, "confidence": CONFIDENCE, "probabilities": probabilities})
    if "boxes" in names:
        found = _object(
            {
                "label": {"type": "string", "enum": list(room.labels)},
                "confidence": CONFIDENCE,
                "box": _list_of(NUMBER, minItems=4, maxItems=4),
            }
        )
        side = {"type": "integer", "minimum": 1}
        return _object({"width": side, "height": side, "objects": _list_of(found)})
    if names == {"pixels"}:
        return _object({"digit": {"type": "integer"}, "seed": {"type": "integer"}, "image": BASE64})
    return {"type": "object"}


# ---- the Open Inference Protocol ----

PARAMETERS: Final[Schema] = {"type": "object"}
TENSOR: Final = _object(
    {
        "name": TEXT,
        "shape": _list_of({"type": "integer", "minimum": 0}, minItems=1, maxItems=8),
        "datatype": {"type": "string", "enum": list(NUMPY_TYPES)},
        "parameters": PARAMETERS,
        "data": {"type": "array"},
    },
    optional=("parameters", "data"),
    is_open=True,
)
INFERENCE: Final = _object(
    {
        "id": TEXT,
        "parameters": PARAMETERS,
        "inputs": _list_of(TENSOR, minItems=1),
        "outputs": _list_of(
            _object({"name": TEXT, "parameters": PARAMETERS}, optional=("parameters",), is_open=True)
        ),
    },
    optional=("id", "parameters", "outputs"),
    is_open=True,
)
INFERRED: Final = _object(
    {"model_name": TEXT, "model_version": TEXT, "id": TEXT, "outputs": _list_of(TENSOR)}, optional=("id",)
)
VERSION_PART: Final[Schema] = {
    "name": "version",
    "in": "path",
    "required": True,
    "schema": {"type": "string", "pattern": "^[1-9][0-9]{0,8}$"},
}

TIMEOUT: Final = (
    "The header Quintet-Timeout-Ms says after how many milliseconds the answer is of no use: past them "
    "comes 504, and work that has not started never will."
)
"""In words and not among the parameters, or every fuzzer would ask for what can only be refused."""

PRIORITY: Final[Schema] = {
    "name": "Quintet-Priority",
    "in": "header",
    "description": "Whom the request goes before.",
    "schema": {"type": "string", "enum": [one.name.lower() for one in Priority]},
}


def _model_part() -> Schema:
    return {
        "name": "model",
        "in": "path",
        "required": True,
        "schema": {"type": "string", "enum": list(MODELS)},
    }


# ---- operations ----


def _refusals(kinds: Iterable[type[QuintetError]], *, as_problem: bool) -> Schema:
    media = "application/problem+json" if as_problem else "application/json"
    schema = {"$ref": f"#/components/schemas/{'Problem' if as_problem else 'Error'}"}
    refusals: Schema = {}
    for kind in kinds:
        words = (kind.__doc__ or kind.title).splitlines()[0]
        refusal: Schema = {"description": words, "content": {media: {"schema": schema}}}
        if kind in (errors.Overloaded, errors.Unavailable):
            seconds = {"description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 1}}
            refusal["headers"] = {"Retry-After": seconds}
        refusals[str(int(kind.status))] = refusal
    return refusals


def _people(room: Room) -> Schema:
    answer = _object(
        {
            "model": {"const": room.name},
            "version": TEXT,
            "predictions": _list_of(_prediction(room), minItems=1),
        }
    )
    content = _json(answer)
    if room.as_picture is not None:
        content["image/png"] = {"schema": BINARY}
    options = [
        {
            "name": name,
            "in": "query",
            "description": option.words,
            "schema": {"type": "number", "minimum": option.lowest, "maximum": option.highest}
            | {"default": option.default},
        }
        for name, option in room.options.items()
    ]
    return {
        "post": {
            "operationId": room.name,
            "tags": ["models"],
            "summary": room.task,
            "description": TIMEOUT,
            "parameters": [*options, PRIORITY],
            "requestBody": _body(room),
            "responses": {
                "200": {"description": "One prediction for each input, in order.", "content": content},
                **_refusals(PEOPLE_ERRORS, as_problem=True),
            },
        }
    }


def _machines(
    operation: str,
    summary: str,
    *,
    answer: Schema | None = None,
    body: Schema | None = None,
    parts: Iterable[Schema] = (),
    kinds: Iterable[type[QuintetError]] = MACHINE_ERRORS,
    is_body_required: bool = True,
) -> Schema:
    described: Schema = {
        "operationId": operation,
        "tags": ["open inference protocol"],
        "summary": summary,
        "parameters": list(parts),
        "responses": {
            "200": {"description": "Done.", "content": answer or _json({"type": "object"})},
            **_refusals(kinds, as_problem=False),
        },
    }
    if body is not None:
        described["requestBody"] = {"content": body, "required": is_body_required}
    return {"post" if body is not None else "get": described}


def _page(summary: str, media_type: str, *, may_be_unavailable: bool = False) -> Schema:
    refusals = _refusals([errors.WrongMethod], as_problem=True)
    if may_be_unavailable:
        refusals |= _refusals([errors.Unavailable], as_problem=True)
    content = {media_type: {"schema": {"type": "object"} if media_type.endswith("json") else TEXT}}
    responses = {"200": {"description": summary, "content": content}, **refusals}
    return {"get": {"tags": ["operation"], "summary": summary, "responses": responses}}


def _model_paths() -> Schema:
    """What can be asked of one model, of its highest version and of one by its number."""
    paths: Schema = {}
    binary = {"application/octet-stream": {"schema": BINARY}}
    for place, suffix, of in (
        ("/v2/models/{model}", "", "the highest version of a model"),
        ("/v2/models/{model}/versions/{version}", "_version", "a version of a model"),
    ):
        parts = [_model_part(), *([VERSION_PART] if suffix else [])]
        paths[place] = _machines(f"metadata{suffix}", f"Describe {of}.", parts=parts)
        paths[f"{place}/ready"] = _machines(f"ready{suffix}", f"Whether {of} answers.", parts=parts)
        paths[f"{place}/config"] = _machines(f"config{suffix}", f"How {of} is served.", parts=parts)
        paths[f"{place}/stats"] = _machines(f"stats{suffix}", f"What {of} has done.", parts=parts)
        paths[f"{place}/infer"] = _machines(
            f"infer{suffix}",
            f"Ask {of}, with tensors in JSON or after it in binary.",
            body=_json(INFERENCE) | binary,
            answer=_json(INFERRED) | binary,
            parts=parts,
        )
    return paths


def description() -> Schema:
    """The whole description."""
    anything = _json({"type": "object"})
    entry = _object(dict.fromkeys(("name", "version", "state", "reason"), TEXT))
    paths: Schema = {f"/{name}": _people(room) for name, room in MODELS.items()}
    paths |= {
        "/v2": _machines("server", "What the server is, and which extensions it speaks."),
        "/v2/health/live": _machines("live", "Whether the server is there."),
        "/v2/health/ready": _machines("is_ready", "Whether the server takes requests."),
        "/v2/models/stats": _machines("all_stats", "What all models have done."),
        **_model_paths(),
        "/v2/repository/index": _machines(
            "index",
            "Every version there is, and whether it serves.",
            answer=_json(_list_of(entry)),
            body=anything,
            is_body_required=False,
        ),
    }
    for action, words in (
        ("load", "Load a model anew. For the administrator."),
        ("unload", "Let a model go. For the administrator."),
    ):
        paths[f"/v2/repository/models/{{model}}/{action}"] = _machines(
            action, words, body=anything, parts=[_model_part()], kinds=ADMIN_ERRORS, is_body_required=False
        )
    paths |= {
        "/": _page("What there is; for browsers a page to try it.", "application/json"),
        "/startupz": _page("Whether the models were loaded.", "text/plain", may_be_unavailable=True),
        "/livez": _page("Whether the process is alive.", "text/plain"),
        "/readyz": _page("Whether requests are taken.", "text/plain", may_be_unavailable=True),
        "/metrics": _page("Numbers for Prometheus.", "text/plain"),
        "/openapi.json": _page("This description.", "application/json"),
        "/docs": _page("This description, for people.", "text/html"),
    }
    problem = _object(
        {
            "type": {"type": "string", "format": "uri"},
            "title": TEXT,
            "status": {"type": "integer"},
            "detail": TEXT,
            "index": {"type": "integer", "minimum": 0, "description": "Which of several inputs it is about."},
        },
        optional=("index",),
    )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Quintet",
            "version": VERSION,
            "description": "Five deep-learning models, over REST and the Open Inference Protocol.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{}, {"key": []}],
        "paths": paths,
        "components": {
            "schemas": {"Problem": problem, "Error": _object({"error": TEXT})},
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "Where keys are set."}
            },
        },
    }


# ---- the page ----

STYLE: Final = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
section { border-top: 1px solid color-mix(in srgb, currentColor 25%, transparent); padding: .75rem 0; }
h3 { margin: 0; font-family: ui-monospace, monospace; }
table { border-collapse: collapse; margin: .5rem 0; }
td, th { text-align: left; vertical-align: top; padding: .1rem 1rem .1rem 0; }
code { font-family: ui-monospace, monospace; }
"""

POLICY: Final = (
    b"default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; style-src 'sha256-"
    + base64.b64encode(hashlib.sha256(STYLE.encode()).digest())
    + b"'"
)
"""The page is text and its own style: no script, no address but this."""


def page() -> str:
    """The description as one page of HTML that needs nothing else."""
    described = description()
    info = described["info"]
    parts = [
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1><p>{escape(info['description'])} "
        'The same for machines: <a href="/openapi.json">openapi.json</a>.</p>'
    ]
    heading = None
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            (tag,) = operation["tags"]
            if tag != heading:
                heading = tag
                parts.append(f"<h2>{escape(tag.capitalize())}</h2>")
            parts.append(_section(path, method, operation))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>Quintet: what can be asked</title>'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )


def _section(path: str, method: str, operation: Schema) -> str:
    rows = [
        (parameter["name"], f"{parameter['in']}: {parameter.get('description', '')}")
        for parameter in operation.get("parameters", ())
    ]
    for kind, body in operation.get("requestBody", {}).get("content", {}).items():
        fields = ", ".join(body["schema"].get("properties", {}))
        rows.append((kind, f"body: {fields}" if fields else "body"))
    rows += [(status, answer["description"]) for status, answer in operation["responses"].items()]
    cells = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(words)}</td></tr>" for name, words in rows
    )
    return (
        f"<section><h3>{method.upper()} {escape(path)}</h3><p>{escape(operation['summary'])}</p>"
        f"<table>{cells}</table></section>"
    )
