"""What there is to ask for: one table, from which requests are routed and the OpenAPI document is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from serve.encoding import ENDINGS
from serve.model import MOST_TEMPERATURE
from serve.noise import INDICES, SEEDS
from serve.version import VERSION

PROBLEM = "application/problem+json"
KINDS = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
assert KINDS.keys() == ENDINGS.keys()


@dataclass(frozen=True)
class Parameter:
    """A part of an address.

    Attributes:
        name: As the path or the query has it.
        text: What it is.
        schema: Of its value, in OpenAPI's words.
        default: What it is where the query does not have it.
    """

    name: str
    text: str
    schema: dict[str, Any]
    default: Any = None


def _whole(name: str, text: str, least: int, most: int, default: int | None = None) -> Parameter:
    return Parameter(name, text, {"type": "integer", "minimum": least, "maximum": most}, default)


NAME = Parameter("name", "The model's name.", {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"})
DIGEST = Parameter("digest", "SHA-256 of the model file.", {"type": "string", "pattern": "^[0-9a-f]{64}$"})
SEED = _whole("seed", "The seed of the noise.", 0, SEEDS - 1)
INDEX, START = (_whole(name, "The index of a sample.", 0, INDICES - 1) for name in ("index", "start"))
FIRST, LAST = (_whole(name, "The index of the sample at an end.", 0, INDICES - 1) for name in ("a", "b"))
FRAME = _whole("frame", "Which of the steps, from 0.", 0, 255)
KIND = Parameter("kind", "The format of the file.", {"type": "string", "enum": list(KINDS)})
MOVING = Parameter("kind", "The format of the file.", {"type": "string", "enum": ["webp"]})
VERSION_OF = Parameter("version", "The model's version; the highest.", {"type": "string", "pattern": "^[0-9]{1,10}$"})
ARITHMETIC = Parameter(
    "arithmetic",
    "What it is computed in, where that is not exact: other arithmetics make other bytes.",
    {"type": "string", "pattern": "^[a-z0-9]{1,16}$"},
)
TEMPERATURE = Parameter(
    "temperature",
    "The scale of the noise.",
    {"type": "number", "minimum": 0, "maximum": MOST_TEMPERATURE},
    1.0,
)
COLUMNS = _whole("columns", "Pictures in a row; a grid has as many as the model's max_pictures.", 1, 64, 8)
ROWS = _whole("rows", "Rows of pictures; a grid has as many as the model's max_pictures.", 1, 64, 8)
STEPS = _whole(
    "steps", "Pictures on the way, both ends among them; an animation has as many as max_pictures.", 2, 256, 30
)


SCRIPT = "text/javascript"
SCRIPTS = ("asking", "dom", "elsewhere", "gallery", "grid", "pictures", "pins", "state", "worker")
PAGES = {
    "gallery.css": "text/css",
    **{f"{name}.js": SCRIPT for name in SCRIPTS},
    "noise.mjs": SCRIPT,
    "icon.svg": "image/svg+xml",
}
FILE = Parameter("file", "One of the page's files.", {"type": "string", "enum": list(PAGES)})
# Of ONNX Runtime Web: what WebAssembly takes, and what WebGPU takes.
RUNTIME = {
    f"{name}{ending}": {".mjs": SCRIPT, ".wasm": "application/wasm"}[ending]
    for name, ending in (
        ("ort.wasm.min", ".mjs"),
        ("ort-wasm-simd-threaded", ".mjs"),
        ("ort-wasm-simd-threaded", ".wasm"),
        ("ort.webgpu.min", ".mjs"),
        ("ort-wasm-simd-threaded.asyncify", ".mjs"),
        ("ort-wasm-simd-threaded.asyncify", ".wasm"),
    )
}
PART = Parameter("part", "One of its files.", {"type": "string", "enum": list(RUNTIME)})


@dataclass(frozen=True)
class Route:
    """One kind of address.

    Attributes:
        path: With the names of parameters in braces.
        handler: The name of what answers it, in `pictures.Pictures` or `gallery.Gallery`.
        text: What it gives.
        parameters: Of the path and of the query.
        gives: Media types of what it gives.
        method: GET (and with it HEAD), or POST.
        body: The schema of what is posted.
        open: No token is asked for, and a drain does not wait for it.
        listed: Whether the document has it.
    """

    path: str
    handler: str
    text: str
    parameters: Sequence[Parameter] = ()
    gives: Sequence[str] = ("application/json",)
    method: str = "GET"
    body: dict[str, Any] | None = None
    open: bool = False
    listed: bool = True

    @property
    def in_path(self) -> set[str]:
        """The names of the path's parameters."""
        return {each.name for each in self.parameters if f"{{{each.name}}}" in self.path}


# Pictures have their address at a digest, where they never change; at a name they are found.
_PICTURES = (
    ("samples/{seed}/{index}.{kind}", "sample", "One sample.", (SEED, INDEX, KIND), (TEMPERATURE,)),
    (
        "grid/{seed}/{start}.{kind}",
        "grid",
        "Samples in rows, without margins.",
        (SEED, START, KIND),
        (COLUMNS, ROWS, TEMPERATURE),
    ),
    (
        "between/{seed}/{a}/{b}.{kind}",
        "animation",
        "The way from one sample to another, as an animation.",
        (SEED, FIRST, LAST, MOVING),
        (STEPS, TEMPERATURE),
    ),
    (
        "between/{seed}/{a}/{b}/{frame}.{kind}",
        "frame",
        "One picture of the way from one sample to another.",
        (SEED, FIRST, LAST, FRAME, KIND),
        (STEPS, TEMPERATURE),
    ),
)
SAMPLES = {
    "type": "object",
    "additionalProperties": False,
    "required": ["seed", "start", "count"],
    "properties": {
        "seed": {"type": "integer", "minimum": 0, "maximum": SEEDS - 1},
        "start": {"type": "integer", "minimum": 0, "maximum": INDICES - 1},
        "count": {"type": "integer", "minimum": 1, "maximum": INDICES},
        "temperature": {"type": "number", "minimum": 0, "maximum": MOST_TEMPERATURE, "default": 1.0},
        "version": VERSION_OF.schema,
    },
}
ROUTES = (
    Route("/v1/models", "models", "All models that are served."),
    Route("/v1/models/{name}", "card", "One model, with its card.", (NAME, VERSION_OF)),
    *(
        Route(f"/v1/models/{{name}}/{tail}", "found", f"Leads to: {text}", (NAME, *path, VERSION_OF, *query), ())
        for tail, _, text, path, query in _PICTURES
    ),
    Route("/v1/digests/{digest}", "card", "One model, with its card.", (DIGEST,)),
    *(
        Route(
            f"/v1/digests/{{digest}}/{tail}",
            handler,
            text,
            (DIGEST, *path, ARITHMETIC, *query),
            [KINDS[kind] for kind in path[-1].schema["enum"]],
        )
        for tail, handler, text, path, query in _PICTURES
    ),
    Route(
        "/v1/digests/{digest}/model.onnx",
        "weights",
        "The model's file, where the server shares it.",
        (DIGEST,),
        ("application/octet-stream",),
    ),
    Route(
        "/v1/models/{name}/samples",
        "samples",
        "Any number of samples, as one array uint8 [count, height, width, channels], which is sent as it is made.",
        (NAME,),
        ("application/x-npy",),
        "POST",
        SAMPLES,
    ),
    Route("/openapi.json", "openapi", "This document."),
    Route("/healthz", "health", "Whether requests are taken.", open=True),
    Route("/", "page", "The gallery.", open=True, listed=False),
    Route("/page/{file}", "page", "A part of it.", (FILE,), open=True, listed=False),
    Route("/page/ort/{part}", "runtime", "A part of ONNX Runtime for browsers.", (PART,), open=True, listed=False),
)


def document(secure: bool) -> dict[str, Any]:
    """Return the OpenAPI document; `secure` where a token is asked for."""
    paths: dict[str, Any] = {}
    for route in filter(lambda each: each.listed, ROUTES):
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    parts: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "serve-vae",
            "version": VERSION,
            "summary": "Pictures of VAEs, each at an address of its own",
        },
        "paths": paths,
    }
    if secure:
        parts["components"] = {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}}
        parts["security"] = [{"token": []}]
    return parts


def _operation(route: Route) -> dict[str, Any]:
    problem = {"description": "What was wrong, and what to do.", "content": {PROBLEM: {"schema": {"type": "object"}}}}
    found = route.handler == "found"
    good: dict[str, Any] = {"description": route.text}
    if not found:
        good["content"] = {kind: {} for kind in route.gives}
    responses = {"307" if found else "200": good, "default": problem}
    if DIGEST in route.parameters:
        responses["304"] = {"description": "As it was."}
    operation: dict[str, Any] = {
        "summary": route.text,
        "parameters": [
            {
                "name": each.name,
                "in": "path" if each.name in route.in_path else "query",
                "required": each.name in route.in_path,
                "description": each.text,
                "schema": each.schema if each.default is None else {**each.schema, "default": each.default},
            }
            for each in route.parameters
        ],
        "responses": responses,
    }
    if route.open:
        operation["security"] = []
    if route.body:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": route.body}}}
    return operation
