"""Who takes part in a soak: workers who compare every picture, and those who kill, flood and replace."""

from __future__ import annotations

import hashlib
import itertools
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from ledger import Attempt, Ledger, Recorded
from prometheus_client.parser import text_string_to_metric_families

from serve import Bundle, Client
from serve.errors import Changed, RemoteError
from serve.model import Images
from serve.noise import Noise
from serve.stubs.onnx.v1 import model_pb2 as onnx
from serve.stubs.sampling.v1 import sampling_pb2 as wire
from serve.stubs.sampling.v1 import sampling_pb2_grpc as rpc

Code = grpc.StatusCode

SHARES = 8  # of streams that the queue has room for
SLOWEST = 60.0  # seconds that a swap, a refusal, or rest may take

READER = """
import sys
import time

from serve import Client
from serve.errors import Changed

address, seed, most = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
try:
    with Client(address) as client:
        for number, _ in enumerate(client.model().stream(seed, 0, 2**40)):
            if not number:
                print("reading", flush=True)
            if number == most:
                time.sleep(3600)  # holds what it asked for, and reads no more
except Changed:
    print("changed", flush=True)
"""


@dataclass(frozen=True)
class Known:
    """A range whose pictures are known."""

    seed: int
    start: int
    temperature: float
    noise: Noise
    images: Images


@dataclass(eq=False)
class Soak:
    """What all who take part share.

    Attributes:
        bundle: The model.
        known: Ranges whose pictures are known.
        file: The served file.
        address: The server's.
        metrics: Where it shows its metrics.
        newest: Digest of the newest file that can be served.
        calm: Set where no more faults are wanted.
        go: Set while workers are to work.
    """

    bundle: Bundle
    known: list[Known]
    file: Path
    address: str
    metrics: str
    ledger: Ledger = field(default_factory=Ledger)
    newest: str = ""
    calm: threading.Event = field(default_factory=threading.Event)
    go: threading.Event = field(default_factory=threading.Event)

    def compare(self, chunk: wire.Chunk, wanted: Images) -> None:
        """Compare the pictures of a message."""
        images = np.frombuffer(chunk.pixels, np.uint8).reshape(-1, *self.bundle.card.image_shape)
        self.ledger.compare(images, wanted)

    def start(self, what: Callable[..., None], *arguments: Any) -> threading.Thread:
        """Run something in a thread; how it fails is a problem."""

        def guarded() -> None:
            try:
                what(self, *arguments)
            except Exception as error:
                self.ledger.wrong(f"{what.__name__} ended: {type(error).__name__}: {error}")

        thread = threading.Thread(target=guarded, daemon=True)
        thread.start()
        return thread


def work(soak: Soak, client: Client, number: int) -> None:
    """Ask for one thing after another; compare every picture."""
    rng, ledger = random.Random(number), soak.ledger
    client.stub = Recorded(client.stub, ledger)  # type: ignore[assignment]  # the stub's classes are generated
    model = client.model()
    while not ledger.over.is_set():
        soak.go.wait()
        try:
            ask(soak, model, rng)
        except Changed:
            ledger.note("model changed under a worker")
            if model.digest == soak.newest:
                ledger.wrong("a model that nobody replaced was not found")
            model = client.model()
        except RemoteError as error:
            if time.monotonic() > ledger.told:
                return
            ledger.wrong(f"a worker's {type(error).__name__}: {error}")


def ask(soak: Soak, model: Any, rng: random.Random) -> None:
    """Make one request of a kind drawn by lot."""
    known = rng.choice(soak.known)
    kind = rng.choices(("one", "sixteen", "decode", "stream"), (40, 25, 15, 20))[0]
    count = {"one": 1, "sixteen": 16, "decode": rng.randint(1, 16), "stream": rng.randint(1, len(known.images))}[kind]
    at = rng.randint(0, len(known.images) - count)
    what: dict[str, Any] = {"priority": rng.choice((None, "interactive", "bulk"))}
    if kind == "decode":
        soak.ledger.compare(model.decode(known.noise[at : at + count], **what), known.images[at : at + count])
        return
    what |= {"seed": known.seed, "start": known.start + at, "count": count, "temperature": known.temperature}
    if kind != "stream":
        soak.ledger.compare(model.sample(**what), known.images[at : at + count])
        return
    done = 0
    for start, images in model.stream(**what):
        if start != known.start + at + done:
            soak.ledger.wrong("a stream went on where it should not")
        soak.ledger.compare(images, known.images[at + done : at + done + len(images)])
        done += len(images)
    if done != count:
        soak.ledger.wrong(f"a stream of {count} samples ended after {done}")


def hammer(soak: Soak, client: Client) -> None:
    """Ask for one sample after another until the server is gone."""
    stub, known = Recorded(client.stub, soak.ledger), soak.known[0]
    wanted = wire.Range(seed=known.seed, start=known.start, temperature=known.temperature, count=1)
    while not soak.ledger.over.is_set():
        try:
            chunk: wire.Chunk = stub.Sample(wire.SampleRequest(range=wanted), timeout=SLOWEST, metadata=()).chunk
        except grpc.RpcError as failure:
            if time.monotonic() > soak.ledger.told:
                return
            soak.ledger.wrong(f"a short call: {failure.code().name}: {failure.details()}")
            continue
        except RemoteError:
            return
        soak.compare(chunk, known.images[:1])


def kill(soak: Soak, number: int) -> None:
    """Start readers of endless streams, and kill each sooner or later."""
    rng, ledger = random.Random(f"kill {number}"), soak.ledger
    while not soak.calm.is_set():
        most = rng.choice((0, 3, 10**9))
        words = [sys.executable, "-c", READER, soak.address, str(rng.getrandbits(64)), str(most)]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as reader:
            assert reader.stdout is not None
            assert reader.stderr is not None
            said = "" if rng.random() < 0.2 else reader.stdout.readline()
            soak.calm.wait(rng.uniform(0, 1.5))
            reader.kill()
            said += reader.stdout.read()
            last = (reader.stderr.read().strip().splitlines() or [""])[-1]
        if reader.returncode == -signal.SIGKILL:
            ledger.note("kills while reading" if said else "kills before reading")
        elif "changed" in said:
            ledger.note("model changed under a reader")
        else:
            ledger.wrong(f"a reader ended by itself: {last}")


def burst(soak: Soak) -> None:
    """Fill the queue with streams that nobody reads, and ask for more."""
    rng, ledger = random.Random("burst"), soak.ledger
    with grpc.insecure_channel(soak.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub = rpc.SamplingServiceStub(channel)
        while not soak.calm.wait(rng.uniform(1, 6)):
            endless = wire.SampleStreamRequest(range=wire.Range(seed=rng.getrandbits(64), count=2**40))
            streams = [stub.SampleStream(endless) for _ in range(2 * SHARES)]
            refused = sum(turned_away(ledger, stream) for stream in streams)
            if refused < SHARES:
                ledger.wrong(f"a burst of twice the queue had {refused} of {2 * SHARES} streams refused")
            known = rng.choice(soak.known)
            count = min(16, len(known.images))
            wanted = wire.Range(seed=known.seed, start=known.start, temperature=known.temperature, count=count)
            for call in [stub.Sample.future(wire.SampleRequest(range=wanted), timeout=60) for _ in range(16)]:
                attempt = ledger.begin("burst Sample")
                try:
                    chunk = call.result().chunk
                except grpc.RpcError as failure:
                    only_full(ledger, attempt, failure)
                    continue
                ledger.end(attempt)
                soak.compare(chunk, known.images[:count])
            soak.calm.wait(rng.uniform(0, 0.5))
            for stream in streams:
                stream.cancel()
            ledger.note("bursts")


def ignore(soak: Soak) -> None:
    """Take all the room for streams that nobody reads, and hold it until the server ends them for others."""
    rng = random.Random("ignore")
    while not soak.calm.wait(rng.uniform(2, 10)):
        with ExitStack() as stack:
            before, streams = measured(soak)["stalled_readers"], []
            for seed in range(SHARES):
                # By its own guess of the bandwidth gRPC would take megabytes beforehand: not so silent.
                options = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0)]
                channel = grpc.insecure_channel(soak.address, options)
                stub = rpc.SamplingServiceStub(stack.enter_context(channel))
                streams.append(stub.SampleStream(wire.SampleStreamRequest(range=wire.Range(seed=seed, count=2**40))))
            if not until(lambda: ended_or_calm(soak, streams, before)):  # noqa: B023
                soak.ledger.wrong("readers who read nothing kept everybody else's room")
            if measured(soak)["stalled_readers"] > before:
                soak.ledger.note("silent readers ended")


def ended_or_calm(soak: Soak, streams: list[Any], before: float) -> bool:
    """Tell whether silent readers were ended, or let nobody in because others held all the room."""
    here = any(stream.is_active() for stream in streams)
    return soak.calm.is_set() or not here or measured(soak)["stalled_readers"] > before


def turned_away(ledger: Ledger, stream: Any) -> bool:
    """Wait for a stream to begin; tell whether it was refused instead."""
    attempt = ledger.begin("burst SampleStream")
    try:
        next(stream)
    except grpc.RpcError as failure:
        only_full(ledger, attempt, failure)
        return True
    ledger.end(attempt)
    return False


def only_full(ledger: Ledger, attempt: Attempt, failure: Any) -> None:
    """Take note of a refusal, for which there is one good reason."""
    ledger.end(attempt, failure)
    if failure.code() is not Code.RESOURCE_EXHAUSTED:
        ledger.wrong(f"{attempt.kind}: {failure.code().name} in a burst: {failure.details()}")


def swap(soak: Soak) -> None:
    """Replace the file by others of the same pictures, and from time to time by a broken one."""
    rng, ledger, data = random.Random("swap"), soak.ledger, soak.bundle.data
    with Client(soak.address) as client:
        for number in itertools.count():
            if soak.calm.wait(rng.uniform(1, 4)):
                return
            if number % 4 == 1:
                wanted = measured(soak)["model_loads refused"] + 1
                replace(soak.file, broken(data, rng))
                if until(partial(refused, soak, wanted)):
                    ledger.note("broken files refused")
                else:
                    ledger.wrong("a broken file was not refused")
                if [model.digest for model in client.models()] != [soak.newest]:
                    ledger.wrong("a broken file changed what is served")
                continue
            other = another(data, f"{rng.getrandbits(64)}")
            soak.newest = hashlib.sha256(other).hexdigest()
            replace(soak.file, other)
            if until(lambda: [model.digest for model in client.models()] == [soak.newest]):
                ledger.note("swaps")
            else:
                ledger.wrong("a model that was replaced is still served")


def refused(soak: Soak, wanted: float) -> bool:
    """Tell whether the server refused so many files."""
    return measured(soak)["model_loads refused"] >= wanted


def another(data: bytes, text: str) -> bytes:
    """Return a bundle of the same pictures: protobuf reads messages one after the other as one."""
    more = onnx.Model()
    more.metadata_props.add(key="soak", value=text)
    return data + more.SerializeToString()


def broken(data: bytes, rng: random.Random) -> bytes:
    """Return what cannot be served, of one kind or another."""
    model = onnx.Model.FromString(data)
    kind = rng.choice(("empty", "cut", "noise", "no card", "no operator"))
    if kind == "no card":
        del model.metadata_props[:]
    model.graph.node[-1].op_type = "Nonsense"
    return {"empty": b"", "cut": data[: len(data) // 2], "noise": rng.randbytes(1000)}.get(
        kind, model.SerializeToString()
    )


def replace(file: Path, data: bytes) -> None:
    """Put other bytes into a file's place at once."""
    new = file.with_suffix(".new")
    new.write_bytes(data)
    new.replace(file)


def until(true: Callable[[], bool], seconds: float = SLOWEST) -> bool:
    """Wait until something is so; tell whether it came to be."""
    last = time.monotonic() + seconds
    while not true():
        if time.monotonic() > last:
            return False
        time.sleep(0.1)
    return True


def measured(soak: Soak) -> defaultdict[str, float]:
    """Return the server's gauges and loads; of several models the sum."""
    with urllib.request.urlopen(soak.metrics, timeout=SLOWEST) as page:
        text = page.read().decode()
    found: defaultdict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        name = family.name.removeprefix("balancedvae_")
        for each in family.samples:
            if family.type == "gauge" or name == "stalled_readers":
                found[name] += each.value
            elif name == "model_loads":
                found[f"{name} {each.labels['result']}"] += each.value
    return found
