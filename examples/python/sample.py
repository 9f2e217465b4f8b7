"""Sample a server's model three ways: at once, into one array on disk, and as files.

python sample.py 127.0.0.1:8470 out/
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from serve import Client, RemoteError


def main(address: str, out: Path, seed: int, start: int, count: int) -> None:
    """Write OUT/first.npy, OUT/samples.npy and a PNG a sample."""
    out.mkdir(parents=True, exist_ok=True)
    with Client(address) as client:
        model = client.model()  # client.model("faces") where the server has several

        # One call, one array. A call gives model.batch pictures at most.
        first = model.sample(seed, start, min(count, model.batch))
        np.save(out / "first.npy", first)

        # Any number, as they come. The array lies on disk, so it may be larger than memory; the server draws no
        # faster than this loop reads, and a connection that breaks is made again where it broke.
        shape = (count, *model.card.image_shape)
        samples = np.lib.format.open_memmap(out / "samples.npy", "w+", np.uint8, shape)
        for index, images in model.stream(seed, start, count):
            samples[index - start : index - start + len(images)] = images
        samples.flush()

        # Files, encoded by the server: there is nothing to do here but write them.
        for index, png in model.files(seed, start, count, encoding="png"):
            (out / f"{index:09d}.png").write_bytes(png)

        print(f"{model.name} version {model.version}: samples {start} to {start + count - 1} of seed {seed} in {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--start", type=int, default=100)
    parser.add_argument("--count", type=int, default=20)
    try:
        main(**vars(parser.parse_args()))
    except RemoteError as error:  # whatever a server can do wrong; its subclasses say what
        sys.exit(f"Error: {error}")
