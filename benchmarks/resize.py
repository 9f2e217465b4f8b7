"""Figure 3 of the paper: what shrinking with nearest neighbours does to a face, beside bilinear.

python benchmarks/resize.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click
from PIL import Image, ImageDraw, ImageFont
from skimage import data

from training.data.images import box, to_array
from training.recipes import recipe

CROP = (0, 220, 110, 330)  # the face in scikit-image's astronaut: a public-domain portrait by NASA
SHOWN = 320  # pixels a panel
MARGIN = 8
TITLE = 22


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("docs/resize.png"), show_default=True)
def main(out: Path) -> None:
    """Draw the original, and what training sees of it at 64x64, every pixel as a square."""
    picture = Image.fromarray(data.astronaut())
    wanted = replace(recipe("celeba"), crop=CROP)
    panels = {f"original, {CROP[1]}x{CROP[1]}": picture.crop(box(*picture.size, wanted)).resize((SHOWN, SHOWN))}
    for method in ("nearest", "bilinear"):
        pixels = Image.fromarray(to_array(picture, replace(wanted, resize=method)))
        panels[f"64x64, {method}"] = pixels.resize((SHOWN, SHOWN), Image.Resampling.NEAREST)
    step = SHOWN + MARGIN
    sheet = Image.new("RGB", (step * len(panels) + MARGIN, SHOWN + TITLE + 2 * MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (title, panel) in enumerate(panels.items()):
        left = MARGIN + step * column
        pen.text((left, MARGIN), title, "black", ImageFont.load_default(14))
        sheet.paste(panel, (left, MARGIN + TITLE))
    sheet.save(out, optimize=True)
    click.echo(f"{out}: {sheet.width}x{sheet.height}, {out.stat().st_size // 1024} KB")


if __name__ == "__main__":
    main()
