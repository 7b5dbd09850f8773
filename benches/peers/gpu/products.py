"""Peers of dense products and feed-forward blocks."""

import torch
import torch.nn.functional as F

from protocol import DTYPES, Peer, relative_error, spread


def bound_of(case):
    return 1e-4 if case.dtype == "f32" else 1e-2


def normal(generator, dims, dtype, scale=1.0):
    return torch.randn(dims, generator=generator, device=generator.device, dtype=DTYPES[dtype]) * scale


def sampled_product(a, b, got):
    """Rows and columns of the last batch of a times b in float64, and the same elements of what came out."""
    while a.dim() > 2 or b.dim() > 2:
        a = a[-1] if a.dim() > 2 else a
        b = b[-1] if b.dim() > 2 else b
        got = got[-1]
    rows, columns = spread(a.shape[0], 48), spread(b.shape[1], 48)
    want = a[rows].double() @ b[:, columns].double()
    return relative_error(got[rows][:, columns], want)


def with_precision(precision, call):
    def run(*arguments):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            return call(*arguments)
        finally:
            torch.set_float32_matmul_precision(before)

    return run


def matmul(case, context):
    value = case.value
    if value["accumulate"] or value["epilogue"].name not in ("None", "Bias", "BiasRelu", "BiasGelu"):
        return
    transpose_a, transpose_b = value["transpose_a"], value["transpose_b"]
    epilogue = value["epilogue"].name

    def make(generator):
        return tuple(normal(generator, t["dims"], t["dtype"]) for t in case.inputs)

    def product(a, b, *bias):
        y = torch.matmul(a.mT if transpose_a else a, b.mT if transpose_b else b)
        if bias:
            y = y + bias[0]
        if epilogue == "BiasRelu":
            y = F.relu(y)
        return F.gelu(y, approximate="tanh") if epilogue == "BiasGelu" else y

    def check(inputs, out):
        if len(inputs) == 2:
            a, b = inputs
            return sampled_product(a.mT if transpose_a else a, b.mT if transpose_b else b, out)
        a, b, bias = (t.double() for t in inputs)
        return relative_error(out, product(a, b, bias))

    bound = bound_of(case)
    yield Peer("torch.matmul", "forward", make, product, check, bound)
    if case.dtype == "f32" and context.bench.cuda:
        yield Peer("torch.matmul TF32", "forward", make, with_precision("high", product), check, 1e-2)
    if len(case.inputs) == 3:
        yield from context.compiled("torch.compile matmul", "forward", make, product, check, bound)


ACTIVATIONS = {"Relu": F.relu, "Gelu": lambda z: F.gelu(z, approximate="tanh")}


def block(activation):
    def forward(x, w1, b1, w2, b2):
        z = F.linear(x, w1, b1)
        if activation == "Geglu":
            gate, value = z.chunk(2, dim=-1)
            hidden = F.gelu(gate, approximate="tanh") * value
        else:
            hidden = ACTIVATIONS[activation](z)
        return F.linear(hidden, w2, b2)

    return forward


def ffn_inputs(case, generator):
    """x, w1, b1, w2, b2 of a forward or a backward case."""
    dims, dtype = [t["dims"] for t in case.inputs], case.dtype
    (hidden, d), (d2, f) = dims[1], dims[3] if case.mode == "forward" else dims[2]
    return (
        normal(generator, dims[0], dtype),
        normal(generator, [hidden, d], dtype, d**-0.5),
        normal(generator, [hidden], dtype),
        normal(generator, [d2, f], dtype, f**-0.5),
        normal(generator, [d2], dtype),
    )


def ffn(case, context):
    activation = case.value["activation"].name
    forward = block(activation)

    def make(generator):
        return ffn_inputs(case, generator)

    def check(inputs, out):
        rows = spread(inputs[0].flatten(0, -2).shape[0], 8)
        x, *weights = inputs
        want = forward(x.flatten(0, -2)[rows].double(), *(w.double() for w in weights))
        return relative_error(out.flatten(0, -2)[rows], want)

    bound = bound_of(case)
    yield Peer("torch eager", "forward", make, forward, check, bound)
    yield from context.compiled("torch.compile", "forward", make, forward, check, bound)
    if activation != "Geglu":
        gelu = activation == "Gelu"

        def fused(x, w1, b1, w2, b2):
            hidden = torch._addmm_activation(b1, x.flatten(0, -2), w1.mT, use_gelu=gelu)
            return torch.addmm(b2, hidden, w2.mT).view(x.shape[:-1] + (w2.shape[0],))

        # cuBLASLt's own epilogue: bias and activation inside the first product.
        yield Peer("torch._addmm_activation", "forward", make, fused, check, bound)
    else:
        gegelu = context.liger("geglu", "LigerGELUMulFunction")
        if gegelu:

            def liger(x, w1, b1, w2, b2):
                gate, value = F.linear(x, w1, b1).chunk(2, dim=-1)
                return F.linear(gegelu.apply(gate.contiguous(), value.contiguous()), w2, b2)

            yield Peer("Liger GEGLU", "forward", make, liger, check, bound)


def ffn_backward(case, context):
    activation = case.value["activation"].name
    yield from context.gradients(
        case,
        {"torch eager": block(activation)},
        make=lambda generator: ffn_inputs(case, generator),
        wanted=(0, 1, 2, 3, 4),
        rows=(0,),
        bound=bound_of(case),
    )


HANDLERS = {
    "matmul": matmul,
    "ffn_relu": ffn,
    "ffn_gelu": ffn,
    "ffn_geglu": ffn,
    "ffn_relu_bwd": ffn_backward,
    "ffn_gelu_bwd": ffn_backward,
    "ffn_geglu_bwd": ffn_backward,
}
