"""A feature extractor for evaluate-vae: MobileNetV2, which Keras has trained on ImageNet, as an ONNX model.

    python examples/extractor.py mobilenet-v2.onnx
    evaluate-vae runs/mine --data photos/ --features mobilenet-v2.onnx

It takes the extra `export`. Keras downloads the weights, 9 MB; `--weights FILE` takes them from a file. Any network
makes an extractor, and distances by one are not those by another.
"""

import os
from pathlib import Path

import click

SIDE = 224  # pixels that the network was trained on


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--weights", default="imagenet", show_default=True, help="imagenet; none, to try it; or a file.")
def main(out: Path, weights: str) -> None:
    """Write the extractor to OUT."""
    os.environ["KERAS_BACKEND"] = "tensorflow"  # whose graphs become ONNX
    from keras import Input, Model, applications, layers, ops

    images = Input((None, None, 3), dtype="uint8", name="images")
    pixels = layers.Rescaling(1 / 127.5, -1)(ops.cast(images, "float32"))  # from -1 to 1, as the network takes them
    network = applications.MobileNetV2(
        input_shape=(SIDE, SIDE, 3),
        include_top=False,
        pooling="avg",
        weights=None if weights == "none" else weights,
    )
    model = Model(images, network(layers.Resizing(SIDE, SIDE)(pixels), training=False))
    model(ops.zeros((1, SIDE, SIDE, 3), "uint8"))  # Keras exports what was called
    model.export(out, format="onnx")


if __name__ == "__main__":
    main()
