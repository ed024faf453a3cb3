"""The built-in networks as ONNX graphs, in standard operators, written without a converter."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from jax import lax
from onnx import TensorProto, helper, numpy_helper

from mnist_flax.models.cnn import CNN, Ensemble

OPSET = 18


class _Graph:
    """Nodes and initializers in the order in which they are added."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.arrays: list[onnx.TensorProto] = []

    def array(self, name: str, values: np.ndarray) -> str:
        self.arrays.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node and returns the name of its output."""
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name, **attributes))
        return name


def build(network: CNN | Ensemble, variables: Mapping[str, Any]) -> onnx.ModelProto:
    """The model `images`, uint8 [batch, 28, 28], -> `probabilities`, float32 [batch, classes].

    Arguments are those that `folded.fold_batch_norm` returns. The batch may have any size, 0 included.
    """
    graph = _Graph()
    pixels = graph.node("Cast", "images", to=TensorProto.FLOAT)
    images = graph.node("Div", pixels, graph.array("largest_pixel", np.array(255, np.float32)))
    images = graph.node("Unsqueeze", images, graph.array("channel_axis", np.array([1])))
    if isinstance(network, Ensemble):
        members = zip(network.members, network.split(variables), strict=True)
        each = [_add(graph, *member, images, f"member{i}/") for i, member in enumerate(members)]
        graph.node("Mean", *each)
        num_classes = network.members[0].num_classes
    else:
        _add(graph, network, variables, images)
        num_classes = network.num_classes
    graph.nodes[-1].output[0] = "probabilities"
    inputs = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 28, 28])
    outputs = helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", num_classes])
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_model(
        helper.make_graph(graph.nodes, "mnist_flax", [inputs], [outputs], graph.arrays),
        opset_imports=opsets,
        ir_version=helper.find_min_ir_version_for(opsets),
        producer_name="mnist_flax",
    )


def _add(graph: _Graph, network: CNN, variables: Mapping[str, Any], x: str, prefix: str = "") -> str:
    """Adds the nodes from images [batch, 1, 28, 28] to the probabilities, whose name it returns."""
    params, size = variables["params"], 28
    for i, (kernel_size, pool_size) in enumerate(zip(network.kernel_sizes, network.pool_sizes, strict=True)):
        ((low, high),) = lax.padtype_to_pads((size,), (kernel_size,), (1,), network.padding)
        size = (low + size + high - kernel_size + 1) // pool_size
        kernel = graph.array(f"{prefix}conv{i}_kernel", params[f"conv{i}_kernel"].transpose(3, 2, 0, 1))
        bias = graph.array(f"{prefix}conv{i}_bias", params[f"conv{i}_bias"])
        window = {"kernel_shape": [kernel_size] * 2, "pads": [low, low, high, high]}
        x = graph.node("Relu", graph.node("Conv", x, kernel, bias, **window))
        if pool_size > 1:
            x = graph.node("MaxPool", x, kernel_shape=[pool_size] * 2, strides=[pool_size] * 2)
    if network.head == "average":
        x = graph.node("GlobalAveragePool", x)
    x = graph.node("Flatten", x)
    for i, name in enumerate([*(f"dense{i}" for i in range(len(network.dense))), "logits"]):
        kernel, bias = params[name]["kernel"], params[name]["bias"]
        if i == 0:  # its rows are in the order [height, width, channels], and come in that of [channels, height, width]
            kernel = kernel.reshape(-1, network.channels[-1], len(bias)).swapaxes(0, 1).reshape(kernel.shape)
        arrays = graph.array(f"{prefix}{name}_kernel", kernel), graph.array(f"{prefix}{name}_bias", bias)
        x = graph.node("Gemm", x, *arrays)
        if name != "logits":
            x = graph.node("Relu", x)
    return graph.node("Softmax", x)
