"""What the benchmarks share: measuring in turns, the machine, and tables, the same on a terminal, in JSON and in docs.

A figure is the median over the rounds, beside the lowest and the highest. Ratios are taken within each round, as
whatever else the machine does slows a whole round, and then their median.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import click

RUNTIMES = ("numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorflow", "keras", "jax", "torch", "tf2onnx")
# What sets apart processors at multiplying floats and bytes, as Linux names it on x86 and on Arm.
SETS = {"avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"}
SETS |= {"asimddp", "i8mm", "bf16", "sve"}

BUSY = os.getloadavg()[0]  # how many others want a core, before this begins

Key = TypeVar("Key", bound=Hashable)

json_option = click.option("--json", "report", type=click.Path(path_type=Path), help="Write the figures there as well.")


@dataclass(frozen=True)
class Row:
    """What was measured of one thing.

    Attributes:
        name: The thing.
        unit: Of the values.
        values: One a round.
    """

    name: str
    unit: str
    values: Sequence[float]


@dataclass(frozen=True)
class Table:
    """Things that were measured in the same rounds.

    Attributes:
        title: What is compared: the beginning of a sentence.
        rows: The things.
        against: Names of rows; those of the same unit are divided by them.
    """

    title: str
    rows: Sequence[Row]
    against: Sequence[str] = ()

    def __str__(self) -> str:
        """The table in Markdown, in columns."""
        lines = [["", "median (lowest to highest)", *(f"/ {name}" for name in self.against)]]
        lines += [[row.name, _figure(row), *(self._ratio(row, name) for name in self.against)] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, ["-" * width for width in widths])
        padded = ([text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in lines)
        return "\n".join(f"| {' | '.join(line)} |" for line in padded)

    def show(self) -> None:
        """Print the table."""
        print(f"\n{self.title}\n\n{self}", flush=True)

    def _ratio(self, row: Row, name: str) -> str:
        found = [each for each in self.rows if (each.name, each.unit) == (name, row.unit)]
        if not found:
            return ""
        ratio = statistics.median(a / b for a, b in zip(row.values, found[0].values, strict=True))
        return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"


def interleave(work: Mapping[Key, Callable[[], float]], rounds: int, *, warm: bool = True) -> dict[Key, list[float]]:
    """Measure everything once a round, in turns; return the values by what was measured.

    Args:
        work: Measures one thing once.
        rounds: How many.
        warm: Whether to begin with a round that does not count.
    """
    values: dict[Key, list[float]] = {key: [] for key in work}
    for turn in range(0 if warm else 1, rounds + 1):
        for key, measure in work.items():
            value = measure()
            if turn:
                values[key].append(value)
    return values


def speed(run: Callable[[], object], count: int, least: float = 0.0) -> float:
    """Return how many a second there are, where a run makes `count`; it runs again for as many seconds as `least`."""
    began, made = time.perf_counter(), 0
    while not made or time.perf_counter() - began < least:
        run()
        made += count
    return made / (time.perf_counter() - began)


def finish(
    report: Path | None,
    about: str,
    tables: Sequence[Table],
    left_out: Sequence[str] = (),
    versions: Mapping[str, str] | None = None,
) -> None:
    """Print what was left out, and write what `render.py` makes a page of, if that is wanted.

    Args:
        report: The file; None for none.
        about: The benchmark's docstring, of which all but the commands is kept.
        tables: What it measured.
        left_out: What it did not measure, and why.
        versions: Of runtimes that are not installed here, but took part.
    """
    for each in left_out:
        print(f"left out: {each}", flush=True)
    if report is None:
        return
    paragraphs = [each for each in about.strip().split("\n\n") if not re.match(r"\s|python ", each)]
    facts = {
        "about": "\n\n".join(paragraphs),
        "command": command(),
        "date": date.today().isoformat(),
        "machine": machine(),
        "versions": installed() | dict(versions or {}),
        "tables": [asdict(table) for table in tables],
        "left_out": list(left_out),
    }
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(json.dumps(facts, indent=1) + "\n")


def command() -> str:
    """Return this process' command as typed; of an absolute path, which is this machine's own, the last name."""
    words = ["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    return shlex.join(Path(word).name if word.startswith("/") else word for word in words)


def machine() -> dict[str, Any]:
    """Return what there is to know of this machine, JSON-ready: memory in GB, and the load average before."""
    cpuinfo = Path("/proc/cpuinfo")  # Linux' alone
    said = cpuinfo.read_text() if cpuinfo.exists() else ""
    model = re.search(r"^model name\s*: (.*)$", said, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.*)$", said, re.MULTILINE)
    return {
        "processor": model[1] if model else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "sets": sorted(SETS & set(flags[1].split())) if flags else [],
        "memory": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        "load": round(BUSY, 1),
    }


def trainer() -> str:
    """Return what Keras trains on here: the GPU's name, or the processor's."""
    from training.backend import NVIDIA_DRIVER

    here = machine()
    processor = f"{here['cores']} core{'s' if here['cores'] > 1 else ''} of an {here['processor']}"
    if not NVIDIA_DRIVER.exists():
        return processor
    # Another process asks, as the backend would keep most of the GPU's memory.
    words = ["-c", "import training.model, keras; print('gpus', len(keras.distribution.list_devices('gpu')))"]
    asked = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    if "gpus 0" in asked.stdout or asked.returncode:
        return processor
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "an NVIDIA GPU"


def installed() -> dict[str, str]:
    """Return the versions of the runtimes that are installed here."""
    found = {}
    for name in RUNTIMES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _figure(row: Row) -> str:
    middle = f"{_text(statistics.median(row.values))} {row.unit}"
    return middle if len(row.values) == 1 else f"{middle} ({_text(min(row.values))} to {_text(max(row.values))})"


def _text(value: float) -> str:
    return (
        f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.1f}" if value >= 10 else f"{value:.3g}"
    )
