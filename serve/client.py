"""The Python client: a server's models, with the interface that an Engine has.

>>> with Client("127.0.0.1:8470") as client:
...     for start, images in client.model().stream(seed=7, start=0, count=1000):
...         ...                                   # uint8 [n, height, width, channels]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, TypeVar

import grpc
import numpy as np

from serve.bundle import Card
from serve.engine import Images
from serve.errors import RemoteError
from serve.stubs.sampling.v1 import sampling_pb2 as wire
from serve.stubs.sampling.v1 import sampling_pb2_grpc as rpc

CALL_SECONDS = 20.0

Reply = TypeVar("Reply")


class RemoteModel:
    """A model on a server.

    Attributes:
        name: What it is served as.
        card: What it says of itself.
        digest: SHA-256 of the model file.
        batch: The most samples that one Sample call gives.
    """

    def __init__(self, client: Client, model: wire.Model) -> None:
        self._client = client
        self.name = model.name
        self.card = Card.from_json(model.card)
        self.digest = model.digest
        self.batch = model.max_count

    def sample(self, seed: int, start: int, count: int, temperature: float = 1.0) -> Images:
        """Return up to `batch` samples: uint8 [count, height, width, channels].

        Raises:
            RemoteError: the server is gone or refuses.
        """
        request = wire.SampleRequest(range=self._range(seed, start, count, temperature))
        reply = self._client.call(lambda stub: stub.Sample(request, timeout=CALL_SECONDS))
        return self._images(reply.chunk)

    def stream(self, seed: int, start: int, count: int, temperature: float = 1.0) -> Iterator[tuple[int, Images]]:
        """Yield (first index, images) for a range of any length, in order.

        Raises:
            RemoteError: the server is gone or refuses.
        """
        request = wire.SampleStreamRequest(range=self._range(seed, start, count, temperature))
        call = self._client.call(lambda stub: stub.SampleStream(request))
        try:
            while (reply := self._client.call(lambda stub: next(call, None))) is not None:
                yield reply.chunk.start, self._images(reply.chunk)
        finally:
            call.cancel()

    def _range(self, seed: int, start: int, count: int, temperature: float) -> wire.Range:
        return wire.Range(
            model=self.name,
            seed=seed,
            start=start,
            count=count,
            temperature=temperature,
            encoding=wire.ENCODING_RAW,
        )

    def _images(self, chunk: wire.Chunk) -> Images:
        if chunk.digest != self.digest:
            raise RemoteError(f"the server changed the model {self.name} meanwhile; run the command again")
        shape = (chunk.count, chunk.height, chunk.width, chunk.channels)
        return np.frombuffer(chunk.pixels, np.uint8).reshape(shape)


class Client:
    """A connection to serve-vae; a context manager.

    Args:
        address: HOST:PORT, or unix:PATH.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel = grpc.insecure_channel(address)
        self._stub = rpc.SamplingServiceStub(self._channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def models(self) -> list[RemoteModel]:
        """Return the server's models.

        Raises:
            RemoteError: no server is there.
        """
        reply = self.call(lambda stub: stub.ListModels(wire.ListModelsRequest(), timeout=CALL_SECONDS))
        return [RemoteModel(self, model) for model in reply.models]

    def model(self, name: str = "") -> RemoteModel:
        """Return the model called `name`, or the only one.

        Raises:
            RemoteError: no server is there, or it has no such model.
        """
        models = self.models()
        named = [model for model in models if name in ("", model.name)]
        if len(named) == 1:
            return named[0]
        have = ", ".join(model.name for model in models)
        wanted = f"no model {name!r}" if name else "several models"
        raise RemoteError(f"the server at {self.address} has {wanted}; choose one with --model: {have}")

    def call(self, what: Callable[[Any], Reply]) -> Reply:
        """Make a call, its failures turned into one line that says what to try."""
        try:
            return what(self._stub)
        except grpc.RpcError as error:
            raise RemoteError(self._explain(error)) from None

    def _explain(self, error: Any) -> str:
        code, details = error.code(), (error.details() or "").splitlines() or [""]
        if code is grpc.StatusCode.UNAVAILABLE:
            return f"no server answers at {self.address}; start one with: serve-vae --listen {self.address}"
        if code is grpc.StatusCode.UNIMPLEMENTED:
            return f"what listens at {self.address} is not serve-vae; check --server"
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return f"the server at {self.address} did not answer in {CALL_SECONDS:.0f} s; is it serve-vae?"
        return f"the server at {self.address} answered {code.name}: {details[0]}"
