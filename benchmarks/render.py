"""The page of all measurements, docs/benchmarks.md, and others' tables, from what the benchmarks wrote.

python benchmarks/render.py
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import click
from measure import Row, Table

BEGIN, END = "<!-- by benchmarks/render.py -->", "<!-- to here -->"
MISSING = "not measured"
PLOTS = {"growth": "growth.png"}
HEAD = """\
# Benchmarks

`make bench` measures all of this anew, but what is called cluster, which `make bench-scale` does; `make bench-full`
takes more rounds. Each section names the command that measured it, and the machine, which is another one for what ends
in bfloat16. `python benchmarks/render.py`
makes this page of what they wrote into `docs/benchmarks/`. Whatever stands in one table was measured in turns, once a
round: a figure is the median over the rounds, with the lowest and the highest behind it. A column that begins with /
says how many times the row of that name it is: the ratio is taken within each round, and is the median of these.
"""


def page(folder: Path) -> str:
    """Return the page of a folder's JSON files, in the order of their names."""
    return HEAD + "".join(section(path.stem, json.loads(path.read_text())) for path in sorted(folder.glob("*.json")))


def section(name: str, facts: dict[str, Any]) -> str:
    """Return what one file says: a heading, a paragraph of how it was measured, and its tables."""
    here, versions = facts["machine"], facts["versions"]
    parts = [
        f"## {name}",
        facts["about"],
        f"By `{facts['command']}`, on {facts['date']}. The machine: {here['processor']}, cores: {here['cores']}, "
        f"instruction sets: {', '.join(here['sets']) or 'not known'}; {here['memory']} GB; load average of "
        f"{here['load']} beforehand; {here['system']}; "
        + ", ".join(f"{runtime} {version}" for runtime, version in {"Python": here["python"], **versions}.items())
        + ".",
    ]
    for each in facts["tables"]:
        table = Table(**{**each, "rows": [Row(**row) for row in each["rows"]]})
        rounds = max(len(row.values) for row in table.rows)
        how = f"medians of {rounds} interleaved rounds, with their range" if rounds > 1 else "measured once"
        parts += [f"{table.title}: {how}.", str(table)]
    parts += [f"![What {name} measured]({PLOTS[name]})"] if name in PLOTS else []
    parts += [f"Left out: {each}." for each in facts["left_out"]]
    return "\n" + "\n\n".join(parts) + "\n"


class Reports:
    """What a folder's JSON files say: each row is found by its report, and how its table and it are called first."""

    def __init__(self, folder: Path) -> None:
        self._found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}

    def row(self, report: str, title: str, name: str, unit: str = "images/s") -> Row | None:
        """Return a row; None where it was not measured, as torch where there is none."""
        tables = [each for each in self._found[report]["tables"] if each["title"].startswith(title)]
        rows = (row for each in tables for row in each["rows"] if row["name"].startswith(name) and row["unit"] == unit)
        return next((Row(**each) for each in rows), None)

    def figure(self, report: str, title: str, name: str, unit: str = "images/s") -> str:
        """Return a row's median, with its unit."""
        row = self.row(report, title, name, unit)
        if row is None:
            return MISSING
        value = statistics.median(row.values)
        return f"{value:,.0f} {unit}" if value >= 10 else f"{value:.2g} {unit}"

    def ratio(self, report: str, title: str, name: str, to: str, unit: str = "images/s") -> str:
        """Return how many times another row of the table a row is: the median over the rounds."""
        row, other = (self.row(report, title, each, unit) for each in (name, to))
        if row is None or other is None:
            return MISSING
        return f"{statistics.median(a / b for a, b in zip(row.values, other.values, strict=True)):.2f}"

    def titles(self, report: str) -> list[str]:
        """Return how a report's tables are called."""
        return [each["title"] for each in self._found[report]["tables"]]

    def device(self, report: str) -> str:
        """Return how a report's titles begin: the model, the device and the arithmetic."""
        title: str = self._found[report]["tables"][0]["title"]
        return title[: title.index("requests")]

    def place(self, report: str, name: str) -> str:
        """Return the device in a row's name, which has it behind the first comma."""
        names = (row["name"] for each in self._found[report]["tables"] for row in each["rows"])
        found: str = next(each for each in names if each.startswith(name))
        return found.split(", ")[1]

    def machine(self, report: str) -> str:
        """Return where a report was measured."""
        here = self._found[report]["machine"]
        return f"{here['cores']} cores of an {here['processor']} with {', '.join(here['sets'])}"


def figures(folder: Path) -> str:
    """Return the rows of README's table that are measured here."""
    told = Reports(folder)
    faces, celeba = "The chain of faces, 0.692 GFLOP a picture, in batches of 64", "The chain of celeba on cpu"
    naive, ours = "tf2onnx's graph, ONNX Runtime", "ours, fp32, cpu, exact"
    served = told.device("server")
    small, large = f"{served}requests of 16", f"{served}requests of 1000"
    place, behind = told.place("sample", "in process"), served.split(", ")[1]
    engine, trained = "engine in process", "Stage 1 of the recipe faces"
    measured = [
        (
            f"sampling in process, on {place}; through the server, one stream",
            f"{told.figure('sample', 'faces', 'in process')}; {told.figure('sample', 'faces', 'through')}",
            f"sample.py --device {place}",
        ),
        (
            "ONNX Runtime alone, in batches of 64 (of [int8](docs/faces.md#fp32-or-int8) it depends on the weights)",
            told.figure("sampling-faces", faces, ours),
            "sampling.py",
        ),
        (
            "the same, divided by tf2onnx's graph, by tf.function and by torch.compile",
            ", ".join(
                told.ratio("sampling-faces", faces, ours, each) for each in (naive, "tf.function", "torch.compile")
            ),
            "sampling.py",
        ),
        (
            "`sample-cli --n 1`, from its start to its end",
            told.figure("start", "From start to the first", "sample-cli --n 1, fp32, cpu", "s"),
            "start.py",
        ),
        (
            f"the server, divided by its engine in process on {behind}: 8 clients in requests for 16 pictures, 64 for "
            "1000",
            f"{told.ratio('server', small, 'serve-vae, 8', engine)}, "
            f"{told.ratio('server', large, 'serve-vae, 64', engine)}",
            f"server.py --device {behind}",
        ),
        (
            "the wire alone, with an engine that costs nothing",
            told.figure("server", f"{served}the wire", "raw, 8", "MB/s of pixels"),
            "server.py",
        ),
        (
            "pictures by URL, one a request, 64 clients, divided by gRPC's; 64 of another seed in a browser",
            f"{told.ratio('doors', 'faces, one picture', 'HTTP, PNG', 'gRPC, pixels')}; "
            f"{told.figure('doors', 'faces, 64 pictures', 'the gallery', 'ms')}",
            "doors.py",
        ),
        (
            "training stage 1, base_dim 16: ours on TensorFlow, and a loop written for torch",
            f"{told.figure('train', trained, 'ours, tensorflow, float32')}; "
            f"{told.figure('train', trained, 'a loop for torch, float32')}",
            "train.py",
        ),
        (
            "conversion of CelebA's chain, 50 million weights; by tf2onnx alone",
            f"{told.figure('exporter', 'The chain of celeba, conv', 'ours', 's')}; "
            f"{told.figure('exporter', 'The chain of celeba, conv', 'tf2onnx', 's')}",
            "exporter.py",
        ),
        (
            "the converted chain, divided by tf2onnx's graph: fp32, int8",
            f"{told.ratio('exporter', celeba, 'fp32', 'tf2onnx')}, {told.ratio('exporter', celeba, 'int8', 'tf2onnx')}",
            "exporter.py",
        ),
    ]
    rows = "".join(f"| {what} | {figure} | `benchmarks/{by}` |\n" for what, figure, by in measured)
    return f"On {told.machine('sample')}:\n\n| what | measured | by |\n|---|---|---|\n{rows}"


def costs(folder: Path) -> str:
    """Return the table of docs/scale.md: seconds of jobs, by how many samples they are and who makes them."""
    told = Reports(folder)
    lines = []
    for report in ("cluster", "cluster-small"):
        for title in told.titles(report):
            cells = [title.replace(" pictures of ", ", ")]
            for size in (1, 2):
                alone, ray = f"one process, threads: {size}", f"Ray, workers: {size}"
                cells += [told.figure(report, title, each, "s") for each in (alone, ray)]
                cells.append(told.ratio(report, title, ray, alone, "s"))
            lines.append(f"| {' | '.join(cells)} |\n")
    head = "| samples | 1 thread | Ray, 1 worker | ratio | 2 threads | Ray, 2 workers | ratio |\n" + "|---" * 7 + "|\n"
    return f"On {told.machine('cluster')}:\n\n{head}{''.join(lines)}"


def filled(text: str, figures: str) -> str:
    """Return a page with the figures that are measured here."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{figures}{END}{after}"


@click.command()
@click.option("--docs", type=click.Path(path_type=Path, exists=True), default=Path("docs"), show_default=True)
@click.option("--readme", "front", type=click.Path(path_type=Path, exists=True), default=Path("README.md"))
def main(docs: Path, front: Path) -> None:
    """Write the page, and the tables of README and docs/scale.md."""
    measured, scale = docs / "benchmarks", docs / "scale.md"
    (docs / "benchmarks.md").write_text(page(measured))
    front.write_text(filled(front.read_text(), figures(measured)))
    scale.write_text(filled(scale.read_text(), costs(measured)))


if __name__ == "__main__":
    main()
