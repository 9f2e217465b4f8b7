"""int8: convolutions and dense layers on 8-bit weights and activations, written as QDQ pairs.

Static: ranges come from contract noise, so no picture is needed. Weights are symmetric, by output channel, and
use 7 of their 8 bits: x86 processors without VNNI add two products in 16 bits, which 8-bit weights overflow, and
a sample must not depend on the processor.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from export.passes.blocks import EVEN, ODD, norm_to_conv, split_rows
from export.passes.graph import Array, add, bypass, constant, noise_size, only_reader, replace, weight
from export.session import open_model
from serve.noise import draw

LEVELS, STEPS = 255, 63  # of an activation above its least, uint8; of a weight on either side of zero, int8
ALL_STEPS = 127  # of a weight that is only kept in bytes
LAYERS = ("Conv", "ConvTranspose", "Gemm", "BatchNormalization")
CHANNELS = {"Conv": 0, "Gemm": 1}  # what can be int8, and the weight's axis of output channels
KERNELS = CHANNELS | {"ConvTranspose": 1}
SMALLEST = 100_000  # values; rounding a smaller weight costs more than it spares
MOVES = ("Transpose", "Reshape", "Concat")  # these move 8-bit values without computing
CALIBRATION, BATCH = 256, 8  # samples of contract noise that ranges come from, and how many at a time
KEPT = 10_000  # values kept of each activation and batch
CLIPS = np.linspace(0.3, 1.0, 15)  # of the least and of the greatest value seen
SEED = 2**63  # of the noise for calibration and choices; far from the seeds that people use

Ranges = dict[str, tuple[float, float]]


def candidates(graph: ir.Graph) -> list[ir.Node]:
    """Return the layers that can compute in int8, in order.

    The last convolution is not among them: where the sigmoid is steepest, 8-bit inputs are whole grey levels apart.
    """
    layers = [node for node in graph if node.op_type in LAYERS and constant(node.inputs[1]) is not None]
    return layers[:-1]


def calibrate(model: ir.Model) -> Ranges:
    """Return the (least, greatest) value that 8 bits should stand for, of every float value, by its name.

    The pair has the least squared error over the activations of contract noise. Extremes are rare, and would make every
    step coarse. Memory is that of one small batch.
    """
    watched = model.clone()
    graph = watched.graph
    values = [*graph.inputs, *(node.outputs[0] for node in graph)]
    names = [str(value.name) for value in values if value.dtype == ir.DataType.FLOAT]
    graph.outputs.clear()
    graph.outputs.extend(value for value in values if value.name in names and not value.is_graph_input())
    session = open_model(watched)
    noise = draw(SEED, 0, CALIBRATION, noise_size(model.graph))
    rng = np.random.default_rng(0)
    kept: dict[str, list[Array]] = {name: [] for name in names}
    for at in range(0, CALIBRATION, BATCH):
        batch = noise[at : at + BATCH]
        arrays = [batch, *session.run(None, {"noise": batch})]
        for name, array in zip(names, arrays, strict=True):
            some = rng.choice(array.ravel(), min(KEPT, array.size), replace=False, shuffle=False)
            kept[name].append(np.concatenate([some, [array.min(), array.max()]]))
    return {name: _clips(np.concatenate(arrays)) for name, arrays in kept.items()}


def _clips(values: Array) -> tuple[float, float]:
    """Return the (least, greatest), zero among them, that 256 levels between round some values best."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    pairs = {(low * one, high * other) for one in CLIPS for other in CLIPS}

    def error(pair: tuple[float, float]) -> float:
        step, zero = _levels(*pair)
        rounded = (np.clip(np.rint(values / step) + zero, 0, LEVELS) - zero) * step
        return float(np.square(rounded - values).mean())

    return min(sorted(pairs), key=error)


def _levels(low: float, high: float) -> tuple[np.float32, int]:
    """Return (step, zero) of uint8 between two values: real = (uint8 - zero) * step. Zero is exact: padding is."""
    step = np.float32(max(high - low, 1e-9) / LEVELS)
    return step, round(-low / float(step))


def quantise(model: ir.Model, ranges: Ranges, layers: Collection[str]) -> ir.Model:
    """Return a copy of a model in which some layers compute in int8, and all large weights are kept in 8 bits.

    Weights of layers that stay float are widened as the graph is loaded.

    Args:
        model: float32, optimised.
        ranges: Of its values.
        layers: Names of the layers, of `candidates`.
    """
    copy = model.clone()
    split_rows(copy.graph, layers)
    norm_to_conv(copy.graph, layers)
    quantiser = _Quantiser(copy.graph, ranges)
    for node in list(copy.graph):
        if node.op_type in CHANNELS and str(node.name).removesuffix(EVEN).removesuffix(ODD) in layers:
            quantiser.layer(node)
        elif node.op_type in KERNELS:
            _keep_in_bytes(copy.graph, node)
    _move_bytes(copy.graph)
    RemoveUnusedNodesPass()(copy)
    return copy


class _Quantiser:
    def __init__(self, graph: ir.Graph, ranges: Ranges) -> None:
        self.graph, self.ranges = graph, ranges
        self.scales: dict[str, tuple[ir.Value, ir.Value]] = {}
        self.rounded: dict[ir.Value, ir.Value] = {}

    def layer(self, node: ir.Node) -> None:
        """Put a layer's input, weights, bias, and a convolution's output through 8 bits."""
        source, kernel = node.inputs[0], constant(node.inputs[1])
        assert source is not None
        assert kernel is not None
        rounded = self.value(source)
        axis = CHANNELS[node.op_type]
        levels, steps = _by_channel(kernel, axis, STEPS)
        node.replace_input_with(0, rounded)
        node.replace_input_with(1, self._weights(node, levels, steps, "weight", axis))
        bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        if bias is not None:
            step = constant(self._scale(source)[0])
            assert step is not None
            products = (steps * step).astype(np.float32)
            sums = np.rint(bias / products).clip(-(2**31), 2**31 - 1).astype(np.int32)
            node.replace_input_with(2, self._weights(node, sums, products, "bias", 0))
        # Runtimes have int8 convolutions only from 8 bits to 8 bits; the same holds for dense layers with a ReLU.
        below = only_reader(node.outputs[0])
        activated = below is not None and below.op_type == "Relu"
        if activated or node.op_type == "Conv":
            end = below.outputs[0] if below is not None and activated else node.outputs[0]
            readers = list(end.uses())
            rounded = self.value(end)
            for reader, index in readers:
                reader.replace_input_with(index, rounded)

    def value(self, value: ir.Value) -> ir.Value:
        """Return a value as 8 bits have it, in float32."""
        maker = value.producer()
        if maker is not None and maker.op_type == "DequantizeLinear":
            return value
        if value not in self.rounded:
            step, zero = self._scale(value)
            small = ir.node("QuantizeLinear", [value, step, zero], name=f"{value.name}/quantise")
            wide = ir.node("DequantizeLinear", [small.outputs[0], step, zero], name=f"{value.name}/dequantise")
            small.outputs[0].name, wide.outputs[0].name = f"{value.name}/bytes", f"{value.name}/rounded"
            wide.outputs[0].type, wide.outputs[0].shape = value.type, value.shape
            if maker is None:
                self.graph.insert_before(self.graph[0], [small, wide])
            else:
                self.graph.insert_after(maker, [small, wide])
            self.rounded[value] = wide.outputs[0]
        return self.rounded[value]

    def _scale(self, value: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return the (step, zero) of a value: of where it ends, if it is only moved about before it is read."""
        maker = value.producer()
        if maker is not None and maker.op_type == "DequantizeLinear":
            _, step, zero = maker.inputs
            assert step is not None
            assert zero is not None
            return step, zero
        reader = only_reader(value)
        # What a ReLU gives has a scale of its own: runtimes drop a ReLU where 0 is its scale's least.
        rectified = maker is not None and maker.op_type == "Relu"
        while not rectified and reader is not None and reader.op_type in MOVES:
            value = reader.outputs[0]
            reader = only_reader(value)
        name = str(value.name)
        if name not in self.scales:
            size, least = _levels(*self.ranges[name])
            self.scales[name] = (
                weight(self.graph, np.array(size), f"{name}/step"),
                weight(self.graph, np.array(least, np.uint8), f"{name}/zero"),
            )
        return self.scales[name]

    def _weights(self, node: ir.Node, levels: Array, steps: Array, name: str, axis: int) -> ir.Value:
        inputs = [
            weight(self.graph, levels, f"{node.name}/{name}"),
            weight(self.graph, steps, f"{node.name}/{name}_steps"),
            weight(self.graph, np.zeros(steps.shape, levels.dtype), f"{node.name}/{name}_zeros"),
        ]
        wide = ir.node("DequantizeLinear", inputs, {"axis": axis}, name=f"{node.name}/{name}/dequantise")
        wide.outputs[0].name = f"{node.name}/{name}/rounded"
        self.graph.insert_before(node, wide)
        return wide.outputs[0]


def _by_channel(kernel: Array, axis: int, most: int) -> tuple[Array, Array]:
    """Return (levels int8, steps float32 [channels]) of a weight, `most` levels on either side of zero."""
    others = tuple(each for each in range(kernel.ndim) if each != axis)
    steps = (np.maximum(np.abs(kernel).max(axis=others), 1e-12) / most).astype(np.float32)
    return np.rint(kernel / np.expand_dims(steps, others)).astype(np.int8), steps


def _keep_in_bytes(graph: ir.Graph, node: ir.Node) -> None:
    """Keep a float layer's weight as int8. The Cast and the Mul are constants, which runtimes compute as they load."""
    kernel = constant(node.inputs[1])
    if kernel is None or kernel.size < SMALLEST:
        return
    axis = KERNELS[node.op_type]
    levels, steps = _by_channel(kernel, axis, ALL_STEPS)
    others = tuple(each for each in range(kernel.ndim) if each != axis)
    name = f"{node.name}/weight"
    wide = add(node, "Cast", [weight(graph, levels, f"{name}/bytes")], f"{name}/widen", to=int(ir.DataType.FLOAT))
    scaled = [wide, weight(graph, np.expand_dims(steps, others), f"{name}/steps")]
    node.replace_input_with(1, add(node, "Mul", scaled, name))


def _move_bytes(graph: ir.Graph) -> None:
    """Move 8-bit values where all inputs of a move have one scale, and remove dequantise-quantise pairs."""
    for node in list(graph):
        if node.op_type in MOVES:
            varying = [value for value in node.inputs if value is not None and constant(value) is None]
            makers = [value.producer() for value in varying]
            wides = [maker for maker in makers if maker is not None and maker.op_type == "DequantizeLinear"]
            if len(wides) != len(varying) or len({tuple(wide.inputs[1:]) for wide in wides}) != 1:
                continue
            bytes_of = {wide.outputs[0]: wide.inputs[0] for wide in wides}
            inputs = [bytes_of.get(value, value) if value is not None else None for value in node.inputs]
            moved = ir.node(node.op_type, inputs, node.attributes, name=node.name)
            moved.outputs[0].name = f"{node.outputs[0].name}/bytes"
            graph.insert_before(node, moved)
            replace(node, "DequantizeLinear", [moved.outputs[0], *wides[0].inputs[1:]], {}, f"{node.name}/dequantise")
        elif node.op_type == "QuantizeLinear":
            maker = node.inputs[0].producer() if node.inputs[0] is not None else None
            if maker is not None and maker.op_type == "DequantizeLinear" and maker.inputs[1:] == node.inputs[1:]:
                assert maker.inputs[0] is not None
                bypass(node, maker.inputs[0])
