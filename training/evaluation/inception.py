"""The Inception network of 2015: a Frechet distance of its features, and of no others, is called FID.

The protocol is that of the papers: TensorFlow's frozen graph, pictures resized bilinearly to 299x299 as
TensorFlow 1 did (corners not aligned, pixels at their corners), (x - 128) / 128 fed at Mul:0, the 2048 values of
pool_3:0 taken. This is the only module of evaluation that loads TensorFlow, and only when it is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from training.errors import DataError
from training.evaluation.extractors import Extractor
from training.types import UInt8Array

ARCHIVE = "https://download.tensorflow.org/models/image/imagenet/inception-2015-12-05.tgz"
INPUT, OUTPUT = "Mul:0", "pool_3:0"
SIDE = 299


class Inception(Extractor):
    """classify_image_graph_def.pb: uint8 [n, h, w, 3] -> float32 [n, 2048].

    Raises:
        DataError: the file is missing or is another graph, or TensorFlow is not installed.
    """

    @classmethod
    def hint(cls) -> str:
        return (
            f"; download {ARCHIVE} and pass its classify_image_graph_def.pb "
            "(it is not fetched for you: TensorFlow publishes no checksum to hold it to)"
        )

    def open(self, data: bytes, path: Path, side: int) -> None:
        self.metric = "FID"
        self.resize = f"bilinear to {SIDE}x{SIDE} as in TensorFlow 1, (x - 128) / 128"
        try:
            import tensorflow as tf
        except ImportError:
            raise DataError("--inception runs on TensorFlow: pip install '.[train]' in the checkout") from None

        graph = tf.compat.v1.GraphDef()

        def features(images: Any) -> Any:
            resized = tf.compat.v1.image.resize_bilinear(tf.cast(images, tf.float32), [SIDE, SIDE])
            fed = {INPUT: (resized - 128.0) / 128.0}
            (pooled,) = tf.import_graph_def(graph, input_map=fed, return_elements=[OUTPUT])
            return pooled

        try:
            graph.ParseFromString(data)
            signature = [tf.TensorSpec([None, side, side, 3], tf.uint8)]
            self.function = tf.compat.v1.wrap_function(features, signature)
            pooled = self.function(tf.zeros([2, side, side, 3], tf.uint8))
        except Exception as error:  # protobuf and TensorFlow each have several for a broken or another graph
            reason = str(error).strip().splitlines()[0]
            raise DataError(f"{path} is not the Inception graph of 2015: {reason}{self.hint()}") from None
        if tuple(pooled.shape[:-1]) != (2, 1, 1):
            raise DataError(
                f"{path} is not the Inception graph of 2015: {OUTPUT} should be [n, 1, 1, 2048]. "
                f"Received: {list(pooled.shape)}{self.hint()}"
            )
        self.size = int(pooled.shape[-1])

    def run(self, images: UInt8Array) -> Any:
        return np.asarray(self.function(images))[:, 0, 0]
