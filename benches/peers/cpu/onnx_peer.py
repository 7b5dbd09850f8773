"""ONNX Runtime on the CPU: one node per case, outputs in memory that is kept, weights packed ahead as a model's are."""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(HERE, "..", "gpu")]

import numpy
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

import onnx_models
import server
from case_list import parse_value
from server import Skipped, Work

OPSET = 20
TYPES = {
    "f32": (TensorProto.FLOAT, numpy.float32),
    "u8": (TensorProto.UINT8, numpy.uint8),
    "i8": (TensorProto.INT8, numpy.int8),
    "i32": (TensorProto.INT32, numpy.int32),
    "i64": (TensorProto.INT64, numpy.int64),
}
# What is added to an i8 to make it a u8: the library's fast products are of unsigned activations.
ZERO = 128


class Slot:
    """A session with its inputs and outputs bound."""

    def __init__(self, nodes, inputs, constants, outputs):
        """`inputs` and `constants` are arrays by name, `outputs` (name, type, dims)."""
        named = lambda name, dtype, dims: helper.make_tensor_value_info(name, TYPES[dtype][0], dims)
        code = {numpy.dtype(kind): name for name, (_, kind) in TYPES.items()}
        graph = helper.make_graph(
            nodes,
            "case",
            [named(name, code[a.dtype], a.shape) for name, a in inputs.items()],
            [named(*output) for output in outputs],
            [numpy_helper.from_array(numpy.ascontiguousarray(a), name) for name, a in constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ.get("PEER_THREADS", "1"))
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self.inputs, self.binding = inputs, self.session.io_binding()
        for name, array in inputs.items():
            self.binding.bind_cpu_input(name, array)
        self.results = []
        for name, dtype, dims in outputs:
            value = onnxruntime.OrtValue.ortvalue_from_numpy(poison(dims, TYPES[dtype][1]))
            self.binding.bind_ortvalue_output(name, value)
            self.results.append(value)

    def run(self):
        self.session.run_with_iobinding(self.binding)
        return self.results


def poison(dims, kind):
    return numpy.full(dims, numpy.nan if numpy.issubdtype(kind, numpy.floating) else -1, dtype=kind)


class Onnx(Work):
    """`build` makes the slot of a case's arrays."""

    def __init__(self, build, kernel, computes=None):
        self.build, self.kernel, self.computes = build, kernel, computes

    def prepare(self, arrays):
        return (self.build(*arrays),)

    def overwrite(self, old, new):
        # Weights are part of a session: other ones need another.
        old.__dict__.update(new.__dict__)

    def call(self, slot):
        return slot.run()

    def arrays(self, results):
        return [value.numpy() for value in results]


def matmul(case, value):
    if case["dtype"] != "f32" or value["transpose_a"] or value["transpose_b"] or value["epilogue"].name != "None":
        raise Skipped("another form of product")
    node = helper.make_node("MatMul", ["a", "b"], ["y"])
    dims = case["outputs"][0]["dims"]
    return Onnx(lambda a, b: Slot([node], {"a": a}, {"b": b}, [("y", "f32", dims)]), "MatMul, packed weights")


def matmul_int8(case, value):
    node = helper.make_node("MatMulInteger", ["a", "b", "zero"], ["y"])
    dims = case["outputs"][0]["dims"]

    def build(a, a_scales, b, b_scales):
        constants = {"b": b.T, "zero": numpy.array(ZERO, dtype=numpy.uint8)}
        return Slot([node], {"a": a.view(numpy.uint8) ^ ZERO}, constants, [("y", "i32", dims)])

    return Onnx(build, "MatMulInteger, packed weights, no scales", "integer product")


def rows(operator, kernel, **attributes):
    """A node on rows of its first input; the others are weights."""

    def handler(case, value):
        given = dict(attributes)
        if operator == "LayerNormalization":
            given["epsilon"] = value["epsilon"]
        names = [f"x{i}" for i in range(len(case["inputs"]))]
        node = helper.make_node(operator, names, ["y"], **given)
        dims = case["outputs"][0]["dims"]
        return Onnx(lambda x, *w: Slot([node], {"x0": x}, dict(zip(names[1:], w)), [("y", "f32", dims)]), kernel)

    return handler


def encoder(case, value):
    metas, dims = case["inputs"], case["outputs"][0]["dims"]

    def build(*arrays):
        named = {meta["name"]: a for meta, a in zip(metas, arrays, strict=True)}
        tokens = named.pop("tokens").astype(numpy.int64)
        graph = onnx_models.encoder(named, value["heads"], tokens.shape)
        return Slot(graph.nodes, {"tokens": tokens}, graph.constants, [("logits", "f32", dims)])

    return Onnx(build, "a graph of 4-D attention, LayerNormalization and Gelu, f32", "encoder")


def ffn_int8(case, value):
    metas, dims = case["inputs"], case["outputs"][0]["dims"]

    def build(*arrays):
        named = {meta["name"]: a for meta, a in zip(metas, arrays, strict=True)}
        x = named.pop("x")
        graph = onnx_models.ffn_int8(named, value["activation"].name)
        return Slot(graph.nodes, {"x": x}, graph.constants, [("y", "f32", dims)])

    return Onnx(build, "DynamicQuantizeLinear, MatMulInteger, scales by channel", "ffn one range")


HANDLERS = {
    "matmul": matmul,
    "matmul_int8": matmul_int8,
    "softmax": rows("Softmax", "Softmax", axis=-1),
    "layernorm": rows("LayerNormalization", "LayerNormalization", axis=-1),
    "gelu_tanh": rows("Gelu", "Gelu, tanh", approximate="tanh"),
    "gelu_erf": rows("Gelu", "Gelu, none"),
    "encoder": encoder,
    "encoder_int8": encoder,
    "ffn_int8": ffn_int8,
}


def find(peer, case):
    if case["op"] not in HANDLERS:
        raise Skipped("no counterpart")
    return HANDLERS[case["op"]](case, parse_value(case["params"].split(" ", 1)[0]))


if __name__ == "__main__":
    server.serve([{"name": "ONNX Runtime", "version": onnxruntime.__version__}], find)
