"""One model on several servers: a long range is cut into pieces, and each server makes the next piece that nobody has.

A sample is the same picture whoever makes it. So a piece of a server that is lost is asked for elsewhere, and so is one
that takes much longer than the others: whoever answers first has made it.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from serve.client.options import Options
from serve.client.pieces import GONE, PAUSE, Range, Work
from serve.client.sync import Client, RemoteModel
from serve.encoding import pictures
from serve.errors import Changed, Closed, Overloaded, Rejected, RemoteError, TimedOut
from serve.model import Images, check_sampling

if TYPE_CHECKING:
    from PIL.Image import Image

JOIN = 1.0  # seconds that the other servers have to answer in once one has the model

log = logging.getLogger(__name__)


class Fleet:
    """Connections to several servers; a context manager.

    Args:
        addresses: As `Client` takes one.
        options: For each of them; `patience` is how long all may be away together.

    Raises:
        RemoteError: as `Client`; Rejected where there is no address.
    """

    def __init__(self, addresses: Sequence[str], options: Options = Options()) -> None:  # noqa: B008 (it is frozen)
        if not addresses:
            raise Rejected("a fleet has one server or more; give their addresses")
        self.options = options
        # A server that is away is no reason to wait while there are others.
        each = replace(options, patience=0.0, start=0.0)
        self.clients = [Client(address, each) for address in addresses]
        self._patient: set[Client] = set()  # that wait for a model
        self._told: set[Client] = set()  # of those that are away
        self._closed = threading.Event()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections, as `Client.close`."""
        self._closed.set()
        for client in [*self.clients, *self._patient]:
            client.close()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed.is_set()

    def model(self, name: str = "", version: str = "") -> FleetModel:
        """Return a model that all servers have which answer; those that do not may come back.

        All are asked at once, and each is waited for as a `Client` waits, but only until one has the model and the
        others had a second to answer in.

        Raises:
            Changed: two servers have different models of the name, or compute in different arithmetics.
            RemoteError: no server answers, or one has no such model.
        """
        found, failed = self._ask(name, version)
        if not found:
            raise failed[self.clients[0]]
        first, *others = found.items()
        for client, model in others:
            for what in ("digest", "arithmetic"):
                here, there = (getattr(each, what) for each in (first[1], model))
                if here != there:
                    raise Changed(
                        f"the servers {first[0].address} and {client.address} should have one {what} of "
                        f"{model.name}. Received: {here[:16]} and {there[:16]}; address servers that have the same"
                    )
        for client in self.clients:
            if client not in found:
                why = failed.get(client, f"the server at {client.address} did not answer within {JOIN:.0f} s")
                self.lost(client, why, "beginning")
        return FleetModel(self, first[1], found)

    def wait(self, seconds: float) -> None:
        """Wait, but no longer than the fleet is open."""
        self._closed.wait(seconds)

    def lost(self, client: Client, why: object, what: str = "going on") -> None:
        """Say that a server is done without, once until it is back."""
        if client not in self._told:
            self._told.add(client)
            # A busy server is an everyday matter.
            level = logging.INFO if isinstance(why, Overloaded) else logging.WARNING
            log.log(level, "%s without %s: %s", what, client.address, why)

    def back(self, client: Client) -> None:
        """Note that a server answers."""
        self._told.discard(client)

    def _ask(self, name: str, version: str) -> tuple[dict[Client, RemoteModel], dict[Client, RemoteError]]:
        """Return the model as each server has it, and why the others have not, in the order of their addresses.

        Raises:
            RemoteError: a server has no such model, or does not allow it; the fleet was closed.
        """
        asked: dict[Client, Future[RemoteModel]] = {}
        with ThreadPoolExecutor(len(self.clients)) as pool, ExitStack() as stack:
            for client in self.clients:
                # By a connection of its own, which is closed once nobody needs to wait any longer.
                patient = stack.enter_context(Client(client.address, self.options))
                self._patient.add(patient)
                stack.callback(self._patient.discard, patient)
                asked[client] = pool.submit(patient.model, name, version)
            if self.closed:
                raise Closed(f"the client of {self.clients[0].address} is closed; make another one")
            pending, until = set(asked.values()), math.inf
            while pending and time.monotonic() < until:
                left = None if until == math.inf else until - time.monotonic()
                done, pending = wait(pending, left, FIRST_COMPLETED)
                errors = [each.exception() for each in done]
                if unforgiven := [each for each in errors if each is not None and not isinstance(each, GONE)]:
                    raise unforgiven[0]
                if None in errors:
                    until = min(until, time.monotonic() + JOIN)
            ended = {client: each for client, each in asked.items() if each not in pending}
        failed = {client: each.exception() for client, each in ended.items()}
        found = {client: each.result().by(client) for client, each in ended.items() if failed[client] is None}
        return found, {client: error for client, error in failed.items() if isinstance(error, RemoteError)}


class FleetModel:
    """A model on several servers: a `serve.model.GenerativeModel`."""

    def __init__(self, fleet: Fleet, model: RemoteModel, found: dict[Client, RemoteModel]) -> None:
        self._fleet, self._model, self._found = fleet, model, dict(found)
        self.card, self.digest, self.arithmetic = model.card, model.digest, model.arithmetic
        self.took: deque[float] = deque(maxlen=32)  # seconds a sample, of the last pieces
        self.hung: set[Client] = set()  # whose piece others took over: they get no further one until they answer
        self._first = itertools.count()
        self._later: dict[Client, float] = {}  # until when those that failed are asked after the others

    @property
    def name(self) -> str:
        """The model's name."""
        return self._model.name

    @property
    def batch(self) -> int:
        """The most samples that a server puts into one message."""
        return self._model.batch

    def sample(self, seed: int, start: int, count: int, temperature: float = 1.0) -> Images:
        """As `GenerativeModel.sample`."""
        parts = [images for _, images in self.stream(seed, start, count, temperature)]
        return np.concatenate([np.empty((0, *self.card.image_shape), np.uint8), *parts])

    def pictures(self, seed: int, start: int, count: int, temperature: float = 1.0) -> list[Image]:
        """As `GenerativeModel.pictures`."""
        return pictures(self.sample(seed, start, count, temperature))

    def decode(self, noise: npt.ArrayLike) -> Images:
        """As `GenerativeModel.decode`, by one server after the other; those that are away or hang are asked last."""
        since = time.monotonic()
        while True:
            failed: list[RemoteError] = []
            clients = self._fleet.clients
            first = next(self._first) % len(clients)
            in_turn = [*clients[first:], *clients[:first]]
            for client in sorted(in_turn, key=self._rank):
                try:
                    return self.on(client).decode(noise)
                except GONE as error:
                    failed.append(error)
                    # One that hangs would keep others for as long again.
                    pause = self._fleet.options.timeout if isinstance(error, TimedOut) else error.retry_after
                    self._later[client] = time.monotonic() + max(PAUSE, pause)
            left = since + self._fleet.options.patience - time.monotonic()
            if left <= 0:
                raise failed[0]
            self._fleet.wait(min(left, max(PAUSE, min(error.retry_after for error in failed))))

    def _rank(self, client: Client) -> tuple[bool, bool]:
        """Return what sorts servers: those that hang are last, and those that failed a moment ago before them."""
        return client in self.hung, self._later.get(client, 0.0) > time.monotonic()

    def stream(self, seed: int, start: int, count: int, temperature: float = 1.0) -> Iterator[tuple[int, Images]]:
        """As `GenerativeModel.stream`, a piece at a time.

        Raises:
            Changed: a server has another model now.
            RemoteError: no server has made anything for as long as `Options.patience` says.
        """
        try:
            seed, start, count = check_sampling(seed, start, count, temperature)
        except ValueError as error:
            raise Rejected(str(error)) from None
        yield from Work(self, self._fleet, Range(seed, start, count, temperature))

    def on(self, client: Client) -> RemoteModel:
        """Return the model as one of the servers has it; a server that was away is asked for it.

        Raises:
            Changed: it has another one.
            RemoteError: it does not answer.
        """
        if client not in self._found:
            try:
                model = client.model(self.name, self.digest)
            except Rejected:
                raise self._model.changed() from None
            if model.arithmetic != self.arithmetic:
                raise Changed(
                    f"the server {client.address} computes {self.name} in {model.arithmetic} arithmetic, where "
                    f"{self.arithmetic} was begun with; address servers of one arithmetic"
                )
            self._found[client] = model
        return self._found[client]
