"""The page of all measurements, docs/benchmarks.md, from what the benchmarks wrote with --json.

python benchmarks/render.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from measure import Row, Table

HEAD = """\
# Benchmarks

`make bench` measures all of this anew, `make bench-full` in more rounds, and `python benchmarks/render.py` makes this
page of what they wrote into `docs/benchmarks/`. Whatever stands in one table was measured in turns, once a round: a
figure is the median over the rounds, with the lowest and the highest behind it. A column that begins with / says how
many times the row of that name it is: the ratio is taken within each round, and is the median of these.
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
    parts += [f"Left out: {each}." for each in facts["left_out"]]
    return "\n" + "\n\n".join(parts) + "\n"


@click.command()
@click.option("--docs", type=click.Path(path_type=Path, exists=True), default=Path("docs"), show_default=True)
def main(docs: Path) -> None:
    """Write the page."""
    (docs / "benchmarks.md").write_text(page(docs / "benchmarks"))


if __name__ == "__main__":
    main()
