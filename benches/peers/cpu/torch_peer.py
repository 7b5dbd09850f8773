"""PyTorch on the CPU, twice: as it is called and comes, and with memory that is kept.

As it comes, every result of more than some megabytes is new memory, which the system has to find and clear: for what only
reads and writes, that is most of the time. The other one writes into tensors that are there where an op can do so, and its
allocator gives nothing back; so much work on PyTorch's side is more than most people do, and it shows the kernel alone.
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(HERE, "..", "gpu")]

import numpy
import torch
import torch.nn.functional as F

import server
import torch_models
from case_list import parse_value
from server import Skipped, Work

torch.set_num_threads(int(os.environ.get("PEER_THREADS", "1")))
KEPT = os.environ.get("PEER_KEEPS_MEMORY") == "1"
# Enough for any case, cleared once.
HEAP = 2 << 30
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "i8": torch.int8, "u32": torch.int64}


def tensor(array, dtype):
    if dtype == "bf16":
        return torch.from_numpy(array.view(numpy.int16)).view(torch.bfloat16)
    return torch.from_numpy(array.astype(numpy.int64) if dtype == "u32" else array)


class Torch(Work):
    """`function(*inputs)` gives a result or several; inputs that carry gradients are named by `leaves`."""

    def __init__(self, case, function, kernel, outputs=(0,), computes=None, pick=None):
        self.case, self.function, self.kernel = case, function, kernel
        self.outputs, self.computes, self.pick = outputs, computes, pick

    def prepare(self, arrays):
        tensors = [tensor(a, meta["dtype"]) for a, meta in zip(arrays, self.case["inputs"], strict=True)]
        return self.pick(*tensors) if self.pick else tuple(tensors)

    def overwrite(self, old, new):
        with torch.no_grad():
            old.copy_(new)

    def poison(self, results):
        with torch.no_grad():
            for result in results:
                result.fill_(float("nan") if result.is_floating_point() else -1)

    def call(self, *inputs):
        results = self.function(*inputs)
        return results if isinstance(results, tuple) else (results,)

    def arrays(self, results):
        for result in results:
            result = result.detach().contiguous()
            yield (result.view(torch.int16) if result.dtype == torch.bfloat16 else result).numpy()


class Gradients(Torch):
    """Forward and backward in one go: the inputs at `leaves` get gradients, the last is what flows back."""

    def __init__(self, case, function, kernel, leaves, computes, outputs, pick):
        super().__init__(case, function, kernel, outputs, computes, pick)
        self.leaves = leaves

    def prepare(self, arrays):
        inputs = super().prepare(arrays)
        return tuple(t.requires_grad_(i in self.leaves) if t.is_floating_point() else t for i, t in enumerate(inputs))

    def call(self, *inputs):
        *given, upstream = inputs
        out = self.function(*given)
        return (out, *torch.autograd.grad(out, [given[i] for i in self.leaves], upstream))


def kept(case, call):
    """Results in memory that is kept, where that is asked for: one tensor of the output's shape for each set of inputs."""
    memory, out = {}, case["outputs"][0]
    if not KEPT:
        return call

    def run(*inputs):
        key = inputs[0].data_ptr()
        if key not in memory:
            memory[key] = torch.empty(out["dims"], dtype=DTYPES[out["dtype"]])
        return call(*inputs, out=memory[key])

    return run


def matmul(case, value):
    if value["transpose_a"] or value["transpose_b"] or value["epilogue"].name != "None":
        raise Skipped("another form of product")
    return Torch(case, kept(case, torch.matmul), "torch.matmul")


def matmul_int8(case, value):
    pick = lambda a, a_scales, b, b_scales: (a, b.t())
    return Torch(case, torch._int_mm, "torch._int_mm, int32, no scales", computes="integer product", pick=pick)


def matmul_sparse24(case, value):
    raise Skipped("no 2:4 product on a CPU")


def by_heads(*tensors):
    return tuple(t.transpose(1, 2) for t in tensors)


def attention(case, value):
    function = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=value["scale"]).transpose(1, 2)
    pick = lambda *qkv: tuple(t.transpose(1, 2).contiguous() for t in qkv)
    return Torch(case, function, "scaled_dot_product_attention", pick=pick)


def attention_bwd(case, value):
    scale = value.arguments[0]["scale"]
    function = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=scale)
    pick = lambda q, k, v, y, lse, dy: tuple(t.transpose(1, 2).contiguous() for t in (q, k, v, dy))
    work = Gradients(case, function, "scaled_dot_product_attention and autograd", (0, 1, 2), "attention both", (0, 1, 2, 3), pick)
    plain = work.arrays
    work.arrays = lambda results: plain(tuple(t.transpose(1, 2) for t in results))
    return work


def softmax(case, value):
    return Torch(case, kept(case, lambda x, out=None: torch.softmax(x, dim=-1, out=out)), "torch.softmax")


def layernorm(case, value):
    function = lambda x, weight, bias: F.layer_norm(x, x.shape[-1:], weight, bias, value["epsilon"])
    return Torch(case, function, "F.layer_norm")


def rmsnorm(case, value):
    return Torch(case, lambda x, weight: F.rms_norm(x, x.shape[-1:], weight, value["epsilon"]), "F.rms_norm")


def add(case, value):
    return Torch(case, kept(case, torch.add), "torch.add")


def gelu(approximate):
    def handler(case, value):
        into = lambda x, out: torch.ops.aten.gelu.out(x, approximate=approximate, out=out)
        plain = lambda x: F.gelu(x, approximate=approximate)
        return Torch(case, kept(case, into) if KEPT else plain, f"F.gelu, {approximate}")

    return handler


def moe_gate(case, value):
    def function(scores):
        values, indices = torch.topk(scores, value["k"], dim=-1)
        return indices, values

    work = Torch(case, function, "torch.topk", outputs=(0, 1))
    plain = work.arrays
    work.arrays = lambda results: plain((results[0].to(torch.int32), results[1]))
    return work


def cross_entropy(case, value):
    function = lambda logits, targets: F.cross_entropy(logits, targets, reduction="none")
    return Torch(case, function, "F.cross_entropy")


def cross_entropy_bwd(case, value):
    function = lambda logits, targets: F.cross_entropy(logits, targets, reduction="none")
    pick = lambda logits, targets, lse, upstream: (logits, targets, upstream)
    return Gradients(case, function, "F.cross_entropy and autograd", (0,), "cross entropy both", (0, 1), pick)


def divergence(value):
    t = value["temperature"]

    def function(student, teacher, weights):
        log_q, log_p = F.log_softmax(student / t, dim=-1), F.log_softmax(teacher / t, dim=-1)
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1) * (weights * t**2)

    return function


def kl(case, value):
    return Torch(case, divergence(value), "F.kl_div of F.log_softmax")


def kl_bwd(case, value):
    pick = lambda student, teacher, weights, s, t, expectation, upstream: (student, teacher, weights, upstream)
    return Gradients(case, divergence(value), "F.kl_div of F.log_softmax, autograd", (0,), "kl both", (0, 1), pick)


def fake_quant(case, value):
    zeros = {}

    def function(x, steps):
        if value["granularity"].name == "Tensor":
            return torch.fake_quantize_per_tensor_affine(x, steps[0], zeros.setdefault(1, torch.zeros(1, dtype=torch.int32))[0], -128, 127)
        zero = zeros.setdefault(len(steps), torch.zeros(len(steps), dtype=torch.int32))
        return torch.fake_quantize_per_channel_affine(x, steps, zero, 0, -128, 127)

    return Torch(case, function, "torch.fake_quantize")


def adamw(case, value):
    def function(p, g, m, v, factor, rates):
        # Which step this is stands with the rates.
        steps = [rates[4].clone()]
        torch._fused_adamw_(
            [p], [g], [m], [v], [], steps,
            lr=float(rates[0]), beta1=value["beta1"], beta2=value["beta2"], weight_decay=value["weight_decay"],
            eps=value["epsilon"], amsgrad=False, maximize=False,
        )  # fmt: skip
        return p, m, v

    return Torch(case, function, "AdamW, fused", outputs=(0, 1, 2))


def training_step(case, value):
    return torch_models.TrainingStep(case, value, tensor)


HANDLERS = {
    "matmul": matmul,
    "matmul_int8": matmul_int8,
    "matmul_sparse24": matmul_sparse24,
    "attention": attention,
    "attention_bwd": attention_bwd,
    "softmax": softmax,
    "layernorm": layernorm,
    "rmsnorm": rmsnorm,
    "add": add,
    "gelu_tanh": gelu("tanh"),
    "gelu_erf": gelu("none"),
    "moe_gate": moe_gate,
    "cross_entropy": cross_entropy,
    "cross_entropy_bwd": cross_entropy_bwd,
    "kl": kl,
    "kl_bwd": kl_bwd,
    "fake_quant": fake_quant,
    "adamw": adamw,
    "training_step": training_step,
}


def find(peer, case):
    if case["op"] not in HANDLERS:
        raise Skipped("no counterpart")
    return HANDLERS[case["op"]](case, parse_value(case["params"].split(" ", 1)[0]))


if __name__ == "__main__":
    if KEPT:
        torch.ones(HEAP // 4)
    keeps = {"PEER_KEEPS_MEMORY": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    peers = [
        {"name": "PyTorch", "version": torch.__version__},
        {"name": "PyTorch, memory kept", "version": torch.__version__, "environment": keeps},
    ]
    server.serve(peers, find)
