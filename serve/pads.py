"""Transposed convolutions as an NVIDIA GPU takes them.

One that doubles the size of a picture crops one end of each axis more than the other. cuDNN crops both alike, so ONNX
Runtime's CUDA provider leaves such a layer to the CPU. The files stay as they are, which CPUs run fastest; the graph is
changed as it is loaded for a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

from serve.graph import INT64
from serve.stubs.onnx.v1 import model_pb2 as onnx

FAR = 2**63 - 1  # where a Slice ends that takes all there is


def symmetric(data: bytes) -> bytes:
    """Return a checked model file in which each transposed convolution crops both ends of an axis alike.

    A Slice behind it takes off the rest. No weight is touched, so it does not matter how they are stored, and sums are
    what they were, to the bit.
    """
    model = onnx.Model.FromString(data)
    graph = model.graph
    nodes = [each for node in graph.node for each in _split(node, graph)]
    del graph.node[:]
    graph.node.extend(nodes)
    return model.SerializeToString()


def _split(node: onnx.Node, graph: onnx.Graph) -> Iterator[onnx.Node]:
    """Yield a node, and the Slice that takes off what it no longer does."""
    yield node
    attributes = {each.name: each for each in node.attribute}
    pads = attributes.get("pads", onnx.Attribute()).ints
    begins, ends = list(pads[: len(pads) // 2]), list(pads[len(pads) // 2 :])
    derived = "output_shape" in attributes or attributes.get("auto_pad", onnx.Attribute(s=b"NOTSET")).s != b"NOTSET"
    if node.op_type != "ConvTranspose" or begins == ends or derived:  # derived from sizes, pads are not read
        return
    alike = list(map(min, begins, ends))
    pads[:] = alike + alike
    name = node.output[0]
    node.output[0] = f"{name}/uncropped"
    crop = {
        "starts": [begin - least for begin, least in zip(begins, alike, strict=True)],
        "ends": [least - end or FAR for end, least in zip(ends, alike, strict=True)],
        "axes": list(range(2, 2 + len(alike))),
    }
    inputs = [node.output[0]]
    for what, numbers in crop.items():
        inputs.append(f"{name}/crop/{what}")
        raw = b"".join(number.to_bytes(8, "little", signed=True) for number in numbers)
        graph.initializer.add(name=inputs[-1], data_type=INT64, dims=[len(numbers)], raw_data=raw)
    yield onnx.Node(op_type="Slice", name=f"{node.name}/crop", input=inputs, output=[name])
