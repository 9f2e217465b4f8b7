"""What files cost: encoders one by one, and folders of samples in each format beside npy.

    python benchmarks/encode.py                  the embedded faces
    python benchmarks/encode.py --count 2000     longer, for steadier folders

An encoder's microseconds are processor time for a picture, and its bytes a file's, on average. "Rows alone" are other
compressors of the very bytes that PNG's filter leaves here.
"""

from __future__ import annotations

import io
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from measure import Row, Table, finish, interleave, json_option

from serve import png
from serve.bulk.job import ARRAYS, FORMATS, make
from serve.bulk.run import complete, held
from serve.bulk.store import open_store
from serve.bundle import DEFAULT, load
from serve.encoding import FORMATS as ENCODINGS
from serve.encoding import PILLOW, encode, picture
from serve.engine import Engine
from serve.model import Images

Encoder = Callable[[Images], bytes]
# What Pillow can be told. Level 4 was this project's PNG, and method 2 its WebP.
TOLD: dict[str, dict[str, Any]] = {
    "png, Pillow, level 4": {"format": "PNG", "compress_level": 4},
    "png, Pillow, level 1": {"format": "PNG", "compress_level": 1},
    "png, Pillow, runs only": {"format": "PNG", "compress_type": zlib.Z_RLE},
    **{
        f"webp, method {method}, effort {effort}": {**PILLOW["webp"], "method": method, "quality": effort}
        for method, effort in ((2, 80), (2, 0), (1, 80), (0, 80))
    },
}
# Other compressors of what serve.png compresses: those that are installed are tried.
COMPRESSORS: dict[str, tuple[str, str, dict[str, int]]] = {
    "zlib, level 1": ("zlib", "compress", {"level": 1}),
    "zlib, level 6": ("zlib", "compress", {"level": 6}),
    "isal, level 1": ("isal.isal_zlib", "compress", {"level": 1}),
    "zlib-ng, level 2": ("zlib_ng.zlib_ng", "compress", {"level": 2}),
    "libdeflate, level 1": ("deflate", "zlib_compress", {"compresslevel": 1}),
}


@click.command()
@click.option("--model", type=click.Path(path_type=Path), default=DEFAULT)
@click.option("--device", default="auto")
@click.option("--pictures", default=256, show_default=True, help="Pictures that each encoder gets in a round.")
@click.option("--count", default=512, show_default=True, help="Samples in a folder.")
@click.option("--rounds", default=9, show_default=True)
@json_option
def main(model: Path, device: str, pictures: int, count: int, rounds: int, report: Path | None) -> None:
    """Print processor time and bytes a picture, and images a second."""
    engine = Engine(load(model), device)
    images = list(engine.sample(0, 0, pictures))
    encoders: dict[str, Encoder] = {f"{kind}, as it is": partial(encode, kind=kind) for kind in ENCODINGS}
    encoders |= {name: partial(_pillow, told=told) for name, told in TOLD.items()}
    measured = {name: [partial(encoder, image) for image in images] for name, encoder in encoders.items()}
    filtered = [zlib.decompress(_compressed(png.write(image))) for image in images]
    compressors: dict[str, Callable[[bytes], bytes]] = {"zlib, runs only": _runs_only}
    for name, (module, function, level) in COMPRESSORS.items():
        if find_spec(module.partition(".")[0]):
            compressors[name] = partial(getattr(import_module(module), function), **level)
    measured |= {f"rows alone, {name}": [partial(run, row) for row in filtered] for name, run in compressors.items()}
    sizes = {name: sum(len(call()) for call in calls) / pictures for name, calls in measured.items()}
    costs = interleave({name: partial(_cost, calls) for name, calls in measured.items()}, rounds, warm=False)
    shape = " x ".join(map(str, images[0].shape))
    title = f"Encoding {pictures} pictures of {engine.name}, {shape}"
    rows = [Row(f"{name}: {sizes[name]:,.0f} bytes", "us", values) for name, values in costs.items()]
    kinds = sorted(FORMATS, key=lambda kind: kind != ARRAYS)  # that is what the others are compared with
    folders = {kind: partial(_folder, engine, kind, count) for kind in kinds}
    rates = interleave(folders, rounds, warm=False)
    tables = [
        Table(title, rows, [rows[0].name]),
        Table(
            f"Folders of {count} samples, made on {engine.device}",
            [Row(kind, "images/s", values) for kind, values in rates.items()],
            [ARRAYS],
        ),
    ]
    for table in tables:
        table.show()
    finish(report, __doc__, tables)


def _cost(calls: Sequence[Callable[[], bytes]]) -> float:
    """Return the microseconds of processor time that one of these takes on average."""
    began = time.process_time()
    for call in calls:
        call()
    return (time.process_time() - began) / len(calls) * 1e6


def _folder(engine: Engine, kind: str, count: int) -> float:
    """Return how many images a second sample-cli makes, files and all."""
    job = make(engine.name, engine.digest, engine.arithmetic, count=count, kind=kind)
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(folder)
        with held(job, store) as kept:
            began = time.perf_counter()
            complete(kept, engine, store)
            return count / (time.perf_counter() - began)


def _pillow(image: Images, told: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    picture(image).save(file, **told)
    return file.getvalue()


def _compressed(file: bytes) -> bytes:
    """Return what is compressed in a file of serve.png's: it has one such chunk, the last but the end."""
    at = file.index(b"IDAT")
    return file[at + 4 : at + 4 + int.from_bytes(file[at - 4 : at])]


def _runs_only(row: bytes) -> bytes:
    packer = zlib.compressobj(strategy=zlib.Z_RLE)
    return packer.compress(row) + packer.flush()


if __name__ == "__main__":
    main()
