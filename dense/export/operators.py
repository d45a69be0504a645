"""ONNX graphs of networks, with this package's operators as functions while they are made.

An operator's own products would be hundreds of nodes a block, which take long to capture and to
optimise: they replace its call at the end.
"""

import re
from collections.abc import Iterable, Sequence

import onnx
import torch
from onnx.defs import OpSchema
from onnx.inliner import inline_local_functions
from onnxscript.values import Op, Opset
from torch import nn

from backbones.ops.common import same_padding
from backbones.ops.dispatch import graphs_for
from dense.export.graphs import IMAGE, captured, open_sizes

_DOMAIN, _VERSION = "dense_backbones", 1
_LAST = 2**63 - 1


def to_onnx(model: nn.Module, outputs: Sequence[str] | None = None) -> onnx.ModelProto:
    """The ONNX graph of a network of images, one for all sizes.

    >>> onnx.save(to_onnx(timm.create_model("i_d_dw_conv_nano").eval()), "network.onnx")

    Args:
        model: in evaluation mode; called with ``image``, ``(B, 3, H, W)``.
        outputs: their names.

    Returns:
        A graph of ONNX's own operators, for the sizes of :func:`.graphs.captured`. ``batch``,
        ``height`` and ``width`` are the names of those that are open.
    """
    with graphs_for("onnx"):
        program = captured(model)
    with open_sizes():
        made = torch.onnx.export(
            program,
            dynamo=True,
            input_names=[IMAGE],
            output_names=outputs,
            optimize=True,
            verbose=False,
            custom_translation_table=_translations(),
        )
    return _with_named_sizes(_defined(made.model_proto))


def _translations() -> dict:
    def predict_and_aggregate(x, hidden, weight, bias, size: int):
        name = f"predict_and_aggregate_{size}_{x.shape[3]}"
        return _node(name, "x", "hidden", "weight", "bias")(x, hidden, weight, bias)

    def depthwise(x, taps, bias, size: int):
        return _node(f"depthwise_{size}_{x.shape[3]}", "x", "taps", "bias")(x, taps, bias)

    return {
        torch.ops.dense.predict_and_aggregate.default: predict_and_aggregate,
        torch.ops.dense.depthwise.default: depthwise,
    }


def _defined(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with each call of an operator replaced by its nodes; OpenVINO reads no calls."""
    called = {node.op_type for node in model.graph.node if node.domain == _DOMAIN}
    if not called:
        return model
    (version,) = (one.version for one in model.opset_import if not one.domain)
    del model.functions[:]
    for name in sorted(called):
        operator, size, count = name.rsplit("_", 2)
        text = {"depthwise": _depthwise, "predict_and_aggregate": _predict_and_aggregate}[operator]
        body = "\n".join(text(int(size), int(count)))
        head = f'<domain: "{_DOMAIN}", opset_import: ["": {version}]>'
        model.functions.append(onnx.parser.parse_function(f"{head}\n{name} {body}"))
    return inline_local_functions(model)


def _with_named_sizes(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with the image's sizes by their names, in place of torch.export's symbols."""
    graph = model.graph
    symbols = (size.dim_param for size in graph.input[0].type.tensor_type.shape.dim)
    names = dict(zip(symbols, ("batch", "channels", "height", "width"), strict=True))
    for value in (*graph.input, *graph.output, *graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = re.sub(
                    r"\w+", lambda found: names.get(found[0], found[0]), size.dim_param
                )
    return model


def _node(name: str, *inputs: str) -> Op:
    given = [OpSchema.FormalParameter(one, "T") for one in inputs]
    types = [("T", ["tensor(float)", "tensor(double)"], "")]
    result = [OpSchema.FormalParameter("out", "T")]
    schema = OpSchema(name, _DOMAIN, _VERSION, inputs=given, outputs=result, type_constraints=types)
    return Op(Opset(_DOMAIN, _VERSION), name, schema)


def _predict_and_aggregate(size: int, groups: int) -> Iterable[str]:
    """As :func:`backbones.ops.inhomogeneous.inhomogeneous_dynamic_depthwise_conv` has it."""
    before, after = same_padding(size)
    yield "(x, hidden, weight, bias) => (out) {"
    yield "planes = Transpose<perm: ints = [4, 0, 1, 2, 3]>(x)"
    # Columns and groups are one axis. With the axes apart, ONNX Runtime would move the
    # transposition behind the products, whose innermost axis is then the short one.
    yield from _constant("together", (0, 0, 0, -1))
    yield "flat = Reshape(planes, together)"
    yield from _constant("pads", (0, 0, before, before * groups, 0, 0, after, after * groups))
    yield "padded = Pad(flat, pads)"
    # The bias is the weight of a feature that is 1 everywhere.
    yield "one = Constant<value_float: float = 1.0>()"
    yield "like = CastLike(one, hidden)"
    yield from _constant("more", (0, 0, 0, 0, 0, 0, 0, 1))
    yield "features = Pad(hidden, more, like)"
    yield from _constant("last", (-1,))
    yield "column = Unsqueeze(bias, last)"
    yield "rows = Concat<axis: int = 1>(weight, column)"
    yield from _constant("apart", (groups, size**2, -1))
    yield "by_group = Reshape(rows, apart)"
    yield "by_tap = Transpose<perm: ints = [1, 2, 0]>(by_group)"
    weights = ", ".join(f"weight{tap}" for tap in range(size**2))
    yield f"{weights} = Split<axis: int = 0, num_outputs: int = {size**2}>(by_tap)"
    yield from _constant("axes", (2, 3))
    yield from _constant("lines", (0, 0, -1))
    for tap in range(size**2):
        row, column = divmod(tap, size)
        ends = row - size + 1 or _LAST, (column - size + 1) * groups or _LAST
        yield from _constant(f"start{tap}", (row, column * groups))
        yield from _constant(f"end{tap}", ends)
        yield f"window{tap} = Slice(padded, start{tap}, end{tap}, axes)"
        yield f"kernels{tap} = MatMul(features, weight{tap})"
        yield f"flat{tap} = Reshape(kernels{tap}, lines)"
        yield f"part{tap} = Mul(window{tap}, flat{tap})"
        yield f"sum{tap} = Add(sum{tap - 1}, part{tap})" if tap else "sum0 = Identity(part0)"
    yield from _constant("split", (0, 0, 0, -1, groups))
    yield f"grouped = Reshape(sum{size**2 - 1}, split)"
    yield "out = Transpose<perm: ints = [1, 2, 3, 4, 0]>(grouped)\n}"


def _depthwise(size: int, channels: int) -> Iterable[str]:
    """A convolution for each image: a number of groups that follows from the batch is no number."""
    before, after = same_padding(size)
    yield "(x, taps, bias) => (out) {"
    yield "planes = Transpose<perm: ints = [0, 3, 1, 2]>(x)"
    yield from _constant("pads", (0, 0, before, before, 0, 0, after, after))
    yield "padded = Pad(planes, pads)"
    yield "by_channel = Transpose<perm: ints = [0, 2, 1]>(taps)"
    yield from _constant("shape", (0, 0, 1, size, size))
    yield "kernels = Reshape(by_channel, shape)"
    yield "convolved = Scan<num_scan_inputs: int = 2, body: graph = each"
    yield f"(float[{channels}, h, w] image, float[{channels}, 1, {size}, {size}] kernel)"
    yield f"=> (float[{channels}, rows, columns] done) {{"
    yield from _constant("axis", (0,))
    yield "one = Unsqueeze(image, axis)"
    yield f"many = Conv<group: int = {channels}>(one, kernel)"
    yield "done = Squeeze(many, axis)\n}>(padded, kernels)"
    yield "last = Transpose<perm: ints = [0, 2, 3, 1]>(convolved)"
    yield "out = Add(last, bias)\n}"


def _constant(name: str, values: Iterable[int]) -> Iterable[str]:
    yield f"{name} = Constant<value_ints: ints = [{', '.join(map(str, values))}]>()"
