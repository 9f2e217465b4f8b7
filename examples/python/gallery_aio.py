"""Ask for several seeds at once with asyncio, and lay them out as a sheet: a row a seed.

python gallery_aio.py 127.0.0.1:8470 out/ 1 2 3
"""

import argparse
import asyncio
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from serve import AsyncClient, RemoteError

COLUMNS = 8


async def main(address: str, out: Path, seeds: list[int]) -> None:
    """Write OUT/gallery.png."""
    async with AsyncClient(address) as client:
        model = await client.model()
        # All requests are under way together, on one connection; the server computes them in shared batches. A seed's
        # pictures are the same whoever shares the batch.
        rows = await asyncio.gather(*(model.sample(seed, start=0, count=COLUMNS) for seed in seeds))
    # Each row is [columns, height, width, channels]: pictures side by side, then rows below each other.
    sheet = np.vstack([np.hstack(list(row)) for row in rows])
    out.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet[..., 0] if sheet.shape[-1] == 1 else sheet).save(out / "gallery.png")
    print(f"{len(seeds)} seeds of {model.name} in {out / 'gallery.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("out", type=Path)
    parser.add_argument("seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4, 5])
    try:
        asyncio.run(main(**vars(parser.parse_args())))
    except RemoteError as error:
        sys.exit(f"Error: {error}")
