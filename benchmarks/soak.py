"""A server under load and faults for minutes: nothing wrong, nothing lost, nothing that grows.

python benchmarks/soak.py --minutes 10                     the embedded faces
python benchmarks/soak.py --minutes 10 --model mine.onnx   a small model makes far more requests of the same time

Workers compare every picture with those that an engine made beforehand. Meanwhile readers are killed, the model's file
is replaced by others of the same pictures and by broken ones, and bursts fill the queue. Then everything has to come to
rest, and a SIGTERM under load has to lose nothing; nor have those to other servers, under nothing but short calls. The
exit code is 1 if anything is not as it should be. MALLOC_ARENA_MAX and other variables reach the server.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click
import grpc
import numpy as np
from google.rpc.error_details_pb2 import RetryInfo
from grpc_status import rpc_status
from prometheus_client.parser import text_string_to_metric_families

from serve import Bundle, Client, Engine, load
from serve.bundle import DEFAULT
from serve.engine import Images
from serve.errors import Changed, RemoteError
from serve.noise import Noise, draw
from serve.server.models import Limits
from serve.stubs.onnx.v1 import model_pb2 as onnx
from serve.stubs.sampling.v1 import sampling_pb2 as wire
from serve.stubs.sampling.v1 import sampling_pb2_grpc as rpc

Code = grpc.StatusCode

LONGEST = 2000  # samples of a worker's stream, or what an engine makes in a second
SHARES = 8  # of streams that the queue has room for
SLOWEST = 60.0  # seconds that a swap, a refusal, or rest may take
HAMMERS = 8  # who make short calls while servers are stopped
SPARE = 16  # file descriptors and threads that may come and go
TURNED_AWAY = ("RESOURCE_EXHAUSTED", "UNAVAILABLE", "NOT_FOUND")  # what says that a call was not accepted
FAULTS = {
    "swap": "broken files refused",
    "burst": "bursts",
    "kill": "kills while reading",
}  # and what shows that they came
EXPECTED = "refused "  # how the log begins where a broken file was seen

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

Fault = tuple[Any, ...]  # what to run, and its arguments after the soak


@dataclass(frozen=True)
class Known:
    """A range whose pictures are known."""

    seed: int
    start: int
    temperature: float
    noise: Noise
    images: Images


@dataclass(eq=False)
class Attempt:
    """One call on the wire, as its caller saw it."""

    kind: str
    identity: str
    began: float
    since: float = -math.inf  # the server was told to stop, when it began; seconds
    late: bool = False  # whether it ended after that
    replies: int = 0
    code: str = ""
    why: str = ""


class Ledger:
    """What happened, told by all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.codes: Counter[tuple[str, str]] = Counter()
        self.failed: list[Attempt] = []
        self.under_way: set[Attempt] = set()
        self.events: Counter[str] = Counter()
        self.problems: Counter[str] = Counter()
        self.told = math.inf  # when the server was told to stop
        self.over = threading.Event()

    def note(self, event: str, count: int = 1) -> None:
        """Count something that may happen."""
        with self._lock:
            self.events[event] += count

    def wrong(self, problem: str) -> None:
        """Count something that may not."""
        with self._lock:
            self.problems[problem.splitlines()[0][:200] if problem else "no reason given"] += 1

    def begin(self, kind: str) -> Attempt:
        """Take note of a call that begins."""
        attempt = Attempt(kind, uuid.uuid4().hex, time.monotonic())
        with self._lock:
            self.under_way.add(attempt)
        return attempt

    def end(self, attempt: Attempt, failure: Any = None) -> None:
        """Take note of its end, and judge what can be judged by its code."""
        attempt.code = failure.code().name if failure else "OK"
        attempt.why = f"{attempt.code}: {failure.details()}" if failure else ""
        attempt.since, attempt.late = attempt.began - self.told, time.monotonic() > self.told
        with self._lock:
            self.under_way.discard(attempt)
            self.codes[attempt.kind, attempt.code] += 1
            if failure:
                self.failed.append(attempt)
        if failure and failure.code() is Code.RESOURCE_EXHAUSTED and not 0 < retry_delay(failure) <= 30:
            self.wrong(f"{attempt.kind}: RESOURCE_EXHAUSTED without RetryInfo, or out of its range")
        if failure and failure.code() is Code.UNAVAILABLE and not attempt.late:
            self.wrong(f"{attempt.kind}: UNAVAILABLE while nobody stopped the server: {failure.details()}")

    def compare(self, images: Images, wanted: Images) -> None:
        """Count pictures, and those that are not what they should be."""
        if images.shape != wanted.shape:
            self.note("wrong samples", len(wanted))
        else:
            self.note("wrong samples", int((images != wanted).reshape(len(wanted), -1).any(axis=1).sum()))
        self.note("samples compared", len(wanted))


class Recorded:
    """A stub that tells a ledger of every call, those that a client repeats by itself too."""

    def __init__(self, stub: Any, ledger: Ledger) -> None:
        self._stub = stub
        self._ledger = ledger

    def __getattr__(self, kind: str) -> Callable[..., Any]:
        def call(request: Any, timeout: float | None, metadata: Sequence[tuple[str, str]]) -> Any:
            if self._ledger.over.is_set():
                raise RemoteError("the soak is over")
            attempt = self._ledger.begin(kind)
            more = {"timeout": timeout, "metadata": [*metadata, ("x-request-id", attempt.identity)]}
            if kind == "SampleStream":
                return RecordedStream(getattr(self._stub, kind)(request, **more), attempt, self._ledger)
            try:
                reply = getattr(self._stub, kind)(request, **more)
            except grpc.RpcError as failure:
                self._ledger.end(attempt, failure)
                raise
            self._ledger.end(attempt)
            return reply

        return call


class RecordedStream:
    """A stream's replies, counted."""

    def __init__(self, call: Any, attempt: Attempt, ledger: Ledger) -> None:
        self._call, self._attempt, self._ledger = call, attempt, ledger

    def __iter__(self) -> Iterator[Any]:
        try:
            for reply in self._call:
                self._attempt.replies += 1
                yield reply
        except grpc.RpcError as failure:
            self._ledger.end(self._attempt, failure)
            raise
        self._ledger.end(self._attempt)

    def cancel(self) -> None:
        self._call.cancel()


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
    with urllib.request.urlopen(f"http://{soak.metrics}/metrics", timeout=SLOWEST) as page:
        text = page.read().decode()
    found: defaultdict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        name = family.name.removeprefix("balancedvae_")
        for each in family.samples:
            if family.type == "gauge":
                found[name] += each.value
            elif name == "model_loads":
                found[f"{name} {each.labels['result']}"] += each.value
    return found


def looked_at(process: subprocess.Popen[bytes]) -> dict[str, float]:
    """Return a process's memory in MB, its file descriptors and its threads."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    values = dict(re.findall(r"^(VmRSS|Threads):\s+(\d+)", status, re.MULTILINE))
    fds = len(os.listdir(f"/proc/{process.pid}/fd"))
    return {"rss": int(values["VmRSS"]) * 1024 / 1e6, "fds": fds, "threads": int(values["Threads"])}


def watch(soak: Soak, process: subprocess.Popen[bytes], seconds: float) -> list[dict[str, float]]:
    """Look at the server every second, for so many; return what was seen."""
    began, seen = time.monotonic(), list[dict[str, float]]()
    while (at := time.monotonic() - began) < seconds and process.poll() is None:
        try:
            values = measured(soak)
            gauges = {name: values[name] for name in ("held_samples", "queue_samples", "requests_under_way")}
            seen.append({"second": round(at, 2)} | looked_at(process) | gauges)
        except (OSError, KeyError) as error:
            soak.ledger.wrong(f"the server could not be looked at: {type(error).__name__}: {error}")
            break
        if values["held_samples"] > values["held_samples_limit"]:
            soak.ledger.wrong("more samples were held than the limit")
        if len(seen) % 30 == 1:
            print(f"{at:5.0f} s, {seen[-1]['rss']:.1f} MB, {soak.ledger.codes.total()} calls", flush=True)
        time.sleep(max(0.0, began + len(seen) - time.monotonic()))
    return seen


def rest(soak: Soak, process: subprocess.Popen[bytes]) -> dict[str, float]:
    """Let the workers pause, wait until nothing is held, and look at the server."""
    soak.go.clear()
    idle = ("held_samples", "held_bytes", "queue_samples", "requests_under_way")
    if not until(lambda: not any(measured(soak)[name] for name in idle)):
        values = measured(soak)
        soak.ledger.wrong("at rest the server holds " + ", ".join(f"{name} {values[name]:.0f}" for name in idle))
    return looked_at(process)


def retry_delay(failure: Any) -> float:
    """Return what google.rpc.RetryInfo says, in seconds; 0 where it is not there."""
    status, info = rpc_status.from_call(failure), RetryInfo()
    for detail in status.details if status else ():
        if detail.Unpack(info):
            return float(info.retry_delay.ToTimedelta().total_seconds())
    return 0.0


def lost(failed: list[Attempt], log: list[dict[str, Any]]) -> list[Attempt]:
    """Return the calls that failed although the server had accepted them.

    It had where it began to answer, where its log has another end than the caller, or where the call was made before
    the SIGTERM and its status does not say that it had not.
    """
    ends = {each["request_id"]: each["code"] for each in log if "code" in each}
    return [
        each
        for each in failed
        if each.replies
        or ends.get(each.identity, each.code) != each.code
        or (each.since < 0 and each.code not in TURNED_AWAY and not each.kind.startswith("burst"))
    ]


def parsed(logs: Sequence[Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the logs' records, and in a line each what is none or tells of an error that nobody caused."""
    records, strange = [], []
    for line in (line for log in logs for line in log.read_text(errors="replace").splitlines()):
        try:
            record = json.loads(line)
        except ValueError:
            strange.append(line)
            continue
        records.append(record)
        if trace := record.get("exc_info"):
            strange.append(f"{record['logger']} has a traceback: {trace.splitlines()[-1]}")
        elif record["level"] in ("ERROR", "CRITICAL") and not record["message"].startswith(EXPECTED):
            strange.append(f"{record['logger']}: {record['message']}")
    return records, strange


def prepare(bundle: Bundle, ranges: int = 4) -> tuple[list[Known], Limits]:
    """Compute ranges, as long as the engine's speed allows; also return the server's limits."""
    engine, rng = Engine(bundle, "cpu"), random.Random("known")
    shape = bundle.card.image_shape
    began = time.monotonic()
    engine.sample(0, 0, 4 * engine.batch)
    count = max(64, min(LONGEST, int(4 * engine.batch / (time.monotonic() - began))))
    known = []
    for number in range(ranges):
        seed, start, temperature = rng.getrandbits(64), rng.getrandbits(62), (1.0, 0.7)[number % 2]
        noise = draw(seed, start, count, bundle.card.noise_size) * np.float32(temperature)
        known.append(Known(seed, start, temperature, noise, engine.run(noise)))
    return known, Limits.of(engine.batch, int(np.prod(shape)))


def free_port() -> int:
    """Return a port of the loopback that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


@click.command()
@click.option("--minutes", default=10.0, show_default=True)
@click.option("--model", type=click.Path(path_type=Path, exists=True), default=DEFAULT)
@click.option("--workers", default=6, show_default=True)
@click.option("--killers", default=2, show_default=True)
@click.option("--stops", default=10, show_default=True, help="More servers that are stopped under short calls.")
@click.option("--without", multiple=True, type=click.Choice(FAULTS), help="A fault to leave out (repeatable).")
@click.option(
    "--growth", default=5.0, show_default=True, help="MB/min of the second half that are a leak, from 10 min."
)
@click.option("--series", type=click.Path(path_type=Path), help="A CSV of what was seen each second.")
@click.option("--log", type=click.Path(path_type=Path), help="Where the server's log is kept.")
def main(
    minutes: float,
    model: Path,
    workers: int,
    killers: int,
    stops: int,
    without: tuple[str, ...],
    growth: float,
    series: Path | None,
    log: Path | None,
) -> None:
    """Soak a server, and print what came of it."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # the server is to end too
    bundle = load(model)
    known, limits = prepare(bundle)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        log = log or folder / "log"
        (folder / "models").mkdir()
        file, metrics = folder / "models" / "soak.onnx", f"127.0.0.1:{free_port()}"
        file.write_bytes(bundle.data)
        room = SHARES * limits.chunk * limits.ahead
        words = ["--models", str(file.parent), "--watch", "0.5", "--metrics", metrics, "--queue-samples", str(room)]
        words += ["--listen", "127.0.0.1:0", "--device", "cpu", "--grace", "60", "--log-format", "json"]
        command = [sys.executable, "-c", "from serve.server.cli import main; main()", *words, "--log-requests"]
        process = subprocess.Popen(command, stderr=stack.enter_context(log.open("wb")))
        try:
            address = listening(process, log)
            soak = Soak(bundle, known, file, address, metrics, newest=bundle.digest)
            clients = [stack.enter_context(Client(address)) for _ in range(workers)]
            faults: list[Fault] = [(swap,), (burst,), *((kill, number) for number in range(killers))]
            faults = [fault for fault in faults if fault[0].__name__ not in without]
            figures, seen = run(soak, process, clients, faults, 60 * minutes)
        finally:
            process.kill()
            process.wait()
        file.write_bytes(bundle.data)
        logs = [log, *(log.with_name(f"{log.name}.{number}") for number in range(stops))]
        for each in logs[1:]:
            stop(soak, command, each)
        records, strange = parsed(logs)
        tried = ["samples compared", *(event for fault, event in FAULTS.items() if fault not in without)]
        report(soak, figures, seen, records, strange, tried, growth if minutes >= 10 else math.inf)
    if series:
        with series.open("w", newline="") as sheet:
            table = csv.DictWriter(sheet, list(seen[0]))
            table.writeheader()
            table.writerows(seen)
    sys.exit(1 if soak.ledger.problems else 0)


def listening(process: subprocess.Popen[bytes], log: Path) -> str:
    """Return the address of a server that is ready.

    Raises:
        click.ClickException: it ended.
    """
    ready: list[str] = []

    def look() -> bool:
        ready[:] = re.findall(r"ready, listening on ([\w.:]+)", log.read_text())
        return bool(ready) or process.poll() is not None

    if not until(look) or not ready:
        raise click.ClickException(f"the server should start. Received: {log.read_text()[-300:]}")
    return ready[0]


def run(
    soak: Soak, process: subprocess.Popen[bytes], clients: list[Client], faults: list[Fault], seconds: float
) -> tuple[dict[str, str], list[dict[str, float]]]:
    """Do everything, and return figures for the report and what was seen each second."""
    ledger = soak.ledger

    soak.go.set()
    working = [soak.start(work, client, number) for number, client in enumerate(clients)]
    faulty = [soak.start(*fault) for fault in faults]
    seen = watch(soak, process, seconds)
    soak.calm.set()
    finish(soak, faulty)
    if process.poll() is not None:
        ledger.wrong(f"the server ended by itself with the exit code {process.returncode}")
        ledger.over.set()
        return {}, seen
    after = rest(soak, process)
    soak.go.set()
    until(lambda: len(ledger.under_way) >= len(clients), 5)
    under_way = [each.kind for each in list(ledger.under_way)]
    took = end(soak, process)
    ledger.over.set()
    for client in clients:
        client.close()
    finish(soak, working)
    first = seen[len(seen) // 10]
    for name in ("fds", "threads"):
        if after[name] > first[name] + SPARE:
            ledger.wrong(f"{name} grew from {first[name]:.0f} to {after[name]:.0f}")
    figures = {
        "RSS at rest": f"{after['rss']:.1f} MB",
        "fds at the start, under load, at rest": f"{seen[0]['fds']}, {seen[-1]['fds']}, {after['fds']}",
        "threads at the start, under load, at rest": f"{seen[0]['threads']}, {seen[-1]['threads']}, {after['threads']}",
        "calls under way at SIGTERM": f"{len(under_way)}, {under_way.count('SampleStream')} of them streams",
        "from SIGTERM to the end": f"{took:.2f} s, exit code {process.returncode}",
    }
    return figures, seen


def finish(soak: Soak, threads: list[threading.Thread]) -> None:
    """Wait for threads to end."""
    for thread in threads:
        thread.join(2 * SLOWEST)
        if thread.is_alive():
            soak.ledger.wrong("a call, or who waits for one, hangs")


def end(soak: Soak, process: subprocess.Popen[bytes]) -> float:
    """Send a SIGTERM, and return how many seconds the server took to end."""
    soak.ledger.told = time.monotonic()
    process.terminate()
    try:
        process.wait(90)
    except subprocess.TimeoutExpired:
        soak.ledger.wrong("the server did not end within 90 s of SIGTERM")
    if process.returncode:
        soak.ledger.wrong(f"the server's exit code was {process.returncode}")
    return time.monotonic() - soak.ledger.told


def stop(soak: Soak, command: Sequence[str], log: Path) -> None:
    """Start a server, and stop it under short calls: some are always about to arrive or to be answered."""
    soak.ledger.told = math.inf
    soak.ledger.over.clear()
    with log.open("wb") as said, subprocess.Popen(command, stderr=said) as process, ExitStack() as stack:
        try:
            address = listening(process, log)
            clients = [stack.enter_context(Client(address)) for _ in range(HAMMERS)]
            threads = [soak.start(hammer, client) for client in clients]
            time.sleep(random.uniform(0.3, 0.6))
            end(soak, process)
            soak.ledger.over.set()
            finish(soak, threads)
        finally:
            process.kill()
    soak.ledger.note("stops under short calls")


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


def report(
    soak: Soak,
    figures: dict[str, str],
    seen: list[dict[str, float]],
    records: list[dict[str, Any]],
    strange: list[str],
    tried: list[str],
    growth: float,
) -> None:
    """Print the tables; what the log and the memory show comes to the problems."""
    ledger, events = soak.ledger, soak.ledger.events
    gone = lost(ledger.failed, records)
    for each in gone:
        when = "before SIGTERM" if each.since < 0 else "after SIGTERM"
        ledger.wrong(f"an accepted {each.kind}, made {when}, was lost after {each.replies} replies: {each.why}")
    for line in strange:
        ledger.wrong(f"in the server's log: {line}")
    if events["wrong samples"]:
        ledger.wrong(f"{events['wrong samples']} samples are wrong")
    for event in tried:
        if not events[event]:
            ledger.wrong(f"nothing was tried: no {event}")
    half = seen[len(seen) // 2 :]
    at = np.array([each["second"] / 60 for each in half])
    slope = float(np.polyfit(at, [each["rss"] for each in half], 1)[0]) if len(half) > 2 else 0.0
    if slope > growth:
        ledger.wrong(f"memory grew by {slope:.2f} MB/min, more than {growth}")
    away = [each for each in ledger.failed if each.late and each not in gone]
    how = Counter(each.code for each in away)
    figures |= {
        "turned away after SIGTERM": ", ".join(f"{count} {code}" for code, count in sorted(how.items()))
        + f"; {sum(each.since < 0 for each in away)} of them called before",
        "RSS at 10, 50, 100 %": ", ".join(f"{seen[row]['rss']:.1f}" for row in (len(seen) // 10, len(seen) // 2, -1))
        + " MB",
        "its slope in the second half": f"{slope:+.2f} MB/min",
        "most samples held, queued": f"{max(each['held_samples'] for each in seen):.0f}, "
        f"{max(each['queue_samples'] for each in seen):.0f}",
        "tracebacks and unexpected errors in the log": f"{len(strange)}",
    }
    for kind, code in sorted(ledger.codes):
        print(f"{kind + ' ' + code:44} {ledger.codes[kind, code]:10d}")
    for name in (
        "samples compared",
        "wrong samples",
        "swaps",
        "model changed under a worker",
        "model changed under a reader",
        "broken files refused",
        "kills while reading",
        "kills before reading",
        "bursts",
        "stops under short calls",
    ):
        print(f"{name:44} {events[name]:10d}")
    print(f"{'accepted and lost':44} {len(gone):10d}")
    for name, text in figures.items():
        print(f"{name:44} {text}")
    for problem, count in ledger.problems.most_common():
        print(f"WRONG, {count} times: {problem}")
    print("something is wrong" if ledger.problems else "nothing is wrong", flush=True)


if __name__ == "__main__":
    main()
