"""The client for ordinary, blocking code; one may be shared by threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import grpc
import numpy.typing as npt
from PIL.Image import Image

from serve.client.options import Options
from serve.client.protocol import Connection, Encoding, Priority, Served, choose
from serve.client.tries import Streaming, Tries
from serve.encoding import pictures
from serve.errors import Rejected
from serve.model import Images
from serve.stubs.sampling.v1 import sampling_pb2 as wire
from serve.stubs.sampling.v1 import sampling_pb2_grpc as rpc

Reply = TypeVar("Reply")


class RemoteModel(Served):
    """A model on a server: a `serve.model.GenerativeModel`, all of whose errors are RemoteErrors.

    A wrong argument is Rejected, which is a ValueError too. `priority` is the caller's share of a busy server, by
    default "interactive" up to `batch` samples and "bulk" for a stream.
    """

    def __init__(self, client: Client, model: wire.Model) -> None:
        super().__init__(model)
        self._client, self._message = client, model

    def by(self, client: Client) -> RemoteModel:
        """Return the same model through another connection to its server."""
        return RemoteModel(client, self._message)

    def sample(
        self, seed: int, start: int, count: int, temperature: float = 1.0, priority: Priority | None = None
    ) -> Images:
        """As `GenerativeModel.sample`; more than `batch` samples come as a stream."""
        wanted = self._range(seed, start, count, temperature, priority)
        if not 1 <= count <= self.batch:
            return self._joined([self._images(chunk, chunk.count) for chunk in self._chunks(wanted)])
        request = wire.SampleRequest(range=wanted)
        return self._images(self._client.call(lambda stub, more: stub.Sample(request, **more), self).chunk, count)

    def pictures(
        self, seed: int, start: int, count: int, temperature: float = 1.0, priority: Priority | None = None
    ) -> list[Image]:
        """As `GenerativeModel.pictures`."""
        return pictures(self.sample(seed, start, count, temperature, priority))

    def decode(self, noise: npt.ArrayLike, priority: Priority | None = None) -> Images:
        """As `GenerativeModel.decode`; more than `batch` samples are several calls."""
        return self._joined([self._decode(request, count) for request, count in self._requests(noise, priority)])

    def stream(
        self, seed: int, start: int, count: int, temperature: float = 1.0, priority: Priority | None = None
    ) -> Iterator[tuple[int, Images]]:
        """As `GenerativeModel.stream`."""
        wanted = self._range(seed, start, count, temperature, priority)
        for chunk in self._chunks(wanted):
            yield chunk.start, self._images(chunk, chunk.count)

    def files(
        self,
        seed: int,
        start: int,
        count: int,
        temperature: float = 1.0,
        priority: Priority | None = None,
        encoding: Encoding = "png",
    ) -> Iterator[tuple[int, bytes]]:
        """Yield (index, a file's bytes) for a range of any length, in order; the server encodes."""
        wanted = self._range(seed, start, count, temperature, priority, encoding)
        for chunk in self._chunks(wanted):
            yield from self._files(chunk)

    def _decode(self, request: wire.DecodeRequest, count: int) -> Images:
        return self._images(self._client.call(lambda stub, more: stub.Decode(request, **more), self).chunk, count)

    def _chunks(self, wanted: wire.Range) -> Iterator[wire.Chunk]:
        tries = Streaming(self._client, self, wanted)
        while tries.left:
            with tries:
                call = self._client.stub.SampleStream(tries.request, **self._client.more(None))
                try:
                    for reply in call:
                        yield tries.take(reply.chunk)
                        tries.be_patient()  # the reader may have taken long over these images
                finally:
                    call.cancel()
            self._client.wait(tries.pause)


class Client(Connection[threading.Event]):
    """A connection to serve-vae; a context manager.

    Args:
        address: HOST:PORT, or unix:PATH.
        options: Token, TLS, patience.

    Raises:
        RemoteError: it is no address; the options for TLS do not go together, or a file of theirs cannot be used.
    """

    def __init__(self, address: str, options: Options = Options()) -> None:  # noqa: B008 (it is frozen)
        super().__init__(address, options, threading.Event())
        secure = options.credentials()
        self._channel = (
            grpc.secure_channel(address, secure, options.channel_options(address))
            if secure
            else grpc.insecure_channel(address, options.channel_options(address))
        )
        self.stub = rpc.SamplingServiceStub(self._channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. Whatever is under way, or called later, raises Closed."""
        self._closed.set()
        self._channel.close()

    def models(self) -> list[RemoteModel]:
        """Return the server's models, every version.

        Raises:
            RemoteError: no server is there.
        """
        return [RemoteModel(self, model) for model in self._models()]

    def model(self, name: str = "", version: str = "") -> RemoteModel:
        """Return the model called `name`, or the only one; its newest version, or the one of a number or digest.

        A server that still loads its models is waited for, as long as `Options.patience` says.

        Raises:
            RemoteError: no server is there, or it has no such model.
        """
        request = wire.GetModelRequest(model=name, version=version)
        try:
            return RemoteModel(self, self.call(lambda stub, more: stub.GetModel(request, **more)).model)
        except Rejected:  # there is no such model; one of a digest may have any name
            return RemoteModel(self, choose(self.address, self._models(), name, version))

    def _models(self) -> list[wire.Model]:
        return list(self.call(lambda stub, more: stub.ListModels(wire.ListModelsRequest(), **more)).models)

    def call(self, what: Callable[[Any, dict[str, Any]], Reply], model: Served | None = None) -> Reply:
        """Make a call, and again where that may help; its failures are RemoteErrors."""
        tries = Tries(self, model)
        while True:
            with tries:
                return what(self.stub, self.more(self.options.timeout))
            self.wait(tries.pause)

    def wait(self, seconds: float) -> None:
        """Wait, but no longer than the client is open."""
        self._closed.wait(seconds)
