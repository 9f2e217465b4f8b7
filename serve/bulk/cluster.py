"""A job on a cluster: actors of Ray make the shards, one at a time each.

An actor has an engine of its own; it makes a shard, puts it, and returns a receipt. Pictures never enter Ray's object
store. A shard that is made twice, since a node was lost or the driver came back, is the same pictures under the same
name, so whatever fails is given to another actor, and nothing has to be told to anybody.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from serve import devices
from serve.bulk.job import Job
from serve.bulk.run import Done, Kept, Receipt, complete
from serve.bulk.store import URL, open_store
from serve.bundle import Bundle, parse
from serve.card import Card
from serve.errors import JobError
from serve.model import EXACT

TRIES = 3  # of a shard, and of starting an actor before any other has made something
LOCAL = "local"
# Ray's switch for systems whose firewalls ask about each program that listens: it then does on the loopback alone.
LOOPBACK = ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
PATIENCE = 5.0  # seconds until a connection
HEARTBEAT = 1.0  # seconds until whoever waits may end the job
START = -1  # in place of a shard's number


class Cluster:
    """A model on a Ray cluster.

    Args:
        address: Ray's, or LOCAL for this machine alone.
        bundle: The model; its bytes travel once.
        device: Of each worker: with "cuda" or "tensorrt" it takes a GPU for itself, else one processor ("auto" too).
        arithmetic: As `Engine` takes it.
        workers: The most there are; 0 for as many as the cluster has room for.

    Raises:
        JobError: no such address, or a device that no worker can be told to have.

    Attributes:
        card: As `GenerativeModel.card`; `name`, `digest` and `arithmetic` likewise.
    """

    def __init__(
        self,
        address: str,
        bundle: Bundle,
        device: str = "auto",
        arithmetic: Literal["exact", "fast"] = "exact",
        workers: int = 0,
    ) -> None:
        self._address, self._bundle, self._workers = address, bundle, workers
        # What else a node has is not known here, and whatever is not asked of Ray would be shared by all of its actors.
        self._device = "cpu" if device == "auto" else device
        kind, _, number = self._device.partition(":")
        self._gpu = kind in ("cuda", "tensorrt")
        if "://" in address:
            raise JobError(f"--ray takes HOST:PORT, auto or local, on a node of the cluster. Received: {address}")
        if number:
            raise JobError(f"--ray gives each worker a device of its own; pass --device {kind}. Received: {device}")
        self._asked: Literal["exact", "fast"] = arithmetic
        self.card: Card = bundle.card
        self.name, self.digest = bundle.card.name, bundle.digest
        self.arithmetic = EXACT if arithmetic == EXACT else devices.fastest(devices.candidates(self._device)[0])

    def complete(self, job: Job, place: str, done: Done, count: int | None = None) -> Kept:
        """Make what is missing of a job, in the store at a path or URL that all nodes have and this process holds.

        Args:
            job: As `held` gives it.
            place: The store.
            done: As `run.complete` takes it.
            count: As `run.complete` takes it.

        Raises:
            JobError: Ray is not installed, does not answer, or cannot complete the job.
        """
        if self._address == LOCAL:
            os.environ.setdefault(*LOOPBACK)
        try:
            ray = import_module("ray")
        except ImportError:
            raise JobError("--ray takes pip install '.[ray]' in the checkout") from None
        logging.getLogger("ray").setLevel(logging.ERROR)
        with redirect_stdout(sys.stderr):  # whatever Ray prints is not what this command says
            try:
                _check_listens(self._address)
                where = {"include_dashboard": False} if self._address == LOCAL else {}
                stop = signal.getsignal(signal.SIGTERM)
                ray.init(self._address, log_to_driver=False, logging_level=logging.ERROR, **where)
                signal.signal(signal.SIGTERM, stop)  # Ray puts its own there, which ends the process at once
            except Exception as error:  # its exceptions share no base
                raise JobError(
                    f"no Ray cluster answers at {self._address}: {error}; start one with ray start --head, and run "
                    "this on one of its nodes"
                ) from None
            try:
                kept = Kept()
                files = job.files if count is None else -(-count // job.shard)
                for receipt in self._receipts(ray, job, place, files):
                    if receipt is None:
                        done(0, 0, True)
                    else:
                        kept.add(receipt)
                        done(receipt.count, receipt.bytes, receipt.made)
            except ray.exceptions.RayTaskError as error:
                raise JobError(str(error.cause)) from None
            except ray.exceptions.RayError as error:
                reason = str(error).strip().splitlines()[-1]
                raise JobError(f"the cluster cannot complete {place}: {reason}; the same command goes on") from None
            finally:
                ray.shutdown()
        kept.receipts.sort(key=lambda receipt: receipt.name)
        return kept

    def _receipts(self, ray: Any, job: Job, place: str, files: int) -> Iterator[Receipt | None]:
        """Yield what is made of a job's first files, as it is made; None now and then while nothing is."""
        need, resources = ("GPU", {"num_gpus": 1, "num_cpus": 0}) if self._gpu else ("CPU", {"num_cpus": 1})
        room = int(ray.cluster_resources().get(need, 0))
        if not (self._workers or room):
            raise JobError(f"the cluster has no {need}; name another --device, or --workers to wait for some")
        store = place if URL.match(place) else str(Path(place).absolute())
        asked = (ray.put(self._bundle.data), job, store, self._device, self._asked, 0 if self._gpu else 1)
        actors = ray.remote(**resources)(ShardWriter)

        shards, again = iter(range(files)), list[int]()
        failures = Counter[int]()
        running: dict[Any, tuple[Any, int]] = {}  # what is waited for: of which actor, and which shard

        def start() -> None:
            actor = actors.remote(*asked)
            running[actor.ready.remote()] = actor, START

        for _ in range(min(files, self._workers or room)):
            start()
        left = files
        while left:
            ready, _ = ray.wait(list(running), timeout=HEARTBEAT)
            if not ready:
                yield None
            for reference in ready:
                actor, number = running.pop(reference)
                try:
                    receipt = ray.get(reference)
                except ray.exceptions.RayError as error:
                    if getattr(error, "actor_init_failed", False):
                        if not running:  # what one cannot do here, it cannot do again; but others may
                            raise
                        continue
                    failures[number] += 1
                    if failures[number] == TRIES:
                        raise
                    if number != START:
                        again.append(number)
                    ray.kill(actor)  # it may only be out of reach
                    start()
                    continue
                if number != START:
                    failures[START] = 0
                    left -= 1
                    yield receipt
                number = again.pop() if again else next(shards, START)
                if number != START:  # else the actor ends here, and gives its room back
                    running[actor.make.remote(number)] = actor, number


class ShardWriter:
    """An actor: makes the shards whose numbers it is given.

    Args:
        model: The model file's bytes.
        job: What is wanted.
        place: The store's path or URL.
        device: As `Engine` takes it.
        arithmetic: As `Engine` takes it.
        threads: As `Engine` takes it.

    Raises:
        JobError: this node computes something else than the job wants.
    """

    def __init__(
        self, model: bytes, job: Job, place: str, device: str, arithmetic: Literal["exact", "fast"], threads: int
    ) -> None:
        from serve.engine import Engine

        self._job, self._store = job, open_store(place)
        self._engine = Engine(parse(model), device, threads, arithmetic=arithmetic)
        for what, wanted, received in (
            ("model", job.digest, self._engine.digest),
            ("arithmetic", job.arithmetic, self._engine.arithmetic),
        ):
            if wanted != received:
                raise JobError(f"a worker should make samples in the {what} {wanted}. Received: {received}")

    def ready(self) -> None:
        """Return once there is an engine."""

    def make(self, number: int) -> Receipt:
        """Make one shard, or find it there."""
        return complete(self._job, self._engine, self._store, part=number, parts=self._job.files).receipts[0]


def _check_listens(address: str) -> None:
    """Raise OSError where nobody listens at HOST:PORT: Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    if port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()
