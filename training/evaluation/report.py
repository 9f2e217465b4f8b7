"""Records as text: Markdown tables, padded so that they can be read in a terminal, with the protocol below."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from training.types import Record

Row = Sequence[str]

_COLUMNS = ("set", "prior", "latent normalisation", "KID", "precision", "recall", "copying", "samples")


def table(header: Row, rows: Iterable[Row]) -> str:
    """Return a Markdown table with its columns padded to one width."""
    rows = [header, *rows]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def report(name: str, records: list[Record], every_latent: bool = False) -> str:
    """Return the records of one measurement as Markdown: the results, the latents, and the protocol.

    Args:
        name: The name of the run or bundle.
        records: The records that `measure.evaluate` made.
        every_latent: Whether each latent gets a row.
    """
    figures = [record for record in records if "value" in record]
    header = [*_COLUMNS[:3], figures[0]["metric"], *_COLUMNS[3:]]
    parts = [f"## {name}", table(header, map(_row, figures))]
    for record in records:
        if record["metric"] == "latents":
            parts.append(latents(record))
            if every_latent:
                keys = list(record["per_latent"][0])
                rows = ([_cell(latent[key]) for key in keys] for latent in record["per_latent"])
                parts.append(table([key.replace("_", " ") for key in keys], rows))
    return "\n\n".join([*parts, protocol(figures[0])]) + "\n"


def _row(record: Record) -> Row:
    name = record["set"] + (f", epoch {record['epoch']}" if "epoch" in record else "")
    name += f", {record['decoder']}" if "decoder" in record else ""
    mode = record.get("normalisation", "-")
    if "latent_noise" in record:
        mode += f", noise {record['latent_noise']:.3f}"
    kid = f"{record['kid']:.5f} ± {record['kid_deviation']:.5f}" if "kid" in record else "-"
    shares = [f"{record[key]:.3f}" if key in record else "-" for key in ("precision", "recall")]
    shares.append(_copying(record))
    value = "-" if record["value"] is None else f"{record['value']:.4g}"
    return [name, record.get("prior", "-"), mode, value, kid, *shares, str(record["count"])]


def _copying(record: Record) -> str:
    """Return in how many pairs a picture is nearer than one that was held back, in features and in pixels."""
    if "copying" not in record:
        return "-"
    both = ((record[key], record[f"{key}_deviation"]) for key in ("copying", "copying_pixels"))
    return " / ".join(f"{share:.2f} ± {deviation:.2f}" for share, deviation in both)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def latents(record: Record) -> str:
    """Return a record of the latents in a sentence or two."""
    text = f"Reconstruction: mse {record['mse']:.5f} of {record['count']} pictures in [0, 1]. "
    if "variance_law" not in record:
        return text + (
            f"The first stage is deterministic: its {record['latents']} latents have no posterior variance, "
            "so none is inactive and there is no variance law."
        )
    return text + (
        f"Inactive: {record['inactive']} of {record['latents']} latents (mean posterior variance .8 or more; "
        f"{record['inactive_authors']} by the authors' code, which takes the deviation). "
        f"Variance law: {record['variance_law']:.4f} (with the deviation, as in that code: "
        f"{record['variance_law_authors']:.4f})."
    )


def protocol(record: Record) -> str:
    """Return one line that says how a record was measured."""
    extractor, reference = record["extractor"], record["reference"]
    parts = [
        f"Extractor {extractor['name']}: {extractor['features']} features, sha256 {extractor['digest'][:16]}, resize: "
        f"{extractor['resize']}.",
        f"Against {reference['count']} of {reference['of']} {reference['split']} pictures, {reference['read']}, digest "
        f"{reference['data'][:16]}.",
        f"Seed {record['seed']}.",
    ]
    if record["value"] is None:
        parts.append(f"No {record['metric']}: it takes more pictures than the extractor has features.")
    if "kid" in record:
        parts.append(f"KID: {record['kid_subsets']} subsets of {record['kid_subset']}.")
    if "neighbours" in record:
        parts.append(f"Precision and recall: {record['neighbours']} neighbours.")
    if "copying" in record:
        parts.append(
            "Copying, in features / in pixels: how likely a picture is nearer to one of these than a "
            f"{record['unseen']['split']} picture is, of {record['unseen']['count']}: .5 for new ones, 1 for copies."
        )
    return " ".join(parts)


def write(path: Path, text: str) -> None:
    """Write a text file, and make its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
