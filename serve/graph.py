"""What the ONNX part of a bundle may hold: an allow-list, so that what nobody thought of is refused too.

Fields are looked through on the wire, before any parser sees them: those of the small schema in protos/ and no
others, and no more of them than a graph of ours could have. Parsers make a message of a hundred bytes and more of
every two bytes that say "an empty one", so a file's size alone bounds nothing.
"""

from __future__ import annotations

import math
from functools import cache

from google.protobuf.descriptor import Descriptor
from google.protobuf.descriptor import FieldDescriptor as Field
from google.protobuf.message import DecodeError

from serve.errors import BundleError
from serve.stubs.onnx.v1 import model_pb2 as onnx
from serve.text import one_line, quoted

MOST_FIELDS = 100_000  # twenty times what the largest of ours has
MOST_SIDES = 8  # of a tensor
MOST_TEXT = 2**18  # bytes of a name or a property: a card in any language
VARINT, LENGTH, FIXED32 = 0, 2, 5  # protobuf's ways to write a value
WIRE = {Field.TYPE_INT32: VARINT, Field.TYPE_INT64: VARINT, Field.TYPE_FLOAT: FIXED32}  # the rest has a length
FLOAT, UINT8, INT8, INT32, INT64, FLOAT16 = 1, 2, 3, 6, 7, 10  # ONNX's element types
SIZES = {FLOAT: 4, UINT8: 1, INT8: 1, INT32: 4, INT64: 8, FLOAT16: 2}
KINDS = {1, 2, 3, 4, 6, 7, 8}  # of attributes: numbers, strings, lists of these, a tensor
# What the exporter writes, and its like: layers, arithmetic, comparisons, moves. No control flow, nothing random, no
# text, no files.
OPERATORS = {
    *("Conv", "ConvTranspose", "Gemm", "MatMul"),
    *("BatchNormalization", "InstanceNormalization", "LayerNormalization"),
    *("Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Sigmoid", "HardSigmoid", "Tanh", "Softplus", "Softsign", "Softmax"),
    *("Add", "Sub", "Mul", "Div", "Max", "Min", "Neg", "Abs", "Pow", "Sqrt", "Exp", "Log", "Erf", "Reciprocal"),
    *("Round", "Floor", "Ceil", "Clip", "And", "Or", "Not"),
    *("Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal"),
    *("Where", "ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ArgMax", "ArgMin", "GlobalAveragePool"),
    *("Cast", "QuantizeLinear", "DequantizeLinear", "Constant", "Identity", "Reshape", "Transpose", "Concat", "Slice"),
    *("Split", "Squeeze", "Unsqueeze", "Flatten", "Gather", "Shape", "DepthToSpace", "SpaceToDepth"),
}
NEVER = {
    ("Model", 25): "local functions",
    ("Graph", 15): "sparse weights",
    ("Attribute", 6): "a nested graph",
    ("Attribute", 11): "nested graphs",
    ("Attribute", 22): "sparse weights",
    ("Attribute", 23): "sparse weights",
    ("Tensor", 13): "weights in other files (external data)",
    ("Tensor", 14): "weights in other files (external data)",
}
NOT_ONNX = "it is not an ONNX file, or not a whole one"

Known = dict[tuple[int, int], tuple[Descriptor | None, bool, bool]]


def read(data: bytes) -> onnx.Model:
    """Return a model file as messages.

    Raises:
        BundleError: it is no ONNX, or holds what a bundle never does.
    """
    if data[:1] != b"\x08":  # every writer begins with the first field, ir_version
        raise BundleError(NOT_ONNX)
    _Scan(data).message(onnx.DESCRIPTOR.message_types_by_name["Model"], 0, len(data))
    try:
        model = onnx.Model.FromString(data)
    except DecodeError:
        raise BundleError(NOT_ONNX) from None
    if not model.ir_version or not model.graph.node:
        raise BundleError(NOT_ONNX)
    if [each.domain for each in model.opset_import] != [""]:
        received = quoted([each.domain for each in model.opset_import])
        raise BundleError(f"it should import ONNX's own operators, and only these. Received: {received}")
    tensors = list(model.graph.initializer)
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx"):
            name = one_line(f"{node.domain}:{node.op_type}", 80)
            raise BundleError(f"it uses the custom operator {name}; only ONNX's own run")
        if node.op_type not in OPERATORS:
            raise BundleError(f"it uses the operator {quoted(node.op_type)}, which a bundle never does")
        for attribute in node.attribute:
            if attribute.type not in KINDS:
                raise BundleError(f"it holds an attribute of kind {attribute.type}, which a bundle never does")
            if attribute.HasField("t"):
                tensors.append(attribute.t)
    for tensor in tensors:
        _check_whole(tensor)
    return model


def _check_whole(tensor: onnx.Tensor) -> None:
    size = SIZES.get(tensor.data_type)
    if size is None:
        raise BundleError(
            f"the weights {quoted(tensor.name)} should be float32, float16, int64, int32, int8 or uint8. "
            f"Received: ONNX's element type {tensor.data_type}"
        )
    if len(tensor.dims) > MOST_SIDES or not all(0 <= side < 2**31 for side in tensor.dims):
        raise BundleError(f"the weights {quoted(tensor.name)} have no shape. Received: {quoted(list(tensor.dims))}")
    wanted = math.prod(tensor.dims) * size
    if len(tensor.raw_data) != wanted:
        received = f"{len(tensor.raw_data):,}"
        raise BundleError(f"the weights {quoted(tensor.name)} should be {wanted:,} bytes. Received: {received}")


class _Scan:
    """Goes through a file's fields without keeping any. It nests no deeper than the schema does."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._left = MOST_FIELDS

    def message(self, kind: Descriptor, at: int, end: int) -> None:
        """Raise BundleError unless a message holds fields of its schema only, each written as its type is."""
        known = _known(kind)
        while at < end:
            tag, at = self._varint(at, end)
            found = known.get((tag >> 3, tag & 7))
            if found is None:
                what = NEVER.get((kind.name, tag >> 3), f"{kind.name} field {tag >> 3}")
                raise BundleError(f"it holds {what}, which a bundle never does")
            inner, packed, text = found
            self._left -= 1
            if tag & 7 == VARINT:
                _, at = self._varint(at, end)
            elif tag & 7 == FIXED32:
                at += 4
            else:
                size, at = self._varint(at, end)
                begin, at = at, at + size
                if at > end:
                    raise BundleError(NOT_ONNX)
                if packed:
                    self._left -= size
                if text and size > MOST_TEXT:
                    raise BundleError(f"it holds text of {size:,} bytes; a bundle's has {MOST_TEXT:,} at most")
                if inner is not None:
                    self.message(inner, begin, at)
            if self._left < 0:
                raise BundleError(f"it is made of over {MOST_FIELDS:,} pieces, more than any bundle is")
        if at > end:
            raise BundleError(NOT_ONNX)

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if at >= end:
                break
            byte = self._data[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value, at
        raise BundleError(NOT_ONNX)


@cache
def _known(kind: Descriptor) -> Known:
    """Return what each field of a message is, by its number and how it is written: (message, packed, text)."""
    known: Known = {}
    for field in kind.fields:
        wire = WIRE.get(field.type, LENGTH)
        text = field.type == Field.TYPE_STRING
        known[field.number, wire] = (field.message_type, False, text)
        if field.is_repeated and wire != LENGTH:
            known[field.number, LENGTH] = (None, True, False)
    return known
