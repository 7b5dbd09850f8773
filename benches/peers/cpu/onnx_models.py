"""Whole models as ONNX graphs, as exporters and `quantize_dynamic` write them."""

import numpy
from onnx import TensorProto, helper


class Graph:
    """Nodes that are added one after the other; constants by name."""

    def __init__(self, constants):
        self.nodes, self.constants = [], dict(constants)

    def add(self, operator, *inputs, name=None, outputs=1, **attributes):
        """The name of what the node gives, or the names."""
        names = [name] if name else [f"{operator}_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(operator, inputs, names, **attributes))
        return names[0] if len(names) == 1 else names

    def constant(self, name, value):
        self.constants[name] = value
        return name

    def linear(self, layer, x, name=None):
        weight = self.constants.pop(f"{layer}.weight")
        weight = self.constant(f"{layer}.turned", numpy.ascontiguousarray(weight.T))
        return self.add("Add", self.add("MatMul", x, weight), f"{layer}.bias", name=name)

    def norm(self, layer, x):
        return self.add("LayerNormalization", x, f"{layer}.weight", f"{layer}.bias", epsilon=1e-12)

    def attention(self, layer, x, heads, shape):
        rows, length, width = shape
        split = self.constant("split", numpy.array([rows, length, heads, width // heads]))
        joined = self.constant("joined", numpy.array([rows, length, width]))

        def by_heads(part, order):
            y = self.add("Reshape", self.linear(f"{layer}.{part}", x), split)
            return self.add("Transpose", y, perm=order)

        q, k, v = by_heads("query", [0, 2, 1, 3]), by_heads("key", [0, 2, 3, 1]), by_heads("value", [0, 2, 1, 3])
        scale = self.constant("scale", numpy.array((width // heads) ** -0.5, dtype=numpy.float32))
        shares = self.add("Softmax", self.add("Mul", self.add("MatMul", q, k), scale), axis=-1)
        y = self.add("Transpose", self.add("MatMul", shares, v), perm=[0, 2, 1, 3])
        return self.linear(f"{layer}.output", self.add("Reshape", y, joined))

    def activation(self, kind, x):
        return self.add("Relu", x) if kind == "relu" else self.add("Gelu", x, approximate="tanh")

    def linear_int8(self, layer, x, name=None):
        """Integers of the input by the range of all of it, of the weight by that of each output channel."""
        weight = self.constants.pop(f"{layer}.weight")
        steps = numpy.abs(weight).max(axis=1) / numpy.float32(127)
        levels = numpy.rint(weight / steps[:, None]).astype(numpy.int8)
        weight = self.constant(f"{layer}.levels", numpy.ascontiguousarray(levels.T))
        zero = self.constant(f"{layer}.zero", numpy.zeros(len(steps), dtype=numpy.int8))
        steps = self.constant(f"{layer}.steps", steps.astype(numpy.float32))
        x, step, x_zero = self.add("DynamicQuantizeLinear", x, outputs=3)
        sums = self.add("Cast", self.add("MatMulInteger", x, weight, x_zero, zero), to=TensorProto.FLOAT)
        scaled = self.add("Mul", sums, self.add("Mul", step, steps))
        return self.add("Add", scaled, f"{layer}.bias", name=name)


def encoder(weights, heads, shape):
    """Logits of `tokens`, int64 of that shape, by a post-norm encoder."""
    graph = Graph(weights)
    positions = graph.constants.pop("embedding.positions")[: shape[1]]
    x = graph.add("Gather", "embedding.tokens", "tokens")
    x = graph.add("Add", x, graph.constant("positions", numpy.ascontiguousarray(positions)))
    x = graph.norm("blocks.0.norm_attention", x)
    count = sum(name.endswith("ffn.in.weight") for name in weights)
    for i in range(count):
        attended = graph.attention(f"blocks.{i}.attention", x, heads, (*shape, positions.shape[1]))
        x = graph.norm(f"blocks.{i}.norm_ffn", graph.add("Add", x, attended))
        hidden = graph.activation("gelu", graph.linear(f"blocks.{i}.ffn.in", x))
        following = f"blocks.{i + 1}.norm_attention" if i + 1 < count else "norm_final"
        x = graph.norm(following, graph.add("Add", x, graph.linear(f"blocks.{i}.ffn.out", hidden)))
    graph.linear("head", x, name="logits")
    return graph


def ffn_int8(weights, activation):
    """y of x by an FFN."""
    graph = Graph(weights)
    hidden = graph.activation(activation, graph.linear_int8("blocks.0.ffn.in", "x"))
    graph.linear_int8("blocks.0.ffn.out", hidden, name="y")
    return graph
