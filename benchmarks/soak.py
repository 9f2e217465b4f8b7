"""A server under load and faults for minutes: nothing wrong, nothing lost, nothing that grows.

python benchmarks/soak.py --minutes 10                     the embedded faces
python benchmarks/soak.py --minutes 10 --model mine.onnx   a small model makes far more requests of the same time

Workers compare every picture with those that an engine made beforehand. Meanwhile readers are killed, the model's file
is replaced by others of the same pictures and by broken ones, bursts fill the queue, and readers who read nothing hold
it. Then everything has to come to
rest, and a SIGTERM under load has to lose nothing; nor have those to other servers, under nothing but short calls. The
exit code is 1 if anything is not as it should be. MALLOC_ARENA_MAX and other variables reach the server.
"""

from __future__ import annotations

import csv
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np
from faults import SHARES, SLOWEST, Known, Soak, burst, hammer, ignore, kill, measured, swap, until, work
from ledger import lost

from serve import Bundle, Client, Engine, load
from serve.bundle import DEFAULT
from serve.noise import draw
from serve.server.models import Limits

LONGEST = 2000  # samples of a worker's stream, or what an engine makes in a second
HAMMERS = 8  # who make short calls while servers are stopped
SPARE = 16  # file descriptors and threads that may come and go
FAULTS = {
    "swap": "broken files refused",
    "burst": "bursts",
    "kill": "kills while reading",
    "ignore": "silent readers ended",
}  # and what shows that they came
EXPECTED = "refused "  # how the log begins where a broken file was seen

Fault = tuple[Any, ...]  # what to run, and its arguments after the soak


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
        known.append(Known(seed, start, temperature, noise, engine.decode(noise)))
    return known, Limits.of(engine.batch, int(np.prod(shape)))


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
        file = folder / "models" / "soak.onnx"
        file.write_bytes(bundle.data)
        room = SHARES * limits.chunk * limits.ahead
        words = [
            "--models",
            str(file.parent),
            "--watch",
            "0.5",
            "--metrics",
            "127.0.0.1:0",
            "--queue-samples",
            str(room),
            "--stall",
            "1",
        ]
        words += ["--listen", "127.0.0.1:0", "--device", "cpu", "--grace", "60", "--log-format", "json"]
        command = [sys.executable, "-c", "from serve.server.cli import main; main()", *words, "--log-requests"]
        process = subprocess.Popen(command, stderr=stack.enter_context(log.open("wb")))
        try:
            soak = Soak(bundle, known, file, *listening(process, log), newest=bundle.digest)
            clients = [stack.enter_context(Client(soak.address)) for _ in range(workers)]
            faults: list[Fault] = [(swap,), (burst,), (ignore,), *((kill, number) for number in range(killers))]
            faults = [fault for fault in faults if fault[0].__name__ not in without]
            tried = ["samples compared", *(event for fault, event in FAULTS.items() if fault not in without)]
            figures, seen = run(soak, process, clients, faults, tried, 60 * minutes)
        finally:
            process.kill()
            process.wait()
        file.write_bytes(bundle.data)
        logs = [log, *(log.with_name(f"{log.name}.{number}") for number in range(stops))]
        for each in logs[1:]:
            stop(soak, command, each)
        records, strange = parsed(logs)
        report(soak, figures, seen, records, strange, tried, growth if minutes >= 10 else math.inf)
    if series:
        with series.open("w", newline="") as sheet:
            table = csv.DictWriter(sheet, list(seen[0]))
            table.writeheader()
            table.writerows(seen)
    sys.exit(1 if soak.ledger.problems else 0)


def listening(process: subprocess.Popen[bytes], log: Path) -> tuple[str, str]:
    """Return the address of a server that is ready, and that of its metrics.

    Raises:
        click.ClickException: it ended.
    """
    ready: list[str] = []

    def look() -> bool:
        ready[:] = re.findall(r"ready, listening on ([\w.:]+)", log.read_text())
        return bool(ready) or process.poll() is not None

    if not until(look) or not ready:
        raise click.ClickException(f"the server should start. Received: {log.read_text()[-300:]}")
    (metrics,) = re.findall(r"metrics at ([\w.:/]+)", log.read_text())
    return ready[0], metrics


def run(
    soak: Soak,
    process: subprocess.Popen[bytes],
    clients: list[Client],
    faults: list[Fault],
    tried: list[str],
    seconds: float,
) -> tuple[dict[str, str], list[dict[str, float]]]:
    """Do everything, and return figures for the report and what was seen each second."""
    ledger = soak.ledger

    soak.go.set()
    working = [soak.start(work, client, number) for number, client in enumerate(clients)]
    faulty = [soak.start(*fault) for fault in faults]
    seen = watch(soak, process, seconds)
    until(lambda: all(ledger.events[event] for event in tried))  # however short it is, or slow the machine
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
            address, _ = listening(process, log)
            clients = [stack.enter_context(Client(address)) for _ in range(HAMMERS)]
            threads = [soak.start(hammer, client) for client in clients]
            time.sleep(random.uniform(0.3, 0.6))
            end(soak, process)
            soak.ledger.over.set()
            finish(soak, threads)
        finally:
            process.kill()
    soak.ledger.note("stops under short calls")


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
