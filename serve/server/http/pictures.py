"""What is answered: models, and pictures whose addresses say all that they depend on."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import math
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from functools import partial
from typing import Any

import numpy as np
from aiohttp import web

from serve.encoding import animation, encode, sheet
from serve.model import EXACT, Images, check_sampling
from serve.noise import way
from serve.server.admission import Gone
from serve.server.encoders import Encoders
from serve.server.http.answering import ASK, BRIEFLY, Asked, Handler, Part, Send, forever, of
from serve.server.http.routes import KINDS, document
from serve.server.models import Model, Registry
from serve.server.refusal import Code, Refusal, invalid
from serve.server.requests import noise_request, range_request
from serve.server.security import CALLER
from serve.server.work import Request
from serve.stubs.sampling.v1 import sampling_pb2 as wire
from serve.text import quoted
from serve.version import VERSION

MOST_SIDE = 2**14 - 1  # pixels: WebP's
MOST_BODY = 4096  # bytes
PATIENCE = 10.0  # seconds for a body to arrive


class Pictures:
    """The handlers, by the names that the table has for them.

    Args:
        registry: The models.
        encoders: Make files.
        working: Tells whether requests are taken.
        secure: Whether tokens are asked for.
        in_browser: Whether browsers can make the models' pictures themselves.
        grpc: The server's other address, and what it asks for there.
    """

    def __init__(
        self,
        registry: Registry,
        encoders: Encoders,
        working: Callable[[], bool],
        secure: bool,
        in_browser: bool,
        grpc: Mapping[str, Any],
    ) -> None:
        self._registry, self._encoders, self._working = registry, encoders, working
        self._in_browser, self._grpc = in_browser, grpc
        self._document, self._forever = document(secure), forever(secure)
        self.handlers: dict[str, Handler] = {
            "health": self.health,
            "openapi": self.openapi,
            "models": self.models,
            "card": self.card,
            "found": self.found,
            "sample": self.sample,
            "grid": self.grid,
            "animation": self.animation,
            "frame": self.frame,
            "samples": self.samples,
        }

    async def health(self, asked: Asked, send: Send) -> web.StreamResponse:
        if not self._working():
            raise Refusal(Code.UNAVAILABLE, "no model works, or the server is stopping; repeat in a moment", 1.0)
        return web.json_response({"status": "SERVING"}, headers={"Cache-Control": "no-store"})

    async def openapi(self, asked: Asked, send: Send) -> web.StreamResponse:
        return web.json_response(self._document, headers={"Cache-Control": BRIEFLY})

    async def models(self, asked: Asked, send: Send) -> web.StreamResponse:
        return web.json_response(
            {"models": [self._describe(each) for each in self._registry.models()], "grpc": self._grpc},
            headers={"Cache-Control": ASK},
        )

    async def card(self, asked: Asked, send: Send) -> web.StreamResponse:
        return web.json_response(self._describe(self._model(asked)), headers={"Cache-Control": ASK})

    async def found(self, asked: Asked, send: Send) -> web.StreamResponse:
        """Lead from a model's name to its digest, where a picture stays what it is."""
        model, url = self._model(asked), asked.request.rel_url
        query = {key: value for key, value in url.query.items() if key != "version"}
        if model.arithmetic != EXACT:
            query["arithmetic"] = model.arithmetic
        tail = asked.request.path.split("/", 4)[4]
        place = url.with_path(f"/v1/digests/{model.digest}/{tail}").with_query(query or None)
        return web.Response(status=307, headers={"Location": str(place), "Cache-Control": BRIEFLY})

    async def sample(self, asked: Asked, send: Send) -> web.StreamResponse:
        values, model = asked.values, self._model(asked)
        return await self._file(
            asked,
            model,
            send,
            self._range(asked, model, values["index"], 1),
            lambda images, kind: encode(images[0], kind),
        )

    async def grid(self, asked: Asked, send: Send) -> web.StreamResponse:
        values, model = asked.values, self._model(asked)
        height, width, _ = model.card.image_shape
        if max(height * values["rows"], width * values["columns"]) > MOST_SIDE:
            raise invalid(f"a grid has up to {MOST_SIDE} pixels a side; ask for fewer columns or rows")
        _check_fits(model, values["columns"] * values["rows"], "a grid", "columns or rows")
        job = self._range(asked, model, values["start"], values["columns"] * values["rows"])
        return await self._file(
            asked, model, send, job, lambda images, kind: encode(sheet(images, values["columns"], 0), kind)
        )

    async def animation(self, asked: Asked, send: Send) -> web.StreamResponse:
        model = self._model(asked)
        _check_fits(model, asked.values["steps"], "an animation", "steps")
        return await self._file(
            asked, model, send, self._way(asked, model, slice(None)), lambda images, kind: animation(images)
        )

    async def frame(self, asked: Asked, send: Send) -> web.StreamResponse:
        model, frame, steps = self._model(asked), asked.values["frame"], asked.values["steps"]
        if frame >= steps:
            raise invalid(f"frame must be below steps, {steps}. Received: {frame}")
        job = self._way(asked, model, slice(frame, frame + 1))
        return await self._file(asked, model, send, job, lambda images, kind: encode(images[0], kind))

    async def samples(self, asked: Asked, send: Send) -> web.StreamResponse:
        """A stream of pixels behind the header of an .npy file, however many they are."""
        wanted = await _posted(asked)
        model = self._registry.get(asked.values["name"], str(wanted.pop("version", "")))
        asked_range = wire.Range(**wanted)
        job = range_request(model, asked_range, math.inf, one_message=False)
        header = io.BytesIO()
        shape = (job.count, *model.card.image_shape)
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
        caller = CALLER.get()

        async def body() -> AsyncGenerator[Part]:
            begin = header.getvalue()
            with caller.holding(job.held):
                async with aclosing(model.batcher.run(job)) as chunks:
                    async for images in chunks:
                        await caller.pace(sum(map(len, images)))
                        if begin:  # not before there is a picture: until then the request may still be refused
                            yield begin
                            begin = b""
                        for each in images:
                            yield each.data

        response = web.StreamResponse(headers={"Content-Type": "application/x-npy", "Cache-Control": ASK, **of(model)})
        response.content_length = len(header.getvalue()) + math.prod(shape)
        return await send(response, body())

    def _model(self, asked: Asked) -> Model:
        """Return the model of a name or a digest.

        Raises:
            Refusal: NOT_FOUND, or UNAVAILABLE while there is none.
        """
        values = asked.values
        if "name" in values:
            return self._registry.get(values["name"], values.get("version") or "")
        return self._registry.of_digest(values["digest"], values.get("arithmetic", ""))

    def _range(self, asked: Asked, model: Model, start: int, count: int) -> Request:
        values = asked.values
        _check(values["seed"], start, count, values["temperature"])
        wanted = wire.Range(
            seed=values["seed"],
            start=start,
            count=count,
            temperature=values["temperature"],
            encoding=wire.ENCODING_PNG,  # of files there may be fewer than of raw pictures
        )
        return range_request(model, wanted, math.inf, one_message=True)

    def _way(self, asked: Asked, model: Model, part: slice) -> Request:
        values = asked.values
        seed, a, b, steps, temperature = (values[key] for key in ("seed", "a", "b", "steps", "temperature"))
        for index in (a, b):
            _check(seed, index, 1, temperature)
        noise = way(seed, a, b, steps, temperature, model.card.noise_size)[part]
        return noise_request(model, noise, math.inf, "interactive", wire.ENCODING_PNG)

    def _describe(self, model: Model) -> dict[str, Any]:
        return {
            "name": model.name,
            "version": str(model.version),
            "digest": model.digest,
            "arithmetic": model.arithmetic,
            "max_pictures": model.limits.files,
            "in_browser": self._in_browser,
            "card": json.loads(model.card.to_json()),
        }

    async def _file(
        self, asked: Asked, model: Model, send: Send, job: Request, make: Callable[[Images, str], bytes]
    ) -> web.StreamResponse:
        """Answer with a picture's file, or, where the caller has it, without asking the model for anything."""
        kind = asked.values["kind"]
        tag = _tag(asked, model)
        named = asked.values.get("arithmetic", EXACT) == model.arithmetic
        headers = {"ETag": f'W/"{tag}"', "Cache-Control": self._forever if named else ASK, **of(model)}
        if asked.has(tag):
            return web.Response(status=304, headers=headers)
        headers["Content-Type"] = KINDS[kind]
        if asked.request.method == "HEAD":
            return web.StreamResponse(headers=headers)
        with CALLER.get().spending(job.count):
            async with aclosing(model.batcher.run(job)) as chunks:
                images = np.concatenate(await anext(chunks))
                file = await self._encoders.whole(partial(make, images, kind), kind)
                response = web.StreamResponse(headers=headers)
                response.content_length = len(file)

                async def body() -> AsyncGenerator[Part]:
                    yield file

                return await send(response, body())


def _check_fits(model: Model, count: int, what: str, less: str) -> None:
    if count > model.limits.files:
        raise invalid(
            f"{what} of this model has up to {model.limits.files} pictures; ask for fewer {less}. Received: {count}"
        )


def _check(seed: int, start: int, count: int, temperature: float) -> None:
    try:
        check_sampling(seed, start, count, temperature)
    except ValueError as error:
        raise invalid(str(error)) from None


def _tag(asked: Asked, model: Model) -> str:
    """Return what is known of a picture before it is made: whatever its bytes depend on."""
    depends = {key: value for key, value in asked.values.items() if key not in ("digest", "arithmetic")}
    said = [asked.route.handler, model.digest, model.arithmetic, VERSION, sorted(depends.items())]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:32]


async def _posted(asked: Asked) -> dict[str, Any]:
    """Return a body's object, as its schema has it.

    Raises:
        Refusal: INVALID_ARGUMENT, it is something else.
    """
    schema = asked.route.body
    assert schema is not None
    if asked.request.content_type != "application/json":  # which other origins' pages cannot send without asking first
        raise invalid("the body should be JSON, with `Content-Type: application/json`")
    try:
        async with asyncio.timeout(PATIENCE):
            body = await asked.request.read()
    except TimeoutError:
        raise Refusal(Code.RESOURCE_EXHAUSTED, "the body did not arrive in time; send it faster", 1.0) from None
    except web.HTTPRequestEntityTooLarge:
        raise invalid(f"the body should have {MOST_BODY} bytes or fewer") from None
    except web.RequestPayloadError as error:
        raise invalid(f"the body cannot be read: {error}") from None
    except ConnectionError:
        raise Gone from None
    try:
        wanted = json.loads(body)
    except (ValueError, RecursionError):
        raise invalid('the body should be JSON, such as {"seed": 7, "start": 0, "count": 1000}') from None
    if not isinstance(wanted, dict):
        raise invalid("the body should be an object with seed, start and count")
    known = schema["properties"]
    for key in wanted:
        if key not in known:
            raise invalid(f"the body takes {', '.join(known)}. Received: {quoted(str(key))}")
    for key in schema["required"]:
        if key not in wanted:
            raise invalid(f"the body should have {key}")
    for key, value in wanted.items():
        wanted[key] = _number(key, value, known[key])
    return wanted


def _number(key: str, value: Any, schema: dict[str, Any]) -> Any:
    """Return a posted value; whole numbers may be texts, since those of JavaScript end at 2^53."""
    kind = schema["type"]
    if kind == "string":
        if isinstance(value, str) and value.isdecimal() and len(value) <= 10:
            return value
        raise invalid(f"{key} should be a text of digits. Received: {quoted(json.dumps(value))}")
    if kind == "integer" and isinstance(value, str) and value.isdecimal() and len(value) <= 20:
        value = int(value)
    fits = isinstance(value, int if kind == "integer" else int | float) and not isinstance(value, bool)
    if not (fits and schema["minimum"] <= value <= schema["maximum"]):
        raise invalid(
            f"{key} should be a number of type {kind} from {schema['minimum']} to {schema['maximum']}. "
            f"Received: {quoted(json.dumps(value))}"
        )
    return value
