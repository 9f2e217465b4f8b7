"""What is in a file: batches of images are encoded one by one, and joined to one file in memory.

Two files of one range are the same bytes: nothing of the time, the machine or the order of work is in them.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from serve.bulk.job import ARRAYS, PARQUET, File, Job
from serve.encoding import ENDINGS, encode
from serve.errors import JobError
from serve.model import Images

Part = list[bytes] | Images  # a batch: each picture encoded, or the images as they are

END_OF_TAR = bytes(2 * tarfile.BLOCKSIZE)
ROWS = 1000  # of a group in Parquet: as many as its readers take at a time
# What the library `datasets` reads the columns' types from.
FEATURES = {
    "index": {"dtype": "int64", "_type": "Value"},
    "seed": {"dtype": "uint64", "_type": "Value"},
    "image": {"_type": "Image"},
}


def encoded(job: Job, images: Images) -> Part:
    """Return a batch as the job's files hold it."""
    return images if job.format == ARRAYS else [encode(image, job.encoding) for image in images]


def joined(job: Job, file: File, parts: Sequence[Part]) -> bytes:
    """Return a file of batches.

    Raises:
        JobError: a library for it is not installed.
    """
    if job.format in ENDINGS:
        ((picture,),) = parts
        return bytes(picture)
    if job.format == ARRAYS:
        array = io.BytesIO()
        np.save(array, np.concatenate([np.asarray(part) for part in parts]))
        return array.getvalue()
    pictures = [bytes(picture) for part in parts for picture in part]
    return _parquet(job, file, pictures) if job.format == PARQUET else tar(job, file.first, pictures) + END_OF_TAR


def tar(job: Job, first: int, pictures: Sequence[bytes]) -> bytes:
    """Return encoded pictures as members of a tar archive, without its end."""
    parts = []
    for index, picture in enumerate(pictures, first):
        member = tarfile.TarInfo(f"{index:012d}{ENDINGS[job.encoding]}")
        member.size, member.mode = len(picture), 0o644
        parts += [member.tobuf(tarfile.USTAR_FORMAT), picture, bytes(-len(picture) % tarfile.BLOCKSIZE)]
    return b"".join(parts)


def whole(job: Job, file: File, shape: tuple[int, int, int], data: bytes) -> bool:
    """Tell whether a shard's bytes are all there, by its ends and its number of samples. Pictures are not decoded.

    Args:
        job: The job.
        file: One of its shards.
        shape: Of one image.
        data: What lies there.
    """
    if job.format == ARRAYS:
        header = io.BytesIO()
        facts = {"descr": "|u1", "fortran_order": False, "shape": (file.count, *shape)}
        np.lib.format.write_array_header_1_0(header, facts)
        begin = header.getvalue()
        return data.startswith(begin) and len(data) == len(begin) + file.count * math.prod(shape)
    try:
        if job.format == PARQUET:
            return bool(_pyarrow().parquet.ParquetFile(io.BytesIO(data)).metadata.num_rows == file.count)
        with tarfile.open(fileobj=io.BytesIO(data)) as opened:
            members = sum(1 for _ in opened)
        return members == file.count and len(data) % tarfile.BLOCKSIZE == 0 and data.endswith(END_OF_TAR)
    except JobError:
        raise
    except Exception:  # whatever damaged bytes make the parsers raise
        return False


def images(job: Job, data: bytes) -> Images:
    """Return what a file holds, decoded: uint8 [n, height, width, channels].

    Raises:
        JobError: it is damaged.
    """
    try:
        if job.format == ARRAYS:
            return _array(data)
        if job.format in ENDINGS:
            pictures = [data]
        elif job.format == PARQUET:
            column = _pyarrow().parquet.read_table(io.BytesIO(data), columns=["image"])["image"]
            pictures = [each["bytes"] for each in column.to_pylist()]
        else:
            with tarfile.open(fileobj=io.BytesIO(data)) as opened:
                members = [opened.extractfile(member) for member in opened]
                pictures = [member.read() for member in members if member]
        from PIL import Image

        decoded = np.stack([np.asarray(Image.open(io.BytesIO(picture))) for picture in pictures])
        return decoded if decoded.ndim == 4 else decoded[..., None]
    except JobError:
        raise
    except Exception:  # whatever damaged bytes make the parsers raise
        raise JobError("it is damaged") from None


def check_installed(job: Job) -> None:
    """Raise JobError where the job's format takes a library that is not installed."""
    if job.format == PARQUET:
        _pyarrow()


def _array(data: bytes) -> Images:
    array: Images = np.load(io.BytesIO(data), allow_pickle=False)
    if array.dtype != np.uint8 or array.ndim != 4:
        raise ValueError("these are no images")
    return array


def _parquet(job: Job, file: File, pictures: Sequence[bytes]) -> bytes:
    pa = _pyarrow()
    names = [f"{index:012d}{ENDINGS[job.encoding]}" for index in range(file.first, file.first + file.count)]
    image = pa.StructArray.from_arrays(
        [pa.array(pictures, pa.binary()), pa.array(names, pa.string())], names=["bytes", "path"]
    )
    columns = {
        "index": pa.array(range(file.first, file.first + file.count), pa.int64()),
        "seed": pa.array([job.seed] * file.count, pa.uint64()),
        "image": image,
    }
    features = json.dumps({"info": {"features": FEATURES}})
    table = pa.table(columns).replace_schema_metadata({"huggingface": features})
    written = io.BytesIO()
    # Pictures are compressed already; of the rest there is little.
    pa.parquet.write_table(table, written, compression="none", row_group_size=ROWS)
    return written.getvalue()


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise JobError("Parquet takes pip install '.[bulk]' in the checkout, or pyarrow") from None
    return pyarrow
